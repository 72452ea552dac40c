"""Volumes: orientation, scaling, anti-aliased resampling and where it puts things in space."""

import bz2
import gzip
import struct
import tempfile
from pathlib import Path

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medfuncta_jax.datasets import DataError
from medfuncta_jax.datasets.volumes import (
    Volume,
    crop_or_pad,
    read_volume,
    resample,
    resample_isotropic,
    resample_volume,
    scale_to_unit,
)
from tests.datasets.damage import DAMAGE, assert_refusal, damaged


def _blob(shape):
    """A smooth blob off the centre, zero at the border."""
    grid = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    centre = (0.2, -0.15, 0.1)
    return np.exp(-sum((g - c) ** 2 for g, c in zip(grid, centre, strict=True)) / 0.05).astype(np.float32)


def _centre_of_mass(volume):
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in volume.values.shape), indexing="ij"), -1).reshape(-1, 3)
    mass = volume.values.reshape(-1).astype(np.float64)
    index = (grid * mass[:, None]).sum(0) / mass.sum()
    return volume.affine[:3, :3] @ index + volume.affine[:3, 3]


OBLIQUE = np.array([[-1.1, 0.2, 0.0, 40.0], [0.25, 0.9, -0.3, -20.0], [0.0, 0.4, 2.3, 7.0], [0, 0, 0, 1]])


@pytest.mark.parametrize("spacing", [None, 0.7, 3.0])
@pytest.mark.parametrize("affine", [np.diag([1.0, 1.5, 2.0, 1.0]), OBLIQUE], ids=["straight", "oblique"])
def test_resampling_keeps_tissue_in_its_place(spacing, affine):
    volume = Volume(_blob((60, 50, 33)), affine)
    grid = (24, 30, 28) if spacing is None else (80, 96, 90)
    result = resample_volume(volume, grid, spacing)
    assert result.values.shape == grid
    step = result.spacing
    np.testing.assert_allclose(step, np.full(3, step[0]), rtol=1e-9)
    if spacing:
        np.testing.assert_allclose(step, spacing)
    assert np.linalg.norm(_centre_of_mass(result) - _centre_of_mass(volume)) < 0.05 * step[0]


def test_integer_factor_averages_blocks():
    values = np.random.default_rng(0).random((8, 12, 4)).astype(np.float32)
    expected = values.reshape(2, 4, 3, 4, 1, 4).mean((1, 3, 5))
    np.testing.assert_allclose(resample(values, (2, 3, 1), (4, 4, 4)), expected, rtol=1e-5)


def test_fine_pattern_is_smoothed_not_aliased():
    stripes = np.tile([0.0, 1.0], 60)
    result = resample(stripes, (32,), (3.75,))
    assert np.abs(result - 0.5).max() < 0.15  # picking samples would give 0 and 1


def test_same_grid_is_identity_and_outside_is_zero():
    values = np.random.default_rng(0).random((5, 6)).astype(np.float32)
    np.testing.assert_array_equal(resample(values, (5, 6), (1, 1)), values)
    padded = resample(values, (9, 6), (1, 1))
    np.testing.assert_array_equal(padded[2:7], values)
    assert not padded[:2].any()
    assert not padded[7:].any()


def test_upsampling_is_linear():
    np.testing.assert_allclose(resample(np.arange(4.0), (8,), (0.5,))[1:-1], np.arange(0.25, 3, 0.5), rtol=1e-6)


def test_left_handed_and_permuted_files_become_ras(tmp_path):
    values = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    affine = np.array([[0, 0, -2.0, 10], [1.0, 0, 0, 0], [0, -3.0, 0, 0], [0, 0, 0, 1]])
    nibabel.save(nibabel.Nifti1Image(values, affine), tmp_path / "a.nii.gz")
    volume = read_volume(tmp_path / "a.nii.gz")
    assert nibabel.aff2axcodes(volume.affine) == ("R", "A", "S")
    np.testing.assert_array_equal(volume.values, values.transpose(2, 0, 1)[::-1, :, ::-1])
    np.testing.assert_allclose(volume.spacing, [2, 1, 3])
    index = np.array([0, 1, 2, 1])  # of the file; in RAS+ it is (4 - 1 - 2, 0, 3 - 1 - 1)
    np.testing.assert_allclose(volume.affine @ [1, 0, 1, 1], affine @ index)


def test_scale_factors_are_applied(tmp_path):
    image = nibabel.Nifti1Image(np.zeros((2, 2, 2), np.int16), np.eye(4))
    image.header.set_slope_inter(0.5, -3)
    nibabel.save(nibabel.Nifti1Image(np.full((2, 2, 2), 1.25), np.eye(4), image.header), tmp_path / "a.nii")
    np.testing.assert_allclose(read_volume(tmp_path / "a.nii").values, 1.25, atol=1e-3)


def test_robust_scaling():
    values = np.concatenate([np.linspace(10, 20, 9999), [1e6]]).astype(np.float32)
    unit = scale_to_unit(values, 0.0, 0.999, "a")
    assert unit.min() == 0
    assert unit.max() == 1
    assert abs(unit[5000] - 0.5) < 0.01
    with pytest.raises(DataError, match=r"a\.nii: the volume is constant \(3\)"):
        scale_to_unit(np.full((4, 4), 3.0), 0.001, 0.999, "a.nii")
    with pytest.raises(DataError, match="constant between the quantiles"):
        scale_to_unit(np.eye(100), 0.1, 0.9, "a.nii")


def _saved(path, values):
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), path)
    return path


def test_damaged_files_are_named(tmp_path):
    values = np.random.default_rng(0).random((8, 8, 8)).astype(np.float32)
    path = _saved(tmp_path / "a.nii.gz", values)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    cases = {
        "half": whole[: len(whole) // 2],
        "without its checksum": whole[:-6],
        "flipped": bytes(flipped),
        "empty": b"",
        "text": b"hello",
    }
    for kind, content in cases.items():
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"a\.nii\.gz: (truncated|corrupt|unreadable) image") as caught:
            read_volume(path)
        assert "\n" not in str(caught.value), kind
    plain = _saved(tmp_path / "b.nii", values)
    plain.write_bytes(plain.read_bytes()[:1000])
    with pytest.raises(DataError, match="more than the file can hold"):
        read_volume(plain)
    with pytest.raises(DataError, match="no such file"):
        read_volume(tmp_path / "c.nii")


def test_volumes_of_the_wrong_kind_are_named(tmp_path):
    values = np.ones((4, 4, 4), np.float32)
    values[1, 2, 3] = np.nan
    with pytest.raises(DataError, match=r"nan\.nii\.gz: 1 of 64 voxels are NaN or infinite"):
        read_volume(_saved(tmp_path / "nan.nii.gz", values))
    with pytest.raises(DataError, match=r"four\.nii\.gz: 4D image \(4, 4, 4, 2\)"):
        read_volume(_saved(tmp_path / "four.nii.gz", np.ones((4, 4, 4, 2), np.float32)))
    assert read_volume(_saved(tmp_path / "one.nii.gz", np.ones((4, 4, 4, 1), np.float32))).values.shape == (4, 4, 4)
    image = nibabel.Nifti1Image(np.ones((4, 4, 4), np.float32), np.eye(4))
    image.header["vox_offset"], image.header["srow_z"] = 352, 0
    (tmp_path / "flat.nii").write_bytes(image.header.binaryblock + bytes(4) + bytes(256))
    with pytest.raises(DataError, match=r"flat\.nii: .*its affine does not map voxels to space"):
        read_volume(tmp_path / "flat.nii")


def _header(**fields):
    """A NIfTI file of 6 x 5 x 4 voxels, of whose header some fields hold other values."""
    values = np.arange(120, dtype=np.int16).reshape(6, 5, 4)
    image = nibabel.Nifti1Image(values, OBLIQUE)
    image.header["vox_offset"] = 352
    for name, value in fields.items():
        image.header[name] = value
    return image.header.binaryblock + bytes(4) + values.tobytes(order="F")


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress], ids=["gz", "bz2"])
@pytest.mark.parametrize("shape", [(6, 5, 5), (60, 50, 40), (30000, 30000, 30000)])
def test_nothing_is_allocated_for_voxels_that_the_file_does_not_hold(tmp_path, pack, shape):
    path = tmp_path / f"a.nii.{'gz' if pack is gzip.compress else 'bz2'}"
    path.write_bytes(pack(_header(dim=[3, *shape, 1, 1, 1, 1])))
    with pytest.raises(DataError, match=rf"a\.nii\.\w+: .* claims {'x'.join(map(str, shape))} voxels, more than"):
        read_volume(path)


def test_header_is_never_taken_for_voxels(tmp_path):
    (tmp_path / "a.nii").write_bytes(_header(vox_offset=0))
    with pytest.raises(DataError, match=r"a\.nii: .*voxels are said to start at byte 0, inside the header"):
        read_volume(tmp_path / "a.nii")


def test_complex_voxels_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"a\.nii: .*complex voxels"):
        read_volume(_saved(tmp_path / "a.nii", np.full((2, 2, 2), 1 + 2j, np.complex64)))


@pytest.mark.parametrize(
    "fields",
    [
        {"srow_x": [1e30, 0, 0, 0]},
        {"srow_x": [1e5, 0, 0, 0]},
        {"srow_z": [0, 0, 1e-30, 0]},
        {"srow_y": [0, 1, 0, np.nan]},
        {"srow_y": [1.1, -0.2, 0, 0]},  # along the x axis
        {"sform_code": 0, "qform_code": 1, "quatern_b": -3e38, "quatern_c": -3e38},
    ],
)
def test_affine_that_cannot_be_meant(tmp_path, fields):
    (tmp_path / "a.nii").write_bytes(_header(**fields))
    with pytest.raises(DataError, match=r"a\.nii: unreadable image") as caught:
        read_volume(tmp_path / "a.nii")
    assert_refusal(caught.value, "a.nii")


def test_field_of_view_that_no_scanner_has_is_refused_before_it_is_filled():
    volume = Volume(np.zeros((8, 8, 8), np.float32), np.diag([200.0, 200, 200, 1]))
    with pytest.raises(DataError, match=r"^a\.nii: a field of view of 1600 x 1600 x 1600 mm; its voxel sizes"):
        resample_isotropic(volume, 1.0, 0.0, name="a.nii")


def test_a_long_flat_volume_is_cut_before_it_is_padded():
    values = np.arange(100_000, dtype=np.float32).reshape(1, -1, 1)
    ours = crop_or_pad(Volume(values, np.eye(4)), (64, 64, 64), -1.0)
    assert ours.values.shape == (64, 64, 64)
    np.testing.assert_array_equal(ours.values[32, :, 32], -1)
    np.testing.assert_array_equal(ours.values[31, :, 31], np.arange(49968, 50032))
    np.testing.assert_array_equal(ours.affine[:3, 3], [-31, 49968, -31])


def test_a_header_that_nibabel_mends_is_read_without_a_word(tmp_path, capfd, caplog):
    (tmp_path / "a.nii").write_bytes(_header(qform_code=77, pixdim=[1, -1, 2, 0, 0, 0, 0, 0]))
    assert read_volume(tmp_path / "a.nii").values.shape == (6, 5, 4)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


FIELDS = st.tuples(
    st.sampled_from([(40 + 2 * i, "<h") for i in range(8)] + [(place, "<h") for place in (70, 72, 252, 254)]
                    + [(place, "<f") for place in (76, 80, 84, 88, 108, 112, 116, *range(256, 328, 4))]),
    st.sampled_from([0, 1, -1, 2, 3, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 1792, 2304, 32767, -32768]),
    st.sampled_from([0, 1, -1, 0.5, 1e-30, 1e6, 1e30, 3e38, -3e38, 351, 353, 1e9, float("nan"), float("inf")]),
)  # fmt: skip


@settings(max_examples=120, deadline=None, derandomize=True, database=None)
@given(fields=st.lists(FIELDS, max_size=3), damage=DAMAGE, packed=st.booleans(), packed_damage=DAMAGE)
def test_any_image_file_is_read_or_refused_in_one_line(fields, damage, packed, packed_damage):
    content = bytearray(_header())
    for (place, kind), whole_number, number in fields:
        struct.pack_into(kind, content, place, whole_number if kind == "<h" else number)
    content = damaged(content, damage, head=400)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"scan é.nii{'.gz' if packed else ''}"
        path.write_bytes(damaged(gzip.compress(content, 1), packed_damage) if packed else content)
        try:
            volume = read_volume(path)
            unit = scale_to_unit(volume.values, 0.001, 0.999, str(path))
            small = resample_volume(Volume(unit, volume.affine), (4, 4, 4), None)
        except DataError as error:
            assert_refusal(error, str(path))
            return
    assert volume.values.dtype == np.float32
    assert np.isfinite(volume.values).all()
    assert np.isfinite(volume.affine).all()
    assert np.isfinite(small.affine).all()
    assert small.values.min() >= 0
    assert small.values.max() <= 1.000001
