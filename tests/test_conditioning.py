"""Conditioned latents: the factor against a dense float64 Jacobian, and steps that are Gauss-Newton steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import medfuncta_jax as mf
from medfuncta_jax import meta_step
from medfuncta_jax.conditioning import check_conditioning, conditioned, gauss_newton_factor
from medfuncta_jax.field import STEP_SIZE
from medfuncta_jax.settings import InnerSettings
from medfuncta_jax.training_state import Trainable

COORDS = jnp.asarray(mf.grid((5, 4)))
KINDS = [{"layers": 3}, {"layers": 5}, {"layers": 4, "residual": False}, {"layers": 4, "modulate_first_layer": True}]


def make_field(channels=2, **variant):
    model = mf.ModelSettings(width=12, latent_dim=6, omega_first=12.0, omega_last=25.0, **variant)
    field = mf.Field(model, 2, channels)
    return field, field.init(jax.random.key(3), jnp.float64)


def dense_matrix(field, params, damping, weights):
    """H from the definition: J by differentiating the whole field, phases by differentiating modulations."""
    zero = jnp.zeros((1, field.model.latent_dim))
    jacobian = jax.jit(jax.jacfwd(lambda phi: field.apply(params, phi, COORDS)[0]))(zero)[:, :, 0]  # [N, D, P]
    share = weights / weights.sum() / field.channels
    matrix = 2 * jnp.einsum("n,ndp,ndq->pq", share, jacobian, jacobian)
    readers, phases = field.split(params)[1], []
    for k in range(field.module.first_modulated, field.model.layers):
        by_unit = jax.jacfwd(lambda phi, k=k: field.modulations(readers, phi)[f"modulation_{k}"][0])(zero)[
            :, 0
        ]  # [L, P]
        phases.append(field.module.omega(k) ** 2 * by_unit.T @ by_unit / len(by_unit))
    return matrix + damping * sum(phases) / len(phases)


@pytest.mark.some(2)
@pytest.mark.parametrize(
    ("kind", "weighted"), [(KINDS[0], False), (KINDS[1], True), (KINDS[2], False), (KINDS[3], True)]
)
def test_the_factor_is_that_of_the_definition(kind, weighted):
    field, params = make_field(**kind)
    weights = np.random.default_rng(0).uniform(0.1, 1, len(COORDS)) if weighted else None
    factor = jax.jit(lambda params: gauss_newton_factor(field, params, COORDS, damping=0.3, weights=weights))(params)
    expected = dense_matrix(field, params, 0.3, np.ones(len(COORDS)) if weights is None else weights)
    np.testing.assert_allclose(factor @ factor.T, expected, rtol=1e-5)  # what is left is the jitter
    np.testing.assert_array_equal(factor, np.tril(factor))


@pytest.mark.some(1)
@pytest.mark.parametrize("kind", KINDS[:2])
def test_a_conditioned_field_is_the_same_network_for_other_latents(kind):
    field, params = make_field(**kind)
    factor = jax.jit(lambda params: gauss_newton_factor(field, params, COORDS, damping=0.1))(params)
    latents = np.random.default_rng(1).normal(size=(3, 6))
    np.testing.assert_allclose(
        field.apply(conditioned(field, params, factor), latents @ factor, COORDS),
        field.apply(params, latents, COORDS),
        rtol=1e-9,
    )


def test_a_gradient_step_is_a_gauss_newton_step():
    """From phi = 0, on all points: phi = -H^-1 dL/dphi, whatever the scale of the latent is."""
    field, params = make_field(layers=4)
    signals = np.random.default_rng(2).uniform(size=(3, 20, 2))
    for scale in (1.0, 1e-3):
        scaled = mf.rescale_latent(field, params, scale)
        factor = gauss_newton_factor(field, scaled, COORDS, damping=0.5)
        steps = mf.fit_latent(field, conditioned(field, scaled, factor), signals, coords=COORDS, steps=1, step_size=1.0)
        stepped = steps.latents @ jnp.linalg.inv(factor)

        def loss(phi, scaled=scaled):
            return jnp.square(field.apply(scaled, phi, COORDS) - signals).mean((1, 2)).sum()

        expected = -jnp.linalg.solve(factor @ factor.T, jax.grad(loss)(jnp.zeros((3, 6))).T).T
        np.testing.assert_allclose(stepped, expected, rtol=1e-8, atol=1e-12)


def test_training_differentiates_through_the_factor():
    """The gradient of an update is that of a plain loop of Gauss-Newton steps."""
    field, params = make_field(layers=3)
    settings = mf.Settings.from_dict({
        "data": {"source": "any"}, "model": vars(field.model),
        "inner": {"steps": 2, "step_size": 0.5, "selection_ratio": 1.0, "gauss_newton_damping": 0.2},
        "train": {"batch_size": 3},
    })  # fmt: skip
    signals = jnp.asarray(np.random.default_rng(4).uniform(size=(3, 20, 2)))
    training = meta_step.Training(field, settings, (5, 4))
    sample = meta_step.Sample(COORDS, signals, None, None, None)
    trainable = Trainable(params, None)
    sample = sample._replace(latent_loss=meta_step.draw(
        training, meta_step.start(field, trainable, settings.train), signals, jax.random.key(0), None
    ).latent_loss)  # fmt: skip
    loss, gradient = jax.jit(lambda trainable: meta_step.loss_and_gradient(training, trainable, sample))(trainable)

    def plain(params):
        inverse = jnp.linalg.inv(gauss_newton_factor(field, params, COORDS, damping=0.2))
        metric = inverse.T @ inverse

        def losses(phi):
            return jnp.square(field.apply(params, phi, COORDS) - signals).mean((1, 2))

        phi = jnp.zeros((3, 6))
        for _ in range(2):
            phi = phi - 0.5 * jax.grad(lambda phi: losses(phi).sum())(phi) @ metric
        return losses(phi).mean()

    value, expected = jax.jit(jax.value_and_grad(plain))(params)
    np.testing.assert_allclose(loss, value, rtol=1e-10)
    for got, want in zip(jax.tree.leaves(gradient.field), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-7, atol=1e-10)


def test_the_exported_field_takes_the_trained_steps_by_default():
    field, params = make_field(layers=3)
    inner = InnerSettings(step_size=0.7, gauss_newton_damping=0.2)
    exported = meta_step.exported_params(field, Trainable(params, None), inner, COORDS)
    factor = gauss_newton_factor(field, params, COORDS, damping=0.2)
    signals = np.random.default_rng(5).uniform(size=(2, 5, 4, 2))
    default = mf.fit_latent(field, exported, signals, step_size=STEP_SIZE)
    trained = mf.fit_latent(field, conditioned(field, params, factor), signals, step_size=0.7)
    np.testing.assert_allclose(default.losses, trained.losses, rtol=1e-9)


@pytest.mark.parametrize("variant", [{"modulation_hidden": (5,)}, {"latent_grid": (2, 1)}, {"modulate_scale": True}])
def test_latents_that_modulations_are_not_linear_in_are_refused(variant):
    field, _ = make_field(layers=3, **variant)
    with pytest.raises(mf.SettingsError, match="need shift modulations"):
        check_conditioning(field)
