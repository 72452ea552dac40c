"""The modulated SIREN (Sitzmann et al. 2020; MedFuncta, MIDL 2026, eq. 1) as one Flax module.

    h_1 = sin(w_1 (W_1 x + b_1))                                 modulated only if asked for
    s_k = sin(w_k (m_k * (W_k h_{k-1} + b_k) + M_k phi + c_k))   k = 2..K-1
    h_k = h_{k-1} + s_k (residual) or s_k (plain)
    f   = W_K h_{K-1} + b_K + offset

m_k = 1, or S_k phi + d_k with `modulate_scale` (scale and shift modulation, as in Functa's FiLM).
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from medfuncta_jax.settings import ModelSettings
from medfuncta_jax.sine import sine


def omega_schedule(model: ModelSettings) -> np.ndarray:
    """Frequencies w_k = w_1 + (k - 1)(w_K - w_1)/(K - 1), float64 [K] (MedFuncta, eq. 4)."""
    return np.linspace(model.omega_first, model.omega_last, model.layers)


def _uniform(bound: float, centre: float = 0.0):
    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, centre - bound, centre + bound)

    return init


class ModulatedSiren(nn.Module):
    """f(x; phi), linear layers `layer_k`, shift modulations `modulation_k`, scale modulations `scale_k`.

    Initialisation: W_1, b_1 ~ U(-1/n, 1/n); W_k, b_k ~ U(-sqrt(6/n)/w_k, sqrt(6/n)/w_k), n the inputs
    of the layer; M_k, c_k, S_k ~ U(-1/sqrt(P), 1/sqrt(P)); d_k the same about 1.
    """

    model: ModelSettings
    channels: int

    @nn.compact
    def __call__(self, latents: jax.Array, coords: jax.Array) -> jax.Array:
        """Values of B fields.

        Args:
          latents: [B, P].
          coords: [B, N, C], or [1, N, C] shared by the batch: then all that does not depend on the
            latent (the first layer, the first hidden product) is computed once, not B times.
        Returns:
          [B, N, D].
        """
        model = self.model
        omega = omega_schedule(model)

        def linear(k: int, features: int) -> nn.Dense:
            inputs = coords.shape[-1] if k == 1 else model.width
            bound = 1 / inputs if k == 1 else math.sqrt(6 / inputs) / omega[k - 1]
            return nn.Dense(features, kernel_init=_uniform(bound), bias_init=_uniform(bound), name=f"layer_{k}")

        def modulation(name: str, centre: float) -> jax.Array:
            bound = 1 / math.sqrt(model.latent_dim)
            init, bias = _uniform(bound), _uniform(bound, centre)
            return nn.Dense(model.width, kernel_init=init, bias_init=bias, name=name)(latents)[:, None, :]  # [B, 1, L]

        h = coords
        for k in range(1, model.layers):
            pre = linear(k, model.width)(h)  # [1 or B, N, L]
            if k > 1 or model.modulate_first_layer:
                if model.modulate_scale:
                    pre = modulation(f"scale_{k}", 1.0) * pre
                pre = pre + modulation(f"modulation_{k}", 0.0)  # [B, N, L]
            s = sine(pre * omega[k - 1].astype(pre.dtype))
            h = h + s if model.residual and k > 1 else s
        return linear(model.layers, self.channels)(h) + model.offset
