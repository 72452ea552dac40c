"""Brain MRI in the folder layout of BraTS 2023: one sequence of every case, with the published preprocessing.

    BraTS-GLI-00000-000/BraTS-GLI-00000-000-t1n.nii.gz        patient BraTS-GLI-00000, first time point

The files may lie at any depth below the data directory, with or without `.gz`. A volume is clipped to the 0.001 and
0.999 quantiles of all its voxels, scaled to [0, 1], padded with 0 from 240 x 240 x 155 to 256 x 256 x 256 (8 + 8,
8 + 8, 50 + 51) and averaged over blocks. Other shapes are cropped or padded about their centre, and logged.

BraTS arrays run to the left, the back and the top (LPS). They are turned to RAS+ here, which flips two axes that are
padded evenly. The result equals the published one voxel for voxel up to these flips, which the affine includes.
`volume_files.py` lists the header fields that are read.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from medfuncta_jax.datasets.dataset import (
    SPLITS,
    DataError,
    Example,
    Plan,
    PlannedSplit,
    required_folder,
)
from medfuncta_jax.datasets.folder_files import about_files, files_below, name_below
from medfuncta_jax.datasets.splits import require_split_options
from medfuncta_jax.datasets.volume_examples import example_of_array, new_splits, splits_by_patient
from medfuncta_jax.datasets.volume_files import (
    Volume,
    nan_value,
    volume_header,
)
from medfuncta_jax.datasets.volumes import (
    block_average,
    crop_or_pad,
    quantile_range,
    scale_between,
)
from medfuncta_jax.settings import SettingsError
from medfuncta_jax.units import units_between

SEQUENCES = ("t1n", "t1c", "t2w", "t2f")

# Voxels along each side after padding; possible sizes divide this number.
FIELD = 256
SIZES = (32, 64, 128, 256)

_SHAPE = (240, 240, 155)
_SPACING = 1.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of the source.

    Attributes:
      sequence: "t1n" (native T1, the paper's), "t1c" (with contrast), "t2w" or "t2f" (FLAIR).
      size: voxels along each side, 32, 64, 128 or 256; one voxel is 256 / size millimetres wide.
      quantile_low, quantile_high: quantiles of a volume's intensities that are scaled to 0 and 1.
      nan: replacement of NaN voxels, such as 0; "" refuses a volume with NaN.
      seed: seed of the split.
      test_fraction: fraction of the patients.
      val_fraction: fraction of the patients, drawn from those not used for testing; the test split does not depend on
        it.
    """

    sequence: str = "t1n"
    size: int = 32
    quantile_low: float = 0.001
    quantile_high: float = 0.999
    nan: str | float = ""
    seed: int = 42
    val_fraction: float = 0.1
    test_fraction: float = 0.2

    def __post_init__(self):
        nan_value(self.nan)
        if self.sequence not in SEQUENCES:
            raise SettingsError(f"sequence must be one of {', '.join(SEQUENCES)}, got {self.sequence!r}")
        if self.size not in SIZES:
            raise SettingsError(f"size must be one of {', '.join(map(str, SIZES))}, got {self.size}")
        if not 0 <= self.quantile_low < self.quantile_high <= 1:
            raise SettingsError("quantile_low must be below quantile_high, both in [0, 1]")
        require_split_options(self.seed, self.val_fraction, self.test_fraction)


def plan(options: Options, *, data_dir: str | None, cache_root: Path) -> Plan:
    """The cases; headers are read now, voxels when the plan is carried out.

    Raises:
      DataError: no folder, too few patients to split, or a case that is there twice.
    """
    folder = required_folder(data_dir, "the BraTS cases")
    files = _cases(folder, options.sequence)
    patients = {case: patient_of(case) for case in files}
    if (count := len(set(patients.values()))) < len(SPLITS):
        raise DataError(
            f"{folder}: {count} patients with files named *-{options.sequence}.nii.gz or .nii, at least 3 are needed "
            "to train, validate and test; check data_dir and data.sequence"
        )
    other = {case: text for case, path in files.items() if (text := _unusual(path))}
    if other:
        first = next(iter(other))
        _log.warning(
            "%d of %d volumes are not 240 x 240 x 155 at 1 mm (%s: %s); each is cropped or padded about its centre",
            len(other), len(files), first, other[first],
        )  # fmt: skip
    splits, split = splits_by_patient(files, patients, options, _example)
    about = _about(folder, options, files) | {"other_shapes": other} | split
    return _plan(options, splits, about, gathered=True, patients=patients)


def finer(options: Options, scale: int, *, data_dir: str | None, cache_root: Path) -> Options:
    """The options of a grid `scale` times finer over the same field of view."""
    return replace(options, size=scale * options.size)


def new_files(folder: Path, options: Options) -> dict[str, Path]:
    """The files in a folder of new signals, by case."""
    return _cases(folder, options.sequence)


def plan_new(
    options: Options, folder: Path, files: Mapping[str, Path], *, grid: tuple[int, ...], channels: int
) -> Plan:
    """New files, all in the split "new", as `plan` would make them."""
    return _plan(options, new_splits(files, options, _example), _about(folder, options, files))


def example_of(
    options: Options, values: np.ndarray, name: str, *, affine: np.ndarray | None, grid: tuple[int, ...], channels: int
) -> Example:
    """One volume [X, Y, Z] of any unit, whose affine [4, 4] (mm, RAS+) is that of 1 mm voxels where None."""
    return example_of_array(values, name, options, affine, _example)


def _about(folder: Path, options: Options, files: Mapping[str, Path]) -> dict[str, Any]:
    by_name = {path.relative_to(folder).as_posix(): path for path in files.values()}
    return about_files("brats", folder, options, by_name) | {
        "licence": "as its publisher says",
        "title": f"{folder.name}, {options.sequence}",
        "orientation": "RAS+",
    }


def _plan(options: Options, splits: Mapping[str, PlannedSplit], about: dict[str, Any], **of_files: Any) -> Plan:
    grid = (options.size,) * 3
    return Plan(
        name="brats", grid=grid, channels=1, dtype="float32", splits=splits, affines=True, about=about, **of_files
    )  # fmt: skip


def _example(volume: Volume, name: str, options: Options, place: str) -> Example:
    low, high = quantile_range(volume.values, options.quantile_low, options.quantile_high, place)
    made = preprocess(volume, options, name=place)
    units = units_between(low, high, values=volume.values)
    return Example(made.values[..., None], name, affine=made.affine, units=units)


def preprocess(volume: Volume, options: Options, *, name: str) -> Volume:
    """The published preprocessing of one volume.

    Args:
      volume: intensities, RAS+.
      options: size and quantiles.
      name: the file's name, for the message.
    Returns:
      float32 [size, size, size] in [0, 1], 0 outside the input, and the affine of the new grid.
    Raises:
      DataError: a constant volume.
    """
    low, high = quantile_range(volume.values, options.quantile_low, options.quantile_high, name)
    unit = scale_between(volume.values, low, high, name)
    padded = crop_or_pad(Volume(unit, volume.affine), (FIELD,) * 3, 0.0)
    return block_average(padded, FIELD // options.size)


def patient_of(case: str) -> str:
    """The patient of a case: its name without the time point, "BraTS-GLI-00000-001" to "BraTS-GLI-00000"."""
    return re.sub(r"-\d{3}$", "", case)


def _cases(folder: Path, sequence: str) -> dict[str, Path]:
    """The files of a sequence by the names of their cases, sorted."""
    files: dict[str, Path] = {}
    for path in files_below(folder):
        match = re.fullmatch(rf"(.+)-{sequence}\.nii(\.gz)?", path.name, re.DOTALL)
        if not match:
            continue
        name_below(folder, path)
        if match[1] in files:
            raise DataError(f"{path}: this case is also in {files[match[1]]}; remove one of the two files")
        files[match[1]] = path
    return dict(sorted(files.items()))


def _unusual(path: Path) -> str:
    """Shape and spacing of a volume that differs from BraTS as published; "" for others and for unreadable volumes."""
    try:
        shape, affine = volume_header(path)
    except DataError:
        return ""
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if shape[:3] == _SHAPE and np.allclose(spacing, _SPACING, atol=1e-3):
        return ""
    return f"{' x '.join(map(str, shape))} at {' x '.join(f'{step:.4g}' for step in spacing)} mm"
