"""The sine activation.

XLA compiles `jnp.sin` in float32 on a CPU to scalar code of about 5 ns an element, longer than the
matrix product of the layer it belongs to. Here float32 sine and cosine are polynomials after one
range reduction by pi (Cody and Waite 1980, "Software Manual for the Elementary Functions"), which
the compiler turns into vector code. Every other precision keeps the library's sine.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

# pi in three parts: the first two have few enough bits that k * part is exact for |k| < 2^13.
_PI_PARTS = tuple(np.float32(part) for part in (3.140625, 9.67502593994140625e-4, 1.509957990978376432e-7))
_INVERSE_PI = np.float32(1 / np.pi)

# Minimax fits on [-pi/2, pi/2]: sin(r) = r * S(r^2), relative error 5e-9; cos(r) = C(r^2), error 3e-10.
_SINE = (9.99999995e-01, -1.66666567e-01, 8.33302520e-03, -1.98074220e-04, 2.60190885e-06)
_COSINE = (1.00000000e00, -4.99999994e-01, 4.16666363e-02, -1.38883615e-03, 2.47601650e-05, -2.60515496e-07)


@jax.custom_jvp
def sine(x: jax.Array) -> jax.Array:
    """sin(x) elementwise, differentiable to any order.

    Args:
      x: any shape, radians. In float32 the absolute error stays below 5e-7 for |x| < 1000 and grows
        with |x| beyond 25,000, where float32 itself no longer resolves a period well.
    Returns:
      The same shape and dtype, in [-1, 1].
    """
    x = jnp.asarray(x)
    if x.dtype != jnp.float32:
        return jnp.sin(x)
    r, sign = _reduce(x)
    return _with_sign(r * _polynomial(_SINE, r * r), sign)


@jax.custom_jvp
def cosine(x: jax.Array) -> jax.Array:
    """cos(x) elementwise, with the same accuracy as `sine`, whose derivative it is."""
    x = jnp.asarray(x)
    if x.dtype != jnp.float32:
        return jnp.cos(x)
    r, sign = _reduce(x)
    return _with_sign(_polynomial(_COSINE, r * r), sign)


sine.defjvps(lambda tangent, value, x: cosine(x) * tangent)
cosine.defjvps(lambda tangent, value, x: -sine(x) * tangent)


def _reduce(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x = k pi + r with |r| <= pi/2; returns r and the sign bit (-1)^k as an integer mask."""
    k = jnp.round(x * _INVERSE_PI)
    r = x
    for part in _PI_PARTS:
        r = r - k * part
    return r, k.astype(jnp.int32) << 31


def _polynomial(coefficients: tuple[float, ...], x: jax.Array) -> jax.Array:
    value = jnp.full_like(x, coefficients[-1])
    for c in coefficients[-2::-1]:
        value = value * x + np.float32(c)
    return value


def _with_sign(value: jax.Array, sign_bit: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(value, jnp.int32) ^ sign_bit
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
