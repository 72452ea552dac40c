import numpy as np
import pytest

import medfuncta_jax as mf


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
