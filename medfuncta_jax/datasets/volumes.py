"""Volumes on new grids, with their affines, and robust scaling to [0, 1]. `volume_files.py` reads files."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np

from medfuncta_jax.datasets.dataset import DataError
from medfuncta_jax.datasets.volume_files import Volume, read_volume

__all__ = [
    "Volume",
    "block_average",
    "crop_or_pad",
    "nearest",
    "quantile_range",
    "read_volume",
    "resample",
    "resample_isotropic",
    "resample_volume",
    "scale_between",
    "scale_to_unit",
]

# Maximum number of cubic voxels of a volume, 2 GiB; half a cubic metre at 1 mm has fewer.
_LARGEST_ISOTROPIC = 1 << 29


def scale_to_unit(values: np.ndarray, low: float, high: float, name: str) -> np.ndarray:
    """Clip to two quantiles of all values and scale these to 0 and 1.

    Args:
      values: any shape, finite.
      low, high: the quantiles, 0 <= low < high <= 1.
      name: the file's name, for the message.
    Returns:
      float32 in [0, 1], the shape of `values`.
    Raises:
      DataError: both quantiles are equal, as in a constant volume.
    """
    return scale_between(values, *quantile_range(values, low, high, name), name)


def quantile_range(values: np.ndarray, low: float, high: float, name: str) -> tuple[float, float]:
    """The two quantiles of all values, the second one larger; otherwise as `scale_to_unit`."""
    bottom, top = (float(value) for value in np.quantile(values, (low, high)))
    if not top > bottom:
        kind = "constant" if values.min() == values.max() else f"constant between the quantiles {low} and {high}"
        raise DataError(f"{name}: the volume is {kind} ({bottom:g}); remove the file or widen the quantiles")
    return bottom, top


def scale_between(values: np.ndarray, bottom: float, top: float, name: str) -> np.ndarray:
    """Clip to [bottom, top], bottom < top, and scale to [0, 1]; otherwise as `scale_to_unit`."""
    if top - bottom > 1e38:
        raise DataError(
            f"{name}: its values range from {bottom:g} to {top:g}, beyond float32; repair or remove the file"
        )
    unit = np.array(values, values.dtype if values.dtype.kind == "f" else np.float64, order="C")
    np.clip(unit, bottom, top, out=unit)
    unit -= bottom
    unit /= top - bottom
    return np.clip(unit, 0.0, 1.0, out=unit).astype(np.float32, copy=False)


def resample(values: np.ndarray, shape: Sequence[int], steps: Sequence[float]) -> np.ndarray:
    """Resample on a coarser or finer grid about the same centre, without aliasing; zero outside the input.

    Separable: a sample is the mean over a window as wide as the output step if that exceeds one input step (area
    averaging, so that an integer factor averages blocks), and linear interpolation otherwise.

    Args:
      values: one axis an entry of `shape`.
      shape: the output's shape.
      steps: the output's step in input steps, an axis.
    Returns:
      float32 of `shape`, within the range of `values` and 0.
    """
    for axis, (size, step) in enumerate(zip(shape, steps, strict=True)):
        weights = _window_weights(values.shape[axis], size, step).astype(np.float32)
        values = np.moveaxis(np.tensordot(weights, values, axes=(1, axis)), 0, axis)
    return values.astype(np.float32)


def _window_weights(inputs: int, outputs: int, step: float) -> np.ndarray:
    """[outputs, inputs]: the part of each output's window that each input cell fills; rows sum to 1, or 0 outside."""
    centres = _centres(inputs, outputs, step)
    half = max(step, 1.0) / 2
    cells = np.arange(inputs)
    upper = np.minimum(centres[:, None] + half, cells + 0.5)
    lower = np.maximum(centres[:, None] - half, cells - 0.5)
    weights = np.maximum(upper - lower, 0.0)
    inside = _inside(centres, inputs)
    return np.where(inside[:, None], weights / np.maximum(weights.sum(1, keepdims=True), 1e-12), 0.0)


def _centres(inputs: int, outputs: int, step: float) -> np.ndarray:
    """[outputs]: where the samples lie, in input steps from the first input sample."""
    return (np.arange(outputs) - (outputs - 1) / 2) * step + (inputs - 1) / 2


def _inside(centres: np.ndarray, inputs: int) -> np.ndarray:
    return (centres >= -0.5) & (centres <= inputs - 0.5)


def nearest(values: np.ndarray, shape: Sequence[int], steps: Sequence[float]) -> np.ndarray:
    """`resample` for labels: each sample, at the same place, is the nearest one of the input; 0 outside the input.

    Of two that are equally near, the one closer to the centre is taken, so that nothing shifts to one side.
    """
    for axis, (size, step) in enumerate(zip(shape, steps, strict=True)):
        count = values.shape[axis]
        centres = _centres(count, size, step)
        half = 0.5 + 1e-9  # rounding of the centres decides no tie
        rows = np.where(centres < (count - 1) / 2, np.floor(centres + half), np.ceil(centres - half)).astype(int)
        inside = _inside(centres, count).reshape(-1, *[1] * (values.ndim - axis - 1))
        values = np.where(inside, values.take(rows.clip(0, count - 1), axis), 0)
    return values


def resample_volume(
    volume: Volume,
    shape: Sequence[int],
    spacing: float | None,
    by: Callable[[np.ndarray, Sequence[int], Sequence[float]], np.ndarray] = resample,
) -> Volume:
    """Resample to `shape` with cubic voxels about the volume's centre.

    Args:
      volume: values and affine.
      shape: the three sizes of the output.
      spacing: millimetres a voxel; None takes the smallest that fits the whole field of view into `shape`.
      by: `resample`, or `nearest` for labels.
    Returns:
      The volume; its affine keeps the tissue of each voxel in place, and voxels outside the input are zero.
    """
    source = np.array(volume.values.shape)
    if spacing is None:
        spacing = float(np.max(source * volume.spacing / np.array(shape)))
    steps = spacing / volume.spacing
    index_map = np.eye(4)
    index_map[:3, :3] = np.diag(steps)
    index_map[:3, 3] = (source - 1) / 2 - (np.array(shape) - 1) / 2 * steps
    return Volume(by(volume.values, shape, steps.tolist()), volume.affine @ index_map)


def resample_isotropic(volume: Volume, spacing: float, fill: float, *, name: str) -> Volume:
    """Interpolate, by cubic splines, on cubic voxels along the axes of space that cover the volume's field of view.

    Nothing is smoothed before a coarser grid is sampled: cubic interpolation alone, as CT sets are commonly prepared.
    The field of view reaches half a voxel beyond the outer voxel centres; there the outer voxels are continued.

    Args:
      volume: any affine, also oblique or sheared (gantry tilt).
      spacing: millimetres a voxel.
      fill: the value outside the field of view, where an oblique volume does not reach.
      name: the file's name, for the message.
    Returns:
      The volume with affine [[spacing * I, origin], [0, 1]], float32; `volume` itself if it is such a volume.
    Raises:
      DataError: a field of view that no scanner has.
    """
    from scipy import ndimage

    linear, offset = volume.affine[:3, :3], volume.affine[:3, 3]
    if np.allclose(linear, spacing * np.eye(3), atol=1e-3 * spacing):
        return volume
    ends = [(-0.5, size - 0.5) for size in volume.values.shape]
    corners = np.array(list(itertools.product(*ends))) @ linear.T + offset
    low, high = corners.min(0), corners.max(0)
    shape = np.maximum(1, np.rint((high - low) / spacing).astype(int))
    if math.prod(shape.tolist()) > _LARGEST_ISOTROPIC:
        extent = " x ".join(f"{side:.4g}" for side in high - low)
        raise DataError(f"{name}: a field of view of {extent} mm; its voxel sizes must be wrong: repair or remove it")
    affine = np.diag([spacing, spacing, spacing, 1.0])
    affine[:3, 3] = (low + high) / 2 - (shape - 1) / 2 * spacing
    to_index = np.linalg.inv(volume.affine) @ affine
    matrix = to_index[:3, :3]
    if np.allclose(matrix, np.diag(np.diag(matrix)), atol=1e-9):
        matrix = np.diag(matrix)  # much faster
    # One voxel more on each side: beyond the outer centres scipy takes `fill`.
    coefficients = ndimage.spline_filter(np.pad(volume.values, 1, mode="edge"), order=3, output=np.float32)
    values = ndimage.affine_transform(
        coefficients, matrix, to_index[:3, 3] + 1, tuple(shape.tolist()), np.float32, cval=fill, prefilter=False
    )
    return Volume(values, affine)


def crop_or_pad(volume: Volume, shape: Sequence[int], fill: float) -> Volume:
    """Cut axes that are too long, and extend axes that are too short by `fill`, about the centre.

    If an odd number of voxels is added (155 to 256: 50 and 51) or cut, the end gets one more than the start.

    Args:
      volume: values [X, Y, Z].
      shape: the three sizes of the output.
      fill: the value of added voxels.
    Returns:
      The volume whose affine leaves every voxel at its place in space.
    """
    shift, kept, edges = np.eye(4), [], []
    for axis, size in enumerate(shape):
        missing = size - volume.values.shape[axis]
        start = -missing // 2 if missing < 0 else -(missing // 2)
        kept.append(slice(max(start, 0), max(start, 0) + size))
        edges.append((max(-start, 0), max(missing + start, 0)))
        shift[axis, 3] = start
    # Cutting comes before padding, which bounds the memory of a long flat volume.
    return Volume(np.pad(volume.values[tuple(kept)], edges, constant_values=fill), volume.affine @ shift)


def block_average(volume: Volume, factor: int) -> Volume:
    """Means over blocks of factor^3 voxels; the affine maps the new voxels to the centres of their blocks.

    Args:
      volume: values [X, Y, Z], each size a multiple of `factor`.
      factor: at least 1.
    """
    x, y, z = (size // factor for size in volume.values.shape)
    blocks = volume.values.reshape(x, factor, y, factor, z, factor)
    index_map = np.diag([factor, factor, factor, 1.0])
    index_map[:3, 3] = (factor - 1) / 2
    return Volume(blocks.mean((1, 3, 5), dtype=np.float32), volume.affine @ index_map)
