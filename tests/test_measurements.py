"""Measurements of fields in chunks; fits of measurements against the method written down."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import medfuncta_jax as mf
from medfuncta_jax import measurements as ms
from medfuncta_jax import operators as ops
from tests import plain_field

DEEP = mf.ModelSettings(layers=4, width=16, latent_dim=6, omega_first=8.0, omega_last=20.0)
BASIS = mf.ModelSettings(layers=3, width=16, latent_dim=6, omega_first=8.0, omega_last=20.0)


def field_of(model, *, dims=2, channels=1):
    field = mf.Field(model, coord_dims=dims, channels=channels)
    return field, field.init(jax.random.key(1), jnp.float64)


OPERATORS = {
    "points": ops.Points(np.random.default_rng(1).uniform(-1, 1, (24, 2))),
    "pooling": ops.AveragePooling((12, 6), (3, 2)),
    "rows": ops.SliceProfile((12, 6), 0, 4),
    "columns": ops.SliceProfile((12, 6), 1, 3, width=1.5),
    "k-space": ops.KSpace.of_mask(np.random.default_rng(2).random((8, 6)) < 0.4),
    "projections": ops.Projections((8, 8), (0.0, 30.0, 75.0), 6, spacing=1.5, samples=10),
    "pooled k-space": ops.KSpace.of_mask(np.random.default_rng(2).random((4, 3)) < 0.5)
    @ ops.AveragePooling((12, 6), (3, 2)),
    "binned projections": ops.AveragePooling((2, 6), (1, 3)) @ ops.Projections((8, 8), (10.0, 50.0), 6),
    "squares": ops.Function(np.random.default_rng(3).uniform(-1, 1, (10, 2)), jnp.square, (10,)),
}


@pytest.mark.some(3)
@pytest.mark.parametrize(
    ("name", "model"),
    [(name, BASIS) for name in OPERATORS if name != "rows"]
    + [(name, DEEP) for name in ("projections", "pooled k-space")],
    ids=lambda given: given if isinstance(given, str) else f"{given.layers} layers",
)
def test_chunks_change_nothing(name, model):
    operator = OPERATORS[name]
    field, params = field_of(model)
    latents = np.random.default_rng(0).normal(size=(3, 6))
    whole = mf.measure(field, params, latents, operator)
    assert whole.shape == (3, *operator.shape, 1)
    plain = operator(field.apply(params, latents, jnp.asarray(operator.coords)), jnp.asarray(operator.coords))
    np.testing.assert_allclose(whole.reshape(plain.shape), plain, atol=1e-12)
    targets = np.random.default_rng(1).normal(size=plain.shape)

    def loss_and_gradient(chunk):
        @jax.jit
        def of(latents):
            loss = mf.measured_loss(field, params, operator, jnp.asarray(targets), points_per_chunk=chunk)
            losses, pull = jax.vjp(loss, latents)
            return losses, pull(jnp.ones_like(losses))[0]

        return of(latents)

    losses, gradient = loss_and_gradient(0)
    np.testing.assert_allclose(losses, np.square(plain - targets).mean((1, 2)), rtol=1e-10)
    chunk = 7  # less than a group of some, several groups of others
    parts = mf.measure(field, params, latents, operator, points_per_chunk=chunk)
    np.testing.assert_allclose(parts, whole, atol=1e-12)
    some, pulled = loss_and_gradient(chunk)
    np.testing.assert_allclose(some, losses, rtol=1e-9)
    np.testing.assert_allclose(pulled, gradient, rtol=1e-8, atol=1e-12)


@pytest.mark.some(2)
@pytest.mark.parametrize("name", ["pooled k-space", "projections", "squares"])
def test_a_fit_is_the_descent_written_down(name):
    """One signal, the network a point at a time, and weights that are noise."""
    operator = OPERATORS[name]
    field, params = field_of(BASIS)
    coords, count = jnp.asarray(operator.coords), math.prod(operator.shape)
    rng = np.random.default_rng(0)
    measurements, weights = rng.normal(size=(2, *operator.shape, 1)), rng.uniform(0.5, 2, (2, count))
    ratio = float(jax.jit(lambda: ms.step_ratio(field, params, operator))())
    found = mf.fit_latent(
        field, params, measurements, observe=operator, weights=weights, steps=3, step_size=0.02, init=np.ones((2, 6))
    )
    for i in range(2):

        def loss(latent, i=i):
            values = jax.vmap(lambda x: plain_field.value(field, params, latent, x))(coords)
            errors = jnp.square(operator(values[None], coords)[0] - measurements[i].reshape(-1, 1))[:, 0]
            return (weights[i] * errors).sum() / weights[i].sum()

        latent = jnp.ones(6)
        descent = jax.jit(jax.value_and_grad(loss))
        for step in range(3):
            value, gradient = descent(latent)
            np.testing.assert_allclose(found.losses[i, step], value, rtol=1e-9)
            latent = latent - ratio * 0.02 * gradient
        np.testing.assert_allclose(found.latents[i], latent, rtol=1e-9)


@pytest.mark.some(1)
@pytest.mark.parametrize("model", [DEEP, BASIS], ids=["deep", "basis"])
def test_units_of_measurements_change_no_latent(model):
    field, params = field_of(model)
    operator = ops.AveragePooling((12, 6), (3, 2))
    percent = ops.Function(operator.coords, _Scaled(operator, 100.0), operator.shape, linear=True)
    measurements = np.random.default_rng(0).uniform(size=(2, 4, 3, 1))
    one = mf.fit_latent(field, params, measurements, observe=operator, safeguard=True)
    other = mf.fit_latent(field, params, 100 * measurements, observe=percent, safeguard=True)
    np.testing.assert_allclose(other.latents, one.latents, rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(other.losses, 1e4 * one.losses, rtol=1e-5)


class _Scaled:
    def __init__(self, operator, factor):
        self.operator, self.factor = operator, factor

    def __call__(self, values):
        return self.factor * self.operator(values, None)


def test_what_is_masked_may_hold_anything():
    field, params = field_of(DEEP)
    operator = OPERATORS["pooling"]
    measurements = np.random.default_rng(0).uniform(size=(2, 4, 3, 1))
    weights = np.ones((2, 12))
    weights[:, 5] = 0
    one = mf.fit_latent(field, params, measurements, observe=operator, weights=weights)
    measurements.reshape(2, 12)[:, 5] = np.nan
    other = mf.fit_latent(field, params, measurements, observe=operator, weights=weights)
    np.testing.assert_array_equal(other.latents, one.latents)
    with pytest.raises(ValueError, match="signal 0 holds measurements that are not finite"):
        mf.fit_latent(field, params, measurements, observe=operator)


def test_a_safeguarded_fit_ends_no_worse_than_it_began_however_long_its_steps():
    field, params = field_of(DEEP)
    operator = OPERATORS["projections"]
    truth = np.random.default_rng(0).normal(size=(2, 6))
    measurements = mf.measure(field, params, truth, operator)
    fitted = mf.fit_latent(field, params, measurements, observe=operator, step_size=10.0, steps=40, safeguard=True)
    loss = mf.measured_loss(field, params, operator, measurements.reshape(2, -1, 1))
    assert (loss(fitted.latents) <= fitted.losses[:, 0]).all()
    assert (loss(fitted.latents) <= np.nanmin(fitted.losses, 1)).all()


@pytest.mark.parametrize("model", [DEEP, BASIS], ids=["deep", "basis"])
def test_weights_of_measurements_or_of_their_values(model):
    field, params = field_of(model, channels=2)
    operator, rng = OPERATORS["projections"], np.random.default_rng(0)
    latents = rng.normal(size=(2, 6))
    count = math.prod(operator.shape)
    seen = mf.measure(field, params, latents, operator).reshape(2, count, 2)
    measurements, weights = seen + rng.normal(size=seen.shape), rng.uniform(size=(2, count, 2))
    for given, of_values in ((weights, weights), (weights[..., 0], np.repeat(weights[..., :1], 2, -1))):
        loss = mf.measured_loss(field, params, operator, measurements, weights=given)
        errors = of_values * np.square(seen - measurements)
        np.testing.assert_allclose(loss(latents), errors.sum((1, 2)) / of_values.sum((1, 2)), rtol=1e-9)


def test_a_field_is_found_from_its_projections():
    field, params = field_of(mf.ModelSettings(layers=3, width=16, latent_dim=2, omega_first=8.0, omega_last=20.0))
    operator = ops.Projections((16, 16), tuple(np.linspace(0, 174, 12)), 23)
    truth = 0.1 * np.random.default_rng(0).normal(size=(2, 2))
    measurements = mf.measure(field, params, truth, operator)
    fitted = mf.fit_latent(field, params, measurements, observe=operator, steps=500, step_size=5.0, safeguard=True)
    wanted, found, start = (
        mf.reconstruct(field, params, latents, mf.grid((16, 16))) for latents in (truth, fitted.latents, 0 * truth)
    )
    assert np.square(found - wanted).mean() < 1e-3 * np.square(wanted - start).mean()


@pytest.mark.parametrize(
    ("measurements", "more", "message"),
    [
        (np.zeros((2, 4, 4, 1)), {}, r"signals \(2, 4, 4, 1\) must be \[B, 4, 3, 1\], the measurements of AveragePool"),
        (np.zeros((2, 4, 3, 1), int), {}, "must be floating measurements"),
        (np.zeros((2, 4, 3, 1)), {"coords": mf.grid((4, 3))}, "leave out coords"),
        (np.zeros((2, 4, 3, 1)), {"rescale_ratio": 0.5}, "leave out coords and rescale_ratio"),
        (np.zeros((2, 4, 3, 1)), {"weights": np.zeros((2, 12))}, "are all 0"),
        (np.zeros((2, 4, 3, 1)), {"init": np.zeros((3, 6))}, r"init \(3, 6\) must be \[2, 6\]"),
        (np.zeros((2, 4, 3, 1)), {"observe": np.mean}, "must be an operator"),
        (np.zeros((2, 2, 1, 1)), {"observe": ops.AveragePooling((4,), (2,))}, "must be"),
    ],
)
def test_measurements_that_do_not_fit_are_refused(measurements, more, message):
    field, params = field_of(DEEP)
    with pytest.raises(ValueError, match=message):
        mf.fit_latent(field, params, measurements, **{"observe": OPERATORS["pooling"]} | more)


@pytest.mark.parametrize("model", [DEEP, BASIS], ids=["deep", "basis"])
def test_a_field_observed_once_gives_the_same_fits(model):
    field, params = field_of(model)
    operator = OPERATORS["projections"]
    observed = mf.observed_field(field, params, operator)
    assert (observed.basis is None) == (model is DEEP)
    prior = mf.gaussian_prior(field, params, np.random.default_rng(1).normal(size=(40, 6)))
    measurements = np.random.default_rng(0).uniform(size=(2, *operator.shape, 1))
    for options in ({"safeguard": True}, {"prior": prior, "noise": 0.1}):
        one = mf.fit_latent(field, params, measurements, observe=operator, **options)
        other = mf.fit_latent(field, params, measurements, observe=observed, **options)
        np.testing.assert_array_equal(other.latents, one.latents)


def test_an_observed_field_is_of_its_params_alone():
    field, params = field_of(BASIS)
    operator = OPERATORS["pooling"]
    observed = mf.observed_field(field, params, operator)
    measurements = np.zeros((1, 4, 3, 1))

    def loss(params, observe):
        return mf.fit_latent(field, params, measurements, observe=observe, steps=2).losses[0, -1]

    copied = jax.tree.map(jnp.array, params)
    np.testing.assert_array_equal(loss(copied, observed), loss(params, operator))
    with pytest.raises(ValueError, match="computed for other params"):
        loss(field.init(jax.random.key(2), jnp.float64), observed)
    with pytest.raises(ValueError, match="computed for other params"):
        loss(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params), observed)
    with pytest.raises(ValueError, match="computed for other params"):  # this derivative would miss the basis
        jax.grad(loss)(params, observed)
    gradient = jax.grad(lambda params: loss(params, mf.observed_field(field, params, operator)))(params)
    jax.tree.map(np.testing.assert_array_equal, gradient, jax.grad(loss)(params, operator))
    with pytest.raises(ValueError, match="must be an operator"):
        mf.observed_field(field, params, observed)
