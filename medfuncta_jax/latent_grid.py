"""Interpolation weights of points in a grid of latent vectors.

Along an axis, m places either divide [-1, 1] evenly with both ends included (linear interpolation), or stand for m
equal cells of it; a point on the border of two cells belongs to the upper one.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def interpolation_weights(coords: jax.Array, latent_grid: Sequence[int], *, linear: bool) -> jax.Array:
    """The weight of each place of a latent grid at each point.

    Args:
      coords: [..., N, C] in [-1, 1]; points beyond take the outermost place.
      latent_grid: places along each of the C axes.
      linear: (multi-)linear interpolation; else the weight of the point's cell is 1, all others 0.
    Returns:
      [..., N, places] in [0, 1], summing to 1 over places, which are in the order of `array.reshape(-1)`.
    """
    weights = jnp.ones((*coords.shape[:-1], 1), coords.dtype)
    for axis, count in enumerate(latent_grid):
        x = coords[..., axis, None]
        if linear:
            at = (jnp.clip(x, -1, 1) + 1) / 2 * (count - 1)  # in places
            along = jnp.maximum(0, 1 - jnp.abs(at - np.arange(count)))
        else:
            along = (cell_of(x, count) == np.arange(count)).astype(coords.dtype)
        weights = (weights[..., :, None] * along[..., None, :]).reshape(*coords.shape[:-1], -1)
    return weights


def cell_of(x: jax.Array, count: int | np.ndarray) -> jax.Array:
    """The number of the cell, in the dtype of `x`."""
    return jnp.clip(jnp.floor((x + 1) / 2 * count), 0, count - 1)
