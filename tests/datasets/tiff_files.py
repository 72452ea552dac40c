"""A plain writer of TIFF files, as the specification says, with every field that changes what the samples mean."""

import struct
import zlib

import numpy as np

SHORT, LONG = 3, 4


def packed(samples, bits, order):
    """Rows of samples [rows, n] as bytes: whole bytes in the given order, fewer bits from the highest on."""
    if bits >= 8 and bits != 12:
        return samples.astype(samples.dtype.newbyteorder(order)).tobytes()
    places = np.arange(bits - 1, -1, -1)
    spread = (samples[..., None].astype(np.int64) >> places & 1).astype(np.uint8)
    return np.packbits(spread.reshape(len(samples), -1), axis=1).tobytes()


def _lzw(data):
    """A code of nine bits for each byte, and the table cleared before codes grow longer."""
    codes = []
    for start in range(0, max(len(data), 1), 200):
        codes += [256, *data[start : start + 200]]
    text = "".join(f"{code:09b}" for code in [*codes, 257])
    return int(text.ljust(-(-len(text) // 8) * 8, "0"), 2).to_bytes(-(-len(text) // 8), "big")


def _packbits(data):
    runs = (data[i : i + 128] for i in range(0, len(data), 128))
    return b"".join(bytes([len(run) - 1]) + run for run in runs)


COMPRESSIONS = {
    "none": (1, bytes),
    "lzw": (5, _lzw),
    "deflate": (8, zlib.compress),
    "packbits": (32773, _packbits),
}


def _chunks(samples, tile, separate):
    """What lies together in the file: strips of three rows or tiles of 16 x 16, of all samples or of one."""
    for plane in np.moveaxis(samples, 2, 0)[..., None] if separate else [samples]:
        height, width = tile or (3, plane.shape[1])
        for top in range(0, len(plane), height):
            for left in range(0, plane.shape[1], width):
                chunk = plane[top : top + height, left : left + width]
                if tile:
                    edges = [(0, height - chunk.shape[0]), (0, width - chunk.shape[1]), (0, 0)]
                    chunk = np.pad(chunk, edges)
                yield chunk.reshape(len(chunk), -1)


def write_tiff(
    path,
    samples,
    *,
    bits=None,
    form=1,
    order="<",
    compression="none",
    tile=False,
    separate=False,
    turned_bits=False,
    **tags,
):
    """Write samples [rows, columns, channels]; returns the path.

    `bits` of a sample, by default those of the array's type; `form` as in SampleFormat; `order` of bytes; `tile` in
    place of strips; `separate` planes; `turned_bits` for FillOrder 2; `tags` by number, as t262=0, SHORT or a tuple.
    """
    bits = bits or samples.dtype.itemsize * 8
    code, compress = COMPRESSIONS[compression]
    parts = []
    for chunk in _chunks(samples, (16, 16) if tile else None, separate):
        data = packed(chunk, bits, order)
        if turned_bits:
            data = np.packbits(np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")).tobytes()
        parts.append(compress(data))
    rows, columns, channels = samples.shape
    fields = {
        256: (LONG, [columns]), 257: (LONG, [rows]), 258: (SHORT, [bits] * channels), 259: (SHORT, [code]),
        262: (SHORT, [2 if channels > 2 else 1]), 277: (SHORT, [channels]), 284: (SHORT, [2 if separate else 1]),
        339: (SHORT, [form] * channels), 266: (SHORT, [2 if turned_bits else 1]),
    }  # fmt: skip
    places, at = [], 8
    for part in parts:
        places.append(at)
        at += len(part) + len(part) % 2
    offsets, counts = (324, 325) if tile else (273, 279)
    fields |= {offsets: (LONG, places), counts: (LONG, [len(part) for part in parts])}
    fields |= {322: (SHORT, [16]), 323: (SHORT, [16])} if tile else {278: (SHORT, [3])}
    fields |= {int(name[1:]): (SHORT, list(np.atleast_1d(value))) for name, value in tags.items()}
    directory, extra, beyond = b"", b"", at + 2 + 12 * len(fields) + 4
    for tag, (kind, values) in sorted(fields.items()):
        data = struct.pack(f"{order}{len(values)}{'H' if kind == SHORT else 'I'}", *values)
        if len(data) > 4:
            place = struct.pack(f"{order}I", beyond + len(extra))
            extra += data + bytes(len(data) % 2)
        else:
            place = data.ljust(4, b"\0")
        directory += struct.pack(f"{order}HHI", tag, kind, len(values)) + place
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", at)
    body = b"".join(part + bytes(len(part) % 2) for part in parts)
    path.write_bytes(head + body + struct.pack(f"{order}H", len(fields)) + directory + bytes(4) + extra)
    return path
