"""A cache of compiled programs, so that the second start of a run does not wait for the compiler."""

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

# Maximum number of simultaneous processes with a cache; further processes compile their own programs.
_FOLDERS = 64


def keep_compiled(cache: Path) -> None:
    """Keep compiled programs below `cache`, unless JAX is configured with another place.

    The many small programs of a start together take as long as the large one.

    Code for a CPU fits only that kind of CPU, and cluster nodes share home folders, so each kind has a folder. Each
    running process has its own folder in it, because JAX writes in place: another process could read or write a partial
    entry. Entries of the other processes are copied at the start. A folder that cannot be written costs only a
    recompilation.
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
    """A folder for this process alone until it ends, without partial entries of an earlier process."""
    for number in range(_FOLDERS):
        own = kind / str(number)
        own.mkdir(parents=True, exist_ok=True)
        # Never closed: the lock ends with the process, in any way that the process ends.
        lock = os.open(own / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            continue
        since = os.stat(lock).st_mtime_ns  # start of the previous process: older entries have been checked
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
                if not _whole(copy):  # another process is writing it, or was killed
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
        return False  # no module here can read the entry
    except Exception:  # each of the three has its own errors
        return False
    return True
