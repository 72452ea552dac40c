"""Equal signals among many: one file under two names, in two formats, or exported with 8 and with 16 bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

# Two signals are equal if no sample differs by more than this part of their range: 8 bits cut or rounded from more.
_TOLERANCE = 1.5 / 255

# Smaller signals are not compared: many different ones would be equal to this tolerance by chance.
FEWEST_SAMPLES = 64

# Blocks along each axis, by the number of axes; their means make a fingerprint.
_BLOCKS = {1: 64, 2: 8, 3: 4}

_LEVELS = 65535


def fingerprint(signal: np.ndarray) -> np.ndarray:
    """A short vector that is nearly the same for nearly the same signal.

    Args:
      signal: [*grid, D] in [0, 1].
    Returns:
      uint16 [up to 66]: means over blocks and channels, then the least and the largest sample; 65535 stands for 1.
    """
    means = signal.mean(-1, dtype=np.float64)
    for axis, size in enumerate(means.shape):
        count = min(_BLOCKS[means.ndim], size)
        edges = np.arange(count) * size // count
        widths = np.diff(edges, append=size).reshape([-1 if k == axis else 1 for k in range(means.ndim)])
        means = np.add.reduceat(means, edges, axis) / widths
    values = np.concatenate([means.ravel(), [signal.min(), signal.max()]])
    return np.rint(np.clip(values, 0, 1) * _LEVELS).astype(np.uint16)


def near(fingerprints: np.ndarray, others: np.ndarray) -> list[list[int]]:
    """For each fingerprint [n, F], the ascending rows of `others` [m, F] that may belong to an equal signal."""
    from scipy.spatial import KDTree

    if not len(others):
        return [[] for _ in fingerprints]
    ranges = fingerprints[:, -1].astype(np.float64) - fingerprints[:, -2]
    tree = KDTree(others.astype(np.float64))
    found = tree.query_ball_point(
        fingerprints.astype(np.float64), _TOLERANCE * ranges + 1.5, p=np.inf, return_sorted=True
    )
    return list(found)


def equal(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two signals [*grid, D] in [0, 1] are equal up to the rounding of an export."""
    extent = max(float(one.max() - one.min()), float(other.max() - other.min()))
    return bool(np.abs(one - other).max() <= _TOLERANCE * extent + 1e-6)


def repeated(fingerprints: np.ndarray, signal: Callable[[int], np.ndarray]) -> Sequence[int]:
    """The earlier signal that each signal repeats.

    Args:
      fingerprints: [n, F], in the order in which signals are kept.
      signal: gives a signal [*grid, D] in [0, 1]; called only for signals with near fingerprints.
    Returns:
      For each signal, the row of the earlier signal that it equals, or -1 for the first of its kind.
    """
    # Equal fingerprints are one point of the tree, so that many copies or blank signals do not give quadratically many
    # pairs.
    points, point_of = np.unique(fingerprints, axis=0, return_inverse=True)
    neighbours = near(points, points)
    kept: dict[int, list[int]] = {}
    same_as = []
    for row, point in enumerate(point_of.reshape(-1).tolist()):
        candidates = [one for other in neighbours[point] for one in kept.get(other, ())]
        this = signal(row) if candidates else None
        first = next((one for one in sorted(candidates) if this is not None and equal(this, signal(one))), -1)
        same_as.append(first)
        if first < 0:
            kept.setdefault(point, []).append(row)
    return same_as
