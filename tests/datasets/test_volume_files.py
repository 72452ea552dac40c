"""Headers of volumes: units of length, scale factors, types and byte orders, affines, and files that are no volumes."""

import gzip
import logging
import tempfile
import tracemalloc
from importlib.resources import files
from pathlib import Path

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medfuncta_jax.datasets import DataError, open_dataset
from medfuncta_jax.datasets.contents import IgnoredFields
from medfuncta_jax.datasets.volume_files import read_volume, volume_header
from medfuncta_jax.datasets.volumes import resample_isotropic
from medfuncta_jax.settings import DataSettings
from tests.datasets.nifti_files import write_nifti

# Codes of xyzt_units and how many of the unit make a millimetre; in the upper bits is the unit of time.
UNITS = {0: 1.0, 2: 1.0, 1: 1e-3, 3: 1e3}

# Oblique, with the first axis to the left and the last two swapped; millimetres.
OBLIQUE = np.array([[-1.1, 0.1, 0.3, 40.0], [0.25, -0.2, 1.6, -20.0], [0.1, 1.2, 0.4, 7.0], [0, 0, 0, 1]])


def _scaled(affine, factor):
    return np.diag([factor, factor, factor, 1.0]) @ affine


def _assert_at_its_place(volume, values, affine):
    """Every voxel of `values` lies in `volume` where `affine` says, with its value."""
    indices = np.stack(np.meshgrid(*map(np.arange, values.shape), indexing="ij"), -1).reshape(-1, 3)
    places = indices @ affine[:3, :3].T + affine[:3, 3]
    back = (places - volume.affine[:3, 3]) @ np.linalg.inv(volume.affine[:3, :3]).T
    found = volume.values[tuple(np.rint(back).astype(int).T)]
    np.testing.assert_allclose(back, np.rint(back), atol=1e-3)
    np.testing.assert_allclose(found, values.reshape(-1), rtol=1e-6, atol=1e-6 * np.abs(values).max())
    assert nibabel.aff2axcodes(volume.affine) == ("R", "A", "S")


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    version=st.sampled_from([1, 2]), order=st.sampled_from("<>"), suffix=st.sampled_from([".nii", ".nii.gz"]),
    kind=st.sampled_from(["u1", "i1", "u2", "i2", "u4", "i4", "f4", "f8", "i8", "u8"]),
    slope=st.sampled_from([0.0, 1.0, 2.5, -0.5, np.nan]), inter=st.sampled_from([0.0, -1024.0, 3.25]),
    unit=st.sampled_from([*UNITS]), time=st.sampled_from([0, 8, 16, 24]),
    place=st.sampled_from(["sform", "qform", "pixdim"]), offset=st.sampled_from([0, 16]), turn=st.integers(0, 47),
)  # fmt: skip
def test_any_nifti_header_is_read_as_it_is_meant(
    version, order, suffix, kind, slope, inter, unit, time, place, offset, turn
):
    rng = np.random.default_rng(turn)
    stored = rng.integers(0, 100, (4, 5, 6)).astype(kind)
    used = slope if np.isfinite(slope) and slope else 1.0
    meant = stored * np.float64(used) + (inter if slope and np.isfinite(slope) else 0)
    # Any of the 48 ways in which axes can lie, at 1, 2 and 3 mm.
    axes = np.eye(3)[rng.permutation(3)] * rng.choice([-1, 1], 3)
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = axes * [1, 2, 3], rng.uniform(-50, 50, 3).round(2)
    factor = UNITS[unit]
    fields = {"scl_slope": slope, "scl_inter": inter, "xyzt_units": unit | time, "pixdim": [1, 1, 2, 3, 1, 1, 1, 1]}
    if place == "sform":
        fields["sform"] = _scaled(affine, factor)
    elif place == "qform":
        # Turned by half around an axis: the quaternion has one entry, and the determinant is the sign of qfac.
        half = int(rng.integers(3))
        affine[:3, :3] = np.diag([1.0 if k == half else -1.0 for k in range(3)]) * [1, 2, 3]
        fields |= {"qform_code": 1, "quatern": np.eye(3)[half], "qoffset": affine[:3, 3] * factor}
    else:  # nothing but spacing is known: nibabel turns the first axis round and puts the centre at 0
        affine[:3, :3] = np.diag([-1.0, 2.0, 3.0])
        affine[:3, 3] = -affine[:3, :3] @ ((np.array(stored.shape) - 1) / 2)
    fields["pixdim"] = [1, 1 * factor, 2 * factor, 3 * factor, 1, 1, 1, 1]
    with tempfile.TemporaryDirectory() as folder:
        path = write_nifti(Path(folder) / f"a{suffix}", stored, version=version, order=order, gap=offset, **fields)
        volume = read_volume(path)
        np.testing.assert_allclose(volume_header(path)[1], affine, atol=1e-3)
    _assert_at_its_place(volume, meant, affine)


@pytest.mark.parametrize("unit", [1, 3])
def test_a_source_does_not_depend_on_the_unit(tmp_path, unit):
    """Signals and affines of files in metres or microns are those of the same files in millimetres; so is 1 mm."""
    values = (np.random.default_rng(0).random((3, 12, 10, 9)) * 1000 - 900).astype(np.int16)
    found, at_1_mm = {}, {}
    for code in (2, unit):
        folder = tmp_path / str(code)
        folder.mkdir()
        for i in range(3):
            affine = _scaled(np.diag([2.0, 2.2, 2.5, 1.0]), UNITS[code])
            path = write_nifti(folder / f"{i}.nii.gz", values[i], sform=affine, xyzt_units=code)
        at_1_mm[code] = resample_isotropic(read_volume(path), 1.0, -1000.0, name="a")
        settings = DataSettings("nifti_folder", str(tmp_path / "cache"), (("grid", (8, 8, 8)),))
        data = open_dataset(settings, data_dir=str(folder))
        found[code] = {one["id"]: one for split in data.splits.values() for one in split}
    for name, one in found[2].items():
        other = found[unit][name]
        assert one["signal"].max() > 0.5
        np.testing.assert_allclose(other["signal"], one["signal"], atol=1e-4)
        np.testing.assert_allclose(other["affine"], one["affine"], atol=1e-3)
    assert at_1_mm[2].values.shape == (24, 22, 22)
    np.testing.assert_allclose(at_1_mm[unit].values, at_1_mm[2].values, atol=0.1)


@pytest.mark.parametrize(("unit", "step"), [("mm", 1.0), ("", 1.0), ("um", 1e-3), ("cm", 10.0), ("m", 1e3)])
def test_analyzes_unit_counts_too(tmp_path, unit, step):
    image = nibabel.AnalyzeImage(np.arange(24, dtype=np.int16).reshape(2, 3, 4), None)
    image.header.set_zooms([1, 2, 3])
    image.header["vox_units"] = unit
    nibabel.save(image, tmp_path / "a.img")
    np.testing.assert_allclose(read_volume(tmp_path / "a.img").spacing, np.array([1, 2, 3]) * step, rtol=1e-6)


def test_fields_that_are_ignored_are_logged_once_a_source(tmp_path, caplog):
    values = np.ones((3, 4, 5), np.int16)
    ignored = IgnoredFields()
    fields = {"xyzt_units": 5, "intent_code": 1002, "cal_max": 700.0, "qform_code": 1, "quatern": [0, 0, 0]}
    with caplog.at_level(logging.WARNING):
        read_volume(write_nifti(tmp_path / "plain.nii", values, sform=OBLIQUE, xyzt_units=10), ignored)
        assert not caplog.records
        for name in ("a.nii", "b.nii"):
            read_volume(write_nifti(tmp_path / name, values, sform=OBLIQUE, **fields), ignored)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 4
    for text in ("its unit of length, 5", "its intent, of code 1002", "cal_max 700", "its qform, which differs"):
        assert any(f"a.nii: {text}" in line for line in said)


def _cifti():
    return (files("nibabel") / "tests/data/row_major.dconn.nii").read_bytes()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.dconn.nii", _cifti, r"unreadable image \(of the kind CIFTI2; volumes in NIfTI, Analyze and MGH are read\)"),
        ("a.nii.gz", lambda: b"<html>404</html>", r"unreadable image \(an HTML page; .*\); download the file itself"),
        ("a.nii.gz", lambda: b"version https://git-lfs.github.com/spec/v1\n", r"\(a Git LFS pointer; .* git lfs pull"),
        ("a.nii", lambda: b"", r"unreadable image \(an empty file; .*\); copy the file anew"),
        ("a.nii.gz", lambda: gzip.compress(b"<html>404</html>"), r"\(an HTML page, compressed by gzip; "),
        ("a.nii", lambda: bytes(128) + b"DICM" + bytes(400), r"unreadable image \(a DICOM file; .*\); convert it"),
    ],
)
def test_what_is_no_volume_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content())
    for read in (read_volume, volume_header):
        with pytest.raises(DataError, match=message) as caught:
            read(tmp_path / name)
        assert len(str(caught.value).splitlines()) == 1
        assert "attribute" not in str(caught.value)


def test_a_file_with_the_wrong_suffix_is_to_be_renamed(tmp_path):
    path = write_nifti(tmp_path / "a.nii", np.ones((3, 4, 5), np.int16), sform=np.eye(4))
    plain = path.read_bytes()
    (tmp_path / "b.nii.gz").write_bytes(plain)
    with pytest.raises(DataError, match=r"b\.nii\.gz: a NIfTI file that is not compressed by gzip; rename .* \.nii$"):
        read_volume(tmp_path / "b.nii.gz")
    path.write_bytes(gzip.compress(plain))
    with pytest.raises(DataError, match=r"a\.nii: a NIfTI file that is compressed by gzip; rename it .* \.nii\.gz"):
        read_volume(path)


def test_a_pair_without_its_voxels(tmp_path):
    nibabel.save(nibabel.Nifti1Pair(np.ones((3, 4, 5), np.int16), np.eye(4)), tmp_path / "a.hdr")
    assert read_volume(tmp_path / "a.hdr").values.shape == (3, 4, 5)
    (tmp_path / "a.img").unlink()
    with pytest.raises(DataError, match=r"a\.hdr: .*a\.img, which belongs to it, is not there; copy both or remove it"):
        read_volume(tmp_path / "a.hdr")


@pytest.mark.parametrize(("kind", "suffix"), [("i2", ".nii"), ("i2", ".nii.gz"), ("f4", ".nii"), ("i4", ".nii.gz")])
def test_besides_the_voxels_there_is_one_copy_in_float32(tmp_path, kind, suffix):
    values = np.add.outer(np.arange(128), np.add.outer(np.arange(128), np.arange(128))).astype(kind)
    path = write_nifti(tmp_path / f"a{suffix}", values, sform=OBLIQUE, scl_slope=2.0)
    read_volume(path)
    tracemalloc.start()
    try:
        volume = read_volume(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < volume.values.nbytes + values.nbytes + (1 << 23)
