"""Changed training signals, for sets of few signals."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def resized_and_moved(key: jax.Array, signals: jax.Array, shape: Sequence[int], *, largest: float) -> jax.Array:
    """Each signal in another size and at another place, by cubic convolution; its border continues outside.

    Along each axis a signal is resized by a random factor within [1 / (1 + a), 1 + a] and moved by at most a quarter of
    a n points, a = `largest`, n the points along the axis.

    Args:
      key: PRNG key.
      signals: [B, N, D] on the grid of `shape`.
      shape: points along each of C axes, N in all.
      largest: a, in [0, 1].
    Returns:
      [B, N, D].
    """
    counts, axes = np.asarray(shape), len(shape)
    border = np.ceil(largest * counts).astype(int)  # beyond the signal: a n / 2 by size, (1 + a) a n / 4 by place

    def of_one(key: jax.Array, signal: jax.Array) -> jax.Array:
        of_size, of_place = jax.random.split(key)
        factor = (1 + largest) ** jax.random.uniform(of_size, (axes,), signal.dtype, -1, 1)
        moved = largest * counts / 4 * jax.random.uniform(of_place, (axes,), signal.dtype, -1, 1)
        wider = jnp.pad(signal, [*((each, each) for each in border), (0, 0)], mode="edge")
        # The centre of the signal stays, but for `moved`.
        translation = moved + counts / 2 - factor * (border + counts / 2)
        return jax.image.scale_and_translate(
            wider, signal.shape, range(axes), factor, translation, "cubic", antialias=False
        )

    on_grid = signals.reshape(-1, *shape, signals.shape[-1])
    return jax.vmap(of_one)(jax.random.split(key, len(signals)), on_grid).reshape(signals.shape)
