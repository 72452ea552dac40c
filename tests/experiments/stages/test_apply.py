"""A finished field on new files, with the run directory alone."""

import csv
import json
import shutil

import nibabel
import numpy as np
import pytest

import medfuncta_jax as mf
from experiments.stages.apply import distances
from tests.experiments.command_line import run_module
from tests.experiments.conftest import run as launch
from tests.real_data import REAL, needs_real

IMAGES = REAL / "hippocampus"
VOLUMES = {
    "config": "configs/brain_mri.py:folder_cpu", "data__grid": "(12,12,12)", "data__pattern": "*.nii.gz",
    "train__selection_ratio": 1.0, "train__batch_size": 4, "train__steps": 300, "train__eval_every": 100,
    "train__optimizer": "muon", "model__latent_dim": 64,
}  # fmt: skip


@pytest.fixture(scope="module")
def volumes(cache, tmp_path_factory):
    """A run on ten volumes, and a folder with one of them, two that are new, noise, and a file that is none."""
    base = tmp_path_factory.mktemp("volumes")
    scans = sorted(path for path in IMAGES.rglob("*.nii*") if "mask" not in str(path) and "label" not in str(path))
    (base / "data").mkdir()
    (base / "new").mkdir()
    for path in scans[:10]:
        shutil.copy(path, base / "data" / path.name)
    for path in scans[9:12]:
        shutil.copy(path, base / "new" / path.name)
    first = nibabel.load(scans[0])
    noise = np.kron(np.random.default_rng(0).integers(0, 2, (3, 5, 3)), np.full((12, 12, 12), 1000)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(noise, first.affine), base / "new" / "noise.nii.gz")
    (base / "new" / "broken.nii.gz").write_bytes(b"no image")
    done = launch(base / "run", extra=[f"--data_dir={base / 'data'}"], **VOLUMES)
    assert done.returncode == 0, done.stderr
    return base


def apply(base, *words):
    return run_module("experiments.main", f"--workdir={base / 'run'}", "--mode=apply", *words)


@needs_real
def test_new_volumes(volumes):
    done = apply(volumes, f"--data_dir={volumes / 'new'}")
    assert done.returncode == 0, done.stderr
    out = volumes / "run" / "applied" / "new"
    store, run = mf.load_latents(out, field=volumes / "run"), mf.load_latents(volumes / "run")
    assert list(store) == ["new"]
    new = store["new"]
    assert len(new) == 4

    # The one that the run has seen gets the latent, the place and the units that it has there.
    seen = next(name for name in new.ids if (volumes / "data" / name).exists())
    split = next(split for split in run.values() if seen in split.ids)
    ours, theirs = new.ids.index(seen), split.ids.index(seen)
    np.testing.assert_allclose(new.latents[ours], split.latents[theirs], atol=1e-5)
    np.testing.assert_array_equal(new.affines[ours], split.affines[theirs])
    assert new.units[ours] == split.units[theirs]

    # Reconstructions overlay the scan in its own values and type.
    files = sorted((out / "reconstructions").glob("*.nii.gz"))
    assert len(files) == 4
    for row, path in enumerate(files):
        image, source = nibabel.load(path), nibabel.load(volumes / "new" / new.ids[row])
        np.testing.assert_allclose(image.affine, new.affines[row], atol=1e-4)
        assert image.get_data_dtype() == source.get_data_dtype().newbyteorder("=")
        field, params = mf.load_field(volumes / "run")
        values = np.clip(mf.reconstruct(field, params, new.latents[[row]], mf.grid((12, 12, 12))), 0, 1)
        expected = np.rint(new.units[row].values(values)).reshape(12, 12, 12)
        np.testing.assert_allclose(image.get_fdata(), expected, atol=1)
        low, high = np.quantile(source.get_fdata(), (0.001, 0.999))
        assert low - 1 <= image.get_fdata().min() <= image.get_fdata().max() <= high + 1

    with (out / "signals.csv").open(newline="") as file:
        table = {row["id"]: row for row in csv.DictReader(file)}
    assert table["noise.nii.gz"]["unlike the run"] == "yes"
    assert "usual is" in table["noise.nii.gz"]["why"]
    summary = json.loads((out / "apply.json").read_text())
    assert "noise.nii.gz" in summary["unlike"]
    assert list(summary["skipped"]) == ["broken.nii.gz"]
    assert summary["psnr"] == pytest.approx(new.psnr.mean())

    before = {path: path.stat().st_mtime_ns for path in (out / "latents").glob("*.safetensors")}
    done = apply(volumes, f"--data_dir={volumes / 'new'}")
    assert done.returncode == 0, done.stderr
    assert before == {path: path.stat().st_mtime_ns for path in (out / "latents").glob("*.safetensors")}


@needs_real
def test_one_file_to_a_folder_of_ones_own(volumes, tmp_path):
    file = sorted((volumes / "new").glob("hippo*"))[-1]
    done = apply(volumes, f"--data_dir={file}", f"--out={tmp_path / 'out'}", "--config.decode.scale=2")
    assert done.returncode == 0, done.stderr
    (written,) = (tmp_path / "out" / "reconstructions").glob("*.nii.gz")
    assert nibabel.load(written).shape == (24, 24, 24)


@needs_real
def test_python_gives_the_same_latent(volumes, tmp_path):
    done = apply(volumes, f"--data_dir={volumes / 'new'}", f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr
    stored = mf.load_latents(tmp_path)["new"]
    prepared = mf.prepare(volumes / "run", volumes / "new")
    assert prepared.ids == stored.ids
    field, params = mf.load_field(volumes / "run")
    fitted = mf.fit_latent(field, params, prepared.values, steps=100, safeguard=True)
    np.testing.assert_allclose(fitted.latents, stored.latents[:], atol=1e-4)


@needs_real
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--mode=apply needs the new signals: --data_dir=FOLDER or FILE"),
        (["--data_dir=/no/such"], "/no/such: no such folder"),
        (["--data_dir=tests", "--config.data.pattern=*.nii"], "data.pattern: '*.nii.gz' there, '*.nii' asked for"),
        (["--data_dir=configs"], "0 files match '*.nii.gz'"),
    ],
)
def test_faults_are_one_line(volumes, words, message):
    done = apply(volumes, *words)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")


def test_distances():
    latents = np.array([[1.0, 2.0], [1.0, 6.0]])
    np.testing.assert_allclose(distances(latents, np.array([1.0, 2.0]), np.array([1.0, 2.0])), [0, np.sqrt(2)])
