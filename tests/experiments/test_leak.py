"""No training signal becomes a test signal when a folder changes between two starts of the launcher."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

import medfuncta_jax as mf
from medfuncta_jax.checkpoint import load_field_and_about, save_field
from tests.experiments.conftest import run

SIZE = {"data__size": 16, "config": "configs/image_folder.py:cpu", "train__steps": 20, "train__eval_every": 20}


def _picture(path, seed, levels=255):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    x, y = np.meshgrid(np.linspace(0, 6, 24), np.linspace(0, 6, 24))
    unit = sum(np.sin(rng.uniform(0.5, 3) * axis + rng.uniform(0, 6)) for axis in (x, y, x + y, x - y))
    unit = (unit - unit.min()) / np.ptp(unit)
    Image.fromarray(np.rint(unit * levels).astype(np.uint8 if levels == 255 else np.uint16)).save(path)


def _run(workdir, folder, **keywords):
    return run(workdir, extra=[f"--data_dir={folder}"], **(SIZE | keywords))


def _stored(workdir):
    """The ids of each split in the store of latents."""
    return {name: set(split.ids) for name, split in mf.load_latents(workdir).items()}


@pytest.fixture(scope="module")
def before(cache, tmp_path_factory):
    """A finished run on twenty pictures; the run directory lies inside the data directory."""
    root = tmp_path_factory.mktemp("leak")
    for i in range(20):
        _picture(root / "data" / f"{i:02d}.png", i)
    done = _run(root / "data" / "run", root / "data")
    assert done.returncode == 0, done.stderr
    return root


@pytest.fixture
def root(before, tmp_path):
    return shutil.copytree(before, tmp_path / "root")


def test_the_record_says_what_was_in_which_split_and_the_run_is_no_data(before):
    record = json.loads((before / "data" / "run" / "signals.json").read_text())["splits"]
    stored = _stored(before / "data" / "run")
    assert {name: set(held["ids"]) for name, held in record.items()} == stored
    assert set().union(*stored.values()) == {f"{i:02d}.png" for i in range(20)}
    assert (before / "data" / "run" / "figures" / "reconstructions.png").exists()
    done = _run(before / "data" / "run", before / "data")
    assert done.returncode == 0, done.stderr
    assert _stored(before / "data" / "run") == stored


def test_files_that_come_and_go_move_no_other(root):
    workdir, data = root / "data" / "run", root / "data"
    first = _stored(workdir)
    gone = sorted(first["train"])[0]
    (data / gone).unlink()
    changed = sorted(first["test"])[0]
    _picture(data / changed, 500)
    for i in range(30, 45):
        _picture(data / f"{i}.png", i)
    done = _run(workdir, data)
    assert done.returncode == 0, done.stderr
    assert f"1 signal of signals.json: missing or unreadable now: {gone}" in done.stderr
    assert f"1 signal of signals.json: changed since this run began: {changed}" in done.stderr
    assert "15 signals new since this run began" in done.stderr
    second = _stored(workdir)
    assert second["train"] >= first["train"] - {gone}
    assert second["val"] >= first["val"]
    assert second["test"] >= first["test"]
    assert len(set().union(*second.values())) == 34
    assert json.loads((workdir / "evaluation.json").read_text())["test"]["signals"] == len(second["test"])


@pytest.mark.slow
def test_with_hashes_that_would_put_them_elsewhere_they_stay(root):
    """A split that was filled with a borrowed file, and is drawn anew now that files of its own have come."""
    data, workdir = root / "few", root / "run of few"
    for i in range(3):
        _picture(data / f"{i}.png", 100 + i)
    assert _run(workdir, data, train__batch_size=1).returncode == 0
    first = _stored(workdir)
    for i in range(3, 40):
        _picture(data / f"{i}.png", 100 + i)
    done = _run(workdir, data, train__batch_size=1)
    assert done.returncode == 0, done.stderr
    second = _stored(workdir)
    assert all(second[name] >= first[name] for name in first)
    from medfuncta_jax.datasets import open_dataset

    fresh = open_dataset("image_folder", data_dir=str(data), size=16, cache_dir=str(root / "cache"))
    drawn = {name: {one["id"] for one in split} for name, split in fresh.splits.items()}
    moved = [id for name in first for id in first[name] if id not in drawn[name]]
    assert moved, "choose other seeds: nothing was borrowed"
    assert "kept in the split of this run" in done.stderr
    assert all(id in done.stderr for id in moved)


def test_trained_pictures_under_other_names_are_not_tested(root):
    """The whole folder again from one further up, and as 16-bit exports: every name is new, no content is."""
    workdir = root / "data" / "run"
    first = _stored(workdir)
    elsewhere = root / "elsewhere"
    for i in range(20):
        _picture(elsewhere / "site" / f"scan {i:02d}.tif", i, levels=65535)
    for i in range(50, 60):
        _picture(elsewhere / "site" / f"scan {i:02d}.tif", i, levels=65535)
    done = _run(workdir, elsewhere)
    assert done.returncode == 0, done.stderr
    assert "20 signals of signals.json: there under another name: site/scan " in done.stderr
    second = {name: {id.split()[-1].split(".")[0] for id in ids} for name, ids in _stored(workdir).items()}
    for name, ids in first.items():
        assert second[name] >= {id.split(".")[0] for id in ids}
    assert sum(map(len, second.values())) == 30


def test_a_folder_without_any_of_them_is_refused_and_nothing_is_lost(root):
    workdir = root / "data" / "run"
    files = {path: path.read_bytes() for path in (workdir / "latents").iterdir()}
    for i in range(70, 76):
        _picture(root / "other" / f"x{i}.png", i)
    done = _run(workdir, root / "other")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: none of the 20 signals that this run began with, such as ")
    assert "name another --workdir" in last
    assert files == {path: path.read_bytes() for path in (workdir / "latents").iterdir()}


def test_a_run_from_before_the_record_keeps_the_split_that_its_field_names(root):
    workdir = root / "data" / "run"
    field, params, about = load_field_and_about(workdir)
    former = about["data"]["split"]
    former["train"], former["test"] = former["test"], former["train"]
    save_field(workdir / "field.safetensors", field, params, about)
    (workdir / "signals.json").unlink()
    done = _run(workdir, root / "data", mode="extract")
    assert done.returncode == 0, done.stderr
    assert _stored(workdir) == {name: set(ids) for name, ids in former.items()}
    (workdir / "signals.json").unlink()
    (workdir / "field.safetensors").unlink()
    done = _run(workdir, root / "data", mode="extract")
    assert done.returncode == 1
    assert "was trained before runs kept the splits of their signals" in done.stderr.strip().splitlines()[-1]


def test_the_data_directory_is_no_run_directory(root):
    done = _run(root / "data", root / "data")
    assert done.returncode == 2
    assert "error: --workdir is the data directory" in done.stderr
    assert not (root / "data" / "config.json").exists()


def test_a_damaged_record_is_named(root):
    (root / "data" / "run" / "signals.json").write_text("{")
    done = _run(root / "data" / "run", root / "data")
    assert done.returncode == 1
    assert "signals.json is damaged" in done.stderr.strip().splitlines()[-1]
