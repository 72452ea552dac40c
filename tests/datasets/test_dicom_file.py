"""Headers of DICOM slices: stored bits, padding, sign, byte order, coding, rescaling; and strangers beside slices."""

import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medfuncta_jax.datasets import DataError

pydicom = pytest.importorskip("pydicom", reason="the extra dicom is not installed")

from medfuncta_jax.datasets.dicom import read_ct  # noqa: E402
from medfuncta_jax.datasets.dicom_file import LeftOut, Slice, hounsfield, read_header  # noqa: E402
from tests.datasets.damage import assert_refusal  # noqa: E402
from tests.datasets.dicom_files import SIZE, phantom, recode, rewrite, write_series  # noqa: E402

NATIVE = ("ImplicitVRLittleEndian", "ExplicitVRLittleEndian", "ExplicitVRBigEndian", "DeflatedExplicitVRLittleEndian")
CODE_STREAMS = ("JPEG2000Lossless", "JPEGLSLossless", "JPEGLosslessProcess14_1")
PADDING, LIMIT = 0x00280120, 0x00280121


def _written(folder, values, syntax, *, stored, high, signed, overlay, padding, slope, intercept):
    """One slice of these values, in the stored bits alone or among others; `padding` as (value, limit, VR)."""
    mask = ((1 << stored) - 1) << (high + 1 - stored)
    words = (values << (high + 1 - stored)) & mask
    if overlay:
        words |= np.random.default_rng(1).integers(0, 1 << 16, values.shape) & ~mask & 0xFFFF
    elif signed and high == stored - 1:
        words = values & 0xFFFF  # the sign in all upper bits, as most scanners write it
    coded = syntax in CODE_STREAMS

    def change(dataset, k):
        dataset.PixelRepresentation = int(signed)
        dataset.BitsStored, dataset.HighBit = (16, 15) if coded else (stored, high)
        dataset.RescaleSlope, dataset.RescaleIntercept = str(slope), str(intercept)
        dataset.PixelData = words.astype(">u2" if "Big" in syntax else "<u2").tobytes()
        if padding:
            value, limit, kind = padding
            for tag, number in ((PADDING, value), (LIMIT, limit)):
                if number is not None:
                    dataset.add_new(tag, kind, int(number) & 0xFFFF if kind == "US" else int(number))

    plain = syntax if syntax in NATIVE else "ExplicitVRLittleEndian"
    path = write_series(folder, count=1, syntax=getattr(pydicom.uid, plain), change=change)[0]
    if syntax == "RLELossless":
        rewrite(path, lambda dataset: dataset.compress(pydicom.uid.RLELossless, generate_instance_uid=False))
    elif coded:  # bits above the high bit are then in the code stream too
        recode(path, syntax)

        def said(dataset):
            dataset.BitsStored, dataset.HighBit = stored, stored - 1

        rewrite(path, said)
    return path


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(
    syntax=st.sampled_from([*NATIVE, "RLELossless", *CODE_STREAMS]), stored=st.sampled_from([8, 10, 12, 15, 16]),
    raised=st.booleans(), signed=st.booleans(), overlay=st.booleans(), pads=st.sampled_from(["", "one", "range"]),
    kind=st.sampled_from(["US", "SS"]), slope=st.sampled_from([1.0, 2.0, 0.5]), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_slice_is_read_as_it_is_meant(syntax, stored, raised, signed, overlay, pads, kind, slope, seed):
    stored = stored if syntax in NATIVE else max(stored, 10)  # pydicom writes less in a byte, which it does not read
    low, high = (-(1 << stored - 1), (1 << stored - 1) - 1) if signed else (0, (1 << stored) - 1)
    values = np.random.default_rng(seed).integers(max(low, -1200), min(high, 3000) + 1, (SIZE, SIZE))
    values[:3] = high
    values[3], values[4] = high - 1, low
    padding = None
    if pads == "one":
        padding = (high if seed % 2 else low, None, kind if signed else "US")
    elif pads == "range":
        padding = (high, high - 1, kind if signed else "US")
    padded = np.zeros(values.shape, bool)
    if padding:
        first, last = padding[0], padding[0] if padding[1] is None else padding[1]
        padded = (values >= min(first, last)) & (values <= max(first, last))
    expected = values * slope - 1024
    expected[padded | (expected < -1500)] = -1000
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(action="ignore"):
        path = _written(
            Path(folder), values, syntax, stored=stored, signed=signed,
            high=15 if raised and syntax not in CODE_STREAMS else stored - 1, overlay=overlay, padding=padding,
            slope=slope, intercept=-1024,
        )  # fmt: skip
        header = read_header(path)
        assert isinstance(header, Slice)
        np.testing.assert_array_equal(hounsfield(header), expected)


def test_padding_that_is_told_by_bits_that_are_not_stored(tmp_path):
    """Some scanners write -2000 as a word of 16 bits among values of 12."""
    values = np.random.default_rng(0).integers(0, 4096, (SIZE, SIZE))
    values[4] = 63536 & 0xFFF  # a value like others, if it were not for the upper bits
    words = values.copy()
    words[:3] = 63536

    def change(dataset, k):
        dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 12, 11, 0
        dataset.PixelData = words.astype("<u2").tobytes()
        dataset.add_new(PADDING, "US", 63536)

    found = hounsfield(read_header(write_series(tmp_path, count=1, change=change)[0]))
    np.testing.assert_array_equal(found[:3], -1000)
    np.testing.assert_array_equal(found[3:], values[3:] - 1024.0)


def _without_preamble(path):
    """As files were before there was a meta group."""
    dataset = pydicom.dcmread(path)
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.preamble = None
    dataset.save_as(path, implicit_vr=True, little_endian=True, enforce_file_format=False)
    assert path.read_bytes()[128:132] != b"DICM"


def test_files_without_a_preamble_are_read(tmp_path):
    write_series(tmp_path / "a")
    for path in write_series(tmp_path / "b"):
        _without_preamble(path)
    np.testing.assert_array_equal(read_ct(tmp_path / "b").volume.values, read_ct(tmp_path / "a").volume.values)


def _structures(folder):
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian
    dataset.SOPClassUID, dataset.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.481.3", "1.2.3.9"
    dataset.SeriesInstanceUID, dataset.Modality, dataset.PatientID = "1.2.3", "RTSTRUCT", "P1"
    dataset.save_as(folder / "RS.dcm", enforce_file_format=True)
    return folder / "RS.dcm"


def _directory(folder):
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = pydicom.uid.MediaStorageDirectoryStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.3.8"
    dataset.FileSetID, dataset.DirectoryRecordSequence = "SET", pydicom.Sequence()
    dataset.save_as(folder / "DICOMDIR", enforce_file_format=True)
    return folder / "DICOMDIR"


@pytest.mark.parametrize(
    ("write", "name", "reason"),
    [
        (_structures, "RS.dcm", "no CT image but RT Structure Set Storage"),
        (_structures, "1.dcm", "no CT image but RT Structure Set Storage"),
        (_directory, "DICOMDIR", "no CT image but Media Storage Directory Storage"),
        (_directory, "DICOMDIR.dcm", "no CT image but Media Storage Directory Storage"),
    ],
)
@pytest.mark.parametrize("form", ["as it is", "without preamble", "cut"])
def test_strangers_are_noted_and_left_out(tmp_path, write, name, reason, form):
    write_series(tmp_path)
    path = write(tmp_path).rename(tmp_path / name)
    if form == "without preamble" and write is _structures:
        _without_preamble(path)
    elif form == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    scan = read_ct(tmp_path)
    assert scan.volume.values.shape == (SIZE, SIZE, 6)
    (note,) = scan.notes
    assert reason in note or (form == "cut" and "unreadable DICOM" in note)
    assert f"(first: {name})" in note


def test_pydicoms_own_strangers_are_left_out(tmp_path):
    """Structures, plans, doses, reports, directories and other images of pydicom's, whatever their form."""
    folder = Path(pydicom.__file__).parent / "data" / "test_files"
    names = ["rtstruct.dcm", "rtplan.dcm", "rtplan_truncated.dcm", "rtdose.dcm", "reportsi.dcm", "test-SR.dcm",
             "MR_small.dcm", "liver_1frame.dcm", "image_dfl.dcm", "dicomdirtests/DICOMDIR", "ExplVR_BigEnd.dcm",
             "dicomdirtests/DICOMDIR-implicit", "dicomdirtests/DICOMDIR-bigEnd", "waveform_ecg.dcm"]  # fmt: skip
    write_series(tmp_path)
    for name in names:
        (tmp_path / f"{name.replace('/', ' ')}.dcm").write_bytes((folder / name).read_bytes())
    scan = read_ct(tmp_path)
    assert scan.volume.values.shape == (SIZE, SIZE, 6)
    assert len(scan.files) == 6


@pytest.mark.parametrize(
    ("content", "name", "it"),
    [
        (b"", "slice 9.dcm", "an empty file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "slice 9.dcm", "a Git LFS pointer"),
        (b"<html>404</html>", "slice 9.dcm", "an HTML page"),
        (b"<html>404</html>", "IM0009", "an HTML page"),
        (b"", "IM0009", "an empty file"),
        (b"\0" * 999, "IM0009", "a file of zeros"),
    ],
)
def test_what_stands_for_a_slice_that_did_not_arrive_is_refused(tmp_path, content, name, it):
    write_series(tmp_path, name="IM000{}" if name.startswith("IM") else "slice {}.dcm")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}: no DICOM file; copy the file anew, .* \(it is {it}\)"):
        read_ct(tmp_path)


@pytest.mark.parametrize(("kind", "taken"), [("HU", True), ("US", True), (" hu", True), ("ED", False), ("MGML", False)])
def test_the_type_of_the_rescaling_counts(tmp_path, kind, taken):
    def change(dataset, k):
        dataset.RescaleType = kind

    header = read_header(write_series(tmp_path, count=1, change=change)[0])
    assert isinstance(header, Slice if taken else LeftOut)
    if not taken:
        assert header.reason == f"its RescaleType is {kind}, so its values are no Hounsfield units"


def test_fields_that_are_ignored_are_noted(tmp_path):
    def change(dataset, k):
        dataset.PhotometricInterpretation = "MONOCHROME1"
        dataset.PixelAspectRatio = [2, 1]

    write_series(tmp_path / "a", change=change)
    notes = read_ct(tmp_path / "a").notes
    assert [note.split(" is ignored")[0] for note in notes] == [
        "PhotometricInterpretation MONOCHROME1", "PixelAspectRatio [2, 1]",
    ]  # fmt: skip


@pytest.mark.parametrize("number", [("BitsStored", 17), ("HighBit", 3), ("BitsStored", 0)])
def test_bits_that_cannot_be(tmp_path, number):
    path = write_series(tmp_path, count=1)[0]
    rewrite(path, lambda dataset: setattr(dataset, *number))
    with pytest.raises(DataError, match=r"slice \d\.dcm: unreadable slice \(.*\); copy the file anew") as caught:
        hounsfield(read_header(path))
    assert_refusal(caught.value, path.name)


@pytest.mark.parametrize("syntax", CODE_STREAMS)
def test_a_compressed_image_that_is_cut_is_refused_wherever_it_is_cut(tmp_path, syntax):
    path = write_series(tmp_path, count=1, syntax=pydicom.uid.ExplicitVRLittleEndian)[0]
    recode(path, syntax)
    whole, dataset = path.read_bytes(), pydicom.dcmread(path)
    frame = pydicom.encaps.get_frame(dataset.PixelData, 0, number_of_frames=1)
    np.testing.assert_array_equal(hounsfield(read_header(path)), np.where(phantom(1) < -1500, -1000, phantom(1))[0])
    for length in range(20, len(frame.rstrip(b"\0")) - 1, 29):
        dataset.PixelData = pydicom.encaps.encapsulate([frame[:length]])
        dataset["PixelData"].is_undefined_length = True
        dataset.save_as(path)
        with pytest.raises(DataError, match=r"unreadable slice \(its compressed image ends too early\)"):
            hounsfield(read_header(path))
    for length in range(len(whole) - len(frame), len(whole) - 10, 29):  # no end of the sequence of undefined length
        path.write_bytes(whole[:length])
        header = read_header(path)
        with pytest.raises(DataError, match=r"unreadable slice \((no pixel data in it|its compressed image ends)"):
            hounsfield(header)
