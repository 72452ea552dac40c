"""A supervised contrastive loss of the latents (Khosla et al. 2020) beside the outer loss, for one label a signal."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp

from medfuncta_jax import meta_step, sharding
from medfuncta_jax.field import Field
from medfuncta_jax.meta_step import Training, exported_params, init
from medfuncta_jax.outer_loss import LatentLoss
from medfuncta_jax.product import FULL
from medfuncta_jax.settings import BaselineSettings, Settings, SettingsError
from medfuncta_jax.training_state import MetaState

__all__ = ["check", "contrastive_loss", "exported_params", "init", "update"]


def contrastive_loss(latents: jax.Array, labels: jax.Array, temperature: float) -> jax.Array:
    """Supervised contrastive loss of a batch (Khosla et al. 2020, L_out).

    Args:
      latents: [B, P], compared by the cosine between them.
      labels: int [B].
      temperature: > 0; cosines are divided by it.
    Returns:
      A scalar: the mean over signals that share their label with another one; 0 if there are none.
    """
    lengths = jnp.sqrt(jnp.square(latents).sum(-1, keepdims=True) + jnp.finfo(latents.dtype).tiny)
    itself = jnp.eye(len(latents), dtype=bool)
    cosines = jnp.matmul(latents / lengths, (latents / lengths).T, precision=FULL)
    similar = jnp.where(itself, -jnp.inf, cosines / temperature)
    log_parts = jnp.where(itself, 0, similar) - jax.nn.logsumexp(similar, axis=1, keepdims=True)
    alike = (labels[:, None] == labels) & ~itself
    partners = alike.sum(1)
    losses = -(alike * log_parts).sum(1) / jnp.maximum(partners, 1)
    return losses.sum() / jnp.maximum((partners > 0).sum(), 1)


def check(settings: Settings, shape: Sequence[int], channels: int, *, task: str | None = None) -> Field:
    """See `methods.Method`."""
    if task in ("none", "multi-label"):
        raise SettingsError(f"train.method=contrastive needs data with one label a signal, these have {task!r}")
    if settings.train.micro_batch not in (0, settings.train.batch_size):
        raise SettingsError("train.method=contrastive compares all signals of a batch; set train.micro_batch=0")
    return meta_step.check(settings, shape, channels)


def update(
    training: Training, state: MetaState, signals: jax.Array, key: jax.Array, rows: jax.Array
) -> tuple[MetaState, dict[str, jax.Array]]:
    """See `methods.Method`; requires `training.labels`."""
    assert training.labels is not None
    sample = meta_step.draw(training, state, signals, key, rows)
    joined = functools.partial(_with_contrast, training.settings.baselines)
    of_latents = jax.tree_util.Partial(joined, sample.latent_loss, jnp.asarray(training.labels)[rows])
    # The loss joins signals of all devices, so the compiler splits the work over them, not `loss_and_gradient`.
    one_device = replace(training, mesh=None)
    trainable = sharding.gathered(training.mesh, state.trainable)
    found = meta_step.loss_and_gradient(one_device, trainable, sample._replace(latent_loss=of_latents))
    return meta_step.optimizer_step(training, state, *found)


def _with_contrast(
    own: BaselineSettings, latent_loss: LatentLoss, labels: jax.Array, latents: jax.Array
) -> tuple[jax.Array, jax.Array]:
    decoded, cost = latent_loss(latents)
    return decoded, cost + own.contrastive_weight * contrastive_loss(latents, labels, own.contrastive_temperature)
