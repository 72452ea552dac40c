"""The products of a layer. All signals and points are one axis, rows [R, n], so that nothing large is ever transposed
and a gradient in a kernel contracts over one axis."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

Products = Literal["float32", "bfloat16"]


def product(x: jax.Array, kernel: jax.Array, products: Products = "float32") -> jax.Array:
    """x [..., n] times kernel [n, m] -> [..., m].

    With `products` "bfloat16" the factors are rounded to it and sums are float32; with "float32" both keep the
    precision that they have.
    """
    rows = _contract(x.reshape(-1, x.shape[-1]), kernel, products, over=(1, 0))
    return rows.reshape(*x.shape[:-1], -1)


def transposed_product(x: jax.Array, kernel: jax.Array, products: Products = "float32") -> jax.Array:
    """x [R, m] times the transpose of kernel [n, m] -> [R, n]; as `product`."""
    return _contract(x, kernel, products, over=(1, 1))


def outer_product(x: jax.Array, y: jax.Array, products: Products = "float32") -> jax.Array:
    """The sum over rows of x y^T, [n, m], for x [R, n] and y [R, m]: the gradient in a kernel; as `product`."""
    return _contract(x, y, products, over=(0, 0))


def _contract(a: jax.Array, b: jax.Array, products: Products, *, over: tuple[int, int]) -> jax.Array:
    sums = None
    if products == "bfloat16":
        a, b, sums = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16), jnp.float32
    return jax.lax.dot_general(a, b, (((over[0],), (over[1],)), ((), ())), preferred_element_type=sums)
