"""The record of a run's signals: names, contents, patients, and splits that would be left empty."""

import numpy as np
import pytest

from experiments.runtime.run_directory import RunDirectory, RunError
from experiments.runtime.signal_record import held_apart
from experiments.settings import RunSettings
from medfuncta_jax.datasets.dataset import SPLITS, Contents, Dataset, Split
from medfuncta_jax.datasets.equal_signals import fingerprint

SETTINGS = RunSettings.from_dict({"data": {"source": "any"}})


def dataset(places, patients=None, *, published=False):
    """A dataset of 10x10 signals; `places` gives for each split names of signals by the seed of their values."""
    splits, contents = {}, {}
    for split in SPLITS:
        names = places[split]
        signals = [np.random.default_rng(seed).random((10, 10, 1)).astype(np.float32) for seed in names.values()]
        records = [{"signal": one, "label": -1, "id": name} for one, name in zip(signals, names, strict=True)]
        splits[split] = Split(records, (10, 10, 1), "float32")
        contents[split] = Contents(
            tuple(names),
            None if published else np.stack([fingerprint(one) for one in signals]),
            None if patients is None else tuple(patients[name] for name in names),
        )
    return Dataset("made up", (10, 10), 1, (), splits, "none", {}, contents)


def ids(data):
    assert {name: held.ids for name, held in data.contents.items()} == {
        name: tuple(one["id"] for one in split) for name, split in data.splits.items()
    }
    return {name: set(held.ids) for name, held in data.contents.items()}


@pytest.fixture
def run(tmp_path):
    return RunDirectory(tmp_path, SETTINGS)


FIRST = {"train": {"a": 1, "b": 2, "c": 3}, "val": {"d": 4}, "test": {"e": 5, "f": 6}}


@pytest.mark.parametrize("published", [False, True])
def test_the_same_data_come_back_as_they_are(run, published):
    data = dataset(FIRST, published=published)
    assert held_apart(data, run) is data
    before = (run.path / "signals.json").read_bytes()
    assert held_apart(data, run) is data
    assert (run.path / "signals.json").read_bytes() == before


@pytest.mark.parametrize("published", [False, True])
def test_another_draw_changes_nothing(run, published):
    held_apart(dataset(FIRST, published=published), run)
    drawn = {"train": {"e": 5, "b": 2}, "val": {"a": 1, "f": 6}, "test": {"c": 3, "d": 4}}
    assert ids(held_apart(dataset(drawn, published=published), run)) == {k: set(v) for k, v in FIRST.items()}


def test_content_goes_before_names_and_trained_before_tested(run):
    held_apart(dataset(FIRST), run)
    now = {"train": {"b": 2, "new": 9}, "val": {"d": 4}, "test": {"copy of a": 1, "e": 3, "f": 6}}
    found = ids(held_apart(dataset(now), run))
    assert found == {"train": {"b", "new", "copy of a", "e"}, "val": {"d"}, "test": {"f"}}  # e holds what c was
    assert ids(held_apart(dataset(now), run)) == found


def test_a_new_signal_of_a_trained_patient_is_trained_on(run):
    patients = {"a": "p", "b": "q", "c": "q", "d": "r", "e": "s", "f": "s"}
    held_apart(dataset(FIRST, patients), run)
    now = FIRST | {"test": FIRST["test"] | {"again p": 20, "again s": 21, "t": 22}}
    found = ids(held_apart(dataset(now, patients | {"again p": "p", "again s": "s", "t": "t"}), run))
    assert found == {"train": {"a", "b", "c", "again p"}, "val": {"d"}, "test": {"e", "f", "again s", "t"}}


def test_what_comes_later_is_recorded(run):
    held_apart(dataset(FIRST), run)
    held_apart(dataset(FIRST | {"train": FIRST["train"] | {"g": 7}}), run)
    moved = dataset(FIRST | {"test": FIRST["test"] | {"g": 7}})
    assert "g" in ids(held_apart(moved, run))["train"]


def test_a_split_without_signals_is_refused(run):
    held_apart(dataset(FIRST), run)
    with pytest.raises(RunError, match=r"no signal is left for the test split: .* such as a to train"):
        held_apart(dataset({"train": {"b": 2}, "val": {"d": 4}, "test": {"a": 1}}), run)
