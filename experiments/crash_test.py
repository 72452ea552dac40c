"""Kill a training run with `kill -9` at random moments, restart it until it ends, and compare with one left alone.

    python -m experiments.crash_test --workdir=/tmp/crash --kills=20

Both runs train the quickstart's data with a small field. The final state (parameters, optimizer, learned step sizes)
and the exported field must be equal bit for bit; the exit code is 0 only then.
"""

from __future__ import annotations

import json
import logging
import random
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
from absl import app, flags

from medfuncta_jax import meta_step
from medfuncta_jax.checkpoint import FIELD_FILE, Checkpoints
from medfuncta_jax.field import Field
from medfuncta_jax.settings import Settings

# Small, so that the time goes into starting, saving and being killed; checkpoints often, validations now and then.
_OVERRIDES = {
    "model.width": 32, "model.latent_dim": 16, "train.batch_size": 8, "train.eval_every": 100, "train.eval_signals": 16,
    "train.checkpoint_every": 10, "train.log_every": 10,
}  # fmt: skip


def _command(workdir: Path, steps: int) -> list[str]:
    overrides = [f"--config.{name}={value}" for name, value in {**_OVERRIDES, "train.steps": steps}.items()]
    base = [sys.executable, "-m", "experiments.main", "--config=configs/quickstart.py", "--mode=train"]
    return [*base, f"--workdir={workdir}", *overrides]


def _final_state(workdir: Path):
    settings = Settings.from_dict(json.loads((workdir / "config.json").read_text()))
    like = meta_step.init_state(Field(settings.model, coord_dims=2, channels=1), settings, jax.random.key(0))
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        step = checkpoints.latest_step()
        if step != settings.train.steps:
            raise RuntimeError(f"{workdir} ended at step {step}, not {settings.train.steps}")
        return jax.device_get(checkpoints.restore(step, like)[0])


def run_killed(workdir: Path, *, kills: int, steps: int, seed: int, longest: float) -> int:
    """Start, kill, start again, at last let it finish; returns how many kills hit a running process.

    Moments are drawn over as long as the longest one, so that kills fall into start-up, compilation, updates,
    validation and saving alike.
    """
    moments, hits = random.Random(seed), 0
    log = (workdir.parent / f"{workdir.name}.log").open("a")
    for kill in range(kills):
        wait = moments.uniform(0.5, longest)
        process = subprocess.Popen(_command(workdir, steps), stdout=log, stderr=log)
        try:
            process.wait(timeout=wait)
            if process.returncode != 0:
                raise RuntimeError(f"restart {kill} ended with code {process.returncode}, see {log.name}")
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            hits += 1
        saved = sorted(int(folder.name) for folder in (workdir / "checkpoints").glob("[0-9]*") if folder.name.isdigit())
        print(f"kill {kill + 1} of {kills} after {wait:.1f} s, checkpoints {saved}", flush=True)
    subprocess.run(_command(workdir, steps), stdout=log, stderr=log, check=True)
    return hits


def compare(one: Path, other: Path) -> list[str]:
    """What differs between the final states and exported fields of two runs; empty where they are equal."""
    states = [jax.tree_util.tree_leaves_with_path(_final_state(workdir)) for workdir in (one, other)]
    differing = [
        jax.tree_util.keystr(path)
        for (path, a), (_, b) in zip(*states, strict=True)
        if a.dtype != b.dtype or not np.array_equal(a, b, equal_nan=True)
    ]
    if (one / FIELD_FILE).read_bytes() != (other / FIELD_FILE).read_bytes():
        differing.append(FIELD_FILE)
    return differing


def define_flags() -> None:
    """The command's flags; not at import, so that tests may import this beside other commands."""
    flags.DEFINE_string("workdir", None, "Folder for the two runs; must be new.", required=True)
    flags.DEFINE_integer("kills", 20, "How often the run is killed.", lower_bound=1)
    flags.DEFINE_integer("steps", 1500, "Meta-updates of each run.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Seed of the moments.")


def main(argv: list[str]) -> None:
    """Flags in, verdict out."""
    del argv
    options = flags.FLAGS
    logging.getLogger().setLevel(logging.WARNING)  # app.run lets every library's INFO through
    logging.getLogger("absl").setLevel(logging.WARNING)
    workdir = Path(options.workdir).absolute()
    if workdir.exists() and any(workdir.iterdir()):
        raise app.UsageError(f"--workdir={workdir} is not empty")
    workdir.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with (workdir / "whole.log").open("w") as log:
        subprocess.run(_command(workdir / "whole", options.steps), stdout=log, stderr=log, check=True)
    whole = time.monotonic() - began
    print(f"uninterrupted: {options.steps} steps in {whole:.0f} s", flush=True)
    hits = run_killed(
        workdir / "killed", kills=options.kills, steps=options.steps, seed=options.seed, longest=0.4 * whole
    )  # fmt: skip
    differing = compare(workdir / "whole", workdir / "killed")
    print(f"{hits} kills hit a running process; " + (f"DIFFERENT: {differing}" if differing else "equal bit for bit"))
    sys.exit(1 if differing else 0)


if __name__ == "__main__":
    define_flags()
    app.run(main)
