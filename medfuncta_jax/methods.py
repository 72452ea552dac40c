"""Which training a run's settings ask for: meta-learning on whole signals or on patches, or an auto-decoder.

All have one state (`meta_step.MetaState`) and one form of update, so one loop trains them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax

from medfuncta_jax import autodecoder, meta_step, patches
from medfuncta_jax.field import Field
from medfuncta_jax.meta_step import MetaState
from medfuncta_jax.settings import Settings, SettingsError

Update = Callable[[MetaState, jax.Array, jax.Array, jax.Array], tuple[MetaState, dict[str, jax.Array]]]


def check(settings: Settings, shape: Sequence[int], channels: int) -> Field:
    """The field of these settings for signals [*shape, channels].

    Raises:
      SettingsError: the signals have other dimensions than the latent's grid, or settings do not go together.
    """
    model = settings.model
    field = Field(model, coord_dims=len(shape), channels=channels)
    if model.latent_interpolation == "patches":
        patches.window(shape, model.latent_grid)
    if settings.train.method == "autodecoder":
        absent = {
            "model.latent_interpolation": model.latent_interpolation == "patches",
            "inner.learned_step_size": settings.inner.learned_step_size != "none",
            **{f"train.{name}": bool(getattr(settings.train, name)) for name in ("micro_batch", "points_per_chunk")},
            "train.selection_ratio": settings.train.selection_ratio < 1,
        }
        for name, given in absent.items():
            if given:
                raise SettingsError(
                    f"train.method=autodecoder has no {_value(settings, name)}; leave it at its default"
                )
    return field


def _value(settings: Settings, name: str) -> str:
    group, _, field = name.partition(".")
    return f"{name}={getattr(getattr(settings, group), field)}"


def init_state(field: Field, settings: Settings, key: jax.Array, *, signals: int) -> MetaState:
    """The state before the first update, for `signals` training signals."""
    trained = field.patch if field.model.latent_interpolation == "patches" else field
    return meta_step.init_state(trained, settings, key, signals=signals)


def make_update(field: Field, settings: Settings, coords: jax.Array, shape: Sequence[int]) -> Update:
    """The pure function `update(state, signals, key, rows) -> (state, metrics)`; see `meta_step.make_update`.

    Args:
      field, settings: see `check`.
      coords: [N, C], the grid of `shape`.
      shape: points along each axis.
    Returns:
      The update; `rows` [B] are the numbers of the signals in the training split, which an auto-decoder needs.
    """
    if settings.train.method == "autodecoder":
        return autodecoder.make_update(field, settings, coords)
    if field.model.latent_interpolation == "patches":
        of_signals = patches.make_update(field, settings, shape)
    else:
        of_signals = meta_step.make_update(field, settings, coords)

    def update(
        state: MetaState, signals: jax.Array, key: jax.Array, rows: jax.Array
    ) -> tuple[MetaState, dict[str, jax.Array]]:
        del rows
        return of_signals(state, signals, key)

    return update
