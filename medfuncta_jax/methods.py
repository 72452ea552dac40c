"""The methods of training: meta-learning on whole signals or on patches, and an auto-decoder.

All have one state (`meta_step.MetaState`) and one form of update, so one loop trains them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
from jax.sharding import Mesh

from medfuncta_jax import meta_step
from medfuncta_jax.baselines import autodecoder, patches
from medfuncta_jax.field import Field
from medfuncta_jax.meta_step import MetaState
from medfuncta_jax.settings import Settings, SettingsError

Update = Callable[[MetaState, jax.Array, jax.Array, jax.Array], tuple[MetaState, dict[str, jax.Array]]]


def check(settings: Settings, shape: Sequence[int], channels: int, *, task: str | None = None) -> Field:
    """The field of these settings for signals [*shape, channels], with labels of the kind `task` if that is known.

    Raises:
      SettingsError: the signals have other dimensions than the latent's grid, or settings do not go together.
    """
    model, train = settings.model, settings.train
    if train.contrastive_weight and task in ("none", "multi-label"):
        raise SettingsError(
            f"train.contrastive_weight needs data with one label a signal, these have {task!r}; set it to 0"
        )
    if train.contrastive_weight and train.micro_batch not in (0, train.batch_size):
        raise SettingsError("train.contrastive_weight compares all signals of a batch; set train.micro_batch=0")
    field = Field(model, coord_dims=len(shape), channels=channels)
    if model.latent_interpolation == "patches":
        patches.window(shape, model.latent_grid)
    if model.codebook and settings.inner.learned_step_size == "per_latent":
        raise SettingsError("model.codebook needs inner.learned_step_size=none or scalar: one scale for all entries")
    if model.latent_features % train.modulation_shards:
        raise SettingsError(
            f"train.modulation_shards = {train.modulation_shards} does not divide the latent's {model.latent_features} "
            f"entries (of one place); try {math.gcd(train.modulation_shards, model.latent_features)}"
        )
    if train.method == "autodecoder":
        given = {
            "train.modulation_shards=1": train.modulation_shards > 1,
            "model.latent_interpolation=nearest": model.latent_interpolation == "patches",
            "inner.learned_step_size=none": settings.inner.learned_step_size != "none",
            "train.micro_batch=0": train.micro_batch > 0,
            "train.points_per_chunk=0": train.points_per_chunk > 0,
            "train.selection_ratio=1.0": train.selection_ratio < 1,
            "train.contrastive_weight=0.0": train.contrastive_weight > 0,
        }
        for remedy, wrong in given.items():
            if wrong:
                raise SettingsError(f"train.method=autodecoder needs {remedy}")
    return field


def init_state(field: Field, settings: Settings, key: jax.Array, *, signals: int) -> MetaState:
    """The state before the first update, for `signals` training signals."""
    trained = field.patch if field.model.latent_interpolation == "patches" else field
    return meta_step.init_state(trained, settings, key, signals=signals)


def make_update(
    field: Field, settings: Settings, coords: jax.Array, shape: Sequence[int],
    *, labels: jax.Array | None = None, mesh: Mesh | None = None,
) -> Update:  # fmt: skip
    """The pure function `update(state, signals, key, rows) -> (state, metrics)`; see `meta_step.make_update`.

    Args:
      field, settings: see `check`.
      coords: [N, C], the grid of `shape`.
      shape: points along each axis.
      labels: int [n] of the training split, for the contrastive loss.
      mesh: the devices that signals are split over.
    Returns:
      The update; `rows` [B] are the numbers of the signals in the training split.
    """
    if settings.train.method == "autodecoder":
        return autodecoder.make_update(field, settings, coords)
    if field.model.latent_interpolation == "patches":
        of_signals = patches.make_update(field, settings, shape, mesh)
    else:
        of_signals = meta_step.make_update(field, settings, coords, mesh)

    def update(
        state: MetaState, signals: jax.Array, key: jax.Array, rows: jax.Array
    ) -> tuple[MetaState, dict[str, jax.Array]]:
        return of_signals(state, signals, key, None if labels is None else labels[rows])

    return update
