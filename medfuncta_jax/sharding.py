"""The one place that makes meshes and shardings: signals split over a data axis, parameters everywhere."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from medfuncta_jax.settings import SettingsError


def data_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh with one axis, "data", over `devices` (all local ones by default)."""
    devices = jax.local_devices() if devices is None else devices
    return Mesh(np.asarray(devices), ("data",), axis_types=(AxisType.Auto,))


def replicate(mesh: Mesh, tree: Any) -> Any:
    """A copy of every leaf on every device of the mesh."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def split_batch(mesh: Mesh, batch: Any) -> Any:
    """Every leaf [B, ...] split along B over the devices; B must be a multiple of their number."""
    return jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))


def check_batch_size(mesh: Mesh, batch_size: int, name: str) -> None:
    """Raise SettingsError, naming the setting, where `batch_size` cannot be split over the mesh."""
    if batch_size % mesh.size:
        better = max(mesh.size, round(batch_size / mesh.size) * mesh.size)
        raise SettingsError(f"{name} = {batch_size} cannot be split over {mesh.size} devices; try {better}")
