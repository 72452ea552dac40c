"""Contexts of the points whose squared errors have the largest gradients in the last layer (Tack et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from medfuncta_jax import meta_step, sharding
from medfuncta_jax.context import context_size
from medfuncta_jax.field import Field, Params
from medfuncta_jax.inner_steps import InnerLoop
from medfuncta_jax.meta_step import Training, exported_params, init
from medfuncta_jax.point_field import shares, take
from medfuncta_jax.settings import Settings, SettingsError
from medfuncta_jax.training_state import MetaState

__all__ = ["check", "exported_params", "gradient_contexts", "gradient_norms", "init", "update"]


def gradient_norms(
    field: Field, params: Params, latents: jax.Array, coords: jax.Array, signals: jax.Array,
    weights: jax.Array | None = None,
) -> jax.Array:  # fmt: skip
    """Norms [B, N] of the gradient of each point's squared error in the last layer's parameters.

    Args:
      latents: [B, P].
      coords: [N, C].
      signals: [B, N, D].
      weights: None, or [B, N, 1 or D]; a channel of weight 0 does not count.
    """
    module = field.module.bind({"params": params})
    hidden = module.last_hidden(module.modulations(latents), module.features(coords[None]))
    errors = module.head(hidden) - signals
    errors = errors if weights is None else weights * errors
    # The gradient in the kernel is 2 h e', in the bias 2 e.
    return 2 * jnp.sqrt(jnp.square(errors).sum(-1) * (1 + jnp.square(hidden).sum(-1)))


def gradient_contexts(
    field: Field, params: Params, coords: jax.Array, signals: jax.Array, *, inner: InnerLoop,
    step_size: float | jax.Array, weights: jax.Array | None = None,
) -> jax.Array:  # fmt: skip
    """The points of each inner step, int32 [B, G, n], by walking the inner loop once; not differentiable.

    Args:
      field, params: the shared network.
      coords: [N, C].
      signals: [B, N, D].
      inner: the inner loop; its steps, selection ratio and loss are used.
      step_size: alpha, a scalar or [P].
      weights: as for `gradient_norms`.
    """
    size = context_size(len(coords), inner.selection_ratio)

    def loss(latents: jax.Array, rows: jax.Array) -> jax.Array:
        share = shares(None if weights is None else take(weights, rows), size, signals, inner.channel_loss)
        return (share * jnp.square(field.apply(params, latents, coords[rows]) - take(signals, rows))).sum()

    def step(latents: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        rows = jax.lax.top_k(gradient_norms(field, params, latents, coords, signals, weights), size)[1]
        return latents - step_size * jax.grad(loss)(latents, rows), rows

    zeros = jnp.zeros((len(signals), field.model.latent_dim), signals.dtype)
    return jnp.moveaxis(jax.lax.scan(step, zeros, length=inner.steps)[1], 0, 1)


def check(settings: Settings, shape: Sequence[int], channels: int, *, task: str | None = None) -> Field:
    """See `methods.Method`."""
    if settings.inner.selection_ratio == 1:
        raise SettingsError("train.method=gradient_contexts needs inner.selection_ratio below 1, the part to choose")
    if settings.train.off_grid:
        raise SettingsError("train.method=gradient_contexts needs train.off_grid=False: contexts are on the grid")
    return meta_step.check(settings, shape, channels, task=task)


def update(
    training: Training, state: MetaState, signals: jax.Array, key: jax.Array, rows: jax.Array | None = None
) -> tuple[MetaState, dict[str, jax.Array]]:
    """See `methods.Method`."""
    field, inner = training.field, meta_step.inner_loop_of(training.settings)
    sample = meta_step.draw(training, state, signals, key, rows)
    trainable = sharding.gathered(training.mesh, state.trainable)
    step_size = meta_step.step_sizes(field, trainable, training.settings.inner)

    def contexts(one: tuple[jax.Array, jax.Array | None]) -> jax.Array:
        signals, weights = jax.tree.map(lambda leaf: leaf[None], one)
        return gradient_contexts(
            field, trainable.field, sample.coords, signals, inner=inner, step_size=step_size, weights=weights
        )[0]  # fmt: skip

    at_once = len(signals) // inner.micro_batches
    sample = sample._replace(context=jax.lax.map(contexts, (sample.signals, sample.weights), batch_size=at_once))
    found = meta_step.loss_and_gradient(training, state.trainable, sample)
    return meta_step.optimizer_step(training, state, *found)
