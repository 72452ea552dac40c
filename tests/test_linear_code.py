"""A linear start against principal components, and against derivatives of the whole field."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import medfuncta_jax as mf
from medfuncta_jax.baselines.pyramid import PyramidField
from medfuncta_jax.conditioning import phase_jacobian
from medfuncta_jax.field import STEP_SIZE
from medfuncta_jax.linear_code import halved

SHAPE = (5, 4)
COORDS = mf.grid(SHAPE)


def make_field(channels=1, latent_dim=6, width=128, **variant):
    model = mf.ModelSettings(
        **{"layers": 3, "width": width, "latent_dim": latent_dim, "omega_first": 12.0, "omega_last": 20.0, **variant}
    )
    return mf.Field(model, 2, channels)


def smooth_signals(count, channels=1, seed=0):
    """Signals of a few smooth functions with falling weights about a mean, and a little noise: [n, *SHAPE, D]."""
    draws = np.random.default_rng(seed)
    waves = np.stack([np.cos(COORDS @ wave + turn) for turn, wave in enumerate(draws.normal(0, 2, (9, 2)))])
    weights = draws.normal(size=(count, channels, 9)) / 1.4 ** np.arange(9)
    values = 0.4 + 0.05 * (1 + weights @ waves) + 0.002 * draws.normal(size=(count, channels, len(COORDS)))
    return values.transpose(0, 2, 1).reshape(count, *SHAPE, channels)


def start(field, signals, key, **options):
    """A start for which the default step of `fit_latent` is a Gauss-Newton step."""
    return mf.linear_start(field, signals, key, **{"step_size": STEP_SIZE, **options})


def principal_error(signals, size):
    """The mean squared error of a principal component analysis in float64."""
    flat = signals.reshape(len(signals), -1)
    values = np.linalg.svd(flat - flat.mean(0), compute_uv=False)
    return np.square(values[size:]).sum() / flat.size


@pytest.mark.parametrize(
    ("channels", "variant"),
    [(1, {}), (2, {"residual": False}), (1, {"layers": 5}), (2, {"modulate_first_layer": True})],
)
def test_one_step_is_the_projection_on_principal_components(channels, variant):
    """There are more units than values, so only the penalty keeps the code from that of a PCA, the best linear one."""
    field, signals = make_field(channels, **variant), smooth_signals(40, channels)
    params = start(field, signals, jax.random.key(0), updates=0)
    fit = mf.fit_latent(field, params, signals.astype(np.float32), steps=2)
    error, best = float(fit.losses[:, 1].mean()), principal_error(signals, 6)
    assert 0.99 * best < error < 1.1 * best + 1e-7
    assert float(fit.losses[:, 0].mean()) > 10 * error


def test_latents_begin_at_the_mean_signal():
    field, signals = make_field(2), smooth_signals(40, 2)
    params = start(field, signals, jax.random.key(0), updates=0)
    at_zero = field.apply(params, jnp.zeros((1, 6)), COORDS.astype(np.float32))[0]
    np.testing.assert_allclose(at_zero, signals.mean(0).reshape(20, 2), atol=2e-3)


def test_opposite_latents_change_a_signal_by_opposite_amounts():
    field, signals = make_field(layers=4), smooth_signals(40)
    params = start(field, signals, jax.random.key(0), updates=0, phase=0.05)
    latents = mf.fit_latent(field, params, signals[:8].astype(np.float32), steps=1).latents
    zero, there, back = (field.apply(params, each * latents, COORDS.astype(np.float32)) for each in (0, 1, -1))
    assert jnp.abs(there + back - 2 * zero).max() < 0.02 * jnp.abs(there - zero).max()


@pytest.mark.parametrize("step_size", [1e-2, 1.0])
def test_latents_of_the_signals_add_phases_of_the_size_asked_for(step_size):
    field, signals = make_field(), smooth_signals(60)
    params = start(field, signals, jax.random.key(0), updates=0, phase=0.03, step_size=step_size)
    latents = mf.fit_latent(field, params, signals.astype(np.float32), steps=1, step_size=step_size).latents
    layer = params["modulation_2"]
    phases = field.module.omega(2) * np.asarray(latents) @ np.asarray(layer["kernel"])
    assert np.sqrt(np.square(phases).mean()) == pytest.approx(0.03, rel=0.02)
    assert not np.any(layer["bias"])


def test_fewer_signals_than_entries_leave_a_code_that_fits_all_of_them():
    field, signals = make_field(latent_dim=16), smooth_signals(5)
    params = start(field, signals, jax.random.key(0), updates=2)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    fit = mf.fit_latent(field, params, signals.astype(np.float32), steps=2)
    assert float(fit.losses[:, 1].max()) < 1e-6
    unseen = smooth_signals(20, seed=3)
    fit = mf.fit_latent(field, params, unseen.astype(np.float32), steps=3)
    assert float(fit.losses[:, 2].mean()) < 0.15 * float(fit.losses[:, 0].mean())  # the other directions are useful


def test_updates_of_hidden_layers_make_a_better_code_of_few_units():
    field, signals = make_field(latent_dim=6, width=16), smooth_signals(80)
    losses, errors = [], []
    for updates in (0, 150):
        params = start(field, signals, jax.random.key(1), updates=updates, after=losses.append)
        errors.append(float(mf.fit_latent(field, params, signals.astype(np.float32), steps=2).losses[:, 1].mean()))
    assert len(losses) == 150
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:10])
    assert errors[1] < 0.8 * errors[0]


def test_a_start_is_that_of_its_key_and_takes_points_anywhere():
    field, signals = make_field(), smooth_signals(20)
    options = {"updates": 2, "coords": COORDS}
    flat = signals.reshape(20, -1, 1)
    one, same = (start(field, flat, jax.random.key(4), **options) for _ in range(2))
    other = start(field, flat, jax.random.key(5), **options)
    assert jax.tree.all(jax.tree.map(np.array_equal, one, same))
    assert not np.array_equal(one["layer_2"]["kernel"], other["layer_2"]["kernel"])
    on_grid = start(field, signals, jax.random.key(4), updates=2)
    assert jax.tree.all(jax.tree.map(np.array_equal, one, on_grid))


@pytest.mark.parametrize("variant", [{}, {"layers": 5}, {"layers": 4, "modulate_first_layer": True}])
def test_the_phase_jacobian_is_that_of_the_whole_field(variant):
    """Against differentiation of the field by the biases of its modulations, which shift phases by omega."""
    field = make_field(2, width=8, **variant)
    params = field.init(jax.random.key(3), jnp.float64)
    coords, zero = jnp.asarray(COORDS), jnp.zeros((1, 6))
    expected = []
    for position, name in enumerate(field.latent_layers()):

        def values(bias, name=name):
            return field.apply({**params, name: {**params[name], "bias": bias}}, zero, coords)[0]

        omega = field.module.omega(field.module.first_modulated + position)
        expected.append(jax.jacfwd(values)(params[name]["bias"]) / omega)
    np.testing.assert_allclose(
        phase_jacobian(field, params, coords), np.concatenate(expected, -1), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize(
    ("field", "message"),
    [
        (make_field(width=33), "model.width must be even, got 33"),
        (make_field(latent_dim=20, width=32), "model.width must be at least 40"),
        (make_field(modulate_scale=True), "model.modulate_scale=False"),
        (PyramidField(make_field(residual=False).model, 2, 1, 16), "train.start='random'"),
    ],
)
def test_fields_without_a_linear_start_are_refused(field, message):
    with pytest.raises(mf.SettingsError, match=message):
        start(field, smooth_signals(3), jax.random.key(0))


def test_half_a_field_has_half_its_units():
    field = make_field(layers=4)
    assert halved(field) == dataclasses.replace(field, model=dataclasses.replace(field.model, width=64))


def test_default_steps_from_a_tenth_of_the_points_do_not_diverge():
    field, signals = make_field(latent_dim=16), smooth_signals(40)
    params = mf.linear_start(field, signals, jax.random.key(0), updates=0)
    seen = np.random.default_rng(0).permutation(20)[:2]
    values = signals.reshape(40, 20, 1)[:, seen].astype(np.float32)
    losses = mf.fit_latent(field, params, values, coords=COORDS[seen], steps=100).losses
    assert float(losses[:, -1].max()) < 1e-5
    assert float((losses[:, 1:] - losses[:, :-1]).max()) < 1e-6


def test_signals_that_are_all_alike_are_held_by_the_mean():
    field, signals = make_field(), np.full((4, *SHAPE, 1), 0.3)
    params = mf.linear_start(field, signals, jax.random.key(0), updates=1)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    at_zero = field.apply(params, jnp.zeros((1, 6)), COORDS.astype(np.float32))
    np.testing.assert_allclose(at_zero, 0.3, atol=1e-3)


@pytest.mark.parametrize(
    ("signals", "options", "message"),
    [
        (np.zeros((3, *SHAPE, 1), np.uint8), {}, "signals must be floating"),
        (np.zeros((3, *SHAPE, 2)), {}, "must end in the field's 1 channel"),
        (np.array([0.1, np.nan])[:, None, None, None] * np.ones((*SHAPE, 1)), {}, "signal 1 holds values that are not"),
        (np.zeros((3, 20, 1)), {"coords": np.zeros((3, 20, 2))}, "the same for all signals"),
        (np.zeros((3, *SHAPE, 1)), {"updates": -1}, "updates must be at least 0"),
        (np.zeros((3, *SHAPE, 1)), {"phase": 0.0}, "phase above 0"),
    ],
)
def test_signals_and_options_out_of_range_are_refused(signals, options, message):
    with pytest.raises(ValueError, match=message):
        mf.linear_start(make_field(), signals, jax.random.key(0), **options)
