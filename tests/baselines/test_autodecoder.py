import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import medfuncta_jax as mf
from medfuncta_jax import meta_step
from medfuncta_jax.baselines import autodecoder
from medfuncta_jax.datasets.pipeline import batch_rows
from medfuncta_jax.latent_loss import latent_loss, latent_noise
from medfuncta_jax.methods import METHODS

FIELD = mf.Field(mf.ModelSettings(layers=4, width=16, latent_dim=6, omega_first=15.0, omega_last=15.0), 2, 1)
COORDS = mf.grid((6, 6))


def make(**train):
    train = {"method": "autodecoder", "steps": 200, "batch_size": 4, "learning_rate": 3e-3, "schedule": "constant",
             "latent_learning_rate": 1e-2, "weight_decay": 0.0, **train}  # fmt: skip
    settings = mf.Settings.from_dict({"data": {"source": "any"}, "train": train})
    state = METHODS[settings.train.method].init(FIELD, settings, jax.random.key(0), signals=10, dtype=jnp.float64)
    return settings, state, jax.jit(functools.partial(autodecoder.update, meta_step.Training(FIELD, settings, (6, 6))))


SIGNALS = np.random.default_rng(0).uniform(size=(10, 36, 1))


def test_only_the_latents_of_the_batch_move_first():
    _, state, update = make()
    assert state.trainable.latents.shape == (10, 6)
    rows = np.array([7, 2, 5, 0])
    after, metrics = update(state, SIGNALS[rows], jax.random.key(1), rows)
    moved = np.abs(np.asarray(after.trainable.latents)).max(axis=1) > 0
    assert sorted(np.flatnonzero(moved)) == [0, 2, 5, 7]
    values = FIELD.apply(state.trainable.field, jnp.zeros((4, 6)), COORDS)
    np.testing.assert_allclose(metrics["loss"], np.square(values - SIGNALS[rows]).mean(), rtol=1e-12)
    assert int(after.step) == 1


def test_signals_are_learned_with_their_latents():
    _, state, update = make()
    for step in range(200):
        rows = batch_rows(10, batch_size=4, seed=0, step=step)
        state, _ = update(state, SIGNALS[rows], jax.random.key(1), rows)
    values = FIELD.apply(state.trainable.field, state.trainable.latents, COORDS)
    own = np.square(values - SIGNALS).mean()
    swapped = np.square(values - np.roll(SIGNALS, 1, axis=0)).mean()
    assert own < 0.03 < SIGNALS.var() < swapped


def test_penalty_and_noise():
    latents = np.random.default_rng(1).normal(size=(4, 6))
    none, both = (make(**options)[0].train for options in ({}, {"latent_penalty": 0.5, "latent_noise": 0.1}))
    assert latent_noise(none, jax.random.key(2), latents.shape, latents.dtype) is None
    same, nothing = latent_loss(none, None, latents)
    assert same is latents
    assert nothing == 0
    noise = latent_noise(both, jax.random.key(2), latents.shape, latents.dtype)
    noisy, penalty = latent_loss(both, noise, latents)
    assert float(penalty) == pytest.approx(0.5 * np.square(latents).mean())
    expected = latents + 0.1 * np.asarray(jax.random.normal(jax.random.key(2), (4, 6), jnp.float64))
    np.testing.assert_allclose(noisy, expected)


@pytest.mark.some(1)
@pytest.mark.parametrize("method", ["meta", "autodecoder"])
def test_both_reach_the_outer_loss(method):
    losses = []
    for options in ({}, {"latent_penalty": 1.0}, {"latent_noise": 1.0}):
        settings, state, _ = make(**options, method=method)
        if method == "autodecoder":
            state = state._replace(trainable=state.trainable._replace(latents=jnp.ones((10, 6))))
        update = functools.partial(METHODS[method].update, meta_step.Training(FIELD, settings, (6, 6)))
        _, metrics = jax.jit(update)(state, SIGNALS[:4], jax.random.key(1), np.arange(4))
        losses.append(float(metrics["loss"]))
    if method == "autodecoder":
        assert losses[1] - losses[0] == pytest.approx(1.0)
    assert losses[1] > losses[0]
    assert abs(losses[2] - losses[0]) > 1e-6
