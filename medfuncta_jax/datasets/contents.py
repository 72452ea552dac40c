"""The content type of a file by its first bytes, and the one-line error of a refused file, with the remedy."""

from __future__ import annotations

import gzip
import logging
import lzma
import re
import struct
import zlib
from pathlib import Path

from medfuncta_jax.datasets.dataset import DataError

_log = logging.getLogger(__name__)

_HEAD = 4096

# Names of contents by their first bytes; a dot is any byte. The first match counts.
_STARTS = [
    (rb"version https://git-lfs", "a Git LFS pointer"),
    (rb"/annex/objects/|(\.\./)*\.git/annex/", "a git-annex pointer"),
    (rb".{128}DICM", "a DICOM file"),
    (rb"\x89PNG\r\n\x1a\n", "a PNG image"),
    (rb"\xff\xd8\xff", "a JPEG image"),
    (rb"II\*\0|MM\0\*|II\+\0|MM\0\+", "a TIFF image"),
    (rb"RIFF....WEBP", "a WebP image"),
    (rb"RIFF....WAVE", "a WAV sound"),
    (rb"GIF8", "a GIF image"),
    (rb"BM....\0\0\0\0", "a BMP image"),
    (rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51", "a JPEG 2000 image"),
    (rb"\xff\x0a|\0\0\0\x0cJXL ", "a JPEG XL image"),
    (rb"....ftyp(avif|avis|heic|heix|mif1|msf1)", "an AVIF or HEIF image"),
    (rb"8BPS", "a Photoshop image"),
    (rb"P[1-7fF]\s+[#\d]", "a PNM image"),
    (rb".{344}n[i+][12]\0|.{4}n[i+]2\0", "a NIfTI file"),
    (rb"\x1f\x8b", "a gzip file"),
    (rb"BZh", "a bzip2 file"),
    (rb"\xfd7zXZ\0", "an xz file"),
    (rb"\x28\xb5\x2f\xfd", "a Zstandard file"),
    (rb"PK\x03\x04|PK\x05\x06", "a ZIP archive"),
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (rb"Rar!", "a RAR archive"),
    (rb".{257}ustar", "a tar archive"),
    (rb"%PDF", "a PDF document"),
    (rb"\x89HDF\r\n", "an HDF5 file"),
    (rb"CDF[\x01\x02]", "a netCDF file"),
    (rb"MATLAB 5\.0 MAT-file", "a MATLAB file"),
    (rb"\x93NUMPY", "a NumPy array"),
    (rb".{8}\{\"", "a safetensors file"),
    (rb"NRRD000", "an NRRD file"),
    (rb"ObjectType\s*=", "a MetaImage file"),
    (rb"\x80[\x02-\x05]", "a Python pickle"),
    (rb"(?i)(\xef\xbb\xbf)?\s*(<!--.*?-->\s*)?<(!doctype\s+html|html|head|body)\b", "an HTML page"),
    (rb"(?i)(\xef\xbb\xbf)?\s*<(\?xml|svg|!doctype)\b", "an XML file"),
]
_CONTENTS = [(re.compile(start, re.DOTALL), name) for start, name in _STARTS]

_REMEDIES = {
    "a Git LFS pointer": "fetch the file itself with git lfs pull",
    "a git-annex pointer": "fetch the file itself with git annex get",
    "an HTML page": "download the file itself",
}
_DAMAGED = "copy the file anew or remove it"
_NOT_DATA = ("", "an empty file", "a file of zeros", "text")


def contents(path: Path) -> str:
    """The content type of a file, such as "a WebP image", "an HTML page", "text" or "an empty file"; "" if unknown.

    Raises:
      OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        head = file.read(_HEAD)
    found = _named(head)
    if found != "a gzip file":
        return found
    try:
        inside = zlib.decompressobj(wbits=31).decompress(head, _HEAD)
    except zlib.error:
        return found
    named = _named(inside) if inside else ""
    return f"{named}, compressed by gzip" if named else found


def _named(head: bytes) -> str:
    if not head:
        return "an empty file"
    if not head.strip(b"\0"):
        return "a file of zeros"
    for start, name in _CONTENTS:
        if start.match(head):
            return name
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        encoding = "utf-16"
    elif re.search(rb"[\0-\x08\x0e-\x1a\x1c-\x1f]", head):
        return ""
    else:
        encoding = "utf-8"
    try:
        head.decode(encoding)
    except UnicodeDecodeError as error:
        if error.start < len(head) - 4:  # a character may be cut at the end of what was read
            return ""
    return "text"


def unreadable(path: Path, error: BaseException, kind: str, reads: str, own: tuple[str, ...]) -> DataError:
    """The error for a refused file, by its content and by the type of a library's exception, not by its message.

    Args:
      path: the file.
      error: the exception that was raised; a `DataError` is returned as it is.
      kind: the expected kind of file, such as "image".
      reads: the formats that are read, such as "PNG, JPEG and TIFF".
      own: the names from `contents` for the formats that are read; with "" if these may be unknown bytes.
    """
    if isinstance(error, DataError):
        return error
    if isinstance(error, FileNotFoundError):
        if path.exists():
            return DataError(f"{path}: {error.filename}, which belongs to it, is not there; copy both or remove it")
        return DataError(f"{path}: no such file")
    if isinstance(error, MemoryError):
        return DataError(f"{path}: its {kind} does not fit into memory; make it smaller or remove the file")
    try:
        what = contents(path)
    except OSError as second:
        error, what = second, ""
    if isinstance(error, OSError) and error.errno is not None:
        return DataError(f"{path}: cannot be read ({error.strerror or 'an error of the system'}); check the file")
    if what not in own:
        remedy = _REMEDIES.get(what) or (_DAMAGED if what in _NOT_DATA else "convert it or remove it")
        return DataError(f"{path}: unreadable {kind} ({what or 'of an unknown kind'}; {reads} are read); {remedy}")
    state, reason = _damage(error)
    return DataError(f"{path}: {state} {kind} ({reason}); {_DAMAGED}")


def _damage(error: BaseException) -> tuple[str, str]:
    # Pillow has no type of its own for a file that ends too early.
    if isinstance(error, EOFError) or str(error).lower().startswith(("image file is truncated", "truncated")):
        return "truncated", "it ends too early"
    if isinstance(error, (zlib.error, lzma.LZMAError, gzip.BadGzipFile)):
        return "corrupt", "its compressed bytes are damaged"
    if isinstance(error, NotImplementedError):
        return "unreadable", "its coding is not read"
    if isinstance(error, (SyntaxError, ValueError, KeyError, IndexError, struct.error, OverflowError, TypeError)):
        return "unreadable", "its header is damaged or of a kind that is not read"
    return "unreadable", "its data are damaged or coded in a way that is not read"


class IgnoredFields:
    """Header fields that a source ignores; each is logged once, with the first file that sets it.

    One object serves a source as a whole.
    """

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def __call__(self, path: Path, field: str, value: object) -> None:
        """Log that `field` of a file has a value that is ignored."""
        if field not in self._seen:
            self._seen.add(field)
            _log.warning("%s: %s is ignored, here and in all other files", path, " ".join(f"{field} {value}".split()))
