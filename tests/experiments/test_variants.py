"""Settings outside a run's identity: other fits, types of latents, labels and stages, each beside the first."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

import medfuncta_jax as mf
from experiments.settings import RunSettings
from tests.experiments.command_line import run_module

CONFIG = "--config=tests/experiments/folder_of_images.py"


@pytest.fixture(scope="module")
def base(cache, tmp_path_factory):
    """A run on forty images: dark and bright ones, named in one column, and their sides in another."""
    base = tmp_path_factory.mktemp("images")
    (base / "data").mkdir()
    rows = ["id,kind,side"]
    for i in range(40):
        pixels = np.random.default_rng(i).integers(0, 60, (16, 16)) + 150 * (i % 2)
        pixels[:, : 8 if i % 3 else 16] += 40
        Image.fromarray(pixels.astype(np.uint8)).save(base / "data" / f"{i}.png")
        rows.append(f"{i}.png,{'bright' if i % 2 else 'dark'},{'left' if i % 3 else 'all'}")
    (base / "data" / "table.csv").write_text("\n".join(rows) + "\n")
    done = launch(base, CONFIG, f"--data_dir={base / 'data'}", "--config.data.labels=table.csv", *label("kind"))
    assert done.returncode == 0, done.stderr
    return base


def launch(base, *words):
    return run_module("experiments.main", f"--workdir={base / 'run'}", *words)


def label(column):
    return [f"--config.data.label_column={column}"]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def test_another_fit_makes_another_store(base):
    before = contents(base / "run" / "latents")
    for mode in ("extract", "evaluate"):
        done = launch(base, f"--mode={mode}", "--config.fit.steps=7", "--config.extract.dtype=float16")
        assert done.returncode == 0, done.stderr
    folder = base / "run" / "variants" / "extract.dtype=float16,fit.steps=7"
    other, first = mf.load_latents(folder)["test"], mf.load_latents(base / "run")["test"]
    assert (other.latents.dtype, first.latents.dtype) == (np.float16, np.float32)
    assert other.ids == first.ids
    assert not np.allclose(other.latents[:], first.latents[:], atol=1e-3)
    assert json.loads((folder / "evaluation.json").read_text())["test"]["signals"] == len(first)
    assert RunSettings.from_dict(json.loads((folder / "settings.json").read_text())).fit.steps == 7
    assert contents(base / "run" / "latents") == before


def test_another_label_column_makes_another_result(base):
    before = contents(base / "run" / "latents")
    fast = ["--config.classify.epochs=2", "--config.classify.seeds=1", "--config.classify.features=('latents',)"]
    done = launch(base, "--mode=classify", *label("side"), *fast)
    assert done.returncode == 0, done.stderr
    assert "preparing" not in done.stderr  # nothing is resampled
    (folder,) = (base / "run" / "variants").glob("classify*side*")
    assert json.loads((folder / "classification.json").read_text())["classes"] == ["all", "left"]
    done = launch(base, "--mode=classify", *fast)
    assert done.returncode == 0, done.stderr
    results = [
        json.loads(path.read_text()) for path in (base / "run" / "variants").glob("classify*/classification.json")
    ]
    assert sorted(result["classes"] for result in results) == [["all", "left"], ["bright", "dark"]]
    assert contents(base / "run" / "latents") == before


def test_a_corrected_table_fits_nothing_anew(base):
    table = base / "data" / "table.csv"
    text = table.read_text()
    before = mf.load_latents(base / "run")
    times = {path: path.stat().st_mtime_ns for path in (base / "run" / "latents").glob("*.safetensors")}
    try:
        table.write_text(text.replace("0.png,dark", "0.png,bright"))
        done = launch(base, "--mode=extract")
    finally:
        table.write_text(text)
    assert done.returncode == 0, done.stderr
    assert "extract" not in done.stderr
    after = mf.load_latents(base / "run", verify=True)
    changed = 0
    for name in before:
        np.testing.assert_array_equal(after[name].latents[:], before[name].latents[:])
        changed += int((after[name].labels != before[name].labels).sum())
    assert changed == 4  # 0, 10, 20 and 30
    assert any(path.stat().st_mtime_ns != time for path, time in times.items())


@pytest.mark.slow
def test_the_field_does_not_depend_on_it(base, tmp_path):
    """A run that is trained on with another fit ends as the first one."""
    words = [CONFIG, f"--data_dir={base / 'data'}", f"--workdir={tmp_path / 'run'}", "--config.data.labels=table.csv"]
    first = run_module("experiments.main", *words, *label("kind"), "--mode=train")
    assert first.returncode == 0, first.stderr
    before = (tmp_path / "run" / "field.safetensors").read_bytes()
    (tmp_path / "run" / "field.safetensors").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    again = run_module("experiments.main", *words, *label("side"), "--mode=train", "--config.fit.steps=9")
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "run" / "field.safetensors").read_bytes() == before


@pytest.mark.parametrize("word", ["--config.data.size=9", "--config.train.steps=21", "--config.inner.steps=4"])
def test_training_and_data_are(base, word):
    done = launch(base, "--mode=extract", word)
    assert done.returncode == 1
    assert "holds a run with another config" in done.stderr
    assert word.removeprefix("--config.").partition("=")[0] in done.stderr
