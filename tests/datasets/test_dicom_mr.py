"""MR series from DICOM: their places in space by their own headers, stacks, and what is no slice."""

import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest

pydicom = pytest.importorskip("pydicom", reason="the extra dicom is not installed")

from medfuncta_jax.datasets import DataError  # noqa: E402
from medfuncta_jax.datasets.dicom import read_scan  # noqa: E402
from medfuncta_jax.datasets.dicom_file import CT, MR, LeftOut, read_header  # noqa: E402
from tests.datasets.dicom_files import SIZE, write_series  # noqa: E402

# Sagittal, and turned about two axes.
SAGITTAL = (0, 1, 0, 0, 0, -1)
_A, _B = np.deg2rad((20, 35))
OBLIQUE = (np.cos(_A), np.sin(_A), 0, -np.sin(_A) * np.cos(_B), np.cos(_A) * np.cos(_B), np.sin(_B))


def write_mr(folder, *, direction=OBLIQUE, rescale=None, seed=0, change=None, **options):
    """A series of `write_series` as an MR whose slices lie 3 mm apart along the normal of `direction`."""
    normal = np.cross(direction[:3], direction[3:])

    def as_mr(dataset, k):
        dataset.SOPClassUID, dataset.Modality = MR.image, "MR"
        dataset.ImageType = ["ORIGINAL", "PRIMARY", "M", "SE"]
        dataset.SeriesDescription, dataset.EchoTime = "t1 mprage", "2.5"
        dataset.ImageOrientationPatient = [round(float(one), 12) for one in direction]
        dataset.ImagePositionPatient = [round(float(one), 6) for one in np.array([-20.0, 31.0, 12.0]) + 3 * k * normal]
        del dataset.RescaleSlope, dataset.RescaleIntercept
        if rescale:
            dataset.RescaleSlope, dataset.RescaleIntercept = rescale
        if change is not None:
            change(dataset, k)

    return write_series(folder, seed=seed, change=as_mr, **options)


def header_places(path):
    """Place [rows, columns, 3] of each pixel, mm in RAS+, and its value: equation C.7.6.2.1-1 of the standard."""
    file = pydicom.dcmread(path)
    row, column = (np.array(file.ImageOrientationPatient[k : k + 3], float) for k in (0, 3))
    between_rows, between_columns = map(float, file.PixelSpacing)
    i, j = np.meshgrid(np.arange(file.Rows), np.arange(file.Columns), indexing="ij")
    places = np.array(file.ImagePositionPatient, float) + (
        j[..., None] * between_columns * row + i[..., None] * between_rows * column
    )
    values = file.pixel_array * float(file.get("RescaleSlope", 1)) + float(file.get("RescaleIntercept", 0))
    return places * (-1, -1, 1), values


def assert_at_header_places(volume, paths):
    """Every pixel of every file has its value in the volume where the file's own header puts it."""
    back = np.linalg.inv(volume.affine)
    for path in paths:
        places, values = header_places(path)
        index = places @ back[:3, :3].T + back[:3, 3]
        np.testing.assert_allclose(index, np.rint(index), atol=1e-3)
        found = volume.values[tuple(np.rint(index).astype(int).reshape(-1, 3).T)]
        np.testing.assert_allclose(found, values.ravel(), rtol=1e-6)


@pytest.mark.parametrize("direction", [SAGITTAL, OBLIQUE, (1, 0, 0, 0, 0, -1)])
@pytest.mark.parametrize("rescale", [None, ("0.5", "-7")])
def test_every_pixel_lies_where_its_header_says(tmp_path, direction, rescale):
    paths = write_mr(tmp_path, direction=direction, rescale=rescale)
    scan = read_scan(tmp_path, MR)
    assert sorted(scan.volume.values.shape) == [6, SIZE, SIZE]
    assert np.abs(scan.volume.affine[:3, :3]).argmax(0).tolist() == [0, 1, 2]  # RAS+
    assert_at_header_places(scan.volume, paths)


def test_the_geometry_of_a_real_series(tmp_path):
    """A real MR header, turned by 49 degrees, its slice set forth along its normal; nibabel's reader of Siemens headers
    agrees on every place."""
    nibabel = pytest.importorskip("nibabel")
    real = Path(nibabel.__file__).parent / "nicom" / "tests" / "data" / "slicethickness_empty_string.dcm"
    if not real.is_file():
        pytest.skip("the installed nibabel brings no DICOM files")
    paths = []
    for k in range(4):
        file = pydicom.dcmread(real)
        direction = np.array(file.ImageOrientationPatient, float)
        place = np.array(file.ImagePositionPatient, float) + 2.5 * k * np.cross(direction[:3], direction[3:])
        file.ImagePositionPatient = [f"{one:.10g}" for one in place]
        pixels = np.random.default_rng(k).integers(0, 4000, (file.Rows, file.Columns)).astype("<u2")
        file.PixelData = pixels.tobytes()
        file["PixelData"].VR = "OW"
        file.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        paths.append(tmp_path / f"{9 - k}.dcm")
        file.save_as(paths[-1])
    scan = read_scan(tmp_path, MR)
    assert_at_header_places(scan.volume, paths)
    back = np.linalg.inv(scan.volume.affine) @ np.diag([-1, -1, 1, 1])
    with warnings.catch_warnings(action="ignore"):  # that it is experimental
        from nibabel.nicom.dicomwrappers import wrapper_from_file

        wrappers = [wrapper_from_file(path) for path in paths]
    for wrapper in wrappers:
        values, affine = wrapper.get_pixel_array(), back @ wrapper.affine
        rows, columns = np.indices(values.shape).reshape(2, -1)
        index = affine[:3, :2] @ np.stack([rows, columns]) + affine[:3, 3:]
        found = scan.volume.values[tuple(np.rint(index).astype(int))]
        np.testing.assert_array_equal(found, values.ravel())


def test_echoes_of_one_series_are_stacks_of_their_own(tmp_path):
    def second(dataset, k):
        dataset.EchoTime = "90"

    first = write_mr(tmp_path / "a", seed=1)
    write_mr(tmp_path / "b", seed=2, count=4, change=second)
    scan = read_scan(tmp_path, MR)
    assert_at_header_places(scan.volume, first)
    assert any("EchoTime 90" in note and "left out: 4 slices" in note for note in scan.notes)


def test_a_series_is_chosen_by_its_description(tmp_path):
    def other(dataset, k):
        dataset.SeriesDescription = "T2 FLAIR"

    write_mr(tmp_path / "a", seed=1)
    chosen = write_mr(tmp_path / "b", seed=2, count=4, series="1.2.9", change=other)
    assert_at_header_places(read_scan(tmp_path, MR, "flair").volume, chosen)
    with pytest.raises(DataError, match="no series described as 'dwi'; there are T2 FLAIR, t1 mprage"):
        read_scan(tmp_path, MR, "dwi")


def test_padding_is_nothing(tmp_path):
    def padded(dataset, k):
        dataset.PixelPaddingValue = -2000
        dataset["PixelPaddingValue"].VR = "SS"

    paths = write_mr(tmp_path, change=padded)
    values = read_scan(tmp_path, MR).volume.values
    assert (pydicom.dcmread(paths[0]).pixel_array == -2000).any()
    assert not (values == -2000).any()


def test_what_is_no_slice_of_the_kind(tmp_path):
    def mosaic(dataset, k):
        dataset.ImageType = ["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"]

    one = write_mr(tmp_path / "mosaic", count=1, change=mosaic)[0]
    assert read_header(one, MR) == LeftOut(one, "a mosaic of slices, which is not read")
    mr = write_mr(tmp_path / "mr")
    assert read_header(mr[0], CT) == LeftOut(mr[0], "no CT image but MR Image Storage")
    shutil.rmtree(tmp_path / "mr")
    write_series(tmp_path / "ct")
    with pytest.raises(DataError, match=r"no MR slices in it; .*no MR image but CT Image Storage"):
        read_scan(tmp_path, MR)


def test_pydicoms_mr_files_are_slices_or_say_why():
    folder = Path(pydicom.__file__).parent / "data" / "test_files"
    if not folder.is_dir():
        pytest.skip("the installed pydicom brings no files")
    seen = 0
    for path in sorted(folder.rglob("*")):
        with warnings.catch_warnings(action="ignore"):
            try:
                file = pydicom.dcmread(path, stop_before_pixels=True)
            except (pydicom.errors.InvalidDicomError, OSError, ValueError, EOFError):  # none of the files asked for
                continue
        if path.is_file() and file.get("SOPClassUID") == MR.image and "ImagePositionPatient" in file:
            header = read_header(path, MR)
            if isinstance(header, LeftOut):
                assert header.reason in ("localiser", "a mosaic of slices, which is not read"), path
                continue
            np.testing.assert_allclose(header.position, [float(one) for one in file.ImagePositionPatient])
            seen += 1
    assert seen > 10
