import dataclasses
import json

import pytest

from medfuncta_jax.settings import ModelSettings, Settings, SettingsError


def tree(**groups):
    return {"data": {"source": "nibabel_slices"}, **groups}


def test_defaults_are_the_papers_2d_settings():
    settings = Settings.from_dict(tree())
    assert (settings.model.layers, settings.model.width, settings.model.latent_dim) == (15, 256, 2048)
    assert (settings.inner.steps, settings.inner.step_size, settings.fit.steps) == (10, 1e-2, 20)
    assert settings.train.learning_rate == 3e-6


def test_round_trip_through_json_keeps_source_options():
    settings = Settings.from_dict(tree(data={"source": "medmnist", "flag": "x", "size": 28, "grid": [1, 2]}, seed=3))
    again = Settings.from_dict(json.loads(json.dumps(settings.to_dict())))
    assert again == settings
    assert hash(again) == hash(settings)
    assert dict(again.data.options) == {"flag": "x", "size": 28, "grid": (1, 2)}


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"model": {"latent_dim": 0}}, "model.latent_dim must be at least 1"),
        ({"baselines": {"last_width": 0}}, "baselines.last_width must be at least 1"),
        ({"baselines": {"contrastive_weight": -1.0}}, "baselines.contrastive_weight must be above 0"),
        ({"model": {"latent_grid": (2, 0)}}, "model.latent_grid must be at least 1"),
        (
            {"model": {"latent_grid": (3,)}},
            "model.latent_dim must be a multiple of the 3 places of latent_grid, got 2048",
        ),
        ({"model": {"latent_interpolation": "cubic"}}, "model.latent_interpolation must be one of 'linear', 'nearest'"),
        ({"model": {"modulation_hidden": (-1,)}}, "model.modulation_hidden must be at least 1"),
        ({"inner": {"step_size_range": (1.0,)}}, r"inner.step_size_range must be \(lowest, highest\)"),
        ({"inner": {"step_size_range": (1.0, 0.1)}}, r"inner.step_size_range must be \(lowest, highest\)"),
        ({"train": {"method": "maml"}}, "train.method must be one of 'meta', 'autodecoder'"),
        ({"train": {"latent_noise": -0.1}}, "train.latent_noise must not be negative"),
        ({"train": {"latent_learning_rate": 0.0}}, "train.latent_learning_rate must be above 0"),
        ({"inner": {"selection_ratio": 0.0}}, r"inner.selection_ratio must be in \(0, 1\], got 0"),
        ({"inner": {"selection_ratio": 1.5}}, r"inner.selection_ratio must be in \(0, 1\], got 1.5"),
        ({"train": {"learning_rate": "fast"}}, "train.learning_rate must be a number, got 'fast'"),
        ({"train": {"steps": 10.5}}, "train.steps must be a whole number"),
        ({"train": {"steps": True}}, "train.steps must be a whole number"),
        ({"train": {"schedule": "linear"}}, "train.schedule must be one of 'cosine', 'constant'"),
        ({"trian": {}}, "unknown setting trian; did you mean train"),
        ({"model": {"widht": 3}}, "unknown setting model.widht; did you mean model.width"),
        ({"train": {"warmup_steps": -1}}, "train.warmup_steps must not be negative"),
        ({"model": 3}, "model must hold named settings"),
        ({"data": {"cache_dir": ""}}, "data.source is missing"),
    ],
)
def test_faults_name_the_field(groups, message):
    with pytest.raises(SettingsError, match=message):
        Settings.from_dict(tree(**groups))


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelSettings().layers = 3


def test_what_was_saved_by_another_program_is_read_without_it():
    """A run's file holds groups of its stages too; a slip of a name in a config is still refused."""
    saved = {**Settings.from_dict(tree(seed=3)).to_dict(), "extract": {"dtype": "float16"}}
    assert Settings.from_saved(saved) == Settings.from_dict(tree(seed=3))
    with pytest.raises(SettingsError, match="unknown setting extract"):
        Settings.from_dict(saved)
    with pytest.raises(SettingsError, match=r"unknown setting model\.widht"):
        Settings.from_saved(tree(model={"widht": 3}))


def test_what_version_0_1_saved_is_read():
    """Settings that are no more, at the values at which they did nothing; others are refused by name."""
    saved = {
        "data": {"source": "any"},
        "model": {"layers": 4, "last_width": 0, "codebook": 0, "codebook_features": 8},
        "inner": {"steps": 3, "context": "random"},
        "train": {"contrastive_weight": 0.0, "contrastive_temperature": 0.1},
    }
    read = Settings.from_saved(saved)
    assert (read.model.layers, read.inner.steps) == (4, 3)
    for group, name, value in (("model", "codebook", 256), ("inner", "context", "gradient")):
        with pytest.raises(SettingsError, match=f"unknown setting {group}.{name}"):
            Settings.from_saved(saved | {group: saved[group] | {name: value}})


@pytest.mark.parametrize("method", ["autodecoder", "codebook", "gradient_contexts", "patches"])
def test_methods_of_other_steps_refuse_gauss_newton_damping(method):
    with pytest.raises(SettingsError, match=f"gauss_newton_damping must be 0 with train.method={method}, got 0.1"):
        Settings.from_dict(
            {"data": {"source": "any"}, "inner": {"gauss_newton_damping": 0.1}, "train": {"method": method}}
        )
