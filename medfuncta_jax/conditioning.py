"""Latents in which a gradient step is a Gauss-Newton step.

To first order about phi = 0 a latent changes the values of a signal by J phi, J [N D, P], which is the same for all
signals on the same points. The mean squared error then has the Gauss-Newton matrix 2 J^T J / (N D), and

    H = 2 J^T J / (N D) + damping M M^T / L,        H = C C^T,        phi = C^{-T} z

where M M^T / L are the mean squares of the phases w_k M_k phi over units and layers. The damping keeps phases from
moving further than the linear model of the sine holds; it is in the units of the squared error over those of squared
phases, so it does not depend on the scale of the latent. A gradient step of size 1 on z is a damped Gauss-Newton step
on phi, for signals of which every channel was recorded. As modulations are linear in the latent, a field of z is the
same network with weights C^{-1} M_k: `conditioned` makes this network, and every loop of this package can run on it.

J costs one backward pass over the points of one signal, J^T J and the factor N P^2 + P^3 / 3 products. On a CPU JAX
calls LAPACK for the factor, and OpenBLAS's waiting threads then take the cores from XLA: set the environment variable
OPENBLAS_NUM_THREADS=1, as the launcher does (121 ms for an update of configs/pneumonia_xray_28.py on two cores, 205 ms
without).
"""

from __future__ import annotations

import functools
from typing import cast

import jax
import jax.numpy as jnp

from medfuncta_jax.field import Field, Params
from medfuncta_jax.product import FULL
from medfuncta_jax.settings import SettingsError
from medfuncta_jax.siren import Modulations, PointFeatures

_JITTER = 1e-6  # part of the mean of H's diagonal that is added to it, so that float32 can factorise it


def check_conditioning(field: Field) -> None:
    """Refuse fields whose modulations are not linear in one latent vector.

    Raises:
      SettingsError: hidden modulation layers, scale modulations or a latent grid.
    """
    model = field.model
    if model.modulation_hidden or model.modulate_scale or model.latent_grid:
        raise SettingsError(
            "Gauss-Newton steps, and a linear start, need shift modulations that are linear in one latent vector: "
            "model.modulation_hidden=(), model.modulate_scale=False and model.latent_grid=()"
        )


def gauss_newton_factor(
    field: Field, params: Params, coords: jax.Array, *, damping: float, weights: jax.Array | None = None
) -> jax.Array:
    """The factor C of H = C C^T, lower triangular [P, P].

    Args:
      field, params: the network; differentiable in `params`.
      coords: [N, C] in [-1, 1], the points of the error.
      damping: > 0. A good value is a few times the mean squared error that the fit is to reach.
      weights: [N], the weights of points in the error; None weighs all equally.
    """
    readers, by_unit = field.split(params)[1], _by_unit(field, params, coords)
    parts = [jnp.matmul(by_unit[name], readers[name]["kernel"].T, precision=FULL) for name in field.latent_layers()]
    jacobian = functools.reduce(jnp.add, parts)  # [N, D, P]
    share = jnp.full(len(coords), 2 / len(coords)) if weights is None else 2 * weights / weights.sum()
    scaled = (jacobian * jnp.sqrt(share / field.channels)[:, None, None]).reshape(-1, field.model.latent_dim)
    matrix = jnp.matmul(scaled.T, scaled, precision=FULL) + damping * _mean_square_phases(field, readers)
    jitter = _JITTER * jnp.trace(matrix) / len(matrix)
    return jnp.linalg.cholesky(matrix + jitter * jnp.eye(len(matrix), dtype=matrix.dtype))


def phase_jacobian(field: Field, params: Params, coords: jax.Array) -> jax.Array:
    """The derivatives of values at coords [N, C] by the phases that latents add, at phi = 0: [N, D, units]."""
    module, by_unit = field.module, _by_unit(field, params, coords)
    layers = zip(range(module.first_modulated, field.model.layers), field.latent_layers(), strict=True)
    return jnp.concatenate([by_unit[name] / module.omega(k) for k, name in layers], axis=-1)


def _by_unit(field: Field, params: Params, coords: jax.Array) -> Modulations:
    """The derivatives of values at coords [N, C] by the modulations, at phi = 0, by layer: [N, D, L]."""
    point_params, readers = field.split(params)
    module, variables = field.module, {"params": point_params}

    def value(modulations: Modulations, features: PointFeatures) -> jax.Array:
        """[1, 1, D] from the features [1, L] of one point."""
        of_point = jax.tree.map(lambda each: each[:, None], features)
        return cast(jax.Array, module.apply(variables, modulations, of_point, method="values"))

    at_zero = field.modulations(readers, jnp.zeros((1, field.model.latent_dim), coords.dtype))
    features = module.apply(variables, coords[None], method="features")
    by_unit = jax.vmap(jax.jacrev(value), in_axes=(None, 1))(at_zero, features)  # by name, [N, 1, 1, D, 1, L]
    return jax.tree.map(lambda each: each.reshape(len(coords), field.channels, -1), by_unit)


def _mean_square_phases(field: Field, readers: Params) -> jax.Array:
    """A [P, P] with phi^T A phi the mean over units and layers of the squared phases that phi adds."""
    module = field.module
    layers = zip(range(module.first_modulated, field.model.layers), field.latent_layers(), strict=True)
    kernels = [module.omega(k) * readers[name]["kernel"] for k, name in layers]
    each = jnp.concatenate(kernels, axis=1)  # [P, all units]
    return jnp.matmul(each, each.T, precision=FULL) / each.shape[1]


def conditioned(field: Field, params: Params, factor: jax.Array) -> Params:
    """Parameters of the same network for latents z = C^T phi, [B, P] as rows z = phi C."""
    solve = functools.partial(jax.scipy.linalg.solve_triangular, factor, lower=True)
    return {
        name: {**layer, "kernel": solve(layer["kernel"])} if name in field.latent_layers() else layer
        for name, layer in params.items()
    }
