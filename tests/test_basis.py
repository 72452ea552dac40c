import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import medfuncta_jax as mf
from medfuncta_jax.basis import BasisField
from medfuncta_jax.chunks import default_chunk
from medfuncta_jax.passes import SirenField


@pytest.mark.some(1)
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("own_points", [True, False])
def test_the_sum_of_functions_is_the_network(residual, own_points):
    model = mf.ModelSettings(layers=3, width=10, latent_dim=5, omega_first=15.0, omega_last=30.0, residual=residual)
    field = mf.Field(model, coord_dims=2, channels=3)
    params, readers = field.split(field.init(jax.random.key(0), jnp.float64))
    modulations = field.modulations(readers, jnp.asarray(np.random.default_rng(0).normal(size=(4, 5))))
    coords = np.random.default_rng(1).uniform(-1, 1, (4 if own_points else 1, 7, 2))
    assert isinstance(field.points, BasisField)
    one, other = (
        kind.values(params, modulations, kind.features(params, coords))
        for kind in (field.points, SirenField(field.module))
    )
    np.testing.assert_allclose(one, other, rtol=1e-12)


@pytest.mark.some(2)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("steps", [1, 6])
def test_normal_equations_are_the_sum_over_points(channels, steps):
    """Few steps go through the points, many do not; losses, latents and the meta-gradient agree."""
    model = mf.ModelSettings(layers=3, width=10, latent_dim=5, omega_first=15.0, omega_last=30.0)
    field = mf.Field(model, coord_dims=2, channels=channels)
    params = field.init(jax.random.key(0), jnp.float64)
    signals = np.random.default_rng(0).uniform(size=(3, 8, 8, channels))
    assert field.points.summarises(3, 64, channels, steps) == (steps == 6)
    inner = mf.InnerLoop(steps=steps, step_size=0.3)
    every_point = np.broadcast_to(np.arange(64), (steps, 64))  # rows are given, so the points are summed over

    def outer(params, context):
        return mf.meta_loss(field, params, signals, context, inner=inner)

    for result in (
        jax.value_and_grad(outer),
        lambda params, context: mf.inner_loop(field, params, signals, context, inner=inner),
    ):
        one, other = (result(params, context) for context in (None, every_point))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-12), one, other)
    fits = [
        mf.fit_latent(field, params, signals, steps=steps, step_size=0.3, weights=w) for w in (None, np.ones((3, 64)))
    ]
    np.testing.assert_allclose(fits[0].latents, fits[1].latents, rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(fits[0].losses, fits[1].losses, rtol=1e-9)


def test_chunks_of_shared_points_do_not_shrink_with_the_batch():
    """Functions of a point are there once for all latents that share it: 64 latents take chunks nearly as long."""
    model = mf.ModelSettings(layers=3, width=64, latent_dim=5)
    one_layer, deep = (mf.Field(dataclasses.replace(model, layers=layers), 2, 3) for layers in (3, 4))
    few, many = (default_chunk(one_layer, batch, shared=True, accelerator=False) for batch in (1, 64))
    assert many > few / 3
    for field, shared in ((deep, True), (deep, False), (one_layer, False)):
        few, many = (default_chunk(field, batch, shared=shared, accelerator=False) for batch in (1, 64))
        assert many == few // 64
