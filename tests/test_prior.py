"""A Gaussian prior: the same network for standardised latents, and fits that stay where training latents are."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import medfuncta_jax as mf
from medfuncta_jax.measurements import steepness
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


def training_latents(*, rank=6):
    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.normal(size=(6, 6)))[0][:rank] * np.linspace(1, 2, rank)[:, None]
    return 0.3 + 0.2 * rng.normal(size=(40, rank)) @ axes


@pytest.mark.parametrize("variant", [{}, {"modulate_scale": True}], ids=["shift", "scale"])
def test_a_whitened_field_is_the_same_network_for_standardised_latents(variant):
    field, params = make_field(**variant)
    latents = training_latents()
    prior = mf.gaussian_prior(field, params, latents)
    standard = prior.standard(latents)
    np.testing.assert_allclose(prior.latents(standard), latents, rtol=1e-10)
    np.testing.assert_allclose(standard.mean(0), 0, atol=1e-10)
    spread = np.cov(standard.T)
    np.testing.assert_allclose(spread / spread[0, 0], np.eye(6), atol=0.05)  # the floor holds small variances down
    np.testing.assert_allclose(
        field_values(field, whitened(field, params, prior), standard, COORDS),
        field_values(field, params, latents, COORDS),
        rtol=1e-9,
    )


def test_step_sizes_keep_their_meaning():
    field, params = make_field()
    prior = mf.gaussian_prior(field, params, training_latents())
    everywhere = mf.operators.Points(mf.grid((32, 32)))
    steep = [
        jax.jit(lambda some: steepness(field, some, everywhere))(some)
        for some in (params, whitened(field, params, prior))
    ]
    np.testing.assert_allclose(steep[1], steep[0], rtol=1e-6)


@pytest.mark.parametrize("observed", ["points", "measurements"])
def test_a_fit_with_a_prior_is_one_of_the_whitened_field_and_stays_where_training_latents_are(observed):
    field, params = make_field()
    latents = training_latents(rank=2)
    prior = mf.gaussian_prior(field, params, latents)
    if observed == "points":
        given = {"coords": COORDS[::7]}
        signals = field_values(field, params, latents[:3], given["coords"])
    else:
        given = {"observe": mf.operators.AveragePooling((4, 4), (2, 2))}
        signals = mf.measure(field, params, latents[:3], given["observe"])
    more = {"steps": 60, "step_size": 5.0, "safeguard": True}
    fitted = mf.fit_latent(field, params, signals, prior=prior, **given, **more)
    alone = mf.fit_latent(field, whitened(field, params, prior), signals, **given, **more)
    np.testing.assert_array_equal(fitted.losses, alone.losses)
    np.testing.assert_array_equal(fitted.latents, prior.latents(alone.latents))
    assert (fitted.losses[:, -1] < 0.7 * fitted.losses[:, 0]).all()
    _, _, axes = np.linalg.svd(latents - latents.mean(0))
    outside = (np.asarray(fitted.latents) - latents.mean(0)) @ axes[2:].T
    plain = (np.asarray(mf.fit_latent(field, params, signals, **given, **more).latents) - latents.mean(0)) @ axes[2:].T
    assert np.linalg.norm(outside) < 0.05 * np.linalg.norm(plain)
    again = mf.fit_latent(field, params, signals, prior=prior, init=fitted.latents, **given, **more | {"steps": 1})
    np.testing.assert_allclose(again.losses[:, 0], np.square(
        (field_values(field, params, fitted.latents, given["coords"]) - signals) if observed == "points"
        else (mf.measure(field, params, fitted.latents, given["observe"]) - signals)
    ).reshape(3, -1).mean(1), rtol=1e-8)  # fmt: skip


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda field, params: mf.gaussian_prior(field, params, np.zeros((1, 6))), "at least two signals"),
        (lambda field, params: mf.gaussian_prior(field, params, np.zeros((5, 4))), r"must be \[n, 6\]"),
        (
            lambda field, params: mf.fit_latent(
                field, params, np.zeros((2, 6, 5, 1)), prior=mf.gaussian_prior(field, params, training_latents()),
                step_size=np.ones(6),
            ),
            "a scalar step_size",
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
