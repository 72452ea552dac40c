"""The meta-loss: the error on every point at the latents that the inner loop ends at.

    L(theta) = 1/B sum_i L_i(phi_G^(i)(theta); all points)

and its gradient, exactly through the G inner steps (MedFuncta, MIDL 2026, algorithm 1). To follow a signal from here to
a gradient, read on in `inner_steps` (the steps, forward and back) and `passes` (a step's layers).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from medfuncta_jax.arrays import Array, as_array, check_signals, on_host, points_of
from medfuncta_jax.field import Field, Params, params_dtype
from medfuncta_jax.inner_steps import FitResult, InnerLoop, Loop, Reading, ct_readers, takes_features
from medfuncta_jax.point_field import Observed, Targets, over_chunks, shares
from medfuncta_jax.product import FULL

# Latents phi_G [B, P] to those that are decoded, and a term of the loss.
LatentLoss = Callable[[jax.Array], tuple[jax.Array, jax.Array]]


class Batch(NamedTuple):
    """The arguments of a meta-loss that are not differentiated.

    Attributes:
      coords: [N, C].
      signals: [B, N, D].
      context: points of each step, [G, n] shared by the batch or [B, G, n]; None for all.
      latent_loss: see `meta_loss`.
    """

    coords: jax.Array
    signals: jax.Array
    context: jax.Array | None
    latent_loss: LatentLoss | None


def meta_loss(
    field: Field,
    params: Params,
    signals: Array,
    context: Array | None,
    *,
    inner: InnerLoop,
    coords: Array | None = None,
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
      step_size: alpha, a scalar or [P]; None is `inner.step_size`.
      latent_loss: None, or a function of phi_G [B, P] that gives the latents to decode and what to add to the loss, as
        a `jax.tree_util.Partial`, whose arrays have one entry a signal, [B, ...].
    Returns:
      A scalar: the mean over signals of the loss on every point at phi_G.
    Raises:
      ValueError: shapes that do not belong together, contexts out of range, or a number of micro-batches that does not
        divide B.
      TypeError: a derivative in anything but `params` and `step_size`.
    """
    params, alpha, batch = _checked(field, params, signals, context, inner=inner, coords=coords, step_size=step_size)
    if len(batch.signals) % inner.micro_batches:
        raise ValueError(f"micro_batches = {inner.micro_batches} does not divide the {len(batch.signals)} signals")
    return _loss((field, inner), params, alpha, batch._replace(latent_loss=latent_loss))


def inner_loop(
    field: Field,
    params: Params,
    signals: Array,
    context: Array | None,
    *,
    inner: InnerLoop,
    coords: Array | None = None,
    step_size: float | Array | None = None,
) -> FitResult:
    """The inner steps alone, from phi_0 = 0, for an outer loss of one's own.

    Differentiable in all arrays, in either mode and to any order, by automatic differentiation, which keeps all of
    every step; the gradient of `meta_loss` costs less. Arguments and errors are those of `meta_loss`.

    Returns:
      FitResult: latents [B, P], and losses [B, G] on the context of each step.
    """
    params, alpha, batch = _checked(field, params, signals, context, inner=inner, coords=coords, step_size=step_size)
    part, (point_params, readers) = _Part(field, inner, batch), field.split(params)
    return part.loop(alpha).descend(point_params, readers, part.sources(point_params)[1])[0]


def _checked(
    field: Field, params: Params, signals: Array, context: Array | None, *, inner: InnerLoop, coords: Array | None,
    step_size: float | Array | None,
) -> tuple[Params, jax.Array, Batch]:  # fmt: skip
    """Arrays that fit together, of the floating type of `params`; alpha is [P]."""
    dtype, entries = params_dtype(params), field.model.latent_dim
    signals = as_array("signals", signals)
    points = points_of(signals, coords, coord_dims=field.coord_dims, channels=field.channels)
    if points.ndim != 2:
        raise ValueError(f"coords {points.shape} must be shared by the signals")
    signals = signals.reshape(len(signals), len(points), field.channels)
    check_signals(signals, None)
    alpha = as_array("step_size", inner.step_size if step_size is None else step_size)
    if alpha.shape not in ((), (entries,)):
        raise ValueError(f"step_size {alpha.shape} must be a scalar or [{entries}]")
    context = _context(context, inner, len(signals), len(points))
    batch = Batch(jnp.asarray(points, dtype), jnp.asarray(signals, dtype), context, None)
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


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _loss(static: tuple[Field, InnerLoop], params: Params, alpha: jax.Array, batch: Batch) -> jax.Array:
    """`meta_loss` on arrays that fit together."""

    def of_part(part: Batch) -> tuple[jax.Array, None]:
        return _Part(*static, part).value(params, alpha), None

    return _mean_over_parts(of_part, static[1].micro_batches, batch)[0]


@functools.partial(_loss.defjvp, symbolic_zeros=True)
def _loss_jvp(static: tuple[Field, InnerLoop], primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    """The loss, and the product of its gradient (four passes a step) with the tangents."""
    field, inner = static
    params, alpha, batch = primals
    *along, of_batch = tangents
    if any(not isinstance(leaf, SymbolicZero) for leaf in jax.tree.leaves(of_batch)):
        raise TypeError(
            "meta_loss can be differentiated in params and step_size, not in signals, coords or latent_loss"
        )

    def of_part(part: Batch) -> tuple[Any, Reading]:
        return _Part(field, inner, part).value_and_gradient(params, alpha)

    (loss, of_points, of_alpha), readings = _mean_over_parts(of_part, inner.micro_batches, batch)
    of_readers = ct_readers(field, field.split(params)[1], readings)
    of_readers = jax.tree.map(lambda leaf: leaf / inner.micro_batches, of_readers)
    gradient = (of_points | of_readers, of_alpha)
    products = jax.tree.map(
        lambda leaf, tangent: 0 if isinstance(tangent, SymbolicZero) else jnp.vdot(leaf, tangent, precision=FULL),
        gradient,
        tuple(along),
    )
    return loss, sum(jax.tree.leaves(products), jnp.zeros_like(loss))


def _mean_over_parts(function: Callable[[Batch], tuple[Any, Any]], parts: int, batch: Batch) -> tuple[Any, Any]:
    """The mean over micro-batches of the first result of `function`, and its second result stacked.

    Signal i goes to micro-batch i % parts: each then lies on all devices that the batch is split over.
    """
    if parts == 1:
        return function(batch)
    shared = None if batch.context is None or batch.context.ndim == 3 else batch.context
    of_signals = (batch.signals, batch.context if shared is None else None, batch.latent_loss)
    split = jax.tree.map(lambda leaf: jnp.moveaxis(leaf.reshape(-1, parts, *leaf.shape[1:]), 1, 0), of_signals)

    def of_part(part: Any) -> tuple[Any, Any]:
        signals, context, latent_loss = part
        return function(Batch(batch.coords, signals, context if shared is None else shared, latent_loss))

    def add(total: Any, part: Any) -> tuple[Any, Any]:
        more, stacked = of_part(part)
        return jax.tree.map(lambda a, b: a + b / parts, total, more), stacked

    like = jax.eval_shape(lambda split: of_part(jax.tree.map(lambda leaf: leaf[0], split))[0], split)
    return jax.lax.scan(add, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like), split)


@dataclass(frozen=True)
class _Part:
    """The meta-loss of one micro-batch."""

    field: Field
    inner: InnerLoop
    batch: Batch

    def value(self, params: Params, alpha: jax.Array) -> jax.Array:
        point_params, readers = self.field.split(params)
        outer, steps = self.sources(point_params)
        latents = self.loop(alpha).descend(point_params, readers, steps)[0].latents
        latents, cost = self.latent_loss(latents)
        modulations = self.field.modulations(readers, latents)

        def at(rows, weights, _):
            features, targets = self.observed(self.outer_source).at(outer, rows, weights)
            return self.field.points.losses(point_params, modulations, features, targets), None

        return self.over_chunks(at)[0].sum() + cost

    def value_and_gradient(self, params: Params, alpha: jax.Array) -> tuple[Any, Reading]:
        """(loss, gradients in the layers that read points and in alpha), and the readings of latents: the G steps' and
        that of phi_G."""
        field, points = self.field, self.field.points
        point_params, readers = field.split(params)
        (outer, source), pull_sources = jax.vjp(self.sources, point_params)
        loop = self.loop(alpha)
        fitted, steps = loop.descend(point_params, readers, source)
        (latents, cost), pull_latents = jax.vjp(self.latent_loss, fitted.latents)
        modulations, pull_modulations = jax.vjp(functools.partial(field.modulations, readers), latents)

        def at(rows, weights, _):
            observed = self.observed(self.outer_source)
            features, pull, targets = jax.vjp(lambda outer: observed.at(outer, rows, weights), outer, has_aux=True)
            losses, (own, of_modulations, of_features) = points.full_gradient(
                point_params, modulations, features, targets
            )
            return (losses, own, of_modulations, pull(of_features)[0]), None

        (losses, own, of_modulations, ct_outer), _ = self.over_chunks(at)
        ct_latents = pull_latents((pull_modulations(of_modulations)[0], jnp.ones_like(cost)))[0]
        from_steps, ct_source, of_alpha, readings = loop.pull_back(point_params, readers, source, steps, ct_latents)
        from_sources = pull_sources((ct_outer, ct_source))[0]
        of_points = jax.tree.map(lambda *parts: sum(parts), own, from_steps, from_sources)
        nothing = jax.tree.map(jnp.zeros_like, (modulations, latents))
        last = Reading(latents, nothing[0], of_modulations, nothing[1])
        readings = jax.tree.map(lambda leaf, end: jnp.concatenate([leaf, end[None]]), readings, last)
        return (losses.sum() + cost, of_points, of_alpha), readings

    @property
    def steps_source(self) -> Literal["params", "features", "summary"]:
        """The source of the features of the inner steps (see `Observed`)."""
        signals, context = self.batch.signals, self.batch.context
        rows = signals.shape[1:2] if context is None else (*context.shape[:-2], context.shape[-1])
        if 0 < self.inner.points_per_chunk < rows[-1]:
            return "params"
        if context is None:
            shape = (*signals.shape, self.inner.steps)
            return "summary" if self.field.points.summarises(*shape) else "features"
        return "features" if takes_features(rows, signals.shape[1]) else "params"

    @property
    def outer_source(self) -> Literal["params", "features"]:
        """The source of the features of the outer loss: all points at once where memory allows."""
        whole = not 0 < self.inner.points_per_chunk < self.batch.signals.shape[1]
        return "features" if whole or self.steps_source == "features" else "params"

    def sources(self, point_params: Params) -> tuple[Any, Any]:
        """The sources of the features of the outer loss and of the inner steps."""
        points, batch = self.field.points, self.batch
        if self.outer_source == "params":
            return point_params, point_params
        features = points.features(point_params, batch.coords[None])
        if self.steps_source == "summary":
            weights = shares(None, batch.signals.shape[1], batch.signals, self.inner.channel_loss)
            return features, points.summary(features, Targets(batch.signals, weights))
        return features, features if self.steps_source == "features" else point_params

    def observed(self, source: Literal["params", "features", "summary"]) -> Observed:
        return Observed(self.field.points, self.batch.coords, self.batch.signals, source)

    def loop(self, alpha: jax.Array) -> Loop:
        context = self.batch.context
        if context is not None and context.ndim == 3:
            context = jnp.moveaxis(context, 1, 0)  # [G, B, n]
        return Loop(self.field, self.inner, self.observed(self.steps_source), context, alpha)

    def latent_loss(self, latents: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The latents to decode, and a term of the loss."""
        if self.batch.latent_loss is None:
            return latents, jnp.zeros((), latents.dtype)
        latents, cost = self.batch.latent_loss(latents)
        return latents, jnp.asarray(cost, latents.dtype)

    def over_chunks(self, function: Callable) -> tuple[Any, Any]:
        """Sums over all points, with weights whose sum is the mean over signals."""
        signals = self.batch.signals
        weights = shares(None, signals.shape[1], signals, self.inner.channel_loss) / len(signals)
        return over_chunks(
            function, None, weights, points=signals.shape[1], size=self.inner.points_per_chunk
        )  # fmt: skip
