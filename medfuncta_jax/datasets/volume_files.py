"""Volumes from files: NIfTI, Analyze and MGH, in RAS+ and millimetres. `medfuncta_jax.nifti` writes them.

Honoured of NIfTI's header: sizes, type and byte order of the voxels, their offset, slope and intercept; the sform, or
else the qform, or else pixdim; and the unit of length (metre, millimetre, micron; not stated is millimetre).
Analyze's unit (mm, cm, m, um) counts too; MGH is in millimetres by definition.
Ignored, and logged once a source where it is set: an unknown unit of length, a qform that differs from the sform, the
intent, and the range for display (cal_min, cal_max). Names, descriptions, time, the order of slices, and pixdim beside
a qform or sform do not concern values or places.
Refused: colour and complex voxels, CIFTI and other files without a grid in space, and files cut short.
"""

from __future__ import annotations

import contextlib
import gzip
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medfuncta_jax.datasets.contents import IgnoredFields, contents, unreadable
from medfuncta_jax.datasets.dataset import DataError
from medfuncta_jax.settings import SettingsError

# Largest ratio that gzip reaches; a header that claims more voxels than the file can hold is corrupt.
_LARGEST_GZIP_RATIO = 1032

# Plausible millimetres of an affine: from microscopy to far beyond the body.
_SMALLEST_STEP, _LARGEST_STEP, _FARTHEST = 1e-6, 1e4, 1e7

# NIfTI's units of length in millimetres, by their codes in a byte with the unit of time, and Analyze's.
_LENGTH_BITS = 7
_MILLIMETRES = {0: 1.0, 1: 1e3, 2: 1.0, 3: 1e-3, "": 1.0, "mm": 1.0, "cm": 10.0, "m": 1e3, "um": 1e-3}

_READS = "volumes in NIfTI, Analyze and MGH"
_NIFTI, _PACKED = "a NIfTI file", "a NIfTI file, compressed by gzip"
_DAMAGED = "copy the file anew or remove it"


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


def volume_header(path: Path) -> tuple[tuple[int, ...], np.ndarray]:
    """The shape in the header of an image file, and the affine [4, 4] of the axes in the order of the file.

    Raises:
      DataError: not a readable image, or a header that claims more than the file can hold.
    """
    with _read(path) as image:
        # The size of an image in two files (.hdr and .img) is checked when it is read.
        if path.suffix in (".gz", ".nii"):
            _require_room(path, image, path.stat().st_size * (_LARGEST_GZIP_RATIO if path.suffix == ".gz" else 1))
        return tuple(int(n) for n in image.shape), _affine(image)


def nan_value(nan: str | float) -> float | None:
    """The replacement of NaN voxels by a source's option `nan`, a number or its text; None for "", which refuses NaN.

    Raises:
      SettingsError: no finite number.
    """
    if nan == "":
        return None
    with contextlib.suppress(ValueError):
        if math.isfinite(value := float(nan)):
            return value
    raise SettingsError(f'nan must be a number, or "" to refuse files with NaN voxels, got {nan!r}')


def sample_type(path: Path) -> tuple[str, float, float]:
    """The stored type of an image file's voxels (numpy's name), the slope and the intercept.

    Raises:
      DataError: not a readable image.
    """
    with _read(path) as image:
        voxels = image.dataobj
        return image.get_data_dtype().newbyteorder("=").name, float(voxels.slope), float(voxels.inter)


def read_volume(path: Path, ignored: IgnoredFields | None = None, nan: float | None = None) -> Volume:
    """A 3D image file, reoriented to RAS+, in millimetres, with scale factors applied; the module's docstring lists the
    fields.

    Memory: the voxels as they are stored and the result.

    Args:
      path: the file.
      ignored: called for fields that are ignored.
      nan: replacement of NaN voxels, as for background outside the body; None refuses NaN.
    Raises:
      DataError: names the file: something else, truncated, corrupt, not three-dimensional, not of real scalars, NaN or
        infinite voxels, or an affine that is no map to space.
    """
    shape, _ = volume_header(path)
    if len(shape) < 3 or any(n != 1 for n in shape[3:]):
        raise DataError(f"{path}: {len(shape)}D image {shape}, a 3D volume is needed; split it into one file a volume")
    if 0 in shape:
        raise DataError(f"{path}: an image without voxels {shape}; remove the file")
    return read_series(path, ignored, nan)[0]


def read_series(path: Path, ignored: IgnoredFields | None = None, nan: float | None = None) -> list[Volume]:
    """The volumes of a 4D image file, one per entry of the last axis; see `read_volume`."""
    with _read(path) as image:
        if image.get_data_dtype().kind not in "biuf":
            raise DataError(
                f"{path}: colour or complex voxels, a volume of real scalars is needed; convert or remove it"
            )
        affine = _affine(image)
        if not _maps_to_space(affine):
            raise DataError(f"{path}: unreadable image (its affine does not map voxels to space); {_DAMAGED}")
        _require_room(path, image, _unpacked_bytes(Path(image.file_map["image"].filename)))
        _tell_ignored(path, image, IgnoredFields() if ignored is None else ignored)
        volume = canonical_volume(_scaled(image.dataobj), affine)
    if nan is not None:
        volume.values[np.isnan(volume.values)] = nan
    bad = int(volume.values.size - np.count_nonzero(np.isfinite(volume.values)))
    if bad:
        remedy = "data.nan=0 reads NaN as background, or " if np.isnan(volume.values).any() else ""
        raise DataError(
            f"{path}: {bad} of {volume.values.size} voxels are NaN or infinite; {remedy}repair or remove the file"
        )
    values = volume.values.reshape(*volume.values.shape[:3], -1)
    return [Volume(values[..., t], volume.affine) for t in range(values.shape[3])]


def read_mask(path: Path, image: Path) -> Volume:
    """The labels of a mask file, as `read_volume`, on the voxels of the image file that it belongs to.

    Raises:
      DataError: as `read_volume`, or a mask with other voxels, or voxels in another place, than its image.
    """
    mask, (shape, affine) = read_volume(path), volume_header(image)
    of_image = canonical_volume(np.broadcast_to(np.uint8(0), shape[:3]), affine)
    if mask.values.shape != of_image.values.shape:
        raise DataError(
            f"{path}: a mask of {_sizes(mask.values.shape)} voxels, its image {image.name} has "
            f"{_sizes(of_image.values.shape)}; give the mask on the voxels of its image"
        )
    corners = np.array([(i, j, k, 1) for i in (0, 1) for j in (0, 1) for k in (0, 1)]) * (*mask.values.shape, 1)
    apart = np.linalg.norm(corners @ (mask.affine - of_image.affine).T, axis=1).max()
    if apart > of_image.spacing.min() / 2:
        raise DataError(
            f"{path}: a mask whose header puts its voxels {apart:.3g} mm from those of its image {image.name}; give it "
            "the affine of its image"
        )
    return Volume(mask.values, of_image.affine)


def _sizes(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _scaled(voxels: Any) -> np.ndarray:
    """float32 [X, Y, Z, ...] with slope and intercept applied in double precision, a slice at a time."""
    raw = voxels.get_unscaled()
    values = np.empty(raw.shape, np.float32, order="F")
    for k in range(raw.shape[2]):
        values[:, :, k] = raw[:, :, k] * np.float64(voxels.slope) + np.float64(voxels.inter)
    return values


def _affine(image: Any) -> np.ndarray:
    """The affine of voxel indices to millimetres, float64 [4, 4]."""
    affine = np.array(image.affine, np.float64)
    affine[:3] *= _MILLIMETRES.get(_length_unit(image.header), 1.0)
    return affine


def _length_unit(header: Any) -> int | str:
    if "xyzt_units" in header:
        return int(header["xyzt_units"]) & _LENGTH_BITS
    return bytes(header["vox_units"]).strip(b" \0").decode("latin1").lower() if "vox_units" in header else ""


def _tell_ignored(path: Path, image: Any, ignored: IgnoredFields) -> None:
    header = image.header
    if _length_unit(header) not in _MILLIMETRES:
        ignored(path, "its unit of length,", _length_unit(header))
    if "xyzt_units" not in header:
        return
    if int(header["intent_code"]):
        ignored(path, "its intent, of code", int(header["intent_code"]))
    for name in ("cal_min", "cal_max"):
        if float(header[name]):
            ignored(path, name, f"{float(header[name]):g}")
    if int(header["sform_code"]) > 0:
        with contextlib.suppress(Exception):  # a qform may be any numbers
            qform = header.get_qform(coded=True)[0]
            smallest = float(np.linalg.norm(image.affine[:3, :3], axis=0).min())
            if qform is not None and not np.allclose(qform, image.affine, atol=0.1 * smallest):
                ignored(path, "its qform, which differs from its sform", "")


@contextlib.contextmanager
def _read(path: Path) -> Iterator[Any]:
    """An image with its header read; errors in the block refuse the file."""
    import nibabel

    try:
        with _silent():  # a NaN is refused later, by the file's name
            image: Any = nibabel.load(path)
            if not isinstance(image, (nibabel.AnalyzeImage, nibabel.MGHImage)):  # NIfTI is an extension of Analyze
                kind = type(image).__name__.removesuffix("Image").upper()
                raise DataError(
                    f"{path}: unreadable image (of the kind {kind}; {_READS} are read); convert it or remove it"
                )
            yield image
    except Exception as error:  # nibabel parses any content: a broken header raises nearly anything
        raise _refusal(path, error) from error


def _refusal(path: Path, error: Exception) -> DataError:
    named_nifti = path.name.endswith((".nii", ".nii.gz"))
    with contextlib.suppress(OSError):
        what = contents(path)
        if named_nifti and what == (_NIFTI if path.suffix == ".gz" else _PACKED):
            state, name = ("not ", ".nii") if path.suffix == ".gz" else ("", ".nii.gz")
            return DataError(f"{path}: a NIfTI file that is {state}compressed by gzip; rename it to end in {name}")
    # Analyze and MGH files have no signature.
    own = (_NIFTI, _PACKED, "a gzip file", *(("",) if path.suffix in (".hdr", ".img", ".mgh", ".mgz") else ()))
    return unreadable(path, error, "image", _READS, own)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Suppress warnings and nibabel's log lines about corrections of a header, up to a dozen a file."""
    from nibabel.imageglobals import logger

    before, logger.disabled = logger.disabled, True
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logger.disabled = before


def _require_room(path: Path, image: Any, held: int) -> None:
    """Compare the file's size with the header's claim, before anything is allocated or read as voxels."""
    offset, problem = int(image.dataobj.offset), ""
    if getattr(image.header, "is_single", False) and offset < image.header.single_vox_offset:
        problem = f"its voxels are said to start at byte {offset}, inside the header"
    elif offset + math.prod(map(int, image.shape)) * image.get_data_dtype().itemsize > held:
        problem = f"its header claims {'x'.join(map(str, image.shape))} voxels, more than the file can hold"
    if problem:
        raise DataError(f"{path}: unreadable image ({problem}); {_DAMAGED}")


def _unpacked_bytes(path: Path) -> int:
    """The size without compression. The file is read to its end, because nibabel stops before the checksum."""
    from nibabel.openers import ImageOpener

    if path.suffix.lower() not in ImageOpener.compress_ext_map:
        return path.stat().st_size
    with gzip.open(path) if path.suffix == ".gz" else ImageOpener(str(path)) as file:
        return sum(iter(lambda: len(file.read(1 << 20)), 0))


def _maps_to_space(affine: np.ndarray) -> bool:
    """Whether an affine [4, 4] has independent axes, and plausible steps and origin."""
    linear, offset = affine[:3, :3], affine[:3, 3]
    if not (np.abs(linear) <= _LARGEST_STEP).all() or not (np.abs(offset) <= _FARTHEST).all():  # NaN is not either
        return False
    steps = np.linalg.norm(linear, axis=0)
    return bool(steps.min() >= _SMALLEST_STEP and abs(np.linalg.det(linear / steps)) > 1e-6)


def canonical_volume(values: np.ndarray, affine: np.ndarray) -> Volume:
    """A volume whose axes are permuted and flipped so that they are closest to RAS+.

    Args:
      values: [I, J, K], any order of axes.
      affine: [4, 4], of the indices of `values` to millimetres, RAS+.
    """
    import nibabel

    image: Any = nibabel.as_closest_canonical(nibabel.Nifti1Image(values, affine))
    return Volume(np.asarray(image.dataobj), np.asarray(image.affine, np.float64))
