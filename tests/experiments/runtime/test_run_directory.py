import json

import pytest

from experiments.runtime.run_directory import RunDirectory, RunError
from experiments.settings import RunSettings

SETTINGS = RunSettings.from_dict({"data": {"source": "any", "grid": (3, 4)}})


def changed(**groups):
    return RunSettings.from_dict({**SETTINGS.to_dict(), **groups})


def test_same_settings_open_again_whatever_the_cache(tmp_path):
    RunDirectory(tmp_path / "run", SETTINGS)
    RunDirectory(tmp_path / "run", SETTINGS)
    RunDirectory(tmp_path / "run", changed(data={"source": "any", "grid": [3, 4], "cache_dir": "/elsewhere"}))
    assert RunSettings.from_dict(json.loads((tmp_path / "run" / "config.json").read_text())) == SETTINGS


def test_a_run_from_before_a_setting_came_goes_on(tmp_path):
    settings = RunSettings.from_dict({"data": {"source": "a"}})
    run = RunDirectory(tmp_path, settings)
    older = json.loads(run.config_file.read_text())
    del older["train"]["micro_batch"]
    run.config_file.write_text(json.dumps(older))
    RunDirectory(tmp_path, settings)


def test_what_changes_rounding_alone_may_change(tmp_path):
    RunDirectory(tmp_path, SETTINGS)
    RunDirectory(tmp_path, changed(inner={"remat": "layers"}, train={"micro_batch": 2, "points_per_chunk": 99}))


def test_a_run_of_another_version_is_refused(tmp_path):
    settings = RunSettings.from_dict({"data": {"source": "a"}})
    run = RunDirectory(tmp_path, settings)
    run.config_file.write_text(json.dumps({"data": {"source": "a"}, "train": {"gone": 1}}))
    with pytest.raises(RunError, match=r"of another version \(unknown setting train.gone"):
        RunDirectory(tmp_path, settings)


def test_every_differing_field_is_listed(tmp_path):
    RunDirectory(tmp_path, SETTINGS)
    other = changed(seed=1, data={"source": "any", "grid": [3, 5], "new": 2}, model={"width": 8})
    with pytest.raises(RunError) as refused:
        RunDirectory(tmp_path, other)
    for part in ("seed: 0 there, 1", "data.grid: (3, 4) there, (3, 5)", "data.new: '(absent)'", "model.width: 256"):
        assert part in str(refused.value)


def test_damaged_config_is_named(tmp_path):
    RunDirectory(tmp_path, SETTINGS)
    (tmp_path / "config.json").write_text('{"seed":')
    with pytest.raises(RunError, match=r"config.json is damaged"):
        RunDirectory(tmp_path, SETTINGS)


def test_metrics_rewind_drops_later_records_and_a_torn_line(tmp_path):
    run = RunDirectory(tmp_path, SETTINGS)
    run.append_metrics([{"step": step, "loss": 1.0} for step in (5, 10, 15)])
    with run.metrics_file.open("a") as file:
        file.write('{"step": 20, "lo')
    run.rewind_metrics(10)
    assert [record["step"] for record in run.read_metrics()] == [5, 10]
    run.append_metrics([{"step": 11}])
    assert len(run.metrics_file.read_text().splitlines()) == 3


def test_seconds_of_stages(tmp_path):
    run = RunDirectory(tmp_path, SETTINGS)
    assert run.seconds() == {}
    run.set_seconds("train", 1.234)
    run.set_seconds("extract", 2)
    assert run.seconds() == {"train": 1.23, "extract": 2}
