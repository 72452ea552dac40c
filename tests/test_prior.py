"""A Gaussian prior: the same network for standardised latents, and fits that stay where training latents are."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize

import medfuncta_jax as mf
from medfuncta_jax.prior import whitened

COORDS = jnp.asarray(mf.grid((6, 5)))


def make_field(**variant):
    model = mf.ModelSettings(
        **{"layers": 3, "width": 24, "latent_dim": 6, "omega_first": 9.0, "omega_last": 9.0} | variant
    )
    field = mf.Field(model, 2, 1)
    return field, field.init(jax.random.key(3), jnp.float64)


@functools.partial(jax.jit, static_argnums=0)
def field_values(field, params, latents, coords):
    return field.apply(params, latents, coords)


def training_latents(*, rank=6, spread=0.2):
    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.normal(size=(6, 6)))[0][:rank] * np.linspace(1, 2, rank)[:, None]
    return 0.3 + spread * rng.normal(size=(40, rank)) @ axes


@pytest.mark.parametrize("variant", [{}, {"modulate_scale": True}], ids=["shift", "scale"])
def test_a_whitened_field_is_the_same_network_for_standardised_latents(variant):
    field, params = make_field(**variant)
    latents = training_latents()
    prior = mf.gaussian_prior(field, params, latents)
    standard = prior.standard(latents)
    np.testing.assert_allclose(prior.latents(standard), latents, rtol=1e-10)
    np.testing.assert_allclose(standard.mean(0), 0, atol=1e-10)
    np.testing.assert_allclose(
        field_values(field, whitened(field, params, prior), standard, COORDS),
        field_values(field, params, latents, COORDS),
        rtol=1e-9,
    )


@pytest.mark.parametrize("count", [5, 40, 4000])
def test_the_covariance_is_that_of_ledoit_and_wolf(count):
    covariance = pytest.importorskip("sklearn.covariance", reason="scikit-learn is not installed")
    field, params = make_field()
    latents = np.random.default_rng(0).normal(size=(count, 6)) * np.geomspace(0.1, 1, 6) + 3
    prior = mf.gaussian_prior(field, params, latents)
    expected = covariance.LedoitWolf().fit(latents)
    assert expected.shrinkage_ > 1e-3
    np.testing.assert_allclose(prior.factor @ prior.factor.T, expected.covariance_, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(prior.mean, latents.mean(0), rtol=1e-12)


def seen(field, params, latents, given):
    """What `given` shows of the fields of latents, [B, N, 1]."""
    if "observe" in given:
        return mf.measure(field, params, latents, given["observe"]).reshape(len(latents), -1, 1)
    return field_values(field, params, latents, given["coords"])


def masked(batch, count):
    return np.random.default_rng(1).random((batch, count)) < 0.7


@pytest.mark.parametrize("channel_loss", ["mean", "sum"])
@pytest.mark.parametrize("observed", ["points", "masked points", "measurements"])
def test_the_fit_ends_at_the_most_probable_latent(observed, channel_loss):
    """Against BFGS on minus the logarithm of the posterior, in the latent itself."""
    field, params = make_field()
    latents, noise = training_latents(spread=0.05), 0.01  # little enough for one minimum
    prior = mf.gaussian_prior(field, params, latents)
    given = {"observe": mf.operators.AveragePooling((4, 4), (2, 2))} if observed == "measurements" else {
        "coords": COORDS[::5]
    }  # fmt: skip
    truth = seen(field, params, latents[:2], given)
    signals = np.asarray(truth) + noise * np.random.default_rng(2).normal(size=truth.shape)
    weights = masked(*signals.shape[:2]) if observed == "masked points" else np.ones(signals.shape[:2], bool)
    shape = (2, *given["observe"].shape, 1) if observed == "measurements" else signals.shape
    fitted = mf.fit_latent(
        field, params, signals.reshape(shape), prior=prior, noise=noise, weights=weights, steps=60,
        channel_loss=channel_loss, **given,
    )  # fmt: skip
    precision = np.linalg.inv(np.asarray(prior.factor @ prior.factor.T))

    @jax.jit
    def posterior(latent, signal, weight):
        apart = latent - latents.mean(0)
        misfit = (weight[:, None] * (seen(field, params, latent[None], given)[0] - signal) ** 2).sum()
        return misfit / (2 * noise**2) + apart @ precision @ apart / 2

    for found, signal, weight in zip(fitted.latents, signals, weights, strict=True):
        best = minimize(
            jax.value_and_grad(posterior), latents.mean(0), args=(signal, weight), jac=True, options={"gtol": 1e-6}
        )
        np.testing.assert_allclose(found, best.x, atol=1e-5 * np.abs(best.x).max())


@pytest.mark.parametrize("observed", ["points", "measurements"])
def test_a_fit_with_a_prior_stays_where_training_latents_are(observed):
    field, params = make_field()
    latents = training_latents(rank=2, spread=0.05)
    prior = mf.gaussian_prior(field, params, latents)
    given = {"coords": COORDS[::7]} if observed == "points" else {
        "observe": mf.operators.AveragePooling((4, 4), (2, 2))
    }  # fmt: skip
    shape = (3, *given["observe"].shape, 1) if observed == "measurements" else (3, -1, 1)
    signals = seen(field, params, latents[:3], given).reshape(shape)
    fitted = mf.fit_latent(field, params, signals, prior=prior, steps=8, **given)
    assert (fitted.losses.min(1) < 0.05 * fitted.losses[:, 0]).all()
    _, _, axes = np.linalg.svd(latents - latents.mean(0))
    more = {"steps": 60, "step_size": 5.0, "safeguard": True}
    plain = mf.fit_latent(field, params, signals, **given, **more)
    outside = [np.linalg.norm((np.asarray(some.latents) - latents.mean(0)) @ axes[2:].T) for some in (fitted, plain)]
    assert outside[0] < 0.05 * outside[1]
    again = mf.fit_latent(field, params, signals, prior=prior, init=fitted.latents, **given, steps=1)
    error = seen(field, params, fitted.latents, given) - signals.reshape(3, -1, 1)
    np.testing.assert_allclose(again.losses[:, 0], np.square(error).mean((1, 2)), rtol=1e-8)


def test_derivatives_of_a_fit_at_its_end_are_finite():
    """In float32, where the gradients of a fit that has converged are too small to be squared."""
    field, params = make_field()
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    prior = mf.gaussian_prior(field, params, training_latents(spread=0.05))
    signals = seen(field, params, jnp.tile(prior.mean, (2, 1)), {"coords": COORDS})

    @jax.jit
    def fitted(signals, noise):
        return mf.fit_latent(field, params, signals, coords=COORDS, prior=prior, noise=noise, steps=40).latents

    for some in (signals, signals + 0.01 * np.random.default_rng(0).normal(size=signals.shape).astype(np.float32)):
        for noise in (0.0, 0.02):
            _, tangent = jax.jvp(lambda signals, noise=noise: fitted(signals, noise), (some,), (jnp.ones_like(some),))
            gradient = jax.grad(lambda signals, noise=noise: fitted(signals, noise).sum())(some)
            assert np.isfinite(tangent).all()
            assert np.isfinite(gradient).all()


def test_each_signal_has_its_noise_and_one_that_is_not_seen_is_the_mean():
    field, params = make_field()
    prior = mf.gaussian_prior(field, params, training_latents(spread=0.05))
    signals = seen(field, params, training_latents(spread=0.05)[:3], {"coords": COORDS})
    more = {"coords": COORDS, "prior": prior, "steps": 30}
    together = mf.fit_latent(field, params, signals, noise=np.array([0.01, 0.1, 0.3]), **more)
    for row, noise in enumerate((0.01, 0.1, 0.3)):
        alone = mf.fit_latent(field, params, signals[row : row + 1], noise=noise, **more)
        np.testing.assert_allclose(together.latents[row], alone.latents[0], atol=1e-6)
    weights = jnp.ones((3, len(COORDS))).at[1].set(0)
    found = jax.jit(lambda weights: mf.fit_latent(field, params, signals, weights=weights, noise=0.1, **more))(weights)
    np.testing.assert_allclose(found.latents[1], prior.mean, rtol=1e-12)
    np.testing.assert_array_equal(found.losses[1], 0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda field, params: mf.gaussian_prior(field, params, np.zeros((2, 6))), "at least 3 signals"),
        (
            lambda field, params: mf.gaussian_prior(field, params, np.where(np.eye(6) == 1, np.nan, 1.0)),
            "latent 0 holds values that are not finite",
        ),
        (lambda field, params: mf.gaussian_prior(field, params, np.zeros((5, 4))), r"must be \[n, 6\]"),
        (lambda field, params: mf.gaussian_prior(field, params, np.ones((5, 6))), "all equal"),
        (
            lambda field, params: mf.fit_latent(
                field, params, np.zeros((2, 6, 5, 1)), prior=mf.gaussian_prior(field, params, training_latents()),
                rescale_ratio=0.5,
            ),
            "leave one of them out",
        ),
        (lambda field, params: mf.fit_latent(field, params, np.zeros((2, 6, 5, 1)), noise=0.1), "give prior= too"),
        (lambda field, params: mf.fit_latent(field, params, np.zeros((2, 6, 5, 1)), noise=-1.0), "at least 0"),
        (lambda field, params: mf.fit_latent(field, params, np.zeros((2, 6, 5, 1)), noise=np.ones(3)), "one number a"),
        (
            lambda field, params: mf.fit_latent(field, params, np.zeros((2, 6, 5, 1)), prior=training_latents()),
            "must be a GaussianPrior",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make(*make_field())


def test_fields_of_other_latents_are_refused():
    field, params = make_field(modulation_hidden=(9,))
    with pytest.raises(mf.SettingsError, match="linear in one latent vector"):
        mf.gaussian_prior(field, params, training_latents())
