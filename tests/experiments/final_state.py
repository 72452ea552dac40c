"""Whether two runs ended alike: parameters, optimizer, learned step sizes and the exported field, bit for bit."""

import json
from pathlib import Path

import jax
import numpy as np

from medfuncta_jax import meta_step
from medfuncta_jax.checkpoint import FIELD_FILE, Checkpoints
from medfuncta_jax.field import Field
from medfuncta_jax.settings import Settings


def _final_state(workdir: Path):
    settings = Settings.from_saved(json.loads((workdir / "config.json").read_text()))
    like = meta_step.init(Field(settings.model, coord_dims=2, channels=1), settings, jax.random.key(0))
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        step = checkpoints.latest_step()
        if step != settings.train.steps:
            raise RuntimeError(f"{workdir} ended at step {step}, not {settings.train.steps}")
        return jax.device_get(checkpoints.restore(step, like)[0])


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
