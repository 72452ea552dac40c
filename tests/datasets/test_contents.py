"""Kinds of files by their first bytes, refusals by the type of the exception, and ignored fields."""

import gzip
import io
import logging
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medfuncta_jax.datasets import DataError
from medfuncta_jax.datasets.contents import IgnoredFields, contents, unreadable


def _image(kind):
    stored = io.BytesIO()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(stored, kind)
    return stored.getvalue()


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (b"", "an empty file"),
        (bytes(5000), "a file of zeros"),
        (b"Zeit;Wert\n1;2\n", "text"),
        ("naïve é 肺\n".encode() * 900, "text"),
        ("Grüße".encode("utf-16"), "text"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a Git LFS pointer"),
        (b"../../.git/annex/objects/zq/4X/SHA256E-s1--0.dcm", "a git-annex pointer"),
        (b"\n  <!DOCTYPE html>\n<title>404</title>", "an HTML page"),
        (b"<html><head>", "an HTML page"),
        (b'<?xml version="1.0"?><a/>', "an XML file"),
        (_image("PNG"), "a PNG image"),
        (_image("JPEG"), "a JPEG image"),
        (_image("TIFF"), "a TIFF image"),
        (_image("GIF"), "a GIF image"),
        (_image("BMP"), "a BMP image"),
        (_image("PPM"), "a PNM image"),
        (b"RIFF\0\0\0\0WEBPVP8 ", "a WebP image"),
        (bytes(128) + b"DICM\2\0", "a DICOM file"),
        (struct.pack("<i", 348) + bytes(340) + b"n+1\0", "a NIfTI file"),
        (struct.pack(">i", 540) + b"n+2\0\r\n\x1a\n", "a NIfTI file"),
        (gzip.compress(b"<html></html>", mtime=0), "an HTML page, compressed by gzip"),
        (gzip.compress(bytes([7, 1, 200]) * 99, mtime=0), "a gzip file"),
        (b"\x93NUMPY\x01\0", "a NumPy array"),
        (b"\x80\x04\x95\0", "a Python pickle"),
        (bytes([1, 2, 3, 200, 201]), ""),
    ],
)
def test_what_a_file_is(tmp_path, content, name):
    (tmp_path / "x").write_bytes(content)
    assert contents(tmp_path / "x") == name


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (EOFError("libfoo says so"), r"x: truncated image \(it ends too early\); copy the file anew or remove it"),
        (zlib.error("libfoo says so"), r"x: corrupt image \(its compressed bytes are damaged\); copy the file anew"),
        (ValueError("libfoo says so"), r"x: unreadable image \(its header is damaged or of a kind that is not read\)"),
        (NotImplementedError("libfoo says so"), r"x: unreadable image \(its coding is not read\)"),
        (OSError("libfoo says so"), r"x: unreadable image \(its data are damaged or coded in a way"),
        (MemoryError("libfoo says so"), "x: its image does not fit into memory"),
        (PermissionError(13, "Permission denied", "x"), r"x: cannot be read \(Permission denied\); check the file"),
        (FileNotFoundError(2, "No such file", "x.img"), r"x: x\.img, which belongs to it, is not there; copy both"),
        (DataError("x: as said"), "^x: as said$"),
    ],
)
def test_the_type_of_an_error_decides_the_remedy(tmp_path, error, message):
    (tmp_path / "x").write_bytes(_image("PNG"))
    refusal = unreadable(tmp_path / "x", error, "image", "PNG and JPEG", ("a PNG image",))
    with pytest.raises(DataError, match=message):
        raise refusal
    assert "libfoo" not in str(refusal)


def test_something_else_is_named_and_so_is_what_is_read(tmp_path):
    (tmp_path / "x").write_text("<html>")
    refusal = unreadable(tmp_path / "x", ValueError("?"), "image", "PNG and JPEG", ("a PNG image",))
    assert str(refusal).endswith("x: unreadable image (an HTML page; PNG and JPEG are read); download the file itself")
    assert str(unreadable(tmp_path / "y", FileNotFoundError(), "image", "PNG", ())).endswith("y: no such file")


def test_an_ignored_field_is_logged_once(caplog):
    ignored = IgnoredFields()
    with caplog.at_level(logging.WARNING):
        for name in ("a", "b"):
            ignored(Path(name), "cal_max", 7)
            ignored(Path(name), "its gamma", 1)
    assert [record.getMessage() for record in caplog.records] == [
        "a: cal_max 7 is ignored, here and in all other files",
        "a: its gamma 1 is ignored, here and in all other files",
    ]
