"""A run of the launcher on real data that takes seconds."""

import os
import sys

import pytest

from tests.experiments.command_line import ROOT, run_module
from tests.experiments.release_files import network, torch

__all__ = ["ROOT", "command", "network", "run", "torch"]

# Fits of all splits and of validation have one batch size, so that one program serves all.
SMALL = {
    "model.width": 32, "model.latent_dim": 16, "inner.steps": 3, "train.steps": 60, "train.batch_size": 8,
    "train.eval_every": 20, "train.eval_signals": 32, "train.log_every": 5, "train.learning_rate": 1e-3,
    "train.start": "random", "train.warmup_steps": 100, "train.step_size_learning_rate": 1e-2, "fit.steps": 100,
    "inner.fit_ratio": 1.0, "train.augmentation": 0.0, "fit.batch_size": 32,
}  # fmt: skip


def _words(workdir, *, mode="all", config="configs/quickstart.py", extra=(), **overrides):
    values = SMALL | {name.replace("__", "."): value for name, value in overrides.items()}
    flags = [f"--config.{name}={value}" for name, value in values.items()]
    return [f"--config={config}", f"--workdir={workdir}", f"--mode={mode}", *flags, *extra]


def command(workdir, **keywords):
    """The launcher's command line for a small run; other keywords are settings, named with __ for dots."""
    return [sys.executable, "-m", "experiments.main", *_words(workdir, **keywords)]


def run(workdir, *, largest_file_kb=None, **keywords):
    """Run the launcher of `command` to its end; a limit on the size of files stands in for a full disk."""
    return run_module("experiments.main", *_words(workdir, **keywords), largest_file_kb=largest_file_kb)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Prepared data and compiled programs are shared by the tests of all workers, away from the user's own cache."""
    before = os.environ.get("XDG_CACHE_HOME")
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache"
    os.environ["XDG_CACHE_HOME"] = str(folder)
    yield
    if before is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = before


@pytest.fixture(scope="session")
def finished(cache, tmp_path_factory):
    """The run directory of one finished small run."""
    workdir = tmp_path_factory.mktemp("run") / "whole"
    done = run(workdir)
    assert done.returncode == 0, done.stderr
    return workdir
