"""Context sets: the points that an inner step sees."""

from __future__ import annotations

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
