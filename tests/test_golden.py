"""Every quantity of the independent float64 statement of the method, to a relative 1e-9."""

import jax
import numpy as np
import pytest

import medfuncta_jax as mf
from medfuncta_jax import siren

RELATIVE = 1e-9


def assert_close(actual, expected):
    """Relative to the largest entry of the array: single entries may cancel to nearly zero."""
    expected = np.asarray(expected)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=RELATIVE, atol=RELATIVE * scale)


@pytest.fixture(scope="module")
def built(golden):
    return mf.field_from_layers(golden.case, golden.layers("params"))


def meta_gradient(golden, built, **options):
    field, params = built
    inner = mf.InnerLoop(step_size=golden.case["inner_lr"], **options)

    def loss_at(params):
        return mf.meta_loss(
            field, params, golden["signals"], golden["context"], inner=inner, coords=golden["coords"]
        )  # fmt: skip

    loss, gradient = jax.jit(jax.value_and_grad(loss_at))(params)
    return loss, mf.named_layers(gradient)


def test_omega_schedule(golden, built):
    assert_close(siren.omega_schedule(built[0].model), golden["omega"])


def test_grid(golden):
    assert_close(mf.grid(golden.case["shape"]), golden["coords"])


def test_inner_latents_and_losses(golden, built):
    field, params = built
    steps = golden.case["inner_steps"]
    for taken in (1, steps):
        inner = mf.InnerLoop(step_size=golden.case["inner_lr"])
        fit = mf.inner_loop(
            field, params, golden["signals"], golden["context"][:, :taken], inner=inner, coords=golden["coords"]
        )  # fmt: skip
        assert_close(fit.latents, golden["inner_latents"][:, taken])
        assert_close(fit.losses, golden["inner_losses"][:, :taken])


@pytest.mark.parametrize("remat", ["none", "layers", "steps"])
def test_meta_loss_and_second_order_gradient(golden, built, remat):
    loss, gradient = meta_gradient(golden, built, remat=remat)
    assert_close(loss, golden["meta_loss"])
    expected = golden.layers("meta_grad")
    assert gradient.keys() == expected.keys()
    for name, own in gradient.items():
        assert_close(own, expected[name])


def test_first_order_gradient(golden, built):
    _, gradient = meta_gradient(golden, built, first_order=True)
    for name, own in gradient.items():
        assert_close(own, golden.layers("first_order_grad")[name])


def test_fit_and_reconstruction(golden, built):
    field, params = built
    case = golden.case
    images = golden["signals"].reshape(case["signals"], *case["shape"], case["channels"])
    fit = mf.fit_latent(field, params, images, steps=case["fit_steps"], step_size=case["inner_lr"])
    assert_close(fit.latents, golden["fit_latents"])
    assert fit.losses.shape == (case["signals"], case["fit_steps"])
    assert_close(mf.reconstruct(field, params, fit.latents, golden["coords"]), golden["fit_reconstructions"])
    assert_close(mf.reconstruct(field, params, fit.latents, golden["coords"], chunk=17), golden["fit_reconstructions"])
