"""CT series from DICOM: order and place of slices, units, compressed files, and folders that cannot be used."""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medfuncta_jax.datasets import DataError
from medfuncta_jax.datasets.dicom import read_ct

pydicom = pytest.importorskip("pydicom", reason="the extra dicom is not installed")

from tests.datasets.damage import DAMAGE, assert_refusal, damaged  # noqa: E402
from tests.datasets.dicom_files import phantom, recode, rewrite, write_series  # noqa: E402
from tests.real_data import REAL, needs_real  # noqa: E402


def expected(count=6, seed=0):
    """The phantom in RAS+: columns run to the left and rows backwards in DICOM, and air stands for the padding."""
    hounsfield = np.where(phantom(count, seed) < -1500, -1000, phantom(count, seed))
    return hounsfield.transpose(2, 1, 0)[::-1, ::-1]


def refused(folder, message):
    with pytest.raises(DataError, match=message) as caught:
        read_ct(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_slices_are_ordered_and_placed_by_position_alone(tmp_path):
    paths = write_series(tmp_path)
    assert [path.name for path in paths] != sorted(path.name for path in paths)
    scan = read_ct(tmp_path)
    np.testing.assert_array_equal(scan.volume.values, expected())
    np.testing.assert_allclose(scan.volume.spacing, [2.0, 1.5, 2.5])
    assert nibabel.aff2axcodes(scan.volume.affine) == ("R", "A", "S")
    # The first stored pixel of the lowest slice: -20, -30, 100 in DICOM's left, posterior, superior.
    np.testing.assert_allclose(scan.volume.affine @ [15, 15, 0, 1], [20, 30, 100, 1])
    np.testing.assert_allclose(scan.volume.affine @ [0, 0, 5, 1], [20 - 15 * 2, 30 - 15 * 1.5, 100 + 5 * 2.5, 1])
    assert scan.series == "1.2.3"
    assert set(scan.files) == set(paths)
    assert scan.notes == ()


@needs_real
def test_real_series():
    scan = read_ct(REAL / "ct_dicom")
    assert scan.volume.values.shape == (512, 512, 30)
    np.testing.assert_allclose(scan.volume.spacing, [0.576172, 0.576172, 10.0])  # SliceThickness says 1.25
    np.testing.assert_allclose(scan.volume.affine @ [511, 511, 29, 1], [146.699997, 155.300003, -38.75, 1], atol=1e-6)
    assert scan.volume.values.min() >= -1500
    centre = scan.volume.values[256, :, 15]
    assert centre[480:].mean() < -900  # air in front of the chest
    assert centre[:240].max() > 300  # the spine is in its rear half


def test_slope_and_intercept_are_those_of_each_slice(tmp_path):
    def change(dataset, k):
        stored = np.frombuffer(dataset.PixelData, "<i2").astype(np.float64) - 1024
        dataset.RescaleSlope, dataset.RescaleIntercept = str(1 + k), str(-10 * k)
        dataset.PixelData = np.rint((stored + 10 * k) / (1 + k)).astype("<i2").tobytes()

    write_series(tmp_path, change=change)
    assert np.abs(read_ct(tmp_path).volume.values - expected()).max() <= 3.0  # half the largest slope


@pytest.mark.parametrize(
    "syntax",
    ["ImplicitVRLittleEndian", "ExplicitVRLittleEndian", "ExplicitVRBigEndian", "DeflatedExplicitVRLittleEndian"],
)
def test_plain_transfer_syntaxes(tmp_path, syntax):
    write_series(tmp_path, syntax=getattr(pydicom.uid, syntax))
    np.testing.assert_array_equal(read_ct(tmp_path).volume.values, expected())


def test_run_length_encoding(tmp_path):
    def compress(dataset, k):
        dataset.compress(pydicom.uid.RLELossless, generate_instance_uid=False)

    write_series(tmp_path, syntax=pydicom.uid.ExplicitVRLittleEndian, change=compress)
    np.testing.assert_array_equal(read_ct(tmp_path).volume.values, expected())


@pytest.mark.parametrize("syntax", ["JPEGLosslessProcess14_1", "JPEGLSLossless", "JPEG2000Lossless"])
def test_lossless_compression(tmp_path, syntax):
    for path in write_series(tmp_path):
        recode(path, syntax)
    assert pydicom.dcmread(path).file_meta.TransferSyntaxUID.is_compressed
    np.testing.assert_array_equal(read_ct(tmp_path).volume.values, expected())


def test_what_is_not_installed_is_named(tmp_path, monkeypatch):
    def compress(dataset, k):
        dataset.compress(pydicom.uid.RLELossless, generate_instance_uid=False)

    write_series(tmp_path, syntax=pydicom.uid.ExplicitVRLittleEndian, change=compress)
    monkeypatch.setattr(pydicom.pixels, "get_decoder", lambda syntax: type("", (), {"is_available": False}))
    text = refused(tmp_path, r"slice \d\.dcm: compressed as RLE Lossless, for which no decoder is installed")
    assert "pip install 'medfuncta_jax[dicom]'" in text
    monkeypatch.setitem(sys.modules, "pydicom", None)
    refused(tmp_path, "reading DICOM needs pydicom, which is not installed: pip install")


def test_oblique_and_tilted_series_keep_their_place(tmp_path):
    """Slices tilted about the left-right axis: stacked along their normal, and, by a tilted gantry, straight up."""
    angle = np.deg2rad(20)
    column = np.array([0, np.cos(angle), -np.sin(angle)])
    normal = np.array([0, np.sin(angle), np.cos(angle)])
    for kind, direction in (("oblique", normal), ("gantry", np.array([0.0, 0.0, 1.0]))):

        def change(dataset, k, direction=direction):
            dataset.ImageOrientationPatient = [1, 0, 0, *column]
            dataset.ImagePositionPatient = [*np.round(np.array([5.0, 6.0, 7.0]) + 3.0 * k * direction, 6)]

        write_series(tmp_path / kind, change=change)
        volume = read_ct(tmp_path / kind).volume
        np.testing.assert_array_equal(volume.values, expected())
        place = np.array([5, 6, 7]) + 2 * 3.0 * direction + 4 * 1.5 * column + 3 * 2.0 * np.array([1, 0, 0])
        np.testing.assert_allclose(
            volume.affine @ [15 - 3, 15 - 4, 2, 1], [-place[0], -place[1], place[2], 1], atol=1e-5
        )


def test_what_is_no_slice_is_left_out_and_noted(tmp_path):
    write_series(tmp_path / "ct")

    def localiser(dataset, k):
        dataset.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]

    def radiograph(dataset, k):
        dataset.Modality, dataset.SOPClassUID = "DX", "1.2.840.10008.5.1.4.1.1.1.1"

    def annotation(dataset, k):
        dataset.Modality, dataset.SOPClassUID = "SR", "1.2.840.10008.5.1.4.1.1.88.11"
        del dataset.PixelData, dataset.Rows, dataset.Columns, dataset.PixelSpacing

    def multi_frame(dataset, k):
        dataset.NumberOfFrames = 2

    for name, change in {"a": localiser, "b": radiograph, "c": annotation, "d": multi_frame}.items():
        write_series(tmp_path / name, count=2, change=change)  # the same series UID, as some archives have it
    (tmp_path / "LICENSE").write_text("text")
    scan = read_ct(tmp_path)
    np.testing.assert_array_equal(scan.volume.values, expected())
    notes = " ".join(scan.notes)
    for reason in ("localiser", "Digital X-Ray Image Storage", "Basic Text SR", "several frames", "no DICOM file"):
        assert reason in notes


def test_the_largest_axial_series_is_taken(tmp_path):
    def coronal(dataset, k):
        dataset.ImageOrientationPatient = [1, 0, 0, 0, 0, -1]

    write_series(tmp_path / "a", count=4, series="1.1")
    write_series(tmp_path / "b", count=6, series="1.5", seed=3)
    write_series(tmp_path / "c", count=9, series="1.0", change=coronal)
    scan = read_ct(tmp_path)
    assert scan.series == "1.5"
    np.testing.assert_array_equal(scan.volume.values, expected(seed=3))
    assert scan.notes == (
        "series 1.1 left out: 4 axial slices, 1.5 has 6",
        "series 1.0 left out: not axial",
    )


def test_of_two_series_of_equal_number_the_uid_decides_and_that_is_said(tmp_path):
    write_series(tmp_path / "a", series="1.2.9", seed=1)
    write_series(tmp_path / "b", series="1.2.10", seed=2)
    scan = read_ct(tmp_path)
    assert scan.series == "1.2.10"
    np.testing.assert_array_equal(scan.volume.values, expected(seed=2))
    assert scan.notes == ("series 1.2.9 left out: 6 slices as in 1.2.10, whose UID sorts before it",)


def test_missing_slices_are_refused_with_their_positions(tmp_path):
    paths = write_series(tmp_path, count=8)
    paths[3].unlink()
    text = refused(tmp_path, r"slices are missing between the positions 105\.00 and 110\.00 mm, elsewhere .* 2\.50 mm")
    assert str(tmp_path) in text
    paths[6].unlink()
    refused(tmp_path, r"105\.00 and 110\.00, 112\.50 and 117\.50 mm")


def test_rounded_positions_are_no_gap(tmp_path):
    def change(dataset, k):
        dataset.ImagePositionPatient = [-20, -30, round(k * 0.625, 1)]

    write_series(tmp_path, change=change)
    assert read_ct(tmp_path).volume.values.shape[2] == 6


def test_repeated_slices(tmp_path):
    paths = write_series(tmp_path)
    shutil.copy(paths[2], tmp_path / "copy of a slice.dcm")
    scan = read_ct(tmp_path)
    np.testing.assert_array_equal(scan.volume.values, expected())
    assert scan.notes == ("1 slices repeat others, pixel by pixel, and were left out",)
    assert len(scan.files) == 7

    def brighter(dataset):
        dataset.RescaleIntercept = "-1000"

    rewrite(tmp_path / "copy of a slice.dcm", brighter)
    refused(tmp_path, r"\.dcm: lies where .*\.dcm lies and differs from it")


def _rows(dataset):
    dataset.Rows, dataset.PixelData = 8, dataset.PixelData[:256]


def _set(**values):
    def change(dataset):
        for name, value in values.items():
            setattr(dataset, name, value)

    return change


def _without(*names):
    def change(dataset):
        for name in names:
            del dataset[name]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set(ImageOrientationPatient=[0, 1, 0, -1, 0, 0]), "its orientation is not that of the other slices"),
        (_set(PixelSpacing=[1.5, 1.5]), "its pixel grid is not that of the other slices"),
        (_rows, "its pixel grid is not that of the other slices"),
        (_set(ImagePositionPatient=[40.0, -30.0, 105.0]), "not in line with the other slices"),
        (_set(PatientID="P2"), r"slices of 2 patients \(P1, P2\); each needs a folder of its own"),
        (_without("PixelData"), r"unreadable slice \(no pixel data in it\)"),
        (_set(PixelData=bytes(100)), "unreadable slice"),
        (_set(SamplesPerPixel=3, PhotometricInterpretation="RGB", PlanarConfiguration=0), "unreadable slice"),
        (_without("Rows"), "no image in it; copy the file anew"),
        (_without("ImagePositionPatient"), "its ImagePositionPatient is missing or wrong"),
        (_set(ImagePositionPatient=[1.0, 2.0]), "its ImagePositionPatient is missing or wrong"),
        (_set(ImageOrientationPatient=[1, 0, 0, 1, 0, 0]), "no pair of perpendicular directions"),
        (_set(PixelSpacing=[0, 1]), "its PixelSpacing is not above 0"),
        (_without("RescaleIntercept"), "no RescaleSlope or RescaleIntercept"),
        (_set(RescaleSlope="1e300"), "its RescaleSlope or RescaleIntercept is wrong"),
        (_set(RescaleSlope="0"), "its RescaleSlope or RescaleIntercept is wrong"),
        (_set(RescaleIntercept="-1e300"), "its RescaleSlope or RescaleIntercept is wrong"),
        (_set(PixelSpacing=["1e-300", "1e-300"]), "its PixelSpacing is not above 0"),
        (_set(PixelSpacing=["1e300", "1e300"]), "its PixelSpacing is missing or wrong"),
        (_set(ImagePositionPatient=["0", "0", "-1e308"]), "its ImagePositionPatient is missing or wrong"),
        (_set(Rows=65535, Columns=65535), "it claims 65535 x 65535 pixels"),
    ],
)
def test_a_bad_slice_is_named_in_one_line(tmp_path, change, message):
    rewrite(write_series(tmp_path)[2], change)
    text = refused(tmp_path, message)
    assert "slice " in text or "patients" in text


@pytest.mark.parametrize("content", [b"<html>404</html>\n", b"", bytes(128) + b"DICM" + b"junk" * 9])
def test_a_file_of_something_else_named_dcm_is_refused_even_at_the_end(tmp_path, content):
    write_series(tmp_path)[-1].write_bytes(content)
    refused(tmp_path, r"slice \d\.dcm: (no DICOM file|unreadable DICOM).*; copy the file anew")


def test_a_truncated_file_is_named_wherever_it_is_cut(tmp_path):
    path = write_series(tmp_path)[-1]
    whole = path.read_bytes()
    for length in range(0, len(whole), 11):
        path.write_bytes(whole[:length])
        refused(tmp_path, rf"{path.name}: (no DICOM file|unreadable|no image|its \w+ is missing|no Rescale)")


def test_flipped_bytes_end_in_one_line_or_a_volume(tmp_path):
    path = write_series(tmp_path)[0]
    whole, rng = path.read_bytes(), np.random.default_rng(1)
    for _ in range(40):
        damaged = bytearray(whole)
        for place in rng.integers(132, 1000, 3):
            damaged[place] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            assert np.isfinite(read_ct(tmp_path).volume.values).all()
        except DataError as error:
            assert "\n" not in str(error)  # noqa: PT017


def test_line_breaks_in_a_header_make_no_second_line(tmp_path):
    with pydicom.config.disable_value_validation():
        rewrite(write_series(tmp_path / "a")[2], _set(PatientID="P\n2"))
        refused(tmp_path / "a", r"slices of 2 patients \(P 2, P1\)")
        write_series(tmp_path / "b")
        write_series(tmp_path / "b" / "c", count=1, change=lambda dataset, k: _set(SOPClassUID="9\n9")(dataset))
        notes = read_ct(tmp_path / "b").notes
    assert len(notes) == 1
    assert len(notes[0].splitlines()) == 1


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(damage=DAMAGE, whole_series=st.booleans())
def test_any_series_is_read_or_refused_in_one_line(damage, whole_series):
    with tempfile.TemporaryDirectory() as folder:
        for path in write_series(Path(folder), count=3)[:: 1 if whole_series else 3]:
            path.write_bytes(damaged(path.read_bytes(), damage, head=1000))
        try:
            scan = read_ct(Path(folder))
        except DataError as error:
            assert_refusal(error, folder)
            return
    assert scan.volume.values.dtype == np.float32
    assert np.isfinite(scan.volume.values).all()
    assert np.isfinite(scan.volume.affine).all()
    assert all(len(note.splitlines()) == 1 for note in scan.notes)


def test_folders_without_a_volume(tmp_path):
    refused(tmp_path, "no axial CT slices in it$")
    (tmp_path / "notes.txt").write_text("hello")
    refused(tmp_path, r"no axial CT slices in it; 1 files left out: no DICOM file \(first: notes\.txt\)")
    write_series(tmp_path, count=1)
    refused(tmp_path, "only one axial slice in its largest series")


def test_names_with_spaces_and_unicode_and_loops_of_links(tmp_path):
    folder = tmp_path / "Lunge é 肺"
    write_series(folder / "série 1", name="Schnitt {} ü.dcm")
    os.symlink(folder, folder / "série 1" / "loop")
    os.symlink(folder / "nowhere", folder / "broken.dcm")
    os.symlink("self.dcm", folder / "self.dcm")
    (folder / "._Schnitt 1 ü.dcm").write_bytes(b"junk")
    assert read_ct(folder).volume.values.shape == (16, 16, 6)
