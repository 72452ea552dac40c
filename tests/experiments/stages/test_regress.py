"""Regression through the launcher, on a run whose latents determine the numbers."""

import json

import numpy as np
import pytest
from PIL import Image

from experiments.stages.regress import scores
from tests.experiments.command_line import run_module

FAST = ["--config.regress.epochs=30", "--config.regress.seeds=2", "--config.regress.hidden=(16,)"]


@pytest.fixture(scope="module")
def base(cache, tmp_path_factory):
    """Forty images as bright as their age says, and a table beside them; one has none."""
    base = tmp_path_factory.mktemp("ages")
    (base / "data").mkdir()
    rows = ["id,age,words"]
    for i in range(40):
        age = 20 + 1.5 * i
        pixels = np.random.default_rng(i).integers(0, 30, (16, 16)) + 2 * age
        Image.fromarray(pixels.astype(np.uint8)).save(base / "data" / f"{i}.png")
        rows.append(f"{i},{'' if i == 7 else age},{'old' if age > 50 else 'young'}")
    (base / "data" / "people.csv").write_text("\n".join(rows) + "\n")
    longer = ["--config.train.steps=200", "--config.train.learning_rate=1e-3", "--config.data.val_fraction=0.2"]
    config = "--config=tests/experiments/folder_of_images.py"
    done = launch(base, config, f"--data_dir={base / 'data'}", *longer)
    assert done.returncode == 0, done.stderr
    return base


def launch(base, *words):
    return run_module("experiments.main", f"--workdir={base / 'run'}", *words)


@pytest.mark.slow
def test_an_age(base):
    words = ["--mode=regress", "--config.regress.column=age", "--config.regress.table=people.csv", *FAST]
    done = launch(base, *words)
    assert done.returncode == 0, done.stderr
    assert "have no number and are left out" in done.stderr
    (file,) = (base / "run" / "variants").glob("*/regression.json")
    result = json.loads(file.read_text())
    assert sum(result["signals"].values()) == 39
    rows = {(row["model"], row["features"]): row for row in result["rows"]}
    assert set(rows) == {("mean of training", "none")} | {
        (model, features) for model in ("ridge", "MLP") for features in ("latents", "PCA", "values")
    }
    assert rows["mean of training", "none"]["r2"]["mean"] <= 0
    for features in ("PCA", "values"):
        assert rows["ridge", features]["r2"]["mean"] > 0.95
    assert rows["ridge", "latents"]["r2"]["mean"] > 0.8
    assert rows["ridge", "latents"]["mean_absolute_error"]["mean"] < 8  # years
    assert (file.parent / "regression.md").read_text().count("\n| ") == 1 + 7
    kept = json.loads((file.parent / "regression.rows.json").read_text())
    assert len(kept["rows"]) == 6


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "regress.column names no column of numbers; e.g. --config.regress.column=AGE"),
        (["--config.regress.column=age"], "regress.table names no table"),
        (["--config.regress.column=words", "--config.regress.table=people.csv"], "in the column 'words' is no number"),
        (["--config.regress.column=weight", "--config.regress.table=people.csv"], "no column 'weight', it has 'id'"),
        (["--config.regress.column=age", "--config.regress.table=no.csv"], "no.csv"),
    ],
)
def test_faults_are_one_line(base, words, message):
    done = launch(base, "--mode=regress", *words)
    assert done.returncode == 1
    assert message in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_scores():
    numbers = np.array([1.0, 2.0, 3.0, 6.0])
    assert scores(numbers, numbers) == {"r2": 1.0, "mean_absolute_error": 0.0}
    assert scores(numbers, np.full(4, 3.0))["r2"] == 0
    assert scores(np.ones(3), np.ones(3))["r2"] is None
