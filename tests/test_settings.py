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
        ({"extract": {"signals_per_file": 0}}, "extract.signals_per_file must be at least 1"),
        ({"extract": {"shard": 4, "shards": 4}}, r"extract.shard must be 0 to 3 \(shards - 1\), got 4"),
        ({"extract": {"shards": 0}}, "extract.shards must be at least 1"),
        ({"extract": {"dtype": "bfloat16"}}, "extract.dtype must be one of 'float32', 'float16'"),
        ({"extract": {"splits": ()}}, "extract.splits must name at least one split"),
        ({"compress": {"bits": (4, 17)}}, r"compress.bits must be 1 to 16, got \(4, 17\)"),
        ({"compress": {"bits": ()}}, "compress.bits must be 1 to 16"),
        ({"compress": {"spread": 0.0}}, "compress.spread must be above 0"),
        ({"decode": {"splits": ()}}, "decode.splits must name at least one split"),
        ({"decode": {"resolution": (4, 0)}}, "decode.resolution must be at least 1"),
        ({"decode": {"scale": 0.0}}, "decode.scale must be above 0"),
        ({"decode": {"scale": 2.0, "resolution": (4, 4)}}, "decode.resolution and scale exclude each other"),
        ({"decode": {"limit": -1}}, "decode.limit must not be negative"),
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
