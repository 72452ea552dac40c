import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from medfuncta_jax.context import context_size, off_grid, random_context
from medfuncta_jax.coordinates import grid


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


def quadratic(coords):
    """[..., C] -> [B = 2, ..., D = 1]."""
    return jnp.stack([coords.sum(-1) ** 2 - coords[..., 0], 1 + coords[..., -1] ** 2])[..., None]


@pytest.mark.parametrize("shape", [(9,), (7, 8), (6, 1, 7)])
def test_signals_off_the_grid_are_interpolated_there(shape):
    """Cubic convolution is exact for polynomials of degree 2, two points from the border."""
    points, counts = jnp.asarray(grid(shape)), np.asarray(shape)
    inside = np.ones(shape, bool)
    for axis, n in enumerate(shape):
        if n > 1:
            inside &= np.moveaxis(np.isin(np.arange(n), range(2, n - 2)).reshape(-1, *[1] * (len(shape) - 1)), 0, axis)
    for seed in range(3):
        coords, signals = off_grid(jax.random.key(seed), quadratic(points), shape)
        moved = np.asarray(coords - points) * (counts - 1) / 2  # in spacings
        assert 0 < np.abs(moved).max() <= 0.5
        np.testing.assert_allclose(moved[inside.ravel()], moved[inside.ravel()][:1].repeat(inside.sum(), 0), atol=1e-12)
        assert np.abs(coords).max() <= 1
        expected = np.asarray(quadratic(coords))
        np.testing.assert_allclose(signals[:, inside.ravel()], expected[:, inside.ravel()], atol=1e-6)
