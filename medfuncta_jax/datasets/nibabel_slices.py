"""Slices of the brain MRI that nibabel installs with itself: real data with no download.

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
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from medfuncta_jax.datasets.dataset import SPLITS, DataError, Example, Plan, PlannedSplit
from medfuncta_jax.datasets.prepared import file_md5
from medfuncta_jax.datasets.volume_files import Volume, read_series
from medfuncta_jax.datasets.volumes import resample, scale_to_unit
from medfuncta_jax.settings import SettingsError

_DIRECTIONS = ("sagittal", "coronal", "axial")

# A voxel above this part of the scan's range is tissue, and a slice with less tissue than this is dropped.
_TISSUE, _LEAST_TISSUE_MM2 = 0.1, 2000.0


@dataclass(frozen=True)
class Options:
    """Settings of the source.

    Attributes:
      size: pixels along both sides of a slice, 8 to 256.
      field_of_view: millimetres along both sides; smaller than the head (192) crops about the centre.
      val_fraction, test_fraction: of the positions along each direction, above 0, together at most 0.5.
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
        return f"example4d-v{self.scan}-{_DIRECTIONS[self.axis]}-{self.position:03d}"


def plan(options: Options, *, data_dir: str | None, cache_root: Path) -> Plan:
    """The slices; `data_dir` is not needed and not looked at.

    Raises:
      DataError: nibabel is installed without its test data.
    """
    path = Path(str(importlib.resources.files("nibabel"))) / "tests" / "data" / "example4d.nii.gz"
    if not path.is_file():
        raise DataError(f"{path}: no such file; nibabel's wheel on PyPI brings it, or take another data.source")
    scans = read_series(path)
    units = [scale_to_unit(scan.values, 0.001, 0.999, f"{path} scan {t}") for t, scan in enumerate(scans)]
    slices: dict[str, list[_Slice]] = {name: [] for name in SPLITS}
    for axis in range(3):
        areas = [_tissue_area(units[0], scans[0], axis, k) for k in range(units[0].shape[axis])]
        kept = [k for k, area in enumerate(areas) if area >= _LEAST_TISSUE_MM2]
        for name, positions in split_positions(kept, options.val_fraction, options.test_fraction).items():
            slices[name] += [_Slice(t, axis, k) for k in positions for t in range(len(scans))]

    def examples(name: str) -> Iterator[Example]:
        for one in slices[name]:
            others = [axis for axis in range(3) if axis != one.axis]
            steps = [options.field_of_view / options.size / scans[one.scan].spacing[axis] for axis in others]
            section = np.take(units[one.scan], one.position, axis=one.axis)
            signal = resample(section, (options.size, options.size), steps)
            # Displayed as an image, rows run from superior (or anterior, in axial slices) down.
            yield Example(np.clip(signal.T[::-1, :, None], 0, 1), one.id, label=one.axis)

    return Plan(
        name="nibabel_slices",
        grid=(options.size, options.size),
        channels=1,
        dtype="float32",
        classes=_DIRECTIONS,
        task="multi-class",
        splits={name: PlannedSplit(len(slices[name]), functools.partial(examples, name)) for name in SPLITS},
        about={
            "source": "nibabel_slices",
            "version": 1,
            "title": "slices of example4d.nii.gz, the brain MRI that nibabel installs",
            "licence": "MIT, as nibabel",
            "options": asdict(options),
            "md5": {path.name: file_md5(path)},
            "split_rule": "blocks of positions along each direction, one position left out on each side of a block",
            "dropped": f"slices with less than {_LEAST_TISSUE_MM2:g} mm2 above {_TISSUE} of the intensity range",
        },
    )


def _tissue_area(unit: np.ndarray, scan: Volume, axis: int, position: int) -> float:
    """Square millimetres of tissue in a slice of a scan scaled to [0, 1]."""
    pixel = float(np.prod(np.delete(scan.spacing, axis)))
    return float(np.count_nonzero(np.take(unit, position, axis=axis) > _TISSUE)) * pixel


def split_positions(kept: list[int], val_fraction: float, test_fraction: float) -> dict[str, list[int]]:
    """Ordered positions, cut into train, gap, val, gap, train, gap, test, gap, train.

    Args:
      kept: positions in order, at least 12.
      val_fraction, test_fraction: of `kept`; at least one position each.
    """
    blocks = {}
    left_out = set()
    for name, fraction, centre in (("val", val_fraction, 0.31), ("test", test_fraction, 0.66)):
        length = max(1, round(fraction * len(kept)))
        start = round(centre * len(kept) - length / 2)
        blocks[name] = kept[start : start + length]
        left_out |= set(kept[start - 1 : start + length + 1])
    return {"train": [k for k in kept if k not in left_out], **blocks}
