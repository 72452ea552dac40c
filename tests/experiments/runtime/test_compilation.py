"""The cache of compiled programs: one process never reads or writes what another one has half written."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.experiments.conftest import ROOT

# Compiles two programs, one of a size of its own; then waits for a line, its folder still its own.
PROGRAM = """
import logging, pathlib, sys, warnings
logging.basicConfig(level=logging.INFO, format="%(message)s")
warnings.simplefilter("error")
import jax, jax.numpy as jnp
from experiments.runtime.compilation import keep_compiled
keep_compiled(pathlib.Path(sys.argv[1]))
for size in (8, int(sys.argv[2])):
    jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((size, size))).block_until_ready()
print(jax.config.jax_compilation_cache_dir, flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def environment():
    names = ("JAX_ENABLE_COMPILATION_CACHE", "JAX_COMPILATION_CACHE_DIR")
    return {name: value for name, value in os.environ.items() if name not in names} | {"JAX_PLATFORMS": "cpu"}


def start(cache, environment, size=9):
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(cache), str(size)], cwd=ROOT, env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def folder_of(process):
    return Path(process.stdout.readline().strip())


def end(process):
    errors = process.communicate("\n", timeout=60)[1]
    assert process.returncode == 0, errors
    return errors


def entries(folder):
    return {entry.name: entry.read_bytes() for entry in folder.glob("*-cache")}


def test_a_half_written_entry_is_removed_with_one_line_and_written_again(tmp_path, environment):
    first = start(tmp_path, environment)
    folder = folder_of(first)
    assert end(first) == ""
    before = entries(folder)
    assert len(before) >= 2
    for name in sorted(before)[:2]:
        (folder / name).write_bytes(before[name][:-7])
    second = start(tmp_path, environment)
    assert folder_of(second) == folder
    assert end(second).strip() == f"removed 2 half-written compiled program(s) from {folder}"
    assert entries(folder).keys() == before.keys()
    assert all(len(packed) > len(before[name]) - 7 for name, packed in entries(folder).items())
    third = start(tmp_path, environment)
    folder_of(third)
    assert end(third) == ""


def test_jobs_at_one_time_have_folders_of_their_own_and_begin_with_what_is_there(tmp_path, environment):
    one = start(tmp_path, environment)
    first = folder_of(one)
    torn = first / sorted(entries(first))[0]
    torn.write_bytes(torn.read_bytes()[:-7])  # as if its writer were at it
    two = start(tmp_path, environment, size=10)
    second = folder_of(two)
    assert first != second
    others = entries(first).keys() - {torn.name}
    assert others
    assert others < entries(second).keys()
    assert entries(second).get(torn.name) != torn.read_bytes()
    assert [end(one), end(two)] == ["", ""]


def test_a_cache_that_cannot_be_written_costs_a_compilation_and_nothing_else(tmp_path, environment):
    (tmp_path / "compiled").write_text("in the way")
    process = start(tmp_path, environment)
    assert process.stdout.readline().strip() == "None"
    assert end(process) == ""
