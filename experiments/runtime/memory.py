"""Memory that a compiled program needs and memory that is free, compared before the first step."""

from __future__ import annotations

import contextlib
import ctypes
from pathlib import Path

import jax

from experiments.runtime.run_directory import RunError

REMEDY = (
    "lower train.micro_batch (1 is the least, and changes no result) or fit.batch_size, set inner.remat=steps, or give "
    "train.points_per_chunk, e.g. 4096"
)


def program_bytes(program: jax.stages.Compiled) -> int | None:
    """Bytes of arguments, results and temporaries on one device; None if the compiler does not report them."""
    analysis = program.memory_analysis()
    if analysis is None:
        return None
    return int(
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes
        + analysis.temp_size_in_bytes
    )


def free_bytes() -> int | None:
    """Bytes free to this process on its first device: a GPU's share, or the host's memory; None if unknown."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"]) - int(stats.get("bytes_in_use", 0))
    return host_free_bytes()


def host_free_bytes() -> int | None:
    """Bytes of the host's memory free to this process; None if unknown."""
    amounts = []
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        amounts.append(int(lines["MemAvailable"].split()[0]) * 1024)
    except (OSError, KeyError, ValueError):
        pass
    try:  # the limit of a Slurm job
        group = Path("/sys/fs/cgroup") / Path("/proc/self/cgroup").read_text().strip().rpartition("::/")[2]
        most, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        amounts.append(int(most) - int(used))  # "max" is no number
    except (OSError, ValueError):
        pass
    return min(amounts, default=None)


def check_memory(program: jax.stages.Compiled, what: str) -> str:
    """A line with the memory that `program` needs.

    Raises:
      RunError: more than there is, with the settings to change.
    """
    needed, free = program_bytes(program), free_bytes()
    if needed is None:
        return f"{what} needs an amount of memory that this backend does not tell"
    if free is not None and needed > free:
        raise RunError(f"{what} needs {needed / 1e9:.2g} GB, and {free / 1e9:.2g} GB are free; {REMEDY}")
    return f"{what} needs {needed / 1e9:.2g} GB" + ("" if free is None else f" of {free / 1e9:.2g} GB free")


def return_freed() -> None:
    """Return memory freed by the compiler to the system; glibc would keep about 0.3 GB."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
