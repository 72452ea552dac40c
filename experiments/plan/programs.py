"""The programs of a run, compiled for a GPU that is not here."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from experiments.plan import roofline
from experiments.plan.targets import Target
from experiments.runtime.memory import program_bytes
from experiments.runtime.run_directory import RunError
from medfuncta_jax import fit_latent, grid
from medfuncta_jax.chunks import default_chunk
from medfuncta_jax.field import Field
from medfuncta_jax.meta_step import Training
from medfuncta_jax.methods import METHODS
from medfuncta_jax.settings import Settings

# The part of a GPU's memory that JAX allocates for arrays by default.
USABLE = 0.75


class Predicted(NamedTuple):
    """Memory and time of a compiled program.

    Attributes:
      resident: bytes of arguments and results, mostly parameters and their optimizer.
      temporary: bytes of all intermediate arrays.
      seconds: time of one run.
      text: the compiled program.
    """

    resident: float
    temporary: float
    seconds: float
    text: str

    @property
    def bytes(self) -> float:
        """All device memory of the program."""
        return self.resident + self.temporary


def compile_for(target: Target, function: Any, *arguments: Any) -> jax.stages.Compiled:
    """Compiles a function for one GPU, which need not be here.

    Products keep the kernels that the compiler chooses without timing, because timing needs the GPU.

    Args:
      function: plain or jitted.
      arguments: trees of arrays or `jax.ShapeDtypeStruct`.
    Raises:
      RunError: JAX has no CUDA plugin here.
    """
    try:
        described = topologies.get_topology_desc(
            "", platform="cuda", topology="1x1x1", target_config=target.description()
        )
    except Exception as error:  # the type depends on what is absent
        raise RunError(
            "planning needs JAX's CUDA plugin, which compiles without a GPU: pip install 'medfuncta_jax[plan]' "
            f"({str(error).splitlines()[0][:120]})"
        ) from error
    place = SingleDeviceSharding(described.devices[0])
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype, sharding=place), arguments)
    jitted = function if hasattr(function, "trace") else jax.jit(function)
    options = {"xla_gpu_autotune_level": "0"}
    return jitted.trace(*like).lower(lowering_platforms=("cuda",)).compile(compiler_options=options)


def predict(program: jax.stages.Compiled, target: Target) -> Predicted:
    """Memory and time of a compiled program on its target."""
    text = program.as_text() or ""
    temporary = getattr(program.memory_analysis(), "temp_size_in_bytes", 0)
    resident = (program_bytes(program) or temporary) - temporary
    return Predicted(resident, temporary, roofline.cost(text, target)[0].seconds, text)


def update(target: Target, field: Field, settings: Settings, shape: tuple[int, ...]) -> Predicted:
    """A meta-update on signals of a grid, as the launcher runs it on one device."""
    batch, method = settings.train.batch_size, METHODS[settings.train.method]
    state = jax.eval_shape(lambda key: method.init(field, settings, key, signals=batch), jax.random.key(0))
    step = jax.jit(functools.partial(method.update, Training(field, settings, shape)), donate_argnums=0)
    signals = jax.ShapeDtypeStruct((batch, math.prod(shape), field.channels), jnp.float32)
    rows = jax.ShapeDtypeStruct((batch,), jnp.int32)
    return predict(compile_for(target, step, state, signals, jax.random.key(0), rows), target)


def fit(target: Target, field: Field, settings: Settings, shape: tuple[int, ...]) -> Predicted:
    """A fit of `fit.batch_size` signals of a grid, on every point."""
    batch, coords = settings.fit.batch_size, jnp.asarray(grid(shape), jnp.float32)
    chunk = default_chunk(field, batch, shared=True, accelerator=True)
    params = jax.eval_shape(lambda key: field.init(key), jax.random.key(0))

    def latents(params, signals):
        return fit_latent(
            field, params, signals, coords=coords, steps=settings.fit.steps, safeguard=settings.fit.safeguard,
            points_per_chunk=chunk,
        ).latents  # fmt: skip

    signals = jax.ShapeDtypeStruct((batch, len(coords), field.channels), jnp.float32)
    return predict(compile_for(target, latents, params, signals), target)
