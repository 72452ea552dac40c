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
