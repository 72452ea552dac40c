"""A metric on latents that measures distances between their signals.

Test-time steps move a latent far along directions that hardly change its signal, so Euclidean distances of latents say
little. To first order a change d of a latent changes the values of its signal by J d, and their mean square is d^T M d
with M = J^T J / (N D): the metric that the network pulls back onto its latents (Arvanitidis et al. 2018). Here M is
averaged over latents, which makes it one linear map for all.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from medfuncta_jax.arrays import Array, as_array, checked_coords
from medfuncta_jax.field import Field, Params, params_dtype
from medfuncta_jax.product import FULL

_CHUNK = 1024
_PAIRS_AN_ENTRY = 32


def signal_metric(
    field: Field, params: Params, latents: Array, coords: Array, *, key: jax.Array, pairs: int | None = None
) -> np.ndarray:
    """A symmetric A [P, P]: |A (a - b)|^2 is the mean squared difference of the signals of a and b, to first order.

    `latents @ A` are vectors for methods that use Euclidean distances: neighbours, clusters, maps. A^2 is the mean of g
    g^T over latents, points and channels; g [P] is the derivative of one value of a signal in its latent.

    Args:
      field, params: the shared network.
      latents: [B, P], of training signals, around which the derivative is taken; of any framework.
      coords: [N, C] or [*grid, C] in [-1, 1]: the points of a signal.
      key: draws the pairs of a latent and a point that enter the mean.
      pairs: number of pairs; None takes 32 P. All B N D are taken if they are no more than `pairs`.
    Returns:
      float64, positive semi-definite.
    Raises:
      ValueError: shapes that do not belong together, or `pairs` below 1.
    """
    size, latents = field.model.latent_dim, as_array("latents", latents)
    coords = checked_coords(coords, coord_dims=field.coord_dims).reshape(-1, field.coord_dims)
    if latents.ndim != 2 or latents.shape[1] != size or not len(latents):
        raise ValueError(f"latents {latents.shape} must be [B, {size}], B at least 1")
    pairs = _PAIRS_AN_ENTRY * size if pairs is None else pairs
    if pairs < 1:
        raise ValueError(f"pairs must be at least 1, got {pairs}")
    ranges = (len(latents), len(coords), field.channels)
    if len(latents) * len(coords) * field.channels <= pairs:
        chosen = np.indices(ranges).reshape(3, -1)
    else:
        keys = jax.random.split(key, 3)
        chosen = np.stack([jax.random.randint(k, (pairs,), 0, n) for k, n in zip(keys, ranges, strict=True)])
    dtype = params_dtype(params)
    field = replace(field, model=replace(field.model, products="float32"))
    moment = np.zeros((size, size))
    for start in range(0, chosen.shape[1], _CHUNK):
        rows, points, channels = chosen[:, start : start + _CHUNK]
        moment += _sum_of_squares(
            field, params, jnp.asarray(latents[rows], dtype), jnp.asarray(coords[points], dtype), channels
        )
    values, axes = np.linalg.eigh(moment / chosen.shape[1])
    return (axes * np.sqrt(values.clip(0))) @ axes.T


@functools.partial(jax.jit, static_argnums=0)
def _sum_of_squares(
    field: Field, params: Params, latents: jax.Array, points: jax.Array, channels: jax.Array
) -> jax.Array:
    """The sum of g g^T, [P, P], over latents [R, P] with a point [R, C] and a channel [R] each."""

    def value(latent, point, channel):
        return field.apply(params, latent[None], point[None])[0, 0, channel]

    gradients = jax.vmap(jax.grad(value))(latents, points, channels)
    return jnp.matmul(gradients.T, gradients, precision=FULL)
