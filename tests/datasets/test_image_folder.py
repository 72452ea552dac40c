"""A folder of images: depth, orientation, fitting, labels from folders or a table, and files that are no images."""

import logging
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medfuncta_jax.datasets import DataError, open_dataset
from medfuncta_jax.datasets.image_folder import read_image
from medfuncta_jax.settings import DataSettings, SettingsError
from tests.datasets.skips import assert_only_skipped
from tests.real_data import REAL, needs_real


def _open(tmp_path, **options):
    source = DataSettings("image_folder", str(tmp_path / "cache"), tuple(sorted(options.items())))
    return open_dataset(source, data_dir=str(tmp_path / "data"))


def _save(folder, name, values, **options):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path, **options)
    return path


def _noise(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


@pytest.fixture
def folder(tmp_path):
    """Ten grey images of mixed sizes and kinds."""
    for i in range(10):
        suffix = ("png", "JPG", "tif", "jpeg", "tiff")[i % 5]
        _save(tmp_path / "data", f"film é {i}.{suffix}", _noise(i, 20 + i, 30))
    return tmp_path / "data"


def _everything(data):
    return {one["id"]: one for split in data.splits.values() for one in split}


@needs_real
def test_real_images_come_back(tmp_path):
    with np.load(REAL / "bccdcells_64.npz") as file:
        images, labels = file["train_images"][:12], file["train_labels"].ravel()[:12]
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        _save(tmp_path / "data", f"class {label}/{i}.png", image)
    data = _open(tmp_path, size=64)
    assert (data.grid, data.channels) == ((64, 64), 3)
    found = _everything(data)
    assert len(found) == 12
    for name, one in found.items():
        row = int(Path(name).stem)
        np.testing.assert_allclose(one["signal"], images[row] / 255, atol=1e-6)
        assert data.classes[one["label"]] == f"class {labels[row]}"


def test_split_by_file(tmp_path, folder):
    data = _open(tmp_path, size=(8, 12))
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 7, "val": 2, "test": 1}
    assert {name: list(split.annotations().ids) for name, split in data.splits.items()} == data.about["split"]
    assert (data.grid, data.channels, data.classes, data.task) == ((8, 12), 1, (), "none")
    assert all(one["signal"].shape == (8, 12, 1) and one["label"] == -1 for one in _everything(data).values())


def test_crop_and_pad_keep_pixels_square(tmp_path):
    values = np.zeros((40, 80), np.uint8)
    values[:, 20:60] = 200  # the central square
    for i in range(3):
        _save(tmp_path / "data", f"{i}.png", values if i == 0 else _noise(i, 40, 80))
    cropped = _everything(_open(tmp_path, size=10))["0.png"]["signal"][..., 0]
    np.testing.assert_allclose(cropped, 200 / 255, rtol=1e-5)
    padded = _everything(_open(tmp_path, size=10, fit="pad"))["0.png"]["signal"][..., 0]
    expected = np.zeros((10, 10))
    expected[2:8, 2:8] = 200 / 255
    expected[[2, 7]] = padded[[2, 7]]  # half of their windows lies outside
    np.testing.assert_allclose(padded[3:7], expected[3:7], atol=0.5 * 200 / 255)
    np.testing.assert_array_equal(padded[:2], 0)
    np.testing.assert_array_equal(padded[8:], 0)
    assert padded[5, 5] == pytest.approx(200 / 255)
    assert padded[5, 0] == 0


def test_shrinking_does_not_alias(tmp_path):
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 255
    for i in range(3):
        _save(tmp_path / "data", f"{i}.png", stripes if i == 0 else _noise(i, 64, 64))
    np.testing.assert_allclose(_everything(_open(tmp_path, size=16))["0.png"]["signal"], 0.5, atol=1e-6)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bits_keep_their_precision(tmp_path, suffix):
    values = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16 + 3
    unit, units = read_image(_save(tmp_path, f"deep.{suffix}", values), 1)
    assert units.dtype == "uint16"
    np.testing.assert_allclose(unit[..., 0], values / 65535, atol=1e-7)
    unit, _ = read_image(tmp_path / f"deep.{suffix}", 3, (0, 4095))
    np.testing.assert_allclose(unit[..., 2], np.minimum(values / 4095, 1), atol=1e-6)


def test_white_is_zero_is_turned_round(tmp_path):
    values = (np.arange(64, dtype=np.uint16) * 1000).reshape(8, 8)
    unit, _ = read_image(_save(tmp_path, "film.tif", values, tiffinfo={262: 0}), 1)
    np.testing.assert_allclose(unit[..., 0], 1 - values / 65535, atol=1e-6)


def test_12_bits_in_16_are_noted(tmp_path, caplog):
    for i in range(3):
        _save(tmp_path / "data", f"{i}.png", (_noise(i, 9, 9).astype(np.uint16) + 1) * 15)
    with caplog.at_level(logging.WARNING):
        _open(tmp_path, size=4)
    assert "set data.value_range, as in (0, 4095)" in caplog.text


def test_other_pixel_types(tmp_path):
    grey, colour = _noise(0, 6, 5), _noise(1, 6, 5, 3)
    alpha = np.dstack([colour, np.full((6, 5), 255, np.uint8)])
    alpha[0, 0, 3] = 0
    seen, _ = read_image(_save(tmp_path, "alpha.png", alpha), 3)
    np.testing.assert_allclose(seen[1:], colour[1:] / 255, atol=1e-6)
    assert (seen[0, 0] == 0).all()
    bits = grey > 127
    np.testing.assert_array_equal(read_image(_save(tmp_path, "bits.png", bits), 1)[0][..., 0], bits)
    repeated, _ = read_image(_save(tmp_path, "grey.png", grey), 3)
    np.testing.assert_allclose(repeated, np.repeat(grey[..., None] / 255, 3, 2), atol=1e-6)
    luma, _ = read_image(_save(tmp_path, "colour.png", colour), 1)
    np.testing.assert_allclose(luma[..., 0], colour @ [0.299, 0.587, 0.114] / 255, atol=0.6 / 255)
    floats = _save(tmp_path, "float.tif", grey.astype(np.float32) * 10 - 1000)
    with pytest.raises(DataError, match=r"float\.tif: 32-bit pixels have no range .* data\.value_range"):
        read_image(floats, 1)
    np.testing.assert_allclose(read_image(floats, 1, (-1000, 1550))[0][..., 0], grey / 255, atol=1e-6)
    with pytest.raises(DataError, match="some pixels are NaN or infinite"):
        read_image(_save(tmp_path, "nan.tif", np.full((4, 4), np.nan, np.float32)), 1, (0, 1))


def test_camera_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter: shown, rows are columns from the bottom up
    values = _noise(0, 4, 6)
    unit, _ = read_image(_save(tmp_path, "turned.png", values, exif=exif), 1)
    np.testing.assert_allclose(unit[..., 0], np.rot90(values, -1) / 255, atol=1e-6)


def test_folders_of_splits_and_classes(tmp_path):
    for split, n in (("train", 6), ("test", 3)):
        for kind in ("ill", "well"):
            for i in range(n):
                _save(tmp_path / "data", f"{split}/{kind}/{i}.png", _noise([len(split), len(kind), i], 8, 8))
    data = _open(tmp_path, size=8)
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 11, "val": 1, "test": 6}
    assert all(one["id"].startswith("test/") for one in data.splits["test"])
    assert all(f"/{data.classes[one['label']]}/" in one["id"] for one in _everything(data).values())
    assert data.about["split_rule"].startswith("as in the folders train, test; val by file")
    _save(tmp_path / "data", "Validation/ill/0.png", _noise(0, 8, 8))
    given = _open(tmp_path, size=8)
    assert [one["id"] for one in given.splits["val"]] == ["Validation/ill/0.png"]
    _save(tmp_path / "data", "other/ill/0.png", _noise(0, 8, 8))
    with pytest.raises(DataError, match=r"1 files such as other/ill/0\.png lie beside the folders of the splits"):
        _open(tmp_path, size=8)


def test_table_of_labels_and_patients(tmp_path, folder, caplog):
    rows = [f"film é {i},{'ab'[i % 2]},p{i // 2}" for i in range(9)]
    (folder / "labels.csv").write_text("\n".join(["file,finding,patient", *rows]), "utf-8")
    options = {"labels": "labels.csv", "label_column": "finding", "patient_column": "patient"}
    with caplog.at_level(logging.WARNING):
        data = _open(tmp_path, size=4, **options)
    assert "1 of 10 signals have no label" in caplog.text
    assert (data.classes, data.task) == (("a", "b"), "binary-class")
    place = {}
    for name, split in data.splits.items():
        for one in split:
            number = int(one["id"].split()[2].split(".")[0])
            assert one["label"] == (-1 if number == 9 else number % 2)
            place.setdefault(number // 2 if number < 9 else "alone", set()).add(name)
    assert all(len(splits) == 1 for splits in place.values())
    assert data.about["split_rule"] == "by patient, a hash with seed 42"
    before = len(list((tmp_path / "cache" / "prepared").glob("image_folder-*[!k]")))
    (folder / "labels.csv").write_text("\n".join(["file,finding,patient", *rows[::-1]]), "utf-8")
    _open(tmp_path, size=4, **options)
    assert len(list((tmp_path / "cache" / "prepared").glob("image_folder-*[!k]"))) == before  # labels are joined


def test_mixed_channels_are_refused_unless_said(tmp_path, folder):
    _save(folder, "colour.png", _noise(0, 9, 9, 3))
    with pytest.raises(DataError, match=r"colour\.png: 3 channels \(1 such files\), but film é 0\.png has 1 \(10 such"):
        _open(tmp_path)
    assert _open(tmp_path, channels=1, size=4).channels == 1
    assert _open(tmp_path, channels=3, size=4).splits["train"][0]["signal"].shape == (4, 4, 3)


def _cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("film é 1.JPG", _cut, "truncated image"),
        ("film é 0.png", _cut, "(truncated|unreadable) image"),
        ("film é 2.tif", _cut, "(truncated|unreadable) image"),
        ("film é 3.jpeg", lambda path: path.write_text("not an image"), "unreadable image"),
        ("film é 4.tiff", lambda path: path.write_bytes(b""), "unreadable image"),
        (
            "film é 5.png",
            lambda path: path.write_bytes(path.read_bytes()[:60] + bytes(40)),
            "(truncated|unreadable) image",
        ),
    ],
)
@pytest.mark.parametrize("channels", [0, 1])
def test_damaged_image_is_skipped_and_listed(tmp_path, folder, name, spoil, message, channels):
    for i in range(10):
        _save(folder, f"more {i}.png", _noise(i, 9, 9))
    spoil(folder / name)
    data = _open(tmp_path, channels=channels, size=4)
    assert data.channels == 1
    assert_only_skipped(data, name, rf"{name}: {message} \(.*\); copy the file anew or remove it")


def test_no_image_can_be_read(tmp_path, folder):
    for path in folder.iterdir():
        path.write_bytes(b"junk")
    for channels in (0, 1):
        with pytest.raises(DataError, match=r"film é \d\.\w+: unreadable image") as caught:
            _open(tmp_path, channels=channels)
        assert len(str(caught.value).splitlines()) == 1


def test_stack_is_skipped_and_images_too_large_are_refused(tmp_path, folder, monkeypatch):
    pages = [Image.fromarray(_noise(i, 8, 8)) for i in range(3)]
    pages[0].save(folder / "stack.tif", save_all=True, append_images=pages[1:])
    assert_only_skipped(_open(tmp_path, size=4), "stack.tif", r"stack\.tif: a stack of 3 pages")
    (folder / "stack.tif").unlink()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match="an image of more than 200 pixels; make it smaller or remove it"):
        _open(tmp_path)


def test_links_in_a_circle_and_hidden_files(tmp_path, folder):
    (folder / "circle").symlink_to(folder, target_is_directory=True)
    (folder / "self.png").symlink_to(folder / "self.png")
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    (folder / "._film.png").write_bytes(b"junk")
    (folder / "notes.txt").write_text("junk")
    (folder / "odd [1] *?.png").write_bytes((folder / "film é 0.png").read_bytes())
    assert len(_everything(_open(tmp_path, size=4))) == 11


def test_file_name_that_cannot_be_an_id(tmp_path, folder):
    (folder / "two\nlines.png").write_bytes(b"junk")
    with pytest.raises(DataError, match=r"file name 'two\\nlines\.png' holds a line break") as caught:
        _open(tmp_path)
    assert len(str(caught.value).splitlines()) == 1
    (folder / "two\nlines.png").unlink()
    try:
        open(os.fsencode(folder) + b"/\xff.png", "wb").close()
    except OSError:
        pytest.skip("this file system has no such names")
    with pytest.raises(DataError, match="is not UTF-8; rename the file"):
        _open(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 1}, r"data\.size must be one or two numbers"),
        ({"size": (8, 8, 8)}, r"data\.size must be one or two numbers"),
        ({"size": "big"}, r"data\.size must be"),
        ({"channels": 2}, r"data\.channels must be one of 0, 1, 3"),
        ({"value_range": (1.0,)}, "value_range must be two rising numbers"),
        ({"value_range": (1.0, 1.0)}, "value_range must be two rising numbers"),
        ({"pattern": "**.png"}, "pattern must be a glob inside the data directory"),
        ({"pattern": ""}, "pattern must be a glob inside the data directory"),
    ],
)
def test_options_out_of_range(tmp_path, folder, options, message):
    with pytest.raises(SettingsError, match=message):
        _open(tmp_path, **options)


def test_no_images_and_too_few(tmp_path, folder):
    with pytest.raises(DataError, match=r"0 files match '\*\.bmp' with a suffix of \.png \.jpg"):
        _open(tmp_path, pattern="*.bmp")
    with pytest.raises(DataError, match=r"2 signals of files that match .* at least 3 are needed"):
        _open(tmp_path, pattern="film*[03].*g")
