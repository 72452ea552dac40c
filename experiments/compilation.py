"""Compiled programs are kept between runs, so that the second start of a run does not wait for the compiler."""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path

import jax


def keep_compiled(cache: Path) -> None:
    """Keep all that is compiled below `cache`, unless JAX has been told another place.

    The many small programs of a start take as long together as the large one.

    Code for a CPU fits that kind of CPU alone, so each kind has a folder; homes are shared by the nodes of a cluster.
    A folder that cannot be written costs a recompilation, nothing else.
    """
    if getattr(jax.config, "jax_compilation_cache_dir", None) or "JAX_ENABLE_COMPILATION_CACHE" in os.environ:
        return
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = [platform.processor()]
    kind = "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
    folder = cache / "compiled" / f"{platform.machine()}-{hashlib.sha256(kind.encode()).hexdigest()[:8]}"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
