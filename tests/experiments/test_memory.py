import jax
import jax.numpy as jnp
import pytest

from experiments import memory
from experiments.run_directory import RunError


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
