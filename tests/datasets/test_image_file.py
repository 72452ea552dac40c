"""Headers of image files: every combination that is written by hand is read as it was meant, or refused in one line."""

import logging
import struct
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, TiffImagePlugin

from medfuncta_jax.datasets import DataError
from medfuncta_jax.datasets.contents import IgnoredFields
from medfuncta_jax.datasets.image_file import read_image, stored_channels
from tests.datasets.damage import assert_refusal
from tests.datasets.png_files import GREY, GREY_ALPHA, PALETTE, RGB, RGBA, write_png
from tests.datasets.tiff_files import COMPRESSIONS, write_tiff

# What each orientation does to an image as it is stored.
TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a.swapaxes(0, 1)[:, ::-1],
    7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],
    8: lambda a: a.swapaxes(0, 1)[::-1],
}
SHAPE = (13, 19)
UNSIGNED, SIGNED, FLOAT, UNDEFINED, COMPLEX = 1, 2, 3, 4, 6

# Bits and format of samples of TIFF; those of 1 bit to 4 are whole bytes in memory.
SAMPLES = {
    **{f"u{bits}": (bits, UNSIGNED, np.uint8) for bits in (1, 2, 4, 8)},
    "u12": (12, UNSIGNED, np.uint16), "u16": (16, UNSIGNED, np.uint16), "u32": (32, UNSIGNED, np.uint32),
    "i8": (8, SIGNED, np.int8), "i16": (16, SIGNED, np.int16), "i32": (32, SIGNED, np.int32),
    "f16": (16, FLOAT, np.float16), "f32": (32, FLOAT, np.float32), "f64": (64, FLOAT, np.float64),
    "undefined": (8, UNDEFINED, np.uint8), "complex": (64, COMPLEX, np.complex64), "u64": (64, UNSIGNED, np.uint64),
}  # fmt: skip

# Those that have values of one meaning in every file in which they are grey, 0 is black and bytes are little-endian.
READ = {"u1", "u2", "u4", "u8", "u12", "u16", "u32", "i8", "i16", "i32", "f32"}


def _values(kind, channels, seed=0):
    bits, form, dtype = SAMPLES[kind]
    rng, shape = np.random.default_rng(seed), (*SHAPE, channels)
    if form in (FLOAT, COMPLEX):
        return (rng.random(shape) * 200 - 100).astype(dtype)
    low = -(2 ** (bits - 1)) if form == SIGNED else 0
    return rng.integers(low, low + 2**bits, shape, np.uint64 if bits == 64 else np.int64).astype(dtype)


def _range(kind):
    """The range to give, and the one that is meant where none is needed."""
    bits, form, _ = SAMPLES[kind]
    if form in (FLOAT, COMPLEX):
        return (-100.0, 100.0), (-100.0, 100.0)
    low = -(2.0 ** (bits - 1)) if form == SIGNED else 0.0
    whole = (low, low + 2.0**bits - 1)
    return (whole if form == SIGNED or bits > 16 else ()), whole


def _expected(values, low, high, orientation, *, white_is_zero=False):
    """A plain statement of what is meant: scaled, over black, upright."""
    unit = (values.astype(np.float64) - low) / (high - low)
    if values.shape[2] in (2, 4):
        unit = unit[..., :-1] * unit[..., -1:]
    unit = np.clip(unit, 0, 1)
    return TURNS[orientation](1 - unit if white_is_zero else unit)


def assert_names_the_pixel_type(error):
    assert "samples (photometric" in str(error) or "of a kind that is not read" in str(error)


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(
    kind=st.sampled_from([*SAMPLES, "u8", "u16", "i16", "f32"]), order=st.sampled_from("<>"),
    compression=st.sampled_from([*COMPRESSIONS]), tile=st.booleans(), separate=st.booleans(),
    photometric=st.sampled_from([0, 1, 1]), channels=st.sampled_from([1, 1, 3, 4]), turned_bits=st.booleans(),
    orientation=st.integers(1, 8),
)  # fmt: skip
def test_any_tiff_is_read_as_it_is_meant_or_refused_by_its_pixel_type(
    kind, order, compression, tile, separate, photometric, channels, turned_bits, orientation
):
    bits, form, _ = SAMPLES[kind]
    values = _values(kind, channels)
    given_range, (low, high) = _range(kind)
    photometric, separate = photometric if channels == 1 else 2, separate and channels > 1
    turned_bits = turned_bits and compression == "none"
    with tempfile.TemporaryDirectory() as folder:
        path = write_tiff(
            Path(folder) / "a.tif", values, bits=bits, form=form, order=order, compression=compression, tile=tile,
            separate=separate, turned_bits=turned_bits, t262=photometric, t274=orientation,
            **({"t338": 2} if channels == 4 else {}),
        )  # fmt: skip
        try:
            unit, units = read_image(path, 3 if channels > 1 else 1, given_range)
        except DataError as error:
            assert_refusal(error, "a.tif")
            plain = kind in READ and channels == 1 and photometric == 1 and order == "<" and not turned_bits
            assert not plain
            assert kind not in ("u8", "u16") or channels != 3 or separate or turned_bits
            assert_names_the_pixel_type(error)
            return
        assert stored_channels(path) == (1 if channels == 1 else 3)
    assert (units.dtype == "uint16") == (kind in ("u12", "u16") and channels == 1)
    # Pillow reads the upper bytes of colours, and rounds what it lays over black.
    tolerance = 2e-6 if channels == 1 else 1 / 255 + 1e-6 if channels == 3 else 2.5 / 255
    expected = _expected(values, low, high, orientation, white_is_zero=photometric == 0)
    np.testing.assert_allclose(unit, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "I;16", "I", "F", "P", "RGB", "RGBA", "CMYK"])
def test_every_mode_and_compression_that_pillow_writes_is_turned(tmp_path, mode, orientation):
    grey = np.add.outer(np.arange(12) * 20, np.arange(9)).astype(np.uint8)
    made = Image.fromarray(grey)
    made = Image.fromarray(grey.astype(np.uint16) * 250) if mode == "I;16" else made.convert(mode)
    info = TiffImagePlugin.ImageFileDirectory_v2()
    info[274] = orientation
    compressions = [None, "tiff_lzw", "tiff_adobe_deflate", "packbits"]
    compressions += {"1": ["group3", "group4"], "L": ["jpeg"], "RGB": ["jpeg"]}.get(mode, [])
    given_range = (0.0, 255.0) if mode in ("I", "F") else ()
    for compression in compressions:
        made.save(tmp_path / "a.tif", compression=compression, tiffinfo=info)
        unit, _ = read_image(tmp_path / "a.tif", 1, given_range)
        info[274] = 1
        made.save(tmp_path / "b.tif", compression=compression, tiffinfo=info)
        plain, _ = read_image(tmp_path / "b.tif", 1, given_range)
        info[274] = orientation
        np.testing.assert_array_equal(unit, TURNS[orientation](plain))
        if mode == "L" and compression != "jpeg":
            np.testing.assert_allclose(plain[..., 0], grey / 255, atol=1e-6)


def test_samples_that_other_readers_turn_round(tmp_path):
    low = np.array([[-128, -1, 0, 127]], np.int8).T[..., None]
    np.testing.assert_allclose(
        read_image(write_tiff(tmp_path / "a.tif", low, form=SIGNED), 1, (-128, 127))[0][:, 0, 0],
        np.array([0, 127, 128, 255]) / 255, atol=1e-7,
    )  # fmt: skip
    high = np.array([[0, 1 << 31, (1 << 32) - 1]], np.uint32).T[..., None]
    unit, _ = read_image(write_tiff(tmp_path / "b.tif", high), 1, (0, 2**32 - 1))
    np.testing.assert_allclose(unit[:, 0, 0], [0, 0.5, 1], atol=1e-6)
    twelve = np.array([[0, 2048, 4095]], np.uint16).T[..., None]
    unit, units = read_image(write_tiff(tmp_path / "c.tif", twelve, bits=12), 1)
    assert units.dtype == "uint16"
    np.testing.assert_allclose(unit[:, 0, 0], [0, 2048 / 4095, 1], atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("f16", "1 x 16-bit float samples"),
        ("f64", "1 x 64-bit float samples"),
        ("complex", "1 x 64-bit complex samples"),
        ("u64", "1 x 64-bit unsigned samples"),
        ("undefined", "1 x 8-bit undefined samples"),
    ],
)
def test_a_pixel_type_that_is_not_read_is_named(tmp_path, kind, message):
    bits, form, _ = SAMPLES[kind]
    path = write_tiff(tmp_path / "a.tif", _values(kind, 1), bits=bits, form=form)
    for read in (stored_channels, lambda path: read_image(path, 1, (0, 1))):
        with pytest.raises(DataError, match=rf"a\.tif: TIFF pixels of {message} .* are not read; save them as"):
            read(path)


@pytest.mark.parametrize(
    ("kind", "size"), [("i8", "signed 8"), ("i16", "signed 16"), ("i32", "32"), ("u32", "32"), ("f32", "32")]
)
def test_types_without_a_range_of_their_own_ask_for_one(tmp_path, kind, size):
    bits, form, _ = SAMPLES[kind]
    path = write_tiff(tmp_path / "a.tif", _values(kind, 1), bits=bits, form=form)
    with pytest.raises(DataError, match=rf"a\.tif: {size}-bit pixels have no range .* data\.value_range"):
        read_image(path, 1)


@pytest.mark.parametrize("kind", ["u1", "u8", "u16", "f32"])
def test_the_range_is_of_stored_values_also_where_0_is_white(tmp_path, kind):
    bits, form, _ = SAMPLES[kind]
    values = _values(kind, 1)
    path = write_tiff(tmp_path / "a.tif", values, bits=bits, form=form, t262=0)
    stored = values * 255.0 if kind == "u1" else values  # one bit is black or white
    expected = _expected(stored, 0.0, 90.0, 1, white_is_zero=True)
    np.testing.assert_allclose(read_image(path, 1, (0, 90))[0], expected, atol=1e-6)


PNGS = [(GREY, 1), (GREY, 2), (GREY, 4), (GREY, 8), (GREY, 16), (RGB, 8), (RGB, 16), (PALETTE, 1), (PALETTE, 2),
        (PALETTE, 4), (PALETTE, 8), (GREY_ALPHA, 8), (GREY_ALPHA, 16), (RGBA, 8), (RGBA, 16)]  # fmt: skip


@settings(max_examples=250, deadline=None, derandomize=True, database=None)
@given(
    type=st.sampled_from(PNGS), interlaced=st.booleans(), transparent=st.booleans(), orientation=st.integers(1, 8),
    seed=st.integers(0, 9),
)  # fmt: skip
def test_any_png_is_read_as_it_is_meant(type, interlaced, transparent, orientation, seed):
    colour, bits = type
    rng, grey = np.random.default_rng(seed), colour in (GREY, GREY_ALPHA)
    channels = {GREY: 1, RGB: 3, PALETTE: 1, GREY_ALPHA: 2, RGBA: 4}[colour]
    values = rng.integers(0, 1 << bits, (*SHAPE, channels)).astype(np.uint16 if bits == 16 else np.uint8)
    values[3:6, 4:8] = values[0, 0]
    unit = values / (2.0**bits - 1)
    extra = {}
    if colour == PALETTE:
        palette, alphas = rng.integers(0, 256, (1 << bits, 3)), rng.integers(0, 256, 1 << bits)
        alphas[0] = 0
        extra = {"palette": palette} | ({"transparent": alphas} if transparent else {})
        unit = palette[values[..., 0]] / 255 * (alphas[values] / 255 if transparent else 1)
    elif colour in (GREY_ALPHA, RGBA):
        unit = unit[..., :-1] * unit[..., -1:]
    elif transparent:
        extra = {"transparent": values[0, 0]}
        unit = np.where((values == values[0, 0]).all(-1, keepdims=True), 0, unit)
    exif = b"MM\0*" + struct.pack(">IHHHIHH", 8, 1, 0x112, 3, 1, orientation, 0) + bytes(4)
    with tempfile.TemporaryDirectory() as folder:
        path = write_png(
            Path(folder) / "a.png", values, colour=colour, bits=bits, interlaced=interlaced, chunks=[(b"eXIf", exif)],
            **extra,
        )  # fmt: skip
        found, units = read_image(path, 1 if grey else 3)
        if colour != PALETTE:
            assert stored_channels(path) == (1 if grey else 3)
    assert (units.dtype == "uint16") == (grey and bits == 16)
    rounded = (transparent and colour == PALETTE) or (bits == 8 and channels in (2, 4)) or (bits == 16 and not grey)
    np.testing.assert_allclose(found, TURNS[orientation](unit), atol=2.5 / 255 if rounded else 2e-6, rtol=0)


def test_colours_of_16_bits_near_the_transparent_one_are_known_by_their_upper_bytes(tmp_path):
    values = np.array([[[0x1200, 0x0034, 0xFF00], [0x1200, 0x0134, 0xFF00]]], np.uint16)
    path = write_png(tmp_path / "a.png", values, colour=RGB, bits=16, transparent=values[0, 0])
    np.testing.assert_allclose(read_image(path, 3)[0][0] * 255, [[0, 0, 0], [0x12, 0x01, 0xFF]], atol=1e-4)


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("tile", [False, True])
def test_a_tiff_that_is_cut_is_refused_wherever_it_is_cut(tmp_path, compression, tile):
    """With its directory moved to the front, so that only strips or tiles are missing."""
    values = np.random.default_rng(0).integers(0, 256, (40, 40, 1), np.uint8)
    whole = write_tiff(tmp_path / "a.tif", values, compression=compression, tile=tile).read_bytes()
    (at,) = struct.unpack_from("<I", whole, 4)
    (count,) = struct.unpack_from("<H", whole, at)
    directory = bytearray(whole[at:])
    moved = len(directory)
    for k in range(count):  # places in the file move back by the length of the directory
        tag, kind, number, value = struct.unpack_from("<HHII", directory, 2 + 12 * k)
        if number * (2 if kind == 3 else 4) > 4:
            struct.pack_into("<I", directory, 2 + 12 * k + 8, value - at + 8)
        if tag in (273, 324) and number > 1:
            for n in range(number):
                place = value - at + 4 * n
                struct.pack_into("<I", directory, place, struct.unpack_from("<I", directory, place)[0] + moved)
    front = whole[:4] + struct.pack("<I", 8) + bytes(directory) + whole[8:at]
    path = tmp_path / "b.tif"
    path.write_bytes(front)
    np.testing.assert_array_equal(read_image(path, 1)[0] * 255, values)
    for length in (*range(moved + 8, len(front) - 1, 97), len(front) - 2):
        path.write_bytes(front[:length])
        try:
            unit, _ = read_image(path, 1)
        except DataError as error:
            assert_refusal(error, "b.tif: truncated" if compression == "none" or length < len(front) - 99 else "b.tif")
        else:  # of what fills up the last tile nothing is seen
            assert tile
            np.testing.assert_array_equal(unit * 255, values)


@pytest.mark.parametrize("tags", [{"t278": 2}, {"t257": 300}, {"t273": (8, 0, 8, 8, 8)}])
@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_strips_that_are_too_few_or_lie_in_the_header(tmp_path, tags, compression):
    values = np.random.default_rng(0).integers(0, 256, (13, 8, 1), np.uint8)
    path = write_tiff(tmp_path / "a.tif", values, compression=compression, **tags)
    with pytest.raises(DataError, match=r"a\.tif: truncated image \(strips or tiles are missing in it\)"):
        read_image(path, 1)


def test_a_png_with_a_wrong_checksum_or_without_its_end_is_refused(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (30, 30, 1), np.uint8)
    whole = write_png(tmp_path / "a.png", values, colour=GREY, bits=8).read_bytes()
    for content in (whole[:-12], whole[:-20], whole[:-30], whole[:200] + bytes([whole[200] ^ 1]) + whole[201:]):
        (tmp_path / "a.png").write_bytes(content)
        with pytest.raises(DataError, match=r"a\.png: (truncated|unreadable) image .*; copy the file anew"):
            read_image(tmp_path / "a.png", 1)


def _webp():
    return b"RIFF\x24\0\0\0WEBPVP8 " + bytes(20)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"hello there, this is no image", r"\(text; PNG, JPEG and TIFF are read\); copy the file anew or remove it"),
        (b"<!doctype html><p>Not found", r"\(an HTML page; PNG, JPEG and TIFF are read\); download the file itself"),
        (b"version https://git-lfs.github.com/spec/v1\n", r"\(a Git LFS pointer; .*\); fetch .* with git lfs pull"),
        (_webp(), r"\(a WebP image; PNG, JPEG and TIFF are read\); convert it or remove it"),
        (bytes(128) + b"DICM", r"\(a DICOM file; PNG, JPEG and TIFF are read\); convert it"),
        (b"", r"\(an empty file; PNG, JPEG and TIFF are read\); copy the file anew"),
        (b"\xff\xd8\xff\xe0" + bytes(40), r"\(a damaged JPEG, or one of 12 bits, lossless or arithmetic coding\)"),
    ],
)
def test_what_is_no_image_is_named(tmp_path, content, message):
    (tmp_path / "a.png").write_bytes(content)
    for read in (stored_channels, lambda path: read_image(path, 1)):
        with pytest.raises(DataError, match=rf"a\.png: unreadable image {message}") as caught:
            read(tmp_path / "a.png")
        assert "MPO" not in str(caught.value)


def test_cielab_and_images_too_large_are_refused(tmp_path, monkeypatch):
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.tif")
    lab = write_tiff(tmp_path / "lab.tif", np.zeros((8, 8, 3), np.uint8), t262=8)
    with pytest.raises(DataError, match=r"lab\.tif: CIELab pixels are not read; convert them to grey or RGB"):
        read_image(lab, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 31)
    with pytest.raises(DataError, match=r"a\.tif: an image of more than 62 pixels; make it smaller or remove it"):
        read_image(tmp_path / "a.tif", 3)


def test_fields_that_are_ignored_are_logged_once_a_source(tmp_path, caplog):
    grey = np.zeros((4, 4, 1), np.uint8)
    chunks = [(b"gAMA", struct.pack(">I", 100000)), (b"pHYs", struct.pack(">IIB", 1000, 2000, 1))]
    path = write_png(tmp_path / "a.png", grey, colour=GREY, bits=8, chunks=chunks)
    write_tiff(tmp_path / "b.tif", grey.astype(np.uint16), t281=4095)
    Image.new("L", (4, 4)).save(tmp_path / "c.jpg", icc_profile=b"some profile of a printer")
    plain = write_png(tmp_path / "d.png", grey, colour=GREY, bits=8, chunks=[(b"gAMA", struct.pack(">I", 45455))])
    ignored = IgnoredFields()
    with caplog.at_level(logging.WARNING):
        read_image(plain, 1, ignored=ignored)
        assert not caplog.records
        for name in ("a.png", "b.tif", "c.jpg", "a.png", "c.jpg"):
            read_image(tmp_path / name, 1, ignored=ignored)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 4
    for text in (f"{path}: its gamma 1.0 is ignored", "pixels are not square", "MaxSampleValue", "colour profile"):
        assert any(text in line for line in said)


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("I;16", 1), ("RGB", 3)])
def test_besides_the_pixels_there_is_one_copy_in_float32(tmp_path, mode, channels):
    rows, columns = 2000, 2500
    values = np.add.outer(np.arange(rows), np.arange(columns))
    made = Image.fromarray(values.astype(np.uint16 if mode == "I;16" else np.uint8))
    (made.convert("RGB") if mode == "RGB" else made).save(tmp_path / "a.tif", tiffinfo={274: 6})
    tracemalloc.start()
    try:
        unit, _ = read_image(tmp_path / "a.tif", channels)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert unit.shape == (columns, rows, channels)
    assert peak < unit.nbytes + 40 * (1 << 20)  # parts; Pillow's own pixels are not traced


def test_16_bits_of_grey_with_alpha_are_grey_and_keep_their_precision(tmp_path):
    rng = np.random.default_rng(0)
    values = rng.integers(0, 1 << 16, (*SHAPE, 2)).astype(np.uint16)
    values[..., 1] = np.where(values[..., 1] > 30000, 65535, 0)
    path = write_png(tmp_path / "a.png", values, colour=GREY_ALPHA, bits=16)
    assert stored_channels(path) == 1
    unit, units = read_image(path, 1)
    assert units.dtype == "uint16"
    np.testing.assert_allclose(unit[..., 0], np.where(values[..., 1] > 0, values[..., 0] / 65535, 0), atol=1e-6)
