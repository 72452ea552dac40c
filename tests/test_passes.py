"""The four passes against the general rule, which they write out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import medfuncta_jax as mf
from medfuncta_jax.baselines.pyramid import PyramidField
from medfuncta_jax.passes import SirenField
from medfuncta_jax.point_field import PointField, Targets

KINDS = {
    "plain": {},
    "no residual": {"residual": False},
    "first layer": {"modulate_first_layer": True},
    "first layer, no residual": {"modulate_first_layer": True, "residual": False},
    "a latent grid": {"latent_dim": 24, "latent_grid": (2, 2)},
    "cells": {"latent_dim": 24, "latent_grid": (2, 2), "latent_interpolation": "nearest", "residual": False},
    "a pyramid": {"residual": False},
    "one layer": {"layers": 3},
}


@pytest.mark.some(5)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_passes_are_the_general_rule_written_out(kind, shared):
    """Gradient, full gradient and second order, whatever was kept; points of one signal or of all, weights of points or
    of values.
    """
    options = {"layers": 4, "width": 7, "latent_dim": 6, "omega_first": 15.0, "omega_last": 30.0} | KINDS[kind]
    model = mf.ModelSettings(**options)
    field = PyramidField(model, 2, 3, last_width=4) if kind == "a pyramid" else mf.Field(model, 2, 3)
    rng = np.random.default_rng(0)
    params, readers = field.split(field.init(jax.random.key(0), jnp.float64))
    siren = SirenField(field.module)
    features = siren.features(params, rng.uniform(-1, 1, (1 if shared else 4, 9, 2)))
    shares = rng.uniform(size=(4, 9, 1 if shared else 3))
    targets = Targets(jnp.asarray(rng.uniform(size=(4, 9, 3))), jnp.asarray(shares))
    latents, along = rng.normal(size=(2, 4, options["latent_dim"]))
    modulations, v = (field.modulations(readers, each) for each in (latents, along))
    arguments = params, modulations, features, targets

    def close(ours, general):
        for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(general), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-10 * max(1e-3, float(jnp.abs(other).max())))

    without_weights = jax.tree_util.Partial(lambda tree: (*tree[:2], tree[2]._replace(interpolation=None)))

    @jax.jit
    def written_out(*arguments):
        *gradient, kept = siren.gradient(*arguments)
        full = siren.full_gradient(*arguments)
        pulled = [siren.pull_gradient(*arguments, some, v) for some in (kept, siren.thin(kept), None)]
        return gradient, (full[0], without_weights(full[1])), [without_weights(each) for each in pulled]

    @jax.jit
    def general(*arguments):
        full = PointField.full_gradient(siren, *arguments)
        pulled = without_weights(PointField.pull_gradient(siren, *arguments, None, v))
        return PointField.gradient(siren, *arguments)[:2], (full[0], without_weights(full[1])), [pulled] * 3

    close(written_out(*arguments), general(*arguments))


def test_features_do_not_depend_on_params_by_interpolation_weights():
    """Why their cotangents may be left out: they are functions of coordinates alone."""
    field = mf.Field(mf.ModelSettings(layers=4, width=7, latent_dim=24, latent_grid=(2, 2)), 2, 1)
    params = field.split(field.init(jax.random.key(0)))[0]
    derivative = jax.jacobian(lambda params: field.points.features(params, jnp.zeros((1, 3, 2))).interpolation)(params)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(derivative))
