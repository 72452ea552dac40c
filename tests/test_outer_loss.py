import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import medfuncta_jax as mf
from medfuncta_jax.context import random_context

FIELD = mf.Field(mf.ModelSettings(layers=4, width=16, latent_dim=6, omega_first=15.0, omega_last=40.0), 2, 1)
COORDS = mf.grid((6, 6))


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    context = random_context(jax.random.key(2), points=36, selection_ratio=0.5, steps=3, signals=4)
    return FIELD.init(jax.random.key(0), jnp.float64), rng.uniform(size=(4, 36, 1)), context


@pytest.mark.parametrize("channel_loss", ["mean", "sum"])
@pytest.mark.parametrize("layers", [3, 4])
def test_meta_gradient_against_finite_differences(problem, channel_loss, layers):
    _, signals, context = problem
    field = mf.Field(mf.ModelSettings(layers=layers, width=16, latent_dim=6, omega_first=15.0, omega_last=40.0), 2, 1)
    params = field.init(jax.random.key(0), jnp.float64)

    def loss_at(params, step_size):
        return mf.meta_loss(field, params, COORDS, signals, context, step_size=step_size, channel_loss=channel_loss)

    slopes = jax.jit(jax.grad(loss_at, argnums=(0, 1)))(params, 0.5)
    value = jax.jit(loss_at)
    rng, step = np.random.default_rng(1), 1e-6
    for _ in range(3):
        direction = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), (params, 0.5 * jnp.ones(())))
        ahead, behind = (
            value(*jax.tree.map(lambda leaf, d, sign=sign: leaf + sign * step * d, (params, 0.5), direction))
            for sign in (1, -1)
        )
        expected = (ahead - behind) / (2 * step)
        actual = sum(jax.tree.leaves(jax.tree.map(lambda slope, d: (slope * d).sum(), slopes, direction)))
        np.testing.assert_allclose(actual, expected, rtol=2e-6)


def gradient(problem, context=None, **options):
    params, signals, own = problem
    context = own if context is None else context
    return jax.jit(
        jax.value_and_grad(
            lambda params: mf.meta_loss(FIELD, params, COORDS, signals, context, step_size=0.5, **options)
        )
    )(params)


def test_remat_keeps_the_less_the_more_it_computes_again():
    """Temporaries of the compiled gradient: a policy that finds nothing to keep would be another's equal."""
    coords, signals = mf.grid((16, 16)), np.zeros((2, 256, 1))
    field = mf.Field(mf.ModelSettings(layers=6, width=32, latent_dim=8), 2, 1)
    params = field.init(jax.random.key(0))

    def temporaries(remat):
        def loss(params):
            return mf.meta_loss(field, params, coords, signals, 10, step_size=0.1, remat=remat)

        return jax.jit(jax.grad(loss)).lower(params).compile().memory_analysis().temp_size_in_bytes

    none, layers, steps = (temporaries(remat) for remat in ("none", "layers", "steps"))
    assert steps < 0.7 * layers < 0.5 * none


def test_a_layer_is_never_made_again_from_all_below():
    """Range reductions in one fused loop of the compiled gradient, where products alone were kept."""
    coords, signals = mf.grid((16, 16)), np.zeros((2, 256, 1))
    field = mf.Field(mf.ModelSettings(layers=12, width=32, latent_dim=8), 2, 1)

    def loss(params):
        return mf.meta_loss(field, params, coords, signals, 10, step_size=0.1, remat="layers")

    compiled = jax.jit(jax.grad(loss)).lower(field.init(jax.random.key(0))).compile().as_text()
    sines = [loop.count("round-nearest") for loop in compiled.split("\n}")]
    assert sum(sines) >= 10
    assert max(sines) <= 4


@pytest.mark.parametrize("context", [None, 3])
@pytest.mark.parametrize("remat", ["layers", "steps"])
def test_remat_changes_nothing(problem, context, remat):
    none, other = (gradient(problem, context, remat=how) for how in ("none", remat))
    chex.assert_trees_all_close(none, other, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("context", [None, 3, "shared"])
@pytest.mark.parametrize("points", [1, 7, 18, 35])
def test_chunks_of_points_change_nothing(problem, context, points):
    context = problem[2][0] if context == "shared" else context  # of 18 points, which chunks of as many leave whole
    whole, chunks = (gradient(problem, context, points_per_chunk=count, remat="layers") for count in (0, points))
    chex.assert_trees_all_close(whole, chunks, rtol=1e-9, atol=1e-13)


def test_chunks_of_points_change_nothing_for_one_modulated_layer():
    field = mf.Field(mf.ModelSettings(layers=3, width=16, latent_dim=6, omega_first=15.0, omega_last=40.0), 2, 3)
    params, signals = field.init(jax.random.key(0), jnp.float64), np.random.default_rng(0).uniform(size=(2, 36, 3))
    for context in (3, np.arange(30).reshape(3, 10)):

        def loss(params, points, context=context):
            return mf.meta_loss(field, params, COORDS, signals, context, step_size=0.5, points_per_chunk=points)

        whole, chunks = (jax.grad(loss)(params, points) for points in (0, 10))
        chex.assert_trees_all_close(whole, chunks, rtol=1e-9, atol=1e-13)


def test_shared_context_equals_the_same_rows_for_every_signal(problem):
    rows = problem[2][0]
    shared, each = (gradient(problem, context) for context in (rows, jnp.broadcast_to(rows, (4, *rows.shape))))
    chex.assert_trees_all_close(shared, each, rtol=1e-9, atol=1e-13)


def test_a_number_of_steps_means_every_point(problem):
    everything = jnp.broadcast_to(jnp.arange(36), (3, 36))
    chex.assert_trees_all_close(gradient(problem, 3), gradient(problem, everything), rtol=1e-9, atol=1e-13)


def test_first_order_is_not_second_order(problem):
    exact, first = gradient(problem)[1], gradient(problem, first_order=True)[1]
    difference = optax.tree.norm(jax.tree.map(jnp.subtract, exact, first))
    assert difference > 1e-3 * optax.tree.norm(exact)


def test_channels_sum_is_mean_times_channels():
    field = mf.Field(FIELD.model, 2, 3)
    params, signals = field.init(jax.random.key(0), jnp.float64), np.random.default_rng(0).uniform(size=(2, 36, 3))
    losses = [
        mf.meta_loss(field, params, COORDS, signals, 3, step_size=step_size, channel_loss=how)
        for how, step_size in (("mean", 0.3), ("sum", 0.1))
    ]
    np.testing.assert_allclose(losses[1], 3 * losses[0], rtol=1e-12)


@pytest.mark.parametrize("context", [np.zeros((3, 3, 4), int), np.zeros(4, int)])
def test_misshapen_context_is_refused(problem, context):
    with pytest.raises(ValueError, match=r"context .* must be \[G, n\] or \[4, G, n\]"):
        mf.meta_loss(FIELD, problem[0], COORDS, problem[1], context, step_size=0.1)
