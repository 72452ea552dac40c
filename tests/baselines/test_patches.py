import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import medfuncta_jax as mf
from medfuncta_jax import meta_step
from medfuncta_jax.baselines import patches

CASES = [((64, 64), (2, 2)), ((28, 28), (2, 3)), ((187,), (6,)), ((9, 8, 7), (2, 3, 1)), ((5, 1), (5, 1))]


@pytest.mark.parametrize(("shape", "cells"), CASES)
def test_a_window_is_a_piece_of_the_signal_in_the_coordinates_of_a_cell(shape, cells):
    """A signal that holds its own coordinates x: within a window, u = m x + a constant, and u is in [-1, 1]."""
    signal = mf.grid(shape).reshape(1, *shape, len(shape))
    signals = np.repeat(signal, 40, axis=0)
    windows, coords = patches.random_patches(jax.random.key(0), signals, latent_grid=cells)
    assert windows.shape == (40, np.prod(patches.window(shape, cells)), len(shape))
    assert np.abs(coords).max() <= 1 + 1e-12
    for axis, count in enumerate(cells):
        if shape[axis] > 1:
            rest = coords[None, :, axis] - count * windows[..., axis]
            np.testing.assert_allclose(rest, np.broadcast_to(rest[:, :1], rest.shape), atol=1e-9)
    # Every position a window can have is drawn.
    starts = {tuple(np.round(window.min(0), 6)) for window in np.asarray(windows)}
    assert len(starts) > 1 or all(n == -(-n // m) for n, m in zip(shape, cells, strict=True))


def test_windows_have_the_published_size():
    assert patches.window((64, 64), (2, 2)) == (32, 32)


@pytest.mark.parametrize("shape", [(64,), (45,), (28,)])
def test_coordinates_of_windows_cover_those_of_the_cells(shape):
    """What a whole signal asks of the cells lies within a spacing of what training has shown."""
    shown = np.concatenate(
        [
            np.asarray(patches.random_patches(jax.random.key(i), np.zeros((1, *shape, 1)), latent_grid=(2,))[1])
            for i in range(40)
        ]
    )
    x = mf.grid(shape)
    asked = np.where(x < 0, 2 * x + 1, 2 * x - 1)
    assert shown.min() <= asked.min() + 1e-9 + 4 / (shape[0] - 1)
    gaps = np.abs(asked - shown[:, 0]).min(axis=1)
    assert gaps.max() < 0.25 * 4 / (shape[0] - 1)


def test_patches_without_points_are_refused():
    with pytest.raises(mf.SettingsError, match=r"model.latent_grid \(4, 9\) makes patches without points"):
        patches.window((8, 8), (4, 9))


def patched(learned="none", places=(2, 2)):
    model = mf.ModelSettings(
        layers=4, width=16, latent_dim=6 * int(np.prod(places)), omega_first=15.0, omega_last=15.0,
        latent_grid=places, latent_interpolation="nearest",
    )  # fmt: skip
    inner = {"steps": 3, "step_size": 0.5, "selection_ratio": 1.0, "learned_step_size": learned}
    train = {"steps": 50, "batch_size": 4, "learning_rate": 1e-3}
    values = {"data": {"source": "any"}, "model": vars(model), "inner": inner, "train": train}
    return patches.PatchField(model, len(places), 1), mf.Settings.from_dict(values)


@pytest.mark.parametrize("learned", ["none", "per_latent"])
def test_a_whole_signal_is_fitted_as_its_patches_are(learned):
    """With the exported field and the default step size, each cell takes the steps that training took with it alone."""
    field, settings = patched(learned)
    state = patches.init(field, settings, jax.random.key(0), dtype=jnp.float64)
    alpha = meta_step.step_size(state.trainable, settings.inner)
    exported = patches.exported_params(field, state.trainable, settings.inner)
    signals = np.random.default_rng(0).uniform(size=(3, 8, 6, 1))  # an even number of points: 16 or 9 would not be
    whole = mf.fit_latent(field, exported, signals, steps=4)
    x = mf.grid((8, 6)).reshape(8, 6, 2)
    values = mf.reconstruct(field, exported, whole.latents, mf.grid((8, 6))).reshape(3, 8, 6, 1)
    for rows, low in ((slice(0, 4), -1), (slice(4, 8), 0)):
        for columns, left in ((slice(0, 3), -1), (slice(3, 6), 0)):
            coords = 2 * (x[rows, columns].reshape(-1, 2) - np.array([low, left])) - 1
            cell = signals[:, rows, columns].reshape(3, -1, 1)
            alone = mf.fit_latent(field.patch, state.trainable.field, cell, coords=coords, steps=4, step_size=alpha)
            expected = mf.reconstruct(field.patch, state.trainable.field, alone.latents, coords)
            np.testing.assert_allclose(values[:, rows, columns].reshape(3, -1, 1), expected, rtol=1e-9)


def test_updates_learn_and_repeat():
    field, settings = patched()
    signals = np.sin(5 * mf.grid((9, 9)).sum(-1, keepdims=True))[None] * np.linspace(0.1, 0.5, 4)[:, None, None] + 0.5
    update = jax.jit(functools.partial(patches.update, meta_step.Training(field, settings, (9, 9))))
    runs = []
    for _ in range(2):
        state = patches.init(field, settings, jax.random.key(0))
        losses = []
        for _ in range(40):
            state, metrics = update(state, jnp.asarray(signals, jnp.float32), jax.random.key(1))
            losses.append(float(metrics["loss"]))
        runs.append(losses)
    assert runs[0] == runs[1]
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    assert len({round(loss, 9) for loss in losses}) == 40  # windows differ from update to update
