"""Decoding: the right values in the right place, at any resolution, from the run directory alone."""

import csv
import os
import shutil
import signal

import nibabel
import numpy as np
import pytest
from PIL import Image

import medfuncta_jax as mf
from experiments.runtime import run as runtime
from experiments.runtime.interruption import Interrupted, StopRequest
from experiments.runtime.run_directory import RunDirectory, RunError
from experiments.settings import RunSettings
from experiments.stages.decode import DecodeSettings, decode, decoded_shape, require_memory
from experiments.stages.signal_files import file_name
from medfuncta_jax.latent_file import LatentStoreError
from medfuncta_jax.settings import SettingsError
from tests.experiments.conftest import run as launch
from tests.latent_stores import made_up_dataset, write_field, write_latents


def settings_of(**decoding):
    return RunSettings.from_dict(
        {
            "data": {"source": "made up"},
            "model": {"layers": 3, "width": 8, "latent_dim": 4, "omega_first": 10.0, "omega_last": 20.0},
            "fit": {"steps": 2, "batch_size": 3},
            "decode": decoding,
        }
    )


class Run:
    """A run directory with a field and latents, whose data set is gone."""

    def __init__(self, path, grid, **options):
        self.path, self.grid = path, grid
        dataset = made_up_dataset(grid, **options)
        self.directory = RunDirectory(path, settings_of())
        self.field, self.params = write_field(path, settings_of(), dataset)
        write_latents(path, settings_of(), dataset)
        self.store = mf.load_latents(path)

    def with_settings(self, stop, **options):
        return runtime.Run(RunDirectory(self.path, settings_of(**options)), stop)

    def decode(self, **options):
        """Decode; returns the files of the test split in order."""
        with StopRequest() as stop:
            decode(self.with_settings(stop, **options))
        return sorted((self.path / "decoded").glob("test*/[0-9]*"))

    def values(self, shape):
        """What the files should hold, [n, *shape, D]."""
        values = mf.reconstruct(self.field, self.params, self.store["test"].latents, mf.grid(shape))
        return np.clip(np.asarray(values), 0, 1).reshape(-1, *shape, self.field.channels)


def test_volumes_overlay_each_other_in_the_world(tmp_path):
    """At twice the resolution corner voxels keep place and value, and with 2 n - 1 points every old voxel does."""
    run = Run(tmp_path, (4, 5, 3), affines=True)

    def volumes(place, **options):
        run.decode(**options)
        shutil.move(tmp_path / "decoded", tmp_path / place)  # out of the way of the next resolution
        return [nibabel.load(path) for path in sorted((tmp_path / place).glob("test*/*.nii.gz"))]

    same = volumes("same")
    double = volumes("double", scale=2.0)
    nested = volumes("nested", resolution=(7, 9, 5))
    assert len(same) == len(double) == len(nested) == 4
    for i in range(4):
        np.testing.assert_allclose(same[i].affine, run.store["test"].affines[i], atol=1e-5)
        assert double[i].shape == (8, 10, 6)
        for corner in np.ndindex(2, 2, 2):
            old, new = np.array(corner) * [3, 4, 2], np.array(corner) * [7, 9, 5]
            world = [image.affine @ [*index, 1] for image, index in ((same[i], old), (double[i], new))]
            np.testing.assert_allclose(world[1], world[0], atol=1e-4)
            values = [image.get_fdata()[tuple(index)] for image, index in ((same[i], old), (double[i], new))]
            np.testing.assert_allclose(values[1], values[0], atol=1e-6)
        np.testing.assert_allclose(nested[i].get_fdata()[::2, ::2, ::2], same[i].get_fdata(), atol=1e-6)
        np.testing.assert_allclose(nested[i].affine @ [2, 4, 2, 1], same[i].affine @ [1, 2, 1, 1], atol=1e-4)
        np.testing.assert_allclose(nested[i].get_fdata(), run.values((7, 9, 5))[i, ..., 0], atol=1e-6)
        assert nested[i].get_data_dtype() == np.float32
        assert nested[i].header.get_xyzt_units()[0] == "mm"
    assert [path.name for path in (tmp_path / "same" / "test").glob("0-*")] == ["0-test-0.nii.gz"]


def test_volumes_of_several_channels_without_a_place(tmp_path):
    run = Run(tmp_path, (3, 2, 4), channels=3)
    image = nibabel.load(run.decode()[1])
    np.testing.assert_allclose(image.get_fdata(), run.values((3, 2, 4))[1], atol=1e-6)
    np.testing.assert_array_equal(image.affine, np.eye(4))


@pytest.mark.parametrize("channels", [1, 3])
def test_images(tmp_path, channels):
    run = Run(tmp_path, (5, 4), channels=channels)
    files = run.decode(resolution=(9, 6))
    assert [path.name for path in files] == [f"{i}-test-{i}.png" for i in range(4)]
    for path, expected in zip(files, run.values((9, 6)), strict=True):
        with Image.open(path) as image:
            assert image.mode == {1: "L", 3: "RGB"}[channels]
            pixels = np.asarray(image).reshape(expected.shape)
        np.testing.assert_allclose(pixels / 255, expected, atol=0.5 / 255 + 1e-6)


def test_images_of_two_channels_are_refused(tmp_path):
    run = Run(tmp_path, (5, 4), channels=2)
    with pytest.raises(SettingsError, match="PNG holds 1 or 3 channels, this field has 2"):
        run.decode()


@pytest.mark.parametrize("channels", [1, 2])
def test_series(tmp_path, channels):
    run = Run(tmp_path, (9,), channels=channels)
    files = run.decode(resolution=(17,))
    with files[2].open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["position", *(["value"] if channels == 1 else ["value_0", "value_1"])]
    table = np.array(rows, float)
    np.testing.assert_allclose(table[:, 0], np.linspace(0, 8, 17))
    np.testing.assert_allclose(table[:, 1:], run.values((17,))[2], atol=1e-6)


def test_it_goes_on_where_it_was_stopped(tmp_path):
    run = Run(tmp_path, (5, 4))
    assert len(run.decode(limit=1)) == 1
    folder = tmp_path / "decoded" / "test"
    kept = folder / "0-test-0.png"
    os.utime(kept, (1, 1))
    (folder / ".1-test-1.partial9.png").write_bytes(b"half")
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Interrupted, match=f"finished files are in {folder}"):
            decode(run.with_settings(stop))
    assert len(run.decode()) == 4
    assert kept.stat().st_mtime == 1
    assert not list(folder.glob(".*"))


def test_all_splits(tmp_path):
    run = Run(tmp_path, (5, 4))
    run.decode(splits=("train", "val"), limit=2)
    assert {path.name for path in (tmp_path / "decoded").iterdir()} == {"train", "val"}
    assert {path.name for path in (tmp_path / "decoded" / "train").iterdir()} == {
        "0-train-0.png", "1-train-1.png", "about.json", "signals.csv"
    }  # fmt: skip
    with pytest.raises(LatentStoreError, match="split 'all'"):
        run.decode(splits=("all",))


def test_another_grid_is_written_beside(tmp_path):
    run = Run(tmp_path, (5, 4))
    files = run.decode()
    before = [path.read_bytes() for path in files]
    with StopRequest() as stop:
        decode(run.with_settings(stop, scale=2.0))
        decode(run.with_settings(stop, values="unit"))
    assert {path.name for path in (tmp_path / "decoded").iterdir()} == {"test", "test-10x8", "test-unit"}
    assert len(list((tmp_path / "decoded" / "test-10x8").glob("*.png"))) == 4
    assert [path.read_bytes() for path in files] == before


def test_files_of_other_latents_are_not_mixed(tmp_path):
    run = Run(tmp_path, (5, 4))
    run.decode()
    (tmp_path / "decoded" / "test" / "about.json").write_text("{")
    with pytest.raises(RunError, match=r"decoded from other latents; move or remove"):
        run.decode()


def test_a_grid_that_cannot_fit_is_refused_with_the_memory_it_needs(tmp_path):
    run = Run(tmp_path, (5, 4))
    with pytest.raises(SettingsError, match=r"a signal of 5000000x4000000 takes about 1\.12e\+06 GB of memory, and"):
        run.decode(scale=1e6)
    assert not list(tmp_path.glob("decoded/*/*.png"))
    require_memory((64, 64), 3)


def test_latents_of_another_field_are_refused(tmp_path):
    run = Run(tmp_path, (5, 4))
    write_field(tmp_path, settings_of(), made_up_dataset((5, 4)), seed=1)
    with pytest.raises(LatentStoreError, match="latents of another field"):
        run.decode()
    assert not (tmp_path / "decoded").exists()


def shape_of(trained, **options):
    config = DecodeSettings(**options)
    return decoded_shape(config.resolution, config.scale, trained)


@pytest.mark.parametrize(
    ("options", "trained", "expected"),
    [
        ({}, (5, 4), (5, 4)),
        ({"scale": 2.0}, (5, 4), (10, 8)),
        ({"scale": 0.1}, (5, 40), (1, 4)),
        ({"scale": 2.0}, (1, 4), (1, 8)),
        ({"resolution": (7, 3)}, (5, 4), (7, 3)),
    ],
)
def test_the_grid(options, trained, expected):
    assert shape_of(trained, **options) == expected


@pytest.mark.parametrize("resolution", [(5,), (5, 4, 3)])
def test_a_grid_of_other_axes(resolution):
    with pytest.raises(SettingsError, match=r"decode\.resolution must have 2 entries"):
        shape_of((5, 4), resolution=resolution)


def test_an_axis_without_extent():
    with pytest.raises(SettingsError, match=r"decode\.resolution must be 1 where"):
        shape_of((1, 4), resolution=(2, 4))


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("sub 1/T1w.nii.gz", "007-T1w.nii.gz"),
        ("../../etc/passwd", "007-passwd.nii.gz"),
        ("Ü.png", "007.nii.gz"),
        ("", "007.nii.gz"),
        ("..", "007.nii.gz"),
        ("a" * 300, "007-" + "a" * 120 + ".nii.gz"),
        ("mitbih.csv:000012", "007-mitbih.csv_000012.nii.gz"),
        ("line\nbreak\0", "007-line_break.nii.gz"),
    ],
)
def test_names_are_safe(name, safe):
    assert file_name(7, count=300, name=name, suffix=".nii.gz") == safe


def test_the_launcher_needs_the_run_directory_only(finished, tmp_path):
    shutil.copy(finished / "field.safetensors", tmp_path)
    shutil.copytree(finished / "latents", tmp_path / "latents")
    options = {"mode": "decode", "extra": ["--data_dir=/no/such/folder"], "decode__limit": 3}
    done = launch(tmp_path, **options, decode__resolution="(64,48)", decode__splits="('test','val')")
    assert done.returncode == 0, done.stderr
    for split in ("test", "val"):
        files = sorted((tmp_path / "decoded" / f"{split}-64x48").glob("*.png"))
        assert len(files) == 3
        with Image.open(files[0]) as image:
            assert image.size == (48, 64)
    done = launch(tmp_path, **options, decode__scale=0.5)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "decoded" / "test-16x16").glob("*.png"))) == 3
    done = launch(tmp_path, **options, decode__scale=1e5)
    assert done.returncode == 1
    assert done.stderr.startswith("error: decode.scale or decode.resolution: a signal of 3200000x3200000 takes about")
