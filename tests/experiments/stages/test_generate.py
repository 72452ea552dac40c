"""Scores of samples against what they must be, and the stage through the launcher."""

import csv
import dataclasses
import json
import shutil

import numpy as np
import pytest
from PIL import Image

import medfuncta_jax as mf
from experiments.runtime.interruption import StopRequest
from experiments.runtime.run import Run
from experiments.runtime.run_directory import RunDirectory, RunError, stored_settings, write_json
from experiments.settings import RunSettings
from experiments.stages import generation_scores as scores
from experiments.stages.generate import GenerateSettings, _trained, generate
from medfuncta_jax.flow import FlowTraining
from medfuncta_jax.settings import SettingsError
from tests.experiments.conftest import run


def test_density_and_coverage_of_the_same_distribution_and_of_one_point():
    rng = np.random.default_rng(0)
    real, same = rng.normal(size=(2, 400, 3))
    found = scores.density_and_coverage(real, same, neighbours=5)
    assert found["density"] == pytest.approx(1, abs=0.1)
    assert found["coverage"] == pytest.approx(0.97, abs=0.03)  # 1 - 2^-5
    far = scores.density_and_coverage(real, same + 100, neighbours=5)
    assert far == {"density": 0.0, "coverage": 0.0}
    collapsed = scores.density_and_coverage(real, np.zeros((400, 3)), neighbours=5)
    assert collapsed["coverage"] < 0.2
    with pytest.raises(ValueError, match="neighbours must be 1 to 399"):
        scores.density_and_coverage(real, same, neighbours=400)


def test_frechet_distance_of_gaussians_is_the_formula():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(20_000, 2)) * [1.0, 2.0]
    assert scores.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    b = rng.normal(size=(20_000, 2)) * [3.0, 2.0] + [1.0, 0.0]
    assert scores.frechet_distance(a, b) == pytest.approx(1 + (3 - 1) ** 2, rel=0.05)
    assert scores.frechet_distance(a, b) == pytest.approx(scores.frechet_distance(b, a))


@pytest.mark.slow
def test_the_stage(finished, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    few = [f"--config.generate.{name}={value}" for name, value in {
        "samples": 7, "steps": 150, "width": 32, "blocks": 1, "scale": 2, "components": 8, "flow_steps": 5,
    }.items()]  # fmt: skip
    done = run(workdir, mode="generate", extra=few)
    assert done.returncode == 0, done.stderr
    (written,) = workdir.glob("variants/generate.*/generation.json")
    result = json.loads(written.read_text())
    assert list(result["scores"]) == ["flow", "Gaussian on latents", "Gaussian on PCA scores", "training signals"]
    assert result["scores"]["training signals"]["nearest"] == pytest.approx(0, abs=1e-6)
    for of in result["scores"].values():
        assert 0 <= of["coverage"] <= 1
        assert of["density"] >= 0
        assert of["frechet"] >= 0
    assert result["judged"] == result["test_signals"] == 32
    with (written.parent / "generated" / "signals.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows[:4]] == ["sagittal", "coronal", "axial", "sagittal"]
    assert len(rows) == 7
    for row in rows:
        with Image.open(written.parent / "generated" / row["file"]) as image:
            assert image.size == (64, 64)
        assert row["nearest_training_id"]
    for name in ("generated.png", "interpolations.png"):
        assert (written.parent / "figures" / name).stat().st_size > 5_000
    # The flow is kept: a second start trains no further, makes the same, and adds the files that are missing.
    (kept,), folder = (workdir / "flows").iterdir(), written.parent / "generated"
    before = {path: path.stat().st_mtime_ns for path in (kept, *folder.glob("*.png"))}
    pixels = np.asarray(Image.open(folder / rows[3]["file"]), int)
    (folder / rows[3]["file"]).unlink()
    settings = RunSettings.from_dict(json.loads((written.parent / "settings.json").read_text()))
    with StopRequest() as stop:
        generate(Run(RunDirectory(workdir, settings), stop, mf.open_dataset("nibabel_slices", size=32)))
    assert json.loads(written.read_text()) == result
    # Decoded in a batch of another size.
    np.testing.assert_allclose(np.asarray(Image.open(folder / rows[3]["file"]), int), pixels, atol=1)
    changed = [path.name for path, time in before.items() if path.stat().st_mtime_ns != time]
    assert changed == [rows[3]["file"]]


def test_a_grid_that_the_field_does_not_have_is_refused(finished):
    settings = stored_settings(finished, RunSettings)
    settings = dataclasses.replace(settings, generate=GenerateSettings(resolution=(64,)))
    dataset = mf.open_dataset("nibabel_slices", size=32)
    with StopRequest() as stop, pytest.raises(SettingsError, match=r"generate\.resolution must have 2 entries"):
        generate(Run(RunDirectory(finished, settings), stop, dataset))


@pytest.mark.slow
def test_samples_of_another_flow_are_not_touched(finished, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    settings = dataclasses.replace(stored_settings(workdir, RunSettings), generate=GenerateSettings(steps=5, samples=2))
    directory = RunDirectory(workdir, settings)
    write_json(directory.results("generate") / "generated" / "about.json", {"flow": "another"})
    with StopRequest() as stop, pytest.raises(RunError, match="holds samples of another flow; move or remove"):
        generate(Run(directory, stop, mf.open_dataset("nibabel_slices", size=32)))


@pytest.mark.slow
def test_a_damaged_flow_is_trained_anew(tmp_path):
    latents, labels = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32), np.zeros(20, int)
    training = FlowTraining(width=4, blocks=1, steps=3)
    with StopRequest() as stop:
        first, made_of = _trained(latents, labels, 1, training, seed=0, folder=tmp_path, stop=stop)
        (file,) = tmp_path.iterdir()
        file.write_bytes(file.read_bytes()[:-9])
        second, again = _trained(latents, labels, 1, training, seed=0, folder=tmp_path, stop=stop)
        other = _trained(latents, labels, 1, training, seed=1, folder=tmp_path, stop=stop)[1]
    assert made_of == again != other
    np.testing.assert_array_equal(first.latents(latents), second.latents(latents))
