import jax.numpy as jnp
import numpy as np
import pytest

from medfuncta_jax.point_field import over_chunks, shares, take


@pytest.mark.some(8)
@pytest.mark.parametrize("size", [0, 1, 4, 7, 10, 11, 99])
@pytest.mark.parametrize("rows", [None, "shared", "own"])
@pytest.mark.parametrize("weighted", [0, 1, 2])
def test_sums_over_chunks_are_sums_over_points(size, rows, weighted):
    rng = np.random.default_rng(0)
    values = jnp.asarray(rng.normal(size=(3, 11, 2)))
    rows = {
        None: None,
        "shared": jnp.asarray(rng.permutation(11)[:10]),
        "own": jnp.asarray(rng.integers(11, size=(3, 10))),
    }[rows]
    points = 11 if rows is None else 10
    weights = jnp.asarray(rng.uniform(size=(3, points, weighted))) if weighted else jnp.full((1, 1, 1), 0.5)
    seen = []

    def part(rows, weights, given):
        some = take(values, rows)
        seen.append(some.shape[1])
        return {"sum": (weights * some).sum(1)}, some.sum() if given is None else some.sum() - given

    sums, stacked = over_chunks(part, rows, weights, points=points, size=size)
    expected = (jnp.broadcast_to(weights, (3, points, 2)) * take(values, rows)).sum(1)
    np.testing.assert_allclose(sums["sum"], expected, rtol=1e-12, atol=1e-14)
    assert max(seen) <= (size or points)
    _, again = over_chunks(part, rows, weights, points=points, size=size, given=stacked)
    np.testing.assert_allclose(again, 0, atol=1e-13)


def test_take_and_shares():
    array = jnp.arange(24.0).reshape(2, 4, 3)
    assert take(array, None) is array
    np.testing.assert_array_equal(take(array, jnp.asarray([2, 0])), array[:, [2, 0]])
    np.testing.assert_array_equal(take(array, jnp.asarray([[2, 0], [1, 1]]))[1], array[1, [1, 1]])
    np.testing.assert_array_equal(take(array[:1], jnp.asarray([[3, 0]])), array[:1, [3, 0]])
    signals = jnp.zeros((2, 4, 3))
    np.testing.assert_allclose(shares(None, 4, signals, "mean"), [[[1 / 12]]])
    np.testing.assert_allclose(shares(None, 4, signals, "sum"), [[[1 / 4]]])
    weights = jnp.asarray([[1.0, 3, 0, 0], [0, 0, 0, 0]])[..., None]
    expected = np.array([[0.25, 0.75, 0, 0], [0, 0, 0, 0]])[..., None]
    for loss, channels in (("sum", 1), ("mean", 3)):
        np.testing.assert_allclose(shares(weights, 4, signals, loss), expected / channels)
        repeated = jnp.broadcast_to(weights, (2, 4, 3))
        np.testing.assert_allclose(shares(repeated, 4, signals, loss), np.tile(expected / channels, 3))
