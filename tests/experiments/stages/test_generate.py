"""Scores of samples against what they must be, and the stage through the launcher."""

import csv
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from experiments.stages import generation_scores as scores
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
    # The flow is kept: a second start trains no further, and makes the same.
    done = run(workdir, mode="generate", extra=few)
    assert done.returncode == 0, done.stderr
    assert json.loads(written.read_text()) == result


def test_a_finer_grid_that_does_not_exist_is_refused(finished, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    done = run(workdir, mode="generate", extra=["--config.generate.resolution=(64,)"])
    assert done.returncode == 1
    assert "resolution must have 2 entries" in done.stderr.splitlines()[-1]
