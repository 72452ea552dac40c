"""A folder of NIfTI volumes of any shapes and spacings, resampled to one grid of cubic voxels.

Every volume is reoriented to RAS+, clipped to robust quantiles and scaled to [0, 1] by itself, and resampled about its
centre, anti-aliased; the affine of the new grid is kept, so that a reconstruction overlays the scan it comes from.
One file is taken to be one patient: the split is by file, and ids are the names relative to the data directory.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from medfuncta_jax.datasets.dataset import SPLITS, DataError, Example, Plan, PlannedSplit, required_folder
from medfuncta_jax.datasets.volumes import Volume, read_volume, resample_volume, scale_to_unit, volume_shape
from medfuncta_jax.settings import SettingsError


@dataclass(frozen=True)
class Options:
    """Settings of the source.

    Attributes:
      pattern: which files, a glob relative to the data directory; "**" is any folders.
      grid: the three sizes to resample to.
      spacing: millimetres a voxel, the same for every volume, which is cropped or padded with 0 about its centre; 0
        gives each volume the smallest spacing that fits its whole field of view into the grid.
      quantile_low, quantile_high: of a volume's intensities, scaled to 0 and 1.
      seed: of the split.
      val_fraction, test_fraction: of the files, above 0; at least one file each.
    """

    pattern: str = "**/*.nii*"
    grid: tuple[int, ...] = (32, 32, 32)
    spacing: float = 0.0
    quantile_low: float = 0.001
    quantile_high: float = 0.999
    seed: int = 42
    val_fraction: float = 0.1
    test_fraction: float = 0.2

    def __post_init__(self):
        if len(self.grid) != 3 or not all(2 <= size <= 1024 for size in self.grid):
            raise SettingsError(f"grid must be three sizes of 2 to 1024, got {self.grid}")
        if not (self.spacing >= 0 and math.isfinite(self.spacing)):
            raise SettingsError(
                f"spacing must be millimetres, or 0 to fit each volume into the grid, got {self.spacing}"
            )
        if not 0 <= self.quantile_low < self.quantile_high <= 1:
            raise SettingsError("quantile_low must be below quantile_high, both in [0, 1]")
        if self.seed < 0:
            raise SettingsError(f"seed must not be negative, got {self.seed}")
        if min(self.val_fraction, self.test_fraction) <= 0 or self.val_fraction + self.test_fraction >= 1:
            raise SettingsError("val_fraction and test_fraction must be above 0 and together below 1")
        if not self.pattern or Path(self.pattern).is_absolute() or ".." in Path(self.pattern).parts:
            raise SettingsError(f"pattern must be a glob inside the data directory, got {self.pattern!r}")


def plan(options: Options, *, data_dir: str | None, cache_root: Path) -> Plan:
    """The folder's volumes; voxels are read only when the plan is carried out.

    Raises:
      DataError: no folder, no files that match, or too few to split.
    """
    folder = required_folder(data_dir, "the NIfTI volumes")
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.glob(options.pattern)) if _scan(path)}
    if len(files) < len(SPLITS):
        raise DataError(
            f"{folder}: {len(files)} files match {options.pattern!r}, at least 3 are needed to train, validate and "
            "test; check --data_dir and --config.data.pattern"
        )
    names = split_names(list(files), options)

    def examples(split: str) -> Iterator[Example]:
        if split == SPLITS[0]:
            _require_scalar_volumes(list(files.values()))
        for name in names[split]:
            yield _example(name, files[name], options)

    states = {name: path.stat() for name, path in files.items()}
    return Plan(
        name="nifti_folder",
        grid=options.grid,
        channels=1,
        dtype="float32",
        splits={split: PlannedSplit(len(names[split]), functools.partial(examples, split)) for split in SPLITS},
        affines=True,
        about={
            "source": "nifti_folder",
            "version": 1,
            "title": folder.name,
            "licence": "not known",
            "options": asdict(options),
            "folder": str(folder.resolve()),
            "files": {name: [state.st_size, state.st_mtime_ns] for name, state in states.items()},
            "split_rule": f"by file, a permutation with seed {options.seed}",
            "split": names,
        },
    )


def split_names(names: list[str], options: Options) -> dict[str, list[str]]:
    """Sorted names split at random; each list is sorted again, and holds one name at least."""
    order = np.random.Generator(np.random.PCG64(options.seed)).permutation(len(names))
    shuffled = [names[i] for i in order]
    n_val, n_test = (max(1, round(part * len(names))) for part in (options.val_fraction, options.test_fraction))
    return {
        "train": sorted(shuffled[n_val + n_test :]),
        "val": sorted(shuffled[:n_val]),
        "test": sorted(shuffled[n_val : n_val + n_test]),
    }


def _scan(path: Path) -> bool:
    # Copies from some systems come with "._name.nii.gz" files that are no images.
    return path.is_file() and not path.name.startswith(".")


def _require_scalar_volumes(paths: list[Path]) -> None:
    """Headers first: a wrong file should not show after an hour of preparing."""
    flat: list[tuple[Path, tuple[int, ...]]] = []
    deep: list[tuple[Path, tuple[int, ...]]] = []
    for path in paths:
        shape = volume_shape(path)
        (flat if len(shape) == 3 or set(shape[3:]) == {1} else deep).append((path, shape))
    if flat and deep:
        path, shape = deep[0]
        raise DataError(
            f"{path}: shape {shape}, but {flat[0][0].name} and {len(flat) - 1} more hold one 3D volume; channel counts "
            f"must not be mixed ({len(deep)} such files): remove them or choose files with --config.data.pattern"
        )


def _example(name: str, path: Path, options: Options) -> Example:
    volume = read_volume(path)
    unit = scale_to_unit(volume.values, options.quantile_low, options.quantile_high, str(path))
    resampled = resample_volume(Volume(unit, volume.affine), options.grid, options.spacing or None)
    return Example(np.clip(resampled.values, 0, 1)[..., None], name, affine=resampled.affine)
