"""Masks beside images: refused with a pattern that then works, and what only looks like them is read."""

import re
import shutil

import nibabel
import numpy as np
import pytest
from PIL import Image

from medfuncta_jax.datasets import DataError, open_dataset
from medfuncta_jax.settings import DataSettings
from tests.real_data import REAL, needs_real


def _open(tmp_path, source, folder, **options):
    settings = DataSettings(source, str(tmp_path / "cache"), tuple(sorted(options.items())))
    return open_dataset(settings, data_dir=str(folder))


def _advised(tmp_path, source, folder, message, **options):
    """The data read with the pattern that the refusal gives."""
    with pytest.raises(DataError, match=message) as caught:
        _open(tmp_path, source, folder, **options)
    pattern = re.search(r"give data\.pattern='(.*)'", str(caught.value))[1]
    data = _open(tmp_path, source, folder, pattern=pattern, **options)
    return {one["id"] for split in data.splits.values() for one in split}


def _image(path, seed, mask=False):
    values = np.random.default_rng(seed).integers(0, 256, (20, 20), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((values > 200).astype(np.uint8) * 255 if mask else values).save(path)


def _volume(path, seed, mask=False):
    values = np.random.default_rng(seed).integers(0, 900, (9, 9, 9)).astype(np.int16)
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image((values > 700).astype(np.uint8) * 2 if mask else values, np.eye(4)), path)


@needs_real
def test_the_medical_segmentation_decathlon(tmp_path):
    for name in ("imagesTr", "labelsTr"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for path in sorted((REAL / "hippocampus" / name).glob("*"))[:12]:
            shutil.copy(path, tmp_path / "data" / name)
    message = r"labelsTr/hippocampus_\d+\.nii\.gz is a mask of imagesTr/hippocampus_\d+\.nii\.gz"
    names = _advised(tmp_path, "nifti_folder", tmp_path / "data", message, grid=(8, 8, 8))
    assert len(names) == 12
    assert all(name.startswith("imagesTr/") for name in names)


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("images/{}.png", "masks/{}.png"),
        ("images/a/{}.png", "masks/a/{}.png"),
        ("case {}/image/x{}.png", "case {}/mask/x{}.png"),
        ("x{}_photo.png", "x{}_photo_segmentation.png"),
        ("{}_image.png", "{}_mask.png"),
    ],
)
def test_images(tmp_path, image, mask):
    for i in range(8):
        _image(tmp_path / "data" / image.format(i, i), i)
        _image(tmp_path / "data" / mask.format(i, i), i, mask=True)
    names = _advised(tmp_path, "image_folder", tmp_path / "data", "is a mask of", size=16)
    assert names == {image.format(i, i) for i in range(8)}


@pytest.mark.parametrize("mask", ["{}/{}-seg.nii.gz", "{}/{}_t1_mask.nii.gz"])
def test_volumes_of_a_case(tmp_path, mask):
    for i in range(6):
        _volume(tmp_path / "data" / f"{i}/{i}-t1.nii.gz", i)
        _volume(tmp_path / "data" / mask.format(i, i), i, mask=True)
    names = _advised(tmp_path, "nifti_folder", tmp_path / "data", "is a mask of", grid=(8, 8, 8))
    assert names == {f"{i}/{i}-t1.nii.gz" for i in range(6)}


def test_same_names_in_folders_of_classes_are_no_masks(tmp_path):
    for kind in ("ill", "well"):
        for i in range(6):
            _image(tmp_path / "data" / kind / f"{i}.png", (i, len(kind)))
            _image(tmp_path / "shapes" / kind / f"{i}.png", (i, len(kind)), mask=True)
    for folder in ("data", "shapes"):
        data = _open(tmp_path, "image_folder", tmp_path / folder, size=16)
        assert data.classes == ("ill", "well")
        assert sum(len(split) for split in data.splits.values()) == 12
