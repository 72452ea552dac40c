"""A plain writer of NIfTI files, version 1 and 2, as the specification says."""

import gzip
import struct

import numpy as np

_TYPES = {"u1": 2, "i2": 4, "i4": 8, "f4": 16, "f8": 64, "i1": 256, "u2": 512, "u4": 768, "i8": 1024, "u8": 1280}

# Where the fields of version 1 and 2 lie, and their types.
_FIELDS = {
    1: {"dim": (40, "8h"), "intent_code": (68, "h"), "datatype": (70, "h"), "bitpix": (72, "h"), "pixdim": (76, "8f"),
        "vox_offset": (108, "f"), "scl_slope": (112, "f"), "scl_inter": (116, "f"), "xyzt_units": (123, "B"),
        "cal_max": (124, "f"), "cal_min": (128, "f"), "qform_code": (252, "h"), "sform_code": (254, "h"),
        "quatern": (256, "3f"), "qoffset": (268, "3f"), "srow": (280, "12f")},
    2: {"datatype": (12, "h"), "bitpix": (14, "h"), "dim": (16, "8q"), "pixdim": (104, "8d"), "vox_offset": (168, "q"),
        "scl_slope": (176, "d"), "scl_inter": (184, "d"), "cal_max": (192, "d"), "cal_min": (200, "d"),
        "qform_code": (344, "i"), "sform_code": (348, "i"), "quatern": (352, "3d"), "qoffset": (376, "3d"),
        "srow": (400, "12d"), "xyzt_units": (500, "i"), "intent_code": (504, "i")},
}  # fmt: skip


def write_nifti(path, values, *, version=1, order="<", gap=0, **fields):
    """Write voxels [X, Y, Z, ...], `gap` bytes after the header, with these fields; returns the path.

    `sform` is an affine [4, 4]; others are as in the header, and 0 where they are not given.
    """
    size, start = ((348, 352), (540, 544))[version - 1]
    dim = [values.ndim, *values.shape] + [1] * (7 - values.ndim)
    fields = {
        "dim": dim, "datatype": _TYPES[values.dtype.newbyteorder("=").str[1:]], "bitpix": values.dtype.itemsize * 8,
        "vox_offset": start + gap, "pixdim": [1] * 8,
    } | fields  # fmt: skip
    if "sform" in fields:
        fields |= {"srow": fields.pop("sform")[:3].ravel(), "sform_code": 1}
    header = bytearray(start + gap)
    struct.pack_into(f"{order}i", header, 0, size)
    header[344:348] = b"n+1\0" if version == 1 else header[344:348]
    header[4:12] = b"n+2\0\r\n\x1a\n" if version == 2 else header[4:12]
    for name, value in fields.items():
        place, kind = _FIELDS[version][name]
        struct.pack_into(order + kind, header, place, *np.atleast_1d(value).tolist())
    data = bytes(header) + values.astype(values.dtype.newbyteorder(order)).tobytes(order="F")
    path.write_bytes(gzip.compress(data, 1) if path.suffix == ".gz" else data)
    return path
