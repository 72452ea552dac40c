"""Seeded splits: by name, by group, and class by class."""

import numpy as np
import pytest

from medfuncta_jax.datasets.splits import require_split_options, split_names, stratified_part
from medfuncta_jax.settings import SettingsError

NAMES = [f"scan{i:02d}" for i in range(40)]
PARTS = {"val": 0.1, "test": 0.2}


def test_sizes_order_and_seed():
    splits = split_names(NAMES, PARTS, seed=1)
    assert sorted(name for part in splits.values() for name in part) == NAMES
    assert all(part == sorted(part) for part in splits.values())
    assert split_names(reversed(NAMES), PARTS, seed=1) == splits
    assert split_names(NAMES, PARTS, seed=2) != splits
    many = split_names(map(str, range(20_000)), PARTS, seed=1)
    assert {name: len(part) / 20_000 for name, part in many.items()} == pytest.approx(
        {"train": 0.7, "val": 0.1, "test": 0.2}, abs=0.01
    )


def test_the_split_is_the_same_on_every_machine():
    """Numbers that are part of the format: another hash would part old runs from new ones."""
    assert split_names(NAMES[:8], PARTS, seed=42) == {
        "train": ["scan00", "scan01", "scan03", "scan04", "scan06"],
        "val": ["scan02", "scan05"],
        "test": ["scan07"],
    }


def test_a_name_does_not_move_when_others_come_or_go():
    every = split_names(NAMES, PARTS, seed=3)
    place = {name: split for split, part in every.items() for name in part}
    for count in range(8, len(NAMES)):  # the first eight fill every split by themselves
        some = split_names(NAMES[:count], PARTS, seed=3)
        assert all(place[name] == split for split, part in some.items() for name in part)


@pytest.mark.parametrize("seed", range(20))
def test_of_few_names_every_split_gets_one(seed):
    names = NAMES[:3]
    assert [len(part) for part in split_names(names, PARTS, seed=seed).values()] == [1, 1, 1]


def test_a_group_stays_together():
    groups = {name: f"patient {i % 7}" for i, name in enumerate(NAMES)}
    splits = split_names(NAMES, PARTS, seed=0, groups=groups)
    held = {name: {groups[one] for one in part} for name, part in splits.items()}
    assert sorted(name for part in splits.values() for name in part) == NAMES
    assert sum(map(len, held.values())) == len(set().union(*held.values())) == 7
    assert all(held.values())


def test_stratified_part():
    labels = np.repeat([0, 1, 2, 3], [100, 10, 2, 1])
    part = stratified_part(labels, 0.1, seed=3)
    assert np.bincount(labels[part], minlength=4).tolist() == [10, 1, 1, 0]
    np.testing.assert_array_equal(part, stratified_part(labels, 0.1, seed=3))
    assert (part != stratified_part(labels, 0.1, seed=4)).any()


@pytest.mark.parametrize("options", [(-1, 0.1, 0.1), (0, 0.0, 0.1), (0, 0.5, 0.5), (0, float("nan"), 0.1)])
def test_options_out_of_range(options):
    with pytest.raises(SettingsError):
        require_split_options(*options)
