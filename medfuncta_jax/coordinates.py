"""The coordinate convention: every axis runs from -1 to 1, both ends included."""

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
    """The affine of a grid with another number of points over the same extent.

    Both grids run over [-1, 1] with both ends included, so the centres of the corner voxels stay where they are, and
    n points become m with a step of (n - 1) / (m - 1) old steps. A single point sits in the middle, and its voxel spans
    all n.

    Args:
      affine: [C + 1, C + 1], of the indices of a grid of `shape` to the world.
      shape: points of the given grid along each of C axes.
      resolution: points of the other grid along each axis.
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


def inner_samples(coarse: Sequence[int], fine: Sequence[int]) -> tuple[tuple[slice, ...], np.ndarray]:
    """The samples of a finer grid that lie between the outermost samples of a coarse one.

    Both grids have one field of view, and a sample stands for the middle of its cell, as in all sources: sample j of m
    along an axis lies at (j + 1/2) n / m - 1/2 in samples of a grid of n. Beyond the outermost samples a field would be
    evaluated outside [-1, 1], and an interpolation would have to extrapolate.

    Args:
      coarse, fine: shapes of the two grids over one field of view, with equal numbers of axes.
    Returns:
      A slice of each axis of the fine grid, and the coordinates [N, C] in [-1, 1] of the samples in them.
    """
    slices, axes = [], []
    for n, m in zip(coarse, fine, strict=True):
        places = (np.arange(m) + 0.5) * n / m - 0.5  # in samples of the coarse grid
        inside = np.flatnonzero((places >= 0) & (places <= n - 1))
        slices.append(slice(int(inside[0]), int(inside[-1]) + 1))
        axes.append(2 * places[slices[-1]] / max(n - 1, 1) - 1)
    return tuple(slices), np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(axes))
