import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medfuncta_jax.product import outer_product, product, transposed_product

PLAIN = {product: lambda x, kernel: x @ kernel, transposed_product: lambda x, kernel: x @ kernel.T,
         outer_product: lambda x, y: x.T @ y}  # fmt: skip
SHAPES = {product: ((15, 8), (8, 4)), transposed_product: ((15, 4), (8, 4)), outer_product: ((15, 8), (15, 4))}


def draws(function, dtype=np.float64):
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape).astype(dtype) for shape in SHAPES[function]]


@pytest.mark.some(2)
@pytest.mark.parametrize("function", PLAIN)
def test_products_and_their_derivatives_are_the_plain_ones(function):
    factors = draws(function)
    np.testing.assert_allclose(function(*factors), PLAIN[function](*factors), rtol=1e-14)

    def wave(multiply, *factors):
        return jnp.sin(multiply(*factors)).sum()

    for derivative in (jax.grad, jax.jacfwd, jax.hessian):
        ours, plain = (
            derivative(functools.partial(wave, multiply), argnums=(0, 1))(*factors)
            for multiply in (function, PLAIN[function])
        )
        for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
            assert one.dtype == jnp.float64
            np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-13)


def test_all_rows_are_one_axis():
    x, kernel = np.random.default_rng(0).normal(size=(3, 5, 8)), draws(product)[1]
    np.testing.assert_allclose(product(x, kernel), x @ kernel, rtol=1e-14)


@pytest.mark.parametrize("function", PLAIN)
def test_bfloat16_is_the_product_of_rounded_factors_in_float32(function):
    factors = draws(function, np.float32)
    value, tangent = jax.jvp(functools.partial(function, products="bfloat16"), factors, factors)
    rounded = [np.asarray(jnp.asarray(a, jnp.bfloat16), np.float64) for a in factors]
    expected = PLAIN[function](*rounded)
    assert value.dtype == tangent.dtype == jnp.float32
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(tangent, 2 * expected, rtol=1e-5, atol=1e-5)
    gradient = jax.grad(lambda x: function(x, factors[1], products="bfloat16").sum())(factors[0])
    assert gradient.dtype == jnp.float32
