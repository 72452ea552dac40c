"""What a user's process runs, float32 and optimised: collected by `test_as_shipped.py` alone, in such a process.

The rest of the suite is float64, and compiled without most optimisations.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import medfuncta_jax as mf
from tests.reference import golden

ROOT = Path(__file__).parents[1]
# A part of the config's steps, after which test PSNR was 39.7 dB.
STEPS, LOWEST_PSNR = 60, 38.5


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The directory of a run of the quickstart's config, cut short, on the real slices that nibabel installs."""
    workdir = tmp_path_factory.mktemp("run")
    words = [f"--workdir={workdir}", "--config=configs/quickstart.py", f"--config.train.steps={STEPS}"]
    command = [sys.executable, "-m", "experiments.main", *words]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return workdir


@pytest.fixture(scope="module")
def slices(run):
    """The run's test signals [n, 32, 32, 1]."""
    settings = mf.Settings.from_saved(json.loads((run / "config.json").read_text()))
    return mf.open_dataset(settings.data).splits["test"].signals(slice(None))


@pytest.fixture(scope="module")
def deep():
    """A field of two modulated layers in float32, and the case and arrays of the golden file that it is from."""
    case, arrays = golden.read(golden.FILES / "ecg_1d.npz")
    layers = {name.removeprefix("params/"): a.astype("f4") for name, a in arrays.items() if name.startswith("params/")}
    return *mf.field_from_layers(case, layers), case, arrays


def relative(actual, expected):
    """The largest difference, relative to the largest entry."""
    return float(np.abs(np.asarray(actual) - expected).max() / np.abs(expected).max())


def test_the_process_is_a_users_own():
    assert jnp.ones(1).dtype == jnp.float32
    assert not jax.config.values["jax_disable_most_optimizations"]
    assert not {name for name in os.environ if name.startswith(("JAX_", "XLA_"))}


def test_the_launcher_trains_extracts_and_evaluates(run):
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert evaluation["test"]["psnr"] > LOWEST_PSNR


def test_fit_and_reconstruct(run, slices):
    """The package's own functions give what the launcher has stored: latents, and values at them."""
    field, params = mf.load_field(run)
    stored = mf.load_latents(run)["test"]
    fit = mf.fit_latent(field, params, slices, steps=100, safeguard=True)
    values = mf.reconstruct(field, params, fit.latents, mf.grid((32, 32)))
    assert fit.latents.dtype == values.dtype == jnp.float32
    psnr = np.asarray(mf.metrics.psnr(jnp.clip(values, 0, 1), slices.reshape(values.shape)))
    assert psnr.mean() > LOWEST_PSNR
    np.testing.assert_allclose(psnr, stored.psnr, atol=0.02)
    again = np.asarray(mf.reconstruct(field, params, stored.latents, mf.grid((32, 32))))
    np.testing.assert_allclose(again, values, atol=5e-3)


def test_meta_gradients_are_those_of_float64(deep):
    """Under jit, in reverse and in forward mode."""
    field, params, case, arrays = deep
    expected = {name.removeprefix("meta_grad/"): a for name, a in arrays.items() if name.startswith("meta_grad/")}
    loss_of = functools.partial(meta_loss, field, arrays, mf.InnerLoop(step_size=case["inner_lr"]))
    loss, gradient = jax.jit(jax.value_and_grad(loss_of))(params)
    assert loss.dtype == jnp.float32
    assert relative(loss, arrays["meta_loss"]) < 1e-5
    for name, value in mf.named_layers(gradient).items():
        assert relative(value, expected[name]) < 1e-4, name
    direction = jax.tree.map(lambda leaf: jnp.sin(jnp.arange(leaf.size, dtype="f4")).reshape(leaf.shape), params)
    _, along = jax.jit(lambda params, direction: jax.jvp(loss_of, (params,), (direction,)))(params, direction)
    inner_product = sum(jnp.vdot(a, b) for a, b in zip(*map(jax.tree.leaves, (gradient, direction)), strict=True))
    assert relative(along, inner_product) < 1e-3


def meta_loss(field, arrays, inner, params):
    signals, coords = arrays["signals"].astype("f4"), arrays["coords"].astype("f4")
    return mf.meta_loss(field, params, signals, arrays["context"], inner=inner, coords=coords)


def test_fits_are_those_of_float64_under_jit_and_vmap(deep):
    field, params, case, arrays = deep
    signals = arrays["signals"].astype("f4").reshape(case["signals"], *case["shape"], case["channels"])
    fit = functools.partial(mf.fit_latent, field, params, steps=case["fit_steps"], step_size=case["inner_lr"])
    for latents in (
        fit(signals).latents,
        jax.jit(lambda signals: fit(signals).latents)(signals),
        jax.vmap(lambda one: fit(one[None]).latents[0])(jnp.asarray(signals)),
    ):
        assert latents.dtype == jnp.float32
        assert relative(latents, arrays["fit_latents"]) < 1e-4
        values = mf.reconstruct(field, params, latents, arrays["coords"].astype("f4"))
        assert relative(values, arrays["fit_reconstructions"]) < 1e-4


def test_reconstructions_are_differentiable_in_latents_and_coordinates(deep):
    """Reverse and forward mode agree under jit; vmap over latents is the batch."""
    field, params, _, arrays = deep
    latents, coords = (jnp.asarray(arrays[name], "f4") for name in ("fit_latents", "coords"))

    def one(latent, coords):
        return mf.reconstruct(field, params, latent[None], coords)[0]

    batch = mf.reconstruct(field, params, latents, coords)
    by_vmap = jax.jit(jax.vmap(one, in_axes=(0, None)))(latents, coords)
    np.testing.assert_allclose(by_vmap, batch, atol=1e-5)
    for argument in (0, 1):
        forward, reverse = (
            jax.jit(mode(one, argnums=argument))(latents[0], coords[:5]) for mode in (jax.jacfwd, jax.jacrev)
        )
        assert relative(forward, np.asarray(reverse)) < 1e-4
        assert np.abs(forward).max() > 0


def test_a_training_loop_of_ones_own_learns(deep):
    field, params, case, arrays = deep
    optimizer, inner = optax.adam(1e-3), mf.InnerLoop(steps=3, step_size=case["inner_lr"])
    step = jax.jit(mf.make_train_step(field, inner, optimizer, coords=arrays["coords"].astype("f4")))
    state, losses = optimizer.init(params), []
    for number in range(30):
        params, state, metrics = step(params, state, arrays["signals"].astype("f4"), jax.random.key(number))
        losses.append(float(metrics["loss"]))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
