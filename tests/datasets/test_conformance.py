"""The sample files that installed packages bring: each is read as by a reader of another kind, or refused as expected.

nibabel's against a plain statement of NIfTI, pydicom's (and nibabel's DICOM) against pydicom's own pixels with slope
and intercept, images of any package against tifffile, a plain decoder of PNG or Pillow's pixels, wfdb's against wfdb.
A refusal that is not listed here fails, and so does a listed file that is read.
"""

import fnmatch
import functools
import gzip
import importlib.util
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from medfuncta_jax.datasets import DataError
from medfuncta_jax.datasets.image_file import read_image, stored_channels
from medfuncta_jax.datasets.volume_files import read_series, read_volume

_CODE = (".py", ".pyc", ".pyi", ".so", ".md", ".rst", ".m")


@functools.cache
def samples(package, *folders):
    """The files that a package brings in these folders, by their path below the package."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        return {}
    root = Path(spec.origin).parent
    found = [path for folder in folders for path in sorted((root / folder).rglob("*"))]
    return {path.relative_to(root).as_posix(): path for path in found if path.is_file() and path.suffix not in _CODE}


def refusal(read, path):
    """What `read` says of a file that it refuses, in one line that names it; None if it is read."""
    try:
        read(path)
    except DataError as error:
        text = str(error)
        assert len(text.splitlines()) == 1
        assert str(path) in text
        return text
    return None


def expected_refusal(name, expected):
    """The entry of a list of refusals for a file: the first whose pattern fits."""
    return next((text for pattern, text in expected.items() if fnmatch.fnmatch(name, pattern)), None)


NIBABEL = {
    "tests/data/example*d.nii.gz": "4D image (128, 96, 24, 2), a 3D volume is needed",
    "tests/data/example_nifti2.nii.gz": "4D image (32, 20, 12, 2), a 3D volume is needed",
    "tests/data/functional.nii": "4D image (17, 21, 3, 20), a 3D volume is needed",
    "tests/data/resampled_anat_moved.nii": "153 of 1071 voxels are NaN or infinite",
    "tests/data/row_major.dconn.nii": "(of the kind CIFTI2; volumes in NIfTI, Analyze and MGH are read)",
    "tests/data/test.mgz": "4D image (3, 4, 5, 2), a 3D volume is needed",
    "tests/data/*.hdr": ".img, which belongs to it, is not there",
    "tests/data/phantom_EPI_asc_CLEAR_2_1.*": "(of the kind PARREC; ",
    "tests/data/phantom_varscale.*": "(of the kind PARREC; ",
    "tests/data/phantom_truncated.PAR": "(text; ",
    "tests/data/phantom_truncated.REC": "(of an unknown kind; ",
    "tests/data/ADC_Map.PAR": "(text; ",
    "tests/data/*.PAR": ".REC, which belongs to it, is not there",
    "tests/data/minc1*.mnc": "(of the kind MINC1; ",
    "tests/data/tiny.mnc": "(of the kind MINC1; ",
    "tests/data/*.mnc": "(of the kind MINC2; ",
    "tests/data/bad_*.HEAD": "(text; ",
    "tests/data/*.HEAD": "(of the kind AFNI; ",
    "tests/data/*.BRIK*": "(of the kind AFNI; ",
    "*.gii*": "(of the kind GIFTI; ",
    "*.dcm": "(a DICOM file; ",
    "*.dcm.gz": "(a DICOM file, compressed by gzip; ",
    "tests/data/no_header_end_eof.tck": "(text; ",
    "tests/data/*.t[cr]k": "(of an unknown kind; ",
    "tests/data/tinypet.v": "(of an unknown kind; ",
    "tests/data/.gitignore": "(text; ",
    "nicom/tests/data/csa2_zero_len.bin.gz": "its data are damaged or coded in a way that is not read",
    "nicom/tests/data/*.bin*": "(of an unknown kind; ",
    "nicom/tests/data/*.txt": "(text; ",
    "gifti/tests/data/external.dat": "(of an unknown kind; ",
}


def plain_nifti(path):
    """(values [X, Y, Z, T], affine in millimetres) of a NIfTI file, by the specification alone."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    order = "<" if struct.unpack_from("<i", data)[0] in (348, 540) else ">"
    first = struct.unpack_from(f"{order}i", data)[0] == 348

    def field(kind, place, place2):
        found = struct.unpack_from(order + kind[0 if first else 1], data, place if first else place2)
        return found[0] if len(found) == 1 else np.array(found)

    dim, kind = field(("8h", "8q"), 40, 16), field(("h", "h"), 70, 12)
    shape = tuple(dim[1 : 1 + dim[0]])
    start, (slope, inter) = int(field(("f", "q"), 108, 168)), field(("2f", "2d"), 112, 176)
    types = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4"}
    values = np.frombuffer(data, order + types[int(kind)], int(np.prod(shape)), start).reshape(shape, order="F")
    values = values * np.float64(slope) + inter if np.isfinite(slope) and slope else values.astype(np.float64)
    affine, pixdim = np.eye(4), field(("8f", "8d"), 76, 104)
    if field(("h", "i"), 254, 348) > 0:
        affine[:3] = field(("12f", "12d"), 280, 400).reshape(3, 4)
    else:
        assert field(("h", "i"), 252, 344) > 0
        b, c, d = field(("3f", "3d"), 256, 352)
        a = np.sqrt(max(0.0, 1 - b * b - c * c - d * d))
        turn = np.array([
            [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
            [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
            [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
        ])  # fmt: skip
        affine[:3, :3] = turn * pixdim[1:4] * [1, 1, -1 if pixdim[0] < 0 else 1]
        affine[:3, 3] = field(("3f", "3d"), 268, 376)
    unit = field(("B", "i"), 123, 500) & 7
    affine[:3] *= {1: 1e3, 3: 1e-3}.get(int(unit), 1.0)
    return values.reshape(*shape[:3], -1), affine


def assert_same_places(volume, values, affine):
    """Every voxel of `values` has its value in `volume` where `affine` puts it."""
    indices = np.argwhere(np.ones(values.shape, bool))
    back = np.linalg.inv(volume.affine) @ affine
    where = indices @ back[:3, :3].T + back[:3, 3]
    np.testing.assert_allclose(where, np.rint(where), atol=1e-3)
    found = volume.values[tuple(np.rint(where).astype(int).T)]
    np.testing.assert_allclose(found, values.ravel(), rtol=1e-6, atol=1e-6 * max(1.0, np.abs(values).max()))


def test_nibabels_volumes():
    files = samples("nibabel", "tests/data", "gifti/tests/data", "nicom/tests/data")
    assert len(files) > 90
    read = 0
    for name, path in files.items():
        text, expected = refusal(read_volume, path), expected_refusal(name, NIBABEL)
        if expected is None:
            assert text is None, text
            values, affine = plain_nifti(path)
            assert_same_places(read_volume(path), values[..., 0], affine)
            read += 1
        else:
            assert text is not None, f"{name} is read"
            assert expected in text, name
        if expected and "4D image" in expected and ".nii" in name:
            values, affine = plain_nifti(path)
            for t, volume in enumerate(read_series(path)):
                assert_same_places(volume, values[..., t], affine)
            read += 1
    assert read >= 6


# Files of the class of CT images that are no slices: scouts, headers without pixels, and parts of data sets.
DICOM = {
    "data/test_files/dicomdirtests/98892001/CT2N/*": "localiser",
    "data/test_files/dicomdirtests/TINY_ALPHA/*/IM*": "no image in it",
} | {
    f"data/test_files/{name}.dcm": "unreadable DICOM (its class or modality is cut short or wrong)"
    for name in ("UN_sequence", "empty_charset_LEI", "meta_missing_tsyntax", "nested_priv_SQ")
}


def test_dicom_files():
    pydicom = pytest.importorskip("pydicom", reason="the extra dicom is not installed")
    from medfuncta_jax.datasets.dicom_file import AIR, LeftOut, hounsfield, read_header

    files = samples("pydicom", "data") | samples("nibabel", "nicom/tests/data", "tests/data")
    assert len(files) > 200
    slices, others, plain = 0, 0, 0
    for name, path in files.items():
        header = read_header(path)
        with warnings.catch_warnings(action="ignore"):
            try:
                file = pydicom.dcmread(path)
            except pydicom.errors.InvalidDicomError:
                if isinstance(header, LeftOut) and header.reason == "no DICOM file":
                    plain += 1
                    continue
                file = pydicom.dcmread(path, force=True)
            kind = file.get("SOPClassUID") or file.file_meta.get("MediaStorageSOPClassUID", "")
        if expected := expected_refusal(name, DICOM):
            assert isinstance(header, LeftOut), name
            assert header.reason == expected, name
        elif kind == pydicom.uid.CTImageStorage:
            assert not isinstance(header, LeftOut), f"{name}: {header}"
            with warnings.catch_warnings(action="ignore"):
                values = file.pixel_array * float(file.RescaleSlope) + float(file.RescaleIntercept)
                padded = file.pixel_array == file.get("PixelPaddingValue", None)
            np.testing.assert_array_equal(hounsfield(header), np.where((values < -1500) | padded, AIR, values), name)
            slices += 1
        else:
            assert isinstance(header, LeftOut), name
            assert header.reason == f"no CT image but {kind.name}", name
            others += 1
    assert slices >= 12
    assert others > 100
    assert plain > 60


IMAGES = {
    "data/multipage.tif": "a stack of 2 pages",
    "data/multipage_rgb.tif": "TIFF pixels of 3 x 64-bit float samples",
    "data/*.gif": "(a GIF image; PNG, JPEG and TIFF are read); convert it",
}


def plain_png(data):
    """Samples [rows, columns, channels] of a PNG of 8 or 16 bits that is not interlaced; None for another one."""
    columns, rows, bits, colour, _, _, interlaced = struct.unpack_from(">IIBBBBB", data, 16)
    if interlaced or bits < 8 or colour == 3 or b"tRNS" in data or rows * columns > 40_000:
        return None
    at, packed = 8, b""
    while at < len(data):
        (length,) = struct.unpack_from(">I", data, at)
        packed += data[at + 8 : at + 8 + length] if data[at + 4 : at + 8] == b"IDAT" else b""
        at += 12 + length
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    step, stream = channels * bits // 8, zlib.decompress(packed)
    width = columns * step
    before, lines = bytearray(width), []
    for row in range(rows):
        kind, *line = stream[row * (width + 1) : (row + 1) * (width + 1)]
        for i in range(width):
            left, up = line[i - step] if i >= step else 0, before[i]
            corner = before[i - step] if i >= step else 0
            near = sorted((abs(left + up - corner - one), k) for k, one in enumerate((left, up, corner)))[0][1]
            guess = (0, left, up, (left + up) // 2, (left, up, corner)[near])[kind]
            line[i] = (line[i] + guess) & 255
        before = line
        lines.append(bytes(line))
    return np.frombuffer(b"".join(lines), f">u{bits // 8}").reshape(rows, columns, channels)


def _unit(samples):
    unit = samples / np.iinfo(samples.dtype).max
    return unit[..., :-1] * unit[..., -1:] if samples.shape[2] in (2, 4) else unit


def test_images_of_any_package():
    files = {}
    for package, folder in (("PIL", "."), ("skimage", "data"), ("matplotlib", "mpl-data"), ("sklearn", "datasets")):
        files |= samples(package, folder)
    wanted = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".gif")
    files = {name: path for name, path in files.items() if path.suffix.lower() in wanted}
    assert len(files) > 50
    plain = 0
    for name, path in files.items():
        if expected := expected_refusal(name, IMAGES):
            assert expected in (refusal(stored_channels, path) or ""), name
            continue
        channels = stored_channels(path)
        unit, _ = read_image(path, channels)
        samples_of = plain_png(path.read_bytes()) if path.suffix == ".png" else None
        if samples_of is not None:
            meant = _unit(samples_of)
            tolerance = 2.5 / 255 if samples_of.shape[2] in (2, 4) else 1 / 255 if samples_of.itemsize == 2 else 1e-6
            np.testing.assert_allclose(unit, meant, atol=tolerance, err_msg=name)
            plain += 1
            continue
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            over = Image.new("RGBA", image.size, (0, 0, 0, 255))
            meant = np.asarray(Image.alpha_composite(over, image.convert("RGBA")).convert("RGB")) / 255
        np.testing.assert_allclose(unit, meant[..., :channels], atol=1 / 255, err_msg=name)
    assert plain > 20


def test_tiffs_against_tifffile(tmp_path):
    """No package brings a TIFF of one page, so what tifffile writes and reads stands for it."""
    tifffile = pytest.importorskip("tifffile", reason="scikit-image, which brings tifffile, is not installed")
    rng = np.random.default_rng(0)
    for kind, order, packed, tile in (
        ("u1", "<", None, None), ("u1", ">", "zlib", (16, 16)), ("u2", ">", "zlib", None), ("u2", "<", None, (32, 16)),
        ("i2", ">", "zlib", (16, 16)), ("i2", "<", None, None), ("f4", ">", "zlib", None), ("f4", ">", None, (16, 16)),
        ("i1", ">", "zlib", None), ("u4", "<", "zlib", (16, 16)), ("i4", ">", "zlib", None),
    ):  # fmt: skip
        values = rng.integers(0, 120, (40, 50)).astype(kind)
        tifffile.imwrite(tmp_path / "a.tif", values, byteorder=order, compression=packed, tile=tile, photometric=1)
        meant = tifffile.imread(tmp_path / "a.tif").astype(np.float64) / 120
        unit, _ = read_image(tmp_path / "a.tif", 1, (0.0, 120.0))
        np.testing.assert_allclose(unit[..., 0], meant, atol=1e-6, err_msg=f"{kind} {order} {packed} {tile}")


def test_records_of_wfdb():
    wfdb = pytest.importorskip("wfdb", reason="the extra ecg is not installed", exc_type=ImportError)
    headers = {name: path for name, path in samples("wfdb", ".").items() if path.suffix == ".hea"}
    if not headers:
        pytest.skip("the installed wfdb brings no records")
    from medfuncta_jax.datasets.physionet import Record

    for name, path in headers.items():
        lead = wfdb.rdheader(str(path.with_suffix(""))).sig_name[0]
        if not path.with_suffix(".atr").is_file():
            assert refusal(lambda path, lead=lead: Record(path, lead).beats(), path) is not None, name
            continue
        notes = wfdb.rdann(str(path.with_suffix("")), "atr")
        assert {beat.sample for beat in Record(path, lead).beats()} <= set(notes.sample.tolist()), name
