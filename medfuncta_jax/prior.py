"""A Gaussian prior of latents, for signals that are observed at few points or by few measurements.

The training latents have the mean mu, and F F^T is their covariance, shrunk towards one variance for all directions as
Ledoit and Wolf (2004) derive, by more for few signals than for many. With phi = mu + F z, the entries of z are nearly
independent and of variance 1 over training signals. Descent on z from z = 0 begins at the mean signal, and follows
first the directions in which training signals differ most. A descent that stops early stays close to the prior; with
|z|^2 in the objective, weighted by the noise, it ends at the most probable latent.

Modulations are linear in the latent, so a field of z is the same network with kernels F^T M_k and biases c_k + M_k mu:
`whitened` makes this network, and every loop of this package can run on it. Signals change far more along some entries
of z than along others, by a factor of a thousand and more, so `fit_latent` takes conjugate-gradient steps.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from medfuncta_jax.arrays import Array, as_array, on_host
from medfuncta_jax.field import Field, Params, params_dtype
from medfuncta_jax.product import FULL
from medfuncta_jax.settings import SettingsError

# The least part of the shrinkage: a covariance with smaller variances has no Cholesky factor in float32.
_LEAST_SHRINKAGE = 1e-3
# Two latents say nothing of the error of their covariance.
FEWEST = 3


class GaussianPrior(NamedTuple):
    """Latents phi = mean + factor z.

    Attributes:
      mean: mu, [P].
      factor: F, lower triangular [P, P].
    """

    mean: jax.Array
    factor: jax.Array

    def latents(self, standard: jax.Array) -> jax.Array:
        """phi [B, P] of z [B, P]."""
        return self.mean + jnp.matmul(standard, self.factor.T, precision=FULL)

    def standard(self, latents: jax.Array) -> jax.Array:
        """z [B, P] of phi [B, P]."""
        return jax.scipy.linalg.solve_triangular(self.factor, (latents - self.mean).T, lower=True).T


def gaussian_prior(field: Field, params: Params, latents: Array) -> GaussianPrior:
    """The prior that the latents of training signals give.

    Args:
      field, params: the network that the latents are of.
      latents: [n, P], such as `mf.load_latents(run)["train"].latents[:]`; n may be below P, but priors of a few signals
        say little.
    Raises:
      SettingsError: modulations that are not linear in one latent vector.
      ValueError: fewer than three latents, of another size, not finite, or all equal.
    """
    if field.model.modulation_hidden or field.model.latent_grid:
        raise SettingsError(
            "a Gaussian prior needs modulations that are linear in one latent vector: model.modulation_hidden=() and "
            "model.latent_grid=()"
        )
    latents = as_array("latents", latents)
    if latents.ndim != 2 or len(latents) < FEWEST or latents.shape[1] != field.model.latent_dim:
        raise ValueError(f"latents {latents.shape} must be [n, {field.model.latent_dim}] of at least {FEWEST} signals")
    known = on_host(latents)
    if known is not None and not np.isfinite(known).all():
        raise ValueError(f"latent {np.isfinite(known).all(1).argmin()} holds values that are not finite; leave it out")
    if known is not None and (known == known[0]).all():
        raise ValueError("latents are all equal; give those of different signals")
    return _gaussian(jnp.asarray(latents, params_dtype(params)))


@jax.jit
def _gaussian(latents: jax.Array) -> GaussianPrior:
    count, size = latents.shape
    mean = latents.mean(0)
    apart = latents - mean
    covariance = jnp.matmul(apart.T, apart, precision=FULL) / count
    variance = jnp.trace(covariance) / size
    # Ledoit and Wolf, equations 9 to 12: the error of the covariance, and its distance from a multiple of the identity.
    squares = jnp.square(covariance).sum()
    error = (jnp.square(jnp.square(apart).sum(1)).mean() - squares) / count
    distance = squares - size * variance**2
    part = jnp.where(distance > error, error / jnp.where(distance > 0, distance, 1), 1).clip(_LEAST_SHRINKAGE, 1)
    shrunk = (1 - part) * covariance + part * variance * jnp.eye(size, dtype=latents.dtype)
    return GaussianPrior(mean, jnp.linalg.cholesky(shrunk))


def whitened(field: Field, params: Params, prior: GaussianPrior) -> Params:
    """Parameters of the same network for latents z."""

    def of(layer: dict[str, jax.Array]) -> dict[str, jax.Array]:
        from_mean = jnp.matmul(prior.mean, layer["kernel"], precision=FULL)
        return {
            "kernel": jnp.matmul(prior.factor.T, layer["kernel"], precision=FULL),
            "bias": layer["bias"] + from_mean,
        }

    return {name: of(layer) if name in field.latent_layers() else layer for name, layer in params.items()}
