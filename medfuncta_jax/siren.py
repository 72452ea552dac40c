"""The modulated SIREN (Sitzmann et al. 2020; MedFuncta, MIDL 2026, eq. 1) as one Flax module.

    h_1 = sin(w_1 (W_1 x + b_1))                                 modulated only if asked for
    s_k = sin(w_k (m_k * (W_k h_{k-1} + b_k) + M_k phi + c_k))   k = 2..K-1
    h_k = h_{k-1} + s_k (residual) or s_k (plain)
    f   = W_K h_{K-1} + b_K + offset

m_k = 1, or S_k phi + d_k with `modulate_scale` (scale and shift modulation, as in Functa's FiLM). With
`modulation_hidden`, phi goes through hidden layers first. With a `latent_grid`, phi is a vector at each of its places,
and what M_k and S_k make of them is interpolated at the point; as interpolation weights sum to one, for a linear map
this is the map of the interpolated latent, at the cost of the places instead of the points.

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

from medfuncta_jax.latent_grid import interpolation_weights, within_cells
from medfuncta_jax.product import dot_general_of
from medfuncta_jax.settings import ModelSettings
from medfuncta_jax.sine import cosine, sine


def omega_schedule(model: ModelSettings) -> np.ndarray:
    """Frequencies w_k = w_1 + (k - 1)(w_K - w_1)/(K - 1), float64 [K] (MedFuncta, eq. 4)."""
    return np.linspace(model.omega_first, model.omega_last, model.layers)


# Of each layer `modulation_k` or `scale_k`, what it makes of the latents: [B, L], or [B, places, L] of a latent grid.
Modulations = dict[str, jax.Array]


class PointFeatures(NamedTuple):
    """What of the field depends on the points but not on the latent.

    Attributes:
      hidden: h_{k-1} before the first modulated layer k, [B or 1, N, L]; None where that is the first layer.
      pre: W_k h_{k-1} + b_k of that layer, [B or 1, N, L].
      weights: of the places of a latent grid, [B or 1, N, places]; None for a latent of one vector.
    """

    hidden: jax.Array | None
    pre: jax.Array
    weights: jax.Array | None = None


class Basis(NamedTuple):
    """The same for a field with one modulated layer: f(x; phi) = constant(x) + functions(x) . coefficients(phi).

    With p = w (W h + b) and s = w (M phi + c), sin(p + s) = sin p cos s + cos p sin s: no sine is left that depends on
    both point and latent.

    Attributes:
      constant: what the latent does not reach, [B or 1, N, D].
      functions: sin p and cos p, [B or 1, N, 2L].
    """

    constant: jax.Array
    functions: jax.Array


def _uniform(bound: float, centre: float = 0.0):
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
        model, omega = self.model, omega_schedule(self.model)
        widths = model.widths
        for k in range(1, model.layers + 1):
            inputs = self.coord_dims if k == 1 else widths[k - 2]
            features = self.channels if k == model.layers else widths[k - 1]
            init = _uniform(1 / inputs if k == 1 else math.sqrt(6 / inputs) / omega[k - 1])
            dot_general = dot_general_of(model.products if 1 < k < model.layers else "float32")
            layer = nn.Dense(features, kernel_init=init, bias_init=init, dot_general=dot_general)
            setattr(self, f"layer_{k}", layer)
        if model.codebook:
            kernel = _uniform(1 / model.codebook)
            self.codebook = nn.Embed(model.codebook, model.codebook_features, embedding_init=kernel)
        inputs = model.latent_features
        for i, width in enumerate(model.modulation_hidden, start=1):
            init = _uniform(1 / math.sqrt(inputs))
            setattr(self, f"hidden_{i}", nn.Dense(width, kernel_init=init, bias_init=init))
            inputs = width
        bound = 1 / math.sqrt(inputs)
        for name in self._modulations():
            width, kernel = widths[int(name.rpartition("_")[2]) - 1], _uniform(bound)
            if model.modulation_init == "orthogonal":  # with the expected Frobenius norm of the uniform one
                kernel = nn.initializers.orthogonal(math.sqrt(width / min(width, inputs) / 3))
            bias = _uniform(bound, 1.0 if name.startswith("scale") else 0.0)
            setattr(
                self, name, nn.Dense(width, kernel_init=kernel, bias_init=bias, dot_general=dot_general_of("float32"))
            )

    def _modulations(self) -> tuple[str, ...]:
        kinds = ("modulation", "scale") if self.model.modulate_scale else ("modulation",)
        return tuple(f"{kind}_{k}" for k in range(self._first_modulated(), self.model.layers) for kind in kinds)

    def latent_layers(self) -> tuple[str, ...]:
        """Names of the layers that read the latent."""
        return ("hidden_1",) if self.model.modulation_hidden else self._modulations()

    def _first_modulated(self) -> int:
        return 1 if self.model.modulate_first_layer else 2

    def _omega(self, k: int, dtype) -> jax.Array:
        return jnp.asarray(omega_schedule(self.model)[k - 1], dtype)

    def _has_basis(self) -> bool:
        model = self.model  # one modulated layer: the second of three
        return model.layers == 3 and not (model.modulate_first_layer or model.modulate_scale or model.latent_grid)

    def point_features(self, coords: jax.Array, *, basis: bool = True) -> PointFeatures | Basis:
        """All that needs no latent: coords [1, N, C] shared by the batch, or [B, N, C]; `basis` allows a `Basis`."""
        model, weights = self.model, None
        if model.latent_grid:
            weights = interpolation_weights(coords, model.latent_grid, linear=model.latent_interpolation == "linear")
        if model.latent_interpolation == "patches":
            coords = within_cells(coords, model.latent_grid)
        first = self.layer_1(coords)
        if model.modulate_first_layer:
            return PointFeatures(None, first, weights)
        hidden = sine(first * self._omega(1, first.dtype))
        pre = self.layer_2(hidden)
        if not (basis and self._has_basis()):
            return PointFeatures(hidden, pre, weights)
        pre = pre * self._omega(2, pre.dtype)
        constant = self.layer_3(hidden if self.model.residual else jnp.zeros_like(pre)) + self.model.offset
        phases = jnp.asarray([0, np.pi / 2], pre.dtype)[:, None]  # cos p = sin(p + pi/2), and no copy to join the two
        return Basis(constant, sine(pre[..., None, :] + phases).reshape(*pre.shape[:-1], -1))

    def _codes(self, latents: jax.Array) -> jax.Array:
        """What modulations read of latents [B, P]: [B, features], or [B, places, features] of a latent grid."""
        model = self.model
        if model.codebook:
            latents = self._quantised(latents)
        codes = latents.reshape(-1, model.places, model.latent_features) if model.latent_grid else latents
        for i in range(1, len(model.modulation_hidden) + 1):
            codes = nn.relu(getattr(self, f"hidden_{i}")(codes))
        return codes

    def _quantised(self, latents: jax.Array) -> jax.Array:
        """Each piece of latents [B, P] as the nearest vector of the codebook.

        The latent's slope is that of the vector which stands for it, so that inner steps can move it.
        """
        vectors = self.codebook.embedding  # [vectors, d]
        pieces = latents.reshape(len(latents), -1, vectors.shape[1])
        distances = jnp.square(vectors).sum(-1) - 2 * pieces @ vectors.T  # less |piece|^2, which all share
        nearest = self.codebook(jnp.argmin(distances, axis=-1)).reshape(latents.shape)
        return nearest + latents - jax.lax.stop_gradient(latents)

    def modulations(self, latents: jax.Array) -> Modulations:
        """What the layers see of latents [B, P]."""
        codes = self._codes(latents)
        return {name: getattr(self, name)(codes) for name in self._modulations()}

    def coefficients(self, latents: jax.Array | Modulations) -> jax.Array:
        """Of the functions of a `Basis`, [B, 2L, D], for latents [B, P] or their modulations."""
        given = latents if isinstance(latents, dict) else self.modulations(latents)
        shift = given["modulation_2"] * self._omega(2, given["modulation_2"].dtype)  # [B, L]
        kernel = self.layer_3.variables["params"]["kernel"]  # [L, D]
        return jnp.concatenate([cosine(shift)[..., None] * kernel, sine(shift)[..., None] * kernel], axis=1)

    def decode(self, latents: jax.Array | Modulations, features: PointFeatures | Basis) -> jax.Array:
        """Values [B, N, D] of the fields of latents [B, P], or their modulations, at the points behind `features`."""
        if isinstance(features, Basis):
            functions, coefficients = features.functions, self.coefficients(latents)
            if functions.shape[0] == 1:  # one matrix product for the whole batch
                return features.constant + jnp.einsum("nk,bkd->bnd", functions[0], coefficients)
            return features.constant + jnp.einsum("bnk,bkd->bnd", functions, coefficients)
        return self.head(self.last_hidden(latents, features))

    def head(self, hidden: jax.Array) -> jax.Array:
        """The linear layer: [B, N, L] -> [B, N, D]."""
        return getattr(self, f"layer_{self.model.layers}")(hidden) + self.model.offset

    def last_hidden(self, latents: jax.Array | Modulations, features: PointFeatures) -> jax.Array:
        """h_{K-1} [B, N, L], what the linear layer reads."""
        model, first = self.model, self._first_modulated()
        given = latents if isinstance(latents, dict) else self.modulations(latents)
        batch = len(given[f"modulation_{first}"])
        h, pre, weights = features

        def modulation(name: str) -> jax.Array:
            return given[name][:, None, :] if weights is None else weights @ given[name]  # [B, 1 or N, L]

        for k in range(first, model.layers):
            if k > first:
                pre = getattr(self, f"layer_{k}")(h).reshape(batch, -1, model.widths[k - 1])  # [B, N, L]
            if model.modulate_scale:
                pre = modulation(f"scale_{k}") * pre
            pre = pre + modulation(f"modulation_{k}")  # [B, N, L]
            s = sine(pre * self._omega(k, pre.dtype))
            if k == first and model.residual and h is not None:
                s = h + s  # of points that the batch may share, so not yet rows
            # From here on rows [B N, L]. With a reshape between this sum and the product that reads it, the compiler
            # would make a sum that the backward pass does not keep from all sines below it, in every layer again.
            rows = s.reshape(-1, s.shape[-1])
            h = h + rows if h is not None and k > first and model.residual else rows
        assert h is not None  # K >= 3: there is a modulated layer
        return h.reshape(batch, -1, h.shape[-1])

    def __call__(self, latents: jax.Array, coords: jax.Array) -> jax.Array:
        """f at coords [1 or B, N, C] for latents [B, P] -> [B, N, D]."""
        return self.decode(latents, self.point_features(coords))
