"""Volumes from files and to files: NIfTI in RAS+, robust scaling to [0, 1], and new grids with their affines."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import math
import os
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medfuncta_jax.atomic import atomic_path
from medfuncta_jax.datasets.dataset import DataError

# Deflate cannot do better than this, so a header that claims more voxels than the file can hold is corrupt.
_LARGEST_GZIP_RATIO = 1032

# A volume on cubic voxels has no more of them than this, 2 GiB; half a cubic metre at 1 mm is less.
_LARGEST_ISOTROPIC = 1 << 29

# Millimetres, as an affine can have them in earnest: from microscopy to far beyond the body.
_SMALLEST_STEP, _LARGEST_STEP, _FARTHEST = 1e-6, 1e4, 1e7


@dataclass(frozen=True)
class Volume:
    """One scalar volume.

    Attributes:
      values: float32 [X, Y, Z], axes closest to right, anterior, superior (RAS+).
      affine: float64 [4, 4], from voxel indices to millimetres; voxel centres lie at whole indices.
    """

    values: np.ndarray
    affine: np.ndarray

    @property
    def spacing(self) -> np.ndarray:
        """Millimetres from voxel to voxel along each axis, float64 [3]."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)


def files_below(folder: Path) -> Iterator[Path]:
    """All files at any depth below a folder, in an order that stays; names that start with a dot are left out.

    Links to folders are followed, but no folder is visited twice, so that a loop of links ends.

    Raises:
      DataError: a folder that cannot be listed.
    """
    visited: set[tuple[int, int]] = set()

    def walk(directory: Path) -> Iterator[Path]:
        try:
            state = directory.stat()
            names = sorted(os.listdir(directory))
        except OSError as error:
            raise DataError(f"{directory}: cannot be listed ({error.strerror or error})") from error
        if (state.st_dev, state.st_ino) in visited:
            return
        visited.add((state.st_dev, state.st_ino))
        for path in (directory / name for name in names if not name.startswith(".")):
            if os.path.isdir(path):
                yield from walk(path)
            elif os.path.isfile(path):
                yield path

    return walk(folder)


def volume_shape(path: Path) -> tuple[int, ...]:
    """The shape that the header of an image file states, without reading the voxels.

    Raises:
      DataError: not a readable image, or a header that claims more than the file can hold.
    """
    return volume_header(path)[0]


def volume_header(path: Path) -> tuple[tuple[int, ...], np.ndarray]:
    """What the header of an image file states: its shape, and the affine [4, 4] of the axes as they lie in the file.

    Raises:
      DataError: as `volume_shape`.
    """
    try:
        with _silent():
            image = _opened(path)
            shape, affine = image.shape, np.asarray(image.affine, np.float64)
        # An image may lie in two files (.hdr and .img); its size is then checked when it is read.
        if path.suffix in (".gz", ".nii"):
            _require_room(image, path.stat().st_size * (_LARGEST_GZIP_RATIO if path.suffix == ".gz" else 1))
    except Exception as error:  # nibabel parses whatever the file holds: a broken header raises nearly anything
        raise _unreadable(path, error) from error
    return tuple(int(n) for n in shape), affine


def read_volume(path: Path) -> Volume:
    """A 3D image file, reoriented to RAS+, with scale factors applied.

    Raises:
      DataError: names the file: truncated, corrupt, not three-dimensional, not of real scalars, NaN or infinite voxels,
        or an affine that is no map to space.
    """
    shape = volume_shape(path)
    if len(shape) < 3 or any(n != 1 for n in shape[3:]):
        raise DataError(f"{path}: {len(shape)}D image {shape}, a 3D volume is needed; split it into one file a volume")
    if 0 in shape:
        raise DataError(f"{path}: an image without voxels {shape}; remove the file")
    return _read(path)[0]


def read_series(path: Path) -> list[Volume]:
    """The volumes of a 4D image file, one an entry of its last axis; see `read_volume`."""
    return _read(path)


def _read(path: Path) -> list[Volume]:
    import nibabel

    try:
        with _silent():  # a NaN is refused below, by the file's name
            image = _opened(path)
            if image.get_data_dtype().kind not in "biuf":
                raise ValueError("colour or complex voxels, a volume of real scalars is needed")
            if not _maps_to_space(image.affine):
                raise ValueError("its affine does not map voxels to space")
            _require_room(image, _unpacked_bytes(Path(image.file_map["image"].filename)))
            image = nibabel.as_closest_canonical(image)
            values = np.asarray(image.get_fdata(dtype=np.float32, caching="unchanged"))
            affine = np.asarray(image.affine, np.float64)
    except Exception as error:  # as in `volume_shape`
        raise _unreadable(path, error) from error
    bad = int(values.size - np.count_nonzero(np.isfinite(values)))
    if bad:
        raise DataError(f"{path}: {bad} of {values.size} voxels are NaN or infinite; repair or remove the file")
    values = values.reshape(*values.shape[:3], -1)
    return [Volume(np.ascontiguousarray(values[..., t]), affine) for t in range(values.shape[3])]


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without warnings and the log lines, up to a dozen a file, by which nibabel says what it mends in a header."""
    from nibabel.imageglobals import logger

    before, logger.disabled = logger.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = before


def _opened(path: Path) -> Any:
    import nibabel

    return nibabel.load(path)


def _require_room(image: Any, held: int) -> None:
    """Before anything is allocated, or taken for voxels, by what a header claims."""
    offset = int(image.dataobj.offset)
    if getattr(image.header, "is_single", False) and offset < image.header.single_vox_offset:
        raise ValueError(f"its voxels are said to start at byte {offset}, inside the header")
    if offset + math.prod(map(int, image.shape)) * image.get_data_dtype().itemsize > held:
        raise ValueError(f"its header claims {'x'.join(map(str, image.shape))} voxels, more than the file can hold")


def _unpacked_bytes(path: Path) -> int:
    """The size without compression; read to the end, since nibabel stops at the last voxel, before the checksum."""
    from nibabel.openers import ImageOpener

    if path.suffix.lower() not in ImageOpener.compress_ext_map:
        return path.stat().st_size
    with gzip.open(path) if path.suffix == ".gz" else ImageOpener(str(path)) as file:
        return sum(iter(lambda: len(file.read(1 << 20)), 0))


def _maps_to_space(affine: np.ndarray) -> bool:
    """Whether an affine [4, 4] has axes that differ, and steps and an origin that can be meant."""
    linear, offset = affine[:3, :3].astype(np.float64), affine[:3, 3]
    if not (np.abs(linear) <= _LARGEST_STEP).all() or not (np.abs(offset) <= _FARTHEST).all():  # NaN is not either
        return False
    steps = np.linalg.norm(linear, axis=0)
    return bool(steps.min() >= _SMALLEST_STEP and abs(np.linalg.det(linear / steps)) > 1e-6)


def _unreadable(path: Path, error: Exception) -> DataError:
    if isinstance(error, FileNotFoundError):
        return DataError(f"{path}: no such file")
    kind = "truncated" if isinstance(error, EOFError) else "corrupt" if isinstance(error, zlib.error) else "unreadable"
    reason = " ".join(str(error).replace(str(path), "").split()).strip(" '\":.") or type(error).__name__
    return DataError(f"{path}: {kind} image ({reason}); copy the file anew or remove it")


def canonical_volume(values: np.ndarray, affine: np.ndarray) -> Volume:
    """A volume whose axes are permuted and flipped so that they are closest to RAS+.

    Args:
      values: [I, J, K], any order of axes.
      affine: [4, 4], of the indices of `values` to millimetres, RAS+.
    """
    import nibabel

    image: Any = nibabel.as_closest_canonical(nibabel.Nifti1Image(values, affine))
    return Volume(np.asarray(image.dataobj), np.asarray(image.affine, np.float64))


def write_volume(path: Path | str, values: np.ndarray, affine: np.ndarray, *, dtype: str = "float32") -> None:
    """Write a NIfTI file, whole or not at all: a reconstruction with the affine of its example overlays the scan.

    The same values give the same bytes. The folder is made if absent.

    Args:
      path: ends in .nii or .nii.gz.
      values: [X, Y, Z], or [X, Y, Z, D] of several channels.
      affine: [4, 4], of voxel indices to millimetres, RAS+.
      dtype: how the voxels are stored; whole numbers are rounded, and cut at the ends of the type's range.
    Raises:
      ValueError: another suffix, `values` that are no volume, or an affine of another shape.
    """
    import nibabel

    path, values, affine = Path(path), np.asarray(values), np.asarray(affine, np.float64)
    if not path.name.endswith((".nii", ".nii.gz")):
        raise ValueError(f"{path}: a NIfTI file ends in .nii or .nii.gz")
    if values.ndim not in (3, 4) or affine.shape != (4, 4):
        raise ValueError(f"{path}: values [X, Y, Z] and affine [4, 4] are needed, got {values.shape}, {affine.shape}")
    if np.issubdtype(dtype, np.integer):
        limits = np.iinfo(dtype)
        values = np.clip(np.rint(values), limits.min, limits.max)
    image: Any = nibabel.Nifti1Image(values.astype(dtype), affine)
    image.header.set_xyzt_units("mm")
    with atomic_path(path) as partial:
        if path.suffix == ".nii":
            partial.write_bytes(image.to_bytes())
        else:
            # Level 1 is nibabel's; noise does not compress better with more time. No name and time inside.
            with open(partial, "wb") as raw, gzip.GzipFile("", "wb", 1, raw, mtime=0) as file:
                image.to_stream(file)


def scale_to_unit(values: np.ndarray, low: float, high: float, name: str) -> np.ndarray:
    """Clip to two quantiles of all values and scale these to 0 and 1.

    Args:
      values: any shape, finite.
      low, high: the quantiles, 0 <= low < high <= 1.
      name: of the file, for the message.
    Returns:
      float32 in [0, 1], the shape of `values`.
    Raises:
      DataError: both quantiles are equal, as in a constant volume.
    """
    bottom, top = (float(value) for value in np.quantile(values, (low, high)))
    if not top > bottom:
        kind = "constant" if values.min() == values.max() else f"constant between the quantiles {low} and {high}"
        raise DataError(f"{name}: the volume is {kind} ({bottom:g}); remove the file or widen the quantiles")
    return scale_between(values, bottom, top, name)


def scale_between(values: np.ndarray, bottom: float, top: float, name: str) -> np.ndarray:
    """Clip to [bottom, top], bottom < top, and scale to [0, 1]; otherwise as `scale_to_unit`."""
    if top - bottom > 1e38:
        raise DataError(
            f"{name}: its values range from {bottom:g} to {top:g}, beyond float32; repair or remove the file"
        )
    return np.clip((np.clip(values, bottom, top) - bottom) / (top - bottom), 0.0, 1.0).astype(np.float32)


def resample(values: np.ndarray, shape: Sequence[int], steps: Sequence[float]) -> np.ndarray:
    """Resample on a coarser or finer grid about the same centre, without aliasing; zero outside the input.

    Separable: a sample is the mean over a window as wide as the output step where that is above one input step (area
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
    centres = (np.arange(outputs) - (outputs - 1) / 2) * step + (inputs - 1) / 2
    half = max(step, 1.0) / 2
    cells = np.arange(inputs)
    upper = np.minimum(centres[:, None] + half, cells + 0.5)
    lower = np.maximum(centres[:, None] - half, cells - 0.5)
    weights = np.maximum(upper - lower, 0.0)
    inside = (centres >= -0.5) & (centres <= inputs - 0.5)
    return np.where(inside[:, None], weights / np.maximum(weights.sum(1, keepdims=True), 1e-12), 0.0)


def resample_volume(volume: Volume, shape: Sequence[int], spacing: float | None) -> Volume:
    """Resample to `shape` with cubic voxels about the volume's centre.

    Args:
      volume: values and affine.
      shape: the three sizes of the output.
      spacing: millimetres a voxel; None takes the smallest that fits the whole field of view into `shape`.
    Returns:
      The volume whose affine maps the new voxels to where their tissue was; zero outside the input.
    """
    source = np.array(volume.values.shape)
    if spacing is None:
        spacing = float(np.max(source * volume.spacing / np.array(shape)))
    steps = spacing / volume.spacing
    index_map = np.eye(4)
    index_map[:3, :3] = np.diag(steps)
    index_map[:3, 3] = (source - 1) / 2 - (np.array(shape) - 1) / 2 * steps
    return Volume(resample(volume.values, shape, steps.tolist()), volume.affine @ index_map)


def resample_isotropic(volume: Volume, spacing: float, fill: float, *, name: str) -> Volume:
    """Interpolate, by cubic splines, on cubic voxels along the axes of space that cover the volume's field of view.

    Nothing is smoothed before a coarser grid is sampled: cubic interpolation alone, as CT sets are commonly prepared.
    The field of view reaches half a voxel beyond the outer voxel centres; there the outer voxels are continued.

    Args:
      volume: any affine, also oblique or sheared (gantry tilt).
      spacing: millimetres a voxel.
      fill: the value outside the field of view, where an oblique volume does not reach.
      name: of the file, for the message.
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
    """Bring each axis to a size about its centre: cut what is too long, add `fill` to what is too short.

    Of an odd number of voxels to add, the end gets one more than the start (155 to 256: 50 and 51); likewise to cut.

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
    # What is cut goes first, or a long flat volume would grow thick before it gets short.
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
