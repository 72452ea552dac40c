"""The field with one modulated layer, the second of three, as a sum of functions of the point.

With p = w (W h + b) and s = w (M phi + c), sin(p + s) = sin p cos s + cos p sin s, so

    f(x; phi) = constant(x) + functions(x) . coefficients(phi)

and no sine depends on both point and latent. On points that many steps share, the losses depend on the normal equations
alone, whose size does not grow with the number of points.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from medfuncta_jax.point_field import PointField
from medfuncta_jax.product import FULL, product
from medfuncta_jax.settings import ModelSettings
from medfuncta_jax.sine import cosine, sine
from medfuncta_jax.siren import PointFeatures


class Basis(NamedTuple):
    """The part of the field that depends on points alone.

    Attributes:
      constant: the part that the latent does not reach, [B or 1, n, D].
      functions: sin p and cos p, [B or 1, n, 2L].
    """

    constant: jax.Array
    functions: jax.Array


class NormalEquations(NamedTuple):
    """Sufficient statistics for the losses of a batch on shared functions F [n, 2L], with c the same for every point.

    With y the signals less the constant, c sum_n (F a - y)_n^2 = a.(c F'F)a - 2 a.(c F'y) + c y.y.

    Attributes:
      gram: c F'F, [2L, 2L].
      cross: c F'y, [B, 2L, D].
      square: c y.y, [B, D].
    """

    gram: jax.Array
    cross: jax.Array
    square: jax.Array


def has_basis(model: ModelSettings) -> bool:
    """Whether a network has the one modulated layer that this file describes."""
    return model.layers == 3 and not (model.modulate_first_layer or model.modulate_scale or model.latent_grid)


class BasisField(PointField):
    """A `PointField` whose features are a `Basis`, or the `NormalEquations` of one."""

    def features(self, params, coords):
        given = cast(PointFeatures, self.module.apply({"params": params}, coords, method="features"))
        hidden, pre = given.hidden, given.pre
        phases = jnp.asarray([0, np.pi / 2], pre.dtype)[:, None]  # cos p = sin(p + pi/2), without a copy to join both
        functions = sine((self.module.omega(2) * pre)[..., None, :] + phases)
        last, skipped = (
            params["layer_3"],
            cast(jax.Array, hidden) if self.module.model.residual else jnp.zeros_like(pre),
        )
        constant = product(skipped, last["kernel"]) + last["bias"] + self.module.model.offset
        return Basis(constant, functions.reshape(*pre.shape[:-1], -1))

    def values(self, params, modulations, features):
        coefficients = self._coefficients(params, modulations)
        if len(features.functions) == 1:  # one matrix product for the whole batch
            return features.constant + jnp.einsum("nk,bkd->bnd", features.functions[0], coefficients, precision=FULL)
        return features.constant + jnp.einsum("bnk,bkd->bnd", features.functions, coefficients, precision=FULL)

    def elements(self, batch, *, shared):
        # Functions of a point that all latents share are there once; only values belong to each latent.
        if not shared:
            return super().elements(batch, shared=False)
        return 2 * self.module.units(2) + batch * self.module.channels

    def summarises(self, batch, points, channels, steps):
        # The equations cost n (2L)^2 products; each gradient then costs 2 (2L)^2 B D instead of 2 n 2L B D.
        size, calls = 2 * self.module.units(2), 2 * steps * batch * channels
        return calls * (points - size) >= points * size

    def summary(self, features, targets):
        functions, rest, share = features.functions[0], targets.signals - features.constant, targets.shares.ravel()
        return NormalEquations(
            share * jnp.matmul(functions.T, functions, precision=FULL),
            share * jnp.einsum("nk,bnd->bkd", functions, rest, precision=FULL),
            share * jnp.square(rest).sum(1),
        )

    def losses(self, params, modulations, features, targets):
        if targets is not None:
            return super().losses(params, modulations, features, targets)
        coefficients = self._coefficients(params, modulations)
        fitted = jnp.einsum("kl,bld->bkd", features.gram, coefficients, precision=FULL)
        errors = jnp.einsum("bkd,bkd->bd", coefficients, fitted - 2 * features.cross, precision=FULL) + features.square
        return errors.sum(-1)

    def _coefficients(self, params, modulations) -> jax.Array:
        """Coefficients of the functions, [B, 2L, D]."""
        shift = self.module.omega(2) * modulations["modulation_2"]  # [B, L]
        kernel = params["layer_3"]["kernel"]  # [L, D]
        return jnp.concatenate([cosine(shift)[..., None] * kernel, sine(shift)[..., None] * kernel], axis=1)
