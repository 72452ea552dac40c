"""Every config builds settings that its source accepts, and trains a step when shrunk."""

import dataclasses
import functools
import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import medfuncta_jax as mf
from medfuncta_jax import meta_step
from medfuncta_jax.datasets import source_options
from medfuncta_jax.settings import DataSettings, dataclass_from_dict

CONFIGS = sorted(
    path.stem for path in (Path(__file__).parents[1] / "configs").glob("*.py") if path.stem not in ("__init__", "base")
)


VARIANTS = {
    **dict.fromkeys(
        ("chest_xray", "pneumonia_xray", "retinal_oct", "fundus", "dermatoscope"), ("", "28", "128", "cpu")
    ),
    **dict.fromkeys(("colon_histopathology", "cell_microscopy"), ("", "224", "cpu")),
    **dict.fromkeys(("ecg", "lung_ct"), ("", "cpu")),
    "brain_mri": ("", "cpu", "folder", "folder_cpu"),
}


def get_config(name, variant=""):
    module = importlib.import_module(f"configs.{name}")
    assert "Command:" in module.__doc__
    assert "Hardware:" in module.__doc__
    assert "Result:" in module.__doc__
    return mf.Settings.from_dict((module.get_config(variant) if name in VARIANTS else module.get_config()).to_dict())


@pytest.mark.parametrize(("name", "variant"), [(name, v) for name in CONFIGS for v in VARIANTS.get(name, ("",))])
def test_config_trains_when_shrunk(name, variant):
    settings = get_config(name, variant)
    options = dataclass_from_dict(source_options(settings.data.source), dict(settings.data.options), "data")
    coord_dims = {"ecg": 1, "brats": 3, "lung_ct": 3, "nifti_folder": 3}.get(settings.data.source, 2)
    if coord_dims == 2:
        assert options.size == int(variant) if variant.isdigit() else True

    model = dataclasses.replace(settings.model, layers=min(4, settings.model.layers), width=16, latent_dim=8)
    inner = dataclasses.replace(settings.inner, steps=2, selection_ratio=max(0.25, settings.inner.selection_ratio))
    train = dataclasses.replace(settings.train, batch_size=2)
    loss, step = train_one_step(model, inner, train, coord_dims)
    assert np.isfinite(loss)
    assert step == 1


@functools.lru_cache
def train_one_step(model, inner, train, coord_dims):
    settings = mf.Settings(DataSettings("any"), model=model, inner=inner, train=train)
    field = mf.Field(model, coord_dims, 1)
    coords = jnp.asarray(mf.grid((6,) * coord_dims), jnp.float32)
    signals = np.random.default_rng(0).uniform(size=(2, len(coords), 1)).astype(np.float32)
    state = meta_step.init_state(field, settings, jax.random.key(0))
    state, metrics = jax.jit(meta_step.make_update(field, settings, coords))(state, signals, jax.random.key(1))
    return float(metrics["loss"]), int(state.step)


PAPER = {
    # config: (layers, width, B, gamma, omega_first, omega_last, P)
    ("ecg", ""): (8, 64, 64, 1.0, 20.0, 200.0, 64),
    ("chest_xray", ""): (15, 256, 24, 0.25, 20.0, 400.0, 2048),
    ("chest_xray", "128"): (15, 256, 8, 0.25, 30.0, 300.0, 8192),
    ("dermatoscope", "224"): (15, 256, 4, 0.10, 30.0, 300.0, 16384),
    ("brain_mri", ""): (15, 256, 4, 0.25, 20.0, 300.0, 8192),
    ("lung_ct", ""): (15, 256, 4, 0.25, 20.0, 300.0, 8192),
}


@pytest.mark.parametrize(("config", "expected"), PAPER.items())
def test_paper_settings(config, expected):
    """The table of hyperparameters, and what is common to all."""
    settings = get_config(*config)
    model, inner, train = settings.model, settings.inner, settings.train
    assert expected == (
        model.layers, model.width, train.batch_size, inner.selection_ratio, model.omega_first, model.omega_last,
        model.latent_dim,
    )  # fmt: skip
    assert (inner.steps, inner.step_size, settings.fit.steps) == (10, 1e-2, 20)
    assert (train.learning_rate, train.steps, train.schedule) == (3e-6, 250_000, "cosine")
    assert (model.modulate_first_layer, inner.shared_context, settings.fit.context) == (False, False, "full")


@pytest.mark.parametrize("name", ["chest_xray", "ecg"])
def test_an_unknown_variant_names_the_known(name):
    with pytest.raises(ValueError, match=r"no variant '65'; known: .*cpu"):
        get_config(name, "65")
