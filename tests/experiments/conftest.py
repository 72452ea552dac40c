"""A run of the launcher on real data that takes seconds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = {
    "model.width": 32, "model.latent_dim": 16, "inner.steps": 3, "train.steps": 60, "train.batch_size": 8,
    "train.eval_every": 20, "train.eval_signals": 16, "train.log_every": 5, "train.learning_rate": 1e-3,
}  # fmt: skip


def command(workdir, *, mode="all", config="configs/quickstart.py", extra=(), **overrides):
    """The launcher's command line for a small run; `overrides` are named with __ for dots."""
    values = SMALL | {name.replace("__", "."): value for name, value in overrides.items()}
    flags = [f"--config.{name}={value}" for name, value in values.items()]
    base = [sys.executable, "-m", "experiments.main", f"--config={config}", f"--workdir={workdir}", f"--mode={mode}"]
    return [*base, *flags, *extra]


def run(workdir, *, largest_file_kb=None, **keywords):
    """Run the launcher to its end in a process of its own; a limit on the size of files stands in for a full disk."""
    words = command(workdir, **keywords)
    if largest_file_kb is not None:
        words = ["bash", "-c", f'ulimit -f {largest_file_kb}; exec "$@"', "bash", *words]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Prepared data is shared by the tests, away from the user's own cache."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
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
