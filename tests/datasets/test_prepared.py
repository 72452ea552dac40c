"""Preparing: order, rebuilding, two jobs at once, kill -9 half way, no room."""

import json
import logging
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from medfuncta_jax.datasets import DataError, dataset, prepared
from medfuncta_jax.datasets.dataset import SPLITS, Example, Plan, PlannedSplit, Skipped, example_or_skipped
from medfuncta_jax.datasets.prepared import prepared_dataset

# A plan whose 50 training signals are the numbers 0 to 49; `pause` runs after the 25th.
PLAN = """
import numpy as np
from medfuncta_jax.datasets.dataset import Example, Plan, PlannedSplit
def make(pause=lambda: None, version=1):
    def examples():
        for i in range(50):
            if i == 25:
                pause()
            yield Example(np.full((4, 1), i, np.uint8), f"n{i}", label=i % 3)
    split = PlannedSplit(50, examples)
    return Plan("numbers", (4,), 1, "uint8", {name: split for name in ("train", "val", "test")}, {"version": version})
"""
_SPACE: dict = {}
exec(PLAN, _SPACE)
make = _SPACE["make"]


def _check(splits):
    for name in SPLITS:
        assert [example["id"] for example in splits[name]] == [f"n{i}" for i in range(50)]
        np.testing.assert_allclose(splits[name].signals(slice(None))[:, 0, 0], np.arange(50) / 255, rtol=1e-6)


def test_prepared_once_in_order_and_again_after_a_change(tmp_path):
    calls = []
    _check(prepared_dataset(make(lambda: calls.append(1)), tmp_path).splits)
    assert len(calls) == 3  # once a split
    _check(prepared_dataset(make(lambda: calls.append(1)), tmp_path).splits)
    assert len(calls) == 3
    prepared_dataset(make(lambda: calls.append(1), version=2), tmp_path)
    assert len(calls) == 6


def test_large_split_is_stored_in_parts_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(prepared, "PART_BYTES", 7 * 4)
    _check(prepared_dataset(make(), tmp_path).splits)
    assert len(list(tmp_path.glob("prepared/*/signals/1.0.0/*train*array_record*"))) == 8
    monkeypatch.setattr(dataset, "MEMORY_LIMIT", 0)
    _check(prepared_dataset(make(), tmp_path).splits)


def test_all_fields_come_back(tmp_path):
    rng = np.random.default_rng(0)
    signals, affines = rng.random((3, 2, 3, 4, 1)).astype(np.float32), rng.normal(size=(3, 4, 4))
    labels = np.array([[0, 1], [1, 1], [0, 0]])

    def examples():
        for i in range(3):
            yield Example(signals[i], f"é {i}.nii.gz", labels[i], affines[i])

    splits = {name: PlannedSplit(3, examples) for name in SPLITS}
    plan = Plan("all", (2, 3, 4), 1, "float32", splits, {}, ("a", "b"), "multi-label", affines=True)
    for i, example in enumerate(prepared_dataset(plan, tmp_path).splits["val"]):
        np.testing.assert_array_equal(example["signal"], signals[i])
        np.testing.assert_array_equal(example["label"], labels[i])
        np.testing.assert_array_equal(example["affine"], affines[i])
        assert example["affine"].dtype == np.float64
        assert example["id"] == f"é {i}.nii.gz"


def test_killed_half_way_leaves_nothing_that_is_taken_for_whole(tmp_path):
    code = PLAN + (
        "import sys, time\nfrom pathlib import Path\nfrom medfuncta_jax.datasets.prepared import prepared_dataset\n"
        "def pause():\n    print('half', flush=True)\n    time.sleep(60)\n"
        "prepared_dataset(make(pause), Path(sys.argv[1]))\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as job:
        assert job.stdout.readline() == b"half\n"
        os.kill(job.pid, signal.SIGKILL)
    folder = tmp_path / "prepared"
    assert [path for path in folder.iterdir() if path.name.startswith(".staging")]
    assert not [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    _check(prepared_dataset(make(), tmp_path).splits)
    assert not [path for path in folder.iterdir() if path.name.startswith(".staging")]


def test_two_jobs_at_once_prepare_once(tmp_path):
    code = PLAN + (
        "import sys, time\nfrom pathlib import Path\nfrom medfuncta_jax.datasets.prepared import prepared_dataset\n"
        "def pause():\n    print('half', flush=True)\n    time.sleep(0.3)\n"
        "assert len(prepared_dataset(make(pause), Path(sys.argv[1])).splits['train'][49:]) == 1\n"
    )
    command = [sys.executable, "-W", "error", "-c", code, str(tmp_path)]
    jobs = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    said = [job.communicate(timeout=60) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], said
    assert b"".join(out for out, _ in said).count(b"half") == 3
    assert [err for _, err in said] == [b"", b""]  # no progress bars, no chatter


def test_source_that_fails_leaves_nothing(tmp_path):
    def fail():
        raise DataError("x.nii.gz: broken")

    with pytest.raises(DataError, match=r"^x\.nii\.gz: broken$"):
        prepared_dataset(make(fail), tmp_path)
    assert not [path for path in (tmp_path / "prepared").iterdir() if path.is_dir()]


def test_no_room_or_no_right_to_write_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot write prepared data \(Not a directory\).*cache_dir=DIR"):
        prepared_dataset(make(), tmp_path / "file" / "cache")
    code = PLAN + (
        "import resource, sys\nfrom pathlib import Path\nimport tensorflow_datasets\n"
        "from medfuncta_jax.datasets import DataError\nfrom medfuncta_jax.datasets.prepared import prepared_dataset\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))\n"
        "try:\n    prepared_dataset(make(), Path(sys.argv[1]))\nexcept DataError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert "cannot write prepared data" in done.stdout, done.stderr
    assert "cache_dir=DIR" in done.stdout
    assert done.stdout.count("\n") == 1
    assert not [path for path in (tmp_path / "prepared").iterdir() if path.is_dir()]


def test_damaged_prepared_folder_is_named(tmp_path):
    prepared_dataset(make(), tmp_path)
    (record_file,) = tmp_path.glob("prepared/*/signals/1.0.0/*train_00000.array_record*")
    record_file.write_bytes(record_file.read_bytes()[:20])
    with pytest.raises(DataError, match=r"prepared data is damaged .*remove this folder"):
        prepared_dataset(make(), tmp_path)


def test_empty_split_is_named(tmp_path):
    plan = make()
    empty = PlannedSplit(0, lambda: iter(()))
    plan = Plan("numbers", (4,), 1, "uint8", {**plan.splits, "val": empty}, {})
    with pytest.raises(DataError, match="the val split is empty"):
        prepared_dataset(plan, tmp_path)


def _with_bad(bad, length=50):
    """A plan of `length` numbers a split, of which `bad` (by split) cannot be made."""

    def example(split, i):
        if i in bad.get(split, ()):
            raise DataError(f"/data/{split} {i}.png: truncated\nimage")
        return Example(np.full((4, 1), i, np.uint8), f"{split} {i}", label=i)

    def examples(split):
        for i in range(length):
            yield example_or_skipped(f"{split} {i}", lambda i=i: example(split, i))

    splits = {name: PlannedSplit(length, lambda name=name: examples(name)) for name in SPLITS}
    return Plan("numbers", (4,), 1, "uint8", splits, {"bad": {name: list(some) for name, some in bad.items()}})


@pytest.mark.parametrize("part_bytes", [prepared.PART_BYTES, 7 * 4])
@pytest.mark.parametrize("bad", [{"train": [3]}, {"train": range(1, 50), "test": [0, 49]}, {"val": range(40)}])
def test_bad_signals_are_skipped_listed_and_change_no_other(tmp_path, monkeypatch, part_bytes, bad):
    monkeypatch.setattr(prepared, "PART_BYTES", part_bytes)
    skipped = {f"{name} {i}": f"/data/{name} {i}.png: truncated image" for name in SPLITS for i in bad.get(name, ())}
    for _ in range(2):  # prepared, and read again
        data = prepared_dataset(_with_bad(bad), tmp_path)
        assert data.about["skipped"] == skipped
        for name in SPLITS:
            kept = [i for i in range(50) if i not in bad.get(name, ())]
            assert [one["id"] for one in data.splits[name]] == [f"{name} {i}" for i in kept]
            np.testing.assert_allclose(data.splits[name].signals(slice(None))[:, 0, 0], np.array(kept) / 255, rtol=1e-6)
    (stored,) = tmp_path.glob("prepared/*/signals/1.0.0/metadata.json")
    assert json.loads(stored.read_text())["skipped"] == skipped


def test_few_skipped_signals_are_logged_one_by_one_and_many_are_counted(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        prepared_dataset(_with_bad({"train": range(30), "val": [7]}), tmp_path)
    lines = [record.getMessage() for record in caplog.records]
    assert lines[:2] == [f"skipped: /data/train {i}.png: truncated image" for i in range(2)]
    assert len(lines) == 21
    assert lines[20].startswith("31 of 150 signals were skipped, as they cannot be used; ")
    assert lines[20].endswith("metadata.json lists them")
    caplog.clear()
    prepared_dataset(_with_bad({"train": range(30), "val": [7]}), tmp_path)
    assert [record.getMessage() for record in caplog.records] == lines[20:]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (
            dict.fromkeys(SPLITS, range(50)),
            "the train split is empty, for none of its 50 signals can be used; the first: /data/train 0.png: truncated",
        ),
        (
            {"train": range(1, 50), "val": range(27)},
            "more than half of the 150 signals .*: /data/train 1.png: truncated",
        ),
        ({"val": range(50)}, "the val split is empty, for none of its 50 signals can be used; the first: /data/val 0"),
        ({"train": [1], "test": range(50)}, "the test split is empty, for none .*; the first: /data/test 0.png"),
    ],
)
def test_too_many_bad_signals_are_refused(tmp_path, bad, message):
    with pytest.raises(DataError, match=message) as caught:
        prepared_dataset(_with_bad(bad), tmp_path)
    assert len(str(caught.value).splitlines()) == 1
    assert not [path for path in (tmp_path / "prepared").iterdir() if path.is_dir()]


def test_nothing_is_made_beyond_the_signal_that_is_refused(tmp_path):
    made = []

    def examples():
        for i in range(50):
            made.append(i)
            yield Skipped(f"n{i}", f"{i}.png: broken")

    splits = {name: PlannedSplit(length, examples) for name, length in zip(SPLITS, (50, 3, 3), strict=True)}
    with pytest.raises(DataError, match="more than half of the 56 signals"):
        prepared_dataset(Plan("numbers", (4,), 1, "uint8", splits, {}), tmp_path)
    assert made == list(range(29))
