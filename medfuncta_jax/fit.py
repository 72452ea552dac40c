"""Fitting latents at test time, on every observed point, and decoding them at any coordinates."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp

from medfuncta_jax.arrays import Array, as_array, check_signals, checked_coords, on_host, points_of, relative_weights
from medfuncta_jax.chunks import chunk_of
from medfuncta_jax.conjugate_steps import conjugate_steps
from medfuncta_jax.context import random_context
from medfuncta_jax.field import STEP_SIZE, Field, Params, params_dtype
from medfuncta_jax.inner_steps import Observed, Source
from medfuncta_jax.measurements import ObservedField, checked_measurements, measured_loss, observed_field, step_ratio
from medfuncta_jax.operators import Operator
from medfuncta_jax.point_field import ChannelLoss, Targets
from medfuncta_jax.prior import GaussianPrior, whitened


@functools.partial(jax.tree_util.register_dataclass, data_fields=["latents", "losses"], meta_fields=[])
@dataclass(frozen=True)
class FitResult:
    """The result of a loop of steps on latents.

    Attributes:
      latents: [B, P], phi after the last step; of a fit with `safeguard` or a prior the best phi.
      losses: [B, steps], the mean squared error before each step; steps that were taken back are among them.
    """

    latents: jax.Array
    losses: jax.Array


def fit_latent(
    field: Field,
    params: Params,
    signals: Array,
    *,
    coords: Array | None = None,
    observe: Operator | ObservedField | None = None,
    prior: GaussianPrior | None = None,
    noise: float | Array = 0.0,
    weights: Array | None = None,
    steps: int = 20,
    step_size: float | Array = STEP_SIZE,
    channel_loss: ChannelLoss = "mean",
    safeguard: bool = False,
    rescale_ratio: float | None = None,
    points_per_chunk: int | None = None,
    init: Array | None = None,
    key: jax.Array | None = None,
) -> FitResult:
    """Fit one latent to each signal; compiled once per shape.

    Arrays may be those of any framework, or lists.

    Args:
      field, params: from `load_field`, `field_from_layers` or `Field.init`; the dtype of `params` is used.
      signals: floating, the scale the field was trained on ([0, 1] for all that this package trains): [B, *grid, D] on
        a grid with the field's number of axes, or [B, N, D] at explicit `coords`.
      coords: None for the grid over [-1, 1] (ends included), or [N, C] or [B, N, C], or with the axes of a grid for N.
      observe: None, or the operator of the measurements (see `operators`): `signals` are then measurements
        [B, *observe.shape, D], weights and losses refer to measurements, and steps are scaled so that `step_size` keeps
        its meaning. For several fits with one operator, its `observed_field`, computed once. Not with `coords` or
        `rescale_ratio`.
      prior: None, or the distribution of training latents of this very field (`gaussian_prior`), of use where the
        observed points do not determine a latent. Steps are those of conjugate gradients (`conjugate_steps`) along its
        axes, from its mean; each finds its own length, and `step_size` and `safeguard` have no effect. Take a hundred.
        Not with `rescale_ratio`.
      noise: the standard deviation of the noise in observed values or measurements, in their unit, a scalar or [B], for
        fits with a `prior`, which then end at the most probable latent. The error of the field on whole signals is
        noise too: for values at points give at least its root mean square. With 0, the more steps, the further latents
        go from the prior; 20 are safer then. With `weights`, the noise of a value whose weight is the mean of those
        above 0.
      weights: None, or one weight >= 0 a point, [B, N] or [B, *grid], or one a value, [B, N, D] or [B, *grid, D], as
        for channels that were not recorded; 0 masks, whatever stands there (NaN too). Only their ratio within a signal
        matters.
      steps: H >= 1.
      step_size: alpha, a scalar or [P]. Fields from `load_field` are scaled so that the default is right.
      channel_loss: squared errors averaged ("mean") or summed ("sum") over channels.
      safeguard: undo each step that raised a signal's loss, and halve the signal's step size from then on, so that a
        signal unlike the training data cannot diverge. If no loss grows, nothing changes.
      rescale_ratio: None, or gamma in (0, 1]: each step takes the norm of the gradient on a random subset, a fraction
        gamma of the points (the release's test-time rule).
      points_per_chunk: points of a signal in memory at once; None chooses their number such that the values of hidden
        units stay below 2^20 on a CPU and 2^24 elsewhere. The choice changes rounding only.
      init: latents [B, P] to begin with; None begins at zero, as in training, or at the mean of the prior.
      key: PRNG key for `rescale_ratio`; key 0 where None.
    Returns:
      FitResult: latents [B, P], losses [B, steps] (mean squared error before each step).
    Raises:
      ValueError: shapes that do not belong together, integer signals, observed values or coordinates that are not
        finite, weights that are negative, not finite or all 0 for a signal, or an option out of its range.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be an integer of at least 1, got {steps!r}")
    if points_per_chunk is not None and points_per_chunk < 1:
        raise ValueError(f"points_per_chunk must be at least 1, got {points_per_chunk}")
    if rescale_ratio is not None and not 0 < rescale_ratio <= 1:
        raise ValueError(f"rescale_ratio must be in (0, 1], got {rescale_ratio}")
    if channel_loss not in ("mean", "sum"):
        raise ValueError(f"channel_loss must be 'mean' or 'sum', got {channel_loss!r}")
    if prior is not None and rescale_ratio is not None:
        raise ValueError("rescale_ratio does not go with a prior; leave one of them out")
    if observe is None:
        signals = as_array("signals", signals)
        points = points_of(signals, coords, coord_dims=field.coord_dims, channels=field.channels)
        signals = signals.reshape(len(signals), points.shape[-2], field.channels)
        if weights is not None:
            weights = relative_weights(weights, *signals.shape)
        check_signals(signals, weights)
    else:
        if coords is not None or rescale_ratio is not None:
            raise ValueError("observe brings points of its own and needs all: leave out coords and rescale_ratio")
        if isinstance(observe, ObservedField):
            observe.check(params)
        operator = observe.operator if isinstance(observe, ObservedField) else observe
        signals, weights = checked_measurements(operator, signals, weights, field=field)
    dtype, size, batch = params_dtype(params), field.model.latent_dim, len(signals)
    signals = jnp.asarray(signals, dtype)
    if weights is not None:
        weights = jnp.asarray(weights, dtype)
        signals = jnp.where(weights > 0, signals, 0)
    step_size = as_array("step_size", step_size)
    if step_size.shape not in ((), (size,)):
        raise ValueError(f"step_size {step_size.shape} must be a scalar or [{size}]")
    noise, penalty = _noise(noise, batch, used=prior is not None), None
    start = jnp.zeros((batch, size), dtype) if init is None else jnp.asarray(_latents(field, init), dtype)
    if len(start) != batch:
        raise ValueError(f"init {start.shape} must be [{batch}, {size}]")
    if prior is not None:
        if not isinstance(prior, GaussianPrior):
            raise ValueError(f"prior must be a GaussianPrior (see gaussian_prior), got {type(prior).__name__}")
        if prior.mean.shape != (size,):
            raise ValueError(
                f"the prior has {len(prior.mean)} entries and latents of this field have {size}: it is of another field"
            )
        prior = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), prior)
        params, start = whitened(field, params, prior), start if init is None else prior.standard(start)
        penalty = jnp.asarray(noise, dtype) ** 2 / _observed(signals, weights, channel_loss)
    key = jax.random.key(0) if key is None else key
    given = _Given(signals, weights, jnp.asarray(step_size, dtype), start, key, penalty)
    shared = observe is None and (points.ndim == 2 or len(points) == 1)
    chunk = chunk_of(field, points_per_chunk, batch, shared=shared)
    rules = _Rules(steps, channel_loss, safeguard, rescale_ratio, chunk)
    if observe is None:
        fitted = _fit(field, rules, params, jnp.asarray(points if points.ndim == 3 else points[None], dtype), given)
    else:
        if isinstance(observe, ObservedField):
            observe = replace(observe, params=params)  # whitened by a prior
        else:
            observe = observed_field(field, params, observe, points_per_chunk=points_per_chunk)
        fitted = _fit_measured(field, rules, observe, given)
    return fitted if prior is None else replace(fitted, latents=prior.latents(fitted.latents))


class _Given(NamedTuple):
    """Signals or measurements [B, N, D], weights [B, N, D or 1] or None, step size, first latents [B, P], key, and, for
    conjugate-gradient steps, the weight of |phi|^2 beside the loss, [B]."""

    signals: jax.Array
    weights: jax.Array | None
    step_size: jax.Array
    start: jax.Array
    key: jax.Array
    penalty: jax.Array | None


@dataclass(frozen=True)
class _Rules:
    """Options of `fit_latent` that are static in the compiled program."""

    steps: int
    channel_loss: ChannelLoss
    safeguard: bool
    rescale_ratio: float | None
    points_per_chunk: int


class _Best(NamedTuple):
    """Best latents so far [B, P], their losses [B] and gradients [B, P], and factors of the step size [B]."""

    latents: jax.Array
    losses: jax.Array
    gradient: jax.Array
    part: jax.Array


def _keep_better(new: _Best, best: _Best) -> _Best:
    """The new latent if its loss is no larger, else (also for a loss of NaN) the old latent, with half the step."""
    accepted = new.losses <= best.losses  # [B], False for NaN
    halved = best._replace(part=best.part / 2)
    return jax.tree.map(lambda a, b: jnp.where(accepted.reshape(-1, *[1] * (a.ndim - 1)), a, b), new, halved)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _fit(field: Field, rules: _Rules, params: Params, coords: jax.Array, given: _Given) -> FitResult:
    """The fit of values at coords [1 or B, N, C]."""
    points, halves = field.points, field.split(params)
    batch, count, channels = given.signals.shape
    every = Source(features=points.features(halves[0], coords))
    source = every
    observed = Observed(field, coords, given.signals, rules.channel_loss, rules.points_per_chunk, given.weights)
    alike = given.weights is None and len(coords) == 1
    if alike and points.summarises(batch, count, channels, rules.steps):
        source = Source(summary=points.summary(every.features, Targets(given.signals, observed.share(None))))

    def direction_at(latents, key):
        """dL/dphi [B, P], or a vector along it, and the losses [B]."""
        _, gradient, losses, _ = observed.gradient(halves, source, latents, None)
        if rules.rescale_ratio is not None:
            rows = random_context(key, points=count, selection_ratio=rules.rescale_ratio, steps=1)[0]
            subset = observed.gradient(halves, every, latents, rows)[1]
            norm, subset_norm = (jnp.linalg.norm(g, axis=-1, keepdims=True) for g in (gradient, subset))
            gradient = gradient * subset_norm / jnp.maximum(norm, jnp.finfo(norm.dtype).tiny)
        return gradient, losses

    def losses_at(latents):
        return observed.gradient(halves, source, latents, None)[2]

    return _descend(direction_at, losses_at, rules, given)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _fit_measured(field: Field, rules: _Rules, observe: ObservedField, given: _Given) -> FitResult:
    """The fit of measurements by an operator."""
    losses_at = measured_loss(
        field, observe.params, observe, given.signals, weights=given.weights, channel_loss=rules.channel_loss,
        points_per_chunk=rules.points_per_chunk, gradients=rules.steps,
    )  # fmt: skip

    def direction_at(latents, _):
        losses, pull = jax.vjp(losses_at, latents)
        return pull(jnp.ones_like(losses))[0], losses

    if given.penalty is None:
        # The ratio is of one latent, so a chunk may have B times as many points.
        at_once = rules.points_per_chunk * len(given.signals)
        ratio = step_ratio(field, observe.params, observe, points_per_chunk=at_once)
        given = given._replace(step_size=given.step_size * ratio)
    return _descend(direction_at, losses_at, rules, given)


def _descend(
    direction_at: Callable[[jax.Array, jax.Array | None], tuple[jax.Array, jax.Array]],
    losses_at: Callable[[jax.Array], jax.Array],
    rules: _Rules,
    given: _Given,
) -> FitResult:
    """The steps of a fit.

    Args:
      direction_at: maps latents [B, P] and the key of a step to the direction of descent [B, P] and the losses [B].
      losses_at: maps latents to the losses alone.
    """

    def plain_step(latents, key):
        gradient, losses = direction_at(latents, key)
        return latents - given.step_size * gradient, losses

    def guarded_step(carry, key):
        best, latents = carry
        gradient, losses = direction_at(latents, key)
        best = _keep_better(_Best(latents, losses, gradient, best.part), best)
        return (best, best.latents - best.part[:, None] * given.step_size * best.gradient), losses

    if given.penalty is not None:
        latents, losses = conjugate_steps(
            lambda latents: direction_at(latents, None), given.start, penalty=given.penalty, steps=rules.steps
        )
        return FitResult(latents=latents, losses=losses)
    keys = None if rules.rescale_ratio is None else jax.random.split(given.key, rules.steps)
    if not rules.safeguard:
        latents, losses = jax.lax.scan(plain_step, given.start, keys, length=rules.steps)
        return FitResult(latents=latents, losses=losses.T)
    one = jnp.ones(len(given.start), given.start.dtype)
    first = _Best(given.start, one * jnp.inf, jnp.zeros_like(given.start), one)
    (best, latents), losses = jax.lax.scan(guarded_step, (first, given.start), keys, rules.steps)
    last = _keep_better(_Best(latents, losses_at(latents), best.gradient, one), best)
    return FitResult(latents=last.latents, losses=losses.T)


def _noise(noise: float | Array, batch: int, *, used: bool) -> Array:
    """The noise, checked: a scalar or [B]."""
    noise = as_array("noise", noise)
    if noise.shape not in ((), (batch,)):
        raise ValueError(f"noise {noise.shape} must be a scalar or [{batch}], one number a signal")
    known = on_host(noise)
    if known is not None and not ((known >= 0) & (known < math.inf)).all():
        raise ValueError(f"noise must be at least 0 and finite, got {known}")
    if not used and (known is None or known.any()):
        raise ValueError("noise has an effect only with a prior; give prior= too")
    return noise


def _observed(signals: jax.Array, weights: jax.Array | None, channel_loss: ChannelLoss) -> jax.Array:
    """The observed values of each signal (of a channel, where channels are summed), [B], 1 at least."""
    values = jnp.broadcast_to(jnp.ones((), signals.dtype) if weights is None else weights > 0, signals.shape)
    return jnp.maximum(values.sum((1, 2)), 1).astype(signals.dtype) / (
        1 if channel_loss == "mean" else signals.shape[-1]
    )


def _latents(field: Field, latents: Array) -> Array:
    """Latents [B, P], checked."""
    latents = as_array("latents", latents)
    if latents.ndim != 2 or latents.shape[1] != field.model.latent_dim or not len(latents):
        raise ValueError(f"latents {latents.shape} must be [B, {field.model.latent_dim}]")
    return latents


def reconstruct(
    field: Field, params: Params, latents: Array, coords: Array, *, per_signal: bool | None = None,
    chunk: int | None = None,
) -> jax.Array:  # fmt: skip
    """Values of B latents at any coordinates, and so at any resolution; not clipped.

    Differentiable in either mode, to any order. Arrays may be those of any framework, or lists.

    Args:
      field, params: the shared network.
      latents: [B, P].
      coords: in [-1, 1]: [N, C] or [*grid, C], the same for all latents, or [B, N, C].
      per_signal: whether the first axis of coords belongs to the latents; None: yes if coords are [B, N, C], with the
        B of the latents. Needed where a grid of two axes has as many rows as there are latents.
      chunk: points of a signal evaluated at once; None as for `fit_latent`.
    Returns:
      [B, N, D], or [B, *grid, D].
    Raises:
      ValueError: shapes that do not belong together, or coordinates that are not finite.
    """
    latents = _latents(field, latents)
    coords, batch = checked_coords(coords, coord_dims=field.coord_dims), len(latents)
    if per_signal is None and coords.ndim == 3 and len(coords) == batch and field.coord_dims == 2:
        raise ValueError(
            f"coords {coords.shape} may be a grid, or {coords.shape[1]} points for each of {batch} latents; say "
            "per_signal=False or True"
        )
    own = coords.ndim == 3 and len(coords) == batch if per_signal is None else per_signal
    if own and (coords.ndim < 3 or len(coords) != batch):
        raise ValueError(f"coords {coords.shape} must be [{batch}, N, {field.coord_dims}], points for each latent")
    shape = coords.shape[1:-1] if own else coords.shape[:-1]
    dtype = params_dtype(params)
    flat = jnp.asarray(coords, dtype).reshape(batch if own else 1, -1, field.coord_dims)
    values = _evaluate(field, chunk_of(field, chunk, batch, shared=not own), params, jnp.asarray(latents, dtype), flat)
    return values.reshape(batch, *shape, field.channels)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _evaluate(field: Field, chunk: int, params: Params, latents: jax.Array, coords: jax.Array) -> jax.Array:
    """Values [B, N, D] at coords [1 or B, N, C]."""
    points, (point_params, readers) = field.points, field.split(params)
    modulations = field.modulations(readers, latents)  # once for all pieces

    def at(piece: jax.Array) -> jax.Array:
        return points.values(point_params, modulations, points.features(point_params, piece))

    count = coords.shape[1]
    if count <= chunk:
        return at(coords)
    pieces = -(-count // chunk)
    padded = jnp.pad(coords, [(0, 0), (0, pieces * chunk - count), (0, 0)])
    split = jnp.moveaxis(padded.reshape(len(coords), pieces, chunk, -1), 1, 0)
    values = jnp.moveaxis(jax.lax.map(at, split), 0, 1)
    return values.reshape(len(latents), pieces * chunk, -1)[:, :count]
