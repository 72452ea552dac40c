"""Slices of the brain MRI that is installed with nibabel: real data without a download.

`example4d.nii.gz` holds two scans (time points) of one head, 128 x 96 x 24 voxels of 2 x 2 x 2.2 mm: a slab 53 mm high,
so axial slices show the whole section, sagittal and coronal ones a band of it. Every slice is put on one square field
of view, the same in millimetres for the three directions.

Both scans are nearly equal and neighbouring slices alike, so slices are split by position: along each direction one
block of positions is for validation (about a third of the way through the head), one for testing (about two thirds),
and one position on each side of a block belongs to no split.
"""

from __future__ import annotations

import functools
import importlib.resources
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from medfuncta_jax.datasets.dataset import NEW, SPLITS, DataError, Example, Plan, PlannedSplit, Skipped
from medfuncta_jax.datasets.folder_files import about_files, files_below, name_below
from medfuncta_jax.datasets.prepared import file_md5
from medfuncta_jax.datasets.volume_files import Volume, read_series, sample_type
from medfuncta_jax.datasets.volumes import quantile_range, resample, scale_between
from medfuncta_jax.settings import SettingsError
from medfuncta_jax.units import Units, units_between

_DIRECTIONS = ("sagittal", "coronal", "axial")

# Voxels above the first number, a part of the scan's range, are tissue; slices with less tissue than the second are
# dropped.
_TISSUE, _LEAST_TISSUE_MM2 = 0.1, 2000.0


@dataclass(frozen=True)
class Options:
    """Settings of the source.

    Attributes:
      size: pixels along both sides of a slice, 8 to 256.
      field_of_view: millimetres along both sides; smaller than the head (192) crops about the centre.
      val_fraction, test_fraction: fractions of the positions along each direction, above 0, together at most 0.5.
    """

    size: int = 32
    field_of_view: float = 192.0
    val_fraction: float = 0.1
    test_fraction: float = 0.1

    def __post_init__(self):
        if not 8 <= self.size <= 256:
            raise SettingsError(f"size must be 8 to 256, got {self.size}")
        if not 16 <= self.field_of_view <= 512:
            raise SettingsError(f"field_of_view must be 16 to 512 mm, got {self.field_of_view}")
        if min(self.val_fraction, self.test_fraction) <= 0 or self.val_fraction + self.test_fraction > 0.5:
            raise SettingsError("val_fraction and test_fraction must be above 0 and together at most 0.5")


@dataclass(frozen=True)
class _Slice:
    scan: int
    axis: int
    position: int

    @property
    def id(self) -> str:
        return f"v{self.scan}-{_DIRECTIONS[self.axis]}-{self.position:03d}"


class _Scans:
    """The scans of a file, each scaled to [0, 1] by itself."""

    def __init__(self, path: Path):
        self.volumes = read_series(path)
        dtype, slope, intercept = sample_type(path)
        self.unit: list[np.ndarray] = []
        self.units: list[Units] = []
        for t, scan in enumerate(self.volumes):
            low, high = quantile_range(scan.values, 0.001, 0.999, f"{path} scan {t}")
            self.unit.append(scale_between(scan.values, low, high, f"{path} scan {t}"))
            units = units_between(low, high, values=scan.values)
            self.units.append(replace(units, dtype=dtype, slope=slope, intercept=intercept))

    def positions(self, axis: int) -> list[int]:
        """Positions of the slices with enough tissue."""
        unit, scan = self.unit[0], self.volumes[0]
        return [k for k in range(unit.shape[axis]) if _tissue_area(unit, scan, axis, k) >= _LEAST_TISSUE_MM2]

    def example(self, one: _Slice, options: Options, name: str) -> Example:
        others = [axis for axis in range(3) if axis != one.axis]
        steps = [options.field_of_view / options.size / self.volumes[one.scan].spacing[axis] for axis in others]
        section = np.take(self.unit[one.scan], one.position, axis=one.axis)
        signal = resample(section, (options.size, options.size), steps)
        # Rows of the displayed image run from superior (or anterior, in axial slices) down.
        picture = np.clip(signal.T[::-1, :, None], 0, 1)
        return Example(picture, f"{name}-{one.id}", label=one.axis, units=self.units[one.scan])


def plan(options: Options, *, data_dir: str | None, cache_root: Path) -> Plan:
    """The slices; `data_dir` is ignored.

    Raises:
      DataError: nibabel is installed without its test data.
    """
    path = Path(str(importlib.resources.files("nibabel"))) / "tests" / "data" / "example4d.nii.gz"
    if not path.is_file():
        raise DataError(f"{path}: no such file; nibabel's wheel on PyPI brings it, or take another data.source")
    scans = _Scans(path)
    slices: dict[str, list[_Slice]] = {name: [] for name in SPLITS}
    for axis in range(3):
        kept = split_positions(scans.positions(axis), options.val_fraction, options.test_fraction)
        for name, positions in kept.items():
            slices[name] += [_Slice(t, axis, k) for k in positions for t in range(len(scans.volumes))]

    def examples(name: str) -> Iterator[Example]:
        for one in slices[name]:
            yield scans.example(one, options, "example4d")

    splits = {name: PlannedSplit(len(slices[name]), functools.partial(examples, name)) for name in SPLITS}
    return _plan(options, splits, {
        "source": "nibabel_slices",
        "version": 1,
        "title": "slices of example4d.nii.gz, the brain MRI that nibabel installs",
        "licence": "MIT, as nibabel",
        "options": asdict(options),
        "md5": {path.name: file_md5(path)},
        "split_rule": "blocks of positions along each direction, one position left out on each side of a block",
        "dropped": f"slices with less than {_LEAST_TISSUE_MM2:g} mm2 above {_TISSUE} of the intensity range",
    })  # fmt: skip


def finer(options: Options, scale: int, *, data_dir: str | None, cache_root: Path) -> Options:
    """The options of a grid `scale` times finer over the same field of view."""
    return replace(options, size=scale * options.size)


def new_files(folder: Path, options: Options) -> dict[str, Path]:
    """The NIfTI files of a folder, each a scan or several of a head, by name."""
    return {name_below(folder, path): path for path in files_below(folder) if path.name.endswith((".nii", ".nii.gz"))}


def plan_new(
    options: Options, folder: Path, files: Mapping[str, Path], *, grid: tuple[int, ...], channels: int
) -> Plan:
    """All slices with tissue of new scans, in the split "new", as `plan` would make them."""
    found: dict[str, list[_Slice]] = {}
    refused: dict[str, str] = {}
    for name, path in files.items():
        try:
            scans = _Scans(path)
        except DataError as error:
            refused[name] = str(error)
            continue
        places = [(axis, k) for axis in range(3) for k in scans.positions(axis)]
        found[name] = [_Slice(t, axis, k) for axis, k in places for t in range(len(scans.volumes))]

    def examples() -> Iterator[Example | Skipped]:
        yield from (Skipped(name, reason) for name, reason in refused.items())
        for name, slices in found.items():
            scans = _Scans(files[name])
            for one in slices:
                yield scans.example(one, options, name)

    count = len(refused) + sum(map(len, found.values()))
    return _plan(options, {NEW: PlannedSplit(count, examples)}, about_files("nibabel_slices", folder, options, files))


def _plan(options: Options, splits: Mapping[str, PlannedSplit], about: dict[str, Any]) -> Plan:
    return Plan(
        name="nibabel_slices", grid=(options.size, options.size), channels=1, dtype="float32", classes=_DIRECTIONS,
        task="multi-class", splits=splits, about=about,
    )  # fmt: skip


def _tissue_area(unit: np.ndarray, scan: Volume, axis: int, position: int) -> float:
    """Square millimetres of tissue in a slice of a scan scaled to [0, 1]."""
    pixel = float(np.prod(np.delete(scan.spacing, axis)))
    return float(np.count_nonzero(np.take(unit, position, axis=axis) > _TISSUE)) * pixel


def split_positions(kept: list[int], val_fraction: float, test_fraction: float) -> dict[str, list[int]]:
    """Ordered positions, cut into train, gap, val, gap, train, gap, test, gap, train.

    Args:
      kept: positions in order, at least 12.
      val_fraction, test_fraction: fractions of `kept`; at least one position each.
    """
    blocks = {}
    left_out = set()
    for name, fraction, centre in (("val", val_fraction, 0.31), ("test", test_fraction, 0.66)):
        length = max(1, round(fraction * len(kept)))
        start = round(centre * len(kept) - length / 2)
        blocks[name] = kept[start : start + length]
        left_out |= set(kept[start - 1 : start + length + 1])
    return {"train": [k for k in kept if k not in left_out], **blocks}
