"""New signals are made as those of training were, and come back in units of their own."""

import jax
import nibabel
import numpy as np
import pytest
from PIL import Image

import medfuncta_jax as mf
from medfuncta_jax.checkpoint import CheckpointError, save_field
from medfuncta_jax.datasets import DataError, open_dataset
from medfuncta_jax.settings import Settings
from tests.datasets.made_up import beat_line, chest, head, medmnist_arrays, write_case, write_npz

AFFINE = np.array([[0, -1.5, 0, 3], [2.0, 0, 0, -4], [0, 0, 1.2, 5], [0, 0, 0, 1]])


def trained_on(tmp_path, source, folder, **options):
    """A field of a data set in a run directory, and the data set."""
    values = {"data": {"source": source, "cache_dir": str(tmp_path / "cache"), **options}}
    settings = Settings.from_dict(values | {"model": {"layers": 3, "width": 8, "latent_dim": 4}})
    dataset = open_dataset(settings.data, data_dir=str(folder))
    field = mf.Field(settings.model, len(dataset.grid), dataset.channels)
    about = {"settings": settings.to_dict(), "grid": list(dataset.grid)}
    save_field(tmp_path / "run" / "field.safetensors", field, field.init(jax.random.key(0)), about)
    return tmp_path / "run", dataset


def volumes(folder):
    folder.mkdir()
    for i in range(4):
        nibabel.save(nibabel.Nifti1Image(head((12, 14, 10), i), AFFINE), folder / f"{i}.nii.gz")


def cases(folder):
    for i in range(3):
        write_case(folder, f"BraTS-GLI-0000{i}-000", head((40, 40, 30), i))


def scans(folder):
    folder.mkdir()
    for i in range(3):
        nibabel.save(nibabel.Nifti1Image(chest((24, 24, 24), i), np.diag([3, 3, 3, 1.0])), folder / f"{i}.nii")


def images(folder):
    folder.mkdir()
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 65536, (20, 17)).astype(np.uint16)
        Image.fromarray(pixels).save(folder / f"{i}.png")


def series(folder):
    folder.mkdir()
    for i in range(4):
        table = np.stack([np.arange(30) / 10, np.sin(np.arange(30) + i), 5.0 * np.arange(30) + i], 1)
        np.savetxt(folder / f"{i}.csv", table, delimiter=",", header="time,a,b")


def rows(folder):
    folder.mkdir()
    (folder / "all.csv").write_text("\n".join(f"s{i},{i},7,{i + 3},2" for i in range(6)))


def beats(folder):
    folder.mkdir()
    for name in ("mitbih_train.csv", "mitbih_test.csv"):
        (folder / name).write_text("\n".join(beat_line(i % 5, i) for i in range(10)))


def arrays(folder):
    write_npz(folder, "mine.npz", medmnist_arrays())


def brains(folder):
    folder.mkdir()
    image = nibabel.load(nibabel.__path__[0] + "/tests/data/example4d.nii.gz")
    nibabel.save(image, folder / "brain.nii.gz")


SOURCES = {
    "nifti_folder": (volumes, {"grid": [8, 8, 8]}),
    "brats": (cases, {"size": 32}),
    "lung_ct": (scans, {"size": 32}),
    "image_folder": (images, {"size": 16}),
    "series_folder": (series, {"length": 10}),
    "ecg": (beats, {}),
    "medmnist": (arrays, {"flag": "mine"}),
    "nibabel_slices": (brains, {"size": 16}),
}


@pytest.mark.parametrize("source", SOURCES)
def test_a_folder_gives_what_training_saw(tmp_path, source):
    """Whatever split a signal was in, and with the same affine and units."""
    write, options = SOURCES[source]
    write(tmp_path / "data")
    run, dataset = trained_on(tmp_path, source, tmp_path / "data", **options)
    prepared = mf.prepare(run, tmp_path / "data")
    assert prepared.skipped == {}
    assert prepared.values.shape[1:] == (*dataset.grid, dataset.channels)
    ours = {signal.tobytes(): i for i, signal in enumerate(prepared.values)}
    for split in dataset.splits.values():
        known = split.annotations()
        for k, signal in enumerate(split.signals(slice(None))):
            i = ours[signal.tobytes()]
            assert prepared.units[i] == known.units[k]
            if known.affines is not None:
                np.testing.assert_array_equal(prepared.affines[i], known.affines[k])
    if source not in ("nibabel_slices", "medmnist"):  # which name their signals by split, or by the scan
        assert set(prepared.ids) == {name for split in dataset.splits.values() for name in split.annotations().ids}


def test_tables_of_rows(tmp_path):
    rows(tmp_path / "data")
    run, dataset = trained_on(tmp_path, "series_folder", tmp_path / "data", layout="row", id_column="0", length=4)
    prepared = mf.prepare(run, tmp_path / "data" / "all.csv")
    assert prepared.ids == tuple(f"all.csv:s{i}" for i in range(6))
    for split in dataset.splits.values():
        for one in split:
            np.testing.assert_array_equal(prepared.values[prepared.ids.index(one["id"])], one["signal"])


@pytest.mark.parametrize("source", ["nifti_folder", "brats", "lung_ct", "image_folder", "series_folder"])
def test_an_array_is_as_its_file(tmp_path, source):
    write, options = SOURCES[source]
    write(tmp_path / "data")
    run, _ = trained_on(tmp_path, source, tmp_path / "data", **options)
    path = min(path for path in (tmp_path / "data").rglob("*") if path.is_file())
    affine = None
    if path.suffix in (".gz", ".nii"):
        image = nibabel.load(path)
        array, affine = np.asarray(image.dataobj), image.affine
    else:
        array = np.asarray(Image.open(path)) if source == "image_folder" else np.loadtxt(path, delimiter=",")[:, 1:]
    whole = mf.prepare(run, tmp_path / "data")
    of_file, of_array = whole.values[0], mf.prepare(run, array, affine=affine)
    np.testing.assert_allclose(of_array.values[0], of_file, atol=1e-6)
    if affine is not None:
        np.testing.assert_allclose(of_array.affines[0], whole.affines[0])
    assert len(mf.prepare(run, [array, array], affine=affine).ids) == 2


def test_back_to_units_of_their_own(tmp_path):
    volumes(tmp_path / "data")
    run, _ = trained_on(tmp_path, "nifti_folder", tmp_path / "data", grid=[14, 14, 14], spacing=0.0)
    prepared = mf.prepare(run / "field.safetensors", tmp_path / "data" / "1.nii.gz")
    assert prepared.ids == ("1.nii.gz",)
    back = prepared.in_own_units(prepared.values)
    assert back.shape == (1, 14, 14, 14, 1)
    voxels = nibabel.load(tmp_path / "data" / "1.nii.gz").get_fdata()
    low, high = np.quantile(voxels, (0.001, 0.999))
    assert (back.min(), back.max()) == (low, pytest.approx(back.max()))
    assert back.max() <= high + 1e-3
    field, params = mf.load_field(run)
    values = mf.reconstruct(field, params, np.zeros((1, 4)), mf.grid((5, 5, 5)))
    assert prepared.in_own_units(values).shape == (1, 125, 1)
    with pytest.raises(ValueError, match="must be 1 in number"):
        prepared.in_own_units(np.zeros((2, 5, 5, 5, 1)))


def test_what_cannot_be_prepared_is_said(tmp_path):
    volumes(tmp_path / "data")
    run, _ = trained_on(tmp_path, "nifti_folder", tmp_path / "data", grid=[8, 8, 8])
    (tmp_path / "data" / "bad.nii").write_bytes(b"no image")
    assert "unreadable image" in mf.prepare(run, tmp_path / "data").skipped["bad.nii"]
    with pytest.raises(DataError, match=r"bad\.nii: unreadable image"):
        mf.prepare(run, tmp_path / "data" / "bad.nii")
    with pytest.raises(DataError, match="no such folder"):
        mf.prepare(run, tmp_path / "nothing")
    with pytest.raises(DataError, match="must be finite real numbers"):
        mf.prepare(run, np.full((4, 4, 4), np.nan))
    field, params = mf.load_field(run)
    save_field(tmp_path / "bare.safetensors", field, params, {})
    with pytest.raises(CheckpointError, match="does not say which data it was trained on"):
        mf.prepare(tmp_path / "bare.safetensors", tmp_path / "data")


def test_the_wrong_grid_or_channels_are_refused(tmp_path):
    arrays(tmp_path / "data")
    run, _ = trained_on(tmp_path, "medmnist", tmp_path / "data", flag="mine")
    write_npz(tmp_path / "other", "x.npz", medmnist_arrays(shape=(20, 20)))
    with pytest.raises(DataError, match=r"the field was trained on uint8 images of \(28, 28, 1\)"):
        mf.prepare(run, tmp_path / "other")
    with pytest.raises(DataError, match="a uint8 image"):
        mf.prepare(run, np.zeros((20, 20), np.uint8))
