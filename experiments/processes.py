"""Several processes, on one machine or many, as one run.

Slurm's are found by themselves (`srun` with several tasks); others are named by --coordinator, --processes, --process.
All train one batch together; each fits its own files of latents; the first alone writes what is written once.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import jax
import numpy as np

# A process that is gone is noticed after this long, and ends the others.
_HEARTBEAT_SECONDS = 20


class ProcessesError(ValueError):
    """The processes of a run cannot be connected; the message names the flag."""


def join(slurm: bool, coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Connect the processes of this run, if there are several.

    Args:
      slurm: the tasks of one Slurm step are one run; else each is on its own.
      coordinator: HOST:PORT of the first process; None where Slurm says so.
      processes: how many.
      process: which one this is, from 0.
    Raises:
      ProcessesError: one of the three is missing or out of range, or the others did not come.
    """
    given = [coordinator is not None, processes is not None, process is not None]
    by_slurm = slurm and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1
    if any(given) and not all(given):
        raise ProcessesError("--coordinator, --processes and --process belong together; give all three")
    if processes is not None and process is not None and not 0 <= process < processes:
        raise ProcessesError(f"--process must be 0 to {processes - 1} (--processes less one), got {process}")
    if not any(given) and not by_slurm:
        return
    # SIGTERM is for us: the run saves and says so (interruption.py).
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator, processes, process,
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS, shutdown_timeout_seconds=2 * _HEARTBEAT_SECONDS,
        )  # fmt: skip
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ProcessesError(
            f"the processes of this run did not find each other ({reason}); see --coordinator"
        ) from error


def first() -> bool:
    """Whether this process writes what is written once."""
    return jax.process_index() == 0


def agreed(flag: bool) -> bool:
    """Whether any process says so; all must ask."""
    if jax.process_count() == 1:
        return flag
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def leave_after_error(code: int) -> NoReturn:
    """End this process now: an orderly end would wait for threads, and for processes that wait for this one."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def wait_for_all(name: str) -> None:
    """Go on once every process is here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)
