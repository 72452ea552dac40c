"""Units of every source: signals in their own units equal those of an independent reader."""

import nibabel
import numpy as np
import pytest
from PIL import Image

from medfuncta_jax.datasets import open_dataset
from tests.datasets.made_up import LPS, chest, head, medmnist_arrays, write_case, write_npz
from tests.real_data import REAL, needs_real


def values_of(data):
    """Values in their own units and the units of every signal, by id."""
    found = {}
    for split in data.splits.values():
        known, signals = split.annotations(), split.signals(slice(None))
        for name, units, signal in zip(known.ids, known.units, signals, strict=True):
            found[name] = (units.values(signal), units)
    return found


def opened(tmp_path, source, folder, **options):
    return open_dataset(source, data_dir=str(folder), cache_dir=str(tmp_path / "cache"), **options)


def test_volumes_with_a_slope(tmp_path):
    for i in range(3):
        image = nibabel.Nifti1Image(head((8, 8, 8), i), np.eye(4))
        image.header.set_slope_inter(2.5, -1000)
        nibabel.save(image, tmp_path / f"{i}.nii.gz")
    found = values_of(opened(tmp_path, "nifti_folder", tmp_path, grid=(8, 8, 8), quantile_low=0.0, quantile_high=1.0))
    for i in range(3):
        values, units = found[f"{i}.nii.gz"]
        np.testing.assert_allclose(values[..., 0], nibabel.load(tmp_path / f"{i}.nii.gz").get_fdata(), atol=1e-3)
        assert (units.dtype, units.slope, units.intercept, units.shared) == ("int16", 2.5, -1000.0, "")
        np.testing.assert_array_equal(
            units.stored((values - units.offset) / units.scale)[..., 0], head((8, 8, 8), i)
        )  # fmt: skip


def test_clipped_values_are_counted(tmp_path):
    for i in range(3):
        nibabel.save(nibabel.Nifti1Image(head((20, 20, 20), i), np.eye(4)), tmp_path / f"{i}.nii")
    found = values_of(opened(tmp_path, "nifti_folder", tmp_path, grid=(8, 8, 8), quantile_high=0.9))
    assert all(units.clipped == pytest.approx(0.1, abs=0.01) for _, units in found.values())


@pytest.mark.slow  # grids of 256 points along an axis, on which voxels keep their values
def test_brats_and_ct(tmp_path):
    for i in range(3):
        write_case(tmp_path / "brats", f"BraTS-GLI-0000{i}-000", head((64, 64, 64), i), LPS)
        (tmp_path / "ct").mkdir(exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(chest((64, 64, 64), i), np.eye(4)), tmp_path / "ct" / f"{i}.nii.gz")
    brain = values_of(opened(tmp_path, "brats", tmp_path / "brats", size=256))
    for i in range(3):
        values, units = brain[f"BraTS-GLI-0000{i}-000"]
        inner = values[96:160, 96:160, 96:160, 0][::-1, ::-1]  # back from RAS+ to LPS
        np.testing.assert_allclose(
            inner, np.clip(head((64, 64, 64), i), *np.cumsum([units.offset, units.scale])), atol=0.01
        )
        assert units.dtype == "int16"
    ct = values_of(opened(tmp_path, "lung_ct", tmp_path / "ct", size=256, quantile_high=1.0))
    for i in range(3):
        values, units = ct[f"{i}.nii.gz"]
        np.testing.assert_allclose(values[96:160, 96:160, 96:160, 0], chest((64, 64, 64), i), atol=0.01)
        assert (units.unit, units.dtype) == ("HU", "float32")


def test_images(tmp_path):
    rng = np.random.default_rng(0)
    deep = rng.integers(0, 65536, (3, 12, 12)).astype(np.uint16)
    for i in range(3):
        Image.fromarray(deep[i]).save(tmp_path / f"{i}.png")
    found = values_of(opened(tmp_path, "image_folder", tmp_path, size=12))
    clipped = values_of(opened(tmp_path, "image_folder", tmp_path, size=12, value_range=(0.0, 32768.0)))
    for i in range(3):
        values, units = found[f"{i}.png"]
        np.testing.assert_allclose(values[..., 0], deep[i], atol=0.01)
        assert (units.dtype, units.shared, units.clipped) == ("uint16", "signals", 0)
        assert clipped[f"{i}.png"][1].clipped == pytest.approx(np.mean(deep[i] > 32768))


def test_where_0_is_white(tmp_path):
    values = np.arange(144, dtype=np.uint8).reshape(12, 12)
    for i in range(3):
        Image.fromarray(values + i).save(tmp_path / f"{i}.tif", tiffinfo={262: 0})
    for name, (found, _) in values_of(opened(tmp_path, "image_folder", tmp_path, size=12)).items():
        np.testing.assert_allclose(found[..., 0], values + int(name[0]), atol=1e-3)


def test_medmnist(tmp_path):
    arrays = medmnist_arrays()
    folder = write_npz(tmp_path / "data", "mine.npz", arrays)
    found = values_of(opened(tmp_path, "medmnist", folder, flag="mine"))
    values, units = found["test-000002"]
    np.testing.assert_allclose(values[..., 0], arrays["test_images"][2], atol=1e-4)
    assert units.dtype == "uint8"


def test_slices_of_a_scan(tmp_path):
    found = values_of(opened(tmp_path, "nibabel_slices", tmp_path, size=32))
    _, units = found["example4d-v0-axial-012"]
    assert units.dtype == "int16"
    assert max(values.max() for values, _ in found.values()) == pytest.approx(830, abs=60)  # its 0.999 quantile


@needs_real
def test_beats(tmp_path):
    values, units = values_of(opened(tmp_path, "ecg", REAL / "ecg"))["mitbih_test.csv:000001"]
    row = np.loadtxt(REAL / "ecg" / "mitbih_test.csv", delimiter=",", max_rows=1)
    np.testing.assert_allclose(values[:, 0], row[:-1], atol=1e-6)
    assert units.time == (0.0, 1 / 125)
