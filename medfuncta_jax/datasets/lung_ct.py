"""Chest CT volumes in Hounsfield units, as NIfTI: LIDC-IDRI after `python -m experiments.tools.preprocess`, or others.

Every volume is interpolated to cubic voxels of 1 mm along the axes of space, unless it has them. The rest is as
published: the central 256 x 256 x 256 voxels, padded with air (-1000) where the scan is shorter, are clipped at -1000
and at the 0.999 quantile of these voxels, scaled to [0, 1] and averaged over blocks. Axes are RAS+, and the affine is
kept. `volume_files.py` lists the header fields that are read.
"""

from __future__ import annotations

import fnmatch
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
from medfuncta_jax.datasets.dicom_file import AIR
from medfuncta_jax.datasets.folder_files import about_files, files_below, name_below
from medfuncta_jax.datasets.masks import refuse_masks
from medfuncta_jax.datasets.splits import require_split_options
from medfuncta_jax.datasets.volume_examples import example_of_array, new_splits, splits_by_patient
from medfuncta_jax.datasets.volume_files import (
    Volume,
    nan_value,
    read_volume,
    volume_header,
)
from medfuncta_jax.datasets.volumes import (
    block_average,
    crop_or_pad,
    resample_isotropic,
    scale_between,
)
from medfuncta_jax.settings import SettingsError
from medfuncta_jax.units import units_between

# Voxels of 1 mm along each side; possible sizes divide this number.
FIELD = 256
SIZES = (32, 64, 128, 256)
SPACING = 1.0

_NIFTI = re.compile(r"\.nii(\.gz)?$")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of the source.

    Attributes:
      size: voxels along each side, 32, 64, 128 or 256; one voxel is 256 / size millimetres wide.
      pattern: which of the .nii and .nii.gz files, a glob over their paths relative to the data directory, where "*"
        also stands for folders; for a folder that holds masks too.
      quantile_high: quantile of the cropped volume that is scaled to 1; -1000 HU is scaled to 0.
      patient: a regular expression; its match in a file's path is the patient, and a file without a match is a patient
        of its own.
      nan: replacement of NaN voxels in Hounsfield units, such as -1000, air; "" refuses a volume with NaN.
      seed: seed of the split.
      test_fraction: fraction of the patients.
      val_fraction: fraction of the patients, drawn from those not used for testing; the test split does not depend on
        it.
    """

    size: int = 32
    pattern: str = "*"
    quantile_high: float = 0.999
    nan: str | float = ""
    patient: str = r"LIDC-IDRI-\d+"
    seed: int = 42
    val_fraction: float = 0.1
    test_fraction: float = 0.2

    def __post_init__(self):
        nan_value(self.nan)
        if self.size not in SIZES:
            raise SettingsError(f"size must be one of {', '.join(map(str, SIZES))}, got {self.size}")
        if not 0 < self.quantile_high <= 1:
            raise SettingsError(f"quantile_high must be in (0, 1], got {self.quantile_high}")
        try:
            re.compile(self.patient)
        except re.error as error:
            raise SettingsError(f"patient must be a regular expression, got {self.patient!r}: {error}") from error
        require_split_options(self.seed, self.val_fraction, self.test_fraction)


def plan(options: Options, *, data_dir: str | None, cache_root: Path) -> Plan:
    """The folder's volumes; headers are read now, voxels when the plan is carried out.

    Raises:
      DataError: no folder, masks beside their volumes, or too few patients to split.
    """
    folder = required_folder(data_dir, "the CT volumes")
    files = new_files(folder, options)
    refuse_masks(folder, files, lambda path: read_volume(path, nan=nan_value(options.nan)).values)
    patients = {name: _patient(name, options.patient) for name in files}
    if (count := len(set(patients.values()))) < len(SPLITS):
        raise DataError(
            f"{folder}: NIfTI files of {count} patients, at least 3 are needed to train, validate and test; check "
            "data_dir and data.pattern, and make NIfTI of DICOM with python -m experiments.tools.preprocess"
        )
    short = [name for name, path in files.items() if _shorter_than_field(path)]
    if short:
        _log.info(
            "%d of %d volumes are shorter than %d mm (%s) and padded with air", len(short), len(files), FIELD, short[0]
        )
    splits, split = splits_by_patient(files, patients, options, _example)
    about = _about(folder, options, files) | {"padded": short} | split
    return _plan(options, splits, about, gathered=True, patients=patients)


def finer(options: Options, scale: int, *, data_dir: str | None, cache_root: Path) -> Options:
    """The options of a grid `scale` times finer over the same field of view."""
    return replace(options, size=scale * options.size)


def new_files(folder: Path, options: Options) -> dict[str, Path]:
    """The volumes of a folder, by name."""
    nifti = {name_below(folder, path): path for path in files_below(folder) if _NIFTI.search(path.name)}
    return {name: path for name, path in nifti.items() if fnmatch.fnmatchcase(name, options.pattern)}


def plan_new(
    options: Options, folder: Path, files: Mapping[str, Path], *, grid: tuple[int, ...], channels: int
) -> Plan:
    """New files, all in the split "new", as `plan` would make them."""
    return _plan(options, new_splits(files, options, _example), _about(folder, options, files))


def example_of(
    options: Options, values: np.ndarray, name: str, *, affine: np.ndarray | None, grid: tuple[int, ...], channels: int
) -> Example:
    """One volume [X, Y, Z] in HU, whose affine [4, 4] (mm, RAS+) is that of 1 mm voxels where None."""
    return example_of_array(values, name, options, affine, _example)


def _about(folder: Path, options: Options, files: Mapping[str, Path]) -> dict[str, Any]:
    described = about_files("lung_ct", folder, options, files)
    return described | {"licence": "as its publisher says", "orientation": "RAS+"}


def _plan(options: Options, splits: Mapping[str, PlannedSplit], about: dict[str, Any], **of_files: Any) -> Plan:
    grid = (options.size,) * 3
    return Plan(
        name="lung_ct", grid=grid, channels=1, dtype="float32", splits=splits, affines=True, about=about, **of_files
    )  # fmt: skip


def _example(volume: Volume, name: str, options: Options, place: str) -> Example:
    field, top = _field_and_top(volume, options, name=place)
    made = _brought_to_grid(field, top, options, name=place)
    units = units_between(AIR, top, values=field.values, unit="HU")
    return Example(made.values[..., None], name, affine=made.affine, units=units)


def preprocess(volume: Volume, options: Options, *, name: str) -> Volume:
    """The published preprocessing of one volume.

    Args:
      volume: Hounsfield units; any spacing and orientation.
      options: size and quantile.
      name: the file's name, for the message.
    Returns:
      float32 [size, size, size] in [0, 1], 0 outside the input, and the affine of the new grid.
    Raises:
      DataError: nothing in it is denser than air, or a field of view that no scanner has.
    """
    return _brought_to_grid(*_field_and_top(volume, options, name=name), options, name=name)


def _field_and_top(volume: Volume, options: Options, *, name: str) -> tuple[Volume, float]:
    """The central cube in HU, and the value that becomes 1."""
    field = crop_or_pad(resample_isotropic(volume, SPACING, AIR, name=name), (FIELD,) * 3, AIR)
    top = float(np.quantile(field.values, options.quantile_high))
    if top <= AIR:
        raise DataError(
            f"{name}: nothing is denser than air ({AIR:g}) up to the quantile {options.quantile_high} of the central "
            f"{FIELD} mm; are these Hounsfield units? remove the file if not"
        )
    return field, top


def _brought_to_grid(field: Volume, top: float, options: Options, *, name: str) -> Volume:
    unit = scale_between(field.values, AIR, top, name)
    return block_average(Volume(unit, field.affine), FIELD // options.size)


def _patient(name: str, pattern: str) -> str:
    match = re.search(pattern, name)
    return match[0] if match and match[0] else name


def _shorter_than_field(path: Path) -> bool:
    """Whether a scan is shorter than the field of view; False for an unreadable file."""
    try:
        shape, affine = volume_header(path)
    except DataError:
        return False
    extent = np.array(shape[:3]) * np.linalg.norm(affine[:3, :3], axis=0)[: len(shape[:3])]
    return bool((np.rint(extent) < FIELD).any())
