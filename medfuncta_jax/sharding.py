"""Meshes and shardings: signals are split over all devices, and every device holds the parameters.

At large latents the modulation weights [P, L], and Adam's moments of them, are most of what a device holds. They can be
split along P over a second axis of the mesh, "model": consecutive devices, best of one node, then hold a part each. An
update gathers all parts, computes the gradients of each device's own signals, and leaves each device the mean gradient
of its part (ZeRO, Rajbhandari et al. 2020), so no product is computed twice.

With several processes (`jax.distributed`) the mesh has the devices of all; each process holds the same whole batch on
the host and puts the part of its own devices there.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from medfuncta_jax.field import Field
from medfuncta_jax.settings import SettingsError
from medfuncta_jax.training_state import Trainable

# Replicated on every device; and an array [P, ...] split over "model".
WHOLE, SPLIT = PartitionSpec(), PartitionSpec("model")
# Signals [B, ...], split over all devices.
SIGNALS = PartitionSpec(("data", "model"))


def data_mesh(devices: list[jax.Device] | None = None, *, modulation_shards: int = 1) -> Mesh:
    """A mesh of `devices` (all of all processes by default) with the axes "data" and "model".

    Args:
      devices: n devices.
      modulation_shards: the length of "model", a divisor of n.
    Raises:
      SettingsError: `modulation_shards` does not divide n.
    """
    devices = jax.devices() if devices is None else devices
    if len(devices) % modulation_shards:
        raise SettingsError(
            f"train.modulation_shards = {modulation_shards} does not divide the {len(devices)} devices; try "
            f"{math.gcd(modulation_shards, len(devices))}"
        )
    grid = np.asarray(devices).reshape(-1, modulation_shards)
    return Mesh(grid, ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def layout(field: Field, tree: Any, mesh: Mesh) -> Any:
    """The layout of a state, or a part of one, on the devices of `mesh`: a `PartitionSpec` for every array.

    The weights [P, ...] of `Field.latent_layers` are split over "model", in everything of the form of `Trainable`: the
    parameters, their gradient, the optimizer's moments.
    """

    def of(part: Any) -> Any:
        specs = jax.tree.map(lambda _: WHOLE, part)
        if isinstance(part, Trainable) and mesh.shape["model"] > 1:
            for name in field.latent_layers():  # mapped, because optax masks parts of the tree
                specs.field[name]["kernel"] = jax.tree.map(lambda _: SPLIT, part.field[name]["kernel"])
        return specs

    return jax.tree.map(of, tree, is_leaf=lambda part: isinstance(part, Trainable))


def replicate(mesh: Mesh, tree: Any) -> Any:
    """A copy of every leaf on every device of the mesh."""
    return place(mesh, tree, jax.tree.map(lambda _: WHOLE, tree))


def place(mesh: Mesh, tree: Any, specs: Any) -> Any:
    """Every leaf on the devices of the mesh, by its `PartitionSpec` in `specs`."""
    return jax.tree.map(lambda leaf, spec: _put(leaf, NamedSharding(mesh, spec)), tree, specs)


def constrain(mesh: Mesh, tree: Any, specs: Any) -> Any:
    """`place` within a compiled function."""
    return jax.tree.map(
        lambda leaf, spec: jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, spec)), tree, specs
    )


def gathered(mesh: Mesh | None, tree: Any) -> Any:
    """Every leaf in full on every device, within a compiled function; the tree itself where there is no mesh."""
    return tree if mesh is None else constrain(mesh, tree, jax.tree.map(lambda _: WHOLE, tree))


def split_batch(mesh: Mesh, batch: Any) -> Any:
    """Every leaf [B, ...] split along B over the devices; B must be a multiple of their number."""
    return place(mesh, batch, jax.tree.map(lambda _: SIGNALS, batch))


def split_over(mesh: Mesh) -> NamedSharding:
    """The sharding of `split_batch`."""
    return NamedSharding(mesh, SIGNALS)


def gather(tree: Any, specs: Any) -> Any:
    """Every leaf in full, gathered from the parts that `specs` gives to devices; within `jax.shard_map`."""
    return jax.tree.map(
        lambda leaf, spec: jax.lax.all_gather(leaf, "model", tiled=True) if spec == SPLIT else leaf, tree, specs
    )


def mean_over_devices(tree: Any, specs: Any) -> Any:
    """The mean over all devices of leaves that each device has in full, split as in `specs`; within `jax.shard_map`.

    A leaf that is split is summed over "model" first, so that each device passes on its own part alone.
    """

    def mean(leaf: jax.Array, spec: PartitionSpec) -> jax.Array:
        if spec != SPLIT:
            return jax.lax.pmean(leaf, ("data", "model"))
        own = jax.lax.psum_scatter(leaf, "model", tiled=True)
        return jax.lax.pmean(own, "data") / jax.lax.axis_size("model")

    return jax.tree.map(mean, tree, specs)


def _put(tree: Any, sharding: NamedSharding) -> Any:
    if not sharding.mesh.is_multi_process:
        return jax.device_put(tree, sharding)

    def put(leaf):  # jax.device_put does not reach other processes' devices
        if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
            return leaf
        if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            return jax.jit(lambda array: array, out_shardings=sharding)(leaf)  # other processes hold parts of it
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(put(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf))
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(put, tree)


def to_host(array: jax.Array) -> np.ndarray:
    """An array in full, also if other processes hold parts of it; all processes must call this."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def check_batch_size(mesh: Mesh, batch_size: int, name: str) -> None:
    """Raise SettingsError, naming the setting, where `batch_size` cannot be split over the mesh."""
    if batch_size % mesh.size:
        better = max(mesh.size, round(batch_size / mesh.size) * mesh.size)
        raise SettingsError(f"{name} = {batch_size} cannot be split over {mesh.size} devices; try {better}")
