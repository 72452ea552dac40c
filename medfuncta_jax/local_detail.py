"""What latents leave of signals, near a point.

A latent holds what signals share; the rest of a signal is in its residuals, observed values less those of the field.
Means of the observed residuals r_i with Gaussian weights of several widths s (Nadaraya 1964, Watson 1964), drawn to 0
where few were observed, say at a point x what the latent does not:

    d_s(x) = sum_i k_s(x - x_i) r_i / (sum_i k_s(x - x_i) + a sum_j k_s(x - x_j)),    i observed, j all points,

and d_s(x + u) for u of 2 s along each axis, in both directions, how it changes there. The means are computed on the
grid of the signals and interpolated linearly between its points; beyond its border they go on as there.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.ndimage import map_coordinates

from medfuncta_jax.batched import decode_batches
from medfuncta_jax.field import Field, Params
from medfuncta_jax.product import FULL

# a: the weight of residuals of 0.
_OF_ZEROS = 0.02
# |u| in widths.
_APART = 2


def residuals(
    field: Field, params: Params, latents: np.ndarray, signals: np.ndarray, seen: np.ndarray
) -> np.ndarray:  # fmt: skip
    """Signals less the field's values, float16 [n, *grid, D]; 0 for points that were not seen and values that are not
    finite.

    Args:
      latents: [n, P], fitted to what was seen of the signals.
      signals: [n, *grid, D].
      seen: bool [*grid].
    """
    left, row = np.zeros(signals.shape, np.float16), 0
    for values in decode_batches(field, params, latents, signals.shape[1:-1]):
        some = signals[row : row + len(values)] - values
        left[row : row + len(values)] = np.where(seen[..., None] & np.isfinite(some), some, 0)
        row += len(values)
    return left


def local_means(left: jax.Array, seen: jax.Array, widths: Sequence[float]) -> list[jax.Array]:
    """d_s [B, *grid, D] of each width.

    Args:
      left: residuals [B, *grid, D], 0 where they were not seen.
      seen: [B, *grid], 1 or 0.
      widths: s, in spacings of the grid; 0 stands for the residual of the point itself, 0 if it was not seen.
    """
    both = jnp.concatenate([left, seen[..., None].astype(left.dtype)], -1)
    found = []
    for width in widths:
        near = both
        for axis, count in enumerate(seen.shape[1:], start=1) if width else ():
            apart = np.subtract.outer(np.arange(count), np.arange(count))
            weights = jnp.asarray(np.exp(-0.5 * (apart / width) ** 2) / (width * np.sqrt(2 * np.pi)), left.dtype)
            near = jnp.moveaxis(jnp.tensordot(weights, near, (1, axis), precision=FULL), 0, axis)
        found.append(near[..., :-1] / (near[..., -1:] + _OF_ZEROS) if width else left)
    return found


def at_points(means: Sequence[jax.Array], coords: jax.Array, widths: Sequence[float]) -> list[jax.Array]:
    """d_s(x) and d_s(x + u), each [B, n, D], at coords x [n, C] in [-1, 1], of `local_means` of these widths."""
    read = jax.vmap(jax.vmap(_interpolated, (-1, None), -1), (0, None))  # all signals and channels
    found = []
    for of_width, width in zip(means, widths, strict=True):
        counts = np.asarray(of_width.shape[1:-1])
        along = _APART * width * np.eye(len(counts))
        apart = np.concatenate([np.zeros((1, len(counts))), along, -along])[: None if width else 1]
        places = (coords + 1) / 2 * (counts - 1)
        found += [read(of_width, places + jnp.asarray(u, coords.dtype)) for u in apart]
    return found


def detail_count(widths: Sequence[float], *, axes: int, channels: int) -> int:
    """The number of values of a point in `at_points`."""
    return channels * sum(1 + 2 * axes * (width > 0) for width in widths)


def _interpolated(image: jax.Array, places: jax.Array) -> jax.Array:
    return map_coordinates(image, list(places.T), order=1, mode="nearest")
