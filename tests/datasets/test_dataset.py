"""Splits: random access, memory and record by record, ranges."""

from pathlib import Path

import numpy as np
import pytest

from medfuncta_jax.datasets import dataset
from medfuncta_jax.datasets.dataset import DataError, Split, cache_root
from medfuncta_jax.units import Units


def _records(dtype):
    rng = np.random.default_rng(0)
    values = rng.integers(0, 256, (5, 4, 3, 1)) if dtype == "uint8" else rng.random((5, 4, 3, 1))
    return [
        {"signal": value.astype(dtype), "label": np.int64(i - 1), "id": f"s{i}".encode(), "affine": np.eye(4) * i}
        for i, value in enumerate(values)
    ]


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_split_reads_the_same_from_memory_and_from_records(dtype, limit, monkeypatch):
    monkeypatch.setattr(dataset, "MEMORY_LIMIT", limit)
    records = _records(dtype)
    split = Split(records, (4, 3, 1), dtype)
    scale = 255 if dtype == "uint8" else 1
    expected = np.stack([record["signal"] for record in records]).astype(np.float32) / np.float32(scale)
    one = split[-1]
    assert one["signal"].dtype == np.float32
    assert one["label"] == 3
    assert one["id"] == "s4"
    np.testing.assert_array_equal(one["affine"], np.eye(4) * 4)
    np.testing.assert_array_equal(one["signal"], expected[4])
    np.testing.assert_array_equal(split.signals([3, 1, 3]), expected[[3, 1, 3]])
    np.testing.assert_array_equal(split.signals(slice(1, None, 2)), expected[1::2])
    assert [example["label"] for example in split[1:3]] == [0, 1]
    assert len(list(split)) == len(split) == 5
    with pytest.raises(IndexError):
        split[5]


def test_a_caller_cannot_change_what_the_split_holds():
    split = Split(_records("float32"), (4, 3, 1), "float32")
    before = split.signals(slice(None)).copy()
    split[0]["signal"][:] = 7
    split.signals(slice(None))[:] = 7
    np.testing.assert_array_equal(split.signals(slice(None)), before)


def test_channels_that_were_not_recorded():
    records = [
        {"signal": np.zeros((4, 3), np.float32), "label": -1, "id": str(i), "units": Units(missing=missing).to_json()}
        for i, missing in enumerate([(), (1,), (), (0, 2)])
    ]
    split = Split(records, (4, 3), "float32")
    np.testing.assert_array_equal(split.recorded(), [[1, 1, 1], [1, 0, 1], [1, 1, 1], [0, 1, 0]])
    np.testing.assert_array_equal(split.recorded([3, 1, 3]), [[0, 1, 0], [1, 0, 1], [0, 1, 0]])
    assert split.complete(5).tolist() == [0, 2]
    assert split.complete(1).tolist() == [0]
    assert Split(records[::2], (4, 3), "float32").recorded() is None
    with pytest.raises(DataError, match="none of the 2 signals has every channel"):
        Split(records[1::2], (4, 3), "float32").complete(5)


def test_cache_root_honours_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_root("") == tmp_path / "medfuncta_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root("") == Path.home() / ".cache" / "medfuncta_jax"
    assert cache_root("~/x") == Path.home() / "x"
