"""The one coordinate convention: every axis runs from -1 to 1, both ends included."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def grid(shape: Sequence[int]) -> np.ndarray:
    """Coordinates of a regular grid, points in the order of `array.reshape(-1)`.

    Args:
      shape: points along each of C axes, each at least 1; an axis of one point sits at 0.
    Returns:
      float64 [N, C] in [-1, 1], N the product of `shape`; axis order as in the array.
    Raises:
      ValueError: no axes, or an axis without points.
    """
    if not shape or min(shape) < 1:
        raise ValueError(f"a grid needs axes of at least one point each, got shape {tuple(shape)}")
    axes = [np.linspace(-1.0, 1.0, n) if n > 1 else np.zeros(1) for n in shape]
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(shape))


def resampled_affine(affine: np.ndarray, shape: Sequence[int], resolution: Sequence[int]) -> np.ndarray:
    """The affine of a grid that has other points over the same extent.

    Both grids run over [-1, 1] with both ends included, so the centres of the corner voxels stay where they are, and
    n points become m with a step of (n - 1) / (m - 1) old ones. A single point sits in the middle, and its voxel
    spans all n.

    Args:
      affine: [C + 1, C + 1], of the indices of a grid of `shape` to the world.
      shape: its points along each of C axes.
      resolution: the points of the other grid.
    Returns:
      float64 [C + 1, C + 1], of the indices of the other grid to the same world.
    Raises:
      ValueError: sizes that do not belong together, or several points along an axis of one.
    """
    affine, axes = np.asarray(affine, np.float64), len(shape)
    if len(resolution) != axes or affine.shape != (axes + 1, axes + 1) or min(*shape, *resolution) < 1:
        raise ValueError(f"affine {affine.shape}, shape {tuple(shape)} and resolution {tuple(resolution)} do not match")
    to_old = np.eye(axes + 1)
    for axis, (n, m) in enumerate(zip(shape, resolution, strict=True)):
        if n == 1 and m > 1:
            raise ValueError(f"axis {axis} has one point, which has no extent to put {m} points in")
        if m == 1:
            to_old[axis, axis], to_old[axis, -1] = n, (n - 1) / 2
        else:
            to_old[axis, axis] = (n - 1) / (m - 1)
    return affine @ to_old
