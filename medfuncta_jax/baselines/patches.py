"""Training a field of patches: random windows of the size of a cell, each a signal by itself (COIN++).

The field of a whole signal has the parameters of the field of one patch, and reads each patch's part of the latent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from medfuncta_jax import meta_step
from medfuncta_jax.field import Field, Params, rescale_latent
from medfuncta_jax.latent_grid import cell_of, interpolation_weights
from medfuncta_jax.meta_step import Training
from medfuncta_jax.settings import InnerSettings, Settings, SettingsError
from medfuncta_jax.siren import ModulatedSiren, PointFeatures
from medfuncta_jax.training_state import MetaState, Trainable


def window(shape: Sequence[int], latent_grid: Sequence[int]) -> tuple[int, ...]:
    """Points along each axis of the widest window in a cell: (N - 1) // m + 1 for N points and m cells.

    Raises:
      SettingsError: cells that can be without a point.
    """
    if len(shape) != len(latent_grid) or any(cells > n for n, cells in zip(shape, latent_grid, strict=True)):
        raise SettingsError(f"model.latent_grid {tuple(latent_grid)} makes patches without points of a grid {shape}")
    return tuple((n - 1) // cells + 1 for n, cells in zip(shape, latent_grid, strict=True))


def within_cells(coords: jax.Array, latent_grid: Sequence[int]) -> jax.Array:
    """Coordinates within each point's cell, from -1 to 1 across it: [..., N, C] -> [..., N, C]."""
    counts = np.asarray(latent_grid)
    return coords * counts + (counts - 1 - 2 * cell_of(coords, counts))


def random_patches(key: jax.Array, signals: jax.Array, *, latent_grid: Sequence[int]) -> tuple[jax.Array, jax.Array]:
    """A random window of every signal, and its coordinates within a cell.

    A cell is 1/m of [-1, 1], which need not be a whole number of points, so cells meet the grid of points at various
    offsets. Windows begin at points, and their coordinates at a random offset that keeps them within the cell. Training
    thus covers the offsets in the cells of a whole signal, for any number of points.

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
    # Distances in a cell of width 2; the only point of an axis of one point has coordinate 0.
    spacing = 2 * np.asarray(latent_grid) / np.maximum(1, np.asarray(shape) - 1)
    slack = np.where(np.asarray(shape) > 1, 2 - (size - 1) * spacing, 2.0)
    first = -1 + slack * jnp.where(np.asarray(shape) > 1, jax.random.uniform(offset, (len(shape),)), 0.5)
    axes = [first[axis] + spacing[axis] * np.arange(n) for axis, n in enumerate(size)]
    coords = jnp.stack(jnp.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(shape))
    return patches, coords.astype(signals.dtype)


class PatchSiren(ModulatedSiren):
    """A `ModulatedSiren` whose coordinates run from -1 to 1 within each cell of its latent grid."""

    def features(self, coords: jax.Array) -> PointFeatures:
        """The part of the field that needs no latent: coords [1 or B, n, C] of the whole signal."""
        cells = self.model.latent_grid
        within = super().features(within_cells(coords, cells))
        return within._replace(interpolation=interpolation_weights(coords, cells, linear=False))


@dataclass(frozen=True)
class PatchField(Field):
    """A signal as a mosaic of cells that share only the network; each cell has its own part of the latent."""

    def __post_init__(self):
        if not self.model.latent_grid:
            raise SettingsError("model.latent_grid must say how many patches there are along each axis, e.g. (2, 2)")
        if self.model.latent_interpolation != "nearest":
            raise SettingsError("train.method=patches needs model.latent_interpolation=nearest: a point reads its cell")
        super().__post_init__()

    @property
    def module(self) -> PatchSiren:
        return PatchSiren(self.model, self.coord_dims, self.channels)

    @property
    def patch(self) -> Field:
        """The field of one patch alone, with the same parameters."""
        alone = replace(self.model, latent_dim=self.model.latent_features, latent_grid=())
        return Field(alone, self.coord_dims, self.channels)


def check(settings: Settings, shape: Sequence[int], channels: int, *, task: str | None = None) -> Field:
    """See `methods.Method`."""
    del task
    field = PatchField(settings.model, len(shape), channels)
    window(shape, settings.model.latent_grid)
    train = settings.train
    for remedy, met in {"augmentation=0.0": train.augmentation == 0, "off_grid=False": not train.off_grid}.items():
        if not met:
            raise SettingsError(f"train.method=patches needs train.{remedy}: it draws windows of signals, off the grid")
    return meta_step.checked(field, settings)


def init(
    field: Field, settings: Settings, key: jax.Array, *, signals: int | None = None, dtype: Any = jnp.float32
) -> MetaState:
    """See `methods.Method`."""
    assert isinstance(field, PatchField)
    return meta_step.init(field.patch, settings, key, signals=signals, dtype=dtype)


def update(
    training: Training, state: MetaState, signals: jax.Array, key: jax.Array, rows: jax.Array | None = None
) -> tuple[MetaState, dict[str, jax.Array]]:
    """See `methods.Method`."""
    field = training.field
    assert isinstance(field, PatchField)
    whole = signals.reshape(len(signals), *training.shape, signals.shape[-1])
    windows = jax.random.fold_in(jax.random.fold_in(key, state.step), 3)
    patches, coords = random_patches(windows, whole, latent_grid=field.model.latent_grid)
    alone = replace(training, field=field.patch)
    sample = meta_step.draw(alone, state, patches, key, rows, coords=coords)
    return meta_step.optimizer_step(alone, state, *meta_step.loss_and_gradient(alone, state.trainable, sample))


def exported_params(
    field: Field, trainable: Trainable, inner: InnerSettings, coords: jax.Array | None = None
) -> Params:
    """See `methods.Method`.

    Training gives each patch a loss of its own. The loss of a whole signal is the mean over patches, so the gradient of
    a patch is smaller by their number, and the step size is larger by the same factor.
    """
    del coords
    alpha = inner.fit_ratio * meta_step.step_size(trainable, inner)
    return rescale_latent(field, trainable.field, alpha * field.model.places)
