"""Context sets: the points that an inner step sees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp


def context_size(points: int, selection_ratio: float) -> int:
    """Points in a reduced context: floor(gamma N), at least one."""
    return max(1, int(selection_ratio * points))


def random_context(
    key: jax.Array, *, points: int, selection_ratio: float, steps: int, signals: int | None = None
) -> jax.Array:
    """Fresh random subsets without replacement for every inner step (MedFuncta, algorithm 1).

    Args:
      key: PRNG key.
      points: N, points of a signal.
      selection_ratio: gamma in (0, 1].
      steps: G inner steps.
      signals: B for a subset a signal; None for one that the batch shares.
    Returns:
      int32 [B, G, n], or [G, n] where shared; n = floor(gamma N).
    """
    leading = (steps,) if signals is None else (signals, steps)
    size = context_size(points, selection_ratio)
    if size == points:
        return jnp.broadcast_to(jnp.arange(points, dtype=jnp.int32), (*leading, points))
    # The order of i.i.d. random bits is a uniform permutation; one sort, where jax.random.permutation needs several.
    bits = jax.random.bits(key, (*leading, points), jnp.uint32)
    return jnp.argsort(bits, axis=-1).astype(jnp.int32)[..., :size]


@dataclass(frozen=True)
class GradientContext:
    """Contexts of the points whose squared errors have the largest gradients in the last layer (Tack et al. 2023).

    Attributes:
      size: n, points of a context.
    """

    size: int

    def __call__(self, field: Any, params: Any, latents: jax.Array, coords: jax.Array, signals: jax.Array) -> jax.Array:
        """Points [B, n] of signals [B, N, D] at coords [N, C]; see `inner_steps.InnerLoop.choose`."""
        return jax.lax.top_k(gradient_norms(field, params, latents, coords, signals), self.size)[1]


def gradient_norms(field: Any, params: Any, latents: jax.Array, coords: jax.Array, signals: jax.Array) -> jax.Array:
    """Norms [B, N] of the gradient of each point's squared error (all channels) in the last layer's parameters."""
    module, variables = field.module, {"params": params}
    features = module.apply(variables, coords[None], method="features")
    modulations = module.apply(variables, latents, method="modulations")
    hidden = module.apply(variables, modulations, features, method="last_hidden")
    errors = module.apply(variables, hidden, method="head") - signals
    # The gradient in the kernel is 2 h e', in the bias 2 e.
    return 2 * jnp.sqrt(jnp.square(errors).sum(-1) * (1 + jnp.square(hidden).sum(-1)))
