"""Masks beside images: refused as signals, with a pattern that then works, and read as labels of their images."""

import dataclasses
import re
import shutil

import nibabel
import numpy as np
import pytest
from PIL import Image

from medfuncta_jax.datasets import DataError, image_folder, mask_reader, nifti_folder, open_dataset
from medfuncta_jax.datasets.masks import matched_masks
from medfuncta_jax.datasets.volumes import nearest, resample
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


def test_masks_are_matched_by_name_in_another_folder(tmp_path):
    for k in range(4):
        _image(tmp_path / "scans" / f"case_{k}.png", k)
        _image(tmp_path / "truth" / f"case_{k}_mask.png", 9 + k, mask=True)
    (tmp_path / "truth" / "list.json").write_text("{}")
    ids = [f"scans/case_{k}.png" for k in range(4)]
    for where in ("truth", "truth/*.png", "**/*.png", str(tmp_path / "truth")):
        found = matched_masks(where, ids, data_dir=str(tmp_path))
        assert found == {f"scans/case_{k}.png": tmp_path / "truth" / f"case_{k}_mask.png" for k in range(4)}
    with pytest.raises(DataError, match=r"truth: 1 mask \(case_3_mask.png\) without a signal of the same name; move"):
        matched_masks("truth", ids[:3], data_dir=str(tmp_path))
    assert len(matched_masks("truth", ids[:3], data_dir=str(tmp_path), unused=ids[3:])) == 3
    more = [*ids, "scans/a.png", "scans/b.png", "scans/c.png", "scans/d.png"]
    with pytest.raises(DataError, match=r"4 signals \(scans/a.png, scans/b.png, scans/c.png and 1 more\) without a ma"):
        matched_masks("truth", more, data_dir=str(tmp_path))
    with pytest.raises(DataError, match="no file beside the signals matches 'scans'"):
        matched_masks("scans", ids, data_dir=str(tmp_path))
    with pytest.raises(DataError, match="elsewhere: no such folder of masks"):
        matched_masks("/elsewhere", ids, data_dir=str(tmp_path))
    _image(tmp_path / "more" / "case_2.png", 5, mask=True)
    with pytest.raises(DataError, match=r"may both be the mask of scans/case_2.png; name one folder"):
        matched_masks("*[he]/*.png", ids, data_dir=str(tmp_path))


def test_one_name_in_several_folders_goes_to_the_nearest(tmp_path):
    ids = [f"{split}/images/{k}.png" for split in ("train", "test") for k in (1, 2)]
    for name in ids:
        _image(tmp_path / name.replace("images", "masks"), 1, mask=True)
    found = matched_masks("*/masks/*", ids, data_dir=str(tmp_path))
    assert found == {name: tmp_path / name.replace("images", "masks") for name in ids}


def test_nearest_labels_lie_where_resampled_values_do():
    rng = np.random.default_rng(0)
    for inputs, outputs, step in ((7, 5, 1.3), (5, 9, 0.6), (6, 3, 2.0), (6, 12, 0.5), (4, 6, 1.0)):
        labels = rng.integers(1, 4, inputs)
        found = nearest(labels, (outputs,), (step,))
        assert found.shape == (outputs,)
        np.testing.assert_array_equal(nearest(labels[::-1], (outputs,), (step,)), found[::-1])
        places = resample(np.arange(inputs) + 1.0, (outputs,), (step,)) - 1  # of interpolation, where not at the ends
        inside = (places > 0) & (places < inputs - 1)
        far = np.abs(places % 1 - 0.5) > 0.01
        chosen = inside & far & (step <= 1)
        np.testing.assert_array_equal(found[chosen], labels[np.rint(places[chosen]).astype(int)])
        np.testing.assert_array_equal(found > 0, resample(np.ones(inputs), (outputs,), (step,)) > 0)


def test_masks_of_images_have_their_crop_and_labels(tmp_path):
    """A mask that says the grey value of each block of its image lies on it after crop, padding and turning."""
    blocks = np.kron(np.random.default_rng(0).integers(1, 5, (6, 9)), np.ones((8, 8), int)).astype(np.uint8)
    grey = np.array([0, 10, 47, 119, 233], np.uint8)  # of labels; no mean of some is another
    for name, values in (("image", grey[blocks]), ("mask", blocks)):
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned
        Image.fromarray(values).save(tmp_path / f"{name}.png", exif=exif)
    for fit in ("crop", "pad"):
        options = image_folder.Options(size=(24, 24), fit=fit)
        settings = DataSettings("image_folder", options=tuple(sorted(dataclasses.asdict(options).items())))
        found = mask_reader(settings, data_dir=str(tmp_path))(tmp_path / "mask.png", tmp_path / "image.png")
        plan = image_folder.plan_new(options, tmp_path, {"a": tmp_path / "image.png"}, grid=(24, 24), channels=1)
        (example,) = plan.splits["new"].examples()
        of_one_label = np.abs(example.signal * 255 - grey) < 0.01  # [24, 24, 5]
        whole = of_one_label.any(-1)
        assert whole.mean() > 0.4
        np.testing.assert_array_equal(found[whole], of_one_label.argmax(-1)[whole])
    for labels, message in ((np.zeros((3, 3)), "a mask of 3x3 pixels, its image image.png has 72x48"),
                            (np.arange(48 * 72).reshape(72, 48) % 99, "99 values from 0 to 98, a mask has at most 64"),
                            (np.stack([blocks.T] * 2 + [blocks.T + 1], -1), "a mask in colours")):  # fmt: skip
        Image.fromarray(labels.astype(np.uint8)).save(tmp_path / "bad.png")
        with pytest.raises(DataError, match=message):
            mask_reader(settings, data_dir=str(tmp_path))(tmp_path / "bad.png", tmp_path / "image.png")


def test_masks_of_volumes_lie_on_their_scan(tmp_path):
    """Also where image and mask are stored with other axes, on a finer grid, and padded."""
    rng = np.random.default_rng(0)
    labels = np.kron(rng.integers(1, 4, (4, 3, 5)), np.ones((4, 4, 4), int))
    affine, grey = np.diag([1.0, 1.0, 2.0, 1.0]), np.array([0.0, 100.0, 170.0, 300.0])
    nibabel.save(nibabel.Nifti1Image(grey[labels], affine), tmp_path / "image.nii.gz")
    mask = nibabel.Nifti1Image(labels.astype(np.uint8), affine)
    turned = mask.as_reoriented(nibabel.orientations.axcodes2ornt("PIL"))
    nibabel.save(turned, tmp_path / "mask.nii.gz")
    settings = DataSettings("nifti_folder", options=(("grid", (24, 24, 24)), ("quantile_high", 1.0)))
    options = nifti_folder.Options(grid=(24, 24, 24), quantile_low=0.0, quantile_high=1.0)
    plan = nifti_folder.plan_new(options, tmp_path, {"a": tmp_path / "image.nii.gz"}, grid=options.grid, channels=1)
    (example,) = plan.splits["new"].examples()
    found = mask_reader(settings, data_dir=None)(tmp_path / "mask.nii.gz", tmp_path / "image.nii.gz")
    assert found.shape == (24, 24, 24)
    outside = found == 0
    assert 0.3 < outside.mean() < 0.9
    of_one_label = np.abs(example.signal * 200 + 100 - grey) < 1e-3
    whole = ~outside & of_one_label.any(-1)
    assert whole.sum() > 500
    np.testing.assert_array_equal(found[whole], of_one_label.argmax(-1)[whole])
    finer = mask_reader(settings, data_dir=None, scale=2)(tmp_path / "mask.nii.gz", tmp_path / "image.nii.gz")
    assert finer.shape == (48, 48, 48)
    inner = finer[::2, ::2, ::2] == finer[1::2, 1::2, 1::2]
    assert inner.mean() > 0.5
    assert (finer[::2, ::2, ::2] == found)[inner].mean() > 0.9

    shifted = affine.copy()
    shifted[0, 3] = 3
    for data, at, message in ((labels[1:], affine, "a mask of 15x12x20 voxels, its image image.nii.gz has 16x12x20"),
                              (labels, shifted, "puts its voxels 3 mm from those of its image"),
                              (labels + 0.5, affine, "with the value 1.5, which is no whole number"),
                              (-labels, affine, "values from -3 to -1")):  # fmt: skip
        nibabel.save(nibabel.Nifti1Image(data.astype(np.float32), at), tmp_path / "bad.nii.gz")
        with pytest.raises(DataError, match=message):
            mask_reader(settings, data_dir=None)(tmp_path / "bad.nii.gz", tmp_path / "image.nii.gz")


def test_sources_without_masks_say_so():
    with pytest.raises(DataError, match="the source medmnist reads no masks; image_folder and nifti_folder do"):
        mask_reader(DataSettings("medmnist"), data_dir=None)
