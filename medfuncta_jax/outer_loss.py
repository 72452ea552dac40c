"""The meta-loss: the error on every point at the latents that the inner loop ends at.

    L(theta) = 1/B sum_i L_i(phi_G^(i)(theta); all points)

and its gradient, exact through the G inner steps (MedFuncta, MIDL 2026, algorithm 1). `inner_steps` has the steps,
forward and back, and `passes` the layers of a step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from medfuncta_jax.arrays import Array, as_array, check_signals, on_host, points_of, relative_weights
from medfuncta_jax.field import Field, Params, params_dtype
from medfuncta_jax.fit import FitResult
from medfuncta_jax.inner_steps import InnerLoop, Loop, Observed, Reading, Source, ct_readers
from medfuncta_jax.point_field import Targets
from medfuncta_jax.product import FULL

# Smaller contexts compute the features of their points again. Features taken from those of all points have cotangents
# of that size in every step (measured in 3D: 15 % faster for a quarter of the points, 7 % slower for a tenth).
_TAKEN_PART = 1 / 6

# A function from latents phi_G [B, P] to the latents to decode and a term of the loss.
LatentLoss = Callable[[jax.Array], tuple[jax.Array, jax.Array]]


def meta_loss(
    field: Field,
    params: Params,
    signals: Array,
    context: Array | None,
    *,
    inner: InnerLoop,
    coords: Array | None = None,
    weights: Array | None = None,
    step_size: float | Array | None = None,
    latent_loss: LatentLoss | None = None,
) -> jax.Array:
    """The outer loss after the inner loop.

    The gradient in `params` and `step_size` is exact, in reverse and in forward mode; reverse mode computes it together
    with the loss, in memory that `inner` chooses. Other arguments cannot be differentiated.

    Args:
      field, params: the shared network.
      signals: floating, [B, *grid, D], or [B, N, D] at explicit `coords`.
      context: a PRNG key, which draws random contexts as `inner` says; or the points of each inner step, integers in
        [0, N), [B, G, n], or [G, n] shared by the batch; or None for `inner.steps` steps on every point.
      inner: settings of the inner loop.
      coords: None for the grid over [-1, 1] (ends included), or [*grid, C] or [N, C].
      weights: None, or one weight >= 0 a point or a value, as for `fit_latent`; 0 masks, in the inner steps and in the
        outer loss, which are means over the rest.
      step_size: alpha, a scalar or [P]; None is `inner.step_size`.
      latent_loss: None, or a function of phi_G [B, P] that gives the latents to decode and what to add to the loss, as
        a `jax.tree_util.Partial`, whose arrays have one entry a signal, [B, ...].
    Returns:
      A scalar: the mean over signals of the loss on every point at phi_G.
    Raises:
      ValueError: shapes that do not belong together, contexts out of range, weights that `fit_latent` refuses, or a
        number of micro-batches that does not divide B.
      TypeError: a derivative in anything but `params` and `step_size`.
    """
    params, alpha, batch = _checked(field, params, signals, context, inner=inner, coords=coords, step_size=step_size)
    batch = batch.weighted(weights)
    if len(batch.signals) % inner.micro_batches:
        raise ValueError(f"micro_batches = {inner.micro_batches} does not divide the {len(batch.signals)} signals")
    return _loss(params, alpha, replace(batch, latent_loss=latent_loss))


def inner_loop(
    field: Field,
    params: Params,
    signals: Array,
    context: Array | None,
    *,
    inner: InnerLoop,
    coords: Array | None = None,
    weights: Array | None = None,
    step_size: float | Array | None = None,
) -> FitResult:
    """The inner steps alone, from phi_0 = 0, for your own outer loss.

    Differentiable in all arrays, in either mode and to any order, by automatic differentiation, which keeps all arrays
    of every step; the gradient of `meta_loss` costs less. Arguments and errors are those of `meta_loss`.

    Returns:
      FitResult: latents [B, P], and losses [B, G] on the context of each step.
    """
    params, alpha, batch = _checked(field, params, signals, context, inner=inner, coords=coords, step_size=step_size)
    halves, batch = field.split(params), batch.weighted(weights)
    latents, losses, _ = batch.loop(alpha).descend(halves, batch.sources(halves[0])[1])
    return FitResult(latents=latents, losses=losses.T)


def _checked(
    field: Field, params: Params, signals: Array, context: Array | None, *, inner: InnerLoop, coords: Array | None,
    step_size: float | Array | None,
) -> tuple[Params, jax.Array, _Batch]:  # fmt: skip
    """Checked arrays in the floating type of `params`; alpha is [P]."""
    dtype, entries = params_dtype(params), field.model.latent_dim
    signals = as_array("signals", signals)
    points = points_of(signals, coords, coord_dims=field.coord_dims, channels=field.channels)
    if points.ndim != 2:
        raise ValueError(f"coords {points.shape} must be shared by the signals")
    signals = signals.reshape(len(signals), len(points), field.channels)
    alpha = as_array("step_size", inner.step_size if step_size is None else step_size)
    if alpha.shape not in ((), (entries,)):
        raise ValueError(f"step_size {alpha.shape} must be a scalar or [{entries}]")
    context = _context(context, inner, len(signals), len(points))
    batch = _Batch(field, inner, jnp.asarray(points, dtype), jnp.asarray(signals, dtype), context)
    return jax.tree.map(jnp.asarray, params), jnp.broadcast_to(jnp.asarray(alpha, dtype), (entries,)), batch


def _context(context: Array | None, inner: InnerLoop, batch: int, points: int) -> jax.Array | None:
    if context is None:
        return None
    if isinstance(context, jax.Array) and jnp.issubdtype(context.dtype, jax.dtypes.prng_key):
        return inner.contexts(context, points=points, signals=batch)
    context = as_array("context", context)
    if context.ndim not in (2, 3) or context.shape[:-2] not in ((), (batch,)) or not context.size:
        raise ValueError(f"context {context.shape} must be [G, n] or [{batch}, G, n], or a PRNG key")
    if not jnp.issubdtype(context.dtype, jnp.integer):
        raise ValueError(f"context must hold integers, got {context.dtype}")
    rows = on_host(context)
    if rows is not None and (rows.min() < 0 or rows.max() >= points):
        raise ValueError(f"context holds points from {rows.min()} to {rows.max()}, outside [0, {points})")
    return jnp.asarray(context)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["coords", "signals", "context", "weights", "latent_loss"], meta_fields=["field", "inner"],
)  # fmt: skip
@dataclass(frozen=True)
class _Batch:
    """The arguments of a meta-loss that it is not differentiated in; of the whole batch, or of a micro-batch.

    Attributes:
      field, inner: the network, and the settings of the inner loop.
      coords: [N, C].
      signals: [B, N, D].
      context: points of each step, [G, n] shared by the batch or [B, G, n]; None for all.
      weights: None, or [B, N, 1 or D].
      latent_loss: see `meta_loss`.
    """

    field: Field
    inner: InnerLoop
    coords: jax.Array
    signals: jax.Array
    context: jax.Array | None
    weights: jax.Array | None = None
    latent_loss: LatentLoss | None = None

    def weighted(self, weights: Any) -> _Batch:
        """The batch with checked weights, and with signals that are finite wherever they count."""
        if weights is None:
            check_signals(self.signals, None)
            return self
        weights = relative_weights(weights, *self.signals.shape)
        check_signals(self.signals, weights)
        weights = jnp.asarray(weights, self.signals.dtype)
        return replace(self, signals=jnp.where(weights > 0, self.signals, 0), weights=weights)

    def value(self, params: Params, alpha: jax.Array) -> jax.Array:
        """The loss."""
        point_params, readers = halves = self.field.split(params)
        outer, source = self.sources(point_params)
        latents, cost = self.decoded(self.loop(alpha).descend(halves, source)[0])
        modulations = self.field.modulations(readers, latents)

        def at(rows, share, _):
            features, targets = self.observed.at(outer, rows, share)
            return self.field.points.losses(point_params, modulations, features, targets), None

        return self.observed.over_chunks(at, None, self.share)[0].sum() + cost

    def value_and_gradient(self, params: Params, alpha: jax.Array) -> tuple[Any, Reading]:
        """(loss, gradients in the layers that read points and in alpha), and the readings of the latents of all G steps
        and of phi_G."""
        point_params, readers = halves = self.field.split(params)
        (outer, source), pull_sources = jax.vjp(self.sources, point_params)
        loop = self.loop(alpha)
        last, _, steps = loop.descend(halves, source)
        (latents, cost), pull_latents = jax.vjp(self.decoded, last)
        modulations, pull_modulations = jax.vjp(functools.partial(self.field.modulations, readers), latents)

        def at(rows, share, _):
            features, pull, targets = jax.vjp(lambda outer: self.observed.at(outer, rows, share), outer, has_aux=True)
            losses, (own, of_modulations, of_features) = self.field.points.full_gradient(
                point_params, modulations, features, targets
            )
            return (losses, own, of_modulations, pull(of_features)[0]), None

        (losses, own, of_modulations, ct_outer), _ = self.observed.over_chunks(at, None, self.share)
        ct_latents = pull_latents((pull_modulations(of_modulations)[0], jnp.ones_like(cost)))[0]
        from_steps, ct_source, of_alpha, readings = loop.pull_back(halves, source, steps, ct_latents)
        from_sources = pull_sources((ct_outer, ct_source))[0]
        of_points = jax.tree.map(lambda *parts: sum(parts), own, from_steps, from_sources)
        nothing = jax.tree.map(jnp.zeros_like, (modulations, latents))
        reading = Reading(latents, nothing[0], of_modulations, nothing[1])
        readings = jax.tree.map(lambda leaf, end: jnp.concatenate([leaf, end[None]]), readings, reading)
        return (losses.sum() + cost, of_points, of_alpha), readings

    def sources(self, point_params: Params) -> tuple[Source, Source]:
        """The sources of the features of the outer loss and of the inner steps.

        All steps share the features of all points, computed once, if memory allows. Small contexts, and contexts that
        signals do not share, compute their features again.
        """
        points, chunk, (batch, count, channels) = self.field.points, self.inner.points_per_chunk, self.signals.shape
        every = self.context is None
        seen, sets = (count, 1) if self.context is None else (self.context.shape[-1], self.context[..., 0, 0].size)
        taken = not 0 < chunk < seen and (every or (sets == 1 and seen >= _TAKEN_PART * count))
        afresh = Source(params=point_params)
        if 0 < chunk < count and not taken:
            return afresh, afresh
        features = points.features(point_params, self.coords[None])
        outer = Source(features=features)
        alike = every and taken and self.weights is None
        if alike and points.summarises(batch, count, channels, self.inner.steps):
            targets = Targets(self.signals, self.observed.share(None))
            return outer, Source(summary=points.summary(features, targets))
        return outer, outer if taken else afresh

    def decoded(self, latents: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The latents to decode, and a term of the loss."""
        if self.latent_loss is None:
            return latents, jnp.zeros((), latents.dtype)
        latents, cost = self.latent_loss(latents)
        return latents, jnp.asarray(cost, latents.dtype)

    @property
    def observed(self) -> Observed:
        inner = self.inner
        return Observed(self.field, self.coords, self.signals, inner.channel_loss, inner.points_per_chunk, self.weights)

    @property
    def share(self) -> jax.Array:
        """`Targets.shares` of all points, whose sum of losses is their mean over signals."""
        return self.observed.share(None) / len(self.signals)

    def loop(self, alpha: jax.Array) -> Loop:
        context = self.context
        if context is not None and context.ndim == 3:
            context = jnp.moveaxis(context, 1, 0)  # [G, B, n]
        return Loop(self.inner, self.observed, context, alpha)


@jax.custom_jvp
def _loss(params: Params, alpha: jax.Array, batch: _Batch) -> jax.Array:
    """`meta_loss` on arrays that fit together."""
    return _mean_over_parts(lambda part: (part.value(params, alpha), None), batch)[0]


@functools.partial(_loss.defjvp, symbolic_zeros=True)
def _loss_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    """The loss, and the product of its gradient (four passes a step) with the tangents."""
    params, alpha, batch = primals
    *along, of_batch = tangents
    if any(not isinstance(leaf, SymbolicZero) for leaf in jax.tree.leaves(of_batch)):
        raise TypeError(
            "meta_loss can be differentiated in params and step_size, not in signals, coords, weights or latent_loss"
        )
    (loss, of_points, of_alpha), readings = _mean_over_parts(lambda part: part.value_and_gradient(params, alpha), batch)
    of_readers = ct_readers(batch.field, batch.field.split(params)[1], readings)
    of_readers = jax.tree.map(lambda leaf: leaf / batch.inner.micro_batches, of_readers)
    products = jax.tree.map(
        lambda leaf, tangent: 0 if isinstance(tangent, SymbolicZero) else jnp.vdot(leaf, tangent, precision=FULL),
        (of_points | of_readers, of_alpha), tuple(along),
    )  # fmt: skip
    return loss, sum(jax.tree.leaves(products), jnp.zeros_like(loss))


def _mean_over_parts(function: Callable[[_Batch], tuple[Any, Any]], batch: _Batch) -> tuple[Any, Any]:
    """The mean over micro-batches of the first result of `function`, and its second result stacked.

    Signal i goes to micro-batch i % parts, so that each micro-batch lies on all devices that the batch is split over.
    """
    parts, context = batch.inner.micro_batches, batch.context
    if parts == 1:
        return function(batch)
    of_signals = {"signals": batch.signals, "weights": batch.weights, "latent_loss": batch.latent_loss}
    if context is not None and context.ndim == 3:
        of_signals["context"] = context
    split = jax.tree.map(lambda leaf: jnp.moveaxis(leaf.reshape(-1, parts, *leaf.shape[1:]), 1, 0), of_signals)

    def add(total: Any, part: Any) -> tuple[Any, Any]:
        more, stacked = function(replace(batch, **part))
        return jax.tree.map(lambda a, b: a + b / parts, total, more), stacked

    first = jax.tree.map(lambda leaf: leaf[0], split)
    like = jax.eval_shape(lambda part: function(replace(batch, **part))[0], first)
    return jax.lax.scan(add, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like), split)
