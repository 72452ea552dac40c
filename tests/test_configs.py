"""Every config builds settings that its source accepts, and trains a step when shrunk."""

import dataclasses
import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import medfuncta_jax as mf
from medfuncta_jax import meta_step
from medfuncta_jax.datasets import SOURCES
from medfuncta_jax.settings import dataclass_from_dict

CONFIGS = sorted(
    path.stem for path in (Path(__file__).parents[1] / "configs").glob("*.py") if path.stem not in ("__init__", "base")
)


@pytest.mark.parametrize("name", CONFIGS)
def test_config_trains_when_shrunk(name):
    module = importlib.import_module(f"configs.{name}")
    assert "Command:" in module.__doc__
    assert "Result:" in module.__doc__
    settings = mf.Settings.from_dict(module.get_config().to_dict())
    options = importlib.import_module(SOURCES[settings.data.source]).Options
    options = dataclass_from_dict(options, dict(settings.data.options), "data")
    coord_dims = len(getattr(options, "grid", (1, 1)))

    model = dataclasses.replace(settings.model, layers=min(4, settings.model.layers), width=16, latent_dim=8)
    inner = dataclasses.replace(settings.inner, steps=2)
    settings = dataclasses.replace(settings, model=model, inner=inner)
    field = mf.Field(model, coord_dims, 1)
    coords = jnp.asarray(mf.grid((6,) * coord_dims), jnp.float32)
    signals = np.random.default_rng(0).uniform(size=(2, len(coords), 1)).astype(np.float32)
    state = meta_step.init_state(field, settings, jax.random.key(0))
    state, metrics = jax.jit(meta_step.make_update(field, settings, coords))(state, signals, jax.random.key(1))
    assert np.isfinite(metrics["loss"])
    assert int(state.step) == 1


def test_paper_settings():
    """Table 2 of the paper, as far as its configs are here."""
    chest, brain = (
        mf.Settings.from_dict(importlib.import_module(f"configs.{name}").get_config().to_dict())
        for name in ("chest_xray", "brain_mri")
    )
    for settings, batch, omega_last, latent in ((chest, 24, 400.0, 2048), (brain, 4, 300.0, 8192)):
        assert (settings.model.layers, settings.model.width, settings.model.latent_dim) == (15, 256, latent)
        assert (settings.model.omega_first, settings.model.omega_last) == (20.0, omega_last)
        assert (settings.inner.steps, settings.inner.step_size, settings.inner.selection_ratio) == (10, 1e-2, 0.25)
        assert (settings.train.batch_size, settings.train.learning_rate, settings.train.steps) == (batch, 3e-6, 250_000)
        assert settings.fit.steps == 20
