"""The launcher as its users meet it: a process, a run directory, exit codes and one-line errors."""

import hashlib
import json
import shutil
import signal
import subprocess
import time

import jax
import numpy as np
import pytest
from PIL import Image

import medfuncta_jax as mf
from experiments.runtime.run_directory import read_metrics
from tests.experiments import final_state
from tests.experiments.command_line import run_module
from tests.experiments.conftest import ROOT, command, run


def one_line_error(done, code=1, *, noise=False):
    assert done.returncode == code, done.stderr
    assert noise or "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    return last


def test_a_finished_run_holds_everything(finished):
    names = {path.name for path in finished.iterdir()}
    assert names == {
        "config.json", "checkpoints", "field.safetensors", "metrics.jsonl", "tensorboard", "latents",
        "evaluation.json", "evaluation.csv", "figures", "seconds.json", "signals.json", ".lock",
    }  # fmt: skip
    evaluation = json.loads((finished / "evaluation.json").read_text())
    assert evaluation.keys() == {"test", "val", "seconds", "protocol"}
    assert evaluation["seconds"].keys() == {"train", "extract", "evaluate"}
    for split in ("test", "val"):
        assert evaluation[split].keys() - {"lpips"} == {"signals", "psnr", "mse", "ssim", "std", "interval"}
    assert {path.name for path in (finished / "figures").iterdir()} == {"reconstructions.png", "learning_curve.png"}
    assert list((finished / "tensorboard").iterdir())
    records = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "loss" in record] == list(range(5, 61, 5))
    assert [record["step"] for record in records if "val_psnr" in record] == [20, 40, 60]


def test_the_field_and_latents_read_back_alone(finished, tmp_path):
    """Copied elsewhere, without the config: the latents decode to the PSNR that was stored, and so do fresh ones."""
    shutil.copy(finished / "field.safetensors", tmp_path)
    shutil.copytree(finished / "latents", tmp_path / "latents")
    field, params = mf.load_field(tmp_path)
    latents = mf.load_latents(tmp_path)
    assert latents.keys() == {"train", "val", "test"}
    evaluation = json.loads((finished / "evaluation.json").read_text())
    for name in ("test", "val"):
        split = latents[name]
        assert len(split.latents) == len(split.ids) == len(split.labels) == evaluation[name]["signals"]
        np.testing.assert_allclose(split.psnr.mean(), evaluation[name]["psnr"], rtol=1e-4)
        grid = mf.grid(split.about["grid"])
        signals = np.asarray(mf.reconstruct(field, params, split.latents, grid)).reshape(-1, *split.about["grid"], 1)
        assert np.isfinite(signals).all()
    assert mf.Settings.from_saved(latents["test"].about["settings"]).model == field.model


def test_running_again_changes_nothing(finished):
    before = _artefacts(finished)
    metrics = (finished / "metrics.jsonl").read_text()
    done = run(finished)
    assert done.returncode == 0, done.stderr
    assert "PSNR dB" in done.stdout
    assert before == _artefacts(finished)
    assert len(before) == 5
    assert metrics == (finished / "metrics.jsonl").read_text()


def _artefacts(workdir):
    """The field, the latents and their card, by checksum."""
    files = [workdir / "field.safetensors", *(workdir / "latents").iterdir()]
    return {path: hashlib.md5(path.read_bytes()).hexdigest() for path in files}


def test_another_config_is_refused_with_what_differs(finished):
    error = one_line_error(run(finished, train__learning_rate=0.5, seed=3))
    assert "seed: 0 there, 3 asked for" in error
    assert "train.learning_rate: 0.001 there, 0.5 asked for" in error


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_an_interrupted_run_saves_and_ends_as_if_left_alone(finished, tmp_path, number):
    workdir = tmp_path / "run"
    process = subprocess.Popen(command(workdir), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    _wait_for(workdir / "metrics.jsonl", process)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 75, stderr
    assert number.name in stderr
    assert "run the same command again" in stderr
    assert "Traceback" not in stderr
    done = run(workdir)
    assert done.returncode == 0, done.stderr
    assert final_state.compare(finished, workdir) == []
    for name in ("train", "val", "test"):
        np.testing.assert_array_equal(mf.load_latents(workdir)[name].latents, mf.load_latents(finished)[name].latents)


@pytest.mark.slow
def test_a_stop_leaves_a_validation_which_comes_first_in_the_next_start(tmp_path):
    """Twice in one run, the second time in its last step."""
    settings = {"mode": "train", "train__steps": 10, "train__eval_every": 5, "model__layers": 6, "fit__steps": 20}
    whole, workdir = tmp_path / "whole", tmp_path / "run"
    done = run(whole, **settings)
    assert done.returncode == 0, done.stderr
    for step in (5, 10):
        process = subprocess.Popen(command(workdir, **settings), cwd=ROOT, stderr=subprocess.PIPE, text=True)
        while not any(record["step"] == step for record in _records(workdir)):
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 75, stderr
        assert f"step {step} of 10 is saved in {workdir}, and is validated first" in stderr
        assert [record for record in _records(workdir) if record["step"] == step and "val_psnr" in record] == []
    done = run(workdir, **settings)
    assert done.returncode == 0, done.stderr
    assert final_state.compare(whole, workdir) == []
    assert _records(workdir) == _records(whole)
    assert len([record for record in _records(whole) if "val_psnr" in record]) == 2
    scores = [sorted((one / "checkpoints").glob("*/metrics/metrics")) for one in (whole, workdir)]
    assert [file.read_text() for file in scores[0]] == [file.read_text() for file in scores[1]]


def _records(workdir):
    """The lines of metrics.jsonl, but for the times."""
    return [{name: value for name, value in record.items() if name != "seconds"}
            for record in read_metrics(workdir / "metrics.jsonl")]  # fmt: skip


def test_killed_at_random_moments_it_ends_as_if_left_alone(finished, tmp_path):
    workdir = tmp_path / "run"
    moments = np.random.default_rng(0)
    for _ in range(3):
        process = subprocess.Popen(command(workdir, mode="train"), cwd=ROOT, stderr=subprocess.DEVNULL)
        if not (workdir / "config.json").exists():
            _wait_for(workdir / "config.json", process)
        time.sleep(moments.uniform(1, 4))
        process.kill()
        process.wait()
    done = run(workdir, mode="train")
    assert done.returncode == 0, done.stderr
    assert final_state.compare(finished, workdir) == []
    steps = [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)


def _wait_for(path, process):
    for _ in range(1200):
        if path.exists():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    raise AssertionError(f"{path} never came")


def test_a_full_disk_is_one_line_and_loses_nothing(finished, tmp_path):
    workdir = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(workdir / "latents")
    done = run(workdir, mode="extract", largest_file_kb=4)
    assert "no space left on the device" in one_line_error(done)
    assert not list((workdir / "latents").glob("*"))
    assert not list(workdir.rglob("*partial*"))
    done = run(workdir, mode="extract")
    assert done.returncode == 0, done.stderr


def test_a_full_disk_while_a_checkpoint_is_saved(finished, tmp_path):
    workdir = tmp_path / "run"
    done = run(workdir, mode="train", train__checkpoint_every=5, largest_file_kb=16)
    assert "no space left on the device" in one_line_error(done, noise=True)  # of Orbax's threads, before it
    done = run(workdir, mode="train", train__checkpoint_every=5)
    assert done.returncode == 0, done.stderr
    assert final_state.compare(finished, workdir) == ["field.safetensors"]  # which says how often it was to be saved


def test_a_loss_that_is_not_finite_names_the_step_and_keeps_the_last_good_checkpoint(tmp_path):
    workdir = tmp_path / "run"
    error = one_line_error(run(workdir, mode="train", inner__step_size=1e30, inner__learned_step_size="none"))
    assert "step 1: the loss or its gradient is not finite" in error
    assert "lower train.learning_rate" in error
    assert "Nothing was saved before it" in error


def test_a_collapse_stops_the_run_and_keeps_the_best(tmp_path):
    """A learning rate far too high from a good start: a constant rate after a warm-up that learns first."""
    workdir = tmp_path / "run"
    wild = {"train__learning_rate": 0.3, "train__warmup_steps": 6000, "train__steps": 400, "train__collapse_db": 1.0}
    error = one_line_error(run(workdir, mode="train", **wild, train__eval_every=10, train__clip_norm=0.0))
    assert "collapsed to" in error or "not finite" in error
    assert "kept" in error
    _, params = mf.load_field(workdir)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize(
    ("keywords", "code", "message"),
    [
        ({"extra": ["--config.trian.steps=3"]}, 2, 'unknown setting trian; Did you mean "train"'),
        ({"extra": ["--config.train.stepz=3"]}, 2, 'unknown setting stepz; Did you mean "steps"'),
        ({"extra": ["--config.decode.size=3"]}, 2, 'unknown setting "size"; known here: splits, resolution, scale'),
        ({"extra": ["--config.train.steps=abc"]}, 2, "--config.train.steps=abc must be a whole number"),
        ({"extra": ["--config.fit.safeguard=perhaps"]}, 2, "--config.fit.safeguard=perhaps must be True or False"),
        ({"extra": ["--config.decode.resolution=(1.5,)"]}, 1, "decode.resolution must be a list of whole numbers"),
        ({"train__batch_size": 251}, 1, "train.batch_size = 251 is more than the 250 training signals"),
        ({"extra": ["--mod=train"]}, 2, "Unknown command line flag 'mod'"),
        ({"extra": ["train"]}, 2, "'train' is not a flag"),
        ({"config": "configs/nofile.py"}, 2, "--config=configs/nofile.py cannot be loaded"),
        ({"config": "configs/ecg.py:foo"}, 2, "no variant 'foo'; known: cpu"),
        ({"model__latent_dim": 0}, 1, "model.latent_dim must be at least 1"),
        ({"inner__selection_ratio": 0.0}, 1, "inner.selection_ratio must be in (0, 1]"),
        ({"inner__selection_ratio": 1.01}, 1, "inner.selection_ratio must be in (0, 1]"),
        ({"data__source": "nope"}, 1, "unknown data.source 'nope'"),
        ({"data__size": 1}, 1, "data.size must be 8 to 256"),
        ({"extra": ["--data_dir=/no/such/folder"]}, 1, "/no/such/folder: no such folder"),
        ({"data__cache_dir": "/proc/no"}, 1, "with data.cache_dir=DIR"),
    ],
)
def test_faults_are_one_line_and_leave_nothing(tmp_path, keywords, code, message):
    workdir = tmp_path / "run"
    assert message in one_line_error(run(workdir, **keywords), code)
    assert not workdir.exists()


def test_a_stage_after_training_needs_the_directory_alone(finished, tmp_path):
    workdir = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(workdir / "latents")
    for words in (["--mode=extract"], [f"--config={workdir / 'config.json'}", "--mode=evaluate"]):
        done = run_module("experiments.main", "--config.evaluate.resamples=100", f"--workdir={workdir}", *words)
        assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(mf.load_latents(workdir)["test"].latents, mf.load_latents(finished)["test"].latents)
    done = run_module("experiments.main", f"--workdir={workdir}", "--config.train.steps=9", "--mode=train")
    assert "train.steps: 60 there, 9 asked for" in one_line_error(done)
    (workdir / "config.json").write_text("{")
    done = run_module("experiments.main", f"--workdir={workdir}", "--mode=train")
    assert "config.json is damaged" in one_line_error(done, code=2)


def test_the_data_directory_is_remembered(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for i in range(12):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (16, 16)).astype(np.uint8)).save(data / f"{i}.png")
    words = ["--config.train.steps=2", "--config.data.size=8", "--config=tests/experiments/folder_of_images.py"]
    done = run_module("experiments.main", *words, f"--workdir={tmp_path / 'run'}", f"--data_dir={data}")
    assert done.returncode == 0, done.stderr
    done = run_module("experiments.main", f"--workdir={tmp_path / 'run'}", "--mode=evaluate")
    assert done.returncode == 0, done.stderr
    moved = data.rename(tmp_path / "moved")
    done = run_module("experiments.main", f"--workdir={tmp_path / 'run'}", "--mode=evaluate")
    assert f"{data}: no such folder; data_dir must name" in one_line_error(done)
    done = run_module("experiments.main", f"--workdir={tmp_path / 'run'}", "--mode=decode")
    assert done.returncode == 0, done.stderr
    assert moved.is_dir()


def test_help():
    done = run_module("experiments.main", "-h")
    assert done.returncode == 0
    assert "--workdir" in done.stdout
    assert "--mode=apply" in done.stdout


@pytest.mark.parametrize("mode", ["extract", "evaluate"])
def test_a_stage_without_the_one_before_says_so(tmp_path, mode):
    assert "train first" in one_line_error(run(tmp_path / "run", mode=mode))


def test_an_unusable_workdir(tmp_path):
    (tmp_path / "file").write_text("")
    assert "name another --workdir" in one_line_error(run(tmp_path / "file" / "run"))


def test_a_damaged_field_is_named(finished, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    (workdir / "field.safetensors").write_bytes((workdir / "field.safetensors").read_bytes()[:500])
    assert "field.safetensors is damaged" in one_line_error(run(workdir, mode="extract"))


def test_a_damaged_newest_checkpoint_costs_the_steps_since_the_one_before(finished, tmp_path):
    workdir = shutil.copytree(finished, tmp_path / "run")
    for file in (workdir / "checkpoints" / "60" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:10])
    done = run(workdir, mode="train")
    assert done.returncode == 0, done.stderr
    assert "checkpoints/60 is damaged" in done.stderr
    assert "the one before it is taken: step 40" in done.stderr
    assert final_state.compare(finished, workdir) == []
