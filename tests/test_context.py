import jax
import numpy as np
import pytest
from scipy import stats

from medfuncta_jax.context import context_size, random_context


@pytest.mark.parametrize("signals", [None, 3])
def test_subsets_are_fresh_and_without_replacement(signals):
    context = np.asarray(random_context(jax.random.key(0), points=40, selection_ratio=0.25, steps=5, signals=signals))
    assert context.shape == ((5, 10) if signals is None else (3, 5, 10))
    subsets = context.reshape(-1, 10)
    assert all(len(set(rows)) == 10 for rows in subsets)
    assert len({tuple(sorted(rows)) for rows in subsets}) == len(subsets)
    assert subsets.min() >= 0
    assert subsets.max() < 40


def test_every_point_is_equally_likely():
    context = random_context(jax.random.key(1), points=20, selection_ratio=0.25, steps=8000)
    counts = np.bincount(np.asarray(context).ravel(), minlength=20)
    assert stats.chisquare(counts).pvalue > 1e-3


def test_same_key_same_context():
    draw = [random_context(jax.random.key(7), points=30, selection_ratio=0.5, steps=2, signals=2) for _ in range(2)]
    np.testing.assert_array_equal(*draw)


def test_full_context_and_smallest():
    np.testing.assert_array_equal(
        random_context(jax.random.key(0), points=4, selection_ratio=1.0, steps=2), [[0, 1, 2, 3]] * 2
    )
    assert context_size(10, 0.01) == 1
    assert context_size(4096, 0.25) == 1024
