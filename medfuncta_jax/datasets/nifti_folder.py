"""A folder of NIfTI volumes of any shapes and spacings, resampled to one grid of cubic voxels.

Every volume is reoriented to RAS+, clipped to robust quantiles and scaled to [0, 1] by itself, and resampled about its
centre, anti-aliased; the affine of the new grid is kept, so that a reconstruction overlays its scan. The split is by
file, or by patient where a table of labels states patients; ids are the names relative to the data directory.
`volume_files.py` lists the header fields that are read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from medfuncta_jax.datasets.contents import IgnoredFields
from medfuncta_jax.datasets.dataset import (
    Example,
    Plan,
    PlannedSplit,
    required_folder,
    splits_by_name,
)
from medfuncta_jax.datasets.folder_files import FolderOptions, about_files, arranged, matching_files
from medfuncta_jax.datasets.masks import refuse_masks, require_labels
from medfuncta_jax.datasets.volume_examples import example_of_array, example_of_file, new_splits
from medfuncta_jax.datasets.volume_files import Volume, nan_value, read_mask, read_volume
from medfuncta_jax.datasets.volumes import nearest, quantile_range, resample_volume, scale_between
from medfuncta_jax.settings import SettingsError
from medfuncta_jax.units import units_between


@dataclass(frozen=True, kw_only=True)
class Options(FolderOptions):
    """Settings of the source, and those of `FolderOptions`.

    Attributes:
      grid: the three sizes to resample to.
      spacing: millimetres a voxel, the same for every volume, which is cropped or padded with 0 about its centre; 0
        gives each volume the smallest spacing that fits its whole field of view into the grid.
      quantile_low, quantile_high: quantiles of a volume's intensities that are scaled to 0 and 1.
      nan: replacement of NaN voxels, such as 0 for background outside the body; "" refuses a file with NaN.
    """

    pattern: str = "**/*.nii*"
    grid: tuple[int, ...] = (32, 32, 32)
    spacing: float = 0.0
    quantile_low: float = 0.001
    quantile_high: float = 0.999
    nan: str | float = ""

    def __post_init__(self):
        super().__post_init__()
        nan_value(self.nan)
        if len(self.grid) != 3 or not all(2 <= size <= 1024 for size in self.grid):
            raise SettingsError(f"grid must be three sizes of 2 to 1024, got {self.grid}")
        if not (self.spacing >= 0 and math.isfinite(self.spacing)):
            raise SettingsError(
                f"spacing must be millimetres, or 0 to fit each volume into the grid, got {self.spacing}"
            )
        if not 0 <= self.quantile_low < self.quantile_high <= 1:
            raise SettingsError("quantile_low must be below quantile_high, both in [0, 1]")


def plan(options: Options, *, data_dir: str | None, cache_root: Path) -> Plan:
    """The folder's volumes; voxels are read only when the plan is carried out.

    Raises:
      DataError: no folder, no files that match, masks among them, too few to split, or a table of labels that cannot
        be used.
    """
    folder = required_folder(data_dir, "the NIfTI volumes")
    files = matching_files(folder, options)
    refuse_masks(folder, files, lambda path: read_volume(path, nan=nan_value(options.nan)).values)
    arrangement = arranged(list(files), folder, options, by_folders=False)

    ignored = IgnoredFields()

    def example(name: str) -> Example:
        return replace(example_of_file(files[name], name, options, ignored, _example), label=arrangement.label(name))

    about = about_files("nifti_folder", folder, options, files) | arrangement.about
    splits = splits_by_name(arrangement.splits, example)
    return _plan(options, splits, about, **arrangement.of_plan)


def finer(options: Options, scale: int, *, data_dir: str | None, cache_root: Path) -> Options:
    """The options of a grid `scale` times finer over the same field of view."""
    return replace(options, grid=tuple(scale * side for side in options.grid), spacing=options.spacing / scale)


def mask_of(options: Options, path: Path, image: Path) -> np.ndarray:
    """The labels of a mask file on the grid of the signal that its image file becomes, float32 [*grid]."""
    volume = read_mask(path, image)
    require_labels(path, volume.values)
    return resample_volume(volume, options.grid, options.spacing or None, nearest).values


def new_files(folder: Path, options: Options) -> dict[str, Path]:
    """The files in a folder of new signals, by name."""
    return matching_files(folder, options)


def plan_new(
    options: Options, folder: Path, files: Mapping[str, Path], *, grid: tuple[int, ...], channels: int
) -> Plan:
    """New files, all in the split "new", as `plan` would make them."""
    return _plan(options, new_splits(files, options, _example), about_files("nifti_folder", folder, options, files))


def example_of(
    options: Options, values: np.ndarray, name: str, *, affine: np.ndarray | None, grid: tuple[int, ...], channels: int
) -> Example:
    """One volume [X, Y, Z] of any unit, whose affine [4, 4] (mm, RAS+) is that of 1 mm voxels where None."""
    return example_of_array(values, name, options, affine, _example)


def _plan(options: Options, splits: Mapping[str, PlannedSplit], about: dict[str, Any], **labels: Any) -> Plan:
    return Plan(
        name="nifti_folder", grid=options.grid, channels=1, dtype="float32", splits=splits, affines=True, about=about,
        **labels,
    )  # fmt: skip


def _example(volume: Volume, name: str, options: Options, place: str) -> Example:
    low, high = quantile_range(volume.values, options.quantile_low, options.quantile_high, place)
    unit = scale_between(volume.values, low, high, place)
    resampled = resample_volume(Volume(unit, volume.affine), options.grid, options.spacing or None)
    units = units_between(low, high, values=volume.values)
    return Example(np.clip(resampled.values, 0, 1)[..., None], name, affine=resampled.affine, units=units)
