"""One writer a run directory: processes that start together, wait, die, share, or hang after an error."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from experiments.runtime import lock
from experiments.runtime.interruption import Interrupted, StopRequest
from tests.experiments import final_state
from tests.experiments.conftest import ROOT, command, run

# Holds the lock of a folder until its standard input ends.
HOLD = """
import sys, logging
from pathlib import Path
from experiments.runtime.interruption import StopRequest
from experiments.runtime.lock import held
logging.basicConfig(level=logging.INFO)
with StopRequest() as stop, held(Path(sys.argv[1]), "a test", shared=sys.argv[2] == "shared", stop=stop):
    print("held", flush=True)
    sys.stdin.read()
"""


def start(words, **keywords):
    return subprocess.Popen(words, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **keywords)


def holder(folder, kind="alone"):
    return start([sys.executable, "-c", HOLD, str(folder), kind], stdin=subprocess.PIPE)


def wait_until(said, process, file=None):
    """The lines of standard error up to one that holds `said`."""
    lines = []
    for line in process.stderr:
        lines.append(line)
        if said in line:
            return lines
    raise AssertionError(f"{said!r} was never said: {lines}")


def write_holder(folder, *, age, machine="another machine", shared=False):
    (folder / ".lock").mkdir(exist_ok=True)
    file = folder / ".lock" / "node7-4711.json"
    values = {"host": "node7", "pid": 4711, "machine": machine, "since": "9:00", "what": "train", "shared": shared}
    file.write_text(json.dumps(values))
    os.utime(file, (time.time() - age,) * 2)
    return file


@pytest.mark.slow
def test_two_runs_at_once_make_one(finished, tmp_path):
    """Started together, with different delays, as two starts of one command are."""
    for k, delay in enumerate((0.0, 0.3, 3.0)):
        workdir = tmp_path / f"run {k}"
        both = [start(command(workdir, mode="train"))]
        time.sleep(delay)
        both.append(start(command(workdir, mode="train")))
        said = [process.communicate(timeout=300)[1] for process in both]
        assert [process.returncode for process in both] == [0, 0], said
        assert final_state.compare(finished, workdir) == []
        records = [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        assert records == sorted(records)
        assert len(set(records)) == 12
        assert list((workdir / ".lock").glob("*.json")) == []


def test_the_one_that_waits_goes_on_when_the_other_is_killed(finished, tmp_path):
    workdir = tmp_path / "run"
    first = start(command(workdir, mode="train"))
    for _ in range(600):
        if (workdir / "metrics.jsonl").exists():
            break
        assert first.poll() is None
        time.sleep(0.1)
    os.kill(first.pid, signal.SIGSTOP)  # so that it is still there when the second comes
    second = start(command(workdir, mode="train"))
    said = wait_until("waiting for process", second)
    assert f"waiting for process {first.pid} on " in said[-1]
    assert "--mode=train" in said[-1]
    first.kill()
    first.communicate()
    errors = second.communicate(timeout=300)[1]
    assert second.returncode == 0, errors
    assert final_state.compare(finished, workdir) == []


def test_another_config_is_refused_without_waiting(finished, tmp_path):
    workdir = shutil.copytree(finished, tmp_path / "run")
    other = holder(workdir)
    assert other.stdout.readline() == "held\n"
    done = run(workdir, seed=3)
    assert done.returncode == 1
    assert "seed: 0 there, 3 asked for" in done.stderr
    report = run(workdir, mode="report")  # reads alone, and may run beside
    assert report.returncode == 0, report.stderr
    other.communicate("", timeout=60)


def test_a_stop_ends_the_wait(finished, tmp_path):
    workdir = shutil.copytree(finished, tmp_path / "run")
    other = holder(workdir)
    assert other.stdout.readline() == "held\n"
    waiting = start(command(workdir, mode="evaluate"))
    wait_until("waiting for process", waiting)
    waiting.send_signal(signal.SIGINT)
    errors = waiting.communicate(timeout=60)[1]
    assert waiting.returncode == 75, errors
    assert "nothing was begun while waiting" in errors
    other.communicate("", timeout=60)


def test_an_array_shares_and_training_does_not(tmp_path):
    first, second = holder(tmp_path, "shared"), holder(tmp_path, "shared")
    assert first.stdout.readline() == second.stdout.readline() == "held\n"
    alone = holder(tmp_path)
    wait_until("waiting for process", alone)
    first.communicate("", timeout=60)
    second.communicate("", timeout=60)
    assert alone.stdout.readline() == "held\n"
    third = holder(tmp_path, "shared")
    wait_until("waiting for process", third)
    alone.communicate("", timeout=60)
    assert third.stdout.readline() == "held\n"
    third.communicate("", timeout=60)
    assert list((tmp_path / ".lock").glob("*.json")) == []


def test_jobs_of_an_array_extract_at_the_same_time(finished, tmp_path):
    workdir = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(workdir / "latents")
    array = {"mode": "extract", "extract__shards": 2, "extract__signals_per_file": 40}
    jobs = [start(command(workdir, extract__shard=i, **array)) for i in range(2)]
    said = [job.communicate(timeout=300)[1] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], said
    assert not any("waiting for" in one for one in said)
    assert (workdir / "latents" / "README.md").exists()


def test_a_lock_of_another_machine_counts_while_it_is_renewed(tmp_path):
    write_holder(tmp_path, age=0)
    one = holder(tmp_path)
    said = wait_until("waiting for process", one)
    assert "waiting for process 4711 on node7 (train, since 9:00)" in said[-1]
    write_holder(tmp_path, age=lock.STALE_SECONDS + 30)
    assert one.stdout.readline() == "held\n"
    assert (
        "process 4711 on node7 (train, since 9:00) is gone without a word; its lock is taken over"
        in (one.communicate("", timeout=60)[1])
    )
    assert list((tmp_path / ".lock").glob("*.json")) == []


def test_a_holder_whose_lock_was_taken_over_ends(tmp_path):
    one = holder(tmp_path)
    assert one.stdout.readline() == "held\n"
    for file in (tmp_path / ".lock").glob("*.json"):
        file.unlink()
    errors = wait_until("was taken over", one)
    assert one.wait(timeout=60) == 1
    assert "run the same command again" in errors[-1]
    one.communicate()


@pytest.mark.parametrize("age", [0, lock.STALE_SECONDS + 30])
def test_without_locks_of_the_system_the_files_decide(tmp_path, monkeypatch, age):
    """As on some file systems of clusters."""

    def no_locks(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(lock.fcntl, "flock", no_locks)
    write_holder(tmp_path, age=age, machine=lock._machine())
    stop = StopRequest()
    if age:
        with lock.held(tmp_path, "train", shared=False, stop=stop):
            assert len(list((tmp_path / ".lock").glob("*.json"))) == 1
    else:
        stop.signal = signal.SIGINT
        with (
            pytest.raises(Interrupted, match="waiting for process 4711 on node7"),
            lock.held(tmp_path, "train", shared=False, stop=stop),
        ):
            pass


# A library's thread that never ends; the interpreter would wait for it.
THREAD = "import threading, time; threading.Thread(target=time.sleep, args=(100_000,)).start()\n"


def launched_after(code, words):
    """The launcher in an interpreter that has run some code before."""
    launch = "import runpy; runpy.run_module('experiments.main', run_name='__main__', alter_sys=True)"
    assert words[1:3] == ["-m", "experiments.main"]
    return start([words[0], "-c", code + launch, *words[3:]])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"inner__step_size": 1e30, "inner__learned_step_size": "none"}, "the loss or its gradient is not finite"),
        ({"data__size": 1}, "data.size must be 8 to 256"),
    ],
)
def test_a_process_ends_after_an_error_whatever_threads_do(tmp_path, overrides, message):
    process = launched_after(THREAD, command(tmp_path / "run", mode="train", **overrides))
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 1
    assert message in errors.strip().splitlines()[-1]


def test_a_fault_of_the_program_ends_it_too(tmp_path):
    """An exception that no one expects: the traceback, and the end."""
    broken = (
        "from experiments.stages import train\ndef broken(*_): raise RuntimeError('a fault')\ntrain.train = broken\n"
    )
    process = launched_after(THREAD + broken, command(tmp_path / "run", mode="train"))
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 1
    assert "RuntimeError: a fault" in errors
