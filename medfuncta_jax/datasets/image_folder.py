"""A folder of images (PNG, JPEG, TIFF) of any sizes, brought to one size.

Images are turned by their stated orientation, scaled to [0, 1] by the range of their type, cropped about their centre
(or padded with 0) to the target's aspect and resampled, anti-aliased, with square pixels. Transparent pixels are black.
For colour, grey values become three equal channels; for grey, colours become their luma (ITU-R 601). Grey images keep
16 bits; Pillow reads the upper 8 of 16 bits of a colour channel. `image_file.py` lists the header fields that are read.
`folder_files.py` describes labels and splits; ids are the names relative to the data directory.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from medfuncta_jax.datasets.contents import IgnoredFields
from medfuncta_jax.datasets.dataset import (
    NEW,
    SPLITS,
    DataError,
    Example,
    Plan,
    PlannedSplit,
    Skipped,
    example_or_skipped,
    required_folder,
    splits_by_name,
)
from medfuncta_jax.datasets.folder_files import (
    FolderOptions,
    about_files,
    arranged,
    first_readable,
    matching_files,
    require_value_range,
)
from medfuncta_jax.datasets.image_file import read_image, read_mask, stored_channels, stored_values
from medfuncta_jax.datasets.masks import refuse_masks, require_labels
from medfuncta_jax.datasets.volumes import nearest, resample
from medfuncta_jax.settings import SettingsError
from medfuncta_jax.units import Units

_log = logging.getLogger(__name__)

_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")

# 16-bit images that stay below this part of their range are most likely 12-bit ones.
_DARK = 0.25


@dataclass(frozen=True, kw_only=True)
class Options(FolderOptions):
    """Settings of the source, and those of `FolderOptions`.

    Attributes:
      size: pixels, one number for a square or (rows, columns), 2 to 4096 each.
      channels: 1 or 3; 0 takes the channels of the files, which must then be equal in all.
      fit: "crop" cuts to the aspect of `size` about the centre, "pad" keeps the whole image and pads with 0.
      value_range: (low, high), stored values that become 0 and 1, such as (0, 4095) for 12 bits in 16; empty takes the
        range of the type. Required for signed and 32-bit images, whose type has no range. If 0 is white, low becomes 1.
    """

    size: int | tuple[int, ...] = 64
    channels: Literal[0, 1, 3] = 0
    fit: Literal["crop", "pad"] = "crop"
    value_range: tuple[float, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        if len(self.grid) != 2 or not all(2 <= side <= 4096 for side in self.grid):
            raise SettingsError(f"size must be one or two numbers of 2 to 4096, got {self.size}")
        require_value_range(self.value_range)

    @property
    def grid(self) -> tuple[int, ...]:
        """Rows and columns."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size


def plan(options: Options, *, data_dir: str | None, cache_root: Path) -> Plan:
    """The folder's images; pixels are read only when the plan is carried out.

    Raises:
      DataError: no folder, no files that match, masks among them, too few to split, no image that can be read, or a
        table of labels that cannot be used.
    """
    folder = required_folder(data_dir, "the images")
    files = matching_files(folder, options, _SUFFIXES)
    refuse_masks(folder, files, stored_values)
    arrangement = arranged(list(files), folder, options)
    channels: int = options.channels or first_readable(files.values(), stored_channels)
    ignored = IgnoredFields()

    def examples(split: str) -> Iterator[Example | Skipped]:
        if split == SPLITS[0] and not options.channels:
            _require_channels(list(files.values()))
        brightest = 0.0

        def example(name: str) -> Example:
            nonlocal brightest
            unit, units = read_image(files[name], channels, options.value_range, ignored)
            brightest = max(brightest, float(unit.max())) if units.dtype == "uint16" else brightest
            return Example(_fitted(unit, options), name, arrangement.label(name), units=units)

        for name in arrangement.splits[split]:
            yield example_or_skipped(name, functools.partial(example, name))
        if 0 < brightest < _DARK and not options.value_range:
            _log.warning(
                "%s: 16-bit images of the %s split reach only %.2g of their range; if they hold fewer bits, set "
                "data.value_range, as in (0, 4095)",
                folder,
                split,
                brightest,
            )

    splits = {
        split: PlannedSplit(len(arrangement.splits[split]), functools.partial(examples, split)) for split in SPLITS
    }
    about = about_files("image_folder", folder, options, files) | arrangement.about
    return _plan(options, channels, splits, about, **arrangement.of_plan)


def finer(options: Options, scale: int, *, data_dir: str | None, cache_root: Path) -> Options:
    """The options of a grid `scale` times finer over the same field of view."""
    size = options.size
    return replace(options, size=scale * size if isinstance(size, int) else tuple(scale * side for side in size))


def mask_of(options: Options, path: Path, image: Path) -> np.ndarray:
    """The labels of a mask file on the grid of the signal that its image file becomes, [*grid]."""
    values = read_mask(path, image)
    require_labels(path, values)
    return nearest(values, options.grid, _steps(values.shape, options))


def new_files(folder: Path, options: Options) -> dict[str, Path]:
    """The files in a folder of new signals, by name."""
    return matching_files(folder, options, _SUFFIXES)


def plan_new(
    options: Options, folder: Path, files: Mapping[str, Path], *, grid: tuple[int, ...], channels: int
) -> Plan:
    """New files, all in the split "new", as `plan` would make them."""
    ignored = IgnoredFields()

    def example(name: str) -> Example:
        unit, units = read_image(files[name], channels, options.value_range, ignored)
        return Example(_fitted(unit, options), name, units=units)

    about = about_files("image_folder", folder, options, files)
    return _plan(options, channels, splits_by_name({NEW: list(files)}, example), about)


def example_of(
    options: Options, values: np.ndarray, name: str, *, affine: np.ndarray | None, grid: tuple[int, ...], channels: int
) -> Example:
    """One image [H, W] or [H, W, D]: its type's range, or `value_range`, becomes [0, 1]."""
    values = values if values.ndim == 3 else values[..., None]
    if values.ndim != 3 or values.shape[2] not in (1, channels):
        raise DataError(f"{name}: an image [H, W] or [H, W, {channels}] is needed, got {values.shape}")
    if not options.value_range and values.dtype not in (np.uint8, np.uint16):
        raise DataError(
            f"{name}: {values.dtype} pixels have no range of their own; give uint8 or uint16, or a field trained with "
            "data.value_range"
        )
    low, high = options.value_range or (0.0, float(np.iinfo(values.dtype).max))
    unit = (values.astype(np.float32) - np.float32(low)) / np.float32(high - low)
    clipped = float(np.mean((unit < 0) | (unit > 1)))
    units = Units((float(low),), (float(high - low),), dtype=values.dtype.name, clipped=clipped)
    unit = np.broadcast_to(np.clip(unit, 0, 1), (*values.shape[:2], channels))
    return Example(_fitted(unit, options), name, units=units)


def _plan(
    options: Options, channels: int, splits: Mapping[str, PlannedSplit], about: dict[str, Any], **labels: Any
) -> Plan:
    return Plan(
        name="image_folder", grid=options.grid, channels=channels, dtype="float32", splits=splits, about=about,
        **labels,
    )  # fmt: skip


def _fitted(unit: np.ndarray, options: Options) -> np.ndarray:
    """[*size, D] with square pixels about the same centre."""
    return np.clip(resample(unit, options.grid, _steps(unit.shape, options)), 0, 1)


def _steps(shape: tuple[int, ...], options: Options) -> tuple[float, float]:
    """From one row or column of the grid to the next, in pixels of an image of this shape."""
    ratios = [have / want for have, want in zip(shape, options.grid, strict=False)]
    step = min(ratios) if options.fit == "crop" else max(ratios)
    return step, step


def _require_channels(paths: list[Path]) -> None:
    """Check the headers first, so that a missing setting of channels is reported before an hour of preparation."""
    by_count: dict[int, list[Path]] = {1: [], 3: []}
    for path in paths:
        with contextlib.suppress(DataError):  # it will be skipped
            by_count[stored_channels(path)].append(path)
    grey, colour = by_count[1], by_count[3]
    if grey and colour:
        raise DataError(
            f"{colour[0]}: 3 channels ({len(colour)} such files), but {grey[0].name} has 1 ({len(grey)} such files); "
            "say which with data.channels, or choose files with data.pattern"
        )
