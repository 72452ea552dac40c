"""MedFuncta in JAX: one latent vector for a medical signal of any kind."""

from importlib.metadata import PackageNotFoundError, version

from medfuncta_jax import flow, latent_operator, metrics, operators, segmentation
from medfuncta_jax.batched import FittedSignals, decode_batches, decode_latents, fit_batches, fit_options, fit_signals
from medfuncta_jax.checkpoint import load_field, save_field
from medfuncta_jax.coordinates import grid
from medfuncta_jax.datasets import open_dataset
from medfuncta_jax.field import Field, field_from_layers, named_layers, parameter_count, rescale_latent
from medfuncta_jax.fit import FitResult, fit_latent, reconstruct
from medfuncta_jax.inner_steps import InnerLoop
from medfuncta_jax.latent_store import LatentSplit, load_latents
from medfuncta_jax.linear_code import linear_start
from medfuncta_jax.measurements import ObservedField, measure, measured_loss, observed_field
from medfuncta_jax.meta_step import make_train_step
from medfuncta_jax.mlp_classifier import MlpFit, fit_mlp
from medfuncta_jax.number_regression import NumberFit, fit_number_mlp, fit_ridge
from medfuncta_jax.outer_loss import inner_loop, meta_loss
from medfuncta_jax.prepare import PreparedSignals, prepare
from medfuncta_jax.prior import GaussianPrior, gaussian_prior
from medfuncta_jax.settings import FitSettings, ModelSettings, Settings, SettingsError
from medfuncta_jax.signal_metric import signal_metric
from medfuncta_jax.units import Units

try:
    __version__ = version("medfuncta_jax")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"

__all__ = [
    "Field", "FitResult", "FitSettings", "FittedSignals", "GaussianPrior", "InnerLoop", "LatentSplit", "MlpFit",
    "ModelSettings", "NumberFit", "ObservedField", "PreparedSignals", "Settings", "SettingsError", "Units",
    "decode_batches", "decode_latents", "field_from_layers", "fit_batches", "fit_latent", "fit_mlp", "fit_number_mlp",
    "fit_options", "fit_ridge", "fit_signals", "flow", "gaussian_prior", "grid", "inner_loop", "latent_operator",
    "linear_start", "load_field", "load_latents", "make_train_step", "measure", "measured_loss", "meta_loss", "metrics",
    "named_layers", "observed_field", "open_dataset", "operators", "parameter_count", "prepare", "reconstruct",
    "rescale_latent", "save_field", "segmentation", "signal_metric",
]  # fmt: skip
