"""CT and MR from DICOM files: a series of a patient, its slices by their position in space.

The place of a slice is its position alone, not its file name, instance number or slice thickness. `dicom_file.py` lists
the fields that are read and those that are ignored.
Needs the extra `dicom` (pydicom, and python-gdcm for compressed files), which is imported on first use.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medfuncta_jax.datasets.contents import contents
from medfuncta_jax.datasets.dataset import DataError
from medfuncta_jax.datasets.dicom_file import CT, Kind, LeftOut, Slice, pixel_values, pydicom_module, read_header
from medfuncta_jax.datasets.folder_files import files_below
from medfuncta_jax.datasets.volume_files import Volume, canonical_volume

# Largest deviation of a step between slices, as a part of the median step: positions are often rounded to 0.1 mm.
_STEP_TOLERANCE = 0.25

# Slices closer than this many millimetres lie at the same place.
_SAME_POSITION = 0.01

# Contents of files that replace a slice after a failed copy.
_REPLACEMENTS = ("an empty file", "a file of zeros", "an HTML page", "a Git LFS pointer", "a git-annex pointer")


@dataclass(frozen=True)
class Scan:
    """A patient's CT or MR.

    Attributes:
      volume: RAS+, spacing as scanned. CT is in Hounsfield units, with air, -1000, as padding outside the scanner's
        field; MR is as scaled by the scanner, with padding 0.
      series: the UID.
      files: every slice file of the series, also repeated ones.
      notes: a line for each omission and each decision.
    """

    volume: Volume
    series: str
    files: tuple[Path, ...]
    notes: tuple[str, ...]


def read_ct(folder: Path) -> Scan:
    """`read_scan` of an axial CT."""
    return read_scan(folder, CT)


def read_scan(folder: Path, kind: Kind, series: str = "") -> Scan:
    """The largest series of a kind among all files below a patient's folder; for CT, the largest axial one.

    Localisers, other modalities and objects other than single slices are skipped and noted. Among series with equally
    many slices, the first UID in sorted order is taken.

    Args:
      folder: the patient's folder.
      kind: `CT` or `MR`.
      series: text that the description of the series must contain, in any case.
    Raises:
      DataError: pydicom or a decoder is not installed, no such series, several patients, slices missing, damaged, or
        not of one grid; the line names the file or the folder.
    """
    pydicom_module()  # raises before any file is read
    slices: list[Slice] = []
    left_out: list[LeftOut] = []
    for path in files_below(folder):
        found = read_header(path, kind)
        if isinstance(found, Slice):
            slices.append(found)
        else:
            left_out.append(found)
    reasons = Counter(one.reason for one in left_out)
    first = {one.reason: one.path.name for one in reversed(left_out)}
    notes = [f"{count} files left out: {reason} (first: {first[reason]})" for reason, count in reasons.items()]
    if not any(one.usable for one in slices):
        raise DataError("; ".join([f"{folder}: no {'axial ' * kind.axial}{kind.name} slices in it", *notes]))
    described = sorted({one.description for one in slices})
    slices = [one for one in slices if series.casefold() in one.description.casefold()]
    if not any(one.usable for one in slices):
        raise DataError(f"{folder}: no series described as {series!r}; there are {', '.join(described)}")
    patients = sorted({one.patient for one in slices} - {""})
    if len(patients) > 1:
        raise DataError(
            f"{folder}: slices of {len(patients)} patients ({', '.join(patients[:3])}); each needs a folder of its own"
        )
    chosen, choice = _largest_series(slices)
    for one in left_out:
        # A missing slice at an end of the series leaves no visible gap.
        what = contents(one.path) if one.reason == "no DICOM file" else ""
        replaced = what in _REPLACEMENTS and one.path.suffix == chosen[0].path.suffix
        if replaced or (one.slice_of is not None and chosen[0].series.startswith(one.slice_of)):
            it = f" (it is {what})" if what else ""
            raise DataError(f"{one.path}: {one.reason}; copy the file anew, or remove it if it is no slice{it}")
    ordered, repeats = _in_order(folder, chosen)
    return Scan(
        volume=_stacked(ordered),
        series=chosen[0].series,
        files=tuple(one.path for one in chosen),
        notes=tuple(" ".join(note.split()) for note in (*notes, *choice, *repeats, *_ignored(chosen))),
    )


def _ignored(slices: Sequence[Slice]) -> list[str]:
    first = {name: one.path.name for one in reversed(slices) for name in one.ignored}
    return [f"{name} is ignored (first: {file})" for name, file in sorted(first.items())]


def _largest_series(slices: Sequence[Slice]) -> tuple[list[Slice], list[str]]:
    """The series, or stack of a series, with the most places along its normal, and notes on the others."""
    series = defaultdict(list)
    for one in slices:
        series[_named(one)].append(one)
    places = {
        uid: len({round(float(one.position @ one.normal) / _SAME_POSITION) for one in members if one.usable})
        for uid, members in series.items()
    }
    first, *others = sorted(places, key=lambda uid: (-places[uid], uid))
    notes = []
    axial = "axial " * slices[0].kind.axial
    for uid in others:
        if places[uid] == 0:
            notes.append(f"series {uid} left out: not axial")
        elif places[uid] == places[first]:
            notes.append(f"series {uid} left out: {places[uid]} slices as in {first}, whose UID sorts before it")
        else:
            notes.append(f"series {uid} left out: {places[uid]} {axial}slices, {first} has {places[first]}")
    return series[first], notes


def _named(one: Slice) -> str:
    about = ", ".join(part for part in (one.description if one.kind is not CT else "", one.stack) if part)
    return f"{one.series} ({about})" if about else one.series


def _in_order(folder: Path, slices: list[Slice]) -> tuple[list[Slice], list[str]]:
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
        elif np.array_equal(pixel_values(one), pixel_values(before)):
            repeats += 1
        else:
            raise DataError(f"{one.path}: lies where {before.path.name} lies and differs from it; remove one of them")
    _require_even_steps(folder, ordered, normal)
    return ordered, [f"{repeats} slices repeat others, pixel by pixel, and were left out"] if repeats else []


def _require_even_steps(folder: Path, ordered: Sequence[Slice], normal: np.ndarray) -> None:
    uid = ordered[0].series
    if len(ordered) < 2:
        raise DataError(
            f"{folder}: only one {'axial ' * ordered[0].kind.axial}slice in its largest series {uid}; a volume is "
            "needed"
        )
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


def _stacked(ordered: Sequence[Slice]) -> Volume:
    first, last = ordered[0], ordered[-1]
    stack = np.empty((len(ordered), *first.shape), np.float32)
    for k, one in enumerate(ordered):
        stack[k] = pixel_values(one)
    # The column changes along a row, by the spacing between columns, which DICOM states second.
    affine = np.eye(4)
    affine[:3, 0] = first.orientation[:3] * first.spacing[1]
    affine[:3, 1] = first.orientation[3:] * first.spacing[0]
    affine[:3, 2] = (last.position - first.position) / (len(ordered) - 1)
    affine[:3, 3] = first.position
    to_ras = np.diag([-1.0, -1.0, 1.0, 1.0])
    return canonical_volume(stack.transpose(2, 1, 0), to_ras @ affine)
