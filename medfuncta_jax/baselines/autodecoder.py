"""Joint training of the network and a latent for each training signal, without an inner loop (DeepSDF, Park 2019).

Latents of unseen signals are fitted with `fit_latent`, as for all methods. The momentum of the optimizer moves a latent
also in updates without its signal, as in DeepSDF.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from medfuncta_jax import meta_step
from medfuncta_jax.coordinates import grid
from medfuncta_jax.field import Field
from medfuncta_jax.latent_loss import latent_loss, latent_noise
from medfuncta_jax.meta_step import Training, exported_params
from medfuncta_jax.point_field import Targets, shares
from medfuncta_jax.settings import Settings, SettingsError
from medfuncta_jax.training_state import MetaState, Trainable

__all__ = ["check", "exported_params", "init", "update"]


def check(settings: Settings, shape: Sequence[int], channels: int, *, task: str | None = None) -> Field:
    """See `methods.Method`."""
    train = settings.train
    needed = {
        "train.modulation_shards=1": train.modulation_shards == 1,
        "inner.learned_step_size=none": settings.inner.learned_step_size == "none",
        "train.micro_batch=0": train.micro_batch == 0,
        "train.points_per_chunk=0": train.points_per_chunk == 0,
        "train.selection_ratio=1.0": train.selection_ratio == 1,
        "train.augmentation=0.0": train.augmentation == 0,
        "train.off_grid=False": not train.off_grid,
    }
    for remedy, met in needed.items():
        if not met:
            raise SettingsError(f"train.method=autodecoder needs {remedy}")
    return meta_step.check(settings, shape, channels, task=task)


def init(field: Field, settings: Settings, key: jax.Array, *, signals: int, dtype: Any = jnp.float32) -> MetaState:
    """See `methods.Method`; latents begin at zero."""
    latents = jnp.zeros((signals, field.model.latent_dim), dtype)
    return meta_step.start(field, Trainable(field.init(key, dtype), None, latents), settings.train)


def update(
    training: Training, state: MetaState, signals: jax.Array, key: jax.Array, rows: jax.Array
) -> tuple[MetaState, dict[str, jax.Array]]:
    """See `methods.Method`."""
    field, train = training.field, training.settings.train

    def loss_of(trainable: Trainable) -> jax.Array:
        assert trainable.latents is not None
        shown = trainable.latents[rows]
        noise = latent_noise(train, jax.random.fold_in(key, state.step), shown.shape, shown.dtype)
        latents, cost = latent_loss(train, noise, shown)
        point_params, readers = field.split(trainable.field)
        coords = jnp.asarray(grid(training.shape), signals.dtype)
        features = field.points.features(point_params, coords[None])
        targets = Targets(signals, shares(training.weights(rows, signals), len(coords), signals, train.channel_loss))
        losses = field.points.losses(point_params, field.modulations(readers, latents), features, targets)
        return losses.mean() + cost

    return meta_step.optimizer_step(training, state, *jax.value_and_grad(loss_of)(state.trainable))
