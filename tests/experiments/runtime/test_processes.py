"""Several processes are one run: the same field and store, and none is left waiting for one that is gone."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from experiments.runtime.processes import ProcessesError, own_devices
from tests.experiments.conftest import ROOT, command, run


def free_port():
    """A port that stays free until a process listens to it: not one of those that connections are given."""
    for port in random.SystemRandom().sample(range(10_000, 32_000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("localhost", port))
            return port
    raise AssertionError("no port is free")


def outputs_of(processes, *, timeout):
    """(stdout, stderr) of each, when all have ended."""
    try:
        return [process.communicate(timeout=timeout) for process in processes]
    except subprocess.TimeoutExpired:
        for process in processes:
            process.kill()
        pytest.fail(f"not ended after {timeout} s: {[process.communicate() for process in processes]}")


def start(workdir, **keywords):
    """Two processes of one run."""
    port = free_port()
    flags = [f"--coordinator=localhost:{port}", "--processes=2"]
    return [
        subprocess.Popen(
            command(workdir, extra=[*flags, f"--process={i}"], **keywords),
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in range(2)
    ]  # fmt: skip


def wait_for_checkpoint(process, workdir, after=0):
    """The newest step, once there is one above `after`."""
    limit = time.monotonic() + 120
    while True:
        newest = max((int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdigit()), default=0)
        if newest > after:
            return newest
        if process.poll() is not None or time.monotonic() > limit:
            process.kill()
            pytest.fail(f"no checkpoint after step {after}: {process.communicate()}")
        time.sleep(0.1)


def test_two_processes_make_the_field_and_the_store_of_one(finished, tmp_path):
    both = start(tmp_path / "two")
    outputs = outputs_of(both, timeout=300)
    assert [process.returncode for process in both] == [0, 0], outputs
    assert "results in" in outputs[0][0]
    assert "results in" not in outputs[1][0]  # the first speaks for all
    assert " on 2 cpu device(s) of 2 processes on 1 node(s), run in " in outputs[0][1]
    names = sorted(path.name for path in (finished / "latents").iterdir())
    assert sorted(path.name for path in (tmp_path / "two" / "latents").iterdir()) == names
    for file in ["field.safetensors", *(f"latents/{name}" for name in names if name.endswith(".safetensors"))]:
        one, two = load_file(finished / file), load_file(tmp_path / "two" / file)
        assert one.keys() == two.keys()
        for name in one:
            # Rounding differs, and Adam makes full steps of gradients that are little else.
            largest = np.abs(one[name]).max() or 1
            np.testing.assert_allclose(two[name] / largest, one[name] / largest, atol=2e-3, err_msg=f"{file} {name}")


def slurm(local, tasks, *, node=0, gpus=8, seen=None, **more):
    """The environment of a task, as Slurm makes it on nodes of `gpus` GPUs."""
    return {
        "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_TASKS_PER_NODE": tasks,
        "SLURM_NODEID": str(node), "SLURM_LOCALID": str(local), "SLURM_GPUS_ON_NODE": str(gpus),
        "CUDA_VISIBLE_DEVICES": seen or ",".join(map(str, range(gpus))), **more,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, []),  # without Slurm
        (slurm(0, "1(x2)"), []),  # a process a node: all eight
        (slurm(0, "1(x2)", node=1), []),
        (slurm(5, "8(x2)", node=1), [5]),  # a process a GPU
        (slurm(1, "2(x3)", node=2), [4, 5, 6, 7]),  # two processes a node share them
        (slurm(0, "2(x2),1", node=2), []),  # the last node has one process
        (slurm(5, "8", seen="0"), []),  # --gpus-per-task: Slurm has bound each to its own
        (slurm(1, "4", seen="2,3"), []),
        (slurm(1, "2", gpus=2, seen="GPU-8932f937,GPU-1f0c2b3a"), [1]),
        ({"SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_LOCALID": "3"}, [3]),  # a cluster that does not count its GPUs
    ],
)
def test_each_process_takes_its_own_gpus(environment, expected):
    assert own_devices(environment) == expected


def test_gpus_that_cannot_be_shared_evenly_are_refused():
    with pytest.raises(ProcessesError, match="3 tasks on this node cannot share its 8 GPUs evenly; set --ntasks-per"):
        own_devices(slurm(0, "3"))


JOIN = """
import json, jax
from experiments.runtime import processes
processes.join(True, {flags})
jax.config.update("jax_platforms", "cpu")
found = [jax.config.values["jax_cuda_visible_devices"], jax.local_device_count(), processes.devices()]
json.dump(found, open({path!r}, "w"))
"""


@pytest.mark.parametrize(
    ("layout", "flags", "expected"),
    [
        ("a process a node", "None, None, None", ["all", "all"]),
        ("a process a GPU", "None, None, None", ["0", "1"]),
        ("a process a node", "'localhost:{port}', 2, {process}", ["all", "all"]),
    ],
)
def test_jax_is_told_which_gpus_are_its_own(layout, flags, expected, tmp_path):
    """Two real processes in the environment of Slurm; devices of a CPU, two a process, stand in for GPUs."""
    port = free_port()
    tasks = []
    for process in range(2):
        local = process if layout == "a process a GPU" else 0
        own = slurm(local, "2" if layout == "a process a GPU" else "1(x2)", node=process - local, gpus=2)
        own |= {
            "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2", "SLURM_PROCID": str(process),
            "JAX_COORDINATOR_PORT": str(port), "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        }  # fmt: skip
        code = JOIN.format(flags=flags.format(port=port, process=process), path=str(tmp_path / str(process)))
        tasks.append(
            subprocess.Popen(
                [sys.executable, "-c", code], cwd=ROOT, env=os.environ | own,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
        )  # fmt: skip
    outputs = outputs_of(tasks, timeout=240)
    assert [task.returncode for task in tasks] == [0, 0], outputs
    found = [json.loads((tmp_path / str(process)).read_text()) for process in range(2)]
    assert found == [[each, 2, "4 cpu device(s) of 2 processes on 1 node(s)"] for each in expected]


@pytest.mark.slow
def test_the_loss_of_one_ends_the_other_and_one_alone_goes_on(tmp_path):
    long = {"train__steps": 100_000, "train__checkpoint_every": 5, "train__eval_every": 100_000}
    both = start(tmp_path / "two", mode="train", **long)
    step = wait_for_checkpoint(both[0], tmp_path / "two")
    both[1].kill()
    both[1].communicate()
    _, errors = both[0].communicate(timeout=60)
    # Whichever comes first: a message that cannot be sent, or a heartbeat that is missed, on which JAX aborts.
    if both[0].returncode == 1:
        assert errors.splitlines()[-1].startswith("error: process 0 of 2: another process of this run is gone")
    else:
        assert both[0].returncode == -signal.SIGABRT, errors
        assert "This most likely indicates that another task died" in errors
    alone = subprocess.Popen(
        command(tmp_path / "two", mode="train", **long), cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    wait_for_checkpoint(alone, tmp_path / "two", after=step + 5)
    alone.terminate()
    _, errors = alone.communicate(timeout=60)
    assert alone.returncode == 75, errors


def test_what_one_refuses_leaves_none_waiting(tmp_path):
    both = start(tmp_path / "two", config="configs/ecg.py", train__batch_size=8)  # without a folder of data
    errors = [error for _, error in outputs_of(both, timeout=120)]
    assert both[0].returncode == 1, errors
    assert "error: " in errors[0]
    assert both[1].returncode != 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--processes=2"], "error: --coordinator, --processes and --process belong together; give all three"),
        (["--coordinator=a:1", "--processes=2", "--process=2"], "error: --process must be 0 to 1"),
    ],
)
def test_flags_that_do_not_belong_together_are_refused(tmp_path, flags, message):
    done = run(tmp_path / "run", extra=flags)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(message)
