"""The automatic batch size: numbers tried, the number taken, and that it stays."""

import dataclasses
import json
from types import SimpleNamespace

import pytest

from experiments.runtime import batch_size
from experiments.runtime.batch_size import best, climb, settled
from experiments.runtime.run_directory import RunDirectory, RunError
from experiments.settings import RunSettings
from tests.latent_stores import LENGTHS, made_up_dataset

SETTINGS = RunSettings.from_dict(
    {
        "data": {"source": "made up"},
        "model": {"layers": 3, "width": 8, "latent_dim": 4, "omega_first": 10.0, "omega_last": 20.0},
        "fit": {"steps": 2, "batch_size": 0},
    }
)


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes only when it is told to."""
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(batch_size, "time", SimpleNamespace(monotonic=lambda: now.seconds))
    return now


@pytest.mark.parametrize(
    ("rates", "first", "tried", "taken"),
    [
        ({4: 10.0, 8: 15.0, 16: 20.0, 32: 20.5, 64: 99.0}, 4, [4, 8, 16, 32], 16),  # up, as long as it is worth it
        ({1: 12.0, 2: 14.0, 4: 10.0, 8: 9.0}, 4, [4, 8, 2, 1], 2),  # down
        ({2: 10.1, 4: 10.0, 8: 10.0}, 4, [4, 8, 2], 2),  # all alike: the least memory
        ({1: 4.0, 2: 5.0, 4: 0.0, 8: 0.0}, 8, [8, 4, 2, 1], 2),  # memory for two
        ({1: 5.0, 2: 0.0}, 1, [1, 2], 1),
    ],
)
def test_what_is_tried_and_taken(clock, rates, first, tried, taken):
    found = climb(first, unit=1, signals=10_000, rate_of=rates.__getitem__)
    assert list(found) == tried
    assert best(found) == taken


def test_no_number_is_beyond_the_signals_or_below_the_devices(clock):
    def rate_of(size):
        return float(size)

    assert list(climb(4, unit=4, signals=15, rate_of=rate_of)) == [4, 8]
    assert list(climb(8, unit=4, signals=8, rate_of=lambda size: 1 / size)) == [8, 4]


def test_trying_ends_before_it_costs_more_than_it_saves(clock):
    def rate_of(size):
        clock.seconds += 3.0
        return 10.0 * size

    assert list(climb(1, unit=1, signals=400, rate_of=rate_of)) == [1]  # 40 s of work
    assert list(climb(1, unit=1, signals=1000, rate_of=rate_of)) == [1, 2]  # 100 s, then 50 s


def test_a_number_in_the_config_is_taken_as_it_is(tmp_path):
    settings = dataclasses.replace(SETTINGS, fit=dataclasses.replace(SETTINGS.fit, batch_size=5))
    assert settled(settings, made_up_dataset((5, 4)), RunDirectory(tmp_path, settings)) is settings
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


def test_what_was_measured_stays(tmp_path, monkeypatch):
    run, dataset = RunDirectory(tmp_path, SETTINGS), made_up_dataset((5, 4))
    settings = settled(SETTINGS, dataset, run)
    kept = json.loads((tmp_path / "batch_size.json").read_text())
    assert settings.fit == dataclasses.replace(SETTINGS.fit, batch_size=kept["batch_size"])
    assert 1 <= kept["batch_size"] <= sum(LENGTHS.values())
    assert all(rate > 0 for rate in kept["signals_per_s"].values())
    monkeypatch.setattr(batch_size, "_tried", None)
    assert settled(SETTINGS, dataset, run) == settings
    assert sorted(file.name for file in tmp_path.iterdir()) == ["batch_size.json", "config.json"]


def test_of_two_jobs_that_try_at_once_one_decides(tmp_path, monkeypatch):
    run = RunDirectory(tmp_path, SETTINGS)

    def tried_beside_another(*_):
        batch_size._keep(tmp_path / "batch_size.json", {7: 1.0})
        return {9: 2.0}

    monkeypatch.setattr(batch_size, "_tried", tried_beside_another)
    assert settled(SETTINGS, made_up_dataset((5, 4)), run).fit.batch_size == 7
    assert sorted(file.name for file in tmp_path.iterdir()) == ["batch_size.json", "config.json"]


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"batch_size": "many"}', '{"batch_size": 0}'])
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / "batch_size.json").write_text(content)
    with pytest.raises(RunError, match=r"batch_size.json is damaged; remove it, or give --config.fit.batch_size"):
        settled(SETTINGS, made_up_dataset((5, 4)), RunDirectory(tmp_path, SETTINGS))
