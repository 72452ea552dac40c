"""A folder of NIfTI volumes: real ones of mixed shapes, the split by file, and folders that cannot be used."""

import jax
import nibabel
import numpy as np
import pytest

import medfuncta_jax as mf
from medfuncta_jax.datasets import DataError, open_dataset
from medfuncta_jax.nifti import write_volume
from medfuncta_jax.settings import DataSettings, SettingsError
from tests.datasets.skips import assert_only_skipped
from tests.real_data import REAL, needs_real


def _open(tmp_path, folder, **options):
    settings = DataSettings("nifti_folder", str(tmp_path / "cache"), tuple(sorted(options.items())))
    return open_dataset(settings, data_dir=None if folder is None else str(folder))


@pytest.fixture
def folder(tmp_path):
    """Ten volumes of mixed shapes, types and spacings, in subfolders."""
    rng = np.random.default_rng(0)
    for i in range(10):
        path = tmp_path / "data" / f"group {i % 2}" / f"scan é {i}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        values = rng.random((8 + i, 9, 10)) * 100
        kind = (np.float32, np.int16, np.uint8)[i % 3]
        nibabel.save(nibabel.Nifti1Image(values.astype(kind), np.diag([1, 1 + i / 10, 2, 1])), path)
    return tmp_path / "data"


def _centre_of_mass(values, affine):
    """Millimetres."""
    mass = np.clip(values, 0, None).astype(np.float64)
    index = [np.arange(n) @ mass.sum(tuple({0, 1, 2} - {k})) / mass.sum() for k, n in enumerate(mass.shape)]
    return (affine @ [*index, 1])[:3]


def _corners(shape):
    """Indices of the outer corners of the outer voxels, [8, 4]."""
    ends = [(-0.5, n - 0.5) for n in shape]
    return np.array([[x, y, z, 1] for x in ends[0] for y in ends[1] for z in ends[2]])


def _spoil(folder, values, name="group 0/bad.nii.gz"):
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), folder / name)


@needs_real
@pytest.mark.parametrize(
    ("where", "pattern"),
    [("ixi_t1_2mm", "**/*.nii*"), (".", "[bi]*/**/*.nii.gz"), ("hippocampus/imagesTr", "*_0[01]*")],
)
def test_real_scans_keep_their_place_in_space(tmp_path, where, pattern):
    folder = REAL / where
    data = _open(tmp_path, folder, pattern=pattern, grid=(16, 16, 16))
    for example in data.splits["test"]:
        image = nibabel.load(folder / example["id"])
        low, high = np.quantile(image.get_fdata(), (0.001, 0.999))
        original = np.clip((image.get_fdata() - low) / (high - low), 0, 1)
        moved = _centre_of_mass(original, image.affine) - _centre_of_mass(example["signal"][..., 0], example["affine"])
        spacing = np.linalg.norm(example["affine"][:3, 0])
        assert np.linalg.norm(moved) < 0.25 * spacing, example["id"]


# Oblique, with the first axis to the left and the last two swapped.
OBLIQUE = np.array([[-1.1, 0.1, 0.3, 40.0], [0.25, -0.2, 1.6, -20.0], [0.1, 1.2, 0.4, 7.0], [0, 0, 0, 1]])


@pytest.fixture
def oblique_folder(tmp_path):
    """Three volumes whose tissue lies off the centre."""
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in (30, 24, 20)), indexing="ij"), -1)
    for i in range(3):
        tissue = np.exp(-((grid - (0.4, -0.4, 0.4)) ** 2).sum(-1) / 0.4) * rng.uniform(0.6, 1, grid.shape[:3])
        (tmp_path / "oblique é").mkdir(exist_ok=True)
        nibabel.save(nibabel.Nifti1Image((tissue * 900).astype(np.int16), OBLIQUE), tmp_path / f"oblique é/{i}.nii.gz")
    return tmp_path / "oblique é"


@pytest.mark.parametrize("folder", ["oblique", pytest.param("hippocampus/imagesTr", marks=needs_real)])
def test_reconstruction_from_a_latent_written_back_overlays_the_scan(tmp_path, oblique_folder, folder):
    folder = oblique_folder if folder == "oblique" else REAL / folder
    data = _open(tmp_path, folder, pattern="*00[1-6]*.gz" if folder != oblique_folder else "*", grid=(12, 12, 12))
    example = data.splits["test"][0]
    model = mf.ModelSettings(layers=3, width=512, latent_dim=512, omega_first=10.0, omega_last=10.0)
    field = mf.Field(model, coord_dims=3, channels=1)
    params = field.init(jax.random.key(0))
    fit = mf.fit_latent(field, params, example["signal"][None], steps=150, step_size=10.0, safeguard=True)
    values = np.asarray(mf.reconstruct(field, params, fit.latents, mf.grid(data.grid))).reshape(data.grid)
    write_volume(tmp_path / "back.nii.gz", values, example["affine"])

    scan, back = nibabel.load(folder / example["id"]), nibabel.load(tmp_path / "back.nii.gz")
    voxel = np.linalg.norm(back.affine[:3, 0])
    np.testing.assert_allclose(back.affine, example["affine"], atol=1e-5)
    # The grid is the scan's field of view and what makes it cubic, about one centre.
    of_scan, of_back = (_corners(image.shape) @ image.affine.T for image in (scan, back))
    np.testing.assert_allclose(of_scan.mean(0), of_back.mean(0), atol=1e-3)
    index = of_scan @ np.linalg.inv(back.affine).T
    assert index[:, :3].min() > -0.501
    assert index[:, :3].max() < 11.501
    assert np.isclose(np.ptp(index[:, :3], axis=0).max(), 12, atol=1e-3)
    low, high = np.quantile(scan.get_fdata(), (0.001, 0.999))
    place = _centre_of_mass(np.clip((scan.get_fdata() - low) / (high - low), 0, 1), scan.affine)
    assert np.abs(_centre_of_mass(back.get_fdata(), back.affine) - place).max() < 0.5 * voxel
    if folder == oblique_folder:
        for axis in range(3):  # a flip would be seen
            flipped = np.flip(back.get_fdata(), axis)
            assert np.abs(_centre_of_mass(flipped, back.affine) - place).max() > 0.5 * voxel


def test_split_is_by_file_seeded_and_written_down(tmp_path, folder):
    data = _open(tmp_path, folder, grid=(6, 6, 6))
    ids = {name: [example["id"] for example in split] for name, split in data.splits.items()}
    assert ids == data.about["split"]
    assert {name: len(names) for name, names in ids.items()} == {"train": 7, "val": 1, "test": 2}
    assert len(set().union(*ids.values())) == 10
    assert all(name.startswith("group ") and name.endswith(".nii.gz") for names in ids.values() for name in names)
    again = _open(tmp_path, folder, grid=(6, 6, 6))
    other = _open(tmp_path, folder, grid=(6, 6, 6), seed=1)
    assert again.about["split"] == ids
    assert other.about["split"] != ids
    for example in data.splits["train"]:
        assert example["signal"].shape == (6, 6, 6, 1)
        assert 0 <= example["signal"].min() < example["signal"].max() <= 1
        assert example["label"] == -1


def test_fixed_spacing(tmp_path, folder):
    data = _open(tmp_path, folder, grid=(6, 5, 4), spacing=3.0)
    assert data.grid == (6, 5, 4)
    np.testing.assert_allclose(data.splits["val"][0]["affine"][:3, :3], np.eye(3) * 3)


def test_hidden_files_are_no_scans(tmp_path, folder):
    (folder / "._scan.nii.gz").write_bytes(b"junk")
    assert sum(len(split) for split in _open(tmp_path, folder, grid=(4, 4, 4)).splits.values()) == 10


def test_links_in_a_circle_end(tmp_path, folder):
    (folder / "circle").symlink_to(folder, target_is_directory=True)
    (folder / "self.nii.gz").symlink_to(folder / "self.nii.gz")
    assert sum(len(split) for split in _open(tmp_path, folder, grid=(4, 4, 4)).splits.values()) == 10


def test_changed_file_is_prepared_anew(tmp_path, folder):
    first = _open(tmp_path, folder, grid=(4, 4, 4)).about
    _spoil(folder, np.random.default_rng(1).random((9, 9, 9)).astype(np.float32), "group 0/scan é 0.nii.gz")
    assert _open(tmp_path, folder, grid=(4, 4, 4)).about != first
    assert len(list((tmp_path / "cache" / "prepared").glob("nifti_folder-*[!k]"))) == 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.full((4, 4, 4), np.nan, np.float32), "64 of 64 voxels are NaN or infinite"),
        (np.full((4, 4, 4), np.inf, np.float32), "64 of 64 voxels are NaN or infinite"),
        (np.full((4, 4, 4), 7, np.int16), r"the volume is constant \(7\)"),
        (np.ones((4, 4, 4, 3), np.float32), r"4D image \(4, 4, 4, 3\), a 3D volume is needed"),
    ],
)
def test_bad_volume_is_skipped_and_listed(tmp_path, folder, values, message):
    _spoil(folder, values)
    data = _open(tmp_path, folder, grid=(4, 4, 4))
    assert_only_skipped(data, "group 0/bad.nii.gz", rf"group 0/bad\.nii\.gz: {message}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda whole: whole[:-200], "(truncated|unreadable) image"),
        (lambda whole: whole[:-6], "truncated image"),
        (lambda whole: b"hello, this is no image", "unreadable image"),
        (lambda whole: b"", "unreadable image"),
    ],
)
def test_damaged_file_is_skipped_and_the_others_stay_in_their_splits(tmp_path, folder, content, message):
    before = _open(tmp_path, folder, grid=(4, 4, 4))
    name = before.about["split"]["train"][0]
    (folder / name).write_bytes(content((folder / name).read_bytes()))
    data = _open(tmp_path, folder, grid=(4, 4, 4))
    assert_only_skipped(data, name, rf"{name}: {message}")
    assert data.about["split"] == before.about["split"]
    for split in ("val", "test"):
        np.testing.assert_array_equal(data.splits[split].signals([0]), before.splits[split].signals([0]))


def test_folder_of_4d_files_only(tmp_path):
    (tmp_path / "data").mkdir()
    for i in range(3):
        _spoil(tmp_path / "data", np.random.default_rng(i).random((4, 4, 4, 2)).astype(np.float32), f"{i}.nii")
    with pytest.raises(DataError, match=r"4D image \(4, 4, 4, 2\), a 3D volume is needed"):
        _open(tmp_path, tmp_path / "data")


def test_empty_folder_and_none(tmp_path):
    (tmp_path / "data").mkdir()
    with pytest.raises(DataError, match=r"0 files match '\*\*/\*\.nii\*', at least 3 are needed"):
        _open(tmp_path, tmp_path / "data")
    with pytest.raises(DataError, match="no data directory: give the folder that holds the NIfTI volumes"):
        _open(tmp_path, None)


def test_fractions_that_leave_next_to_nothing_to_train_on(tmp_path, folder):
    data = _open(tmp_path, folder, val_fraction=0.49, test_fraction=0.5)
    assert len(data.splits["train"]) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": (32, 32)}, r"data\.grid must be three sizes"),
        ({"spacing": -1.0}, r"data\.spacing"),
        ({"quantile_low": 0.9, "quantile_high": 0.1}, "quantile_low must be below"),
        ({"val_fraction": 0.0}, "must be above 0"),
        ({"pattern": "../*.nii"}, "inside the data directory"),
    ],
)
def test_options_out_of_range(tmp_path, options, message):
    with pytest.raises(SettingsError, match=message):
        _open(tmp_path, tmp_path, **options)


@pytest.mark.parametrize("nan", ["0", 0, 0.0])
def test_nan_is_background_when_asked(tmp_path, folder, nan):
    """Against the same volumes with 0 where NaN is; what is infinite is refused all the same."""
    rng = np.random.default_rng(1)
    for name in ("with nan", "with zeros"):
        (tmp_path / name).mkdir()
    for i in range(6):
        values = rng.random((9, 9, 9)).astype(np.float32) * 100
        values[:3] = 0
        nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), tmp_path / "with zeros" / f"{i}.nii")
        values[:3] = np.nan
        nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), tmp_path / "with nan" / f"{i}.nii")
    with pytest.raises(DataError, match=r"243 of 729 voxels are NaN or infinite; data\.nan=0 reads NaN as"):
        _open(tmp_path, tmp_path / "with nan", grid=(8, 8, 8))
    read, meant = (_open(tmp_path, tmp_path / name, grid=(8, 8, 8), nan=nan) for name in ("with nan", "with zeros"))
    for name, split in meant.splits.items():
        np.testing.assert_array_equal(read.splits[name].signals(slice(None)), split.signals(slice(None)))
    _spoil(folder, np.full((9, 9, 9), np.inf, np.float32))
    assert_only_skipped(_open(tmp_path, folder, grid=(8, 8, 8), nan=nan), "group 0/bad.nii.gz", "are NaN or infinite")


@pytest.mark.parametrize("nan", ["air", "nan", float("inf")])
def test_nan_must_be_a_number(tmp_path, folder, nan):
    with pytest.raises(SettingsError, match=r'data\.nan must be a number, or "" to refuse files with NaN voxels'):
        _open(tmp_path, folder, nan=nan)
