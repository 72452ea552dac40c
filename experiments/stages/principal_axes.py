"""Principal axes of vectors: the linear code that latents are compared with, and the plane of latent maps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PrincipalAxes:
    """A mean and orthonormal axes, in the order of falling variance.

    Attributes:
      mean: [F], float64.
      axes: [k, F], float64; the largest entry of each is positive.
      shares: [k], the part of the total variance along each axis, in [0, 1].
    """

    mean: np.ndarray
    axes: np.ndarray
    shares: np.ndarray

    def scores(self, vectors: np.ndarray) -> np.ndarray:
        """Coordinates [n, k] of vectors [n, F]."""
        return (vectors - self.mean) @ self.axes.T


def principal_axes(vectors: np.ndarray, components: int) -> PrincipalAxes:
    """The first principal axes of vectors [n, F]: at most `components`, n - 1 and F.

    The computation is in numpy, since scikit-learn is an extra; it uses the covariance for more vectors than entries.
    """
    vectors = np.asarray(vectors, np.float64)
    mean = vectors.mean(0)
    centred = vectors - mean
    if len(centred) > centred.shape[1]:
        variances, axes = np.linalg.eigh(centred.T @ centred)
        variances, axes = variances[::-1].clip(0), axes.T[::-1]
    else:
        values, axes = np.linalg.svd(centred, full_matrices=False)[1:]
        variances = values**2
    count = min(components, len(vectors) - 1, vectors.shape[1])
    shares = variances[:count] / max(float(variances.sum()), np.finfo(float).tiny)
    axes = axes[:count]
    largest = np.take_along_axis(axes, np.abs(axes).argmax(1, keepdims=True), 1)
    return PrincipalAxes(mean, axes * np.sign(largest), shares)
