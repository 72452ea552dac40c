"""Datasets: signals from files or downloads, prepared once, read with random access.

`open_dataset` is the entry point. A source is one module with

    Options                                      a frozen dataclass: its own settings, validated
    plan(options, *, data_dir, cache_root)       -> Plan: the dataset, and how to make each example
    new_files(folder, options)                   -> the files of a folder, by name, for a finished field
    plan_new(options, folder, files, *, grid, channels)
                                                 -> Plan: the same for these files, in the one split "new"
    example_of(options, values, name, *, affine, grid, channels)
                                                 -> Example: the same for an array; optional
    finer(options, scale, *, data_dir, cache_root)
                                                 -> Options: those of a finer grid over the same field of view; where a
                                                 source has signals of more than one resolution
    mask_of(options, path, image)                -> the labels [*grid] of a mask file, whole numbers, on the grid of the
                                                 signal that its image file becomes; where a source has masks

and one line in `SOURCES`; storage, splits in memory and batches are shared. Modules are imported on first use, so that
importing `medfuncta_jax` stays light.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medfuncta_jax.datasets.dataset import DataError, Dataset, NoFinerGrid, Plan, Split, cache_root, required_folder
from medfuncta_jax.settings import DataSettings, SettingsError, dataclass_from_dict

if TYPE_CHECKING:
    import numpy as np

    from medfuncta_jax.datasets.pipeline import BatchStream

__all__ = [
    "SOURCES",
    "DataError",
    "Dataset",
    "NoFinerGrid",
    "Split",
    "batches",
    "finer_plan",
    "mask_reader",
    "new_plan",
    "new_signals",
    "open_dataset",
    "source_options",
]

SOURCES = {
    "brats": "medfuncta_jax.datasets.brats",
    "ecg": "medfuncta_jax.datasets.ecg",
    "image_folder": "medfuncta_jax.datasets.image_folder",
    "lung_ct": "medfuncta_jax.datasets.lung_ct",
    "medmnist": "medfuncta_jax.datasets.medmnist",
    "nibabel_slices": "medfuncta_jax.datasets.nibabel_slices",
    "nifti_folder": "medfuncta_jax.datasets.nifti_folder",
    "series_folder": "medfuncta_jax.datasets.series_folder",
}


def source_module(source: str) -> Any:
    """The module of a source.

    Raises:
      SettingsError: an unknown source.
      DataError: a package of the extra `train` is not installed.
    """
    if source not in SOURCES:
        raise SettingsError(f"unknown data.source {source!r}; known: {', '.join(sorted(SOURCES))}")
    with _needing_packages():
        return importlib.import_module(SOURCES[source])


@contextlib.contextmanager
def _needing_packages() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        if sys.platform == "win32":
            raise DataError(
                "data sets need array_record, which is not to be had on Windows; use Linux, macOS or WSL. Fields and "
                "latents work here: fit_latent, reconstruct, load_field, load_latents"
            ) from error
        raise DataError(
            f"data sets need {error.name}, which is not installed: pip install 'medfuncta_jax[train]'"
        ) from error


def source_options(source: str) -> type:
    """The frozen dataclass of a source's own settings.

    Raises:
      SettingsError: an unknown source.
      DataError: a package of the extra `train` is not installed.
    """
    return source_module(source).Options


def open_dataset(data: DataSettings | str, *, data_dir: str | None = None, **options: Any) -> Dataset:
    """The dataset that `data` describes, prepared in its cache directory if it is not there yet.

        dataset = open_dataset("image_folder", data_dir="scans", size=64)
        images = dataset.splits["test"].signals(slice(None))  # float32 [n, 64, 64, 1] in [0, 1]

    Sources with a file for each signal skip unusable files, log them and list them in `about["skipped"]`; the split of
    the other files does not depend on them.

    Args:
      data: the name of a source (see `SOURCES`), or the settings of a run.
      data_dir: the folder of the source's own files, only read; None lets a source download files or use installed
        ones.
      options: beside the name of a source, its options (`source_options`), and `cache_dir`.
    Raises:
      SettingsError: an unknown source or option, or an option out of range.
      DataError: files missing or damaged, more than half of the signals or a whole split skipped, a cache directory
        that cannot be written, or a package of the extra `train` that is not installed.
    """
    if isinstance(data, str):
        cache_dir = options.pop("cache_dir", "")
        data = DataSettings(data, cache_dir, tuple(sorted(options.items())))
    elif options:
        raise SettingsError(f"option {min(options)!r} belongs beside the name of a source, not beside settings")
    checked = dataclass_from_dict(source_options(data.source), dict(data.options), "data")
    if data_dir is not None:
        required_folder(data_dir, "the source's files")
    root = cache_root(data.cache_dir)
    plan = source_module(data.source).plan(checked, data_dir=data_dir, cache_root=root)

    with _needing_packages():
        from medfuncta_jax.datasets.prepared import prepared_dataset

    return prepared_dataset(plan, root)


def finer_plan(data: DataSettings, scale: int, *, data_dir: str | None = None) -> Plan:
    """The signals of a source on a grid `scale` times finer, or of the size nearest to that; see `Plan.signals`.

    They are the reference for a field that is decoded at a higher resolution. Centre and field of view stay, see
    `coordinates.inner_samples`. Nothing is downloaded, and nothing prepared.

    Args:
      data: the data settings of the run.
      scale: at least 1.
      data_dir: where the source's own files are.
    Raises:
      NoFinerGrid: there is none.
    """
    module, root = source_module(data.source), cache_root(data.cache_dir)
    if not hasattr(module, "finer"):
        raise NoFinerGrid(f"the source {data.source} has its signals at one resolution only")
    options = dataclass_from_dict(source_options(data.source), dict(data.options), "data")
    try:
        finer = module.finer(options, scale, data_dir=data_dir, cache_root=root)
        return module.plan(finer, data_dir=data_dir, cache_root=root)
    except (DataError, SettingsError) as error:
        raise NoFinerGrid(str(error)) from error


def mask_reader(data: DataSettings, *, data_dir: str | None, scale: int = 1) -> Callable[[Path, Path], np.ndarray]:
    """A function of a mask file and the image file that it belongs to: its labels on the grid of the signals.

    Masks go through the very crop, padding and grid of their images, and each point takes the nearest label.

    Args:
      data: of the run.
      data_dir: where the source's own files are.
      scale: the grid is so many times finer, over the same field of view (see `finer_plan`).
    Raises:
      DataError: the source reads no masks. The function itself: a mask that cannot be read, has other voxels than its
        image, or values that are no labels.
    """
    module = source_module(data.source)
    if not hasattr(module, "mask_of"):
        able = sorted(name for name in SOURCES if hasattr(source_module(name), "mask_of"))
        raise DataError(f"the source {data.source} reads no masks; {' and '.join(able)} do")
    options = dataclass_from_dict(source_options(data.source), dict(data.options), "data")
    if scale > 1:
        options = module.finer(options, scale, data_dir=data_dir, cache_root=cache_root(data.cache_dir))
    return lambda path, image: module.mask_of(options, path, image)


def new_plan(data: DataSettings, path: Path | str, *, grid: Sequence[int], channels: int) -> Plan:
    """New signals, to be resampled and scaled as those of a run, all in the one split "new".

    Args:
      data: the data settings of the run.
      path: a file, or a folder of files, filtered by the source's options.
      grid, channels: those of the run.
    Raises:
      SettingsError: options that are not the source's.
      DataError: no such file, none that the source reads, or signals of another grid or number of channels.
    """
    module = source_module(data.source)
    options = dataclass_from_dict(source_options(data.source), dict(data.options), "data")
    path = Path(path).expanduser().absolute()
    if path.is_file():
        folder, files = path.parent, {path.name: path}
    else:
        folder = required_folder(str(path), "the new signals")
        files = module.new_files(folder, options)
    if not files:
        raise DataError(f"{folder}: no file there or below that the source {data.source} of this run reads")
    plan = module.plan_new(options, folder, files, grid=tuple(grid), channels=channels)
    if (plan.grid, plan.channels) != (tuple(grid), channels):
        raise DataError(
            f"{path}: signals of {plan.grid} x {plan.channels}, the field was trained on {tuple(grid)} x {channels}"
        )
    return plan


def new_signals(data: DataSettings, path: Path | str, *, grid: Sequence[int], channels: int) -> Dataset:
    """The dataset of `new_plan`, prepared in the cache directory if it is not there yet."""
    from medfuncta_jax.datasets.prepared import prepared_dataset

    return prepared_dataset(new_plan(data, path, grid=grid, channels=channels), cache_root(data.cache_dir))


def batches(split: Split, *, batch_size: int, seed: int, start_step: int = 0) -> BatchStream:
    """An endless stream of shuffled batches, float32 [batch_size, *grid, D]; see `pipeline.batches`."""
    with _needing_packages():
        from medfuncta_jax.datasets import pipeline

    return pipeline.batches(split, batch_size=batch_size, seed=seed, start_step=start_step)
