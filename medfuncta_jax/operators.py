"""Measurement operators, for signals that are not measured point by point: pooled voxels, thick slices, k-space.

An operator A maps the values of a field at the operator's coordinates to measurements, `A(f(x_1), ..., f(x_N)) -> y`.
`fit_latent(..., observe=A)` then finds latents with the given measurements.

    sinogram = AveragePooling((30, 128), (1, 2)) @ Projections((64, 64), angles=(0.0, 6.0, ...), detectors=128)
    fitted = fit_latent(field, params, measurements, observe=sinogram)  # measurements [B, 30, 64, D]
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np

from medfuncta_jax.arrays import Array
from medfuncta_jax.coordinates import grid as regular_grid

_T = TypeVar("_T")


class Operator(abc.ABC):
    """A measurement of a signal: a differentiable function of its values at coordinates.

    A subclass is a frozen dataclass that JAX knows as a pytree, so that it may be an argument of a compiled function.
    `outer @ inner` applies `outer` to the measurements of `inner`, which must lie on the grid of `outer`.

    Attributes:
      shape: the grid of the measurements, of M = prod(shape) entries a channel.
      linear: whether A(a f + b g) = a A(f) + b A(g).
    """

    shape: tuple[int, ...]
    linear: bool = True

    @property
    @abc.abstractmethod
    def coords(self) -> Array:
        """The points that are measured, [N, C] in [-1, 1]."""

    @property
    def grid(self) -> tuple[int, ...] | None:
        """The shape of the grid of points, in the order of `coordinates.grid`; None if the points form no grid."""
        return None

    @property
    def groups(self) -> int:
        """The number of equal consecutive parts of the points that are measured separately; 1 if they cannot be."""
        return 1

    @abc.abstractmethod
    def __call__(self, values: jax.Array, coords: jax.Array) -> jax.Array:
        """Measurements [B, m, D] of values [B, n, D] at coords [n, C], of one or more consecutive groups."""

    def __matmul__(self, inner: Operator) -> Operator:
        return Composed(self, inner)


@dataclass_transform(frozen_default=True)
def _pytree(*data: str) -> Callable[[type[_T]], type[_T]]:
    """A frozen dataclass whose fields `data` hold arrays, and whose others are static."""

    def registered(cls: type[_T]) -> type[_T]:
        cls = dataclass(frozen=True, eq=False)(cls)
        meta = [name for name in cls.__dataclass_fields__ if name not in data]  # type: ignore[attr-defined]
        return jax.tree_util.register_dataclass(cls, data_fields=list(data), meta_fields=meta)

    return registered


@_pytree("points")
class Points(Operator):
    """Values at points.

    Attributes:
      points: [N, C] in [-1, 1].

    Measurements are [N], in the units of the field.
    """

    points: Any

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return (len(self.points),)

    @property
    def coords(self) -> Array:
        return self.points

    @property
    def groups(self) -> int:
        return len(self.points)

    def __call__(self, values, coords):
        return values


@_pytree("points")
class Function(Operator):
    """Any differentiable function of JAX, of values at points.

    Attributes:
      points: [N, C] in [-1, 1].
      function: hashable; from values [B, N, D] to measurements [B, M, D].
      shape: a grid of M entries.
      linear: see `Operator`.
    """

    points: Any
    function: Callable[[jax.Array], jax.Array]
    shape: tuple[int, ...]
    linear: bool = False

    @property
    def coords(self) -> Array:
        return self.points

    def __call__(self, values, coords):
        return self.function(values)


class _OnGrid(Operator):
    """An operator on a grid over [-1, 1], ends included."""

    size: tuple[int, ...]

    @property
    def grid(self) -> tuple[int, ...]:
        return self.size

    @property
    def coords(self) -> Array:
        return regular_grid(self.size)


@_pytree()
class AveragePooling(_OnGrid):
    """Means over blocks of grid points: larger voxels, which may differ along the axes.

    Attributes:
      size: points along each axis of the fine grid.
      factors: points of a block along each axis, divisors of `size`.

    Measurements are [size / factors], in the units of the field; (64, 64) by (2, 2) is (32, 32).
    """

    size: tuple[int, ...]
    factors: tuple[int, ...]

    def __post_init__(self):
        if len(self.size) != len(self.factors) or any(
            k < 1 or n % k for n, k in zip(self.size, self.factors, strict=True)
        ):
            raise ValueError(f"factors {self.factors} must divide the points of the grid {self.size}, axis by axis")

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return tuple(n // k for n, k in zip(self.size, self.factors, strict=True))

    @property
    def groups(self) -> int:
        return self.shape[0]

    def __call__(self, values, coords):
        batch, _, channels = values.shape
        blocks = [part for n, k in zip(self.shape[1:], self.factors[1:], strict=True) for part in (n, k)]
        means = values.reshape(batch, -1, self.factors[0], *blocks, channels)
        means = means.mean(tuple(range(2, 2 + 2 * len(self.size), 2)))
        return means.reshape(batch, -1, channels)


@_pytree()
class SliceProfile(_OnGrid):
    """Thick slices: along one axis, means weighted by the profile of a slice.

    Slice j stands at the middle of points j k to j k + k - 1 of the axis, k the factor. Its profile is a Gaussian of
    the given full width at half maximum, cut at the ends of the axis and normalised to a sum of 1.

    Attributes:
      size: points along each axis of the fine grid.
      axis: across the slices.
      factor: points of the fine grid from one slice to the next, a divisor of the axis.
      width: full width at half maximum in distances of slices; 1 is a slice as thick as the distance.

    Measurements are the grid with factor times fewer points along the axis, in the units of the field.
    """

    size: tuple[int, ...]
    axis: int
    factor: int
    width: float = 1.0

    def __post_init__(self):
        if not 0 <= self.axis < len(self.size) or self.factor < 1 or self.size[self.axis] % self.factor:
            raise ValueError(f"factor {self.factor} must divide axis {self.axis} of the grid {self.size}")
        if not self.width > 0:
            raise ValueError(f"width must be above 0, got {self.width}")

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return tuple(n // self.factor if k == self.axis else n for k, n in enumerate(self.size))

    @property
    def groups(self) -> int:
        return self.size[0] if self.axis else 1

    @property
    def profiles(self) -> np.ndarray:
        """Weights of the points in each slice, [slices, points]; rows sum to 1."""
        centres = (np.arange(self.shape[self.axis]) + 0.5) * self.factor - 0.5
        distances = (np.arange(self.size[self.axis]) - centres[:, None]) / (self.width * self.factor)
        weights = np.exp(-4 * math.log(2) * distances**2)
        return weights / weights.sum(1, keepdims=True)

    def __call__(self, values, coords):
        batch, _, channels = values.shape
        after = math.prod(self.size[self.axis + 1 :]) * channels
        lines = values.reshape(batch, -1, self.size[self.axis], after)
        profiles = jnp.asarray(self.profiles, values.dtype)
        return jnp.einsum("mn,bknc->bkmc", profiles, lines, precision="highest").reshape(batch, -1, channels)


@_pytree("rows")
class KSpace(_OnGrid):
    """Samples of a Cartesian k-space in two or three dimensions (or one), of real signals.

    The discrete Fourier transform of the values on the grid, orthonormal (norm="ortho"), so that an error has the same
    size in k-space as in the image. `KSpace.of_mask` makes one, `KSpace.sampled` takes the measurements out of a whole
    complex k-space, as a scanner or `numpy.fft.fftn` gives it.

    Attributes:
      size: points along each axis of the grid.
      rows: int [S], places of the samples in the flattened k-space, in the order of `numpy.fft.fftn`: zero frequency
        first.

    Measurements are [2, S], the real and then the imaginary parts, in the units of the field.
    """

    size: tuple[int, ...]
    rows: Any

    @classmethod
    def of_mask(cls, mask: Any) -> KSpace:
        """From a mask, bool [*grid], of the samples that are measured; zero frequency is at index 0 of each axis."""
        mask = np.asarray(mask)
        if mask.dtype != bool or not 1 <= mask.ndim <= 3 or not mask.any():
            raise ValueError(f"mask {mask.shape} of {mask.dtype} must be a bool array of a grid with a sample in it")
        return cls(tuple(mask.shape), np.flatnonzero(mask))

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return (2, self.rows.shape[0])

    def __call__(self, values, coords):
        batch, _, channels = values.shape
        axes = tuple(range(1, 1 + len(self.size)))
        spectrum = jnp.fft.fftn(values.reshape(batch, *self.size, channels), axes=axes, norm="ortho")
        return self.sampled(spectrum).reshape(batch, -1, channels)

    def sampled(self, spectrum: Any) -> jax.Array:
        """The measurements [B, 2, S, D] in a complex k-space [B, *grid, D]."""
        flat = jnp.asarray(spectrum).reshape(len(spectrum), -1, spectrum.shape[-1])[:, jnp.asarray(self.rows)]
        return jnp.stack([flat.real, flat.imag], 1)


@_pytree()
class Projections(Operator):
    """Parallel-beam projections of an image: integrals along rays, as in computed tomography.

    The image fills [-1, 1] x [-1, 1] and is 0 outside. At an angle of 0 rays run along the first axis, from top to
    bottom, and the detector along the second; the angle turns both counter-clockwise, as in `skimage.transform.radon`
    with circle=False. Cell detectors // 2 sees the grid point n // 2 at every angle.

    Attributes:
      size: points along both axes of the grid of the image, which are equal; they set the unit of length.
      angles: degrees.
      detectors: cells of the detector, one ray each.
      spacing: between rays, in distances of grid points.
      samples: points on a ray, at equal distances over the diagonal of the image; 0: one a distance of grid points.

    Measurements are [angles, detectors]: integrals of the field along the ray, in distances of grid points, as for sums
    over pixels.
    """

    size: tuple[int, int]
    angles: tuple[float, ...]
    detectors: int
    spacing: float = 1.0
    samples: int = 0

    def __post_init__(self):
        if len(self.size) != 2 or self.size[0] != self.size[1] or self.size[0] < 2:
            raise ValueError(f"projections are of images with equal sides, got the grid {self.size}")
        if not self.angles or self.detectors < 1 or not self.spacing > 0 or self.samples < 0:
            raise ValueError("projections need an angle, a detector, a spacing above 0, and samples of at least 0")

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return (len(self.angles), self.detectors)

    @property
    def groups(self) -> int:
        return len(self.angles) * self.detectors

    @property
    def _depths(self) -> np.ndarray:
        """Places [samples] along a ray, in distances of grid points from its middle."""
        length = math.sqrt(2) * self.size[0]
        count = self.samples or math.ceil(length)
        return ((np.arange(count) + 0.5) / count - 0.5) * length

    @property
    def coords(self) -> Array:
        offsets = (np.arange(self.detectors) - self.detectors // 2) * self.spacing
        along, across = self._depths, offsets[:, None]
        turned = [np.deg2rad(angle) for angle in self.angles]
        # Rows grow downwards.
        rows = np.stack([along * np.cos(a) - across * np.sin(a) for a in turned])
        columns = np.stack([along * np.sin(a) + across * np.cos(a) for a in turned])
        # The centre of skimage's rotation is the grid point n // 2.
        shift = self.size[0] // 2 - (self.size[0] - 1) / 2
        places = np.stack([rows, columns], -1).reshape(-1, 2) + shift
        step = 2 / (self.size[0] - 1)
        return np.clip(places * step, -1 - step, 1 + step)  # points outside count as 0

    def __call__(self, values, coords):
        depths = self._depths
        # Half a pixel beyond the outermost points belongs to the image too.
        inside = (jnp.abs(coords) <= 1 + 1 / (self.size[0] - 1)).all(-1)[:, None]
        sums = jnp.where(inside, values, 0).reshape(len(values), -1, len(depths), values.shape[-1]).sum(2)
        return sums * float(depths[1] - depths[0])


@_pytree("outer", "inner")
class Composed(Operator):
    """`outer @ inner`: the measurements of `inner`, measured by `outer`.

    Raises:
      ValueError: `inner` does not measure on the grid that `outer` takes.
    """

    outer: Any
    inner: Any

    def __post_init__(self):
        shape, taken = getattr(self.inner, "shape", None), getattr(self.outer, "grid", None)
        if isinstance(self.outer, Operator) and shape is not None and shape != taken:
            kind, other = type(self.outer).__name__, type(self.inner).__name__
            takes = "no grid" if taken is None else f"the grid {taken}"
            raise ValueError(f"{kind} takes {takes}, {other} measures {shape}: they do not compose")

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.outer.shape

    @property
    def linear(self) -> bool:  # type: ignore[override]
        return self.outer.linear and self.inner.linear

    @property
    def coords(self) -> Array:
        return self.inner.coords

    @property
    def grid(self) -> tuple[int, ...] | None:
        return self.inner.grid

    @property
    def groups(self) -> int:
        return math.gcd(self.outer.groups, self.inner.groups)

    def __call__(self, values, coords):
        return self.outer(self.inner(values, coords), coords)
