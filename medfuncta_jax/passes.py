"""The plain modulated SIREN as passes over its layers: an inner step's gradient, and the derivative of that gradient.

Rows are all points of all signals, R = B n. Per layer k, with u_k = h_{k-1} W_k + b_k + m_k and
h_k = h_{k-1} + sin(w_k u_k), without h_{k-1} where the field has no residual connections:

    forward   u_k, h_k                                                                          one product
    backward  q_k = g_k w_k cos(w_k u_k);  dL/dm_k = sum_n q_k;  g_{k-1} = g_k + q_k W_k^T      one product
    tangent   u'_k = h'_{k-1} W_k + v_k;  h'_k = h'_{k-1} + w_k cos(w_k u_k) u'_k               one product
    adjoint   p_k = a_k w_k cos(w_k u_k) - w_k^2 sin(w_k u_k) u'_k g_k;
              a_{k-1} = a_k + p_k W_k^T                                                         one product
              dW_k = h_{k-1}^T p_k + h'_{k-1}^T q_k;  dm_k = sum_n p_k                          two products

Forward and backward give s = dL/dm, tangent and adjoint its vector-Jacobian product with v (see `point_field`). They
start from g_{K-1} = e W_K^T and a_{K-1} = e' W_K^T, with e = 2 c (f - y) and e' = 2 c h'_{K-1} W_K. A latent grid only
changes how modulations are spread over rows, and how rows are summed back.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from medfuncta_jax.point_field import Params, PointField
from medfuncta_jax.product import FULL, Products, outer_product, product, transposed_product
from medfuncta_jax.sine import cosine, sine
from medfuncta_jax.siren import Modulations, PointFeatures


class Layer(NamedTuple):
    """A modulated layer, in each of the four passes; everything is rows [R, L].

    Attributes:
      modulation: the name of m_k.
      kernel, bias: W_k and b_k; None for the first modulated layer, for which the features hold W_k h_{k-1} + b_k.
      omega: w_k.
      residual: whether its input is added to its output.
      products: see `product`.
    """

    modulation: str
    kernel: jax.Array | None
    bias: jax.Array | None
    omega: float
    residual: bool
    products: Products

    def forward(self, h: jax.Array | None, shift: jax.Array) -> tuple[jax.Array, jax.Array]:
        """u_k and h_k for h_{k-1}; `shift` is added to the product."""
        u = shift if self.kernel is None else product(cast(jax.Array, h), self.kernel, self.products) + shift
        return u, self.output(h, u)

    def output(self, h: jax.Array | None, u: jax.Array) -> jax.Array:
        """h_k for h_{k-1} and u_k."""
        s = sine(self.omega * u)
        return h + s if self.residual and h is not None else s

    def backward(self, g: jax.Array, u: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """q_k and g_{k-1} for g_k."""
        q = g * self._derivative(u)
        return q, self._before(g, q)

    def tangent(self, h: jax.Array | None, shift: jax.Array, u: jax.Array) -> tuple[jax.Array, jax.Array]:
        """u'_k and h'_k for h'_{k-1}; `shift` is v_k."""
        tangent = shift if h is None else product(h, cast(jax.Array, self.kernel), self.products) + shift
        change = self._derivative(u) * tangent
        return tangent, h + change if self.residual and h is not None else change

    def adjoint(
        self, a: jax.Array, g: jax.Array, u: jax.Array, tangent: jax.Array
    ) -> tuple[jax.Array, jax.Array | None]:
        """p_k and a_{k-1} for a_k; `tangent` is u'_k."""
        p = a * self._derivative(u) - self.omega**2 * sine(self.omega * u) * tangent * g
        return p, self._before(a, p)

    def _derivative(self, u: jax.Array) -> jax.Array:
        """dh_k/du_k."""
        return self.omega * cosine(self.omega * u)

    def _before(self, after: jax.Array, own: jax.Array) -> jax.Array | None:
        """The cotangent of h_{k-1}, from those of h_k and u_k; None where h_k does not depend on it."""
        if self.kernel is None:
            return after if self.residual else None
        passed = transposed_product(own, self.kernel, self.products)
        return after + passed if self.residual else passed


class Rows(NamedTuple):
    """Maps arrays of a batch to rows and back.

    Attributes:
      batch, points: B and n.
      interpolation: interpolation weights of a latent grid, [B or 1, n, places], or None.
    """

    batch: int
    points: int
    interpolation: jax.Array | None

    def of(self, array: jax.Array) -> jax.Array:
        """[B or 1, n or 1, L] -> [R, L]."""
        return jnp.broadcast_to(array, (self.batch, self.points, array.shape[-1])).reshape(-1, array.shape[-1])

    def back(self, rows: jax.Array, like: jax.Array) -> jax.Array:
        """The transpose of `of`: summed over the batch where `like` is shared by it."""
        array = rows.reshape(self.batch, self.points, -1)
        return array.sum(0, keepdims=True) if len(like) < self.batch else array

    def spread(self, modulation: jax.Array) -> jax.Array:
        """A modulation at every point: [B, L], or [B, places, L] of a latent grid, -> [R, L]."""
        if self.interpolation is None:
            return self.of(modulation[:, None])
        return self.of(jnp.matmul(self.interpolation, modulation, precision=FULL))

    def sums(self, rows: jax.Array) -> jax.Array:
        """The transpose of `spread`."""
        array = rows.reshape(self.batch, self.points, -1)
        if self.interpolation is not None:
            return jnp.matmul(jnp.swapaxes(self.interpolation, 1, 2), array, precision=FULL)
        # Without the barrier the compiler reads all rows again for each later sum, over signals and over steps.
        return jax.lax.optimization_barrier(array.sum(1))


class Kept(NamedTuple):
    """Arrays that forward and backward keep for the second order, in the order of the modulated layers.

    Attributes:
      u: pre-activations u_k.
      g: gradients g_k in h_k.
      error: e, [R, D].
      h: the inputs h_{k-1} of the layers, and h_{K-1} last; None to add them up again.
      q: gradients q_k in u_k; None to compute them again.
    """

    u: list[jax.Array]
    g: list[jax.Array]
    error: jax.Array
    h: list[jax.Array] | None = None
    q: list[jax.Array] | None = None


class SirenField(PointField):
    """A modulated SIREN without scale modulations."""

    def thin(self, kept):
        return kept if kept is None else kept._replace(h=None, q=None)

    def gradient(self, params, modulations, features, targets):
        layers, rows = self._layers(params), _rows(modulations, features)
        u: list[jax.Array] = []
        h: list[Any] = [_input(features, rows)]
        for layer in layers:
            shift = rows.spread(modulations[layer.modulation] + (0 if layer.bias is None else layer.bias))
            pre, after = layer.forward(h[-1], shift if u else rows.of(features.pre) + shift)
            u.append(pre)
            h.append(after)
        head, shares = self._head(params), rows.of(targets.shares)
        difference = product(h[-1], head["kernel"]) + head["bias"] + self.module.model.offset - rows.of(targets.signals)
        losses = (shares * jnp.square(difference)).reshape(rows.batch, -1).sum(1)
        error = 2 * shares * difference
        g: list[Any] = [transposed_product(error, head["kernel"])]
        q: list[jax.Array] = []
        for layer, pre in zip(reversed(layers), reversed(u), strict=True):
            own, before = layer.backward(g[-1], pre)
            q.append(own)
            g.append(before)
        gradient = {layer.modulation: rows.sums(own) for layer, own in zip(layers, reversed(q), strict=True)}
        return gradient, losses, Kept(u, g[-2::-1], error, h, q[::-1])

    def full_gradient(self, params, modulations, features, targets):
        gradient, losses, (_, g, error, h, q) = self.gradient(params, modulations, features, targets)
        layers = self._layers(params)
        kernels = [outer_product(x, y, layers[0].products) for x, y in zip(h[1:-1], q[1:], strict=True)]
        head = {"kernel": outer_product(h[-1], error), "bias": error.sum(0)}
        hidden = g[0] if layers[0].residual else None
        of_params = self._of_params(params, kernels, gradient, head)
        return losses, (of_params, gradient, _of_features(features, hidden, q[0], _rows(modulations, features)))

    def pull_gradient(self, params, modulations, features, targets, kept, v):
        kept = self.gradient(params, modulations, features, targets)[2] if kept is None else kept
        layers, rows, head = self._layers(params), _rows(modulations, features), self._head(params)["kernel"]
        h: list[Any] = [_input(features, rows)]
        tangents: list[jax.Array] = []
        h_tangents: list[Any] = [None]
        for layer, u in zip(layers, kept.u, strict=True):
            h.append(layer.output(h[-1], u))
            tangent, after = layer.tangent(h_tangents[-1], rows.spread(v[layer.modulation]), u)
            tangents.append(tangent)
            h_tangents.append(after)
        h = h if kept.h is None else kept.h
        error = 2 * rows.of(targets.shares) * product(h_tangents[-1], head)
        a: Any = transposed_product(error, head)
        p: list[jax.Array] = []
        kernels: list[jax.Array] = []
        for i, layer in reversed(list(enumerate(layers))):
            own, a = layer.adjoint(a, kept.g[i], kept.u[i], tangents[i])
            p.append(own)
            if i > 0:
                q = layer.backward(kept.g[i], kept.u[i])[0] if kept.q is None else kept.q[i]
                first, second = (
                    outer_product(h[i], own, layer.products),
                    outer_product(h_tangents[i], q, layer.products),
                )
                kernels.append(first + second)
        cotangents = {layer.modulation: rows.sums(own) for layer, own in zip(layers, reversed(p), strict=True)}
        of_kernel = outer_product(h[-1], error) + outer_product(h_tangents[-1], kept.error)
        of_head = {"kernel": of_kernel, "bias": error.sum(0)}
        of_params = self._of_params(params, kernels[::-1], cotangents, of_head)
        return of_params, cotangents, _of_features(features, a, p[-1], rows)

    def _layers(self, params: Params) -> list[Layer]:
        """The modulated layers."""
        module, model = self.module, self.module.model
        layers: list[Layer] = []
        for k in range(module.first_modulated, model.layers):
            kernel, bias = (params[f"layer_{k}"][name] for name in ("kernel", "bias")) if layers else (None, None)
            layers.append(Layer(f"modulation_{k}", kernel, bias, module.omega(k), model.residual, model.products))
        return layers

    def _head(self, params: Params) -> dict[str, jax.Array]:
        return params[f"layer_{self.module.model.layers}"]

    def _of_params(
        self, params: Params, kernels: list[jax.Array], of_modulations: Modulations, head: dict[str, jax.Array]
    ) -> Params:
        """Cotangents of all layers that read points: a bias enters a layer as its shift modulation does."""
        found = jax.tree.map(jnp.zeros_like, params)
        first = self.module.first_modulated
        for k, kernel in enumerate(kernels, start=first + 1):
            bias = of_modulations[f"modulation_{k}"].reshape(-1, kernel.shape[1]).sum(0)
            found[f"layer_{k}"] = {"kernel": kernel, "bias": bias}
        return {**found, f"layer_{self.module.model.layers}": head}


def _rows(modulations: Modulations, features: PointFeatures) -> Rows:
    batch = len(next(iter(modulations.values())))
    return Rows(batch, features.pre.shape[1], features.interpolation)


def _input(features: PointFeatures, rows: Rows) -> jax.Array | None:
    """The input of the first modulated layer; None if that layer reads the points."""
    return None if features.hidden is None else rows.of(features.hidden)


def _of_features(features: PointFeatures, hidden: jax.Array | None, pre: jax.Array, rows: Rows) -> PointFeatures:
    """Cotangents of features, from those of their rows."""
    nothing = jax.tree.map(jnp.zeros_like, features)
    if hidden is None or features.hidden is None:
        return nothing._replace(pre=rows.back(pre, like=features.pre))
    return nothing._replace(hidden=rows.back(hidden, like=features.hidden), pre=rows.back(pre, like=features.pre))
