"""The modulated field as a value: settings in, pure functions of parameters out."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import traverse_util

from medfuncta_jax.basis import BasisField, has_basis
from medfuncta_jax.passes import SirenField
from medfuncta_jax.point_field import Params, PointField
from medfuncta_jax.settings import ModelSettings, SettingsError
from medfuncta_jax.siren import ModulatedSiren, Modulations


@dataclass(frozen=True)
class Field:
    """A modulated SIREN for signals with C coordinates and D channels; hashable, holds no arrays.

    Attributes:
      model: the network's settings.
      coord_dims: C >= 1 (1 time series, 2 images, 3 volumes).
      channels: D >= 1.
    """

    model: ModelSettings
    coord_dims: int
    channels: int

    def __post_init__(self):
        if self.coord_dims < 1 or self.channels < 1:
            raise ValueError(f"a field needs coordinates and channels, got {self.coord_dims} and {self.channels}")
        if self.model.latent_grid and len(self.model.latent_grid) != self.coord_dims:
            raise SettingsError(
                f"model.latent_grid must have {self.coord_dims} entries, one an axis of the signal, got "
                f"{self.model.latent_grid}"
            )

    @property
    def module(self) -> ModulatedSiren:
        """The Flax module behind `init` and `apply`."""
        return ModulatedSiren(model=self.model, coord_dims=self.coord_dims, channels=self.channels)

    @property
    def points(self) -> PointField:
        """The field as a function of points and modulations, with the derivatives of its squared error."""
        if has_basis(self.model):
            return BasisField(self.module)
        return (PointField if self.model.modulate_scale else SirenField)(self.module)

    def init(self, key: jax.Array, dtype: Any = jnp.float32) -> Params:
        """Random shared parameters, `{"layer_1": {"kernel": [C, L], "bias": [L]}, ...}`."""
        return _init(self, key, dtype)

    def apply(self, params: Params, latents: jax.Array, coords: jax.Array) -> jax.Array:
        """f(x; phi): latents [B, P] and coords [N, C] or [B, N, C] in [-1, 1] -> [B, N, D]."""
        point_params, readers = self.split(params)
        features = self.points.features(point_params, coords if coords.ndim == 3 else coords[None])
        return self.points.values(point_params, self.modulations(readers, latents), features)

    def split(self, params: Params) -> tuple[Params, Params]:
        """The layers that read points, and those between latents and modulations, which hold most parameters."""
        numbered = {f"layer_{k}" for k in range(1, self.model.layers + 1)}
        return (
            {name: layer for name, layer in params.items() if name in numbered},
            {name: layer for name, layer in params.items() if name not in numbered},
        )

    def modulations(self, readers: Params, latents: jax.Array) -> Modulations:
        """The part of the field that does not depend on points, for latents [B, P] and the second half of `split`."""
        return cast(Modulations, self.module.apply({"params": readers}, latents, method="modulations"))

    def end_layers(self) -> tuple[str, str]:
        """Names of the layer that reads coordinates and of the layer that outputs channels."""
        return "layer_1", f"layer_{self.model.layers}"

    def latent_layers(self) -> tuple[str, ...]:
        """Names of the layers that read the latent: shift modulations, and scale modulations where there are any."""
        return self.module.latent_layers()

    def rescaled(self, params: Params, ratio: jax.Array) -> Params:
        """The same field for latents divided by `ratio`, a scalar or one number an entry (of one place)."""
        scaled = {}
        for name in self.latent_layers():
            layer = params[name]
            scaled[name] = {**layer, "kernel": (ratio[..., None] * layer["kernel"]).astype(layer["kernel"].dtype)}
        return {**params, **scaled}

    def layer_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every parameter array, `{"layer_1/kernel": (C, L), ...}`."""
        shapes = jax.eval_shape(self.init, jax.random.key(0))
        return {name: leaf.shape for name, leaf in traverse_util.flatten_dict(shapes, sep="/").items()}


@functools.partial(jax.jit, static_argnums=(0, 2))  # without jit, a hundred programs are compiled
def _init(field: Field, key: jax.Array, dtype: Any) -> Params:
    latents = jnp.zeros((1, field.model.latent_dim), dtype)
    coords = jnp.zeros((1, 1, field.coord_dims), dtype)
    params = field.module.init(key, latents, coords)["params"]
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def field_from_layers(settings: Mapping[str, Any], arrays: Mapping[str, Any]) -> tuple[Field, Params]:
    """Build a field from named layer arrays, such as weights of another program.

    Args:
      settings: the names of `ModelSettings` (`layers, width, latent_dim, omega_first, omega_last, residual,
        offset, modulate_first_layer, modulate_scale` and so on); other names are ignored, absent ones take
        `ModelSettings`' defaults except `layers`, `width` and `latent_dim`, which must be there.
      arrays: `layer_k/kernel` [in, out] and `layer_k/bias` [out] for k = 1..K, `modulation_k/kernel` [P, L] and
        `modulation_k/bias` [L] for the modulated layers, likewise `scale_k/...` with `modulate_scale`. For a latent
        grid, P is the entries of one place; with `modulation_hidden`, there are also layers `hidden_i/...`. Coordinates
        and channels are read off the first and last layer. All are of one floating type, which is kept.
    Returns:
      (field, params).
    Raises:
      ValueError: an absent setting, or a missing, surplus or misshapen array or one of another type, with its name.
    """
    model = ModelSettings.from_named(settings)
    first, last = "layer_1/kernel", f"layer_{model.layers}/kernel"
    for name in (first, last):
        if name not in arrays:
            raise ValueError(f"array {name!r} is missing (settings ask for {model.layers} layers)")
        if len(arrays[name].shape) != 2:
            raise ValueError(f"array {name!r} has shape {tuple(arrays[name].shape)}, expected two axes [in, out]")
    field = Field(model=model, coord_dims=arrays[first].shape[0], channels=arrays[last].shape[1])
    return field, params_of(field, arrays)


def params_of(field: Field, arrays: Mapping[str, Any]) -> Params:
    """The parameters of a field from named arrays; raises as `field_from_layers`."""
    expected = field.layer_shapes()
    for name, shape in expected.items():
        if name not in arrays:
            raise ValueError(f"array {name!r} of shape {shape} is missing")
        if tuple(arrays[name].shape) != shape:
            raise ValueError(f"array {name!r} has shape {tuple(arrays[name].shape)}, the settings ask for {shape}")
    surplus = sorted(set(arrays) - set(expected))
    if surplus:
        raise ValueError(f"array {surplus[0]!r} has no place in a field of these settings ({len(surplus)} surplus)")
    leaves = {name: jnp.asarray(arrays[name]) for name in expected}
    dtype = leaves["layer_1/kernel"].dtype
    for name, leaf in leaves.items():
        if not jnp.issubdtype(leaf.dtype, jnp.floating) or leaf.dtype != dtype:
            raise ValueError(f"array {name!r} is {leaf.dtype}, 'layer_1/kernel' {dtype}; all must be one float")
    return traverse_util.unflatten_dict(leaves, sep="/")


def named_layers(params: Params) -> dict[str, jax.Array]:
    """The inverse of `field_from_layers`: `{"layer_1/kernel": array, ...}`."""
    return traverse_util.flatten_dict(params, sep="/")


def params_dtype(params: Params) -> jnp.dtype:
    """The floating type that a field with these parameters computes in."""
    return jax.tree.leaves(params)[0].dtype


def parameter_count(params: Params) -> int:
    """Number of shared scalars, e.g. 7,675,393 for the paper's 2D field."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


# The step size that the latents of every exported field are scaled to.
STEP_SIZE = 1e-2


def rescale_latent(field: Field, params: Params, step_size: float | jax.Array) -> Params:
    """The same field with its latent rescaled so that `STEP_SIZE`, the default of `fit_latent`, acts as `step_size`.

    With phi_p = r_p psi_p and r_p = sqrt(alpha_p / a), SGD on psi with step a visits the same fields as SGD on phi
    with steps alpha_p, because d/dpsi_p = r_p d/dphi_p. The latent enters linearly, so only row p of every modulation
    kernel is scaled, by r_p.

    Args:
      field, params: the shared network.
      step_size: alpha > 0 that the field was trained with, a scalar, or one an entry of the latent (of one place, where
        the latent is a grid).
    """
    return field.rescaled(params, jnp.sqrt(jnp.asarray(step_size) / STEP_SIZE))
