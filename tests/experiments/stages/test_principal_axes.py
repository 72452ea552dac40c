"""Principal axes against scikit-learn's, through either way of computing them."""

import numpy as np
import pytest

from experiments.stages.principal_axes import principal_axes


@pytest.mark.parametrize("count", [10, 60])  # fewer vectors than entries, and more
def test_they_are_those_of_scikit_learn(count):
    reference = pytest.importorskip("sklearn.decomposition").PCA(4, svd_solver="full")
    rng = np.random.default_rng(0)
    vectors, others = rng.uniform(size=(count, 30)), rng.uniform(size=(7, 30))
    found = principal_axes(vectors.astype(np.float32), 4)
    expected = reference.fit(vectors.astype(np.float32).astype(np.float64))
    np.testing.assert_allclose(found.mean, expected.mean_)
    np.testing.assert_allclose(found.shares, expected.explained_variance_ratio_)
    signs = np.sign((found.axes * expected.components_).sum(1))
    np.testing.assert_allclose(found.axes, signs[:, None] * expected.components_, atol=1e-9)
    np.testing.assert_allclose(found.scores(others), signs * expected.transform(others), atol=1e-9)


@pytest.mark.parametrize(("shape", "count"), [((6, 50), 5), ((50, 6), 6), ((9, 1), 1)])
def test_there_are_no_more_than_vectors_and_entries_allow(shape, count):
    vectors = np.random.default_rng(0).normal(size=shape)
    found = principal_axes(vectors, 20)
    assert found.axes.shape == (count, shape[1])
    np.testing.assert_allclose(found.axes @ found.axes.T, np.eye(count), atol=1e-12)
    assert found.shares.sum() == pytest.approx(1)
    np.testing.assert_allclose(found.mean + found.scores(vectors) @ found.axes, vectors, atol=1e-9)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_equal_vectors_have_axes_and_no_variance(shape):
    found = principal_axes(np.ones(shape), 2)
    assert found.shares.tolist() == [0, 0]
    assert np.isfinite(found.axes).all()


def test_the_largest_entry_of_an_axis_is_positive():
    for vectors in (np.random.default_rng(0).normal(size=shape) for shape in ((8, 20), (40, 20))):
        axes = principal_axes(vectors, 5).axes
        assert (axes.max(1) == np.abs(axes).max(1)).all()
