"""Chest CT: 1 mm voxels in any orientation, the published crop and scaling, the folder and its split."""

import logging
import os

import nibabel
import numpy as np
import pytest

from medfuncta_jax.datasets import DataError, lung_ct, open_dataset
from medfuncta_jax.datasets.volumes import Volume, read_volume, resample_isotropic
from medfuncta_jax.nifti import write_volume
from medfuncta_jax.settings import DataSettings, SettingsError
from tests.datasets.made_up import chest
from tests.datasets.skips import assert_only_skipped


def _open(tmp_path, folder, **options):
    settings = DataSettings("lung_ct", str(tmp_path / "cache"), tuple(sorted(options.items())))
    return open_dataset(settings, data_dir=str(folder))


def _centre_of_mass(values, affine):
    mass = np.asarray(values, np.float64) - np.min(values)
    index = [np.arange(n) @ mass.sum(tuple({0, 1, 2} - {k})) / mass.sum() for k, n in enumerate(mass.shape)]
    return (affine @ [*index, 1])[:3]


@pytest.fixture
def folder(tmp_path):
    for i in range(5):
        name = f"LIDC-IDRI-{i:04d}.nii.gz" if i < 4 else f"mine é/scan {i}.nii"
        write_volume(tmp_path / "data" / name, chest((30, 28, 26), i), np.diag([3.0, 3, 3, 1]), dtype="int16")
    second = tmp_path / "data" / "second" / "LIDC-IDRI-0003 b.nii.gz"
    write_volume(second, chest((30, 28, 26)), np.diag([3.0, 3, 3, 1]))
    return tmp_path / "data"


AFFINES = {
    "thick slices": np.diag([0.7, 0.7, 2.5, 1.0]),
    "left-handed": np.diag([-0.7, 0.7, 2.5, 1.0]),
    "oblique": np.array([[0.76, -0.36, 0, 3], [0.24, 1.14, 0, 4], [0, 0, 2.0, 5], [0, 0, 0, 1]]),
    "gantry tilt": np.array([[0.8, 0, 0, 3], [0, 0.75, 0, 4], [0, 0.27, 2.0, 5], [0, 0, 0, 1]]),
    "coronal, flipped": np.array([[-0.9, 0, 0, 3], [0, 0, 2.0, 4], [0, -0.9, 0, 5], [0, 0, 0, 1]]),
}


@pytest.mark.parametrize("kind", AFFINES)
def test_any_orientation_becomes_cubic_voxels_with_tissue_in_its_place(tmp_path, kind):
    affine, values = AFFINES[kind], chest((50, 44, 30))
    nibabel.save(nibabel.Nifti1Image(values, affine), tmp_path / "a.nii")
    ours = resample_isotropic(read_volume(tmp_path / "a.nii"), 1.0, -1000.0, name="a")
    np.testing.assert_array_equal(ours.affine[:3, :3], np.eye(3))
    assert np.abs(_centre_of_mass(ours.values, ours.affine) - _centre_of_mass(values, affine)).max() < 0.03
    assert values.max() - 10 < ours.values.max() < 55
    # The whole field of view is there: the outer corners of the input's voxels.
    ends = np.array([affine @ [i, j, k, 1] for i in (-0.5, 49.5) for j in (-0.5, 43.5) for k in (-0.5, 29.5)])[:, :3]
    np.testing.assert_allclose(ours.values.shape, np.ptp(ends, axis=0), atol=0.51)


def test_interpolation_is_cubic_and_a_1_mm_volume_is_left_as_it_is():
    from scipy import interpolate

    values = np.random.default_rng(0).random((9, 8, 7)).astype(np.float32)
    volume = Volume(values, np.diag([1.0, 1.0, 3.0, 1.0]))
    ours = resample_isotropic(volume, 1.0, 0.0, name="a")
    assert ours.values.shape == (9, 8, 21)
    np.testing.assert_allclose(ours.values[:, :, 1::3], values, atol=1e-5)
    spline = interpolate.make_interp_spline(np.arange(7) * 3.0, values[4, 4].astype(np.float64), k=3)
    assert np.abs(ours.values[4, 4, 8:13] - spline(np.arange(7, 12))).max() < 0.05
    assert resample_isotropic(ours, 1.0, 0.0, name="a") is ours


def test_constant_field_stays_constant_to_its_edge():
    ours = resample_isotropic(
        Volume(np.full((6, 6, 5), 40, np.float32), np.diag([0.6, 0.6, 4, 1])), 1.0, -1000.0, name="a"
    )
    assert ours.values.shape == (4, 4, 20)
    np.testing.assert_allclose(ours.values, 40, atol=1e-3)


def test_crop_clip_scale_and_average_are_as_published():
    """Stated in plain numpy for a volume of 1 mm, longer than the field on one axis and shorter on another."""
    rng = np.random.default_rng(0)
    values = rng.integers(-3024, 1500, (281, 256, 101)).astype(np.float32)
    affine = np.array([[1.0, 0, 0, -7], [0, 1, 0, 5], [0, 0, 1, 3], [0, 0, 0, 1]])
    ours = lung_ct.preprocess(Volume(values, affine), lung_ct.Options(), name="a")
    array = np.pad(values[12:268].astype(np.float64), ((0, 0), (0, 0), (77, 78)), constant_values=-1000)
    top = np.quantile(array, 0.999)
    array = (np.clip(array, -1000, top) + 1000) / (top + 1000)
    k = 8
    array = array.reshape(32, k, 32, k, 32, k).mean((1, 3, 5))
    np.testing.assert_allclose(ours.values, array, rtol=0, atol=5e-7)
    np.testing.assert_allclose(np.diag(ours.affine), [k, k, k, 1])
    first = np.array([12, 0, -77]) + (k - 1) / 2
    np.testing.assert_allclose(ours.affine[:3, 3], first + np.array([-7, 5, 3]))


def test_values_outside_the_field_of_the_scanner_become_0():
    values = chest((40, 40, 40))
    values[:3] = -3024
    ours = lung_ct.preprocess(Volume(values, np.eye(4)), lung_ct.Options(size=256), name="a")
    assert ours.values.min() == 0
    assert not ours.values[108:111].any()


def test_folder_is_split_by_patient_and_short_volumes_are_padded_and_said(tmp_path, folder, caplog):
    with caplog.at_level(logging.INFO, "medfuncta_jax"):
        data = _open(tmp_path, folder)
    assert "6 of 6 volumes are shorter than 256 mm" in caplog.text
    assert len(data.about["padded"]) == 6
    ids = {name: [example["id"] for example in split] for name, split in data.splits.items()}
    assert ids == data.about["split"]
    place = {one: name for name, found in ids.items() for one in found}
    assert len(place) == 6
    assert place["LIDC-IDRI-0003.nii.gz"] == place["second/LIDC-IDRI-0003 b.nii.gz"]
    patients = {name: len({one for one in found if "second" not in one}) for name, found in ids.items()}
    assert patients == {"train": 3, "val": 1, "test": 1}
    for example in data.splits["test"]:
        assert example["signal"].shape == (32, 32, 32, 1)
        image = nibabel.load(folder / example["id"])
        distance = _centre_of_mass(image.get_fdata(), image.affine) - _centre_of_mass(
            example["signal"][..., 0], example["affine"]
        )
        assert np.abs(distance).max() < 0.1


def test_patients_and_files_can_be_named(folder):
    def plan(**options):
        return lung_ct.plan(lung_ct.Options(**options), data_dir=str(folder), cache_root=folder).about

    assert len(plan(pattern="LIDC*")["files"]) == 4
    assert len(plan(pattern="*[124].*")["files"]) == 3
    assert plan(val_fraction=0.3)["split"]["test"] == plan()["split"]["test"]
    together = plan(patient="LIDC|é|second")["split"]
    assert all(len({one[:4] for one in found}) <= 2 for found in together.values())


def _text(path):
    path.write_text("hello")


def _truncated(path):
    path.write_bytes(path.read_bytes()[:-100])


def _image(values):
    def spoil(path):
        nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), path)

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_truncated, "(truncated|unreadable) image"),
        (_text, "unreadable image"),
        (_image(np.ones((4, 4, 4, 2), np.float32)), r"4D image \(4, 4, 4, 2\)"),
        (_image(np.full((4, 4, 4), -1000, np.int16)), r"nothing is denser than air \(-1000\)"),
        (_image(np.full((4, 4, 4), np.nan, np.float32)), "64 of 64 voxels are NaN or infinite"),
    ],
)
def test_a_bad_volume_is_named_in_one_line(folder, spoil, message):
    path = folder / "LIDC-IDRI-0001.nii.gz"
    spoil(path)
    with pytest.raises(DataError, match=rf"LIDC-IDRI-0001\.nii\.gz: {message}") as caught:
        lung_ct.preprocess(read_volume(path), lung_ct.Options(), name=str(path))
    assert "\n" not in str(caught.value)


def test_a_bad_volume_is_skipped_and_listed(tmp_path, folder):
    _text(folder / "second" / "LIDC-IDRI-0003 b.nii.gz")
    message = r"LIDC-IDRI-0003 b\.nii\.gz: unreadable image"
    assert_only_skipped(_open(tmp_path, folder), "second/LIDC-IDRI-0003 b.nii.gz", message)


def test_folders_that_cannot_be_used(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"NIfTI files of 0 patients, .* python -m experiments\.tools\.preprocess"):
        _open(tmp_path, tmp_path / "empty")
    os.symlink(folder, folder / "loop")
    assert len(lung_ct.plan(lung_ct.Options(), data_dir=str(folder), cache_root=folder).about["files"]) == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 100}, r"data\.size must be one of 32, 64, 128, 256, got 100"),
        ({"quantile_high": 0.0}, r"data\.quantile_high must be in \(0, 1\]"),
        ({"patient": "("}, r"data\.patient must be a regular expression"),
        ({"val_fraction": 0.0}, "val_fraction and test_fraction must be"),
    ],
)
def test_options_out_of_range(tmp_path, options, message):
    with pytest.raises(SettingsError, match=message):
        _open(tmp_path, tmp_path, **options)
