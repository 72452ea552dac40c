"""The products of a layer. All signals and points are one axis, rows [R, n], so that nothing large is ever transposed
and a gradient in a kernel contracts over one axis.

Every product states its precision, since the default of JAX differs from device to device: on a GPU of the Ampere
generation or later it rounds the factors of float32 products to 10 bits after the point (TF32).
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

Products = Literal["float32", "tensorfloat32", "bfloat16"]

# Full float32 (or float64) on every device, for all products but those of hidden layers.
FULL = jax.lax.Precision.HIGHEST

_PRECISION = {"float32": FULL, "tensorfloat32": jax.lax.Precision.HIGH, "bfloat16": jax.lax.Precision.DEFAULT}


def product(x: jax.Array, kernel: jax.Array, products: Products = "float32") -> jax.Array:
    """x [..., n] times kernel [n, m] -> [..., m].

    With `products` "float32" factors and sums keep their own precision. With "tensorfloat32" a GPU that
    has TF32 rounds the factors to it and sums in float32; other devices do as for "float32". With "bfloat16" the
    factors are rounded to it and sums are float32.
    """
    rows = _contract(x.reshape(-1, x.shape[-1]), kernel, products, over=(1, 0))
    return rows.reshape(*x.shape[:-1], -1)


def transposed_product(x: jax.Array, kernel: jax.Array, products: Products = "float32") -> jax.Array:
    """x [R, m] times the transpose of kernel [n, m] -> [R, n]; as `product`."""
    return _contract(x, kernel, products, over=(1, 1))


def outer_product(x: jax.Array, y: jax.Array, products: Products = "float32") -> jax.Array:
    """The sum over rows of x y^T, [n, m], for x [R, n] and y [R, m]: the gradient in a kernel; as `product`."""
    return _contract(x, y, products, over=(0, 0))


def has_tensorfloat32(device: jax.Device) -> bool:
    """Whether a device multiplies in TF32: NVIDIA GPUs of compute capability 8.0 and later."""
    return device.platform == "gpu" and float(getattr(device, "compute_capability", 0)) >= 8


def _contract(a: jax.Array, b: jax.Array, products: Products, *, over: tuple[int, int]) -> jax.Array:
    sums = None
    if products == "bfloat16":
        a, b, sums = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16), jnp.float32
    axes = (((over[0],), (over[1],)), ((), ()))
    return jax.lax.dot_general(a, b, axes, precision=_PRECISION[products], preferred_element_type=sums)
