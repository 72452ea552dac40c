"""Scores of samples against real signals, from features of both."""

from __future__ import annotations

import numpy as np
from scipy.spatial import KDTree


def density_and_coverage(real: np.ndarray, samples: np.ndarray, *, neighbours: int) -> dict[str, float]:
    """Density and coverage (Naeem et al. 2020).

    A ball around each real signal reaches to its k-th nearest real neighbour. Density is the mean number of balls that
    contain a sample, divided by k (1 is as dense as the real signals, more is denser). Coverage is the part of the
    balls that contain a sample, in [0, 1].

    Args:
      real: features [n, F], n > k.
      samples: [m, F].
      neighbours: k.
    """
    if not 1 <= neighbours < len(real):
        raise ValueError(f"neighbours must be 1 to {len(real) - 1}, fewer than the real signals, got {neighbours}")
    radii = KDTree(real).query(real, k=[neighbours + 1])[0][:, 0]  # the nearest one is the signal itself
    inside = np.stack([np.square(samples - one).sum(1) <= radius**2 for one, radius in zip(real, radii, strict=True)])
    return {"density": float(inside.sum() / (neighbours * len(samples))), "coverage": float(inside.any(1).mean())}


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Squared Frechet distance of Gaussians with the means and covariances of features [n, F] and [m, F]."""
    means = np.square(a.mean(0) - b.mean(0)).sum()
    first, second = (np.atleast_2d(np.cov(features, rowvar=False)) for features in (a, b))
    values, axes = np.linalg.eigh(first)
    root = (axes * np.sqrt(values.clip(0))) @ axes.T
    shared = np.sqrt(np.linalg.eigvalsh(root @ second @ root).clip(0)).sum()
    return float(max(0.0, means + np.trace(first) + np.trace(second) - 2 * shared))


def nearest(known: np.ndarray, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distances [n] of features [n, F] to the nearest known features [m, F], and the rows of the latter."""
    distances, rows = KDTree(known).query(features)
    return distances, rows
