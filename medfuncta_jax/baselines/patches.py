"""Training a field of patches: random windows of the size of a cell, each a signal by itself (COIN++).

Afterwards nothing is particular: the whole field (`model.latent_interpolation` "patches") has the same parameters and
reads each patch's own part of the latent.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from medfuncta_jax.field import Field
from medfuncta_jax.meta_step import MetaState, Update
from medfuncta_jax.meta_step import make_update as make_update_of_signals
from medfuncta_jax.settings import Settings, SettingsError


def window(shape: Sequence[int], latent_grid: Sequence[int]) -> tuple[int, ...]:
    """Points along each axis of the widest window that a cell can hold, of N points and m cells: (N - 1) // m + 1.

    Raises:
      SettingsError: cells that can be without a point.
    """
    if len(shape) != len(latent_grid) or any(cells > n for n, cells in zip(shape, latent_grid, strict=True)):
        raise SettingsError(f"model.latent_grid {tuple(latent_grid)} makes patches without points of a grid {shape}")
    return tuple((n - 1) // cells + 1 for n, cells in zip(shape, latent_grid, strict=True))


def random_patches(key: jax.Array, signals: jax.Array, *, latent_grid: Sequence[int]) -> tuple[jax.Array, jax.Array]:
    """A random window of every signal, and its coordinates within a cell.

    A cell is 1/m of [-1, 1], which need not be a whole number of points, so cells meet the grid of points at various
    offsets. Windows begin at points, and their coordinates at a random offset that still leaves them within the cell:
    what is trained is what the cells of a whole signal show, for any number of points.

    Args:
      key: PRNG key.
      signals: [B, *grid, D].
      latent_grid: cells along each axis.
    Returns:
      (patches [B, n, D], coords [n, C] in [-1, 1], shared by them).
    Raises:
      SettingsError: cells that can be without a point.
    """
    batch, *shape, channels = signals.shape
    size = np.asarray(window(shape, latent_grid))
    where, offset = jax.random.split(key)
    room = jnp.asarray(shape) - size + 1
    starts = jax.random.randint(where, (batch, len(shape)), 0, room)

    def cut(signal, start):
        return jax.lax.dynamic_slice(signal, (*start, 0), (*size, channels))

    patches = jax.vmap(cut)(signals, starts).reshape(batch, -1, channels)
    # Parts of the 2 that a cell is wide; an axis of one point has its only coordinate, 0, in the middle.
    spacing = 2 * np.asarray(latent_grid) / np.maximum(1, np.asarray(shape) - 1)
    slack = np.where(np.asarray(shape) > 1, 2 - (size - 1) * spacing, 2.0)
    first = -1 + slack * jnp.where(np.asarray(shape) > 1, jax.random.uniform(offset, (len(shape),)), 0.5)
    axes = [first[axis] + spacing[axis] * np.arange(n) for axis, n in enumerate(size)]
    coords = jnp.stack(jnp.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(shape))
    return patches, coords.astype(signals.dtype)


def make_update(field: Field, settings: Settings, shape: Sequence[int], mesh: Mesh | None = None) -> Update:
    """`meta_step.make_update` on random patches of signals [B, N, D] of a grid of `shape`.

    Raises:
      SettingsError: cells that can be without a point.
    """
    cells = field.model.latent_grid
    window(shape, cells)

    def update(
        state: MetaState, signals: jax.Array, key: jax.Array, labels: jax.Array | None = None
    ) -> tuple[MetaState, dict[str, jax.Array]]:
        whole = signals.reshape(signals.shape[0], *shape, signals.shape[-1])
        patches, coords = random_patches(
            jax.random.fold_in(jax.random.fold_in(key, state.step), 3), whole, latent_grid=cells
        )
        return make_update_of_signals(field.patch, settings, coords, mesh)(state, patches, key, labels)

    return update
