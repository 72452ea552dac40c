"""Seeded splits: by name, by group, and class by class."""

import numpy as np
import pytest

from medfuncta_jax.datasets.splits import require_split_options, split_names, stratified_part
from medfuncta_jax.settings import SettingsError

NAMES = [f"scan{i:02d}" for i in range(40)]
PARTS = {"val": 0.1, "test": 0.2}


def test_sizes_order_and_seed():
    splits = split_names(NAMES, PARTS, seed=1)
    assert {name: len(part) for name, part in splits.items()} == {"train": 28, "val": 4, "test": 8}
    assert sorted(name for part in splits.values() for name in part) == NAMES
    assert all(part == sorted(part) for part in splits.values())
    assert split_names(NAMES, PARTS, seed=1) == splits
    assert split_names(NAMES, PARTS, seed=2) != splits


def test_a_group_stays_together():
    groups = {name: f"patient {i % 7}" for i, name in enumerate(NAMES)}
    splits = split_names(NAMES, PARTS, seed=0, groups=groups)
    held = {name: {groups[one] for one in part} for name, part in splits.items()}
    assert {name: len(patients) for name, patients in held.items()} == {"train": 5, "val": 1, "test": 1}
    assert sorted(name for part in splits.values() for name in part) == NAMES
    assert len(set().union(*held.values())) == 7


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
