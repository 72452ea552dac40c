"""Compiled programs are kept between runs, so that the second start of a run does not wait for the compiler."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib
import logging
import os
import platform
import shutil
import zlib
from pathlib import Path

import jax

log = logging.getLogger("medfuncta")

# Processes at one time that keep programs; more of them compile their own.
_FOLDERS = 64


def keep_compiled(cache: Path) -> None:
    """Keep compiled programs below `cache`, unless JAX is configured with another place.

    The many small programs of a start take as long together as the large one.

    Code for a CPU fits that kind of CPU alone, so each kind has a folder; homes are shared by the nodes of a cluster.
    In it each process at work has a folder of its own, because JAX writes in place: another process would read, or
    write, what is half written. What the others have is copied at the start. A folder that cannot be written costs a
    recompilation, nothing else.
    """
    if getattr(jax.config, "jax_compilation_cache_dir", None) or "JAX_ENABLE_COMPILATION_CACHE" in os.environ:
        return
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = [platform.processor()]
    kind = "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
    folder = cache / "compiled" / f"{platform.machine()}-{hashlib.sha256(kind.encode()).hexdigest()[:8]}"
    with contextlib.suppress(OSError):
        own = _own_folder(folder)
        if own is not None:
            _copy_from_others(own)
            jax.config.update("jax_compilation_cache_dir", str(own))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def _own_folder(kind: Path) -> Path | None:
    """A folder of this process alone until it ends, cleared of what an earlier process left half written."""
    for number in range(_FOLDERS):
        own = kind / str(number)
        own.mkdir(parents=True, exist_ok=True)
        # Never closed: the lock ends with the process, however that ends.
        lock = os.open(own / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            continue
        since = os.stat(lock).st_mtime_ns  # when the process before this one began: older entries have been looked at
        damaged = [
            entry for entry in own.glob("*-cache") if entry.stat().st_mtime_ns >= since and not _whole(entry)
        ]  # fmt: skip
        for entry in damaged:
            entry.unlink()
        if damaged:
            log.info("removed %d half-written compiled program(s) from %s", len(damaged), own)
        os.utime(lock)
        return own
    return None


def _copy_from_others(own: Path) -> None:
    have = set(os.listdir(own))
    for other in own.parent.iterdir():
        for entry in other.glob("*-cache") if other != own else ():
            if entry.name not in have:
                copy = Path(shutil.copyfile(entry, own / entry.name))
                if not _whole(copy):  # its writer is at it, or was killed
                    copy.unlink()
                    continue
                have.add(entry.name)


def _whole(entry: Path) -> bool:
    """Whether an entry can be unpacked; JAX packs with zstd where it is installed, else with zlib."""
    packed = entry.read_bytes()
    try:
        if not packed.startswith(b"\x28\xb5\x2f\xfd"):
            zlib.decompress(packed)
            return True
        try:
            importlib.import_module("compression.zstd").decompress(packed)  # from Python 3.14 on
        except ModuleNotFoundError:
            importlib.import_module("zstandard").ZstdDecompressor().decompress(packed)
    except ModuleNotFoundError:
        return False  # nobody here can read it
    except Exception:  # each of the three has errors of its own
        return False
    return True
