"""The start of a run: a linear one in the launcher, alone, before training, and after a kill."""

import dataclasses
import json
import subprocess
import time

import jax
import numpy as np
import pytest

from experiments.settings import RunSettings
from experiments.stages.training_setup import _with_changed, first_state
from medfuncta_jax import meta_step
from tests.experiments.conftest import command, run
from tests.latent_stores import made_up_dataset

LINEAR = {"train__start": "linear", "train__start_updates": 40, "model__width": 256, "inner__steps": 2}
SETTINGS = RunSettings.from_dict(
    {
        "data": {"source": "made up"},
        "model": {"layers": 3, "width": 16, "latent_dim": 4},
        "train": {"start": "linear", "start_updates": 2, "augmentation": 0.1},
    }
)


def records(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_start_alone_is_a_run(finished, tmp_path):
    """Without any meta-update the field is far above that of sixty from random weights."""
    done = run(tmp_path / "run", train__steps=0, **LINEAR)
    assert done.returncode == 0, done.stderr
    (only,) = records(tmp_path / "run")
    assert only["step"] == 0
    start, trained = (json.loads((folder / "evaluation.json").read_text()) for folder in (tmp_path / "run", finished))
    assert start["test"]["psnr"] > trained["test"]["psnr"] + 1
    again = run(tmp_path / "run", train__steps=0, **LINEAR)
    assert again.returncode == 0, again.stderr
    assert len(records(tmp_path / "run")) == 1


def test_a_killed_run_goes_on_without_another_start(tmp_path):
    settings = LINEAR | {"train__steps": 30, "train__eval_every": 5, "train__learning_rate": 1e-6, "mode": "train"}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = run(whole, **settings)
    assert done.returncode == 0, done.stderr
    process = subprocess.Popen(command(killed, **settings), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (killed / "metrics.jsonl").exists() or len(records(killed)) < 4:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    done = run(killed, **settings)
    assert done.returncode == 0, done.stderr
    assert (killed / "field.safetensors").read_bytes() == (whole / "field.safetensors").read_bytes()
    validated = [each["step"] for each in records(killed) if "val_psnr" in each]
    assert validated == [0, 5, 10, 15, 20, 25, 30]


def test_a_random_start_is_that_of_the_method():
    settings = dataclasses.replace(SETTINGS, train=dataclasses.replace(SETTINGS.train, start="random"))
    dataset = made_up_dataset((5, 4))
    field = meta_step.check(settings, dataset.grid, dataset.channels)
    state, expected = first_state(field, settings, dataset, jax.random.key(1)), field.init(jax.random.key(1))
    assert jax.tree.all(jax.tree.map(np.array_equal, state.trainable.field, expected))


def test_a_linear_start_is_that_of_its_key():
    dataset = made_up_dataset((5, 4))
    field = meta_step.check(SETTINGS, dataset.grid, dataset.channels)
    one, same, other = (first_state(field, SETTINGS, dataset, jax.random.key(each)) for each in (1, 1, 2))
    assert jax.tree.all(jax.tree.map(np.array_equal, one, same))
    assert not np.array_equal(
        one.trainable.field["modulation_2"]["kernel"], other.trainable.field["modulation_2"]["kernel"]
    )


@pytest.mark.parametrize(("count", "most", "made"), [(3, 10, 9), (70, 211, 210), (5, 7, 5)])
def test_changed_signals_follow_the_signals_themselves(count, most, made):
    signals = np.random.default_rng(0).uniform(size=(count, 6, 5, 2)).astype(np.float32)
    changed = _with_changed(signals, jax.random.key(0), largest=0.2, most=most)
    assert changed.shape == (made, 6, 5, 2)
    np.testing.assert_array_equal(changed[:count], signals)
    assert len(np.unique(changed.reshape(made, -1), axis=0)) == made


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train__start": "random", "train__steps": 0}, "train.steps must be at least 1, got 0"),
        (LINEAR | {"model__width": 16}, "model.width must be at least 32"),
        (LINEAR | {"model__latent_grid": "(2,2)"}, "model.latent_grid=()"),
        (LINEAR | {"train__start_updates": -1}, "start_updates must not be negative, got -1"),
    ],
)
def test_settings_that_do_not_go_together_are_one_line(tmp_path, settings, message):
    done = run(tmp_path / "run", mode="train", **settings)
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in done.stderr
