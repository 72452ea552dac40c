"""Several processes are one run: the same field and store, and none is left waiting for one that is gone."""

import signal
import socket
import subprocess
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.experiments.conftest import ROOT, command, run


def start(workdir, **keywords):
    """Two processes of one run, on a port that is free."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
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
    outputs = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert "results in" in outputs[0][0]
    assert "results in" not in outputs[1][0]  # the first speaks for all
    names = sorted(path.name for path in (finished / "latents").iterdir())
    assert sorted(path.name for path in (tmp_path / "two" / "latents").iterdir()) == names
    for file in ["field.safetensors", *(f"latents/{name}" for name in names if name.endswith(".safetensors"))]:
        one, two = load_file(finished / file), load_file(tmp_path / "two" / file)
        assert one.keys() == two.keys()
        for name in one:
            # Rounding differs, and Adam makes full steps of gradients that are little else.
            largest = np.abs(one[name]).max() or 1
            np.testing.assert_allclose(two[name] / largest, one[name] / largest, atol=2e-3, err_msg=f"{file} {name}")


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
    errors = [process.communicate(timeout=60)[1] for process in both]
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
