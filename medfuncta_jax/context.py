"""The points of an update: those that an inner step sees, and points off the grid."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from medfuncta_jax.coordinates import grid


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


def off_grid(key: jax.Array, signals: jax.Array, shape: Sequence[int]) -> tuple[jax.Array, jax.Array]:
    """All points of a grid moved by one random shift of at most half a spacing along each axis, and signals there.

    Values are interpolated by cubic convolution (Keys 1981). The shift is the same for all points, so signals keep
    their coordinates in common. Points that would leave [-1, 1] stay on its border.

    Args:
      key: PRNG key.
      signals: [B, N, D] on the grid of `shape`.
      shape: points along each of C axes, N in all.
    Returns:
      coords [N, C] in [-1, 1] and signals [B, N, D] there.
    """
    counts, axes = np.asarray(shape), len(shape)
    shift = jax.random.uniform(key, (axes,), signals.dtype, -0.5, 0.5) * (counts > 1)
    on_grid = signals.reshape(-1, *shape, signals.shape[-1])
    moved = jax.image.scale_and_translate(
        on_grid, on_grid.shape, range(1, axes + 1), jnp.ones(axes), -shift, "cubic", antialias=False
    )
    coords = jnp.asarray(grid(shape), signals.dtype) + 2 * shift / np.maximum(1, counts - 1)
    return jnp.clip(coords, -1, 1), moved.reshape(signals.shape)
