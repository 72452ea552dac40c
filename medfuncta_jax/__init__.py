"""MedFuncta in JAX: one latent vector for a medical signal of any kind."""

from medfuncta_jax.checkpoint import load_field, save_field
from medfuncta_jax.classify import MlpFit, fit_mlp
from medfuncta_jax.coordinates import grid
from medfuncta_jax.field import Field, field_from_layers, named_layers, parameter_count
from medfuncta_jax.fit import fit_latent, reconstruct
from medfuncta_jax.inner_loop import FitResult
from medfuncta_jax.latent_store import LatentSplit, load_latents
from medfuncta_jax.outer_loss import meta_loss
from medfuncta_jax.settings import ModelSettings, Settings, SettingsError
from medfuncta_jax.signal_metric import signal_metric

__all__ = [
    "Field", "FitResult", "LatentSplit", "MlpFit", "ModelSettings", "Settings", "SettingsError",
    "field_from_layers", "fit_latent", "fit_mlp", "grid", "load_field", "load_latents", "meta_loss", "named_layers",
    "parameter_count", "reconstruct", "save_field", "signal_metric",
]  # fmt: skip
