"""MedMNIST files: the published table, files in the data directory, downloads, and files that do not hold together."""

import hashlib
import io
import logging
import re
import urllib.error
import urllib.request

import numpy as np
import pytest

from medfuncta_jax.datasets import DataError, medmnist, open_dataset
from medfuncta_jax.settings import DataSettings, SettingsError
from tests.datasets.made_up import medmnist_arrays, write_npz
from tests.real_data import REAL, needs_real


def _open(tmp_path, data_dir, **options):
    settings = DataSettings("medmnist", str(tmp_path / "cache"), tuple(sorted(options.items())))
    return open_dataset(settings, data_dir=None if data_dir is None else str(data_dir))


def test_table_is_complete():
    sets = medmnist._SETS
    assert len(sets) == 18
    assert sum(one.dimensions == 3 for one in sets.values()) == 6
    sums = [md5 for one in sets.values() for md5 in one.md5.values()]
    assert len(sums) == len(set(sums)) == 12 * 4 + 6 * 2
    assert {len(md5) for md5 in sums} == {32}
    assert len(sets["chestmnist"].classes) == 14
    assert sets["chestmnist"].task == "multi-label"
    assert sets["retinamnist"].task == "ordinal-regression"
    assert sets["dermamnist"].licence == "CC BY-NC 4.0"
    assert [flag for flag, one in sets.items() if one.channels == 3] == [
        "pathmnist",
        "dermamnist",
        "retinamnist",
        "bloodmnist",
    ]


@needs_real
def test_real_pneumonia(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        data = _open(tmp_path, REAL, flag="pneumoniamnist")
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "88f817cb74189d81f6df1930098ff783" in warning
    assert "28209eda62fecd6e6a2d98b1501bb15f" in warning
    assert (data.grid, data.channels, data.task) == ((28, 28), 1, "binary-class")
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 4708, "val": 524, "test": 624}
    with np.load(REAL / "pneumoniamnist.npz") as file:
        images, labels = file["val_images"], file["val_labels"]
    np.testing.assert_allclose(data.splits["val"].signals(slice(None))[..., 0], images / 255, rtol=1e-6)
    assert [example["label"] for example in data.splits["val"]] == labels[:, 0].tolist()
    assert data.splits["val"][17]["id"] == "val-000017"


@needs_real
def test_real_volumes_match_their_published_sum(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        data = _open(tmp_path, REAL, flag="adrenalmnist3d")
    assert not caplog.records
    assert data.grid == (28, 28, 28)
    assert data.classes == ("normal", "hyperplasia")
    assert data.splits["test"][0]["signal"].shape == (28, 28, 28, 1)


@needs_real
def test_real_file_outside_the_table(tmp_path):
    data = _open(tmp_path, REAL, flag="bccdcells", size=64)
    assert (data.grid, data.channels) == ((64, 64), 3)
    assert data.classes == ("0", "1", "2")
    assert data.task == "multi-class"


def test_multi_label(tmp_path):
    folder = write_npz(tmp_path / "data", "chestmnist.npz", medmnist_arrays(width=14))
    data = _open(tmp_path, folder, flag="chestmnist")
    assert data.task == "multi-label"
    label = data.splits["train"][0]["label"]
    assert label.shape == (14,)
    assert label.dtype == np.int64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("val_labels"), r"array val_labels is missing \(it holds train_images"),
        (lambda a: a.update(train_labels=a["train_labels"][:4]), "6 train images and 4 labels"),
        (lambda a: a.update(val_images=a["val_images"][:0], val_labels=a["val_labels"][:0]), "val split is empty"),
        (lambda a: a.update(test_images=np.zeros((3, 28, 28, 3), np.uint8)), "different shapes or channel counts"),
        (lambda a: a.update(train_images=a["train_images"] / 255), "train_images is float64, uint8 is needed"),
        (lambda a: a.update(train_labels=a["train_labels"] + 5), "a label lies outside 0 to 1"),
        (lambda a: a.update(train_labels=a["train_labels"] + 0.5), "no whole numbers"),
        (lambda a: a.update(train_labels=np.zeros((6, 2), np.uint8)), "differ in width"),
        (
            lambda a: a.update({f"{s}_images": a[f"{s}_images"][:, :20] for s in ("train", "val", "test")}),
            r"images are \(20, 28\), pneumoniamnist at size 28 has \(28, 28\)",
        ),
    ],
)
def test_files_that_do_not_hold_together(tmp_path, change, message):
    arrays = medmnist_arrays()
    change(arrays)
    folder = write_npz(tmp_path / "data", "pneumoniamnist.npz", arrays)
    with pytest.raises(DataError, match=message) as caught:
        _open(tmp_path, folder, flag="pneumoniamnist")
    assert "pneumoniamnist.npz" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_damage_in_the_images_leaves_no_prepared_data(tmp_path):
    folder = write_npz(tmp_path / "data", "pneumoniamnist.npz", medmnist_arrays(n=(200, 2, 3)))
    data = bytearray((folder / "pneumoniamnist.npz").read_bytes())
    data[len(data) // 2] ^= 0xFF
    (folder / "pneumoniamnist.npz").write_bytes(bytes(data))
    with pytest.raises(DataError, match=r"pneumoniamnist\.npz \(train_images\): truncated or corrupt"):
        _open(tmp_path, folder, flag="pneumoniamnist")
    assert not [path for path in (tmp_path / "cache" / "prepared").iterdir() if path.is_dir()]


def test_changed_file_is_prepared_anew(tmp_path):
    arrays = medmnist_arrays()
    folder = write_npz(tmp_path / "data", "mine.npz", arrays)
    first = _open(tmp_path, folder, flag="mine").splits["train"].signals(slice(None))
    arrays["train_images"] = 255 - arrays["train_images"]
    write_npz(tmp_path / "data", "mine.npz", arrays)
    second = _open(tmp_path, folder, flag="mine").splits["train"].signals(slice(None))
    np.testing.assert_allclose(first + second, 1, rtol=1e-6)


def test_unknown_flag_and_size(tmp_path):
    with pytest.raises(SettingsError, match=r"'pneumonia' is no MedMNIST set \(did you mean pneumoniamnist\?\)"):
        _open(tmp_path, None, flag="pneumonia")
    with pytest.raises(SettingsError, match=r"data\.size of organmnist3d must be one of 28, 64, got 128"):
        _open(tmp_path, None, flag="organmnist3d", size=128)
    with pytest.raises(SettingsError, match=r"data\.flag is missing"):
        _open(tmp_path, None)


def test_no_network_names_file_url_and_remedy(tmp_path, monkeypatch):
    def refuse(url, timeout):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    (tmp_path / "data").mkdir()
    with pytest.raises(DataError, match="no route to host") as caught:
        _open(tmp_path, tmp_path / "data", flag="chestmnist", size=64)
    for part in (
        "chestmnist_64.npz is not in",
        "https://zenodo.org/records/10519652/files/chestmnist_64.npz",
        "as data_dir",
    ):
        assert part in str(caught.value)
    assert not list((tmp_path / "cache").rglob("*.part"))


def test_download_is_checked_and_kept(tmp_path, monkeypatch):
    stored = io.BytesIO()
    np.savez_compressed(stored, **medmnist_arrays())
    content = stored.getvalue()
    calls = []

    def serve(url, timeout):
        calls.append(url)
        return io.BytesIO(content)

    monkeypatch.setattr(urllib.request, "urlopen", serve)
    with pytest.raises(DataError, match="not 28209eda62fecd6e6a2d98b1501bb15f as published, and was refused"):
        _open(tmp_path, None, flag="pneumoniamnist")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    monkeypatch.setitem(medmnist._SETS["pneumoniamnist"].md5, 28, hashlib.md5(content).hexdigest())
    for _ in range(2):
        assert len(_open(tmp_path, None, flag="pneumoniamnist").splits["train"]) == 6
    assert len(calls) == 2
    kept = tmp_path / "cache" / "downloads" / "medmnist" / "pneumoniamnist.npz"
    kept.write_bytes(content[:-1])
    with pytest.raises(DataError, match="remove the file, it is then downloaded anew"):
        _open(tmp_path, None, flag="pneumoniamnist")


@pytest.mark.parametrize("fortran", [False, True])
@pytest.mark.parametrize(
    ("shape", "flag", "channels", "grid", "said"),
    [
        ((12, 10), "mine", 0, ((12, 10), 1), ""),
        ((12, 10, 1), "mine", 0, ((12, 10), 1), ""),
        ((12, 10, 3), "mine", 0, ((12, 10), 3), ""),
        ((12, 10, 4), "mine", 0, ((12, 10), 4), ""),
        ((12, 10, 1), "mine3d", 0, ((12, 10), 1), ""),
        ((12, 10, 2), "mine", 0, ((12, 10, 2), 1), "volumes of 12 x 10 x 2 voxels; .* data.channels=2"),
        ((12, 10, 9), "mine", 0, ((12, 10, 9), 1), "volumes of 12 x 10 x 9 voxels; .* data.channels=9"),
        ((12, 10, 4), "mine3d", 0, ((12, 10, 4), 1), "volumes of 12 x 10 x 4 voxels; .* data.channels=4"),
        ((12, 10, 2), "mine", 2, ((12, 10), 2), ""),
        ((12, 10, 4), "mine3d", 4, ((12, 10), 4), ""),
        ((12, 10, 4), "mine", 1, ((12, 10, 4), 1), ""),
        ((12, 10, 9, 1), "mine3d", 0, ((12, 10, 9), 1), ""),
        ((12, 10, 9, 3), "mine3d", 3, ((12, 10, 9), 3), ""),
    ],
)
def test_the_last_axis_of_another_file(tmp_path, caplog, shape, flag, channels, grid, said, fortran):
    arrays = medmnist_arrays(shape)
    if fortran:
        arrays = {name: np.asfortranarray(values) for name, values in arrays.items()}
    write_npz(tmp_path / "data", f"{flag}.npz", arrays)
    with caplog.at_level(logging.WARNING):
        data = _open(tmp_path, tmp_path / "data", flag=flag, channels=channels)
    assert (data.grid, data.channels) == grid
    for i, one in enumerate(data.splits["train"]):
        expected = arrays["train_images"][i].reshape(*data.grid, data.channels) / np.float32(255)
        np.testing.assert_array_equal(one["signal"], expected)
    assert bool(said) == bool(caplog.records)
    assert re.search(said, caplog.text)


@pytest.mark.parametrize(
    ("shape", "channels", "message"),
    [
        ((12, 10, 4), 3, r"images are \(12, 10, 4\), so data\.channels must be 4 or 1, not 3"),
        ((12, 10, 9, 2), 1, r"so data\.channels must be 2, not 1"),
        ((12, 10), 10, r"which leaves a grid of \(12,\); move an axis of channels to the end, or set data\.channels"),
        ((1, 12, 10), 0, r"which leaves a grid of \(1, 12, 10\); move an axis of channels to the end"),
    ],
)
def test_channels_that_the_images_do_not_have(tmp_path, shape, channels, message):
    write_npz(tmp_path / "data", "mine.npz", medmnist_arrays(shape))
    with pytest.raises(DataError, match=message):
        _open(tmp_path, tmp_path / "data", flag="mine", channels=channels)


def test_a_set_of_medmnist_may_have_an_axis_of_one_channel(tmp_path):
    write_npz(tmp_path / "data", "pneumoniamnist.npz", medmnist_arrays((28, 28, 1)))
    data = _open(tmp_path, tmp_path / "data", flag="pneumoniamnist")
    assert (data.grid, data.channels) == ((28, 28), 1)
    with pytest.raises(SettingsError, match=r"data\.channels must be 0 or 1, which pneumoniamnist has, got 3"):
        _open(tmp_path, tmp_path / "data", flag="pneumoniamnist", channels=3)
