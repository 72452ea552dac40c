"""Frequencies found by short trainings: the search, real trainings, what is kept, and the run that follows."""

import dataclasses
import json
import math

import pytest

from experiments.runtime.interruption import StopRequest
from experiments.runtime.run import Run
from experiments.runtime.run_directory import RunDirectory, RunError
from experiments.settings import RunSettings
from experiments.stages import omega_search
from experiments.stages.omega_search import search, search_omega, train_briefly, with_omega
from tests.experiments.conftest import run
from tests.latent_stores import made_up_dataset

SETTINGS = RunSettings.from_dict(
    {
        "data": {"source": "made up"},
        "model": {"layers": 3, "width": 8, "latent_dim": 4, "omega": "auto", "omega_first": 4.0, "omega_last": 8.0},
        "inner": {"steps": 2, "step_size": 0.1},
        "train": {"steps": 30, "batch_size": 2, "learning_rate": 1e-3},
        "fit": {"steps": 2},
    }
)
DATASET = made_up_dataset((5, 4))


def found_in(folder, settings):
    """The settings of a run in this folder after the search."""
    run = Run(RunDirectory(folder, settings), StopRequest(), DATASET)
    search_omega(run)
    return run.directory.settings


def bowl(best, *, cliff=math.inf):
    """PSNR that falls by 0.1 dB for each squared step from the best place, along oblique axes, and collapses beyond a
    cliff."""

    def psnr_of(place):
        a, b = place[0] - best[0], place[1] - best[1]
        return 30 - 0.1 * (a**2 - a * b / 2 + b**2) if sum(place) <= cliff else -math.inf

    return psnr_of


@pytest.mark.parametrize("best", [(0, 0), (1, 0), (-4, 3), (3, -5), (-2, -2), (7, 2)])
def test_the_search_ends_at_the_top(best):
    tried = []

    def psnr_of(place):
        tried.append(place)
        return bowl(best)(place)

    found = search(psnr_of)
    around = [(found[0] + a, found[1] + b) for a in (-1, 0, 1) for b in (-1, 0, 1)]
    assert all(bowl(best)(found) + 0.11 > bowl(best)(place) for place in around)
    assert len(tried) == len(set(tried)) <= 24


def test_of_two_better_neighbours_the_better_one_is_followed():
    """A small gain along one axis must not hide the ridge along the other one."""
    heights = {(0, 0): 29.4, (3, 0): 29.6, (3, 3): 29.5, (6, 0): 20.0, (0, 3): 32.0, (-3, 3): 32.1}
    found = search(lambda place: heights.get(place, 25.0))
    assert found == (-3, 3)


@pytest.mark.parametrize("cliff", [3, 0, -1, -5, -12])
def test_the_search_stays_below_a_cliff_wherever_it_begins(cliff):
    psnr_of = bowl((4, 4), cliff=cliff)
    found = search(psnr_of)
    assert math.isfinite(psnr_of(found))
    nearby = [(found[0] + a, found[1] + b) for a, b in ((1, 0), (-1, 0), (0, 1), (0, -1))]
    assert all(psnr_of(there) <= psnr_of(found) + 0.02 for there in nearby)


@pytest.mark.parametrize(
    ("steps", "lengths"),
    [(30, [30]), (100, [100]), (200, [100, 200]), (600, [100, 300]), (4000, [100, 800]), (250_000, [100, 2000])],
)
def test_longer_runs_are_searched_by_longer_trainings_too(steps, lengths):
    assert omega_search.rounds(dataclasses.replace(SETTINGS.train, steps=steps)) == lengths


def test_a_later_round_goes_on_from_the_place_found(tmp_path, monkeypatch):
    """The best last frequency is 27 for a hundred updates and 12 for 800; the later round begins at the former."""
    longer = dataclasses.replace(SETTINGS, train=dataclasses.replace(SETTINGS.train, steps=4000))

    def trained(settings, dataset, *, updates):
        best = {100: 27.0, 800: 12.0}[updates]
        return 30 - abs(math.log(settings.model.omega_first / 4)) - abs(math.log(settings.model.omega_last / best))

    monkeypatch.setattr(omega_search, "train_briefly", trained)
    assert found_in(tmp_path, longer).model.omega_last == 12.0
    tried = json.loads((tmp_path / "omega.json").read_text())["tried"]
    later = [row["omega"] for row in tried if row["updates"] == 800]
    assert later[0] == [4.0, 27.0]
    assert len(later) < len(tried) / 2 + 2


def test_a_search_that_only_collapses_ends():
    tried = []
    assert search(lambda place: tried.append(place) or -math.inf)[0] == -9
    assert len(tried) < 20


def test_brief_trainings_are_equal_and_differ_by_their_frequencies():
    one, other = with_omega(SETTINGS, 4.0, 8.0), with_omega(SETTINGS, 40.0, 80.0)
    psnr = train_briefly(one, DATASET, updates=5)
    assert psnr == train_briefly(one, DATASET, updates=5)
    assert math.isfinite(psnr)
    assert abs(psnr - train_briefly(other, DATASET, updates=5)) > 0.01
    assert psnr < train_briefly(one, DATASET, updates=30)


def test_a_loss_that_is_not_finite_is_a_collapse():
    wild = dataclasses.replace(SETTINGS, inner=dataclasses.replace(SETTINGS.inner, step_size=1e30))
    assert train_briefly(with_omega(wild, 400.0, 4000.0), DATASET, updates=3) == -math.inf


def test_given_frequencies_are_taken_as_they_are(tmp_path):
    settings = with_omega(SETTINGS, 4.0, 8.0)
    assert found_in(tmp_path, settings) is settings
    assert not (tmp_path / "omega.json").exists()


def test_the_run_keeps_what_was_found(tmp_path, monkeypatch):
    found = found_in(tmp_path, SETTINGS)
    record = json.loads((tmp_path / "omega.json").read_text())
    psnr = {tuple(row["omega"]): row["psnr"] for row in record["tried"]}
    assert record["found"] == [found.model.omega_first, found.model.omega_last]
    assert psnr[tuple(record["found"])] + 0.02 >= max(psnr.values())
    assert json.loads((tmp_path / "config.json").read_text())["model"] == dataclasses.asdict(found.model) | {
        name: [] for name in ("latent_grid", "modulation_hidden")
    }
    assert found.model.omega == "given"
    # The same command, another place to begin at, and the values themselves: all are this run.
    monkeypatch.setattr(omega_search, "train_briefly", None)
    elsewhere = dataclasses.replace(SETTINGS, model=dataclasses.replace(SETTINGS.model, omega_first=9.0))
    for settings in (SETTINGS, elsewhere, found):
        assert found_in(tmp_path, settings) == found
    with pytest.raises(RunError, match=r"model.omega_first: .* there, 7.0 asked for"):
        RunDirectory(tmp_path, with_omega(SETTINGS, 7.0, 8.0))


def test_a_stopped_search_goes_on_with_the_next_candidate(tmp_path, monkeypatch):
    tried = []

    def stopped(settings, dataset, *, updates):
        tried.append((settings.model.omega_first, settings.model.omega_last))
        if len(tried) == 4:
            raise KeyboardInterrupt
        return 20.0 + len(tried)

    monkeypatch.setattr(omega_search, "train_briefly", stopped)
    with pytest.raises(KeyboardInterrupt):
        found_in(tmp_path, SETTINGS)
    assert len(json.loads((tmp_path / "omega.json").read_text())["tried"]) == 3
    assert json.loads((tmp_path / "config.json").read_text())["model"]["omega"] == "auto"
    monkeypatch.setattr(omega_search, "train_briefly", lambda *_, **__: 9)
    found_in(tmp_path, SETTINGS)
    record = json.loads((tmp_path / "omega.json").read_text())
    assert [row["psnr"] for row in record["tried"][:4]] == [21.0, 22.0, 23.0, 9]
    assert len({tuple(row["omega"]) for row in record["tried"]}) == len(record["tried"])


def test_a_run_that_collapses_everywhere_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(omega_search, "train_briefly", lambda *_, **__: -math.inf)
    with pytest.raises(RunError, match=r"collapsed at 4 to 8 and .*; begin at lower ones .model.omega_first"):
        found_in(tmp_path, SETTINGS)


@pytest.mark.parametrize(
    "content",
    [
        "", "[]", '{"found": [1.0, 2.0]}', '{"tried": [], "found": [1.0]}', '{"tried": [{"omega": [1.0, 2.0]}]}',
        '{"tried": [{"updates": 0, "omega": [1.0, 2.0], "psnr": 1.0}]}',
    ],
)  # fmt: skip
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / "omega.json").write_text(content)
    with pytest.raises(RunError, match=r"omega.json is damaged; remove it"):
        found_in(tmp_path, SETTINGS)


def test_the_launcher_finds_frequencies_and_trains_with_them(tmp_path):
    """A search that was stopped before its last candidate, the first place."""
    start = (30.0, 30.0)  # of the config
    others = [(a * stride, b * stride) for stride in (3, 1) for a, b in ((0, 1), (0, -1), (1, 0), (-1, 0))]
    tried = [{"updates": 20, "omega": omega_search.frequencies(start, place), "psnr": 1.0} for place in others]
    (tmp_path / "omega.json").write_text(json.dumps({"tried": tried}))
    keywords = {"model__omega": "auto", "train__steps": 20}
    done = run(tmp_path, **keywords)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "omega.json").read_text())
    assert record["found"] == list(start)
    assert [row["psnr"] for row in record["tried"][:8]] == [1.0] * 8
    assert record["tried"][8]["psnr"] > 10
    assert "omega: 30 to 30" in done.stderr
    assert "omega.json" in done.stdout
    before = (tmp_path / "field.safetensors").read_bytes()
    done = run(tmp_path, **keywords)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "field.safetensors").read_bytes() == before
    assert json.loads((tmp_path / "omega.json").read_text()) == record


def test_a_linear_start_alone_is_searched_by_shorter_starts(tmp_path):
    train = dataclasses.replace(SETTINGS.train, start="linear", start_updates=15, steps=0)
    settings = dataclasses.replace(SETTINGS, train=train)
    found = found_in(tmp_path, settings)
    assert found.train == train
    record = json.loads((tmp_path / "omega.json").read_text())
    assert {row["updates"] for row in record["tried"]} == {3}
    assert len({row["psnr"] for row in record["tried"]}) > 4
    assert found_in(tmp_path, settings) == found  # as a later command reads it
    psnr = train_briefly(found, DATASET, updates=3)
    assert psnr == pytest.approx(max(row["psnr"] for row in record["tried"]), abs=0.02)
    assert psnr != train_briefly(found, DATASET, updates=9)


def test_meta_updates_begin_at_a_shorter_start(monkeypatch):
    train = dataclasses.replace(SETTINGS.train, start="linear", start_updates=15)
    seen, of_settings = [], omega_search.first_state
    monkeypatch.setattr(omega_search, "first_state", lambda *given: seen.append(given[1]) or of_settings(*given))
    train_briefly(dataclasses.replace(SETTINGS, train=train), DATASET, updates=4)
    assert (seen[0].train.start_updates, seen[0].train.steps) == (3, 4)
