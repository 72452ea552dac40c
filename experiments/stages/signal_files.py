"""Signals as files, in the units of the original files: NIfTI, PNG or TIFF, CSV."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from medfuncta_jax.atomic import atomic_path
from medfuncta_jax.coordinates import grid, resampled_affine
from medfuncta_jax.nifti import write_volume
from medfuncta_jax.units import Units

# Maximum characters of an id in a file's name; file systems allow 255 bytes, and the row and the suffix take some.
_LONGEST_NAME = 120
# The units of the field's values, without a file.
UNIT = Units()


def file_name(row: int, *, count: int, name: str, suffix: str) -> str:
    """A name that every file system accepts: the row, which makes it unique and keeps the order, and the id without its
    folders and suffixes.

    Args:
      row: row in the split.
      count: signals in the split, which fixes the digits of the row.
      name: the id.
      suffix: from `suffix_of`.
    """
    bare = re.sub(r"\.(nii|nii\.gz|png|jpe?g|tiff?|csv|tsv|txt)$", "", name.rpartition("/")[2], flags=re.IGNORECASE)
    safe = re.sub(r"[^A-Za-z0-9._-]+", "_", bare)[:_LONGEST_NAME].strip("._")
    return f"{row:0{len(str(count - 1))}d}-{safe}".rstrip("-") + suffix


def suffix_of(axes: int, channels: int, units: Units) -> str:
    """The suffix of a signal's file, by the axes of its grid; images that fit a PNG (8 bits, grey of 16) are PNG."""
    if axes != 2:
        return {1: ".csv", 3: ".nii.gz"}[axes]
    if units.dtype in ("", "uint8"):
        return ".png"
    whole = np.dtype(units.dtype).kind in "iu" and channels == 1
    ends = (units.values(np.array([[0.0], [1.0]])) - units.intercept) / units.slope
    return ".png" if whole and ends.min() >= 0 and ends.max() <= np.iinfo(np.uint16).max else ".tif"


def write_signal(
    path: Path, signal: np.ndarray, units: Units, *, trained: Sequence[int], affine: np.ndarray | None = None
) -> None:
    """Write one signal [*shape, D] in [0, 1], whole or not at all.

    Volumes have the affine of their grid, channels in a fourth axis, and the type, slope and intercept of their file,
    or float32 if none is known. Images have the stored samples if a PNG can hold them, else float32 values, and are
    8-bit pictures of [0, 1] if no type is known. Series have a column of times, or else of positions in samples of the
    training grid, and one named column per channel.

    Args:
      path: the file, with the suffix from `suffix_of`.
      signal: clipped to [0, 1].
      units: the signal's original units; `UNIT` writes [0, 1].
      trained: points along each axis of the training grid.
      affine: [4, 4] of the training grid, or None.
    """
    *shape, channels = signal.shape
    if len(shape) == 3:
        stored = units.stored(signal)
        write_volume(
            path, stored[..., 0] if channels == 1 else stored,
            resampled_affine(np.eye(4) if affine is None else affine, trained, shape),
            dtype=stored.dtype.name, slope=units.slope, intercept=units.intercept,
        )  # fmt: skip
    elif len(shape) == 2:
        pixels = _pixels(signal, units, path.suffix)
        with atomic_path(path) as partial:
            Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(partial)
    else:
        _write_series(path, signal, units, trained)


def _pixels(signal: np.ndarray, units: Units, suffix: str) -> np.ndarray:
    if suffix == ".tif":  # Pillow's signed and wide integers are not accepted by all readers
        return units.values(signal).astype(np.float32)
    if not units.dtype:
        return np.rint(signal * 255).astype(np.uint8)
    return units.stored(signal).astype(np.uint8 if units.dtype == "uint8" else np.uint16)


def _write_series(path: Path, signal: np.ndarray, units: Units, trained: Sequence[int]) -> None:
    length, channels = signal.shape
    axis, names = "position", ["value"] if channels == 1 else [f"value_{c}" for c in range(channels)]
    where = (grid((length,))[:, 0].astype(np.float64) + 1) / 2 * (trained[0] - 1)
    if units.time:
        axis, where = "time", units.time[0] + units.time[1] * where
    if units.columns:
        names = list(units.columns[-channels:])
        axis = units.columns[0] if len(units.columns) > channels else axis
    with atomic_path(path) as partial, open(partial, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([axis, *names])
        for x, values in zip(where, units.values(signal), strict=True):
            writer.writerow([f"{x:.10g}", *(f"{value:.9g}" for value in values)])


def units_said(units: Sequence[Units]) -> str:
    """Notes on the values of several signals, in a few words."""
    kinds = sorted({one.unit or "stored values" for one in units})
    shared = sorted({one.shared for one in units} - {""})
    words = [f"in {' and '.join(kinds)}"]
    words += [f"one scale for all {kind}" for kind in shared]
    clipped = [one.clipped for one in units if one.clipped]
    if clipped:
        most = 100 * max(clipped)
        words.append(f"values of {len(clipped)} of {len(units)} signals clipped, at most {most:.3g} %")
    if lacking := sum(bool(one.missing) for one in units):
        words.append(f"nan in channels that were not recorded, of {lacking} of {len(units)} signals")
    return "; ".join(words)


def write_list(path: Path, names: Sequence[str], ids: Sequence[str], psnr: np.ndarray, units: Sequence[Units]) -> None:
    """A table of files: id, PSNR, and the scale from [0, 1] with notes."""
    with atomic_path(path) as partial, partial.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["file", "id", "psnr", "offset", "scale", "unit", "dtype", "notes"])
        for name, one, quality, of in zip(names, ids, psnr, units, strict=True):
            scale = [" ".join(f"{value:.9g}" for value in values) for values in (of.offset, of.scale)]
            writer.writerow([name, one, f"{quality:.6g}", *scale, of.unit, of.dtype, of.notes])
