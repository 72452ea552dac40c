"""The job scripts: their syntax, and that the launcher understands the commands they give."""

import os
import re
import subprocess
import sys

import pytest

from tests.experiments.conftest import ROOT

SCRIPTS = sorted((ROOT / "experiments" / "slurm").glob("*.sh"))


def test_there_is_a_script_for_each_way_to_run():
    assert [script.stem for script in SCRIPTS] == ["extract_array", "one_gpu", "one_node", "several_nodes"]


@pytest.mark.some(2)
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_the_launcher_takes_the_command_of_a_job_script(script, tmp_path):
    """With stand-ins for Slurm's commands; without a data folder the launcher gets as far as to say so."""
    for name, body in (
        ("srun", 'echo "$SRUN_CPUS_PER_TASK cores a task"; while [[ $1 == --* ]]; do shift; done; exec "$@"'),
        ("scontrol", 'echo "scontrol $*"'),
        ("python", f'exec {sys.executable} "$@"'),
    ):
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "3",
        "SLURM_CPUS_PER_TASK": "5",
        "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_ID": "3",
    }  # fmt: skip
    words = ["configs/ecg.py", str(tmp_path / "run"), str(tmp_path / "no data"), "--config.train.batch_size=32"]
    done = subprocess.run([str(script), *words], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: "), done.stderr
    assert "no data" in done.stderr
    assert "scontrol" not in done.stdout
    assert done.stdout.startswith("5 cores a task\n")
    (gpus,) = set(re.findall(r"gpu:(\d+) --gpus-per-node=(\d+)", script.read_text()))
    assert gpus[0] == gpus[1]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_job_that_was_stopped_asks_to_be_queued_again(script, tmp_path):
    for name, body in (("srun", "exit 75"), ("scontrol", 'echo "scontrol $*"')):
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    done = subprocess.run([str(script), "a", "b", "c"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "scontrol requeue 7"
