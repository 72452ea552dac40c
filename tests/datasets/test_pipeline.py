"""The stream of batches: order from seed and step alone, epochs, closing, speed."""

import gc
import itertools
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from medfuncta_jax.datasets import Split, batches


def _split(n, size=2):
    """Signal i holds i / 255."""
    records = [{"signal": np.full((size, size, 1), i % 256, np.uint8), "label": 0, "id": str(i)} for i in range(n)]
    return Split(records, (size, size, 1), "uint8")


def _rows(stream, count):
    taken = [np.rint(batch[:, 0, 0, 0] * 255).astype(int) for batch in itertools.islice(stream, count)]
    stream.close()
    return taken


def test_restart_continues_the_same_stream_bit_for_bit():
    split = _split(10)
    with batches(split, batch_size=4, seed=3) as stream:
        expected = list(itertools.islice(stream, 12))[7:]
    with batches(split, batch_size=4, seed=3, start_step=7) as stream:
        for batch in expected:
            np.testing.assert_array_equal(next(stream), batch)
    assert expected[0].dtype == np.float32
    assert expected[0].shape == (4, 2, 2, 1)


def test_every_epoch_holds_every_signal_once_in_another_order():
    rows = np.concatenate(_rows(batches(_split(10), batch_size=4, seed=0), 10)).reshape(4, 10)
    for epoch in rows:
        assert sorted(epoch) == list(range(10))
    assert len({tuple(epoch) for epoch in rows}) == 4
    other = np.concatenate(_rows(batches(_split(10), batch_size=4, seed=1), 10)).reshape(4, 10)
    assert not np.array_equal(rows, other)


def test_split_smaller_than_the_batch():
    (rows,) = _rows(batches(_split(3), batch_size=8, seed=0), 1)
    assert sorted(rows[:3]) == sorted(rows[3:6]) == [0, 1, 2]
    assert len(rows) == 8


def test_far_step_is_as_near_as_the_first():
    split = _split(10)
    start = time.perf_counter()
    _rows(batches(split, batch_size=4, seed=0, start_step=10**9), 1)
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"seed": -1}, {"start_step": -1}])
def test_arguments_out_of_range(wrong):
    with pytest.raises(ValueError, match="must be at least 1"):
        batches(_split(3), **{"batch_size": 2, "seed": 0, "start_step": 0, **wrong})


def test_closing_and_dropping_end_the_thread():
    before = threading.active_count()
    closed, dropped = (batches(_split(10), batch_size=4, seed=0) for _ in range(2))
    next(closed), next(dropped)
    closed.close()
    closed.close()
    assert next(closed, None) is None
    del dropped
    gc.collect()
    for _ in range(50):
        if threading.active_count() <= before:
            break
        time.sleep(0.05)
    assert threading.active_count() <= before


def test_leaving_a_stream_open_does_not_hang_the_exit():
    code = (
        "import numpy as np; from medfuncta_jax.datasets import Split, batches\n"
        "split = Split([{'signal': np.zeros((2, 1), np.uint8), 'label': 0, 'id': 'a'}], (2, 1), 'uint8')\n"
        "stream = batches(split, batch_size=2, seed=0); next(stream)"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert done.stderr == ""


def test_error_while_reading_reaches_the_caller():
    class Broken(list):
        def __getitem__(self, i):
            raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        next(batches(Split(Broken([1]), (2, 1), "uint8"), batch_size=2, seed=0))


def test_a_batch_from_memory_is_quick():
    split = _split(4708, 28)
    with batches(split, batch_size=32, seed=0) as stream:
        next(stream)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            for _ in range(100):
                next(stream)
            times.append((time.perf_counter() - start) / 100)
    assert min(times) < 1e-3  # about 0.1 ms on an idle machine
