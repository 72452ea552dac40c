"""Preparing: order, rebuilding, two jobs at once, kill -9 half way, no room."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from medfuncta_jax.datasets import DataError, dataset, prepared
from medfuncta_jax.datasets.dataset import SPLITS, Example, Plan, PlannedSplit
from medfuncta_jax.datasets.prepared import prepared_splits

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
    _check(prepared_splits(make(lambda: calls.append(1)), tmp_path))
    assert len(calls) == 3  # once a split
    _check(prepared_splits(make(lambda: calls.append(1)), tmp_path))
    assert len(calls) == 3
    prepared_splits(make(lambda: calls.append(1), version=2), tmp_path)
    assert len(calls) == 6


def test_large_split_is_stored_in_parts_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(prepared, "PART_BYTES", 7 * 4)
    _check(prepared_splits(make(), tmp_path))
    assert len(list(tmp_path.glob("prepared/*/signals/1.0.0/*train*array_record*"))) == 8
    monkeypatch.setattr(dataset, "MEMORY_LIMIT", 0)
    _check(prepared_splits(make(), tmp_path))


def test_all_fields_come_back(tmp_path):
    rng = np.random.default_rng(0)
    signals, affines = rng.random((3, 2, 3, 4, 1)).astype(np.float32), rng.normal(size=(3, 4, 4))
    labels = np.array([[0, 1], [1, 1], [0, 0]])

    def examples():
        for i in range(3):
            yield Example(signals[i], f"é {i}.nii.gz", labels[i], affines[i])

    splits = {name: PlannedSplit(3, examples) for name in SPLITS}
    plan = Plan("all", (2, 3, 4), 1, "float32", splits, {}, ("a", "b"), "multi-label", affines=True)
    for i, example in enumerate(prepared_splits(plan, tmp_path)["val"]):
        np.testing.assert_array_equal(example["signal"], signals[i])
        np.testing.assert_array_equal(example["label"], labels[i])
        np.testing.assert_array_equal(example["affine"], affines[i])
        assert example["affine"].dtype == np.float64
        assert example["id"] == f"é {i}.nii.gz"


def test_killed_half_way_leaves_nothing_that_is_taken_for_whole(tmp_path):
    code = PLAN + (
        "import sys, time\nfrom pathlib import Path\nfrom medfuncta_jax.datasets.prepared import prepared_splits\n"
        "def pause():\n    print('half', flush=True)\n    time.sleep(60)\n"
        "prepared_splits(make(pause), Path(sys.argv[1]))\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as job:
        assert job.stdout.readline() == b"half\n"
        os.kill(job.pid, signal.SIGKILL)
    folder = tmp_path / "prepared"
    assert [path for path in folder.iterdir() if path.name.startswith(".staging")]
    assert not [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    _check(prepared_splits(make(), tmp_path))
    assert not [path for path in folder.iterdir() if path.name.startswith(".staging")]


def test_two_jobs_at_once_prepare_once(tmp_path):
    code = PLAN + (
        "import sys, time\nfrom pathlib import Path\nfrom medfuncta_jax.datasets.prepared import prepared_splits\n"
        "def pause():\n    print('half', flush=True)\n    time.sleep(0.3)\n"
        "assert len(prepared_splits(make(pause), Path(sys.argv[1]))['train'][49:]) == 1\n"
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
        prepared_splits(make(fail), tmp_path)
    assert not [path for path in (tmp_path / "prepared").iterdir() if path.is_dir()]


def test_no_room_or_no_right_to_write_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot write prepared data \(Not a directory\).*cache_dir=DIR"):
        prepared_splits(make(), tmp_path / "file" / "cache")
    code = PLAN + (
        "import resource, sys\nfrom pathlib import Path\nimport tensorflow_datasets\n"
        "from medfuncta_jax.datasets import DataError\nfrom medfuncta_jax.datasets.prepared import prepared_splits\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))\n"
        "try:\n    prepared_splits(make(), Path(sys.argv[1]))\nexcept DataError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert "cannot write prepared data" in done.stdout, done.stderr
    assert "cache_dir=DIR" in done.stdout
    assert done.stdout.count("\n") == 1
    assert not [path for path in (tmp_path / "prepared").iterdir() if path.is_dir()]


def test_damaged_prepared_folder_is_named(tmp_path):
    prepared_splits(make(), tmp_path)
    (record_file,) = tmp_path.glob("prepared/*/signals/1.0.0/*train_00000.array_record*")
    record_file.write_bytes(record_file.read_bytes()[:20])
    with pytest.raises(DataError, match=r"prepared data is damaged .*remove this folder"):
        prepared_splits(make(), tmp_path)


def test_empty_split_is_named(tmp_path):
    plan = make()
    empty = PlannedSplit(0, lambda: iter(()))
    plan = Plan("numbers", (4,), 1, "uint8", {**plan.splits, "val": empty}, {})
    with pytest.raises(DataError, match="the val split is empty"):
        prepared_splits(plan, tmp_path)
