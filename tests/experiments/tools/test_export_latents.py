"""The layouts of others, read back with the tools of others."""

import importlib.util
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

import medfuncta_jax as mf
from experiments.runtime.interruption import Interrupted, StopRequest
from experiments.tools import export_latents as command
from tests.experiments.conftest import ROOT
from tests.experiments.tools.test_latent_card import blocks
from tests.latent_stores import LENGTHS, about, write_store

NO_TORCH = importlib.util.find_spec("torch") is None


def export(tmp_path, form, monkeypatch, **options):
    """Export a made-up store in blocks of 4; returns what was written to the store, and the new folder."""
    monkeypatch.setattr(command, "_AT_ONCE", 4)
    written = write_store(tmp_path / "store", **options)
    with StopRequest() as stop:
        command.export_latents(mf.load_latents(tmp_path / "store"), form, tmp_path / "out", stop=stop)
    assert "# Latents of noise" in (tmp_path / "out" / "README.md").read_text()
    return written, tmp_path / "out"


@pytest.mark.parametrize("options", [{}, {"affines": True, "tasks": 3, "dtype": "float16"}])
def test_npz(tmp_path, monkeypatch, options):
    written, out = export(tmp_path, "npz", monkeypatch, **options)
    for name, expected in written.items():
        with np.load(out / f"{name}.npz", allow_pickle=False) as arrays:
            assert set(arrays.files) == {key for key, value in expected.items() if value is not None} | {"about"}
            for key in ("latents", "labels", "psnr"):
                np.testing.assert_array_equal(arrays[key], expected[key])
                assert arrays[key].dtype == expected[key].dtype
            assert list(arrays["ids"]) == expected["ids"]
            assert json.loads(str(arrays["about"])) == about(name)
            if "affines" in arrays:
                np.testing.assert_array_equal(arrays["affines"], expected["affines"])
    monkeypatch.chdir(out)
    names = {}
    exec(blocks((out / "README.md").read_text())[0], names)
    assert names["latents"].shape == (10, 6)


@pytest.mark.parametrize("options", [{}, {"affines": True, "tasks": 3, "dtype": "float16"}])
def test_tfds_reads_it_without_tensorflow(tmp_path, monkeypatch, options):
    written, out = export(tmp_path, "tfds", monkeypatch, **options)
    builder = tfds.builder_from_directory(out)
    for name, expected in written.items():
        source = builder.as_data_source(name)
        assert len(source) == LENGTHS[name]
        for i, example in enumerate(source):
            np.testing.assert_array_equal(example["latent"], expected["latents"][i])
            assert example["latent"].dtype == expected["latents"].dtype
            np.testing.assert_array_equal(example["label"], expected["labels"][i])
            assert example["id"].decode() == expected["ids"][i]
            assert example["psnr"] == expected["psnr"][i]
            if expected["affines"] is not None:
                np.testing.assert_array_equal(example["affine"], expected["affines"][i])
    assert "tensorflow" not in sys.modules
    names = {}
    exec(blocks((out / "README.md").read_text())[0].replace('"DIR"', f'"{out}"'), names)


@pytest.mark.skipif(NO_TORCH, reason="torch is not installed")
@pytest.mark.parametrize("options", [{}, {"tasks": 3, "dtype": "float16"}])
def test_mednf(tmp_path, monkeypatch, options):
    import torch

    written, out = export(tmp_path, "mednf", monkeypatch, **options)
    for name, expected in written.items():
        assert {path.name for path in (out / name).iterdir()} == {f"datapoint_{i}.pt" for i in range(LENGTHS[name])}
        for i, (latent, label) in enumerate(zip(expected["latents"], expected["labels"], strict=True)):
            point = torch.load(out / name / f"datapoint_{i}.pt", weights_only=True)
            assert point.keys() == {"modulations", "label"}
            assert (point["modulations"].dtype, point["label"].dtype) == (torch.float32, torch.int64)
            np.testing.assert_array_equal(point["modulations"], latent.astype(np.float32))
            np.testing.assert_array_equal(point["label"], np.atleast_1d(label))
            assert (out / name / f"datapoint_{i}.pt").stat().st_size < 3000  # nothing but this latent
    monkeypatch.chdir(out)
    exec(blocks((out / "README.md").read_text())[0], {})


def test_without_torch_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(command.ExportError, match="torch is not installed: pip install torch"):
        export(tmp_path, "mednf", monkeypatch)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_nothing_is_overwritten(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    with pytest.raises(command.ExportError, match="is there already"):
        export(tmp_path, "npz", monkeypatch)
    assert not list((tmp_path / "out").iterdir())


def test_a_stop_leaves_nothing(tmp_path, monkeypatch):
    write_store(tmp_path / "store")
    store = mf.load_latents(tmp_path / "store")
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted, match="SIGTERM: nothing was exported"):
            command.export_latents(store, "npz", tmp_path / "out", stop=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_the_command(tmp_path):
    write_store(tmp_path / "store")

    def run(*words):
        line = [sys.executable, "-m", "experiments.tools.export_latents", *words]
        return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120)

    store, out = f"--workdir={tmp_path / 'store'}", f"--out={tmp_path / 'out'}"
    done = run(store, out)
    assert done.returncode == 0, done.stderr
    assert "10 train, 3 val, 4 test" in done.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"train.npz", "val.npz", "test.npz", "README.md"}
    done = run(store, out)
    assert done.returncode == 1
    assert done.stderr == f"error: {tmp_path / 'out'} is there already; name another --out or remove it\n"
