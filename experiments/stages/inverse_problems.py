"""The inverse problems of `inverse`: operators of a grid, and the classical methods beside the field."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.ndimage import map_coordinates

from medfuncta_jax import operators
from medfuncta_jax.coordinates import grid

Name = Literal["slices_2", "slices_4", "kspace_4", "projections_30", "points_10"]
PROBLEMS = get_args(Name)

# Iterations end at this relative change of images, or at these numbers of steps.
_TV_CHANGE, TV_STEPS, _TV_INNER_STEPS = 5e-4, 300, 10
# Entries of a matrix that are computed at once.
_ENTRIES_AT_ONCE = 2**24


@dataclass(frozen=True)
class Problem:
    """One kind of measurement.

    Attributes:
      title: name for people.
      operator: the operator, with points in [-1, 1].
      classical: name and function of the usual method, from measurements [*shape, D] of one signal to [*grid, D].
    """

    title: str
    operator: operators.Operator
    classical: tuple[str, Callable[[np.ndarray], np.ndarray]]


def problem_of(name: str, shape: tuple[int, ...], *, seed: int) -> Problem | None:
    """A problem on signals of a grid; None if the grid does not allow it."""
    rng = np.random.default_rng(seed)
    if name.startswith("slices"):
        factor, axis = int(name.partition("_")[2]), (0 if len(shape) < 3 else 2)
        if shape[axis] % factor:
            return None
        slices = operators.SliceProfile(shape, axis, factor)

        def between(measured: np.ndarray) -> np.ndarray:
            from scipy import ndimage

            zoom = [float(factor) if k == axis else 1.0 for k in range(len(shape))] + [1.0]
            return ndimage.zoom(measured, zoom, order=1, mode="nearest", grid_mode=True)

        return Problem(f"Slices {factor} points thick", slices, ("linear interpolation", between))
    if name == "kspace_4":
        if len(shape) == 1:
            return None
        samples = operators.KSpace.of_mask(mask_of(shape, 4, rng))
        return Problem("A quarter of k-space", samples, ("zero filling", functools.partial(zero_filled, samples)))
    if name == "projections_30":
        if len(shape) != 2 or shape[0] != shape[1]:
            return None
        angles = tuple(6.0 * k for k in range(30))
        rays = operators.Projections((shape[0], shape[1]), angles, math.ceil(math.sqrt(2) * shape[0]))
        return Problem("30 projections", rays, ("filtered backprojection", functools.partial(backprojected, rays)))
    points = np.sort(rng.permutation(math.prod(shape))[: max(1, math.prod(shape) // 10)])
    seen = np.isin(np.arange(math.prod(shape)), points)

    def spread(measured: np.ndarray) -> np.ndarray:
        from experiments.stages.curves import interpolated

        signal = np.zeros((len(seen), measured.shape[-1]), measured.dtype)
        signal[seen] = measured
        return interpolated(signal.reshape(*shape, -1), seen)

    return Problem(
        "A tenth of the points", operators.Points(grid(shape)[points]),
        ("linear interpolation" if len(shape) < 3 else "inverse distance", spread),
    )  # fmt: skip


def mask_of(shape: tuple[int, ...], factor: int, rng: np.random.Generator) -> np.ndarray:
    """A mask of k-space, bool [*shape] with zero frequency first: whole lines along the last axis, the readout axis;
    their number is `factor` times smaller than all.

    All lines nearer to the centre than a 25th of the axis are included, others at random, with a probability that falls
    with the square of their distance.
    """
    phases = np.meshgrid(*(np.fft.fftfreq(n) for n in shape[:-1]), indexing="ij")
    distance = np.sqrt(sum(np.square(phase) for phase in phases)).ravel()
    score = -2 * np.log(0.02 + distance) + rng.gumbel(size=len(distance))  # draws without replacement
    score[distance <= 0.04] = np.inf
    lines = np.zeros(len(distance), bool)
    lines[np.argsort(-score, kind="stable")[: max(1, round(len(distance) / factor))]] = True
    return np.broadcast_to(lines.reshape(*shape[:-1], 1), shape).copy()


def zero_filled(operator: operators.KSpace, measured: np.ndarray) -> np.ndarray:
    """The real signal [*grid, D] of least energy with the measured samples [2, S, D]: a sample also gives the opposite
    frequency, and all others are 0."""
    size, axes = operator.size, tuple(range(len(operator.size)))
    spectrum = np.zeros((math.prod(size), measured.shape[-1]), complex)
    there = np.zeros((math.prod(size), 1))
    spectrum[operator.rows], there[operator.rows] = measured[0] + 1j * measured[1], 1
    spectrum, there = spectrum.reshape(*size, -1), there.reshape(*size, 1)

    def opposite(array: np.ndarray) -> np.ndarray:
        return np.roll(np.flip(array, axes), 1, axes)

    both = (spectrum + np.conj(opposite(spectrum))) / np.maximum(there + opposite(there), 1)
    return np.fft.ifftn(both, axes=axes, norm="ortho").real.astype(measured.dtype)


def backprojected(operator: operators.Projections, measured: np.ndarray) -> np.ndarray:
    """Filtered backprojection (ramp filter) [n, n, D] of projections [angles, detectors, D]."""
    from skimage.transform import iradon

    images = [
        iradon(channel.T, theta=np.array(operator.angles), circle=False, output_size=operator.size[0])
        for channel in np.moveaxis(measured, -1, 0)
    ]
    return np.stack(images, -1).astype(measured.dtype)


class LinearMap:
    """An operator on signals of a grid, with linear interpolation between grid points, and its adjoint."""

    def __init__(self, operator: operators.Operator, shape: tuple[int, ...]):
        self._operator, self._shape = operator, shape
        coords = np.asarray(operator.coords)
        self._places = tuple((coords[:, k] + 1) / 2 * (n - 1) for k, n in enumerate(shape))
        self._coords = jnp.asarray(coords, jnp.float32)
        self._on_grid = operator.grid == shape
        # A matrix if it is small: rays have far more places than there are pixels and measurements.
        entries = math.prod(shape) * math.prod(operator.shape)
        self._matrix = None if self._on_grid or entries > 2**26 else self._as_matrix()

    def _values(self, signals: jax.Array) -> jax.Array:
        """Values [n, N, D] at the operator's points of signals [n, *grid, D]."""
        if self._on_grid:
            return signals.reshape(len(signals), -1, signals.shape[-1])
        read = functools.partial(map_coordinates, coordinates=self._places, order=1, mode="nearest")
        return jax.vmap(jax.vmap(read, in_axes=-1, out_axes=-1))(signals)

    def _as_matrix(self) -> np.ndarray:
        """[M, points of the grid]: the measurements of each grid point alone, a few rows at a time."""
        rows, count = [], math.prod(self._shape)
        each = len(self._coords) // self._operator.groups
        several = each * max(1, _ENTRIES_AT_ONCE // (each * count))
        for start in range(0, len(self._coords), several):
            part = slice(start, start + several)
            values = np.zeros((len(self._coords[part]), count), np.float32)
            # The 2^C corners around a place, each with its weight.
            low = [
                np.clip(np.floor(p[part]).astype(int), 0, n - 2) for p, n in zip(self._places, self._shape, strict=True)
            ]
            share = [np.clip(p[part] - k, 0, 1) for p, k in zip(self._places, low, strict=True)]
            for corner in np.ndindex(*(2,) * len(low)):
                at = np.ravel_multi_index([k + c for k, c in zip(low, corner, strict=True)], self._shape)
                weight = np.prod([s if c else 1 - s for s, c in zip(share, corner, strict=True)], axis=0)
                np.add.at(values, (np.arange(len(values)), at), weight)
            rows.append(np.asarray(self._operator(jnp.asarray(values)[None], self._coords[part]))[0])
        return np.concatenate(rows)

    def forward(self, signals: np.ndarray) -> np.ndarray:
        """Measurements [n, M, D] of signals [n, *grid, D]."""
        if self._matrix is not None:
            flat = signals.reshape(len(signals), -1, signals.shape[-1])
            return np.einsum("mp,npd->nmd", self._matrix, flat, optimize=True).astype(np.float32)
        return np.asarray(self._forward(jnp.asarray(signals)))

    def adjoint(self, measured: np.ndarray) -> np.ndarray:
        """Signals [n, *grid, D] of measurements [n, M, D]."""
        shape = (len(measured), *self._shape, measured.shape[-1])
        if self._matrix is not None:
            return np.einsum("mp,nmd->npd", self._matrix, measured, optimize=True).reshape(shape)
        return np.asarray(self._adjoint(jnp.zeros(shape, jnp.float32), jnp.asarray(measured)))

    @functools.cached_property
    def _forward(self) -> Callable[[jax.Array], jax.Array]:
        return jax.jit(lambda signals: self._operator(self._values(signals), self._coords))

    @functools.cached_property
    def _adjoint(self) -> Callable[[jax.Array, jax.Array], jax.Array]:
        return jax.jit(lambda like, measured: jax.vjp(self._forward, like)[1](measured)[0])

    @functools.cached_property
    def norm(self) -> float:
        """The largest singular value."""
        signal = np.random.default_rng(0).random((1, *self._shape, 1), np.float32)
        for _ in range(30):
            signal = self.adjoint(self.forward(signal / np.linalg.norm(signal)))
        return math.sqrt(float(np.linalg.norm(signal)))


def total_variation(
    linear: LinearMap, measured: np.ndarray, first: np.ndarray, *, weight: float, may_stop: Callable[[], None]
) -> tuple[np.ndarray, int]:
    """Signals [n, *grid, D] in [0, 1] that minimise |A x - y|^2 / (2 |A|^2) + weight TV(x), and FISTA's iterations.

    Args:
      linear: A, with |A| its norm.
      measured: y, [n, M, D].
      first: images to begin with, [n, *grid, D].
      weight: > 0; a penalty that does not depend on the unit of the measurements.
    """
    from skimage.restoration import denoise_tv_chambolle

    step = 1 / linear.norm**2
    image = before = ahead = first
    momentum, count, change = 1.0, 0, math.inf
    while change > _TV_CHANGE and count < TV_STEPS:
        may_stop()
        moved = ahead - step * linear.adjoint(linear.forward(ahead) - measured)
        image = np.stack([
            denoise_tv_chambolle(one, weight=weight, eps=1e-5, max_num_iter=_TV_INNER_STEPS, channel_axis=-1)
            for one in moved
        ]).clip(0, 1)  # fmt: skip
        following = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
        ahead = image + (momentum - 1) / following * (image - before)
        change = float(np.linalg.norm(image - before)) / max(float(np.linalg.norm(image)), 1e-30)
        before, momentum, count = image, following, count + 1
    return image, count
