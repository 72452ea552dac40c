"""The one place that makes meshes and shardings: signals split over a data axis, parameters everywhere.

With several processes (`jax.distributed`) the mesh has the devices of all; each process holds the same whole batch on
the host and puts the part of its own devices there.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from medfuncta_jax.settings import SettingsError


def data_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh with one axis, "data", over `devices` (all of all processes by default)."""
    devices = jax.devices() if devices is None else devices
    return Mesh(np.asarray(devices), ("data",), axis_types=(AxisType.Auto,))


def replicate(mesh: Mesh, tree: Any) -> Any:
    """A copy of every leaf on every device of the mesh."""
    return _put(tree, NamedSharding(mesh, PartitionSpec()))


def split_batch(mesh: Mesh, batch: Any) -> Any:
    """Every leaf [B, ...] split along B over the devices; B must be a multiple of their number."""
    return _put(batch, split_over(mesh))


def split_over(mesh: Mesh) -> NamedSharding:
    """The sharding of `split_batch`."""
    return NamedSharding(mesh, PartitionSpec("data"))


def _put(tree: Any, sharding: NamedSharding) -> Any:
    if not sharding.mesh.is_multi_process:
        return jax.device_put(tree, sharding)

    def put(leaf):  # jax.device_put does not reach other processes' devices
        if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
            return leaf
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(put(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf))
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(put, tree)


def to_host(array: jax.Array) -> np.ndarray:
    """The whole of an array, also where parts of it lie with other processes, all of which must call this."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def check_batch_size(mesh: Mesh, batch_size: int, name: str) -> None:
    """Raise SettingsError, naming the setting, where `batch_size` cannot be split over the mesh."""
    if batch_size % mesh.size:
        better = max(mesh.size, round(batch_size / mesh.size) * mesh.size)
        raise SettingsError(f"{name} = {batch_size} cannot be split over {mesh.size} devices; try {better}")
