"""Commands in processes of their own that need not import everything anew: half of a small run is imports.

A server that has imported the libraries, and has not yet started JAX's backend, is forked for each command. What a
process has of its own stays so: arguments, environment, output, exit code, memory, limits. Tests of signals start a
new interpreter, as a user does.
"""

import multiprocessing
import os
import resource
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]

_FORKED = multiprocessing.get_context("forkserver")
_FORKED.set_forkserver_preload([
    "experiments.stages.train", "experiments.stages.extract", "experiments.stages.evaluate",
    "experiments.stages.report", "experiments.stages.curves", "experiments.stages.decode",
    "experiments.stages.compress", "experiments.tools.benchmark", "medfuncta_jax.datasets.prepared",
    "nibabel", "optax", "orbax.checkpoint", "scipy.stats",
])  # fmt: skip


def run_module(module, *words, largest_file_kb=None, timeout=300):
    """As `python -m MODULE WORDS` to its end; a limit on the size of files stands in for a full disk."""
    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder, "stdout"), Path(folder, "stderr")
        words = [str(word) for word in words]
        process = _FORKED.Process(
            target=_command, args=(module, words, dict(os.environ), str(output), str(errors), largest_file_kb)
        )
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired([module, *words], timeout, output.read_bytes(), errors.read_bytes())
        code = process.exitcode
        process.close()
        return subprocess.CompletedProcess([module, *words], code, output.read_text(), errors.read_text())


def _command(module, words, environment, output, errors, largest_file_kb):
    for path, number in ((output, 1), (errors, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    sys.argv = [module, *words]
    if largest_file_kb is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file_kb * 1024,) * 2)
    runpy.run_module(module, run_name="__main__", alter_sys=True)
