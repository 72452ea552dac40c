import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import medfuncta_jax as mf
from medfuncta_jax import inner_loop


@pytest.mark.parametrize("layers", [3, 4])
def test_pruned_contexts_hold_the_points_with_the_largest_slopes(layers):
    """Slopes of each point's error in the last layer one by one, and steps on the points chosen by them."""
    model = mf.ModelSettings(layers=layers, width=10, latent_dim=5, omega_first=15.0, omega_last=30.0)
    field = mf.Field(model, coord_dims=1, channels=2)
    params, last = field.init(jax.random.key(0), jnp.float64), f"layer_{layers}"
    coords, signals = mf.grid((12,)), np.random.default_rng(0).uniform(size=(3, 12, 2))

    def errors(layer, latents):
        return jnp.square(field.apply({**params, last: layer}, latents, coords) - signals).sum(-1)

    latents = jnp.zeros((3, 5))
    for _ in range(2):
        each = jax.jacobian(errors)(params[last], latents)
        norms = jnp.sqrt(sum(jnp.square(leaf).sum(range(2, leaf.ndim)) for leaf in jax.tree.leaves(each)))
        np.testing.assert_allclose(field.slope_norms(params, latents, coords, signals), norms, rtol=1e-10)
        chosen = np.zeros((3, 12))
        np.put_along_axis(chosen, np.argsort(-np.asarray(norms), axis=1)[:, :4], 1 / 8, axis=1)  # a mean of 4 x 2
        latents = latents - 0.3 * jax.grad(lambda x, part=chosen: (errors(params[last], x) * part).sum())(latents)
    pruned, _ = inner_loop.adapt(field, params, coords, signals, 2, step_size=0.3, pruned_to=4)
    np.testing.assert_allclose(pruned.latents, latents, rtol=1e-9, atol=1e-13)
    chunks, _ = inner_loop.adapt(field, params, coords, signals, 2, step_size=0.3, pruned_to=4, points_per_chunk=3)
    np.testing.assert_allclose(chunks.latents, latents, rtol=1e-9, atol=1e-13)


KINDS = {
    "shift": {},
    "scale": {"modulate_scale": True, "modulate_first_layer": True},
    "hidden": {"modulation_hidden": (6,)},
    "codebook": {"codebook": 4, "codebook_features": 2},
    "grid": {"latent_dim": 24, "latent_grid": (2, 2)},
    "basis": {"layers": 3},
}


@pytest.mark.parametrize("kind", KINDS)
def test_slopes_in_shared_weights_against_a_loop_without_any_of_ours(kind):
    """Automatic differentiation of the definition, a Python loop on `Field.apply`, for every kind of field."""
    options = {"layers": 5, "width": 8, "latent_dim": 6, "omega_first": 15.0, "omega_last": 30.0, **KINDS[kind]}
    field = mf.Field(mf.ModelSettings(**options), coord_dims=2, channels=2)
    params = field.init(jax.random.key(0), jnp.float64)
    rng = np.random.default_rng(0)
    coords, signals = mf.grid((4, 5)), rng.uniform(size=(3, 20, 2))
    context, alpha = rng.integers(20, size=(3, 2, 7)), jnp.asarray(0.2)

    def by_definition(params, alpha):
        def one(signal, steps):
            def loss(latent, rows):
                errors = jnp.square(field.apply(params, latent[None], coords[rows])[0] - signal[rows])
                return errors.mean()

            latent = jnp.zeros(options["latent_dim"])
            for rows in steps:
                latent = latent - alpha * jax.grad(loss)(latent, rows)
            return latent

        latents = jnp.stack([one(*pair) for pair in zip(jnp.asarray(signals), context, strict=True)])
        return jnp.square(latents).sum(), latents

    def ours(params, alpha, **settings):
        def loss(params, alpha, nudges):
            fit, readings = inner_loop.adapt(
                field, params, coords, signals, context, step_size=alpha, nudges=nudges, **settings
            )
            return jnp.square(fit.latents).sum(), (fit.latents, readings)

        nudges = inner_loop.no_nudges(field, steps=2, batch=3, dtype=jnp.float64)
        (slopes, of_alpha, back), (latents, readings) = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(
            params, alpha, nudges
        )
        readers = inner_loop.slopes_of_readers(field, params, readings, back)
        return (jax.tree.map(jnp.add, slopes, readers), of_alpha), latents

    expected = jax.jit(jax.grad(by_definition, argnums=(0, 1), has_aux=True))(params, alpha)
    for settings in ({}, {"remat": "steps", "points_per_chunk": 3}):
        actual = jax.jit(functools.partial(ours, **settings))(params, alpha)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-12), actual, expected)


def test_steps_are_those_of_fit():
    field = mf.Field(mf.ModelSettings(layers=4, width=16, latent_dim=6, omega_first=15.0, omega_last=40.0), 2, 1)
    params, signals = field.init(jax.random.key(0), jnp.float64), np.random.default_rng(0).uniform(size=(4, 36, 1))
    coords = mf.grid((6, 6))
    one, _ = inner_loop.adapt(field, params, coords, signals, 5, step_size=0.3)
    other = mf.fit_latent(field, params, signals, coords=coords, steps=5, step_size=0.3)
    chex.assert_trees_all_close(one, other, rtol=1e-10, atol=1e-13)
