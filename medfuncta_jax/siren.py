"""The modulated SIREN (Sitzmann et al. 2020; MedFuncta, MIDL 2026, eq. 1) as one Flax module.

    h_1 = sin(w_1 (W_1 x + b_1))                                 modulated only if asked for
    s_k = sin(w_k (m_k * (W_k h_{k-1} + b_k) + M_k phi + c_k))   k = 2..K-1
    h_k = h_{k-1} + s_k (residual) or s_k (plain)
    f   = W_K h_{K-1} + b_K + offset

m_k = 1, or S_k phi + d_k with `modulate_scale` (scale and shift modulation, as in Functa's FiLM). With
`modulation_hidden`, phi goes through hidden layers first. With a `latent_grid`, phi is a vector at each of its places,
and the products with M_k and S_k are interpolated at the point. Interpolation weights sum to one, so a linear map of
the places equals a map of the interpolated latent, at the cost of the places instead of the points.

The module has three parts, so that none is computed twice: `features` depends on the points alone, `modulations` on the
latents alone, and `values` joins them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from medfuncta_jax.latent_grid import interpolation_weights
from medfuncta_jax.product import FULL, product
from medfuncta_jax.settings import ModelSettings
from medfuncta_jax.sine import sine


def omega_schedule(model: ModelSettings) -> np.ndarray:
    """Frequencies w_k = w_1 + (k - 1)(w_K - w_1)/(K - 1), float64 [K] (MedFuncta, eq. 4)."""
    return np.linspace(model.omega_first, model.omega_last, model.layers)


# Shifts "modulation_k" and factors "scale_k" of the layers, [B, L], or [B, places, L] of a latent grid.
Modulations = dict[str, jax.Array]


class PointFeatures(NamedTuple):
    """The part of the field that depends on the points but not on the latent.

    Attributes:
      hidden: h_{k-1} before the first modulated layer k, [B or 1, n, L]; None where that is the first layer.
      pre: W_k h_{k-1} + b_k of that layer, [B or 1, n, L].
      interpolation: interpolation weights of a latent grid, [B or 1, n, places]; None for a latent of one vector.
    """

    hidden: jax.Array | None
    pre: jax.Array
    interpolation: jax.Array | None = None


def uniform(bound: float, centre: float = 0.0):
    """An initialiser: U(centre - bound, centre + bound)."""

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, centre - bound, centre + bound)

    return init


class ModulatedSiren(nn.Module):
    """f(x; phi) with linear layers `layer_k`, shift modulations `modulation_k`, scale modulations `scale_k`.

    Initialisation: W_1, b_1 ~ U(-1/n, 1/n); W_k, b_k ~ U(-sqrt(6/n)/w_k, sqrt(6/n)/w_k), n the inputs
    of the layer; M_k, c_k, S_k ~ U(-1/sqrt(P), 1/sqrt(P)); d_k the same about 1. With `modulation_init` "orthogonal",
    M_k and S_k are scaled orthogonal matrices instead.
    """

    model: ModelSettings
    coord_dims: int
    channels: int

    def setup(self):
        model = self.model
        inputs = self.coord_dims
        for k in range(1, model.layers + 1):
            init = uniform(1 / inputs if k == 1 else math.sqrt(6 / inputs) / self.omega(k))
            setattr(self, f"layer_{k}", self._dense(self.units(k), init, init, hidden=1 < k < model.layers))
            inputs = self.units(k)
        inputs = model.latent_features
        for i, width in enumerate(model.modulation_hidden, start=1):
            init = uniform(1 / math.sqrt(inputs))
            setattr(self, f"hidden_{i}", self._dense(width, init, init))
            inputs = width
        bound = 1 / math.sqrt(inputs)
        for name in self.modulation_layers():
            width, kernel = self.units(int(name.rpartition("_")[2])), uniform(bound)
            if model.modulation_init == "orthogonal":  # with the expected Frobenius norm of the uniform one
                kernel = nn.initializers.orthogonal(math.sqrt(width / min(width, inputs) / 3))
            bias = uniform(bound, 1.0 if name.startswith("scale") else 0.0)
            setattr(self, name, self._dense(width, kernel, bias))

    def _dense(self, features, kernel_init, bias_init, *, hidden: bool = False) -> nn.Dense:
        products = self.model.products if hidden else "float32"

        def dot_general(x, kernel, dimensions, precision=None, preferred_element_type=None):
            del dimensions, precision, preferred_element_type
            return product(x, kernel, products)

        return nn.Dense(features, kernel_init=kernel_init, bias_init=bias_init, dot_general=dot_general)

    def units(self, k: int) -> int:
        """Outputs of layer k."""
        return self.channels if k == self.model.layers else self.model.width

    @property
    def first_modulated(self) -> int:
        """The number of the first modulated layer."""
        return 1 if self.model.modulate_first_layer else 2

    def modulation_layers(self) -> tuple[str, ...]:
        """Names of the layers that give the modulations."""
        kinds = ("modulation", "scale") if self.model.modulate_scale else ("modulation",)
        return tuple(f"{kind}_{k}" for k in range(self.first_modulated, self.model.layers) for kind in kinds)

    def latent_layers(self) -> tuple[str, ...]:
        """Names of the layers that read the latent."""
        return ("hidden_1",) if self.model.modulation_hidden else self.modulation_layers()

    def omega(self, k: int) -> float:
        """w_k, a Python number, so that products keep the precision of the other factor."""
        return float(omega_schedule(self.model)[k - 1])

    def features(self, coords: jax.Array) -> PointFeatures:
        """The part of the field that does not depend on latents: coords [1, n, C] shared by the batch, or [B, n, C]."""
        model, interpolation = self.model, None
        if model.latent_grid:
            interpolation = interpolation_weights(
                coords, model.latent_grid, linear=model.latent_interpolation == "linear"
            )
        first = self.layer_1(coords)
        if model.modulate_first_layer:
            return PointFeatures(None, first, interpolation)
        hidden = sine(first * self.omega(1))
        return PointFeatures(hidden, self.layer_2(hidden), interpolation)

    def modulations(self, latents: jax.Array) -> Modulations:
        """The part of the field that does not depend on points: latents [B, P]."""
        model = self.model
        codes = latents.reshape(-1, model.places, model.latent_features) if model.latent_grid else latents
        for i in range(1, len(model.modulation_hidden) + 1):
            codes = nn.relu(getattr(self, f"hidden_{i}")(codes))
        return {name: getattr(self, name)(codes) for name in self.modulation_layers()}

    def values(self, modulations: Modulations, features: PointFeatures) -> jax.Array:
        """f [B, n, D] at the points of `features`."""
        return self.head(self.last_hidden(modulations, features))

    def head(self, hidden: jax.Array) -> jax.Array:
        """The linear layer: [B, n, L] -> [B, n, D]."""
        return getattr(self, f"layer_{self.model.layers}")(hidden) + self.model.offset

    def last_hidden(self, modulations: Modulations, features: PointFeatures) -> jax.Array:
        """h_{K-1} [B, n, L], the input of the linear layer."""
        model, first = self.model, self.first_modulated
        h, pre, interpolation = features

        def modulation(name: str) -> jax.Array:
            given = modulations[name]
            # [B, 1 or n, L]
            return given[:, None, :] if interpolation is None else jnp.matmul(interpolation, given, precision=FULL)

        for k in range(first, model.layers):
            if k > first:
                pre = getattr(self, f"layer_{k}")(h)  # [B, n, L]
            if model.modulate_scale:
                pre = modulation(f"scale_{k}") * pre
            s = sine((pre + modulation(f"modulation_{k}")) * self.omega(k))
            h = h + s if model.residual and h is not None else s
        assert h is not None  # K >= 3: there is a modulated layer
        return h

    def __call__(self, latents: jax.Array, coords: jax.Array) -> jax.Array:
        """f at coords [1 or B, n, C] for latents [B, P] -> [B, n, D]."""
        return self.values(self.modulations(latents), self.features(coords))
