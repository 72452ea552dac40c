import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medfuncta_jax.product import product, transposed_product

SHAPES = (3, 5, 8), (8, 4)  # x and kernel


def draws(*shapes, dtype=np.float64):
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape).astype(dtype) for shape in shapes]


@pytest.mark.parametrize(("function", "turned"), [(product, False), (transposed_product, True)])
def test_derivatives_of_both_orders_are_those_of_a_plain_product(function, turned):
    x, kernel = draws(*SHAPES)
    kernel = kernel.T if turned else kernel

    def plain(x, kernel):
        return x @ (kernel.T if turned else kernel)

    def descended(multiply, x, kernel):
        """The loss after a step of descent on x, as an inner step: its gradient needs a second derivative."""

        def loss(x):
            return jnp.sum(jnp.sin(multiply(x, kernel)))

        return loss(x - 0.1 * jax.grad(loss)(x))

    np.testing.assert_allclose(function(x, kernel), plain(x, kernel), rtol=1e-14)
    for actual, expected in zip(
        jax.grad(functools.partial(descended, function), argnums=(0, 1))(x, kernel),
        jax.grad(functools.partial(descended, plain), argnums=(0, 1))(x, kernel),
        strict=True,
    ):
        assert actual.dtype == jnp.float64
        np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-14)


def test_bfloat16_is_the_product_of_rounded_factors():
    x, kernel, slope = draws(*SHAPES, (3, 5, 4), dtype=np.float32)
    value, pullback = jax.vjp(functools.partial(product, products="bfloat16"), x, kernel)
    dx, dkernel = pullback(slope)
    x, kernel, slope = (np.asarray(jnp.asarray(a, jnp.bfloat16), np.float64) for a in (x, kernel, slope))
    for actual, expected in (
        (value, x @ kernel),
        (dx, slope @ kernel.T),
        (dkernel, np.einsum("bnk,bnl->kl", x, slope)),
    ):
        assert actual.dtype == jnp.float32
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_no_large_array_is_transposed_in_the_second_order():
    """In the compiled program of an outer gradient, neither rows of points nor a kernel of the latent."""
    points, kernel, latent_kernel, latent = draws((2, 128, 16), (16, 16), (64, 16), (2, 64), dtype=np.float32)

    def outer(kernel, latent_kernel):
        def loss(latent):
            shift = product(latent, latent_kernel)
            return jnp.sum(jnp.sin(product(points, kernel) + shift[:, None]) ** 2)

        return loss(latent - 0.1 * jax.grad(loss)(latent))

    text = jax.jit(jax.grad(outer, argnums=(0, 1))).lower(kernel, latent_kernel).compile().as_text()
    assert " dot(" in text
    assert not [line for line in text.splitlines() if " transpose(" in line]
