"""Settings of stages: validated in the tree of a run, and read back by the library without them."""

import dataclasses
import json

import pytest

from experiments.settings import RunSettings
from experiments.stages import ALL, STAGES, function_of
from medfuncta_jax.settings import Settings, SettingsError


def tree(**groups):
    return {"data": {"source": "nibabel_slices"}, **groups}


def test_the_library_reads_what_a_run_saves():
    settings = RunSettings.from_dict(
        tree(model={"width": 8}, extract={"dtype": "float16"}, data={"source": "a", "b": 1})
    )
    saved = json.loads(json.dumps(settings.to_dict()))
    assert RunSettings.from_dict(saved) == settings
    assert hash(RunSettings.from_dict(saved)) == hash(settings)
    assert Settings.from_saved(saved) == Settings(settings.data, model=settings.model)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
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
        ({"evaluate": {"resamples": 0}}, "evaluate.resamples must be at least 1"),
        ({"regress": {"penalties": (0.0,)}}, "regress.penalties must be above 0"),
        ({"regress": {"models": ("ridge", "ridge")}}, "regress.models must name each once"),
        ({"regress": {"epochs": 0}}, "regress.epochs must be at least 1"),
        ({"classify": {"seeds": 0}}, "classify.seeds must be at least 1"),
        ({"exract": {}}, "unknown setting exract; did you mean extract"),
        ({"decode": {"scal": 2.0}}, "unknown setting decode.scal; did you mean decode.scale"),
        ({"model": {"widht": 3}}, "unknown setting model.widht; did you mean model.width"),
    ],
)
def test_faults_name_the_field(groups, message):
    with pytest.raises(SettingsError, match=message):
        RunSettings.from_dict(tree(**groups))


def test_every_stage_has_its_function_and_every_group_of_settings_a_stage():
    for name in STAGES:
        assert callable(function_of(name))
    own = {f.name for f in dataclasses.fields(RunSettings)} - {f.name for f in dataclasses.fields(Settings)}
    assert own <= set(STAGES)
    assert set(ALL) <= set(STAGES)
    settings = RunSettings.from_dict(tree()).to_dict()
    names = {f"{group}.{name}" for group in own for name in settings[group]}
    for stage in STAGES.values():
        for name in stage.depends:
            assert name.startswith("data.") or any(one.startswith(name) for one in names), name
