"""The embedded default: real slices of nibabel's brain MRI."""

import numpy as np
import pytest

from medfuncta_jax.datasets import open_dataset
from medfuncta_jax.datasets.nibabel_slices import split_positions
from medfuncta_jax.settings import DataSettings


@pytest.fixture(scope="module")
def slices(tmp_path_factory):
    return open_dataset(DataSettings("nibabel_slices", str(tmp_path_factory.mktemp("cache"))), data_dir=None)


def test_shapes_counts_and_labels(slices):
    assert slices.grid == (32, 32)
    assert slices.channels == 1
    assert slices.classes == ("sagittal", "coronal", "axial")
    assert {name: len(split) for name, split in slices.splits.items()} == {"train": 250, "val": 32, "test": 32}
    for split in slices.splits.values():
        assert {example["label"] for example in split} == {0, 1, 2}
        for example in split:
            assert slices.classes[example["label"]] in example["id"]
            assert "affine" not in example


def test_values_are_scaled_and_every_slice_shows_tissue(slices):
    for split in slices.splits.values():
        signals = split.signals(slice(None))
        assert signals.dtype == np.float32
        assert signals.min() >= 0
        assert signals.max() <= 1
        assert (signals > 0.1).mean(axis=(1, 2, 3)).min() > 0.03


def test_splits_are_apart_by_position(slices):
    places = {}
    for name, split in slices.splits.items():
        for example in split:
            _, scan, axis, position = example["id"].split("-")
            places.setdefault(axis, {}).setdefault(int(position), []).append((name, scan))
    for axis in slices.classes:
        for position, found in places[axis].items():
            assert len(found) == 2  # both scans of a position
            assert len({name for name, _ in found}) == 1
            beside = places[axis].get(position + 1, found)
            assert beside[0][0] == found[0][0]  # another split never starts at the next position


def test_up_is_up(slices):
    """Axial sections of this head are longer from front to back, so along the rows, than from side to side."""
    for example in slices.splits["test"]:
        tissue = example["signal"][..., 0] > 0.1
        rows, columns = np.ptp(np.nonzero(tissue.any(1))), np.ptp(np.nonzero(tissue.any(0)))
        assert (rows > columns) == (example["label"] == 2), example["id"]


def test_split_positions_covers_and_separates():
    kept = list(range(100, 200))
    parts = split_positions(kept, 0.1, 0.2)
    assert [len(parts[name]) for name in ("train", "val", "test")] == [66, 10, 20]
    assert len(set().union(*parts.values())) == 96
