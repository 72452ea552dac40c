"""The flow on distributions that are known, and its training with a stop on the way."""

import jax
import numpy as np
import pytest

from medfuncta_jax import flow

SMALL = flow.FlowTraining(width=32, blocks=2, steps=400, batch_size=128, learning_rate=3e-3, decay=0.99)


@pytest.fixture(scope="module")
def vectors():
    """Two kinds: Gaussians with different means and scales, far from standard."""
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 400)
    spread = np.where(labels[:, None] == 0, 0.5, 2.0)
    return 10 + 6 * labels[:, None] + spread * rng.normal(size=(800, 2)), labels


@pytest.fixture(scope="module")
def states():
    return []


@pytest.fixture(scope="module")
def fitted(vectors, states):
    return flow.fit_flow(*vectors, classes=2, key=jax.random.key(0), training=SMALL, after=states.append)


def test_samples_of_each_class_have_its_mean_and_spread(fitted):
    noise = np.random.default_rng(1).normal(size=(2000, 2))
    for kind, (mean, spread) in enumerate(((10, 0.5), (16, 2.0))):
        samples = fitted.latents(noise, np.full(2000, kind))
        np.testing.assert_allclose(samples.mean(0), mean, atol=0.5)
        np.testing.assert_allclose(samples.std(0), spread, rtol=0.3)


def test_a_stop_on_the_way_changes_nothing(vectors, fitted, states):
    assert [int(state.step) for state in states] == [100, 200, 300, 400]
    resumed = flow.fit_flow(*vectors, classes=2, key=jax.random.key(0), training=SMALL, start=states[1])
    jax.tree.map(np.testing.assert_array_equal, resumed.params, fitted.params)
    assert resumed.loss == fitted.loss


def test_arrays_that_do_not_fit_are_refused(vectors, fitted):
    latents, labels = vectors
    key = jax.random.key(0)
    for some, kinds, message in (
        (latents[0], None, "must be finite"),
        (latents * np.nan, None, "must be finite"),
        (latents, labels[1:], r"labels \(799,\) must be \[800\]"),
        (latents, labels + 1, "whole numbers from 0 to 1"),
    ):
        with pytest.raises(ValueError, match=message):
            flow.fit_flow(some, kinds, classes=2, key=key, training=SMALL)
    with pytest.raises(ValueError, match="noise"):
        fitted.latents(np.zeros((3, 5)), np.zeros(3, int))
    with pytest.raises(ValueError, match="steps must be at least 1"):
        fitted.latents(np.zeros((3, 2)), np.zeros(3, int), steps=0)
