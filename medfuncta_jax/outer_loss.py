"""The outer loss: the error on every point at the latents that the inner loop ends at.

    L(theta) = 1/B sum_i L_i(phi_G^(i)(theta); all points)

differentiated exactly through the G inner steps (MedFuncta, MIDL 2026, algorithm 1).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from medfuncta_jax.field import Field, Params, params_dtype
from medfuncta_jax.inner_loop import Array, Readings, Remat, adapt, takes_features
from medfuncta_jax.loss import in_chunks, point_chunks, signal_losses
from medfuncta_jax.siren import Basis, Modulations, PointFeatures


def meta_loss(
    field: Field,
    params: Params,
    coords: Array,
    signals: Array,
    context: Array | int,
    *,
    step_size: float | Array,
    first_order: bool = False,
    remat: Remat = "none",
    channel_loss: Literal["mean", "sum"] = "mean",
    points_per_chunk: int = 0,
    pruned_to: int = 0,
    of_latents: Callable[[jax.Array], tuple[jax.Array, jax.Array | float]] | None = None,
) -> jax.Array:
    """The outer loss after the inner loop, differentiable in `params` and `step_size`.

    Args:
      field, params: the shared network.
      coords: [N, C] in [-1, 1].
      signals: [B, N, D].
      context: integer rows used in each inner step, [B, G, n], or [G, n] shared by the batch; or the number G of steps
        on every point.
      step_size: alpha, a scalar or [P].
      first_order: hold the inner gradients constant.
      remat: see `inner_loop.adapt`.
      channel_loss: see `loss.signal_losses`.
      points_per_chunk: points of a signal in memory at once, inside each inner step and in the outer loss; 0 for all.
        The gradient is the same to rounding; only its own derivative is not to be had. Steps whose context is no
        larger are not in chunks, and may keep the `point_features` of all points.
      pruned_to: see `inner_loop.adapt`.
      of_latents: from phi_G [B, P] to the latents that are decoded and what is added to the loss, as `regularised` with
        settings; None leaves both alone.
    Returns:
      A scalar: the mean over signals of the loss on every point at phi_G.
    Raises:
      ValueError: shapes that do not belong together.
    """
    return loss_and_readings(
        field, params, coords, signals, context, step_size=step_size, first_order=first_order, remat=remat,
        channel_loss=channel_loss, points_per_chunk=points_per_chunk, pruned_to=pruned_to, of_latents=of_latents,
    )[0]  # fmt: skip


def loss_and_readings(
    field: Field,
    params: Params,
    coords: Array,
    signals: Array,
    context: Array | int,
    *,
    step_size: float | Array,
    first_order: bool = False,
    remat: Remat = "none",
    channel_loss: Literal["mean", "sum"] = "mean",
    points_per_chunk: int = 0,
    pruned_to: int = 0,
    of_latents: Callable[[jax.Array], tuple[jax.Array, jax.Array | float]] | None = None,
    nudges: Readings | None = None,
) -> tuple[jax.Array, Readings]:
    """`meta_loss` and how it read latents: in G steps, and phi_G. With nudges of G + 1 readings, see `adapt`."""
    batch = signals.shape[0]
    if not isinstance(context, int) and (context.ndim not in (2, 3) or context.shape[:-2] not in ((), (batch,))):
        raise ValueError(f"context {context.shape} must be [G, n] or [{batch}, G, n]")
    if signals.ndim != 3 or signals.shape[1] != coords.shape[0] or signals.shape[2] != field.channels:
        raise ValueError(f"signals {signals.shape} must be [B, {coords.shape[0]}, {field.channels}]")
    coords, signals = (jnp.asarray(array, params_dtype(params)) for array in (coords, signals))
    count = signals.shape[1]
    whole = not 0 < points_per_chunk < count
    for_steps = takes_features(
        context, batch=batch, points=count, pruned_to=pruned_to, points_per_chunk=points_per_chunk
    )
    features = field.point_features(params, coords) if whole or for_steps else None
    fitted, readings = adapt(
        field, params, coords, signals, context, step_size=step_size, first_order=first_order, remat=remat,
        channel_loss=channel_loss, points_per_chunk=points_per_chunk, pruned_to=pruned_to, features=features,
        nudges=None if nudges is None else jax.tree.map(lambda leaf: leaf[:-1], nudges),
    )  # fmt: skip
    latents, penalty = (fitted.latents, 0.0) if of_latents is None else of_latents(fitted.latents)
    readers = params if nudges is None else jax.lax.stop_gradient(params)
    modulations = field.modulations(readers, latents)
    if nudges is not None:
        modulations = jax.tree.map(lambda leaf, nudge: leaf + nudge[-1], modulations, nudges.modulations)
    last = Readings(jax.tree.map(jnp.zeros_like, modulations), latents)  # nothing is read back
    readings = jax.tree.map(lambda leaf, end: jnp.concatenate([leaf, end[None]]), readings, last)
    if features is not None and whole:
        losses = signal_losses(field, params, modulations, features, signals, channel_loss=channel_loss)
        return losses.mean() + penalty, readings

    def part(
        shared: tuple[Params, Modulations], features: PointFeatures | Basis | None, chunk: tuple[jax.Array, ...]
    ) -> jax.Array:
        (params, modulations), (coords, signals, real) = shared, chunk
        losses = signal_losses(
            field, params, modulations, field.point_features(params, coords) if features is None else features, signals,
            weights=jnp.broadcast_to(real, signals.shape[:2]), channel_loss=channel_loss,
        )  # fmt: skip
        return losses.mean() * real.sum() / count

    rows, real = point_chunks(jnp.arange(count), points_per_chunk)
    own = jax.tree.map(functools.partial(in_chunks, rows=rows), features)
    chunks = coords[rows], in_chunks(signals, rows), real.astype(signals.dtype)
    return _total(part, (params, modulations), own, chunks) + penalty, readings


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _total(part: Callable[[Any, Any, Any], jax.Array], shared: Any, own: Any, given: Any) -> jax.Array:
    """Sum of `part(shared, own, given)` over the leading axis of `own` and `given`; differentiable in the first two,
    once.

    The gradient of a chunk is taken while its intermediates are there, so that no chunk is computed twice and only one
    is in memory.
    """
    nothing = jnp.zeros((), jax.tree.leaves(shared)[0].dtype)
    return jax.lax.scan(lambda so_far, chunk: (so_far + part(shared, *chunk), None), nothing, (own, given))[0]


def _total_forward(part, shared, own, given):
    def add(so_far, chunk):
        loss, (slopes, own_slopes) = jax.value_and_grad(part, argnums=(0, 1))(shared, *chunk)
        return jax.tree.map(jnp.add, so_far, (loss, slopes)), own_slopes

    nothing = jnp.zeros((), jax.tree.leaves(shared)[0].dtype), jax.tree.map(jnp.zeros_like, shared)
    (total, slopes), own_slopes = jax.lax.scan(add, nothing, (own, given))
    return total, (slopes, own_slopes)


def _total_backward(part, slopes, cotangent):
    del part
    return *jax.tree.map(lambda slope: cotangent * slope, slopes), None


_total.defvjp(_total_forward, _total_backward)
