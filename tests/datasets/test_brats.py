"""BraTS: the published preprocessing on the real volume, the folder layout, the split by patient, writing back."""

import logging
import os

import nibabel
import numpy as np
import pytest

from medfuncta_jax.datasets import DataError, brats, open_dataset
from medfuncta_jax.datasets.volumes import Volume, read_volume
from medfuncta_jax.nifti import write_volume
from medfuncta_jax.settings import DataSettings, SettingsError
from tests.datasets.made_up import LPS, head, write_case
from tests.datasets.skips import assert_only_skipped
from tests.real_data import REAL, needs_real

SCAN = REAL / "brats" / "BraTS-TCGA-DU7294-000" / "BraTS-TCGA-DU7294-000-t1n.nii.gz"


def _open(tmp_path, folder, **options):
    settings = DataSettings("brats", str(tmp_path / "cache"), tuple(sorted(options.items())))
    return open_dataset(settings, data_dir=str(folder))


@pytest.fixture
def folder(tmp_path):
    """Ten patients, two of them scanned twice, at two depths, half of the files compressed."""
    root = tmp_path / "data"
    for i in range(12):
        case = f"BraTS-GLI-{i % 10:05d}-{i // 10:03d}"
        suffix = (".nii", ".nii.gz")[i % 2]
        write_case(root / ("" if i % 2 else "a part é"), case, head(seed=i), suffix=suffix)
    return root


def _centre_of_mass(values, affine):
    mass = np.asarray(values, np.float64)
    index = [np.arange(n) @ mass.sum(tuple({0, 1, 2} - {k})) / mass.sum() for k, n in enumerate(mass.shape)]
    return (affine @ [*index, 1])[:3]


@needs_real
@pytest.mark.parametrize("size", [32, 64])
def test_real_volume_equals_the_published_preprocessing_voxel_for_voxel(size):
    """Stated in plain numpy, on the array as it lies in the file."""
    image = nibabel.load(SCAN)
    array = image.get_fdata()
    low, high = np.quantile(array, 0.001), np.quantile(array, 0.999)
    array = (np.clip(array, low, high) - low) / (high - low)
    array = np.pad(array, ((8, 8), (8, 8), (50, 51)))
    k = 256 // size
    published = array.reshape(size, k, size, k, size, k).mean((1, 3, 5))
    ours = brats.preprocess(read_volume(SCAN), brats.Options(size=size), name="scan")
    assert ours.values.dtype == np.float32
    assert nibabel.aff2axcodes(image.affine) == ("L", "P", "S")
    np.testing.assert_allclose(ours.values, published[::-1, ::-1], rtol=0, atol=3e-7)
    # The affine accounts for the flips: voxel (i, j, l) of the published array lies where ours says.
    i, j, x = 5, 9, 11
    corner = np.array([i, j, x]) * k + (k - 1) / 2 - [8, 8, 50]
    np.testing.assert_allclose(ours.affine @ [size - 1 - i, size - 1 - j, x, 1], image.affine @ [*corner, 1])


@needs_real
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_reconstruction_written_back_overlays_the_real_volume(tmp_path, suffix):
    ours = brats.preprocess(read_volume(SCAN), brats.Options(), name="scan")
    write_volume(tmp_path / f"a{suffix}", ours.values, ours.affine)
    written, image = nibabel.load(tmp_path / f"a{suffix}"), nibabel.load(SCAN)
    np.testing.assert_array_equal(written.get_fdata(), ours.values)
    np.testing.assert_allclose(written.affine, ours.affine, atol=1e-6)
    assert written.get_data_dtype() == np.float32
    assert written.header.get_xyzt_units()[0] == "mm"
    low, high = np.quantile(image.get_fdata(), (0.001, 0.999))
    unit = np.clip((image.get_fdata() - low) / (high - low), 0, 1)
    distance = _centre_of_mass(unit, image.affine) - _centre_of_mass(written.get_fdata(), written.affine)
    assert np.abs(distance).max() < 0.01  # millimetres, of voxels of 8


def test_cases_are_found_at_any_depth_and_split_by_patient(tmp_path, folder):
    write_case(folder, "BraTS-GLI-00000-000", head(), sequence="t2f")
    (folder / "BraTS-GLI-00001-000" / "._BraTS-GLI-00001-000-t1n.nii.gz").write_bytes(b"junk")
    data = _open(tmp_path, folder)
    ids = {name: [example["id"] for example in split] for name, split in data.splits.items()}
    assert ids == data.about["split"]
    cases = {f"BraTS-GLI-{i % 10:05d}-{i // 10:03d}" for i in range(12)}
    assert sorted(case for part in ids.values() for case in part) == sorted(cases)
    patients = {name: {brats.patient_of(case) for case in cases} for name, cases in ids.items()}
    assert {name: len(found) for name, found in patients.items()} == {"train": 6, "val": 1, "test": 3}
    assert sum(len(found) for found in patients.values()) == 10
    example = data.splits["train"][0]
    assert example["signal"].shape == (32, 32, 32, 1)
    assert 0 <= example["signal"].min() < example["signal"].max() <= 1


def test_the_test_split_does_not_depend_on_the_validation_part(folder):
    plans = [
        brats.plan(brats.Options(val_fraction=part), data_dir=str(folder), cache_root=folder) for part in (0.1, 0.4)
    ]
    first, second = (plan.about["split"] for plan in plans)
    assert first["test"] == second["test"]
    assert set(first["val"]) < set(second["val"])
    other = brats.plan(brats.Options(seed=1), data_dir=str(folder), cache_root=folder)
    assert other.about["split"] != first


def test_sequences(tmp_path):
    for i in range(4):
        for sequence in brats.SEQUENCES:
            write_case(tmp_path, f"BraTS-GLI-0000{i}-000", head(), sequence=sequence)
    for sequence in brats.SEQUENCES:
        plan = brats.plan(brats.Options(sequence=sequence), data_dir=str(tmp_path), cache_root=tmp_path)
        assert len(plan.about["files"]) == 4
        assert all(f"-{sequence}." in name for name in plan.about["files"])


def test_other_shapes_are_centred_and_said(folder, caplog):
    with caplog.at_level(logging.INFO, "medfuncta_jax"):
        plan = brats.plan(brats.Options(), data_dir=str(folder), cache_root=folder)
    assert len(caplog.records) == 1
    assert "12 of 12 volumes are not 240 x 240 x 155 at 1 mm" in caplog.text
    assert plan.about["other_shapes"]["BraTS-GLI-00003-000"] == "24 x 20 x 16 at 1 x 1 x 1 mm"


@pytest.mark.parametrize("shape", [(24, 20, 16), (300, 255, 257), (240, 240, 155)])
def test_cropping_and_padding_keep_the_place(shape):
    values = np.zeros(shape, np.float32)
    centre = tuple(n // 2 for n in shape)
    values[centre] = 1
    values[tuple(n // 2 + 3 for n in shape)] = 0.5
    for affine in (
        np.diag([1.0, 1, 1, 1]),
        np.array([[0.9, 0.1, 0, 4], [-0.1, 0.9, 0.2, 5], [0, -0.2, 1, 6], [0, 0, 0, 1]]),
    ):
        ours = brats.preprocess(
            Volume(values, affine), brats.Options(size=256, quantile_low=0.0, quantile_high=1.0), name="a"
        )
        assert ours.values.shape == (256, 256, 256)
        index = np.unravel_index(ours.values.argmax(), ours.values.shape)
        np.testing.assert_allclose(ours.affine @ [*index, 1], affine @ [*centre, 1], atol=1e-9)
        assert ours.values[tuple(n + 3 for n in index)] == 0.5
        assert np.count_nonzero(ours.values) == 2


@pytest.mark.parametrize(
    "affine",
    [
        np.diag([1.0, 1, 1, 1]),
        LPS,
        np.array([[0, 0, -1.0, 10], [1.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, 0, 1]]),  # other order of axes
        np.array([[-0.96, 0.28, 0, 3], [0.28, 0.96, 0, 4], [0, 0, 1, 5], [0, 0, 0, 1]]),  # oblique and left-handed
    ],
)
def test_scaled_integers_and_any_orientation_keep_tissue_in_its_place(tmp_path, affine):
    image = nibabel.Nifti1Image(head((60, 50, 40)).astype(np.float32) * 0.5, affine)
    image.header.set_data_dtype(np.int16)
    image.header.set_slope_inter(0.5, 0)
    nibabel.save(image, tmp_path / "a.nii")
    options = brats.Options(quantile_low=0.0, quantile_high=1.0)
    ours = brats.preprocess(read_volume(tmp_path / "a.nii"), options, name="a")
    assert nibabel.aff2axcodes(ours.affine) == ("R", "A", "S")
    distance = _centre_of_mass(ours.values, ours.affine) - _centre_of_mass(image.get_fdata(), affine)
    assert np.abs(distance).max() < 0.01


def test_negative_voxel_sizes_in_the_header_are_read_as_nibabel_reads_them(tmp_path):
    path = write_case(tmp_path, "a", head(), np.diag([1.0, 1, 1, 1]), suffix=".nii")
    before = read_volume(path)
    content = bytearray(path.read_bytes())
    content[80:84] = np.array(-1, "<f4").tobytes()  # pixdim[1]; the sform is what counts
    path.write_bytes(content)
    after = read_volume(path)
    np.testing.assert_array_equal(after.values, before.values)
    np.testing.assert_array_equal(after.affine, before.affine)


def _truncated(path):
    path.write_bytes(path.read_bytes()[:-100])


def _text(path):
    path.write_text("hello, this is no image")


def _image(values):
    def spoil(path):
        nibabel.save(nibabel.Nifti1Image(values, LPS), path)

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_truncated, "(truncated|unreadable) image"),
        (_text, "unreadable image"),
        (_image(np.ones((4, 4, 4, 2), np.float32)), r"4D image \(4, 4, 4, 2\)"),
        (_image(np.full((4, 4, 4), 7, np.int16)), r"the volume is constant \(7\)"),
        (_image(np.full((4, 4, 4), np.nan, np.float32)), "64 of 64 voxels are NaN or infinite"),
    ],
)
def test_a_bad_volume_is_named_in_one_line(tmp_path, spoil, message):
    path = write_case(tmp_path, "a é", head())
    spoil(path)
    with pytest.raises(DataError, match=rf"a é-t1n\.nii\.gz: {message}") as caught:
        brats.preprocess(read_volume(path), brats.Options(), name=str(path))
    assert "\n" not in str(caught.value)


def test_a_bad_volume_is_skipped_and_listed(tmp_path, folder):
    _truncated(folder / "BraTS-GLI-00003-000" / "BraTS-GLI-00003-000-t1n.nii.gz")
    message = r"BraTS-GLI-00003-000-t1n\.nii\.gz: (truncated|unreadable) image"
    assert_only_skipped(_open(tmp_path, folder), "BraTS-GLI-00003-000", message)


def test_a_folder_of_bad_volumes_is_refused(tmp_path, folder):
    for path in folder.rglob("*.nii*"):
        path.write_text("hello")
    with pytest.raises(DataError, match=r"more than half of the 12 signals .*t1n\.nii(\.gz)?: unreadable"):
        _open(tmp_path, folder)


def test_a_name_that_cannot_be_an_id_is_refused(tmp_path, folder):
    path = folder / "BraTS-GLI-00003-000" / "BraTS-GLI-00003-000-t1n.nii.gz"
    path.rename(path.with_name("two\nlines-t1n.nii.gz"))
    with pytest.raises(DataError, match=r"file name '.*two\\nlines-t1n\.nii\.gz' holds a line break"):
        _open(tmp_path, folder)


def test_folders_that_cannot_be_used(tmp_path, folder):
    with pytest.raises(DataError, match=r"0 patients with files named \*-t1c\.nii\.gz or \.nii, at least 3 are needed"):
        _open(tmp_path, folder, sequence="t1c")
    write_case(folder / "copy", "BraTS-GLI-00004-000", head())
    with pytest.raises(DataError, match=r"BraTS-GLI-00004-000-t1n\.nii\.gz: this case is also in .*; remove one"):
        _open(tmp_path, folder)


def test_a_loop_of_links_ends_and_linked_folders_count(tmp_path, folder):
    (tmp_path / "linked").mkdir()
    os.symlink(folder, tmp_path / "linked" / "data")
    os.symlink(folder, folder / "BraTS-GLI-00001-000" / "loop")
    plan = brats.plan(brats.Options(), data_dir=str(tmp_path / "linked"), cache_root=tmp_path)
    assert len(plan.about["files"]) == 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequence": "t1"}, r"data\.sequence must be one of t1n, t1c, t2w, t2f, got 't1'"),
        ({"size": 48}, r"data\.size must be one of 32, 64, 128, 256, got 48"),
        ({"quantile_low": 1.0}, "quantile_low must be below quantile_high"),
        ({"test_fraction": 1.0}, "val_fraction and test_fraction must be"),
        ({"seed": -1}, "seed must not be negative"),
    ],
)
def test_options_out_of_range(tmp_path, options, message):
    with pytest.raises(SettingsError, match=message):
        _open(tmp_path, tmp_path, **options)


def test_write_volume_is_whole_or_not_at_all_and_the_same_each_time(tmp_path):
    values = np.random.default_rng(0).random((5, 6, 7)) * 1e5
    for name in ("a.nii.gz", "b.nii.gz"):
        write_volume(tmp_path / "new folder" / name, values, LPS)
    a, b = ((tmp_path / "new folder" / name).read_bytes() for name in ("a.nii.gz", "b.nii.gz"))
    assert a == b
    write_volume(tmp_path / "c.nii", values, LPS, dtype="int16")
    stored = nibabel.load(tmp_path / "c.nii")
    assert stored.get_data_dtype() == np.int16
    np.testing.assert_array_equal(stored.get_fdata(), np.minimum(np.rint(values), 32767))
    for path, wrong, affine in (("d.img", values, LPS), ("d.nii", values[0], LPS), ("d.nii", values, np.eye(3))):
        with pytest.raises(ValueError, match=r"d\.(img|nii)"):
            write_volume(tmp_path / path, wrong, affine)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.nii", "new folder"]
