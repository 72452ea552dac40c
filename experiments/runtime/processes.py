"""Several processes, on one machine or many, as one run.

Slurm's processes are detected (`srun` with several tasks); --coordinator, --processes and --process name others. All
processes train one batch together; each fits its own files of latents; the first alone writes shared files.
"""

from __future__ import annotations

import os
import platform
import sys
import zlib
from collections.abc import Mapping
from typing import NoReturn

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

# Seconds until a missing process is noticed, which ends the others.
_HEARTBEAT_SECONDS = 20


class ProcessesError(ValueError):
    """The processes of a run cannot be connected; the message names the flag."""


def join(slurm: bool, coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Connect the processes of this run, if there are several.

    Args:
      slurm: the tasks of one Slurm step are one run; else each is on its own.
      coordinator: HOST:PORT of the first process; None if Slurm provides it.
      processes: number of processes.
      process: number of this process, from 0.
    Raises:
      ProcessesError: one of the three is missing or out of range, the others did not come, or the GPUs of this node
        cannot be shared by its processes.
    """
    given = [coordinator is not None, processes is not None, process is not None]
    by_slurm = slurm and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1
    if any(given) and not all(given):
        raise ProcessesError("--coordinator, --processes and --process belong together; give all three")
    if processes is not None and process is not None and not 0 <= process < processes:
        raise ProcessesError(f"--process must be 0 to {processes - 1} (--processes less one), got {process}")
    if not any(given) and not by_slurm:
        return
    # The run itself handles SIGTERM and saves its state (interruption.py).
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator, processes, process, local_device_ids=own_devices(os.environ),
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS, shutdown_timeout_seconds=2 * _HEARTBEAT_SECONDS,
        )  # fmt: skip
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ProcessesError(
            f"the processes of this run did not find each other ({reason}); see --coordinator"
        ) from error


def own_devices(environment: Mapping[str, str]) -> list[int]:
    """The GPUs of this process among its visible ones, by JAX's numbers; an empty list means all.

    Under Slurm, JAX would take the one GPU whose number is that of the task on its node. This is right only if each
    task has one GPU and sees those of the others.

    Args:
      environment: the process's environment variables.
    Raises:
      ProcessesError: several tasks of a node see GPUs that cannot be shared evenly.
    """
    tasks = _tasks_on_node(environment)
    seen = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    on_node = int(environment.get("SLURM_GPUS_ON_NODE", len(seen)))
    if tasks == 1 or len(seen) == 1 or len(seen) < on_node or "SLURM_GPUS_PER_TASK" in environment:
        return []  # all visible GPUs: the process is alone, or Slurm has bound each task to its own
    local = int(environment.get("SLURM_LOCALID", 0))
    if not seen:
        return [local]  # the number of GPUs is unknown
    if len(seen) % tasks:
        raise ProcessesError(
            f"{tasks} tasks on this node cannot share its {len(seen)} GPUs evenly; set --ntasks-per-node to 1 or "
            f"{len(seen)}"
        )
    share = len(seen) // tasks
    return list(range(local * share, (local + 1) * share))


def _tasks_on_node(environment: Mapping[str, str]) -> int:
    """Slurm's tasks of this step on this node; it writes "2(x3),1" for 2, 2, 2 and 1 on four nodes."""
    counts: list[int] = []
    for part in environment.get("SLURM_STEP_TASKS_PER_NODE", "1").split(","):
        tasks, _, nodes = part.rstrip(")").partition("(x")
        counts += [int(tasks)] * int(nodes or 1)
    node = int(environment.get("SLURM_NODEID", 0))
    return counts[node] if node < len(counts) else counts[0]


def devices() -> str:
    """Numbers of devices, processes and nodes of this run, in words; a collective call."""
    text = f"{jax.device_count()} {jax.default_backend()} device(s)"
    if jax.process_count() == 1:
        return text
    names = _from_all(np.uint32(zlib.crc32(platform.node().encode())))
    return f"{text} of {jax.process_count()} processes on {len(np.unique(names))} node(s)"


def first() -> bool:
    """Whether this process writes the shared files."""
    return jax.process_index() == 0


def agreed(flag: bool) -> bool:
    """Whether `flag` holds in any process; a collective call."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(_from_all(np.bool_(flag))))


def _from_all(value: np.generic) -> np.ndarray:
    """The values of all processes, [processes]; a collective call.

    It waits for all devices of this process. `multihost_utils.process_allgather` waits for the first alone: a process
    that ended then would leave another waiting for it in the collective of their other devices.
    """
    devices = np.asarray(jax.devices()).reshape(jax.process_count(), -1)
    mesh = Mesh(devices, ("process", "device"), axis_types=(AxisType.Auto,) * 2)
    rows = jax.make_array_from_process_local_data(
        NamedSharding(mesh, PartitionSpec("process")), np.asarray(value)[None], (len(devices),)
    )
    gathered = jax.jit(lambda rows: rows, out_shardings=NamedSharding(mesh, PartitionSpec()))(rows)
    return np.asarray(jax.block_until_ready(gathered))


def leave_after_error(code: int) -> NoReturn:
    """Exits hard in multi-process runs; a clean shutdown would deadlock on the barrier."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def wait_for_all(name: str) -> None:
    """Barrier of all processes; `name` identifies the place."""
    if jax.process_count() > 1:
        places = _from_all(np.uint32(zlib.crc32(name.encode())))
        if np.any(places != places[0]):
            raise RuntimeError(f"processes wait for each other at different places, this one at {name!r}")
