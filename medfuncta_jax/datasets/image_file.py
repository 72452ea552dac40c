"""Image files (PNG, JPEG, TIFF) read by Pillow, with corrections of its errors.

Honoured: orientation (Exif, XMP, TIFF), the type and number of bits of samples, byte order, fill order, planes, strips
and tiles, the palette, whether 0 is white, alpha and PNG's transparent value, and colour as grey, RGB, YCbCr or CMYK.
Ignored, and logged once a source where it is set: a colour profile other than sRGB, PNG's gamma, pixels that the
resolution makes non-square, TIFF's smallest and largest sample, and GDAL's value for missing data.
Refused: images without a unique reading as grey or colour, such as stacks, CIELab, floats other than 32 bits; and files
that Pillow would read in part, such as a TIFF whose strips or tiles do not lie in the file, or a PNG with a wrong
checksum.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medfuncta_jax.datasets.contents import IgnoredFields, contents, unreadable
from medfuncta_jax.datasets.dataset import DataError
from medfuncta_jax.units import Units

if TYPE_CHECKING:
    from PIL import Image

READS = "PNG, JPEG and TIFF"

_OWN = ("a PNG image", "a JPEG image", "a TIFF image")

# Values converted at a time, so that Pillow's pixels and the result are the only whole copies.
_PART = 1 << 20

# Tags of TIFF, and what some of their values mean.
_BITS, _COMPRESSION, _PHOTOMETRIC, _SAMPLES, _PLANES, _SAMPLE_FORMAT = 258, 259, 262, 277, 284, 339
_STRIPS, _TILES, _WIDTH, _LENGTH, _ROWS = (273, 279), (324, 325), 256, 257, 278
_TILE_WIDTH, _TILE_LENGTH, _FILL_ORDER, _EXTRA, _DEPTH = 322, 323, 266, 338, 32997
_WHITE_IS_ZERO, _SEPARATE, _TIFF_HEADER = 0, 2, 8
_FORMATS = {1: "unsigned", 2: "signed", 3: "float", 4: "undefined", 5: "complex", 6: "complex"}
_IGNORED_TAGS = {
    280: "MinSampleValue", 281: "MaxSampleValue", 340: "SMinSampleValue", 341: "SMaxSampleValue", 42113: "GDAL_NODATA",
}  # fmt: skip

# libtiff returns samples in the processor's byte order for any file; Pillow corrects this for other modes only.
_NATIVE = {"I;16BS": "I;16NS", "I;32BS": "I;32NS", "F;32BF": "F;32NF"}

_GREY = ("1", "L", "LA", "La", "I", "F")
_COLOUR = ("P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")


def read_image(
    path: Path, channels: int, value_range: tuple[float, ...] = (), ignored: IgnoredFields | None = None
) -> tuple[np.ndarray, Units]:
    """An image file, turned upright and scaled to [0, 1]; the module's docstring lists the fields that are read.

    Memory: the pixels as Pillow holds them (4 bytes for a colour, else those of the type) and the result.

    Args:
      path: PNG, JPEG or TIFF; other formats are refused, whatever their suffix.
      channels: 1 or 3.
      value_range: (low, high), stored values that become 0 and 1, or 1 and 0 if 0 is white; empty takes the range of
        the type, which floats, signed and 32-bit samples do not have.
      ignored: called for fields that are ignored.
    Returns:
      float32 [rows, columns, channels] in [0, 1], and the units of the stored values, with their type; if 0 is white,
      of the inverted stored values, so that larger is brighter.
    Raises:
      DataError: names the file: something else, truncated, corrupt, too large, of several pages, of a pixel type that
        is not read, or without a range.
    """
    with _opened(path, whole=True) as image:
        _tell_ignored(path, image, IgnoredFields() if ignored is None else ignored)
        pixels = _Pixels(path, image, value_range)
        _load_upright(image)
        unit = np.empty((image.height, image.width, channels), np.float32)
        rows = max(1, _PART // image.width)
        for top in range(0, image.height, rows):
            part = unit[top : top + rows]
            part[:] = pixels.values(image.crop((0, top, image.width, top + len(part))), channels)
        if not pixels.finite:
            raise DataError(f"{path}: some pixels are NaN or infinite; repair or remove the file")
    unit -= np.float32(pixels.low)
    unit /= np.float32(pixels.high - pixels.low)
    units = Units((pixels.low,), (pixels.high - pixels.low,), dtype=pixels.dtype)
    if value_range:
        units = replace(units, clipped=float(np.mean((unit < 0) | (unit > 1))))
    np.clip(unit, 0, 1, out=unit)
    if pixels.white_is_zero:
        np.subtract(1, unit, out=unit)
    return unit, units


def stored_channels(path: Path) -> int:
    """1 for a grey image, 3 for a coloured one, by the header.

    Raises:
      DataError: as `read_image`.
    """
    with _opened(path) as image:
        if image.mode == "P":
            colours = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
            return 1 if (colours == colours[:, :1]).all() else 3
        return 1 if image.mode in _GREY or image.mode.startswith("I;16") or _grey_with_alpha_in_16(image) else 3


def stored_values(path: Path) -> np.ndarray:
    """The samples of an image as the file holds them, [rows, columns] or [rows, columns, channels].

    Raises:
      DataError: as `read_image`.
    """
    with _opened(path, whole=True) as image:
        return np.array(image)


def read_mask(path: Path, image: Path) -> np.ndarray:
    """The labels of a mask file, turned upright, whole numbers or floats [rows, columns], as the file holds them.

    Labels of an image with a palette are its indices; three equal channels count as one.

    Raises:
      DataError: as `read_image`, a mask in colours, or one with other pixels than its image.
    """
    with _opened(path, whole=True) as opened:
        _load_upright(opened)
        values = np.array(opened)
    if values.ndim == 3:
        if (values[..., :3] != values[..., :1]).any():
            raise DataError(f"{path}: a mask in colours; save its labels as grey values or as indices of a palette")
        values = values[..., 0]
    with _opened(image, whole=True) as opened:
        _load_upright(opened)
        columns, rows = opened.size
    if values.shape != (rows, columns):
        raise DataError(
            f"{path}: a mask of {values.shape[0]}x{values.shape[1]} pixels, its image {image.name} has "
            f"{rows}x{columns}; give the mask on the pixels of its image"
        )
    return values


class _Pixels:
    """The meaning of an image's stored samples: their range, and the conversion to grey or colour.

    Attributes:
      dtype: type of the samples, numpy's name; "uint8" for one bit too.
      low, high: the values that become 0 and 1.
      white_is_zero: whether low becomes 1 and high 0.
      finite: whether all values so far were.
    """

    def __init__(self, path: Path, image: Any, value_range: tuple[float, ...]):
        tags = getattr(image, "tag_v2", {})
        bits, form = (int(np.max(tags.get(tag, 1))) for tag in (_BITS, _SAMPLE_FORMAT))
        self.finite = True
        grey = image.mode in _GREY or image.mode.startswith("I;16")
        self.white_is_zero = grey and image.format == "TIFF" and tags.get(_PHOTOMETRIC, 0) == _WHITE_IS_ZERO
        self._signed_bytes = image.mode == "L" and _FORMATS.get(form) == "signed"
        self._unsigned_words = image.mode == "I" and image.format == "TIFF" and _FORMATS.get(form) != "signed"
        self._two_bytes = _grey_with_alpha_in_16(image)
        self._transparent = _transparent_value(image)
        self._deep = self._two_bytes or image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")
        self._wide = self._deep or image.mode in ("I", "F")
        if self._signed_bytes or (self._wide and not self._deep):
            size = 8 if self._signed_bytes else 16 if bits == 16 else 32
            if not value_range:
                raise DataError(
                    f"{path}: {'signed ' if size < 32 else ''}{size}-bit pixels have no range of their own; say which "
                    "values are black and white with data.value_range"
                )
        top = (1 << bits) - 1 if self._deep and image.format == "TIFF" else 65535 if self._deep else 255
        self.low, self.high = map(float, value_range or (0, top))
        kind = "float" if image.mode == "F" else "uint" if self._unsigned_words or self._deep else "int"
        size = 16 if self._deep or (image.mode == "I" and bits == 16) else 32
        self.dtype = "int8" if self._signed_bytes else f"{kind}{size}" if self._wide else "uint8"

    def values(self, image: Image.Image, channels: int) -> np.ndarray:
        """float32 [rows, columns, 1 or channels] of a part of the image, transparent pixels 0."""
        if self._two_bytes:
            pairs = np.asarray(image).view(">u2").astype(np.float32)
            return pairs[..., :1] * (pairs[..., 1:] / 65535)
        if self._wide:
            stored = np.asarray(image)
            stored = stored.view(np.uint32) if self._unsigned_words else stored
            values = stored.astype(np.float32)
            self.finite &= bool(np.isfinite(values).all())
            if self._transparent is not None:
                values[stored == self._transparent] = 0
            return values[..., None]
        if self._signed_bytes:
            return np.asarray(image).view(np.int8).astype(np.float32)[..., None]
        if image.mode == "La":  # multiplied by alpha already, so over black
            image = image.getchannel(0)
        stored = np.asarray(image).reshape(image.height, image.width, -1)
        image = _over_black(image) if self._transparent is None else image
        image = image.convert("L" if channels == 1 else "RGB")
        values = np.asarray(image).reshape(image.height, image.width, -1)
        if self._transparent is not None:
            values = np.where((stored == self._transparent).all(-1, keepdims=True), 0, values)
        # Pillow itself inverts small grey samples, and the range is of stored samples.
        return np.float32(255) - values if self.white_is_zero else values


def _grey_with_alpha_in_16(image: Any) -> bool:
    """Pillow reads such a PNG as colour, with the upper bytes only."""
    return image.format == "PNG" and image.mode == "RGBA" and bool(image.tile) and image.tile[0][3] == "LA;16B"


def _transparent_value(image: Any) -> np.ndarray | None:
    """PNG's one transparent grey or colour, [1] or [3], on the scale of the pixels that Pillow gives.

    Pillow spreads greys of 2 and 4 bits over 8 and takes the upper 8 of 16 bits of a colour, but not of this value.
    """
    if image.format != "PNG" or image.mode in ("P", "PA") or "transparency" not in image.info:
        return None
    value = np.atleast_1d(image.info["transparency"])
    if image.mode == "1":
        return value > 0
    coding = str(image.tile[0][3])
    return value >> 8 if coding == "RGB;16B" else value * {"L;2": 85, "L;4": 17}.get(coding, 1)


def _over_black(image: Image.Image) -> Image.Image:
    from PIL import Image

    if "A" not in image.getbands() and "transparency" not in image.info:
        return image
    coloured = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", coloured.size, (0, 0, 0, 255)), coloured).convert("RGB")


@contextlib.contextmanager
def _opened(path: Path, *, whole: bool = False) -> Iterator[Any]:
    """An image with its header read and, if `whole`, checked against the file; errors in the block refuse the file."""
    from PIL import Image

    try:
        # Pillow warns of large images and of metadata that is cut off. The file is opened here, because Pillow maps a
        # file that it opens by name, and then swaps the sides of a turned TIFF.
        with warnings.catch_warnings(action="ignore"), open(path, "rb") as file:
            image = Image.open(file, formats=("PNG", "JPEG", "TIFF"))
            if image.format == "TIFF":
                _require_readable_tiff(path, image)
            elif image.format == "PNG" and whole:
                image.verify()
                file.seek(0)
                image = Image.open(file, formats=("PNG",))
            if image.mode not in (*_GREY, *_COLOUR) and not image.mode.startswith("I;16"):
                mode = "CIELab" if image.mode == "LAB" else image.mode
                raise DataError(f"{path}: {mode} pixels are not read; convert them to grey or RGB")
            with image:
                yield image
    except Image.DecompressionBombError as error:
        raise DataError(
            f"{path}: an image of more than {2 * (Image.MAX_IMAGE_PIXELS or 0)} pixels; make it smaller or remove it"
        ) from error
    except Exception as error:  # Pillow's decoders raise nearly anything on broken data
        raise _refusal(path, error) from error


def _refusal(path: Path, error: Exception) -> DataError:
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        # Suppressed: a header too broken to state its pixel type.
        with contextlib.suppress(Exception), warnings.catch_warnings(action="ignore"):
            what = contents(path)
            if what == "a TIFF image" and not _known_pixel_type(tags := _tiff_tags(path)):
                return _unread_pixel_type(path, tags)
            if what == "a JPEG image":
                return DataError(
                    f"{path}: unreadable image (a damaged JPEG, or one of 12 bits, lossless or arithmetic coding); "
                    "copy the file anew, or save it as PNG or TIFF"
                )
    return unreadable(path, error, "image", READS, _OWN)


def _tiff_tags(path: Path) -> Any:
    """The first directory of a TIFF that Pillow does not open."""
    from PIL.TiffImagePlugin import ImageFileDirectory_v2

    with open(path, "rb") as file:
        head = file.read(8)
        head += file.read(8) if 43 in head[2:4] else b""
        tags = ImageFileDirectory_v2(head)
        file.seek(tags.next)
        tags.load(file)
    return tags


def _known_pixel_type(tags: Any) -> bool:
    """Whether the pixel type is known, so that Pillow has another reason not to open the file."""
    from PIL.TiffImagePlugin import OPEN_INFO

    count = tags.get(_SAMPLES, 1)
    bits = tags.get(_BITS, (1,)) * (count if len(tags.get(_BITS, (1,))) == 1 else 1)
    forms = tuple(set(tags.get(_SAMPLE_FORMAT, (1,))))
    key = (tags.prefix, tags.get(_PHOTOMETRIC, 0), forms, tags.get(_FILL_ORDER, 1), bits[:count], tags.get(_EXTRA, ()))
    return key in OPEN_INFO


def _unread_pixel_type(path: Path, tags: Any) -> DataError:
    form = _FORMATS.get(int(np.max(tags.get(_SAMPLE_FORMAT, 1))), "unknown")
    order = "big" if tags.prefix == b"MM" else "little"
    return DataError(
        f"{path}: TIFF pixels of {tags.get(_SAMPLES, 1)} x {max(tags.get(_BITS, (1,)))}-bit {form} samples "
        f"(photometric {tags.get(_PHOTOMETRIC)}, {order}-endian) are not read; save them as 8 or 16 bits unsigned or "
        "32 bits float"
    )


def _require_readable_tiff(path: Path, image: Any) -> None:
    """Refuse a TIFF that Pillow would misread: further pages, planes of 16 bits or turned bits, strips beyond the
    file's end.

    Raises:
      DataError: names the file.
    """
    tags = image.tag_v2
    if image.n_frames > 1 or tags.get(_DEPTH, 1) > 1:
        pages = max(image.n_frames, tags.get(_DEPTH, 1))
        raise DataError(f"{path}: a stack of {pages} pages; split it into one file a page")
    planes = len(image.getbands()) if tags.get(_PLANES) == _SEPARATE else 1
    raw = tags.get(_COMPRESSION, 1) == 1
    if planes > 1 and raw and (max(tags.get(_BITS, (1,))) > 8 or tags.get(_FILL_ORDER, 1) != 1):
        raise _unread_pixel_type(path, tags)
    if not raw and len(image.tile) == 1 and image.tile[0][3][0] in _NATIVE:
        mode, *rest = image.tile[0][3]
        _decode_as(image, (_NATIVE[mode], *rest))
    if _STRIPS[0] in tags:
        offsets, counts = tags[_STRIPS[0]], tags.get(_STRIPS[1])
        needed = math.ceil(tags[_LENGTH] / min(tags.get(_ROWS, tags[_LENGTH]), tags[_LENGTH]))
    else:
        offsets, counts = tags[_TILES[0]], tags.get(_TILES[1])
        needed = math.ceil(tags[_WIDTH] / tags[_TILE_WIDTH]) * math.ceil(tags[_LENGTH] / tags[_TILE_LENGTH])
    used = offsets[: needed * planes]
    # Without compression Pillow itself needs every byte, and a wrong count does no harm.
    ends = [] if raw or not counts else [a + b for a, b in zip(used, counts, strict=False)]
    if len(used) < needed * planes or min(used) < _TIFF_HEADER or max(ends, default=0) > path.stat().st_size:
        raise DataError(f"{path}: truncated image (strips or tiles are missing in it); copy the file anew or remove it")


def _decode_as(image: Any, coding: Any) -> None:
    """Make Pillow read the bytes of an image of one part in another raw mode."""
    (part,) = image.tile
    image.tile = [part._replace(args=coding) if hasattr(part, "_replace") else (*part[:3], coding)]


def _load_upright(image: Any) -> None:
    from PIL import ImageOps

    if _grey_with_alpha_in_16(image):
        _decode_as(image, "RGBA")  # four bytes, as they are
    image.load()
    ImageOps.exif_transpose(image, in_place=True)


def _tell_ignored(path: Path, image: Any, ignored: IgnoredFields) -> None:
    profile = image.info.get("icc_profile") or b""
    if profile and b"sRGB" not in profile and "sRGB".encode("utf-16-be") not in profile:
        ignored(path, "its colour profile", "")
    gamma = image.info.get("gamma")
    if gamma and abs(gamma - 1 / 2.2) > 0.01:
        ignored(path, "its gamma", gamma)
    resolution = image.info.get("dpi") or image.info.get("aspect") or image.info.get("resolution")
    if resolution and all(resolution) and abs(float(resolution[0]) / float(resolution[1]) - 1) > 0.01:
        ignored(path, "that its pixels are not square, by their resolution,", f"{resolution[0]:g} x {resolution[1]:g}")
    tags = getattr(image, "tag_v2", {})
    for tag, name in _IGNORED_TAGS.items():
        if tag in tags:
            ignored(path, name, tags[tag])
    if image.format in ("PNG", "JPEG", "MPO") and getattr(image, "n_frames", 1) > 1:
        ignored(path, "all but the first of its pictures,", image.n_frames)
