"""The modulated SIREN (Sitzmann et al. 2020; MedFuncta, MIDL 2026, eq. 1) as one Flax module.

    h_1 = sin(w_1 (W_1 x + b_1))                                 modulated only if asked for
    s_k = sin(w_k (m_k * (W_k h_{k-1} + b_k) + M_k phi + c_k))   k = 2..K-1
    h_k = h_{k-1} + s_k (residual) or s_k (plain)
    f   = W_K h_{K-1} + b_K + offset

m_k = 1, or S_k phi + d_k with `modulate_scale` (scale and shift modulation, as in Functa's FiLM).

The module has two halves, so that work on the points alone is done once for all signals and inner steps:
`point_features` goes up to where the latent enters, `decode` from there to the values.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from medfuncta_jax.settings import ModelSettings
from medfuncta_jax.sine import cosine, sine


def omega_schedule(model: ModelSettings) -> np.ndarray:
    """Frequencies w_k = w_1 + (k - 1)(w_K - w_1)/(K - 1), float64 [K] (MedFuncta, eq. 4)."""
    return np.linspace(model.omega_first, model.omega_last, model.layers)


class PointFeatures(NamedTuple):
    """What of the field depends on the points but not on the latent.

    Attributes:
      hidden: h_{k-1} before the first modulated layer k, [B or 1, N, L]; None where that is the first layer.
      pre: W_k h_{k-1} + b_k of that layer, [B or 1, N, L].
    """

    hidden: jax.Array | None
    pre: jax.Array


def _uniform(bound: float, centre: float = 0.0):
    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, centre - bound, centre + bound)

    return init


class ModulatedSiren(nn.Module):
    """f(x; phi) with linear layers `layer_k`, shift modulations `modulation_k`, scale modulations `scale_k`.

    Initialisation: W_1, b_1 ~ U(-1/n, 1/n); W_k, b_k ~ U(-sqrt(6/n)/w_k, sqrt(6/n)/w_k), n the inputs
    of the layer; M_k, c_k, S_k ~ U(-1/sqrt(P), 1/sqrt(P)); d_k the same about 1.
    """

    model: ModelSettings
    coord_dims: int
    channels: int

    def setup(self):
        model, omega = self.model, omega_schedule(self.model)
        for k in range(1, model.layers + 1):
            inputs = self.coord_dims if k == 1 else model.width
            features = self.channels if k == model.layers else model.width
            init = _uniform(1 / inputs if k == 1 else math.sqrt(6 / inputs) / omega[k - 1])
            setattr(self, f"layer_{k}", nn.Dense(features, kernel_init=init, bias_init=init))
        bound = 1 / math.sqrt(model.latent_dim)
        for name in self.latent_layers():
            bias = _uniform(bound, 1.0 if name.startswith("scale") else 0.0)
            setattr(self, name, nn.Dense(model.width, kernel_init=_uniform(bound), bias_init=bias))

    def latent_layers(self) -> tuple[str, ...]:
        """Names of the layers that read the latent."""
        kinds = ("modulation", "scale") if self.model.modulate_scale else ("modulation",)
        return tuple(f"{kind}_{k}" for k in range(self._first_modulated(), self.model.layers) for kind in kinds)

    def _first_modulated(self) -> int:
        return 1 if self.model.modulate_first_layer else 2

    def _omega(self, k: int, dtype) -> jax.Array:
        return jnp.asarray(omega_schedule(self.model)[k - 1], dtype)

    def point_features(self, coords: jax.Array) -> PointFeatures:
        """All that needs no latent: coords [1, N, C] shared by the batch, or [B, N, C]."""
        first = self.layer_1(coords)
        if self.model.modulate_first_layer:
            return PointFeatures(None, first)
        hidden = sine(first * self._omega(1, first.dtype))
        return PointFeatures(hidden, self.layer_2(hidden))

    def decode(self, latents: jax.Array, features: PointFeatures) -> jax.Array:
        """Values [B, N, D] of the fields of `latents` [B, P] at the points behind `features`."""
        model = self.model
        h, pre = features
        last = getattr(self, f"layer_{model.layers}")
        if model.layers == self._first_modulated() + 1 and not model.modulate_scale:
            return self._decode_one_layer(latents, features) + model.offset
        for k in range(self._first_modulated(), model.layers):
            if k > self._first_modulated():
                pre = getattr(self, f"layer_{k}")(h)  # [B, N, L]
            if model.modulate_scale:
                pre = getattr(self, f"scale_{k}")(latents)[:, None, :] * pre
            pre = pre + getattr(self, f"modulation_{k}")(latents)[:, None, :]  # [B, N, L]
            s = sine(pre * self._omega(k, pre.dtype))
            h = h + s if model.residual and h is not None else s
        return last(h) + model.offset

    def _decode_one_layer(self, latents: jax.Array, features: PointFeatures) -> jax.Array:
        """The same where one layer is modulated, without a sine for every signal and point.

        sin(p + s) = sin p cos s + cos p sin s: the field is a sum of basis functions of the points, shared where the
        points are, with coefficients of the latent, so the last layer joins the coefficients before the points come in.
        """
        k = self.model.layers - 1
        omega = self._omega(k, latents.dtype)
        pre = features.pre * omega  # [B or 1, N, L]
        shift = getattr(self, f"modulation_{k}")(latents) * omega  # [B, L]
        last = getattr(self, f"layer_{k + 1}")
        skip = features.hidden if self.model.residual and features.hidden is not None else jnp.zeros_like(pre)
        values = last(skip)  # [B or 1, N, D]
        kernel = last.variables["params"]["kernel"]  # [L, D]
        for basis, coefficients in ((sine(pre), cosine(shift)), (cosine(pre), sine(shift))):
            weights = coefficients[:, :, None] * kernel  # [B, L, D]
            shared = basis.shape[0] == 1
            values = values + (
                jnp.einsum("nl,bld->bnd", basis[0], weights) if shared else jnp.einsum("bnl,bld->bnd", basis, weights)
            )
        return values

    def __call__(self, latents: jax.Array, coords: jax.Array) -> jax.Array:
        """f at coords [1 or B, N, C] for latents [B, P] -> [B, N, D]."""
        return self.decode(latents, self.point_features(coords))
