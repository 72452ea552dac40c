"""Chest CT from DICOM files: the series of a patient, its slices by their position in space, in Hounsfield units.

Neither file names nor instance numbers nor the stated slice thickness say where a slice lies; only its position does.
Needs the extra `dicom` (pydicom, and python-gdcm for compressed files), which is imported on first use.
"""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from medfuncta_jax.datasets.dataset import DataError
from medfuncta_jax.datasets.folder_files import files_below
from medfuncta_jax.datasets.volume_files import Volume, canonical_volume

# Hounsfield units. No tissue, and hardly any noise, is below the second; scanners mark with such values (-3024, -2000)
# what is outside their round field. They are made air at once, so that interpolation does not spread them.
AIR, _PADDING_BELOW = -1000.0, -1500.0

# Steps between slices may differ from their median by this part of it: positions are often rounded to 0.1 mm.
_STEP_TOLERANCE = 0.25

# Slices closer than this lie at the same place, and pixels have at least the other size, millimetres.
_SAME_POSITION, _SMALLEST_SPACING = 0.01, 1e-4

# The cosine from which on a slice's normal runs along the body: a gantry tilts by 30 degrees at most.
_AXIAL = 0.8

# Beyond these, numbers in a header are corrupt: rows or columns, millimetres from the origin, and of the rescaling.
_LARGEST_SIDE, _FARTHEST, _LARGEST_RESCALE = 1 << 13, 1e5, 1e5

_CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"

_TAGS = [
    "SOPClassUID", "Modality", "ImageType", "SeriesInstanceUID", "PatientID", "ImagePositionPatient", "NumberOfFrames",
    "ImageOrientationPatient", "PixelSpacing", "Rows", "Columns", "RescaleSlope", "RescaleIntercept",
]  # fmt: skip

_EXTRA = "pip install 'medfuncta_jax[dicom]'"


@dataclass(frozen=True)
class CtScan:
    """A patient's CT.

    Attributes:
      volume: Hounsfield units, RAS+, spacing as scanned; padding outside the scanner's field is air, -1000.
      series: the UID.
      files: every slice file of the series, those that repeat another one included.
      notes: a line for each thing that was left out or decided.
    """

    volume: Volume
    series: str
    files: tuple[Path, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Slice:
    """A header: where a CT slice lies (millimetres, LPS as in DICOM) and what its stored values mean."""

    path: Path
    series: str
    patient: str
    position: np.ndarray  # [3], the centre of the first pixel
    orientation: np.ndarray  # [6], unit vectors along a row and along a column
    spacing: np.ndarray  # [2], from row to row and from column to column
    shape: tuple[int, int]  # rows, columns
    rescale: tuple[float, float]  # slope, intercept

    @property
    def normal(self) -> np.ndarray:
        return np.cross(self.orientation[:3], self.orientation[3:])

    @property
    def axial(self) -> bool:
        return bool(abs(self.normal[2]) > _AXIAL)


@dataclass(frozen=True)
class _LeftOut:
    """A file that is no CT slice, and why; if it may be a damaged one, `slice_of` is how its series' UID starts."""

    path: Path
    reason: str
    slice_of: str | None = None


def read_ct(folder: Path) -> CtScan:
    """The largest axial CT series among all files below a patient's folder.

    Localisers, other modalities and objects that are no single slices are passed over and noted. Of series with equally
    many slices the one whose UID sorts first is taken.

    Raises:
      DataError: pydicom or a decoder is not installed, no axial CT series, several patients, slices missing, damaged,
        or not of one grid; the line names the file or the folder.
    """
    pydicom = _pydicom()
    slices: list[_Slice] = []
    left_out: list[_LeftOut] = []
    for path in files_below(folder):
        found = _header(path, pydicom)
        if isinstance(found, _Slice):
            slices.append(found)
        else:
            left_out.append(found)
    reasons = Counter(one.reason for one in left_out)
    first = {one.reason: one.path.name for one in reversed(left_out)}
    notes = [f"{count} files left out: {reason} (first: {first[reason]})" for reason, count in reasons.items()]
    if not any(one.axial for one in slices):
        raise DataError("; ".join([f"{folder}: no axial CT slices in it", *notes]))
    patients = sorted({one.patient for one in slices} - {""})
    if len(patients) > 1:
        raise DataError(
            f"{folder}: slices of {len(patients)} patients ({', '.join(patients[:3])}); each needs a folder of its own"
        )
    chosen, choice = _largest_series(slices)
    for one in left_out:
        # At an end of the series the gap that it leaves would not be seen.
        if one.slice_of is not None and chosen[0].series.startswith(one.slice_of):
            raise DataError(f"{one.path}: {one.reason}; copy the file anew, or remove it if it is no slice")
    ordered, repeats = _in_order(folder, chosen, pydicom)
    return CtScan(
        volume=_stacked(ordered, pydicom),
        series=chosen[0].series,
        files=tuple(one.path for one in chosen),
        notes=tuple(" ".join(note.split()) for note in (*notes, *choice, *repeats)),
    )


def _pydicom() -> ModuleType:
    try:
        import pydicom
        import pydicom.errors
        import pydicom.pixels
    except ImportError as error:
        raise DataError(f"reading DICOM needs pydicom, which is not installed: {_EXTRA}") from error
    return pydicom


def _header(path: Path, pydicom: ModuleType) -> _Slice | _LeftOut:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about malformed values of elements that do not matter here
            header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=_TAGS)
            kind = pydicom.uid.UID(str(header.get("SOPClassUID", "")))
            # pydicom takes a value that the end of the file cuts short as it is.
            cut_short = kind != _CT_IMAGE and _CT_IMAGE.startswith(kind)
            if cut_short or (kind == _CT_IMAGE and header.get("Modality") != "CT"):
                return _LeftOut(path, "unreadable DICOM (its class or modality is cut short or wrong)", "")
            if kind != _CT_IMAGE:
                return _LeftOut(path, f"no CT image but {kind.name}")
            if any(word in str(header.get("ImageType", "")).upper() for word in ("LOCALIZER", "SCOUT")):
                return _LeftOut(path, "localiser")
            if int(header.get("NumberOfFrames") or 1) > 1:
                return _LeftOut(path, "several frames in one file, which are not read")
            found = _slice(path, header)
            return _LeftOut(path, found, str(header.get("SeriesInstanceUID", ""))) if isinstance(found, str) else found
    except pydicom.errors.InvalidDicomError:
        return _LeftOut(path, "no DICOM file", "" if path.suffix.lower() == ".dcm" else None)
    except Exception as error:  # pydicom parses whatever the file holds
        return _LeftOut(path, f"unreadable DICOM ({_one_line(error)})", "")


def _slice(path: Path, header: Any) -> _Slice | str:
    """A slice, or what is wrong with it."""
    if not (header.get("Rows") and header.get("Columns")):
        return "no image in it"
    if max(int(header.Rows), int(header.Columns)) > _LARGEST_SIDE:
        return f"it claims {header.Rows} x {header.Columns} pixels"
    wanted = {"ImagePositionPatient": 3, "ImageOrientationPatient": 6, "PixelSpacing": 2}
    numbers = {}
    for name, count in wanted.items():
        value = header.get(name)
        numbers[name] = np.array([] if value is None else value, np.float64).reshape(-1)
        if numbers[name].shape != (count,) or not (np.abs(numbers[name]) <= _FARTHEST).all():  # NaN is not either
            return f"its {name} is missing or wrong"
    orientation, spacing = numbers["ImageOrientationPatient"], numbers["PixelSpacing"]
    axes = orientation.reshape(2, 3)
    if not np.allclose(axes @ axes.T, np.eye(2), atol=0.01):
        return "its ImageOrientationPatient is no pair of perpendicular directions"
    if spacing.min() < _SMALLEST_SPACING:
        return "its PixelSpacing is not above 0"
    rescale = (header.get("RescaleSlope"), header.get("RescaleIntercept"))
    if None in rescale:
        return "no RescaleSlope or RescaleIntercept, so its values are no Hounsfield units"
    if not (np.abs(np.array(rescale, np.float64)) <= _LARGEST_RESCALE).all() or float(rescale[0]) == 0:
        return "its RescaleSlope or RescaleIntercept is wrong"
    return _Slice(
        path=path,
        series=str(header.get("SeriesInstanceUID", "")),
        patient=str(header.get("PatientID", "")),
        position=numbers["ImagePositionPatient"],
        orientation=orientation,
        spacing=spacing,
        shape=(int(header.Rows), int(header.Columns)),
        rescale=(float(rescale[0]), float(rescale[1])),
    )


def _largest_series(slices: Sequence[_Slice]) -> tuple[list[_Slice], list[str]]:
    """The series with most places along the body, and notes on the others."""
    series = defaultdict(list)
    for one in slices:
        series[one.series].append(one)
    places = {
        uid: len({round(float(one.position @ one.normal) / _SAME_POSITION) for one in members if one.axial})
        for uid, members in series.items()
    }
    first, *others = sorted(places, key=lambda uid: (-places[uid], uid))
    notes = []
    for uid in others:
        if places[uid] == 0:
            notes.append(f"series {uid} left out: not axial")
        elif places[uid] == places[first]:
            notes.append(f"series {uid} left out: {places[uid]} slices as in {first}, whose UID sorts before it")
        else:
            notes.append(f"series {uid} left out: {places[uid]} axial slices, {first} has {places[first]}")
    return series[first], notes


def _in_order(folder: Path, slices: list[_Slice], pydicom: ModuleType) -> tuple[list[_Slice], list[str]]:
    """The slices of a series by position, each place once, and notes on repeated ones.

    Raises:
      DataError: slices of different grids, missing ones, or different ones at the same place.
    """
    orientation = np.median([one.orientation for one in slices], axis=0)
    usual_shape = Counter(one.shape for one in slices).most_common(1)[0][0]
    spacing = np.median([one.spacing for one in slices], axis=0)
    for one in slices:
        if not np.allclose(one.orientation, orientation, atol=1e-3):
            raise DataError(f"{one.path}: its orientation is not that of the other slices of its series {one.series}")
        if one.shape != usual_shape or not np.allclose(one.spacing, spacing, rtol=1e-3):
            raise DataError(f"{one.path}: its pixel grid is not that of the other slices of its series {one.series}")
    normal = np.cross(orientation[:3], orientation[3:])
    by_position = sorted(slices, key=lambda one: (float(one.position @ normal), one.path))
    ordered, repeats = [by_position[0]], 0
    for one in by_position[1:]:
        before = ordered[-1]
        if np.linalg.norm(one.position - before.position) > _SAME_POSITION:
            ordered.append(one)
        elif np.array_equal(_hounsfield(one, pydicom), _hounsfield(before, pydicom)):
            repeats += 1
        else:
            raise DataError(f"{one.path}: lies where {before.path.name} lies and differs from it; remove one of them")
    _require_even_steps(folder, ordered, normal)
    return ordered, [f"{repeats} slices repeat others, pixel by pixel, and were left out"] if repeats else []


def _require_even_steps(folder: Path, ordered: Sequence[_Slice], normal: np.ndarray) -> None:
    uid = ordered[0].series
    if len(ordered) < 2:
        raise DataError(f"{folder}: only one axial slice in its largest series {uid}; a volume is needed")
    places = np.array([one.position for one in ordered])
    heights = places @ normal
    steps = np.diff(heights)
    usual = float(np.median(steps))
    uneven = np.flatnonzero(np.abs(steps - usual) > _STEP_TOLERANCE * usual)
    if len(uneven):
        where = ", ".join(f"{heights[k]:.2f} and {heights[k + 1]:.2f}" for k in uneven[:3])
        more = f" and at {len(uneven) - 3} more places" if len(uneven) > 3 else ""
        kind = "slices are missing" if steps[uneven].max() > usual else "slices are too close"
        raise DataError(
            f"{folder}: {kind} between the positions {where} mm{more}, elsewhere they are {usual:.2f} mm apart (series "
            f"{uid}); copy the series anew"
        )
    line = places[0] + np.linspace(0, 1, len(places))[:, None] * (places[-1] - places[0])
    aside = np.linalg.norm(places - line, axis=1)
    if aside.max() > 0.5 * max(usual, float(ordered[0].spacing.max())):
        raise DataError(f"{ordered[int(aside.argmax())].path}: not in line with the other slices of its series {uid}")


def _stacked(ordered: Sequence[_Slice], pydicom: ModuleType) -> Volume:
    first, last = ordered[0], ordered[-1]
    stack = np.empty((len(ordered), *first.shape), np.float32)
    for k, one in enumerate(ordered):
        stack[k] = _hounsfield(one, pydicom)
    stack[stack < _PADDING_BELOW] = AIR
    # Along a row the column changes, by the spacing between columns, which DICOM states second.
    affine = np.eye(4)
    affine[:3, 0] = first.orientation[:3] * first.spacing[1]
    affine[:3, 1] = first.orientation[3:] * first.spacing[0]
    affine[:3, 2] = (last.position - first.position) / (len(ordered) - 1)
    affine[:3, 3] = first.position
    to_ras = np.diag([-1.0, -1.0, 1.0, 1.0])
    return canonical_volume(stack.transpose(2, 1, 0), to_ras @ affine)


def _hounsfield(one: _Slice, pydicom: ModuleType) -> np.ndarray:
    """float32 [rows, columns] with the slice's own slope and intercept applied.

    Raises:
      DataError: no pixels, truncated or damaged ones, or no decoder for them.
    """
    slope, intercept = one.rescale
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            file = pydicom.dcmread(one.path)
            if "PixelData" not in file:
                raise ValueError("no pixel data in it")
            _require_decoder(file, pydicom)
            pixels = np.asarray(file.pixel_array)
        if pixels.shape != one.shape:
            raise ValueError(f"pixels {pixels.shape}, its header says {one.shape}")
    except DataError as error:
        raise DataError(f"{one.path}: {error}") from error
    except Exception as error:  # as in `_header`; decoders raise what they like
        raise DataError(f"{one.path}: unreadable slice ({_one_line(error)}); copy the file anew") from error
    return pixels.astype(np.float32) * np.float32(slope) + np.float32(intercept)


def _require_decoder(file: Any, pydicom: ModuleType) -> None:
    syntax = file.file_meta.TransferSyntaxUID
    if syntax.is_compressed and syntax.is_encapsulated and not pydicom.pixels.get_decoder(syntax).is_available:
        raise DataError(f"compressed as {syntax.name}, for which no decoder is installed: {_EXTRA}")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
