import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import medfuncta_jax as mf
from medfuncta_jax.siren import rounded_product

MODEL = mf.ModelSettings(layers=6, width=64, latent_dim=16)


def test_a_rounded_product_is_that_of_rounded_factors():
    rng = np.random.default_rng(0)
    x, kernel, slope = (rng.normal(size=shape).astype(np.float32) for shape in ((3, 5, 8), (8, 4), (3, 5, 4)))
    value, pullback = jax.vjp(rounded_product, x, kernel)
    dx, dkernel = pullback(slope)
    x, kernel, slope = (np.asarray(jnp.asarray(a, jnp.bfloat16), np.float64) for a in (x, kernel, slope))
    for actual, expected in (
        (value, x @ kernel),
        (dx, slope @ kernel.T),
        (dkernel, np.einsum("bnk,bnl->kl", x, slope)),
    ):
        assert actual.dtype == jnp.float32
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("remat", ["none", "layers"])
def test_bfloat16_products_barely_turn_the_meta_gradient(remat):
    signals, coords = np.random.default_rng(0).uniform(size=(2, 256, 1)), mf.grid((16, 16))
    params = mf.Field(MODEL, 2, 1).init(jax.random.key(0))
    slopes = []
    for products in ("float32", "bfloat16"):
        field = mf.Field(dataclasses.replace(MODEL, products=products), 2, 1)

        def loss(params, field=field):
            return mf.meta_loss(field, params, coords, signals, 3, step_size=0.1, remat=remat)

        slopes.append(jax.jit(jax.grad(loss))(params))
    difference = optax.tree.norm(jax.tree.map(jnp.subtract, *slopes))
    assert 0 < difference < 0.02 * optax.tree.norm(slopes[0])
