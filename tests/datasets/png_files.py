"""A plain writer of PNG files, as the specification says: any type of colour and number of bits, and both orders."""

import struct
import zlib

import numpy as np

from tests.datasets.tiff_files import packed

GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6

# The passes of an interlaced image: first row and column, and the steps.
_PASSES = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]


def _chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def write_png(path, samples, *, colour, bits, interlaced=False, transparent=None, palette=None, chunks=()):
    """Write samples [rows, columns, channels]; returns the path.

    `transparent` is the value, or the alpha of each colour of a `palette` [n, 3]; `chunks` are further ones.
    """
    rows, columns, _ = samples.shape
    data = b""
    for top, left, down, across in _PASSES if interlaced else [(0, 0, 1, 1)]:
        for row in samples[top::down, left::across]:
            if row.size:
                data += b"\0" + packed(row.reshape(1, -1), bits, ">")
    content = b"\x89PNG\r\n\x1a\n"
    content += _chunk(b"IHDR", struct.pack(">IIBBBBB", columns, rows, bits, colour, 0, 0, int(interlaced)))
    for name, more in chunks:
        content += _chunk(name, more)
    if palette is not None:
        content += _chunk(b"PLTE", np.asarray(palette, np.uint8).tobytes())
    if transparent is not None:
        kind = np.uint8 if colour == PALETTE else ">u2"
        content += _chunk(b"tRNS", np.atleast_1d(transparent).astype(kind).tobytes())
    path.write_bytes(content + _chunk(b"IDAT", zlib.compress(data)) + _chunk(b"IEND", b""))
    return path
