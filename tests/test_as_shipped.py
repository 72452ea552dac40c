"""`as_shipped.py` in a process without what this suite sets: float32, and programs optimised as they are for users."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_what_users_run(tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_", "PYTEST"))}
    file = Path(__file__).with_name("as_shipped.py")
    words = [
        "--noconftest",
        "--override-ini=addopts=",
        "--import-mode=importlib",
        "-q",
        f"--basetemp={tmp_path / 'of'}",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words, str(file)], cwd=file.parents[1], env=environment, check=False,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.fullmatch(r"\d+ passed in .*", done.stdout.splitlines()[-1]), done.stdout
