"""Batches for training: an endless shuffled stream with random access, read ahead by grain in a thread."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import grain
import numpy as np

from medfuncta_jax.datasets.dataset import Split

# Batches read ahead. One thread is fast enough; more threads would contend with the training step.
_AHEAD = 4

# grain needs a finite length; at 1000 batches a second this one lasts 300 million years.
_ENDLESS = 2**62


def batches(split: Split, *, batch_size: int, seed: int, start_step: int = 0) -> BatchStream:
    """An endless stream of training batches.

    Each pass over the split (epoch) has a new order; a batch may span two epochs, and repeats signals if the split is
    smaller than the batch. Batch number `step` is a function of `seed` and `step` alone, so a stream started at step s
    is the stream from 0 without its first s batches, bit for bit.

    Args:
      split: the signals.
      batch_size: B >= 1.
      seed: at least 0.
      start_step: the number of the first batch, at least 0.
    Returns:
      An iterator of float32 [B, *grid, D] in [0, 1]. It ends by `close()`, by leaving its `with`, or when it is
      deleted.
    Raises:
      ValueError: an argument out of range.
    """
    if batch_size < 1 or seed < 0 or start_step < 0 or len(split) < 1:
        raise ValueError(
            f"batch_size {batch_size} and the split's length {len(split)} must be at least 1, "
            f"seed {seed} and start_step {start_step} at least 0"
        )
    return BatchStream(_Batches(split, batch_size, seed, start_step))


class BatchStream(Iterator[np.ndarray]):
    """The result of `batches`."""

    _iterator: Iterator[np.ndarray] | None = None

    def __init__(self, source: _Batches):
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_AHEAD)
        self._iterator = iter(grain.MapDataset.source(source).to_iter_dataset(options))

    def __next__(self) -> np.ndarray:
        if self._iterator is None:
            raise StopIteration
        return next(self._iterator)

    def close(self) -> None:
        """Stop reading ahead; the stream then ends."""
        iterator, self._iterator = self._iterator, None
        if iterator is not None and hasattr(iterator, "close"):
            iterator.close()

    def __enter__(self) -> BatchStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class _Batches:
    """Random access to whole batches. grain's own shuffle takes 25 microseconds a signal, more than all other work."""

    def __init__(self, split: Split, batch_size: int, seed: int, start_step: int):
        self._split, self._size, self._seed, self._start = split, batch_size, seed, start_step

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, index: int) -> np.ndarray:
        rows = batch_rows(len(self._split), batch_size=self._size, seed=self._seed, step=self._start + index)
        return self._split.signals(rows)


def batch_rows(length: int, *, batch_size: int, seed: int, step: int) -> np.ndarray:
    """The rows, int [batch_size], of batch number `step` of `batches` in a split of `length`."""
    first = step * batch_size
    epochs, places = np.divmod(np.arange(first, first + batch_size), length)
    orders = {int(epoch): _epoch_order(length, seed, int(epoch)) for epoch in np.unique(epochs)}
    return np.concatenate([order[places[epochs == epoch]] for epoch, order in orders.items()])


@functools.lru_cache(maxsize=8)
def _epoch_order(length: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch, a permutation of `length` rows; the explicit bit generator keeps it stable."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(length)
