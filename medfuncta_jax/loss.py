"""What is minimised: the squared error of signals at points, and what an outer loss asks of latents themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from medfuncta_jax.field import Field, Params
from medfuncta_jax.settings import TrainSettings
from medfuncta_jax.siren import Basis, Modulations, PointFeatures


def signal_losses(
    field: Field,
    params: Params,
    latents: jax.Array | Modulations,
    features: PointFeatures | Basis,
    signals: jax.Array,
    *,
    weights: jax.Array | None = None,
    channel_loss: Literal["mean", "sum"] = "mean",
) -> jax.Array:
    """Squared error of each signal: mean over points, mean or sum over channels.

    Args:
      field, params: the shared network.
      latents: [B, P], or their modulations.
      features: of the N points, from `Field.point_features`.
      signals: [B, N, D].
      weights: None, or [B, N] >= 0; the mean over points is then sum(w e) / sum(w), 0 where all weights are 0.
      channel_loss: "mean" (the release) or "sum" (MedFuncta, eq. 5).
    Returns:
      [B].
    """
    errors = jnp.square(field.decode(params, latents, features) - signals)  # [B, N, D]
    errors = errors.mean(-1) if channel_loss == "mean" else errors.sum(-1)  # [B, N]
    if weights is None:
        return errors.mean(-1)
    total = weights.sum(-1)
    return jnp.where(weights > 0, weights * errors, 0).sum(-1) / jnp.where(total > 0, total, 1)


class NormalEquations(NamedTuple):
    """All that the losses of a batch on a shared `Basis` F [N, 2L] depend on; the number of points is gone.

    With y the signals less the basis' constant, sum_n (F c - y)_n^2 = c.(F'F)c - 2 c.(F'y) + y.y.

    Attributes:
      gram: F'F / N, [2L, 2L].
      cross: F'y / N, [B, 2L, D].
      square: y.y / N, [B, D].
    """

    gram: jax.Array
    cross: jax.Array
    square: jax.Array

    def errors(self, coefficients: jax.Array) -> jax.Array:
        """Mean squared errors [B, D] for coefficients [B, 2L, D]."""
        fitted = jnp.einsum("kl,bld->bkd", self.gram, coefficients)
        return jnp.einsum("bkd,bkd->bd", coefficients, fitted - 2 * self.cross) + self.square


def normal_equations(basis: Basis, signals: jax.Array) -> NormalEquations:
    """Of signals [B, N, D] on a basis shared by them."""
    functions, count = basis.functions[0], signals.shape[1]
    rest = signals - basis.constant
    return NormalEquations(
        functions.T @ functions / count,
        jnp.einsum("nk,bnd->bkd", functions, rest) / count,
        jnp.square(rest).mean(1),
    )


def losses_on(
    field: Field,
    params: Params,
    features: PointFeatures | Basis,
    signals: jax.Array,
    *,
    weights: jax.Array | None = None,
    channel_loss: Literal["mean", "sum"],
    steps: int,
) -> Callable[[jax.Array | Modulations], jax.Array]:
    """`signal_losses` as a function of latents [B, P], or their modulations, alone, for many calls on the same points.

    A basis shared by the batch is brought to its normal equations where `steps` calls repay them: they cost
    N (2L)^2 products, and a call, with its slope, then 2 (2L)^2 B D instead of 2 N 2L B D.
    """

    def on_points(latents: jax.Array | Modulations) -> jax.Array:
        return signal_losses(
            field, params, latents, features, signals, weights=weights, channel_loss=channel_loss
        )  # fmt: skip

    if weights is not None or not isinstance(features, Basis) or features.functions.shape[0] > 1:
        return on_points
    batch, points, channels = signals.shape
    size, calls = features.functions.shape[-1], 2 * steps * batch * channels
    if calls * (points - size) < points * size:
        return on_points
    equations = normal_equations(features, signals)

    def on_equations(latents: jax.Array | Modulations) -> jax.Array:
        errors = equations.errors(field.coefficients(params, latents))
        return errors.mean(-1) if channel_loss == "mean" else errors.sum(-1)

    return on_equations


Latents = TypeVar("Latents", bound=jax.Array | Modulations)


def slopes_and_losses(losses_of: Callable[[Latents], jax.Array], latents: Latents) -> tuple[Latents, jax.Array]:
    """Each signal's gradient and loss [B] at latents [B, P] or their modulations; `losses_of` gives the losses [B]."""

    def total(latents):
        losses = losses_of(latents)
        return losses.sum(), losses

    return jax.grad(total, has_aux=True)(latents)


def slopes_in_chunks(
    modulations: Modulations, chunks: Any, at: Callable[[Modulations, Any], tuple[Modulations, jax.Array]]
) -> tuple[Modulations, jax.Array]:
    """`slopes_and_losses` at modulations of B latents, with one of the `chunks` (their leading axis) in memory at once.

    `at(modulations, chunk)` gives a chunk's part of both.
    """

    def add(so_far, chunk):
        return jax.tree.map(jnp.add, so_far, at(modulations, chunk)), None

    first = jax.tree.leaves(modulations)[0]
    nothing = jax.tree.map(jnp.zeros_like, modulations), jnp.zeros(len(first), first.dtype)
    return jax.lax.scan(add, nothing, chunks)[0]


def point_chunks(rows: jax.Array, points_per_chunk: int) -> tuple[jax.Array, jax.Array]:
    """Rows [n] or [B, n] in equal chunks, [m, c] or [m, B, c], and which are not padding, bool [m, c].

    m is the least number of chunks of at most `points_per_chunk`.
    """
    count = rows.shape[-1]
    chunks = -(-count // points_per_chunk)
    size = -(-count // chunks)
    padded = jnp.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, chunks * size - count)])
    pieces = jnp.moveaxis(padded.reshape(*rows.shape[:-1], chunks, size), -2, 0)
    return pieces, (jnp.arange(chunks * size) < count).reshape(chunks, size)


def in_chunks(array: jax.Array, rows: jax.Array) -> jax.Array:
    """[B or 1, N, ...] to [m, B or 1, c, ...], for `rows` [m, c] that `point_chunks` made of all N; padded with 0."""
    padding = [(0, 0), (0, rows.size - array.shape[1]), *[(0, 0)] * (array.ndim - 2)]
    return jnp.moveaxis(jnp.pad(array, padding).reshape(len(array), *rows.shape, *array.shape[2:]), 1, 0)


def regularised(
    latents: jax.Array, *, train: TrainSettings, key: jax.Array, labels: jax.Array | None = None
) -> tuple[jax.Array, jax.Array | float]:
    """What an outer loss asks of latents [B, P] themselves.

    Args:
      latents: [B, P].
      train: of which `latent_penalty`, `latent_noise` and those of the contrastive loss count.
      key: PRNG key of the noise.
      labels: int [B], for the contrastive loss.
    Returns:
      (latents to decode, what to add to the loss).
    """
    cost = train.latent_penalty * jnp.square(latents).mean() if train.latent_penalty else 0.0
    if train.contrastive_weight and labels is not None:
        cost = cost + train.contrastive_weight * contrastive_loss(latents, labels, train.contrastive_temperature)
    if train.latent_noise:
        latents = latents + train.latent_noise * jax.random.normal(key, latents.shape, latents.dtype)
    return latents, cost


def contrastive_loss(latents: jax.Array, labels: jax.Array, temperature: float) -> jax.Array:
    """Supervised contrastive loss of a batch (Khosla et al. 2020, L_out): near those of one label, far from others.

    Args:
      latents: [B, P], compared by the cosine between them.
      labels: int [B].
      temperature: > 0; cosines are divided by it.
    Returns:
      A scalar: the mean over those signals whose label another one of the batch has; 0 where there is none.
    """
    lengths = jnp.sqrt(jnp.square(latents).sum(-1, keepdims=True) + jnp.finfo(latents.dtype).tiny)
    itself = jnp.eye(len(latents), dtype=bool)
    similar = jnp.where(itself, -jnp.inf, (latents / lengths) @ (latents / lengths).T / temperature)
    log_parts = jnp.where(itself, 0, similar) - jax.nn.logsumexp(similar, axis=1, keepdims=True)
    alike = (labels[:, None] == labels) & ~itself
    partners = alike.sum(1)
    losses = -(alike * log_parts).sum(1) / jnp.maximum(partners, 1)
    return losses.sum() / jnp.maximum((partners > 0).sum(), 1)
