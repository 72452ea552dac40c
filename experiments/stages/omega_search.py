"""The frequencies of a run, found by short trainings before it (`model.omega=auto`).

A candidate (omega_first, omega_last) is trained for a hundred updates and judged by the PSNR of validation signals. The
search begins at the two values of the config and moves to the best of the four neighbours, one frequency higher or
lower by a factor, while one is better. Every training takes the same initial key, signals and contexts, so that
differences of a tenth of a decibel count. The longer the training, the lower are the best frequencies, so the search
goes on from the place found with trainings of a fifth of the run, of 300 to 2000 updates and no longer than the run.
A linear start has a fifth of its updates, and one round is enough where it is the whole training.

Spectra cannot replace the trainings: the field at initialisation is far smoother than an ECG, and rougher than an X-ray
at a frequency that suits it.

Results are kept in `WORKDIR/omega.json` as they come, and the found values in `WORKDIR/config.json`. A run that was
stopped goes on with the next candidate.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.runtime import processes
from experiments.runtime.progress import log
from experiments.runtime.run import Run
from experiments.runtime.run_directory import RunError, write_json
from experiments.stages.training_setup import constants, first_state
from medfuncta_jax import sharding
from medfuncta_jax.batched import fit_options, fit_signals
from medfuncta_jax.coordinates import grid
from medfuncta_jax.datasets import Dataset, batches
from medfuncta_jax.datasets.pipeline import batch_rows
from medfuncta_jax.methods import METHODS
from medfuncta_jax.settings import TrainSettings

if TYPE_CHECKING:
    from experiments.settings import RunSettings

# Updates of a candidate in the first round; in the second one a part of those of the run, within these limits.
FIRST, _PART, _LEAST, _MOST = 100, 5, 300, 2000
# The largest number of validation signals that judge a candidate.
_SIGNALS = 64
# A rate at which a hundred updates learn something; the paper's (3e-6) is for 250,000 updates.
_RATE = 1e-4
# The factor between neighbours, and the gain in dB that a move must bring.
FACTOR, _GAIN = 1.5, 0.02
_COLLAPSED = -math.inf
# How far down the search looks for a training that does not collapse: a factor of 38.
_LOWEST = -9

# A candidate as whole steps from the first: (of omega_first, of omega_last).
Place = tuple[int, int]


def search_omega(run: Run) -> None:
    """Find the frequencies of a run that asks for it, and give them to its directory; all processes must call this.

    Raises:
      RunError: what was kept cannot be read, or every candidate collapsed.
    """
    directory = run.directory
    if directory.settings.model.omega != "auto":
        return
    if processes.first():
        _complete(run)
    processes.wait_for_all("omega")
    found = _read(directory.omega_file)["found"]
    directory.adopt(with_omega(directory.settings, *found))
    log.info("omega: %g to %g, of %s", *found, directory.omega_file)


def with_omega(settings: RunSettings, first: float, last: float) -> RunSettings:
    """`settings` with these frequencies."""
    model = dataclasses.replace(settings.model, omega="given", omega_first=first, omega_last=last)
    return dataclasses.replace(settings, model=model)


def rounds(train: TrainSettings) -> list[int]:
    """The updates of a candidate in each round of the search: meta-updates, or those of a start without any."""
    steps = train.steps
    if not steps:
        return [max(1, train.start_updates // _PART)]
    longer = min(steps, max(_LEAST, min(_MOST, steps // _PART)))
    return [min(FIRST, steps), *([longer] if longer > FIRST else [])]


def search(psnr_of: Callable[[Place], float], best: Place = (0, 0), strides: Sequence[int] = (3, 1)) -> Place:
    """The place that no neighbour exceeds, found by moves to the best neighbour.

    Where the first place collapses, the search begins at the first below it that does not.

    Args:
      psnr_of: the PSNR of a candidate, -inf for one that collapsed; it is called once a place.
      best: the first place.
      strides: distances of neighbours, one after the other.
    """
    psnr_of = functools.cache(psnr_of)
    while psnr_of(best) == _COLLAPSED and best[0] > _LOWEST:
        best = (best[0] - 3, best[1] - 3)
    for stride in strides:
        while True:
            around = [(best[0] + a * stride, best[1] + b * stride) for a, b in ((0, 1), (0, -1), (1, 0), (-1, 0))]
            better = max(around, key=psnr_of)
            if not psnr_of(better) > psnr_of(best) + _GAIN:
                break
            best = better
    return best


def train_briefly(settings: RunSettings, dataset: Dataset, *, updates: int) -> float:
    """Mean PSNR in dB of validation signals after a whole training of `updates` (see `rounds`) on the devices of this
    process; -inf if it collapsed.
    """
    train = settings.train
    of_start, updates = (train.start_updates // _PART, updates) if train.steps else (updates, 0)
    train = dataclasses.replace(
        train, start_updates=of_start, steps=updates, modulation_shards=1,
        warmup_steps=min(train.warmup_steps, updates // 4),
        learning_rate=max(train.learning_rate, min(_RATE, train.learning_rate * train.steps / max(1, updates))),
    )  # fmt: skip
    settings = dataclasses.replace(settings, train=train)
    method = METHODS[train.method]
    field = method.check(settings, dataset.grid, dataset.channels, task=dataset.task)
    mesh = sharding.data_mesh(jax.local_devices())
    splits = dataset.splits
    init_key, update_key = jax.random.split(jax.random.key(settings.seed))
    state = sharding.replicate(mesh, first_state(field, settings, dataset, init_key))
    key = sharding.replicate(mesh, update_key)
    update = jax.jit(functools.partial(method.update, constants(field, settings, dataset, mesh)), donate_argnums=0)
    shape = (train.batch_size, math.prod(dataset.grid), dataset.channels)
    size, seed = train.batch_size, settings.seed
    loss = jnp.zeros(())
    with batches(splits["train"], batch_size=size, seed=seed) as stream:
        for step in range(updates):
            rows = batch_rows(len(splits["train"]), batch_size=size, seed=seed, step=step).astype(np.int32)
            signals, rows = sharding.split_batch(mesh, (next(stream).reshape(shape), rows))
            state, metrics = update(state, signals, key, rows)
            loss += metrics["loss"]  # not finite from the first update that is not
    if not math.isfinite(float(loss)):
        return _COLLAPSED
    coords = jnp.asarray(grid(dataset.grid), jnp.float32)
    params = method.exported_params(field, state.trainable, settings.inner, coords)
    count = min(_SIGNALS, train.eval_signals, len(splits["val"]))
    chosen = np.linspace(0, len(splits["val"]) - 1, count).round().astype(int)
    fitted = fit_signals(field, params, splits["val"], rows=chosen, mesh=mesh, **fit_options(settings))
    psnr = float(fitted.psnr.mean())
    return psnr if math.isfinite(psnr) else _COLLAPSED


def _complete(run: Run) -> None:
    """Complete `omega.json`: the PSNR of every candidate, and the best as `found`."""
    directory, settings = run.directory, run.directory.training_settings
    file, start = directory.omega_file, (settings.model.omega_first, settings.model.omega_last)
    record: dict[str, Any] = _read(file) if file.exists() else {"tried": []}
    if "found" in record:
        return
    known = {(row["updates"], *row["omega"]): row["psnr"] for row in record["tried"]}

    def psnr_of(updates: int, place: Place) -> float:
        omega = frequencies(start, place)
        tried = (updates, *omega)
        if tried not in known:
            began = time.monotonic()
            psnr = train_briefly(with_omega(settings, *omega), run.dataset, updates=updates)
            known[tried] = round(psnr, 4) if math.isfinite(psnr) else None
            record["tried"].append({"updates": updates, "omega": omega, "psnr": known[tried]})
            write_json(file, record)
            directory.set_seconds("omega", directory.seconds().get("omega", 0.0) + time.monotonic() - began)
            said = "collapsed" if known[tried] is None else f"{known[tried]:.2f} dB"
            log.info("omega: %g to %g: %s after %d updates", *omega, said, updates)
        return _COLLAPSED if known[tried] is None else known[tried]

    best = (0, 0)
    for number, updates in enumerate(rounds(settings.train)):
        best = search(functools.partial(psnr_of, updates), best, (3, 1) if number == 0 else (1,))
        if psnr_of(updates, best) == _COLLAPSED:
            raise RunError(
                f"model.omega=auto: training collapsed at {start[0]:g} to {start[1]:g} and at all lower frequencies "
                "tried; begin at lower ones (model.omega_first, model.omega_last), or with a lower train.learning_rate "
                "or inner.step_size, in another --workdir"
            )
    write_json(file, {**record, "found": frequencies(start, best)})


def frequencies(start: tuple[float, float], place: Place) -> tuple[float, float]:
    """(omega_first, omega_last) of a place, to three digits."""
    first, last = (float(f"{omega * FACTOR**steps:.3g}") for omega, steps in zip(start, place, strict=True))
    return first, last


def _read(file: Path) -> dict[str, Any]:
    try:
        record = json.loads(file.read_text())
        pairs = [row["omega"] for row in record["tried"]] + [record.get("found", (1, 1))]
        lengths = [row["updates"] for row in record["tried"]]
        if any(len(pair) != 2 or min(pair) <= 0 for pair in pairs) or min(lengths, default=1) < 1:
            raise ValueError(record)
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{file} is damaged; remove it, and the frequencies are searched again") from error
    return record
