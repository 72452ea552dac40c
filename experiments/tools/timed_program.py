"""A meta-update or a fit of a benchmark's case, compiled and ready to run.

The command is one side of `benchmark --vs`: `python timed_program.py CHECKOUT CASE MODE BATCH OVERRIDES` prepares the
program with the code of a checkout, and runs it once for every input line.
"""

from __future__ import annotations

import functools
import importlib
import json
import math
import resource
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

if __name__ == "__main__":  # before the imports, so that they come from the checkout
    sys.path[0] = sys.argv[1]

import jax
import jax.numpy as jnp
import numpy as np

from medfuncta_jax import fit_latent, grid, meta_step, sharding
from medfuncta_jax.methods import METHODS


class TimedProgram(NamedTuple):
    """The result of `prepare`.

    Attributes:
      run: runs the program once and waits for its end; returns the losses.
      program: the compiled meta-update; None for a fit.
      field_params: the shared network, for its size.
      devices: number of devices.
      compile_s: seconds of compilation; for a fit, with its first run.
    """

    run: Callable[[], jax.Array]
    program: jax.stages.Compiled | None
    field_params: Any
    devices: int
    compile_s: float


def prepare(case: Any, settings: Any, *, mode: str) -> TimedProgram:
    """The program of a case's config in mode "train" or "fit", on random signals of the case's shape."""
    method = METHODS[settings.train.method]
    field = method.check(settings, case.grid, case.channels)
    coords = jnp.asarray(grid(case.grid), jnp.float32)
    batch = settings.train.batch_size if mode == "train" else settings.fit.batch_size
    signals = np.random.default_rng(0).uniform(size=(batch, len(coords), case.channels)).astype(np.float32)
    mesh = sharding.data_mesh(jax.devices()[: math.gcd(batch, jax.device_count())])
    if mode == "train":
        state = method.init(field, settings, jax.random.key(0), signals=batch)
        state = sharding.place(mesh, state, sharding.layout(field, state, mesh))
        training = meta_step.Training(field, settings, case.grid, mesh=mesh)
        update = jax.jit(functools.partial(method.update, training), donate_argnums=0)
        key = sharding.replicate(mesh, jax.random.key(1))
        signals, rows = sharding.split_batch(mesh, (signals, np.arange(batch, dtype=np.int32)))
        began = time.perf_counter()
        program = update.lower(state, signals, key, rows).compile()
        compile_s, params = time.perf_counter() - began, jax.eval_shape(lambda: state.trainable.field)

        def run():
            nonlocal state
            state, metrics = program(state, signals, key, rows)
            return jax.block_until_ready(metrics["loss"])

        return TimedProgram(run, program, params, mesh.size, compile_s)
    params, coords = sharding.replicate(mesh, (field.init(jax.random.key(0)), coords))
    signals = sharding.split_batch(mesh, signals)

    def fit():
        return jax.block_until_ready(fit_latent(field, params, signals, coords=coords, steps=settings.fit.steps).losses)

    began = time.perf_counter()
    fit()
    return TimedProgram(fit, None, params, mesh.size, time.perf_counter() - began)


def _serve(case: str, mode: str, batch: str, overrides: str) -> None:
    """Runs the program once for every input line; prints seconds, and peak GB of the host and the device."""
    benchmark = importlib.import_module("experiments.tools.benchmark")
    settings = benchmark.settings_of(benchmark.CASES[case], [word for word in overrides.split(",") if word], int(batch))
    run = prepare(benchmark.CASES[case], settings, mode=mode).run
    print(json.dumps("ready"), flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        run()
        seconds = time.perf_counter() - began
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        device = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / 1e9
        print(json.dumps([seconds, host, device]), flush=True)


if __name__ == "__main__":
    _serve(*sys.argv[2:])
