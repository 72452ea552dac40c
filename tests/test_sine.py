import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medfuncta_jax.sine import cosine, sine


@pytest.mark.parametrize(("ours", "reference"), [(sine, np.sin), (cosine, np.cos)])
@pytest.mark.parametrize("reach", [1.0, 30.0, 1000.0, 20000.0])
def test_float32_accuracy(ours, reference, reach):
    x = np.linspace(-reach, reach, 200_003).astype(np.float32)
    error = np.abs(np.asarray(jax.jit(ours)(x), np.float64) - reference(x.astype(np.float64)))
    assert error.max() < (5e-7 if reach <= 1000 else 4e-6)


def test_float64_is_the_library_sine():
    x = np.linspace(-50, 50, 1001)
    np.testing.assert_array_equal(sine(x), jnp.sin(x))


@pytest.mark.some(1)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_derivatives_of_any_order(dtype):
    x = np.linspace(-40, 40, 101).astype(dtype)
    tolerance = 1e-6 if dtype == np.float32 else 1e-14
    derivative, expected = sine, [np.sin, np.cos, lambda x: -np.sin(x), lambda x: -np.cos(x), np.sin]
    for reference in expected:
        values = jax.vmap(derivative)(jnp.asarray(x))
        assert values.dtype == dtype
        np.testing.assert_allclose(values, reference(x.astype(np.float64)), atol=tolerance)
        derivative = jax.grad(derivative)


def test_one_range_reduction_serves_every_order():
    derivative = sine
    for _ in range(4):
        assert str(jax.make_jaxpr(derivative)(jnp.float32(1))).count("= round") == 1
        derivative = jax.grad(derivative)


def test_reverse_over_forward():
    x = jnp.linspace(-3.0, 3.0, 7)
    hessian = jax.hessian(lambda x: sine(x).sum())(x)
    np.testing.assert_allclose(hessian, np.diag(-np.sin(x)), atol=1e-14)


def test_other_float_types_keep_their_type():
    assert sine(jnp.ones(3, jnp.bfloat16)).dtype == jnp.bfloat16
