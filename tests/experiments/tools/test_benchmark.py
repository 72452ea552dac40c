"""The benchmark measures what a config says, and refuses what no config says."""

import functools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

import medfuncta_jax as mf
from experiments.runtime.run_directory import RunError
from experiments.tools import benchmark
from medfuncta_jax import meta_step
from medfuncta_jax.settings import SettingsError
from tests.datasets.made_up import beat_line
from tests.experiments.command_line import run_module

SMALL = ["model.layers=3", "model.width=8", "model.latent_dim=4", "inner.steps=2", "fit.steps=2"]


@pytest.mark.some(1)
@pytest.mark.parametrize(("mode", "repeats"), [("train", 2), ("fit", 0)])
def test_a_row_is_json_and_states_what_ran(mode, repeats):
    case = benchmark.CASES["ecg"]
    row = benchmark.measure(case, benchmark.settings_of(case, SMALL, 2), mode=mode, repeats=repeats)
    assert json.loads(json.dumps(row)) == row
    assert (row["batch"], row["grid"], row["latent_dim"], row["finite"]) == (2, [187], 4, True)
    # 1 -> 8 -> 8 -> 1 and a modulation of 4 -> 8.
    assert row["parameters"] == (8 + 8) + (64 + 8) + (8 + 1) + (32 + 8)
    assert 0 < row["best_s"] <= row["median_s"]
    assert row["signals_per_s"] == pytest.approx(2 / row["best_s"])
    assert row["best_cpu_s"] > 0
    table = benchmark.as_markdown([row, {"case": "fundus", "error": "ended with code 1"}])
    assert "| `ecg` | 187 | 2 | 4 |" in table
    assert "| `fundus` | ended with code 1 |" in table


def products(jaxpr):
    """Floating-point operations of the matrix products that a traced program holds."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracted)
            continue
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        total += times * sum(products(inner) for inner in jaxprs_in_params(equation.params))
    return total


@pytest.mark.some(1)
@pytest.mark.parametrize(
    "extra", ["inner.shared_context=True", "inner.shared_context=False", "inner.selection_ratio=1.0"]
)
def test_the_work_counted_is_that_of_the_program(extra):
    case = benchmark.CASES["chest_xray"]
    sizes = ["model.layers=5", "model.width=16", "model.latent_dim=6", "inner.remat=none", "inner.steps=3"]
    settings = benchmark.settings_of(case, [*sizes, extra], 3)
    field = mf.Field(settings.model, 2, 1)
    state = meta_step.init(field, settings, jax.random.key(0))
    update = functools.partial(meta_step.update, meta_step.Training(field, settings, case.grid))
    program = jax.make_jaxpr(update)(state, np.zeros((3, 4096, 1), np.float32), jax.random.key(0))
    counted = benchmark.work(case, settings, mode="train", batch=3)["flops"]
    assert counted == pytest.approx(products(program.jaxpr), rel=0.02)


def test_every_dataset_of_the_paper_has_a_case():
    configs = {case.config.partition(":")[0] for case in benchmark.CASES.values()}
    assert {name for name in configs if "." not in name} == {
        "ecg", "chest_xray", "pneumonia_xray", "retinal_oct", "fundus", "dermatoscope", "colon_histopathology",
        "cell_microscopy", "brain_mri", "lung_ct",
    }  # fmt: skip
    assert set(benchmark.SHORT.values()) <= set(benchmark.CASES)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("remat=none", "is not GROUP.FIELD=VALUE"),
        ("outer.steps=1", "is not GROUP.FIELD=VALUE"),
        ("inner.remat=all", "inner.remat must be one of"),
        ("inner.stpes=3", "did you mean inner.steps"),
    ],
)
def test_a_wrong_override_is_named(override, message):
    with pytest.raises((ValueError, SettingsError), match=message):
        benchmark.settings_of(benchmark.CASES["ecg"], [override], None)


def test_waiting_for_input_is_measured_on_the_signals_of_the_config(tmp_path, monkeypatch):
    for name, count in (("train", 40), ("test", 5)):
        lines = [beat_line(i % 5, i) for i in range(count)]
        (tmp_path / f"mitbih_{name}.csv").write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(benchmark, "_ROUND_SECONDS", 0.01)
    case = benchmark.CASES["ecg"]
    settings = benchmark.settings_of(case, [*SMALL, f"data.cache_dir={tmp_path / 'cache'}"], 4)
    row = benchmark.measure_input(case, settings, data_dir=str(tmp_path), repeats=1)
    assert json.loads(json.dumps(row)) == row
    assert (row["batch"], row["grid"], row["updates"] >= 2) == (4, [187], True)
    assert row["idle"] == pytest.approx(1 - row["resident_update_s"] / row["read_update_s"])
    part = row["idle_if_none_were_ahead"]
    assert row["read_s"] * (1 - part) == pytest.approx(row["resident_update_s"] * part)


def test_several_batches_are_several_rows(monkeypatch, capsys):
    def run(command, **_):
        batch = int(next(word for word in command if word.startswith("--batch=")).removeprefix("--batch="))
        assert {"--case=ecg", "--mode=fit", "--repeats=1", "--set=fit.steps=2"} <= set(command)
        row = {"config": "ecg", "grid": [187], "channels": 1, "batch": batch, "latent_dim": 64, "parameters": 1000,
               "median_s": 0.5, "signals_per_s": 2.0 * batch, "peak_rss_gb": 1.0}  # fmt: skip
        return SimpleNamespace(stdout=json.dumps(row) + "\n", returncode=0 if batch < 4 else 1)

    options = SimpleNamespace(
        case=["1d"], batch=["1", "2", "4"], mode="fit", repeats=1, set=["fit.steps=2"], data_dir=None, grid=[], vs=None
    )  # fmt: skip
    monkeypatch.setattr(benchmark, "flags", SimpleNamespace(FLAGS=options))
    monkeypatch.setattr(benchmark.subprocess, "run", run)
    with pytest.raises(SystemExit) as ended:
        benchmark.main([])
    assert ended.value.code == 1  # of the last one
    table = capsys.readouterr().out.splitlines()
    assert "| `ecg` | 187 | 2 | 64 | 0.0e6 | 0.50 | 4 | 1.0 GB |" in table
    assert "| `ecg` | ended with code 1 | | | | | | |" in table
    options.batch = ["1", "none"]
    with pytest.raises(benchmark.app.UsageError, match="--batch=1,none must be numbers of at least 1"):
        benchmark.main([])
    options.batch, options.grid = ["1"], ["64", "64"]
    with pytest.raises(benchmark.app.UsageError, match="--grid=64,64 must be 1 numbers of at least 1"):
        benchmark.main([])
    options.mode = "input"
    with pytest.raises(benchmark.app.UsageError, match="--mode=input reads signals as they are"):
        benchmark.main([])


def test_a_floor_above_the_time_is_an_error(monkeypatch):
    case = benchmark.CASES["ecg"]
    settings = benchmark.settings_of(case, ["model.layers=4", *SMALL[1:]], 2)
    row = benchmark.measure(case, settings, mode="fit", repeats=0)
    assert 0 < row["floor_part"] < 1
    monkeypatch.setattr(benchmark, "machine_rates", lambda *_: {"flops_per_s": 1.0, "sines_per_s": 1.0})
    with pytest.raises(RunError, match=r"the floor, .* is above the time measured"):
        benchmark.measure(case, settings, mode="fit", repeats=0)


@pytest.mark.slow
def test_two_checkouts_take_turns(tmp_path):
    words = ["--case=1d", "--batch=2", "--repeats=2", f"--set={','.join(SMALL)}"]
    ended = run_module("experiments.tools.benchmark", *words, f"--vs={Path(benchmark.__file__).parents[2]}")
    row = json.loads(ended.stdout)
    assert ended.returncode == 0
    assert row["ratio"] == pytest.approx(np.median(np.divide(row["seconds"], row["other_seconds"])))
    assert (len(row["seconds"]), row["host_ratio"]) == (2, pytest.approx(1, abs=0.1))
    ended = run_module("experiments.tools.benchmark", *words, f"--vs={tmp_path}")
    assert ended.returncode == 1
    assert "holds no medfuncta_jax; it must be the root of a checkout" in ended.stderr + ended.stdout


def test_a_refusal_is_one_line(tmp_path):
    folder = tmp_path / "none"
    ended = run_module("experiments.tools.benchmark", "--case=1d", "--mode=input", f"--data_dir={folder}")
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith(f"error: {folder}: no such folder")
    assert "Traceback" not in ended.stderr
