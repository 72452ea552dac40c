"""Terms of the outer loss that depend on the latents: a penalty and noise."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from medfuncta_jax.settings import TrainSettings


def latent_loss(
    train: TrainSettings, noise: jax.Array | None, latents: jax.Array
) -> tuple[jax.Array, jax.Array | float]:
    """The latents to decode and a term of the loss; the `latent_loss` of `outer_loss.meta_loss`.

    Args:
      train: the setting `latent_penalty`.
      noise: None, or noise [B, P] that is added to the latents.
      latents: [B, P].
    """
    cost = train.latent_penalty * jnp.square(latents).mean() if train.latent_penalty else 0.0
    return latents if noise is None else latents + noise, cost


def latent_noise(train: TrainSettings, key: jax.Array, shape: tuple[int, ...], dtype) -> jax.Array | None:
    """Noise of `train.latent_noise` for latents of a shape [B, P]; None where there is none."""
    return train.latent_noise * jax.random.normal(key, shape, dtype) if train.latent_noise else None
