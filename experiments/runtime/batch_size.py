"""The fastest number of signals to fit at once, if the config leaves it to the machine (`fit.batch_size` = 0).

Numbers are tried on the run's own network and signals, and the best is kept in `WORKDIR/batch_size.json`. Every later
start in that directory, on any machine, uses this number, because other numbers would give latents that differ by
rounding.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np

from experiments.runtime import processes
from experiments.runtime.memory import free_bytes, program_bytes
from experiments.runtime.progress import log
from experiments.runtime.run_directory import RunDirectory, RunError
from medfuncta_jax import sharding
from medfuncta_jax.batched import FitRules, fit_batch, observed
from medfuncta_jax.datasets import Dataset
from medfuncta_jax.datasets.dataset import NEW
from medfuncta_jax.field import STEP_SIZE
from medfuncta_jax.methods import METHODS

if TYPE_CHECKING:  # the settings of stages are in their modules, which import this one
    from experiments.settings import RunSettings

# The first number: at most this many points of all signals together (as many as `fit_latent` evaluates at once), and at
# most this many signals.
_POINTS, _SIGNALS = 65_536, 64
# The speed-up that makes another number worth its memory, and the part of the time of all signals that trying may cost.
_GAIN, _COST = 1.05, 0.05
# Minimum seconds of timing a number, so that chance does not decide between fast ones.
_SECONDS = 0.5


def settled(settings: RunSettings, dataset: Dataset, run: RunDirectory) -> RunSettings:
    """`settings` with a number in `fit.batch_size`; all processes of a run must call this.

    Raises:
      RunError: what was kept cannot be read.
    """
    if settings.fit.batch_size:
        return settings
    file = run.path / "batch_size.json"
    if processes.first() and not file.exists():
        _keep(file, _tried(settings, dataset))
    processes.wait_for_all("batch size")
    try:
        size = json.loads(file.read_text())["batch_size"]
        if not isinstance(size, int) or size < 1:
            raise ValueError(size)
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{file} is damaged; remove it, or give --config.fit.batch_size") from error
    log.info("fit: %d signals at once, of %s", size, file)
    return dataclasses.replace(settings, fit=dataclasses.replace(settings.fit, batch_size=size))


def _keep(file: Path, rates: dict[int, float]) -> None:
    """Write the choice atomically; the first choice among the jobs of an array stays."""
    values = {
        "batch_size": best(rates),
        "signals_per_s": {str(size): rate for size, rate in rates.items()},
        "device": jax.devices()[0].device_kind,
    }
    partial = file.with_name(f".{file.name}.partial{os.getpid()}")
    try:
        partial.write_text(json.dumps(values, indent=2) + "\n")
        os.link(partial, file)
    except FileExistsError:
        pass
    finally:
        partial.unlink(missing_ok=True)


def best(rates: dict[int, float]) -> int:
    """The smallest tried number that no other number exceeds by more than the margin."""
    return min(size for size, rate in rates.items() if _GAIN * rate >= max(rates.values()))


def climb(first: int, *, unit: int, signals: int, rate_of: Callable[[int], float]) -> dict[int, float]:
    """Try numbers by doubling from `first`, or by halving if that gains nothing, each while it gains.

    Args:
      first: the first number, `unit` times a power of two.
      unit: the smallest number.
      signals: number of signals to fit, an upper bound of the numbers. The trial ends when it takes a notable part of
        the time of all signals.
      rate_of: signals a second at a number; 0 if memory does not suffice.
    Returns:
      The signals a second of every number tried.
    """
    began, rates = time.monotonic(), {first: rate_of(first)}

    def follow(size: int, step: Callable[[int], int]) -> None:
        while unit <= step(size) <= signals and (time.monotonic() - began) * max(rates.values()) < _COST * signals:
            former, size = size, step(size)
            rates[size] = rate_of(size)
            if rates[size] < _GAIN * rates[former]:
                break

    if rates[first]:
        follow(first, lambda size: 2 * size)
    if best(rates) <= first:
        follow(first, lambda size: size // 2)
    return rates


def _tried(settings: RunSettings, dataset: Dataset) -> dict[int, float]:
    """`climb` over timed fits of the first signals; the network need not be trained."""
    field = METHODS[settings.train.method].check(settings, dataset.grid, dataset.channels, task=dataset.task)
    mesh = sharding.data_mesh(jax.local_devices())
    params = sharding.replicate(mesh, field.init(jax.random.key(settings.seed)))
    splits = [split for name, split in dataset.splits.items() if name in (*settings.extract.splits, NEW)]
    rules = FitRules.of(settings, dtype=settings.extract.dtype)
    key = jax.random.key(settings.seed)
    unit, signals = jax.device_count(), sum(len(split) for split in splits)
    several = max(1, min(_SIGNALS, _POINTS // math.prod(dataset.grid), signals) // unit)

    def rate_of(size: int) -> float:
        batch = sharding.split_batch(mesh, observed(splits[0], np.arange(size) % len(splits[0])))
        program = fit_batch.lower(field, rules, params, batch, STEP_SIZE, key).compile()
        needed, free = program_bytes(program), free_bytes()
        if needed is not None and free is not None and needed > free:
            return 0.0
        seconds: list[float] = []
        while not seconds or (sum(seconds) < _SECONDS and len(seconds) < 3):
            began = time.monotonic()
            jax.block_until_ready(program(params, batch, STEP_SIZE, key))
            seconds.append(time.monotonic() - began)
        return size / min(seconds)

    return climb(unit * 2 ** int(math.log2(several)), unit=unit, signals=signals, rate_of=rate_of)
