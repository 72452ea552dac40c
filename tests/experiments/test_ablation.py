"""Grids are what they say, cells that fail are listed, and the command goes on where it was."""

import json
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import matplotlib.image
import numpy as np
import pytest

from experiments.ablation import grid as grids
from experiments.ablation import results, runs
from experiments.runtime import memory
from experiments.runtime.interruption import StopRequest
from experiments.tools import benchmark
from tests.datasets.made_up import medmnist_arrays, write_npz
from tests.experiments.command_line import ROOT, run_module


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_npz(folder, "pneumoniamnist.npz", medmnist_arrays((28, 28)))
    write_npz(folder, "pneumoniamnist_64.npz", medmnist_arrays((64, 64)))
    write_npz(folder, "chestmnist_64.npz", medmnist_arrays((64, 64), width=14))
    return str(folder)


@pytest.mark.parametrize("preset", ["paper", "cpu"])
@pytest.mark.parametrize("name", list(grids.TABLES))
def test_every_cell_of_every_table_has_settings(name, preset, data_dir):
    table = grids.TABLES[name]
    grid = grids.grid_of(table, preset, {})
    cells = [grids.make_cell(table, values, preset, (), data_dir) for values in grid]
    assert len({grids.folder_name(cell.values) for cell in cells}) == len(cells) >= 4
    assert len({cell.settings for cell in cells}) == len(cells)
    assert {cell.case.grid for cell in cells} == {(64, 64) if preset == "paper" else (28, 28)}
    for cell in cells:
        benchmark.METHODS[cell.settings.train.method].check(cell.settings, cell.case.grid, cell.case.channels)


def test_components_are_those_of_table_5(data_dir):
    table = grids.TABLES["components"]
    rows = {}
    for values in grids.grid_of(table, "paper", {}):
        settings = grids.make_cell(table, values, "paper", (), data_dir).settings
        model, inner, train = settings.model, settings.inner, settings.train
        rows[values["component"]] = (model.omega_last, train.schedule, inner.selection_ratio, train.batch_size)
    assert rows == {
        "baseline": (20.0, "constant", 1.0, 12),
        "cosine": (20.0, "cosine", 1.0, 12),
        "omega_schedule": (400.0, "constant", 1.0, 12),
        "reduced_context": (20.0, "constant", 0.25, 24),
        "all": (400.0, "cosine", 0.25, 24),
    }


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"omega_first": [""]}, "axis 'omega_first' is empty; give it values, e.g. --axis=omega_first=10"),
        ({"omega": [1]}, "no axis 'omega' in this table; known: omega_first, delta"),
        ({"delta": [1, 1]}, "axis 'delta' names a value twice"),
        ({"delta": ["steep"]}, "axis 'delta' has no value 'steep'"),
    ],
)
def test_bad_grids_are_named(axes, message):
    with pytest.raises(ValueError, match=message):
        grids.grid_of(grids.TABLES["omega"], "cpu", axes)


def test_an_unknown_method_is_named():
    with pytest.raises(ValueError, match=r"axis 'method' has no value 'funkta'; e.g. functa, coinpp"):
        grids.grid_of(grids.TABLES["methods"], "cpu", {"method": ["functa", "funkta"]})


def test_a_budget_keeps_the_parts_of_a_run(data_dir):
    cell = grids.make_cell(grids.TABLES["methods"], {"method": "functa"}, "cpu", (), data_dir)
    assert grids.budget(cell, cell.settings.train.steps) == ()
    assert grids.budget(cell, 250) == ("train.steps=250", "train.warmup_steps=10", "train.eval_every=25")


def test_a_start_alone_has_no_budget_of_updates(data_dir):
    cell = grids.make_cell(grids.TABLES["improvements"], {"improvement": "one_layer_linear"}, "cpu", (), data_dir)
    assert (cell.settings.train.start, cell.settings.train.steps) == ("linear", 0)
    assert grids.budget(cell, 250) == ()


def test_what_does_not_fit_in_memory_is_skipped_and_said(data_dir, tmp_path, monkeypatch):
    cell = grids.make_cell(grids.TABLES["methods"], {"method": "functa"}, "cpu", ("model.width=8",), data_dir)
    monkeypatch.setattr(runs, "ProcessPoolExecutor", lambda *args, **options: ThreadPoolExecutor(1))
    monkeypatch.setattr(memory, "free_bytes", lambda: 1000)
    measured = runs.measure(cell, tmp_path, None)
    assert measured["status"] == "skipped"
    assert "and 1e-06 GB are free" in measured["error"]
    assert list(tmp_path.iterdir()) == []


def kept(workdir, values, outcomes, *, measured=True):
    """The folder of a cell, as runs leave it."""
    place = workdir / grids.folder_name(values)
    place.mkdir(parents=True)
    if measured:
        row = {"parameters": 1_500_000, "best_s": 0.25, "temp_bytes": 2_000_000_000, "steps": 40}
        (place / "measured.json").write_text(json.dumps(row))
    for seed, outcome in enumerate(outcomes):
        (place / f"seed-{seed}.json").write_text(json.dumps(outcome))


def done(psnr, **more):
    return {"status": "done", "psnr": psnr, "ssim": psnr / 40, "mse": 10 ** (-psnr / 10), "train_seconds": 9.0, **more}


COLLAPSED = {"status": "collapsed", "reason": "step 20: training collapsed to 3.1 dB | x"}


def test_a_table_has_means_spread_and_what_went_wrong(tmp_path):
    grid = grids.grid_of(grids.TABLES["components"], "cpu", {})
    kept(tmp_path, grid[0], [done(30.0), done(31.0), done(33.0)])
    kept(tmp_path, grid[1], [done(30.0), COLLAPSED, COLLAPSED])
    kept(tmp_path, grid[2], [], measured=False)
    (tmp_path / "component=cosine" / "refused.json").write_text('{"status": "skipped", "reason": "needs 9 GB"}')
    rows = results.read_rows(grid, 3, tmp_path)
    assert rows[0]["psnr"]["mean"] == pytest.approx(31.333, abs=1e-3)
    assert rows[0]["psnr"]["std"] == pytest.approx(np.std([30, 31, 33], ddof=1))
    assert (rows[1]["psnr"]["std"], rows[1]["done"], rows[3]["done"]) == (None, 1, 0)
    text = results.as_markdown(rows, "title", {"baseline": 37.836})
    lines = text.splitlines()
    assert len({line.count("|") for line in lines[2:]}) == 1
    assert "| baseline | 1.50e6 | 2.00 GB | 25.0 | 40 | 9 ± 0 |" in lines[4]
    assert "| 31.33 ± 1.53 |" in lines[4]
    assert "| 37.836 | 3 of 3 |" in lines[4]
    assert "1 of 3; 1, 2 collapsed: step 20: training collapsed to 3.1 dB / x" in lines[5]
    assert "0, 1, 2 skipped: needs 9 GB" in lines[6]
    assert "0, 1, 2 missing: not run" in lines[7]


@pytest.mark.parametrize("name", list(grids.TABLES))
def test_every_table_is_drawn_with_whatever_is_there(name, tmp_path):
    table = grids.TABLES[name]
    grid = grids.grid_of(table, "cpu", {})
    assert not results.draw(tmp_path / "none.png", name, results.read_rows(grid, 2, tmp_path))
    fits = (
        {"by_fit_steps": {str(h): {"psnr": 20.0 + h, "ssim": 0.5} for h in table.fit_steps}} if table.fit_steps else {}
    )
    kept(tmp_path, grid[0], [done(30.0, **fits), done(31.0, **fits)])
    kept(tmp_path, grid[1], [COLLAPSED, COLLAPSED])
    kept(tmp_path, grid[2], [done(32.0, **fits)], measured=False)
    rows = results.read_rows(grid, 2, tmp_path)
    assert results.draw(tmp_path / "table.png", name, rows)
    assert matplotlib.image.imread(tmp_path / "table.png").shape[1] >= 650
    assert "31.00 |" in results.as_markdown(rows, name, {}) or "30.50 ±" in results.as_markdown(rows, name, {})


def words_of(workdir, data_dir, *more):
    small = "model.width=8,model.latent_dim=8,inner.steps=1,fit.steps=1,train.batch_size=4"
    words = ["--table=depth", "--axis=layers=2,3", "--seeds=1", "--steps=4", f"--set={small}", *more]
    return [f"--workdir={workdir}", f"--data_dir={data_dir}", *words]


def run(*words):
    return run_module("experiments.ablation", *words_of(*words))


@pytest.mark.slow
def test_the_command_goes_on_after_a_stop_and_a_failed_cell_ends_nothing(tmp_path, data_dir):
    workdir = tmp_path / "table"
    command = [sys.executable, "-m", "experiments.ablation", *words_of(workdir, data_dir)]
    stopped = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not (workdir / "layers=3" / "seed-0.log").exists():
        assert stopped.poll() is None, stopped.communicate()
        time.sleep(0.1)
    stopped.send_signal(signal.SIGTERM)
    _, stderr = stopped.communicate(timeout=600)
    assert stopped.returncode == 75, stderr
    assert "Traceback" not in stderr
    measured = (workdir / "layers=3" / "measured.json").read_text()

    whole = run(workdir, data_dir)
    assert whole.returncode == 1, whole.stderr  # one cell failed
    assert (workdir / "layers=3" / "measured.json").read_text() == measured
    failed, made = json.loads((workdir / "table.json").read_text())["rows"]
    assert failed["seeds"][0]["status"] == "failed"
    assert "model.layers must be at least 3" in failed["seeds"][0]["reason"]
    assert 0 < made["psnr"]["mean"] < 60
    assert "| 3 | " in whole.stdout
    assert not (workdir / "layers=3" / "seed-0" / "latents" / "train-00000-of-00001.safetensors").exists()

    written = (workdir / "layers=3" / "seed-0.json").stat().st_mtime_ns
    other = run(workdir, data_dir, "--steps=5")
    assert other.returncode == 1
    assert other.stderr.splitlines()[-1].endswith("was made with 4 steps, not 5; name another --workdir")
    assert (workdir / "layers=3" / "seed-0.json").stat().st_mtime_ns == written


def test_a_collapse_is_a_result_and_is_not_tried_again(tmp_path, data_dir):
    table = grids.TABLES["depth"]
    wild = ("model.width=8", "model.latent_dim=8", "inner.steps=2", "inner.step_size=1e30", "train.batch_size=4")
    cell = grids.make_cell(table, {"layers": 3}, "cpu", wild, data_dir)
    with StopRequest() as stop:
        outcome = runs.run_seed(cell, tmp_path, 0, grids.budget(cell, 3), table, data_dir, None, stop)
    assert outcome["status"] == "collapsed"
    assert "not finite" in outcome["reason"]
    assert runs.is_over(tmp_path / "seed-0.json")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--axis=layers="], "error: axis 'layers' is empty"),
        (["--set=model.widht=3"], "unknown setting model.widht; did you mean model.width"),
    ],
)
def test_faults_are_one_line(tmp_path, data_dir, words, message):
    refused = run(tmp_path / "table", data_dir, *words)
    assert refused.returncode == 1
    assert message in refused.stderr.splitlines()[-1]
    assert not (tmp_path / "table").exists()
