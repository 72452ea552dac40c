import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import medfuncta_jax as mf

MODEL = mf.ModelSettings(layers=6, width=64, latent_dim=16)


@pytest.mark.some(1)
@pytest.mark.parametrize("remat", ["none", "layers"])
def test_bfloat16_products_barely_turn_the_meta_gradient(remat):
    signals = np.random.default_rng(0).uniform(size=(2, 16, 16, 1))
    inner = mf.InnerLoop(steps=3, step_size=0.1, remat=remat)
    params = mf.Field(MODEL, 2, 1).init(jax.random.key(0))
    gradients = []
    for products in ("float32", "bfloat16"):
        field = mf.Field(dataclasses.replace(MODEL, products=products), 2, 1)

        def loss(params, field=field):
            return mf.meta_loss(field, params, signals, None, inner=inner)

        gradients.append(jax.jit(jax.grad(loss))(params))
    difference = optax.tree.norm(jax.tree.map(jnp.subtract, *gradients))
    assert 0 < difference < 0.02 * optax.tree.norm(gradients[0])
