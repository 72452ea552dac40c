"""The product of a layer, x W, whose derivatives of first and second order transpose no copy of anything large.

Left to itself, automatic differentiation contracts the gradient in W over two axes (signal and point), for which the
compiler copies x transposed; and in the second order, where the kernel enters as W^T, it makes the gradient in W^T and
copies that transposed, once for each inner step. Here all rows are one axis, and x W and x W^T are each other's
derivatives, with the gradient in W as it lies in memory.
"""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

Products = Literal["float32", "bfloat16"]

# Of the values that a layer's product gives, for policies of rematerialisation.
PRODUCT = "product"


def product(x: jax.Array, kernel: jax.Array, products: Products = "float32") -> jax.Array:
    """x [..., n] times kernel [n, m] -> [..., m], differentiable in reverse, to any order.

    With `products` "bfloat16", factors are rounded to it and sums are float32, here and in every derivative; with
    "float32" both keep the precision that they have.
    """
    return checkpoint_name(_product(x, kernel, products), PRODUCT)


def transposed_product(x: jax.Array, kernel: jax.Array, products: Products = "float32") -> jax.Array:
    """x [..., m] times the transpose of kernel [n, m] -> [..., n]; as `product`."""
    return checkpoint_name(_transposed_product(x, kernel, products), PRODUCT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x, kernel, products):
    return _times(x, kernel, products, over=0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _transposed_product(x, kernel, products):
    return _times(x, kernel, products, over=1)


def _times(x: jax.Array, kernel: jax.Array, products: Products, *, over: int) -> jax.Array:
    """All rows of x [..., n] with axis `over` of the kernel."""
    rows = x.reshape(-1, x.shape[-1])
    return _contract(rows, kernel, products, over=(1, over)).reshape(*x.shape[:-1], -1)


def _contract(a: jax.Array, b: jax.Array, products: Products, *, over: tuple[int, int]) -> jax.Array:
    sums = None
    if products == "bfloat16":
        a, b, sums = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16), jnp.float32
    return jax.lax.dot_general(a, b, (((over[0],), (over[1],)), ((), ())), preferred_element_type=sums)


def _outer(x: jax.Array, y: jax.Array, products: Products) -> jax.Array:
    """x [..., n] and y [..., m] to the sum over rows of x y^T, [n, m]."""
    rows, others = (array.reshape(-1, array.shape[-1]) for array in (x, y))
    return _contract(rows, others, products, over=(0, 0))


def _forward(x, kernel, products):
    return _product(x, kernel, products), (x, kernel)


def _backward(products, operands, slope):
    x, kernel = operands
    return transposed_product(slope, kernel, products), _outer(x, slope, products)


def _transposed_forward(x, kernel, products):
    return _transposed_product(x, kernel, products), (x, kernel)


def _transposed_backward(products, operands, slope):
    x, kernel = operands
    return product(slope, kernel, products), _outer(slope, x, products)


_product.defvjp(_forward, _backward)
_transposed_product.defvjp(_transposed_forward, _transposed_backward)


def dot_general_of(products: Products):
    """`product` in the form that `flax.linen.Dense(dot_general=...)` calls: last axis of x with the first of W."""

    def dot_general(x, kernel, dimensions, precision=None, preferred_element_type=None):
        del dimensions, precision, preferred_element_type
        return product(x, kernel, products)

    return dot_general
