"""The files of `segment`: masks that are read, kept, and written."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from experiments.runtime.progress import Progress
from experiments.runtime.run import Run
from experiments.runtime.run_directory import RunError
from experiments.stages.segment_methods import Masks, Result
from experiments.stages.signal_files import file_name
from medfuncta_jax.atomic import atomic_path
from medfuncta_jax.datasets import DataError, mask_reader
from medfuncta_jax.datasets.dataset import SPLITS
from medfuncta_jax.datasets.masks import matched_masks
from medfuncta_jax.nifti import write_volume
from medfuncta_jax.settings import SettingsError


def read_masks(run: Run) -> Masks:
    """The masks of all signals, as classes."""
    settings, dataset = run.settings, run.dataset
    wanted, data_dir = settings.segment, Path(run.data_dir or ".").expanduser().absolute()
    if not wanted.masks:
        raise SettingsError("segment.masks names no masks; e.g. --config.segment.masks=labelsTr")
    reader = mask_reader(settings.data, data_dir=run.data_dir)
    ids = {name: dataset.splits[name].annotations().ids for name in SPLITS}
    about = dataset.about
    files = matched_masks(
        wanted.masks, [one for name in SPLITS for one in ids[name]], data_dir=run.data_dir,
        unused=[*about.get("skipped", {}), *about.get("repeated", {})],
    )  # fmt: skip
    stored: dict[str, np.ndarray] = {}
    with Progress("segment: masks", total=len(files), unit="files") as progress:
        for name in SPLITS:
            stored[name] = np.empty((len(ids[name]), *dataset.grid), np.int32)
            for row, one in enumerate(ids[name]):
                stored[name][row] = reader(files[one], data_dir / one)
                progress.advance()
                run.stop.check("nothing is trained yet")
    values = wanted.labels or tuple(int(value) for value in np.unique(stored["train"]) if value)
    if not values:
        raise RunError(f"{wanted.masks}: the masks of all training signals are empty on their grid; check the folder")

    def classes(labels: np.ndarray, one: str) -> np.ndarray:
        found = np.zeros(labels.shape, np.uint8)
        for k, value in enumerate(values, start=1):
            found[labels == value] = k
        beyond = np.unique(labels[(found == 0) & (labels != 0)])
        if len(beyond):
            known = "segment.labels" if wanted.labels else "those of the training masks"
            raise DataError(
                f"{files[one]}: label {beyond[0]} is beyond the classes {values} ({known}); mend the mask or name all "
                "values in segment.labels"
            )
        return found

    splits = {
        name: np.stack([classes(labels, one) for labels, one in zip(stored[name], ids[name], strict=True)])
        for name in SPLITS
    }
    finer = None
    if wanted.scale > 1:
        fine = mask_reader(settings.data, data_dir=run.data_dir, scale=wanted.scale)
        finer = np.stack([classes(fine(files[one], data_dir / one), one) for one in ids["test"]])
    return Masks(values, splits, finer)


def keep(path: Path, found: Mapping[str, np.ndarray], row: Mapping[str, Any]) -> None:
    """Write a method's masks and its row of results."""
    with atomic_path(path) as partial:
        np.savez_compressed(partial, allow_pickle=False, row=np.array(json.dumps(row)), **found)


def read_kept(path: Path) -> Result | None:
    """A method's masks and its row of results; None where there are none, or a damaged file."""
    try:
        with np.load(path) as file:
            return {name: file[name] for name in file if name != "row"}, json.loads(str(file["row"]))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None


def folders_of(folder: Path, name: str, masks: Masks) -> list[Path]:
    """The folders of a method's masks: on the training grid and, for methods on fields, on the finer grid."""
    places = [folder / name]
    if masks.finer is not None and name != "unet":
        places.append(folder / f"{name}-{'x'.join(map(str, masks.finer.shape[1:]))}")
    return places


def write_masks(
    folder: Path, found: np.ndarray, values: tuple[int, ...], ids: tuple[str, ...], affines: np.ndarray | None
) -> None:
    """Write classes [n, *grid] as masks of the values that they have in files; existing files are kept."""
    labels = np.array([0, *values])
    dtype = "uint8" if labels.max() < 256 else "uint16" if labels.max() < 65536 else "int32"
    suffix = ".nii.gz" if found.ndim == 4 else ".png"
    for row, one in enumerate(ids):
        path = folder / file_name(row, count=len(ids), name=one, suffix=suffix)
        if path.exists():
            continue
        mask = labels[found[row]].astype(dtype)
        if suffix == ".nii.gz":
            write_volume(path, mask, np.eye(4) if affines is None else affines[row], dtype=dtype)
        else:
            with atomic_path(path) as partial:
                Image.fromarray(mask).save(partial)


def finer_grid(coarse: tuple[int, ...], fine: tuple[int, ...]) -> np.ndarray:
    """The matrix [C + 1, C + 1] from indices of a finer grid over the same field of view to those of the coarse one."""
    matrix = np.eye(len(coarse) + 1)
    for axis, (n, m) in enumerate(zip(coarse, fine, strict=True)):
        matrix[axis, axis], matrix[axis, -1] = n / m, n / m / 2 - 0.5
    return matrix
