import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import medfuncta_jax as mf
from medfuncta_jax.coordinates import grid, inner_samples, resampled_affine


def test_ends_are_included_and_order_is_the_arrays():
    coords = mf.grid((3, 5))
    assert coords.shape == (15, 2)
    np.testing.assert_allclose(coords[0], [-1, -1])
    np.testing.assert_allclose(coords[-1], [1, 1])
    np.testing.assert_allclose(coords.reshape(3, 5, 2)[1, 4], [0, 1])


def test_single_point_axis_sits_in_the_middle():
    np.testing.assert_array_equal(mf.grid((1, 2)), [[0, -1], [0, 1]])


@pytest.mark.parametrize("shape", [(), (0,), (4, 0)])
def test_empty_grids_are_refused(shape):
    with pytest.raises(ValueError, match="at least one point"):
        mf.grid(shape)


SIZES = st.lists(st.tuples(st.integers(2, 9), st.integers(1, 9)), min_size=1, max_size=3)


@settings(deadline=None, derandomize=True, database=None)
@given(sizes=SIZES, seed=st.integers(0, 1000))
def test_a_resampled_grid_has_the_same_points_in_the_world(sizes, seed):
    """The affine of any other grid sends each of its coordinates in [-1, 1] to where the first grid's affine does."""
    shape, resolution = zip(*sizes, strict=True)
    rng = np.random.default_rng(seed)
    affine = np.vstack([rng.normal(size=(len(shape), len(shape) + 1)), np.eye(len(shape) + 1)[-1]])
    new = resampled_affine(affine, shape, resolution)
    indices = np.array(list(np.ndindex(*resolution)))
    old_indices = (grid(resolution) + 1) / 2 * (np.array(shape) - 1)
    np.testing.assert_allclose(
        np.insert(indices, len(shape), 1, 1) @ new.T, np.insert(old_indices, len(shape), 1, 1) @ affine.T, atol=1e-10
    )


def test_a_resampled_affine_of_the_same_grid_is_the_same():
    affine = np.arange(16.0).reshape(4, 4)
    np.testing.assert_array_equal(resampled_affine(affine, (4, 1, 3), (4, 1, 3)), affine)
    np.testing.assert_array_equal(resampled_affine(np.eye(4), (5, 5, 5), (9, 3, 1)), [
        [0.5, 0, 0, 0], [0, 2, 0, 0], [0, 0, 5, 2], [0, 0, 0, 1]
    ])  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "resolution"), [((4, 4), (4, 4, 4)), ((4, 4, 0), (1, 1, 1)), ((4, 1, 4), (4, 2, 4)), ((4, 4), (4, 4))]
)
def test_a_resampled_affine_of_grids_that_do_not_match(shape, resolution):
    with pytest.raises(ValueError, match=r"match|one point"):
        resampled_affine(np.eye(4), shape, resolution)


@pytest.mark.parametrize(("fine", "cut"), [(8, 0), (16, 1), (32, 2), (18, 1)])
def test_samples_beyond_the_outermost_of_the_coarse_grid_are_left_out(fine, cut):
    (part,), coords = inner_samples((8,), (fine,))
    assert part == slice(cut, fine - cut)
    step = 2 / 7 * 8 / fine
    np.testing.assert_allclose(np.diff(coords[:, 0]), step)
    np.testing.assert_allclose(coords[:, 0], -coords[::-1, 0], atol=1e-12)
    assert 1 - step < coords[-1, 0] <= 1 + 1e-12
