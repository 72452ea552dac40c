"""The frequencies of a run, found by short trainings before it (`model.omega=auto`).

A candidate (omega_first, omega_last) is trained for a hundred updates and judged by the PSNR of validation signals. The
search begins at the two values of the config and moves to a better neighbour while there is one: first both frequencies
by a factor, then their ratio. Every training takes the same initial key, signals and contexts, so that differences of a
tenth of a decibel count. Spectra cannot replace the trainings: the field at initialisation is far smoother than an ECG,
and rougher than an X-ray at a frequency that suits it.

Results are kept in `WORKDIR/omega.json` as they come, and the found values in `WORKDIR/config.json`. A run that was
stopped goes on with the next candidate.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.runtime import processes
from experiments.runtime.progress import log
from experiments.runtime.run import Run
from experiments.runtime.run_directory import RunError, write_json
from medfuncta_jax import meta_step, sharding
from medfuncta_jax.batched import fit_options, fit_signals
from medfuncta_jax.coordinates import grid
from medfuncta_jax.datasets import Dataset, batches
from medfuncta_jax.datasets.pipeline import batch_rows
from medfuncta_jax.methods import METHODS

if TYPE_CHECKING:
    from experiments.settings import RunSettings

# Updates of a candidate, and the largest number of validation signals that judge it.
UPDATES, _SIGNALS = 100, 64
# A rate at which a hundred updates learn something; the paper's (3e-6) is for 250,000 updates.
_RATE = 1e-4
# The factor between neighbours, and the gain in dB that a move must bring.
FACTOR, _GAIN = 1.5, 0.02
_COLLAPSED = -math.inf
# How far down the search looks for a training that does not collapse: a factor of 38.
_LOWEST = -9

# A candidate as whole steps from the first: (of both frequencies, of their ratio).
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


def search(psnr_of: Callable[[Place], float]) -> Place:
    """The place that no neighbour exceeds, found by moving along each axis in steps of three, then of one.

    Where the first place collapses, the search begins at the first below it that does not.

    Args:
      psnr_of: the PSNR of a candidate, -inf for one that collapsed; it is called once a place.
    """
    psnr_of = functools.cache(psnr_of)
    best = (0, 0)
    while psnr_of(best) == _COLLAPSED and best[0] > _LOWEST:
        best = _moved(best, 0, -3)
    for stride in (3, 1):
        moved = True
        while moved:
            moved = False
            for axis in (0, 1):
                for direction in (-stride, stride):
                    while psnr_of(there := _moved(best, axis, direction)) > psnr_of(best) + _GAIN:
                        best, moved = there, True
    return best


def _moved(place: Place, axis: int, by: int) -> Place:
    return (place[0] + by, place[1]) if axis == 0 else (place[0], place[1] + by)


def train_briefly(settings: RunSettings, dataset: Dataset, *, updates: int = UPDATES) -> float:
    """Mean PSNR in dB of validation signals after a whole training of `updates` meta-updates on this process's devices;
    -inf if it collapsed.
    """
    train = settings.train
    train = dataclasses.replace(
        train, steps=updates, warmup_steps=min(train.warmup_steps, updates // 4), modulation_shards=1,
        learning_rate=max(train.learning_rate, min(_RATE, train.learning_rate * train.steps / updates)),
    )  # fmt: skip
    settings = dataclasses.replace(settings, train=train)
    method = METHODS[train.method]
    field = method.check(settings, dataset.grid, dataset.channels, task=dataset.task)
    mesh = sharding.data_mesh(jax.local_devices())
    splits = dataset.splits
    init_key, update_key = jax.random.split(jax.random.key(settings.seed))
    state = sharding.replicate(mesh, method.init(field, settings, init_key, signals=len(splits["train"])))
    key = sharding.replicate(mesh, update_key)
    labels = None
    if train.method == "contrastive":
        labels = sharding.replicate(mesh, splits["train"].annotations().labels)
    training = meta_step.Training(field, settings, dataset.grid, labels, mesh)
    update = jax.jit(functools.partial(method.update, training), donate_argnums=0)
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
    options = fit_options(settings)
    options["fit"] = dataclasses.replace(options["fit"], batch_size=options["fit"].batch_size or count)
    fitted = fit_signals(field, params, splits["val"], rows=chosen, mesh=mesh, **options)
    psnr = float(fitted.psnr.mean())
    return psnr if math.isfinite(psnr) else _COLLAPSED


def _complete(run: Run) -> None:
    """Complete `omega.json`: the PSNR of every candidate, and the best as `found`."""
    directory, settings = run.directory, run.directory.training_settings
    file, model = directory.omega_file, settings.model
    record: dict[str, Any] = {"updates": min(UPDATES, settings.train.steps), "tried": []}
    if file.exists():
        record = _read(file)
    if "found" in record:
        return
    start = (model.omega_first, model.omega_last)
    known = {tuple(row["omega"]): row["psnr"] for row in record["tried"]}
    log.info("omega: trainings of %d updates, beginning at %g to %g", record["updates"], *start)

    def psnr_of(place: Place) -> float:
        omega = frequencies(start, place)
        if omega not in known:
            began = time.monotonic()
            psnr = train_briefly(with_omega(settings, *omega), run.dataset, updates=record["updates"])
            known[omega] = round(psnr, 4) if math.isfinite(psnr) else None
            record["tried"].append({"omega": omega, "psnr": known[omega]})
            write_json(file, record)
            directory.set_seconds("omega", directory.seconds().get("omega", 0.0) + time.monotonic() - began)
            said = "collapsed" if known[omega] is None else f"{known[omega]:.2f} dB"
            log.info("omega: %g to %g: %s", *omega, said)
        return _COLLAPSED if known[omega] is None else known[omega]

    best = search(psnr_of)
    if psnr_of(best) == _COLLAPSED:
        raise RunError(
            f"model.omega=auto: training collapsed at {start[0]:g} to {start[1]:g} and at all lower frequencies tried; "
            "begin at lower ones (model.omega_first, model.omega_last), or with a lower train.learning_rate or "
            "inner.step_size, in another --workdir"
        )
    write_json(file, {**record, "found": frequencies(start, best)})


def frequencies(start: tuple[float, float], place: Place) -> tuple[float, float]:
    """(omega_first, omega_last) of a place, to three digits."""
    both, ratio = place
    first, last = start[0] * FACTOR**both, start[1] * FACTOR ** (both + ratio)
    return float(f"{first:.3g}"), float(f"{last:.3g}")


def _read(file: Path) -> dict[str, Any]:
    try:
        record = json.loads(file.read_text())
        pairs = [row["omega"] for row in record["tried"]] + [record.get("found", (1, 1))]
        if record["updates"] < 1 or any(len(pair) != 2 or min(pair) <= 0 for pair in pairs):
            raise ValueError(record)
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{file} is damaged; remove it, and the frequencies are searched again") from error
    return record
