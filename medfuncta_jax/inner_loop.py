"""The inner loop of meta-training: SGD on phi with the shared network held fixed (CAVIA, Zintgraf et al. 2019).

    phi_0 = 0,   phi_{g+1} = phi_g - alpha dL(phi_g; C_g)/dphi

differentiable to second order. The loop of test time, on every observed point, is `fit.fit_latent`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from medfuncta_jax.field import Field, Params, params_dtype
from medfuncta_jax.loss import losses_on, point_chunks, slopes_and_losses, slopes_in_chunks
from medfuncta_jax.product import PRODUCT
from medfuncta_jax.siren import Basis, Modulations, PointFeatures

Array = jax.Array | np.ndarray

# A context that is a smaller part of all points has its features computed again: taken from those of all points, their
# slope would be as large as these, in every step (measured in 3D: a quarter 15 % faster so, a tenth 7 % slower).
_TAKEN_PART = 1 / 6


@functools.partial(jax.tree_util.register_dataclass, data_fields=["latents", "losses"], meta_fields=[])
@dataclass(frozen=True)
class FitResult:
    """What a loop of steps on latents gives.

    Attributes:
      latents: [B, P], phi after the last step.
      losses: [B, steps], the mean squared error before each step.
    """

    latents: jax.Array
    losses: jax.Array


class Readings(NamedTuple):
    """How steps read latents: as modulations, and their slopes from those in modulations.

    Of what was read, and of slopes in what came of it; axes [..., G, B, n].

    Attributes:
      modulations: slopes in modulations, or nudges of modulations; [..., L] a layer.
      latents: latents, or nudges of their slopes; [..., P].
    """

    modulations: Modulations
    latents: jax.Array


Remat = Literal["none", "layers", "steps"]


def _checkpointed(function: Callable, remat: Remat) -> Callable:
    """`function` with what the backward pass keeps of it: all, the matrix products, or its arguments alone."""
    if remat == "none":
        return function
    policy = jax.checkpoint_policies.save_only_these_names(PRODUCT) if remat == "layers" else None
    return jax.checkpoint(function, prevent_cse=False, policy=policy)


def _takes_features(rows: tuple[int, ...], points: int) -> bool:
    """Whether contexts of this shape, [n] or [B, n], take their features from those of all `points`: large ones that
    the signals at hand share."""
    return rows[-1] >= _TAKEN_PART * points and math.prod(rows) == rows[-1]


def takes_features(
    context: Array | int, *, batch: int, points: int, pruned_to: int = 0, points_per_chunk: int = 0
) -> bool:
    """Whether the steps of `adapt` gain from `features` of all points; those in chunks do not look at them."""
    if isinstance(context, int):
        rows: tuple[int, ...] = (batch, pruned_to) if pruned_to else (points,)
    else:
        rows = (*context.shape[:-2], context.shape[-1])
    return not 0 < points_per_chunk < rows[-1] and _takes_features(rows, points)


def adapt(
    field: Field,
    params: Params,
    coords: jax.Array,
    signals: jax.Array,
    context: Array | int,
    *,
    step_size: float | Array,
    first_order: bool = False,
    remat: Remat = "none",
    channel_loss: Literal["mean", "sum"] = "mean",
    points_per_chunk: int = 0,
    pruned_to: int = 0,
    features: PointFeatures | Basis | None = None,
    nudges: Readings | None = None,
) -> tuple[FitResult, Readings]:
    """G inner steps from phi = 0 on reduced contexts, differentiable in `params` and `step_size`.

    Args:
      field, params: the shared network.
      coords: [N, C] in [-1, 1].
      signals: [B, N, D].
      context: integer rows in [0, N) used in each step, [B, G, n] or [G, n] shared by the batch; or the number G of
        steps on every point, which is the faster way to say so.
      step_size: alpha, a scalar or [P].
      first_order: treat the inner gradients as constants.
      remat: what the backward pass keeps of each step: "none" everything; "layers" the matrix products (two a layer),
        and recomputes what is elementwise; "steps" the latent alone, and recomputes the step. Gradients are the same.
      channel_loss: see `loss.signal_losses`.
      points_per_chunk: points of a signal in memory at once, in each step; 0 for all. `remat` then acts on chunks.
      pruned_to: with a number of steps for `context`: each step takes the points, this many, whose squared errors have
        the largest slopes in the last layer (Tack et al. 2023); 0 takes all.
      features: of all points, where the caller has them: a derivative then goes through them once, and large
        contexts shared by the batch take theirs from there.
      nudges: None, or `no_nudges` of G steps: the layers that read latents are then held constant, and the slopes in
        their weights come from `slopes_of_readers`, of the readings returned here and the slopes in the nudges.
    Returns:
      (FitResult with losses [B, G] on each step's context, readings of the G steps).
    """
    coords, signals = (jnp.asarray(array, params_dtype(params)) for array in (coords, signals))
    count = (pruned_to or signals.shape[1]) if isinstance(context, int) else context.shape[-1]
    in_chunks = 0 < points_per_chunk < count
    steps, rows_of_steps = (context, None) if isinstance(context, int) else (context.shape[-2], jnp.asarray(context))
    if rows_of_steps is not None and rows_of_steps.ndim == 3:
        rows_of_steps = jnp.moveaxis(rows_of_steps, 1, 0)  # [G, B, n]
    if rows_of_steps is None and not (in_chunks or pruned_to):
        features = field.point_features(params, coords) if features is None else features
        losses_on_all = losses_on(field, params, features, signals, channel_loss=channel_loss, steps=steps)
    readers = params if nudges is None else jax.lax.stop_gradient(params)

    def features_at(rows: jax.Array) -> PointFeatures | Basis:
        if features is None or not _takes_features(rows.shape, len(coords)):
            return field.point_features(params, coords[rows])
        return jax.tree.map(lambda leaf: leaf.at[:, rows.ravel()].get(mode="clip"), features)

    def at(modulations: Modulations, rows: jax.Array | None, weights: jax.Array | None = None):
        # rows: None for all points, [n] or [B, n]; weights [n]
        if rows is None:
            return slopes_and_losses(losses_on_all, modulations)
        chosen = jnp.take_along_axis(signals, rows[:, :, None], axis=1) if rows.ndim == 2 else signals[:, rows]
        weights = None if weights is None else jnp.broadcast_to(weights, chosen.shape[:2])
        losses_of = losses_on(
            field, params, features_at(rows), chosen, weights=weights, channel_loss=channel_loss, steps=1
        )
        return slopes_and_losses(losses_of, modulations)

    at = _checkpointed(at, remat)

    def at_chunks(modulations: Modulations, rows: jax.Array | None):
        pieces, real = point_chunks(jnp.arange(count) if rows is None else rows, points_per_chunk)

        def part_of(modulations: Modulations, piece):
            rows, real = piece
            weights = real.astype(signals.dtype)
            part = weights.sum() / count
            return jax.tree.map(lambda value: part * value, at(modulations, rows, weights))

        return slopes_in_chunks(modulations, (pieces, real), part_of)

    def step(latents: jax.Array, rows_and_nudge: tuple[jax.Array | None, Readings | None]):
        rows, nudge = rows_and_nudge
        if pruned_to:
            # A choice has no slope.
            norms = field.slope_norms(*jax.lax.stop_gradient((params, latents)), coords, signals)
            rows = jax.lax.top_k(norms, count)[1]
        modulations, pull = jax.vjp(functools.partial(field.modulations, readers), latents)
        if nudge is not None:
            modulations = jax.tree.map(jnp.add, modulations, nudge.modulations)
        own, losses = (at_chunks if in_chunks else at)(modulations, rows)  # slopes in modulations, and [B]
        slopes = pull(own)[0]  # [B, P]
        if nudge is not None:
            slopes = slopes + nudge.latents
        if first_order:
            slopes = jax.lax.stop_gradient(slopes)
        return latents - step_size * slopes, (losses, Readings(own, latents))

    start = jnp.zeros((signals.shape[0], field.model.latent_dim), signals.dtype)
    latents, (losses, readings) = jax.lax.scan(step, start, (rows_of_steps, nudges), length=steps)
    return FitResult(latents=latents, losses=losses.T), readings


def no_nudges(field: Field, *, steps: int, batch: int, dtype: jnp.dtype) -> Readings:
    """Zeros to add to what is read in `steps` steps, so that slopes in them can be asked for."""
    latents = jnp.zeros((steps, batch, field.model.latent_dim), dtype)
    shapes = jax.eval_shape(lambda: field.modulations(field.init(jax.random.key(0), dtype), latents[0]))
    return Readings(jax.tree.map(lambda leaf: jnp.zeros((steps, *leaf.shape), dtype), shapes), latents)


def slopes_of_readers(field: Field, params: Params, readings: Readings, slopes: Readings) -> Params:
    """Slopes in the layers that read latents, 0 in others, from all `readings` and the `slopes` in their nudges.

    The weights of these layers are most of the parameters, [P, L] each. In the backward pass of a loop their slope
    would be read and written again in every step. What one reading adds to it is an outer product of what is read and
    what comes back; here all readings, of steps and signals and micro-batches, are the rows of one product.
    """
    ndim = readings.latents.ndim
    one_batch = functools.partial(jax.tree.map, lambda leaf: leaf.reshape(-1, *leaf.shape[ndim - 1 :]))
    (back, latents), slopes = one_batch(readings), one_batch(slopes)

    def read(params: Params) -> Readings:
        modulations, pull = jax.vjp(functools.partial(field.modulations, params), latents)
        return Readings(modulations, pull(back)[0])

    return jax.vjp(read, params)[1](slopes)[0]
