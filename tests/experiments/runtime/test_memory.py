import ctypes
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from experiments.runtime import memory
from experiments.runtime.run_directory import RunError


def compiled(size):
    shape = jax.ShapeDtypeStruct((size,), jnp.float32)
    return jax.jit(lambda x: jnp.sort(x).cumsum()).lower(shape).compile()


def test_a_program_needs_at_least_its_arguments_and_results():
    assert memory.program_bytes(compiled(1000)) >= 8000


def test_there_is_memory_here():
    assert memory.free_bytes() > 1e8


def test_a_program_that_does_not_fit_is_refused_with_the_settings_to_change(monkeypatch):
    program = compiled(1000)
    assert "an update needs" in memory.check_memory(program, "an update")
    monkeypatch.setattr(memory, "free_bytes", lambda: 5000)
    with pytest.raises(RunError, match=r"an update needs .* are free; lower train\.micro_batch"):
        memory.check_memory(program, "an update")
    monkeypatch.setattr(memory, "free_bytes", lambda: None)
    assert "an update needs" in memory.check_memory(program, "an update")


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="this C library keeps nothing")
def test_what_was_freed_goes_back_to_the_system():
    def resident():  # in pages
        return int(Path("/proc/self/statm").read_text().split()[1])

    library = ctypes.CDLL(None)
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    library.free.argtypes = [ctypes.c_void_p]
    size, count = 1 << 16, 1024  # below what malloc gets pages of its own for, 64 MiB in all
    blocks = [library.malloc(size) for _ in range(count)]
    for block in blocks:
        ctypes.memset(block, 1, size)
    full = resident()
    for block in blocks[:-1]:  # the last one keeps the heap from shrinking by itself
        library.free(block)
    memory.return_freed()
    assert (full - resident()) * 4096 > size * count / 2
    library.free(blocks[-1])
