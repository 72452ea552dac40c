"""Extraction in files: after a kill, by the jobs of an array, and with files that are there already."""

import errno
import os
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest

import medfuncta_jax as mf
from experiments.runtime import run as runtime
from experiments.runtime.interruption import Interrupted, StopRequest
from experiments.runtime.run_directory import RunDirectory
from experiments.settings import RunSettings
from experiments.stages import extract as stage
from medfuncta_jax import metrics
from medfuncta_jax.batched import FittedSignals
from medfuncta_jax.latent_file import LatentStoreError
from tests.experiments.conftest import ROOT
from tests.latent_stores import LENGTHS, made_up_dataset, write_field

GRID = (5, 4)


def settings_of(**extract):
    return RunSettings.from_dict(
        {
            "data": {"source": "made up", "cache_dir": f"/cache/{len(extract)}"},
            "model": {"layers": 3, "width": 8, "latent_dim": 4, "omega_first": 10.0, "omega_last": 20.0},
            "fit": {"steps": 2, "batch_size": 2},
            "extract": {"signals_per_file": 4} | extract,
        }
    )


class Run:
    """A run with a field, whose extraction can be counted and stopped."""

    def __init__(self, path, monkeypatch=None, *, affines=False):
        self.dataset = made_up_dataset(GRID, affines=affines)
        self.directory = RunDirectory(path, settings_of())
        if not (path / "field.safetensors").exists():
            write_field(path, settings_of(), self.dataset)
        self.field, self.params = mf.load_field(path)
        self.fitted = []
        self.stop_after = None
        if monkeypatch is not None:
            fit = stage.fit_signals

            def counted(field, params, split, *, rows, **options):
                if self.stop_after is not None and len(self.fitted) >= self.stop_after:
                    raise SystemExit("killed")
                self.fitted.append((len(split), int(rows[0])))
                return fit(field, params, split, rows=rows, **options)

            monkeypatch.setattr(stage, "fit_signals", counted)

    def extract(self, **options):
        """Extract; returns the files fitted, each as (length of its split, first row)."""
        self.fitted.clear()
        with StopRequest() as stop:
            settings = settings_of(**options)
            stage.extract(runtime.Run(RunDirectory(self.directory.path, settings), stop, self.dataset))
        return list(self.fitted)

    @property
    def latents(self):
        return self.directory.latents

    def bytes(self):
        return {path.name: path.read_bytes() for path in self.latents.iterdir()}


ALL = [(10, 0), (10, 4), (10, 8), (3, 0), (4, 0)]


@pytest.fixture
def run(tmp_path, monkeypatch):
    return Run(tmp_path / "run", monkeypatch)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The files of one job left alone."""
    run = Run(tmp_path_factory.mktemp("run"))
    run.extract()
    return run


def test_every_signal_is_fitted_and_described(reference):
    store = mf.load_latents(reference.directory.path, field=reference.directory.path, verify=True)
    assert {name: len(split) for name, split in store.items()} == LENGTHS
    for name, split in store.items():
        there = reference.dataset.splits[name]
        signals = there.signals(slice(None))
        fit = mf.fit_latent(reference.field, reference.params, signals, steps=2, safeguard=True)
        np.testing.assert_allclose(split.latents, fit.latents, rtol=1e-4, atol=1e-7)
        values = np.clip(mf.reconstruct(reference.field, reference.params, split.latents, mf.grid(GRID)), 0, 1)
        np.testing.assert_allclose(split.psnr, metrics.psnr(values, signals.reshape(values.shape)), rtol=1e-4)
        assert split.ids == there.annotations().ids
        np.testing.assert_array_equal(split.labels, there.annotations().labels)
    about = store["train"].about
    assert (about["grid"], about["channels"], about["classes"]) == ([5, 4], 1, ["even", "odd"])
    assert about["data"] == {"source": "made up", "title": "waves", "licence": "not known"}  # no place of this machine
    assert "cache_dir" not in about["settings"]["data"]
    assert about["settings"]["extract"] == {"signals_per_file": 4, "dtype": "float32"}
    assert mf.Settings.from_saved(about["settings"]).model == reference.field.model
    assert "| train | 10 |" in (reference.latents / "README.md").read_text()


def test_a_split_that_is_added_later_joins_the_store(run, reference):
    """The files that are there are not fitted again, and the store is that of one extraction."""

    assert run.extract(splits=("val", "test")) == [(3, 0), (4, 0)]
    assert list(mf.load_latents(run.directory.path)) == ["val", "test"]
    assert run.extract(splits=("train",)) == [(10, 0), (10, 4), (10, 8)]
    assert run.bytes() == reference.bytes()
    assert run.extract(splits=("test",)) == []
    assert run.bytes() == reference.bytes()


def test_affines_are_kept(tmp_path):
    run = Run(tmp_path, affines=True)
    run.extract()
    for name, split in mf.load_latents(tmp_path).items():
        np.testing.assert_array_equal(split.affines, run.dataset.splits[name].annotations().affines)


def test_a_killed_run_fits_only_what_is_missing(run, reference):
    run.stop_after = 2
    with pytest.raises(SystemExit):
        run.extract()
    assert sorted(path.name for path in run.latents.iterdir()) == [
        "train-00000-of-00003.safetensors", "train-00001-of-00003.safetensors"
    ]  # fmt: skip
    stale = run.latents / ".train-00002-of-00003.partial123.safetensors"
    stale.write_bytes(b"half a file")
    with pytest.raises(LatentStoreError, match=r"train-00002-of-00003.safetensors is missing: the store is still"):
        mf.load_latents(run.latents)
    run.stop_after = None
    assert run.extract() == ALL[2:]
    assert not stale.exists()
    assert run.bytes() == reference.bytes()
    assert run.extract() == []
    assert run.bytes() == reference.bytes()


KILLED = """
import os, signal, sys
from pathlib import Path
from experiments.stages import extract as stage
from tests.experiments.stages.test_extract import Run
run = Run(Path(sys.argv[1]))
fit, done = stage.fit_signals, []
def killed(*args, after_batch, **options):
    done.append(1)
    if len(done) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return fit(*args, after_batch=after_batch, **options)
stage.fit_signals = killed
run.extract()
"""


def test_kill_9_between_two_files(tmp_path, monkeypatch):
    run = Run(tmp_path, monkeypatch)
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT, capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    written = len(list((tmp_path / "latents").glob("[!.]*")))  # the second may be on its way
    assert written in (1, 2)
    assert run.extract() == ALL[written:]
    assert mf.load_latents(tmp_path, verify=True).keys() == LENGTHS.keys()


def test_a_file_is_written_while_the_next_one_is_fitted(run, reference, monkeypatch):
    fit, write, next_one = stage.fit_signals, stage._write, threading.Event()

    def fit_and_tell(field, params, split, rows, *args, **options):
        if int(rows[0]) == 4:  # the second file of the training split
            next_one.set()
        return fit(field, params, split, rows=rows, **options)

    def wait_and_write(part, *args):
        if part.path.name.startswith("train-00000"):
            assert next_one.wait(60)
        write(part, *args)

    monkeypatch.setattr(stage, "fit_signals", fit_and_tell)
    monkeypatch.setattr(stage, "_write", wait_and_write)
    run.extract()
    assert run.bytes() == reference.bytes()


def test_a_full_disk_is_told_before_more_is_fitted(run, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(stage, "_write", full)
    with pytest.raises(OSError, match="No space left"):
        run.extract()
    assert run.fitted == ALL[:2]


@pytest.mark.parametrize("shards", [2, 3, 7])
def test_a_job_array_gives_the_files_of_one_job(run, reference, shards, caplog):
    fitted = []
    for shard in reversed(range(shards)):
        assert not (run.latents / "README.md").exists()
        fitted += run.extract(shard=shard, shards=shards)
    assert sorted(fitted) == sorted(ALL)
    assert run.bytes() == reference.bytes()
    assert run.extract(shard=0, shards=2) == []


def test_a_missing_job_is_filled_by_any_number_of_jobs(run, reference):
    run.extract(shard=1, shards=3)
    assert run.extract() == [ALL[0], ALL[2], ALL[3]]
    assert run.bytes() == reference.bytes()


def test_a_damaged_file_is_fitted_anew(run, reference):
    run.extract()
    path = run.latents / "train-00001-of-00003.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(raw)
    assert run.extract() == [ALL[1]]
    path.write_bytes(path.read_bytes()[:50])
    assert run.extract() == [ALL[1]]
    assert run.bytes() == reference.bytes()


def test_another_field_or_other_signals_are_fitted_anew(run):
    run.extract()
    write_field(run.directory.path, settings_of(), run.dataset, seed=1)
    with pytest.raises(LatentStoreError, match="another field"):
        mf.load_latents(run.latents, field=run.directory.path)
    assert run.extract() == ALL
    records = run.dataset.splits["val"]._records
    records[1]["id"] = "another signal"
    run.dataset.splits["val"]._memory = None
    assert run.extract() == [ALL[3]]
    assert run.extract() == []


def test_the_card_is_there_only_beside_a_whole_store(run):
    run.extract()
    write_field(run.directory.path, settings_of(), run.dataset, seed=1)
    run.stop_after = 1
    with pytest.raises(SystemExit):
        run.extract()
    assert not (run.latents / "README.md").exists()


def test_another_layout_is_refused_and_nothing_is_lost(run, reference):
    run.extract()
    with pytest.raises(LatentStoreError, match=r"train-00000-of-00003.*signals_per_file=5 make 2 file") as caught:
        run.extract(signals_per_file=5)
    assert "\n" not in str(caught.value)
    assert run.bytes() == reference.bytes()


def test_half_precision_is_measured_as_it_is_stored(run, reference):
    run.extract(dtype="float16")
    whole = mf.load_latents(reference.directory.path)
    beside = run.directory.path / "variants" / "extract.dtype=float16"
    for name, split in mf.load_latents(beside, verify=True).items():
        assert split.latents.dtype == np.float16
        np.testing.assert_array_equal(split.latents, whole[name].latents[:].astype(np.float16))
        signals = run.dataset.splits[name].signals(slice(None))
        values = np.clip(mf.reconstruct(run.field, run.params, split.latents, mf.grid(GRID)), 0, 1)
        np.testing.assert_allclose(split.psnr, metrics.psnr(values, signals.reshape(values.shape)), rtol=1e-5)
        assert (split.psnr != whole[name].psnr).any()
    assert run.extract(dtype="float32") == ALL


def test_latents_beyond_half_precision_are_refused(run, monkeypatch):
    too_large = SimpleNamespace(latents=np.full((4, 4), 1e6).astype(np.float32), psnr=np.zeros(4, np.float32))
    with np.errstate(over="ignore"):
        too_large.latents = too_large.latents.astype(np.float16)
    monkeypatch.setattr(stage, "fit_signals", lambda *args, **options: too_large)
    with pytest.raises(LatentStoreError, match=r"beyond float16's range; give --config\.extract\.dtype=float32"):
        run.extract(dtype="float16")
    assert not list(run.latents.glob("*"))


def test_a_stop_keeps_finished_files(run, reference):
    def fit_then_stop(*args, after_batch, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        after_batch(FittedSignals(np.zeros((1, 4)), np.full(1, 30.0)))

    run.extract(shard=0, shards=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "fit_signals", fit_then_stop)
        with pytest.raises(Interrupted, match=r"SIGTERM: finished files are in .*latents; run the same command again"):
            run.extract()
    assert run.extract() == ALL[1::2]
    assert run.bytes() == reference.bytes()
