"""Equal signals under several names: copies, links, formats and depths; and different ones that must all stay."""

import logging
import shutil

import nibabel
import numpy as np
import pytest
from PIL import Image

from medfuncta_jax.datasets import DataError, equal_signals, open_dataset
from medfuncta_jax.settings import DataSettings
from tests.real_data import REAL, needs_real


def _open(tmp_path, source, folder, **options):
    settings = DataSettings(source, str(tmp_path / "cache"), tuple(sorted(options.items())))
    return open_dataset(settings, data_dir=str(folder))


def _ids(data):
    return [one["id"] for split in data.splits.values() for one in split]


def _smooth(seed, shape, levels):
    """A field of random waves that fills 0 to `levels`, as whole numbers."""
    rng, axes = np.random.default_rng(seed), np.meshgrid(*(np.linspace(0, 6, n) for n in shape), indexing="ij")
    values = sum(np.sin(rng.uniform(0.5, 2) * axis + rng.uniform(0, 6)) for axis in axes for _ in range(3))
    return np.rint((values - values.min()) / np.ptp(values) * levels)


def test_volumes_in_several_formats_are_one(tmp_path, caplog):
    """A copy in another folder, NIfTI with and without gzip, and both files of an Analyze image."""
    folder = tmp_path / "data"
    for i in range(12):
        path = folder / f"scan {i:02d}.nii.gz"
        path.parent.mkdir(exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(_smooth(i, (9, 10, 11), 900).astype(np.int16), np.eye(4)), path)
    nibabel.save(nibabel.load(folder / "scan 03.nii.gz"), folder / "scan 03.nii")
    (folder / "other").mkdir()
    shutil.copy(folder / "scan 05.nii.gz", folder / "other" / "b.nii.gz")
    (folder / "link.nii.gz").symlink_to(folder / "scan 07.nii.gz")
    with caplog.at_level(logging.WARNING):
        data = _open(tmp_path, "nifti_folder", folder, grid=(8, 8, 8))
    assert len(_ids(data)) == 12
    repeated = data.about["repeated"]
    assert {frozenset(pair) for pair in repeated.items()} == {
        frozenset({"scan 03.nii", "scan 03.nii.gz"}),
        frozenset({"scan 05.nii.gz", "other/b.nii.gz"}),
        frozenset({"scan 07.nii.gz", "link.nii.gz"}),
    }
    assert not set(repeated) & set(_ids(data))
    for one, other in repeated.items():
        assert any(f"{one} (" in line and f"same signal as {other} (" in line for line in caplog.messages)
    again = _open(tmp_path, "nifti_folder", folder, grid=(8, 8, 8))  # from the cache
    assert _ids(again) == _ids(data)
    assert [again.contents[name].ids for name in again.splits] == [
        tuple(one["id"] for one in split) for split in data.splits.values()
    ]


def test_both_files_of_analyze_images_are_one_and_in_one_split(tmp_path):
    (tmp_path / "data").mkdir()
    for i in range(6):
        image = nibabel.Spm99AnalyzeImage(_smooth(i, (9, 10, 11), 900).astype(np.int16), np.eye(4))
        nibabel.save(image, tmp_path / "data" / f"{i}.img")
    data = _open(tmp_path, "nifti_folder", tmp_path / "data", grid=(8, 8, 8), pattern="**/*.[hi][dm]*")
    assert sorted(_ids(data)) == [f"{i}.hdr" for i in range(6)]
    assert data.about["repeated"] == {f"{i}.img": f"{i}.hdr" for i in range(6)}


@pytest.mark.parametrize("cut", [np.rint, np.floor])
def test_8_and_16_bits_are_one(tmp_path, cut):
    (tmp_path / "data" / "deep").mkdir(parents=True)
    for i in range(8):
        deep = _smooth(i, (40, 50), 65535)
        Image.fromarray(deep.astype(np.uint16)).save(tmp_path / "data" / "deep" / f"{i}.png")
        Image.fromarray(cut(deep / 65535 * 255).astype(np.uint8)).save(tmp_path / "data" / f"small {i}.tif")
    data = _open(tmp_path, "image_folder", tmp_path / "data", size=32)
    assert len(_ids(data)) == 8
    assert {one.split(".")[0][-1]: other.split(".")[0][-1] for one, other in data.about["repeated"].items()} == {
        str(i): str(i) for i in range(8)
    }


def test_a_split_of_repetitions_alone_is_refused(tmp_path):
    for split in ("train", "test"):
        for i in range(4):
            path = tmp_path / "data" / split / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(_smooth(i, (20, 20), 255).astype(np.uint8)).save(path)
    with pytest.raises(DataError, match=r"the test split is empty, for all .* repeat others \(test/0\.png is train/0"):
        _open(tmp_path, "image_folder", tmp_path / "data", size=16)


def test_another_label_is_said(tmp_path, caplog):
    for kind, seeds in (("ill", range(6)), ("well", (9, 10, 11, 12, 13, 0))):
        for i, seed in enumerate(seeds):
            path = tmp_path / "data" / kind / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(_smooth(seed, (20, 20), 255).astype(np.uint8)).save(path)
    with caplog.at_level(logging.WARNING):
        data = _open(tmp_path, "image_folder", tmp_path / "data", size=16)
    assert len(data.about["repeated"]) == 1
    assert "with another label" in caplog.text


def test_dark_or_blank_images_that_differ_are_not_one(tmp_path):
    """8 bits in a 16-bit file: all are within 0.4 % of each other, but not within that part of their own range."""
    (tmp_path / "data").mkdir()
    for i in range(300):
        Image.fromarray(_smooth(i, (20, 20), 255).astype(np.uint16)).save(tmp_path / "data" / f"{i}.png")
    for i in range(3):
        Image.fromarray(np.full((20, 20), i, np.uint8)).save(tmp_path / "data" / f"blank {i}.png")
    data = _open(tmp_path, "image_folder", tmp_path / "data", size=16)
    assert len(_ids(data)) == 303
    assert data.about["repeated"] == {}


def test_many_copies_cost_no_square(tmp_path):
    asked = []
    vectors = np.repeat(np.arange(4, dtype=np.uint16)[:, None] * 9000, 66, 1)
    vectors[:, -1] = 60000
    rows = np.arange(20_000) % 4

    def signal(row):
        asked.append(row)
        return np.array([[0.0], [rows[row] / 4 + 0.1]])

    same_as = equal_signals.repeated(vectors[rows], signal)
    assert same_as[:4] == [-1] * 4
    assert same_as[4:] == [i % 4 for i in range(4, 20_000)]
    assert len(asked) <= 2 * 20_000


@needs_real
@pytest.mark.parametrize(
    ("source", "folder", "options"),
    [
        ("nifti_folder", "hippocampus/imagesTr", {"grid": (16, 16, 16)}),
        ("series_folder", "ecg", {"layout": "row", "label_column": "-1", "length": 187, "value_range": (0.0, 1.0)}),
    ],
)
def test_different_real_signals_all_stay(tmp_path, source, folder, options):
    data = _open(tmp_path, source, REAL / folder, **options)
    assert data.about["repeated"] == {}
    assert len(_ids(data)) in (100, 7500)
