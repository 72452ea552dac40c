"""What a training is made of before its first update: for runs, and for the short trainings of the frequency search."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

from experiments.runtime.progress import Progress
from medfuncta_jax import meta_step, sharding
from medfuncta_jax.augmentation import resized_and_moved
from medfuncta_jax.datasets import Dataset
from medfuncta_jax.field import Field
from medfuncta_jax.linear_code import linear_start
from medfuncta_jax.methods import METHODS
from medfuncta_jax.settings import Settings
from medfuncta_jax.training_state import MetaState

# A linear start is made of the training signals and of changed copies of them: at most so many in all, with no more
# than this number of values. Copies change by more and more, in grades.
_SIGNALS, _VALUES, _GRADES = 1 << 14, 1 << 27, 4
_CHANGED_AT_ONCE = 64


def first_state(field: Field, settings: Settings, dataset: Dataset, key: jax.Array) -> MetaState:
    """The state before the first update, with the start of `train.start`.

    Raises:
      DataError: the start is linear, and no training signal has every channel.
    """
    train = dataset.splits["train"]
    state = METHODS[settings.train.method].init(field, settings, key, signals=len(train))
    if settings.train.start == "random":
        return state
    signals = train.signals(train.complete(most_signals(dataset.grid, dataset.channels)))
    with Progress("start", total=settings.train.start_updates, unit="updates") as progress:
        return with_linear_start(
            field, settings, state, signals, key,
            after=lambda loss: progress.advance(note=f"{-10 * math.log10(max(loss, 1e-12)):.1f} dB"),
        )  # fmt: skip


def most_signals(grid: tuple[int, ...], channels: int) -> int:
    """The number of signals that a linear start is made of, at most."""
    return max(1, min(_SIGNALS, _VALUES // (math.prod(grid) * channels)))


def with_linear_start(
    field: Field, settings: Settings, state: MetaState, signals: np.ndarray, key: jax.Array,
    *, after: Callable[[float], None],
) -> MetaState:  # fmt: skip
    """The state that begins with the linear start of signals [n, *grid, D] and of changed copies of them."""
    if largest := settings.train.augmentation:
        most = most_signals(signals.shape[1:-1], signals.shape[-1])
        signals = _with_changed(signals, jax.random.fold_in(key, 1), largest=largest, most=most)
    params = linear_start(
        field, signals, key, updates=settings.train.start_updates, step_size=settings.inner.step_size, after=after
    )
    return meta_step.start(field, state.trainable._replace(field=params), settings.train)


def constants(field: Field, settings: Settings, dataset: Dataset, mesh: Mesh) -> meta_step.Training:
    """The constants of a training on the devices of `mesh`."""
    train, labels = dataset.splits["train"], None
    if settings.train.method == "contrastive":
        labels = sharding.replicate(mesh, train.annotations().labels)
    recorded = train.recorded()
    recorded = None if recorded is None else sharding.replicate(mesh, recorded)
    return meta_step.Training(field, settings, dataset.grid, labels, recorded, mesh)


def _with_changed(signals: np.ndarray, key: jax.Array, *, largest: float, most: int) -> np.ndarray:
    """Signals [n, *grid, D] and copies that are resized and moved, at most `most` in all.

    The change of a copy is a part of `largest`: copies near to their signals say most about new signals like them.
    """
    change = jax.jit(resized_and_moved, static_argnames=("shape", "largest"))
    copies = most // len(signals) - 1
    grades = min(_GRADES, copies)
    every = np.empty((1 + copies, *signals.shape), signals.dtype)
    every[0] = signals
    for copy in range(copies):
        part = largest * (1 + copy % grades) / grades
        for first in range(0, len(signals), _CHANGED_AT_ONCE):
            some = signals[first : first + _CHANGED_AT_ONCE]
            flat = some.reshape(len(some), -1, some.shape[-1])
            own = jax.random.fold_in(jax.random.fold_in(key, copy), first)
            changed = change(own, flat, shape=signals.shape[1:-1], largest=part)
            every[1 + copy, first : first + len(some)] = np.asarray(changed).reshape(some.shape)
    return every.reshape(-1, *signals.shape[1:])
