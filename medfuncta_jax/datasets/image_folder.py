"""A folder of images (PNG, JPEG, TIFF) of any sizes, brought to one size.

Images are turned as their EXIF orientation says, scaled to [0, 1] by the range of their type, cropped about their
centre (or padded with 0) to the target's aspect and resampled, anti-aliased, with square pixels. Transparent pixels
are black. Grey values become three equal channels where colour is wanted, colours their luma (ITU-R 601) where grey is.
Grey images keep 16 bits; of colours with 16 bits a channel Pillow reads the upper 8.
Labels and splits: see `folder_files.py`; ids are the names relative to the data directory.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from medfuncta_jax.datasets.dataset import (
    SPLITS,
    DataError,
    Example,
    Plan,
    PlannedSplit,
    Skipped,
    example_or_skipped,
    required_folder,
)
from medfuncta_jax.datasets.folder_files import (
    FolderOptions,
    about_files,
    arranged,
    first_readable,
    matching_files,
    require_value_range,
)
from medfuncta_jax.datasets.volumes import resample
from medfuncta_jax.settings import SettingsError

if TYPE_CHECKING:
    from PIL import Image

_log = logging.getLogger(__name__)

_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")

# TIFF's tag for how values are shown, and its value for images in which 0 is white.
_PHOTOMETRIC, _WHITE_IS_ZERO = 262, 0

# 16-bit images that stay below this part of their range are most likely 12-bit ones.
_DARK = 0.25


@dataclass(frozen=True, kw_only=True)
class Options(FolderOptions):
    """Settings of the source, and those of `FolderOptions`.

    Attributes:
      size: pixels, one number for a square or (rows, columns), 2 to 4096 each.
      channels: 1 or 3; 0 takes what the files have, which must then be the same in all.
      fit: "crop" cuts to the aspect of `size` about the centre, "pad" keeps the whole image and pads with 0.
      value_range: (low, high), stored values that become 0 and 1, such as (0, 4095) for 12 bits in 16; empty takes the
        range of the type. Needed for 32-bit images, which have none.
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
      DataError: no folder, no files that match, too few to split, no image that can be read, or a table of labels that
        cannot be used.
    """
    folder = required_folder(data_dir, "the images")
    files = matching_files(folder, options, _SUFFIXES)
    arrangement = arranged(list(files), folder, options)
    channels: int = options.channels or first_readable(files.values(), _stored_channels)

    def examples(split: str) -> Iterator[Example | Skipped]:
        if split == SPLITS[0] and not options.channels:
            _require_channels(list(files.values()))
        brightest = 0.0

        def example(name: str) -> Example:
            nonlocal brightest
            unit, deep = read_image(files[name], channels, options.value_range)
            brightest = max(brightest, float(unit.max())) if deep else brightest
            return Example(_fitted(unit, options), name, arrangement.label(name))

        for name in arrangement.splits[split]:
            yield example_or_skipped(name, functools.partial(example, name))
        if 0 < brightest < _DARK and not options.value_range:
            _log.warning(
                "%s: 16-bit images of the %s split reach only %.2g of their range; if they hold fewer bits, set "
                "--config.data.value_range, as in (0, 4095)",
                folder,
                split,
                brightest,
            )

    return Plan(
        name="image_folder",
        grid=options.grid,
        channels=channels,
        dtype="float32",
        splits={
            split: PlannedSplit(len(arrangement.splits[split]), functools.partial(examples, split)) for split in SPLITS
        },
        classes=arrangement.classes,
        task=arrangement.task,
        about=about_files("image_folder", folder, options, files) | arrangement.about,
    )


def read_image(path: Path, channels: int, value_range: tuple[float, ...] = ()) -> tuple[np.ndarray, bool]:
    """An image file, turned upright and scaled to [0, 1].

    Args:
      path: PNG, JPEG or TIFF; other formats are refused whatever the suffix.
      channels: 1 or 3.
      value_range: see `Options`.
    Returns:
      float32 [rows, columns, channels] in [0, 1], and whether the file holds 16 bits a pixel.
    Raises:
      DataError: names the file: truncated, corrupt, too large, of several pages, or without a range.
    """
    from PIL import ImageOps

    with _opened(path) as image:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of metadata; pixels that are cut off raise
                image.load()
                deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")
                inverted = deep and getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == _WHITE_IS_ZERO
                image = ImageOps.exif_transpose(image)
        except Exception as error:  # Pillow's decoders raise nearly anything on broken data
            raise _unreadable(path, error) from error
    if deep or image.mode in ("I", "F"):
        if not deep and not value_range:
            raise DataError(
                f"{path}: 32-bit pixels have no range of their own; say which values are black and white with "
                "--config.data.value_range"
            )
        values = np.asarray(image).astype(np.float32)
        if not np.isfinite(values).all():
            raise DataError(f"{path}: some pixels are NaN or infinite; repair or remove the file")
        values = np.repeat((65535 - values if inverted else values)[..., None], channels, axis=2)
        low, high = value_range or (0.0, 65535.0)
    else:
        image = _without_alpha(image).convert("L" if channels == 1 else "RGB")
        values = np.asarray(image, np.float32).reshape(image.height, image.width, channels)
        low, high = value_range or (0.0, 255.0)
    return np.clip((values - np.float32(low)) / np.float32(high - low), 0, 1), deep


def _fitted(unit: np.ndarray, options: Options) -> np.ndarray:
    """[*size, D] with square pixels about the same centre."""
    ratios = [have / want for have, want in zip(unit.shape, options.grid, strict=False)]
    step = min(ratios) if options.fit == "crop" else max(ratios)
    return np.clip(resample(unit, options.grid, (step, step)), 0, 1)


def _opened(path: Path) -> Image.Image:
    from PIL import Image

    try:
        with warnings.catch_warnings():
            # What Pillow only warns of: an image that is large but not yet refused, metadata that is cut off.
            warnings.simplefilter("ignore")
            image = Image.open(path, formats=("PNG", "JPEG", "TIFF", "MPO"))
            pages = getattr(image, "n_frames", 1) if image.format == "TIFF" else 1
    except Exception as error:  # as above
        raise _unreadable(path, error) from error
    if pages > 1:
        image.close()
        raise DataError(f"{path}: a stack of {pages} pages; split it into one file a page")
    return image


def _unreadable(path: Path, error: Exception) -> DataError:
    if isinstance(error, FileNotFoundError):
        return DataError(f"{path}: no such file")
    reason = " ".join(str(error).replace(repr(str(path)), "").replace(str(path), "").split()).strip(" '\":.")
    kind = "truncated" if "truncated" in reason.lower() else "unreadable"
    return DataError(f"{path}: {kind} image ({reason or type(error).__name__}); copy the file anew or remove it")


def _stored_channels(path: Path) -> int:
    """1 or 3 by the header."""
    with _opened(path) as image:
        if image.mode == "P":
            colours = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
            return 1 if (colours == colours[:, :1]).all() else 3
        return 1 if image.mode in ("1", "L", "LA", "La", "I", "F") or image.mode.startswith("I;16") else 3


def _require_channels(paths: list[Path]) -> None:
    """Headers first: which channels are wanted should not be asked after an hour of preparing."""
    by_count: dict[int, list[Path]] = {1: [], 3: []}
    for path in paths:
        with contextlib.suppress(DataError):  # it will be skipped
            by_count[_stored_channels(path)].append(path)
    grey, colour = by_count[1], by_count[3]
    if grey and colour:
        raise DataError(
            f"{colour[0]}: 3 channels ({len(colour)} such files), but {grey[0].name} has 1 ({len(grey)} such files); "
            "say which with --config.data.channels, or choose files with --config.data.pattern"
        )


def _without_alpha(image: Image.Image) -> Image.Image:
    """Transparent pixels over black."""
    from PIL import Image

    if "A" not in image.getbands() and "transparency" not in image.info:
        return image
    coloured = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", coloured.size, (0, 0, 0, 255)), coloured).convert("RGB")
