"""MedMNIST v2 and MedMNIST+ (Yang et al. 2023): 2D sets at 28, 64, 128 and 224, 3D sets at 28 and 64.

The published .npz file is taken from the data directory, or else downloaded into the cache and checked. Another file
with the same layout in the data directory (`NAME.npz`, or `NAME_SIZE.npz` for a size other than 28, holding
train_images, train_labels, val_images and so on, uint8) is a dataset too, without any entry here.

Stored as published, uint8: RGB keeps its three channels, volumes are [N, D, H, W]. MedMNIST gives no voxel spacing, so
its volumes have no affine. In a file of your own with three axes an image, the last axis is channels if its length is
1, 3 or 4 and the name lacks MedMNIST's "3d"; else the image is a volume. The option `channels` overrides this.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import http.client
import logging
import os
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from medfuncta_jax.datasets.dataset import (
    NEW,
    SPLITS,
    DataError,
    Example,
    NoFinerGrid,
    Plan,
    PlannedSplit,
    Task,
    required_folder,
)
from medfuncta_jax.datasets.folder_files import about_files, files_below, name_below
from medfuncta_jax.datasets.medmnist_sets import SETS as _SETS
from medfuncta_jax.datasets.medmnist_sets import PublishedSet
from medfuncta_jax.datasets.npz import ArrayInFile, npz_arrays
from medfuncta_jax.datasets.prepared import file_md5
from medfuncta_jax.settings import SettingsError
from medfuncta_jax.units import Units

_log = logging.getLogger(__name__)

_URL = "https://zenodo.org/records/10519652/files/{}?download=1"
# Channels of colour, and of colour with alpha.
_COLOURED = (3, 4)
# Stored grey values, the same for all.
_UNITS = Units((0.0,), (255.0,), dtype="uint8")


@dataclass(frozen=True)
class Options:
    """Settings of the source.

    Attributes:
      flag: the set's name as in its file, "pneumoniamnist" or "organmnist3d"; or the name of your own file.
      size: 28, 64, 128 or 224; 28 or 64 for volumes.
      channels: for your own file: 1 if every axis of an image belongs to the grid (a last axis of 1 does not), or the
        length of the last axis; 0 decides by the number of axes and the name.
    """

    flag: str
    size: int = 28
    channels: int = 0

    def __post_init__(self):
        known = _SETS.get(self.flag)
        if known and self.size not in known.md5:
            raise SettingsError(f"size of {self.flag} must be one of {', '.join(map(str, known.md5))}, got {self.size}")
        if not self.flag or Path(self.flag).name != self.flag:
            raise SettingsError(f"flag must be a name without folders, got {self.flag!r}")
        if self.size < 1:
            raise SettingsError(f"size must be at least 1, got {self.size}")
        if self.channels < 0 or (known and self.channels not in (0, known.channels)):
            wanted = f"0 or {known.channels}, which {self.flag} has" if known else "0 or the number of channels"
            raise SettingsError(f"channels must be {wanted}, got {self.channels}")

    @property
    def file(self) -> str:
        """The name of the set's file."""
        return f"{self.flag}.npz" if self.size == 28 else f"{self.flag}_{self.size}.npz"


def plan(options: Options, *, data_dir: str | None, cache_root: Path) -> Plan:
    """The set's images and labels.

    Raises:
      SettingsError: a flag that is neither MedMNIST's nor a file in the data directory.
      DataError: the file is absent and cannot be downloaded, is damaged, lacks an array, or holds arrays that do not
        belong together.
    """
    known = _SETS.get(options.flag)
    path, md5 = _located(options, data_dir, cache_root)
    arrays = npz_arrays(path)
    images: dict[str, ArrayInFile] = {}
    labels: dict[str, np.ndarray] = {}
    for name in SPLITS:
        for key in (f"{name}_images", f"{name}_labels"):
            if key not in arrays:
                raise DataError(f"{path}: array {key} is missing (it holds {', '.join(arrays) or 'none'})")
        images[name] = arrays[f"{name}_images"]
        labels[name] = _whole_numbers(path, arrays[f"{name}_labels"])
        if len(labels[name]) != images[name].shape[0]:
            raise DataError(
                f"{path}: {images[name].shape[0]} {name} images and {len(labels[name])} labels; copy the file anew"
            )
        if not len(labels[name]):
            raise DataError(f"{path}: the {name} split is empty; take another file")
    if more := sorted(set(arrays) - {f"{name}_{kind}" for name in SPLITS for kind in ("images", "labels")}):
        _log.warning("%s: the arrays %s in it are not read", path, ", ".join(more))
    grid, channels = _common_shape(path, images, options)
    task, classes = _meaning(path, labels, known)

    def examples(name: str) -> Iterator[Example]:
        for i, (image, label) in enumerate(zip(images[name].items(), labels[name], strict=True)):
            yield Example(image.reshape(*grid, channels), f"{name}-{i:06d}", label, units=_UNITS)

    return Plan(
        name="medmnist",
        grid=grid,
        channels=channels,
        dtype="uint8",
        classes=classes,
        task=task,
        splits={name: PlannedSplit(len(labels[name]), functools.partial(examples, name)) for name in SPLITS},
        about={
            "source": "medmnist",
            "version": 1,
            "title": options.flag,
            "licence": known.licence if known else "not known",
            "options": asdict(options),
            "md5": {path.name: md5},
            "split_rule": "as in the file",
        },
    )


def finer(options: Options, scale: int, *, data_dir: str | None, cache_root: Path) -> Options:
    """The options of the available size nearest to `scale` times this one; nothing is downloaded.

    The sizes of MedMNIST are fixed: 64 counts as twice 28, 224 as four times 64.

    Raises:
      NoFinerGrid: the set has no such size, or its file is not here.
    """
    wanted, near = scale * options.size, []
    for size in sorted({28, 64, 128, 224, wanted}, key=lambda size: max(size / wanted, wanted / size)):
        if max(size / wanted, wanted / size) < 2**0.5:
            with contextlib.suppress(SettingsError):  # not a size of this set
                near.append(replace(options, size=size))
    folders = [*([Path(data_dir)] if data_dir else []), cache_root / "downloads" / "medmnist"]
    for one in near:
        if any((folder / one.file).is_file() for folder in folders):
            return one
    names = " or ".join(one.file for one in near)
    raise NoFinerGrid(
        f"{names} is not in {' or '.join(map(str, folders))}" if near else f"{options.flag} has no size near {wanted}"
    )


def new_files(folder: Path, options: Options) -> dict[str, Path]:
    """The .npz files of a folder, by name."""
    return {name_below(folder, path): path for path in files_below(folder) if path.suffix == ".npz"}


def plan_new(
    options: Options, folder: Path, files: Mapping[str, Path], *, grid: tuple[int, ...], channels: int
) -> Plan:
    """All images in arrays NAME_images of files, uint8, of any named split, in the split "new"."""
    arrays: dict[str, ArrayInFile] = {}
    for name, path in files.items():
        for key, array in npz_arrays(path).items():
            if not key.endswith("_images"):
                continue
            if array.dtype != np.uint8 or not _is_image(array.shape[1:], grid, channels):
                raise DataError(
                    f"{path}: {key} is {array.dtype} {array.shape}, the field was trained on uint8 images of "
                    f"{(*grid, channels)}; take a file like those of the run"
                )
            arrays[f"{name}:{key.removesuffix('_images')}"] = array

    def examples() -> Iterator[Example]:
        for name, array in arrays.items():
            for i, image in enumerate(array.items()):
                yield Example(image.reshape(*grid, channels), f"{name}-{i:06d}", units=_UNITS)

    split = PlannedSplit(sum(array.shape[0] for array in arrays.values()), examples)
    return Plan(
        name="medmnist", grid=grid, channels=channels, dtype="uint8", splits={NEW: split},
        about=about_files("medmnist", folder, options, files),
    )  # fmt: skip


def _is_image(shape: tuple[int, ...], grid: tuple[int, ...], channels: int) -> bool:
    return shape == (*grid, channels) or (channels == 1 and shape == grid)


def example_of(
    options: Options, values: np.ndarray, name: str, *, affine: np.ndarray | None, grid: tuple[int, ...], channels: int
) -> Example:
    """One uint8 image of the grid."""
    if values.dtype != np.uint8 or not _is_image(values.shape, grid, channels):
        raise DataError(f"{name}: a uint8 image {(*grid, channels)} is needed, got {values.dtype} {values.shape}")
    return Example(values.reshape(*grid, channels), name, units=_UNITS)


def _located(options: Options, data_dir: str | None, cache_root: Path) -> tuple[Path, str]:
    """The set's file, downloaded if necessary, and its MD5."""
    known = _SETS.get(options.flag)
    path = required_folder(data_dir, options.file) / options.file if data_dir is not None else None
    if path is not None and path.is_file():
        md5 = file_md5(path)
        if known and md5 != known.md5[options.size]:
            _log.warning(
                "%s has MD5 %s, MedMNIST publishes %s; going on with this file", path, md5, known.md5[options.size]
            )
        return path, md5
    if known is None:
        close = difflib.get_close_matches(options.flag, _SETS, n=1)
        remedy = f"did you mean {close[0]}?" if close else f"known: {', '.join(_SETS)}"
        where = f"{path}: no such file" if path else f"give the folder of {options.file} as data_dir"
        raise SettingsError(f"data.flag {options.flag!r} is no MedMNIST set ({remedy}) and {where}")
    return _downloaded(options.file, known.md5[options.size], cache_root / "downloads" / "medmnist", data_dir)


def _downloaded(name: str, md5: str, folder: Path, data_dir: str | None) -> tuple[Path, str]:
    path, url = folder / name, _URL.format(name)
    if path.is_file():
        if file_md5(path) != md5:
            raise DataError(f"{path}: its MD5 is not {md5} as published; remove the file, it is then downloaded anew")
        return path, md5
    sought = f"{name} is not in {data_dir}" if data_dir is not None else f"{name} is not there"
    remedy = "download it elsewhere and give its folder as data_dir"
    part = folder / f"{name}.{os.getpid()}.part"
    _log.info("downloading %s to %s", url, path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            digest = hashlib.md5()
            with open(part, "wb") as file, urllib.request.urlopen(url, timeout=60) as response:
                while block := response.read(1 << 20):
                    file.write(block)
                    digest.update(block)
            if digest.hexdigest() != md5:
                raise DataError(
                    f"{name} from {url} has MD5 {digest.hexdigest()}, not {md5} as published, and was refused; "
                    f"try again or {remedy}"
                )
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException) as error:
        raise DataError(f"{sought} and {url} cannot be downloaded ({error}); {remedy}") from error
    except OSError as error:
        raise DataError(
            f"{folder}: cannot write {name} ({error.strerror or error}); free space there or name a writable directory "
            "with data.cache_dir=DIR"
        ) from error
    return path, md5


def _whole_numbers(path: Path, array: ArrayInFile) -> np.ndarray:
    """Labels as int64, [N] or [N, classes]."""
    if len(array.shape) not in (1, 2) or array.dtype.kind not in "uibf":
        raise DataError(f"{path}: {array.key} is {array.dtype} {array.shape}, whole numbers [N] or [N, 1] are needed")
    values = array.read()
    if not np.all(np.isfinite(values)) or np.any(values != np.floor(values)):
        raise DataError(f"{path}: {array.key} holds labels that are no whole numbers; repair or replace the file")
    whole = values.astype(np.int64)
    return whole[:, 0] if whole.ndim == 2 and whole.shape[1] == 1 else whole


def _common_shape(path: Path, images: dict[str, ArrayInFile], options: Options) -> tuple[tuple[int, ...], int]:
    """The grid and channels that all three arrays share."""
    known = _SETS.get(options.flag)
    for array in images.values():
        if array.dtype != np.uint8:
            raise DataError(f"{path}: {array.key} is {array.dtype}, uint8 is needed; convert it to 0 .. 255")
    shapes = {array.key: array.shape[1:] for array in images.values()}
    if len(set(shapes.values())) > 1:
        listed = ", ".join(f"{key} {shape}" for key, shape in shapes.items())
        raise DataError(f"{path}: images of different shapes or channel counts ({listed}); all must be alike")
    shape = images["train"].shape[1:]
    if known:
        expected = (options.size,) * known.dimensions
        if shape not in ((*expected, known.channels), expected if known.channels == 1 else None):
            raise DataError(
                f"{path}: images are {shape}, {options.flag} at size {options.size} has {expected} and "
                f"{known.channels} channel(s); replace the file"
            )
        return expected, known.channels
    if len(shape) not in (2, 3, 4) or 0 in shape:
        raise DataError(f"{path}: images are {shape}; [H, W], [H, W, C], [D, H, W] or [D, H, W, C] are needed")
    channels = options.channels or _channels(path, shape, options.flag)
    if shape[-1] != channels and (channels != 1 or len(shape) == 4):
        raise DataError(
            f"{path}: images are {shape}, so data.channels must be {shape[-1]}{' or 1' * (len(shape) < 4)}, "
            f"not {channels}"
        )
    grid = shape[:-1] if shape[-1] == channels else shape
    if len(grid) < 2 or 1 in grid:
        raise DataError(
            f"{path}: images are {shape}, which leaves a grid of {grid}; move an axis of channels to the end, or set "
            "data.channels otherwise"
        )
    return grid, channels


def _channels(path: Path, shape: tuple[int, ...], flag: str) -> int:
    """The channels of an image in a file of your own; an ambiguous shape is logged."""
    if len(shape) != 3:
        return shape[-1] if len(shape) == 4 else 1
    if shape[-1] == 1 or (shape[-1] in _COLOURED and "3d" not in flag.lower()):
        return shape[-1]
    _log.warning(
        "%s: images are read as volumes of %d x %d x %d voxels; if the last axis is channels, set "
        "data.channels=%d, and if the first is, move it to the end", path, *shape, shape[-1],
    )  # fmt: skip
    return 1


def _meaning(path: Path, labels: dict[str, np.ndarray], known: PublishedSet | None) -> tuple[Task, tuple[str, ...]]:
    """The task and the classes; labels outside them are an error."""
    shapes = {array.shape[1:] for array in labels.values()}
    if len(shapes) > 1:
        raise DataError(f"{path}: labels of the splits differ in width {sorted(shapes)}; replace the file")
    multiple = shapes != {()}
    largest = max(int(array.max()) for array in labels.values())
    if known:
        task, classes = known.task, known.classes
    elif multiple:
        task, classes = "multi-label", tuple(str(i) for i in range(shapes.pop()[0]))
    else:
        task, classes = "multi-class", tuple(str(i) for i in range(largest + 1))
    if not known:
        _log.info("%s is no MedMNIST set: %s, %d classes numbered from its labels", path, task, len(classes))
    width = labels["train"].shape[1] if multiple else None
    if (task == "multi-label") != multiple or (multiple and width != len(classes)):
        raise DataError(f"{path}: labels have {width or 1} columns, {task} with {len(classes)} classes is expected")
    top = 1 if multiple else len(classes) - 1
    if largest > top or min(int(array.min()) for array in labels.values()) < 0:
        raise DataError(f"{path}: a label lies outside 0 to {top}; repair or replace the file")
    return task, classes
