import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medfuncta_jax.augmentation import resized_and_moved

LARGEST = 0.2


def ramps(shape):
    """The index along each axis, [B = C, N, 1]."""
    return jnp.stack([jnp.asarray(each, jnp.float64).ravel() for each in np.indices(shape)])[..., None]


@pytest.mark.parametrize("shape", [(40,), (24, 30)])
def test_a_signal_is_resized_about_its_centre_and_moved(shape):
    """Cubic convolution is exact for a ramp, so the result shows the point of the signal that each point reads."""
    change = jax.jit(lambda key: resized_and_moved(key, ramps(shape), shape, largest=LARGEST))
    factors, moves = [], []
    for seed in range(20):
        changed = np.asarray(change(jax.random.key(seed))).reshape(len(shape), *shape)
        for axis, n in enumerate(shape):
            read = np.moveaxis(changed[axis], axis, 0).reshape(n, -1)
            np.testing.assert_allclose(read, read[:, :1].repeat(read.shape[1], 1), atol=1e-4)
            read = read[:, 0]
            inside = (read > 2) & (read < n - 3)
            slope, start = np.polyfit(np.arange(n)[inside], read[inside], 1)
            np.testing.assert_allclose(read[inside], start + slope * np.arange(n)[inside], atol=1e-4)
            assert read.min() > -0.1  # the border continues
            assert read.max() < n - 0.9
            factors.append(1 / slope)
            moves.append(((n - 1) / 2 - start) / slope - (n - 1) / 2)
            assert abs(moves[-1]) <= LARGEST * n / 4 + 1e-3
    factors = np.asarray(factors)
    assert 1 / (1 + LARGEST) - 1e-4 <= factors.min() < 0.9
    assert 1.1 < factors.max() <= 1 + LARGEST + 1e-4
    assert min(moves) < 0 < max(moves)


def test_each_signal_has_its_own_change():
    signals = jnp.concatenate([ramps((30,))] * 3)
    changed = resized_and_moved(jax.random.key(0), signals, (30,), largest=LARGEST)
    assert not np.allclose(changed[0], changed[1])
    assert not np.allclose(changed[1], changed[2])
    np.testing.assert_array_equal(changed, resized_and_moved(jax.random.key(0), signals, (30,), largest=LARGEST))


def test_no_change_and_an_axis_of_one_point():
    signals = jnp.asarray(np.random.default_rng(0).normal(size=(2, 12, 3)))
    np.testing.assert_allclose(
        resized_and_moved(jax.random.key(0), signals, (3, 1, 4), largest=0.0), signals, atol=1e-6
    )
    flat = jnp.ones((2, 12, 3))
    np.testing.assert_allclose(resized_and_moved(jax.random.key(0), flat, (3, 1, 4), largest=0.3), flat, atol=1e-6)
