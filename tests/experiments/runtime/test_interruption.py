"""Ctrl-C and SIGTERM in real processes: while compiled programs run, while a state is held, and twice."""

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import medfuncta_jax as mf
from tests.experiments.conftest import ROOT

# Minutes within one compiled program, in which Python's own handlers do not run.
LONG = """
import jax, jax.numpy as jnp
from experiments.runtime.interruption import StopRequest, Interrupted
work = jax.jit(lambda x: jax.lax.fori_loop(0, 10**9, lambda i, x: jnp.sin(x), x)).lower(jnp.ones(64)).compile()
with StopRequest() as stop:
    print("begun", flush=True)
    jax.block_until_ready(work(jnp.ones(64)))
"""
HELD = """
import time
from experiments.runtime.interruption import StopRequest, Interrupted
with StopRequest() as stop:
    try:
        with stop.held():
            print("begun", flush=True)
            while not stop:
                time.sleep(0.05)
            time.sleep(4)  # a step that takes longer than the grace
            stop.check("the state is saved")
    except Interrupted as interrupted:
        print(interrupted, flush=True)
        raise SystemExit(75)
"""


def begun(code):
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout.readline() == "begun\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_compiled_program_is_left(number):
    process = begun(LONG)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 75, stderr
    assert f"{number.name}; stopping, once more stops at once" in stderr
    assert "finished files are kept, run the same command again to go on" in stderr
    assert "Traceback" not in stderr


def test_what_is_held_is_waited_for():
    process = begun(HELD)
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 75
    assert stdout == "SIGTERM: the state is saved; run the same command again to go on\n"
    assert "SIGTERM; stopping after this step" in stderr


def test_twice_stops_at_once_whatever_is_held():
    held, indented = LONG.split("    print")[0] + "    with stop.held():\n", "    print" + LONG.split("    print")[1]
    process = begun(held + indented.replace("    ", "        "))
    time.sleep(1)  # until it is within the compiled program
    process.send_signal(signal.SIGINT)
    assert "after this step" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "stopped at once" in stderr


def test_a_stage_in_a_long_fit(finished, tmp_path):
    workdir = shutil.copytree(finished, tmp_path / "run")
    words = [f"--workdir={workdir}", "--mode=extract", "--config.fit.steps=100000000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments.main", *words], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and not list(workdir.glob("variants/*/settings.json")):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 75, stderr
    assert "SIGTERM" in stderr
    assert "Traceback" not in stderr
    assert len(mf.load_latents(workdir)) == 3


@pytest.mark.parametrize("seconds", [0.0, 0.3, 1.0, 2.0])
def test_no_traceback_however_early(tmp_path, seconds):
    """From the first line of the module on, before which the interpreter itself is at work."""
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments.main", "--config=configs/quickstart.py", f"--workdir={tmp_path / 'run'}"],
        cwd=ROOT, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    seen = []
    while seen[-2:] != [True, False] and process.poll() is None:
        caught = _caught(process.pid)
        seen += [caught] if seen[-1:] != [caught] else []
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode in (-signal.SIGINT, 75), stderr
    assert "Traceback" not in stderr


def _caught(pid):
    """Whether a process has a handler of its own for SIGINT, as Linux tells."""
    status = Path(f"/proc/{pid}/status").read_text()
    (mask,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(mask, 16) >> (signal.SIGINT - 1) & 1)
