"""Conjugate-gradient steps: exact on quadratic functions, and of descent on others."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medfuncta_jax.conjugate_steps import conjugate_steps

SIZE = 7


def quadratics():
    """Two functions phi^T A phi / 2 - b^T phi with curvatures from 1e-4 to 1."""
    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.normal(size=(2, SIZE, SIZE)))[0]
    return jnp.asarray(np.einsum("bij,j,bkj->bik", axes, np.geomspace(1e-4, 1, SIZE), axes)), jnp.asarray(
        rng.normal(size=(2, SIZE))
    )


def quadratic(matrices, linear, latents):
    pulled = jnp.einsum("bij,bj->bi", matrices, latents)
    return pulled - linear, (latents * (pulled / 2 - linear)).sum(1)


@pytest.mark.parametrize("penalty", [0.0, 1e-3])
def test_a_quadratic_function_of_p_entries_takes_p_steps(penalty):
    matrices, linear = quadratics()
    found, losses = conjugate_steps(
        functools.partial(quadratic, matrices, linear), jnp.ones((2, SIZE)), penalty=jnp.full(2, penalty),
        steps=SIZE + 2,
    )  # fmt: skip
    exact = jnp.linalg.solve(matrices + 2 * penalty * jnp.eye(SIZE), linear[..., None])[..., 0]
    np.testing.assert_allclose(found, exact, rtol=1e-6)
    assert losses.shape == (2, SIZE + 2)
    np.testing.assert_allclose(losses[:, 0], quadratic(matrices, linear, jnp.ones((2, SIZE)))[1])


def test_a_step_uphill_is_taken_back():
    """0.57 is where the double well (x^2 - 1)^2 is all but flat in its gradient, so that the first step is far too
    long; one signal has no values there."""

    def double_well(latents):
        x = latents[:, 0]
        wall = jnp.where((x > 1.5) & (jnp.arange(2) == 0), jnp.nan, 1.0)
        return (4 * x * (x**2 - 1) * wall)[:, None], (x**2 - 1) ** 2 * wall

    found, losses = conjugate_steps(double_well, jnp.full((2, 1), 0.57), penalty=jnp.zeros(2), steps=40)
    assert np.isnan(losses[0]).any()
    assert losses[1].max() > losses[1, 0]
    np.testing.assert_allclose(found[:, 0], 1, rtol=1e-9)


def test_signals_do_not_touch_each_other():
    matrices, linear = quadratics()
    both, _ = conjugate_steps(
        functools.partial(quadratic, matrices, linear), jnp.ones((2, SIZE)), penalty=jnp.zeros(2), steps=4
    )
    alone, _ = conjugate_steps(
        functools.partial(quadratic, matrices[1:], linear[1:]), jnp.ones((1, SIZE)), penalty=jnp.zeros(1), steps=4
    )
    np.testing.assert_allclose(both[1:], alone, rtol=1e-12)


def test_an_end_stays_where_it_is():
    found, losses = jax.jit(
        lambda start: conjugate_steps(
            lambda latents: (jnp.zeros_like(latents), jnp.zeros(len(latents))), start, penalty=jnp.zeros(2), steps=3
        )
    )(jnp.ones((2, SIZE)))
    np.testing.assert_array_equal(found, 1)
    np.testing.assert_array_equal(losses, 0)
