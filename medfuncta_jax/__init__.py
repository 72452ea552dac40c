"""MedFuncta in JAX: one latent vector for a medical signal of any kind."""

from medfuncta_jax.coordinates import grid
from medfuncta_jax.field import Field, field_from_layers, named_layers, parameter_count
from medfuncta_jax.inner_loop import FitResult, fit_latent, reconstruct
from medfuncta_jax.meta_step import meta_loss
from medfuncta_jax.settings import ModelSettings, Settings, SettingsError

__all__ = [
    "Field", "FitResult", "ModelSettings", "Settings", "SettingsError", "field_from_layers", "fit_latent", "grid",
    "meta_loss", "named_layers", "parameter_count", "reconstruct",
]  # fmt: skip
