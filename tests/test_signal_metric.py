"""The metric is the mean of squared derivatives, and tells what a change of a latent does to its signal."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import medfuncta_jax as mf
from medfuncta_jax.baselines.patches import PatchField

MODELS = {
    "one modulated layer": {"layers": 3},
    "deep": {"layers": 5, "modulate_first_layer": True},
    "a grid of latents": {"layers": 4, "latent_grid": (2, 2)},
    "patches": {"layers": 4, "latent_grid": (2, 2), "latent_interpolation": "nearest"},
}
COORDS = mf.grid((5, 4))


@pytest.fixture(params=MODELS, scope="module")
def case(request):
    model = mf.ModelSettings(width=12, latent_dim=8, omega_first=5.0, omega_last=9.0, **MODELS[request.param])
    field = (PatchField if request.param == "patches" else mf.Field)(model, coord_dims=2, channels=2)
    params = field.init(jax.random.key(0), jnp.float64)
    return field, params, 0.1 * np.random.default_rng(0).normal(size=(6, 8))


@pytest.mark.some(2)
def test_it_is_the_mean_of_squared_derivatives(case):
    field, params, latents = case
    metric = mf.signal_metric(field, params, latents, COORDS, key=jax.random.key(0))  # 240 pairs: all there are
    slopes = jax.jacrev(lambda phi: mf.reconstruct(field, params, phi, COORDS))(jnp.asarray(latents))
    own = np.stack([slopes[i, :, :, i].reshape(-1, 8) for i in range(6)]).reshape(-1, 8)
    np.testing.assert_allclose(metric @ metric, own.T @ own / len(own), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(metric, metric.T, atol=1e-12)
    assert np.linalg.eigvalsh(metric).min() > -1e-12


def test_a_small_change_is_as_long_as_the_change_of_the_signal(case):
    field, params, latents = case
    metric = mf.signal_metric(field, params, latents, COORDS, key=jax.random.key(0))
    change = 1e-5 * np.random.default_rng(1).normal(size=8)
    before, after = (mf.reconstruct(field, params, each, COORDS) for each in (latents, latents + change))
    np.testing.assert_allclose(np.sum((metric @ change) ** 2), np.mean((after - before) ** 2), rtol=1e-3)


def test_a_draw_of_pairs_comes_near_to_all(case):
    field, params, latents = case
    every = mf.signal_metric(field, params, latents, COORDS, key=jax.random.key(0), pairs=240)
    drawn = [mf.signal_metric(field, params, latents, COORDS, key=jax.random.key(k), pairs=239) for k in (0, 0, 1)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])
    assert np.linalg.norm(drawn[0] - every) < 0.3 * np.linalg.norm(every)


@pytest.mark.parametrize(
    ("latents", "coords", "pairs", "message"),
    [
        (np.zeros((3, 7)), COORDS, None, r"latents \(3, 7\) must be \[B, 8\]"),
        (np.zeros((0, 8)), COORDS, None, "B at least 1"),
        (np.zeros((3, 8)), mf.grid((5,)), None, r"coords \(5, 1\) must be \[N, 2\]"),
        (np.zeros((3, 8)), COORDS, 0, "pairs must be at least 1, got 0"),
    ],
)
def test_what_does_not_fit_is_refused(latents, coords, pairs, message):
    field = mf.Field(mf.ModelSettings(layers=3, width=8, latent_dim=8), coord_dims=2, channels=1)
    params = field.init(jax.random.key(0))
    with pytest.raises(ValueError, match=message):
        mf.signal_metric(field, params, latents, coords, key=jax.random.key(0), pairs=pairs)
