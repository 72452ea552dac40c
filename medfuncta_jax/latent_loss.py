"""Terms of the outer loss that depend on the latents: a penalty, noise, a contrastive loss."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from medfuncta_jax.product import FULL
from medfuncta_jax.settings import TrainSettings


def latent_loss(
    train: TrainSettings, noise: jax.Array | None, labels: jax.Array | None, latents: jax.Array
) -> tuple[jax.Array, jax.Array | float]:
    """The latents to decode and a term of the loss; the `latent_loss` of `outer_loss.meta_loss`.

    Args:
      train: the settings `latent_penalty` and those of the contrastive loss.
      noise: None, or added to the latents, [B, P].
      labels: None, or int [B], for the contrastive loss.
      latents: [B, P].
    """
    cost = train.latent_penalty * jnp.square(latents).mean() if train.latent_penalty else 0.0
    if train.contrastive_weight and labels is not None:
        cost = cost + train.contrastive_weight * contrastive_loss(latents, labels, train.contrastive_temperature)
    return latents if noise is None else latents + noise, cost


def latent_noise(train: TrainSettings, key: jax.Array, shape: tuple[int, ...], dtype) -> jax.Array | None:
    """Noise of `train.latent_noise` for latents of a shape [B, P]; None where there is none."""
    return train.latent_noise * jax.random.normal(key, shape, dtype) if train.latent_noise else None


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
