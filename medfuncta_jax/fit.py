"""Fitting latents at test time, on every observed point, and reading them out at any coordinates."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from medfuncta_jax.context import random_context
from medfuncta_jax.coordinates import grid
from medfuncta_jax.field import Field, Params, params_dtype
from medfuncta_jax.inner_loop import Array, FitResult
from medfuncta_jax.loss import in_chunks, losses_on, point_chunks, signal_losses, slopes_and_losses, slopes_in_chunks
from medfuncta_jax.siren import Modulations, PointFeatures

# Entries of an activation (signals x points x width) that are evaluated at once where nothing else is said, in float32
# 4 MB and 64 MB: few enough for the caches of a processor (in one piece, 32^3 points take 28 % longer, 8 images of 64^2
# 40 %), and enough for all units of an accelerator.
_ENTRIES_AT_ONCE, _ENTRIES_AT_ONCE_ON_ACCELERATORS = 2**20, 2**24


def _slopes_in_chunks(
    field: Field,
    params: Params,
    features: PointFeatures,
    signals: jax.Array,
    weights: jax.Array | None,
    *,
    channel_loss: Literal["mean", "sum"],
    points_per_chunk: int,
) -> Callable[[jax.Array], tuple[jax.Array, jax.Array]]:
    """`slopes_and_losses` on all points as a function of the latents, with a chunk of points in memory at once."""
    count = signals.shape[1]
    shares = jnp.full(signals.shape[:2], 1 / count, signals.dtype)
    if weights is not None:
        total = weights.sum(-1, keepdims=True)
        shares = weights / jnp.where(total > 0, total, 1)
    rows, real = point_chunks(jnp.arange(count), points_per_chunk)

    chunks = jax.tree.map(functools.partial(in_chunks, rows=rows), (features, signals, shares))

    def part_of(modulations: Modulations, chunk):
        (some_features, some_signals, some_shares), some_real = chunk
        some_shares = jnp.where(some_real, some_shares, 0)

        def losses_of(modulations: Modulations) -> jax.Array:
            losses = signal_losses(
                field, params, modulations, some_features, some_signals, weights=some_shares, channel_loss=channel_loss
            )
            return losses * some_shares.sum(-1)

        return slopes_and_losses(losses_of, modulations)

    def slopes_at(latents: jax.Array) -> tuple[jax.Array, jax.Array]:
        modulations, pull = jax.vjp(functools.partial(field.modulations, params), latents)
        slopes, losses = slopes_in_chunks(modulations, (chunks, real), part_of)
        return pull(slopes)[0], losses

    return slopes_at


@functools.partial(
    jax.jit, static_argnames=("field", "steps", "channel_loss", "selection_ratio", "safeguard", "points_per_chunk")
)
def _fit(
    field, params, coords, signals, weights, step_size, key,
    *, steps, channel_loss, selection_ratio, safeguard, points_per_chunk,
):  # fmt: skip
    features = field.point_features(params, coords)
    losses_at = functools.partial(losses_on, field, params, channel_loss=channel_loss)
    if points_per_chunk < signals.shape[1] and isinstance(features, PointFeatures):
        slopes_on_all = _slopes_in_chunks(
            field, params, features, signals, weights, channel_loss=channel_loss, points_per_chunk=points_per_chunk
        )
    else:
        losses_of = losses_at(features, signals, weights=weights, steps=steps)

        def slopes_on_all(latents):
            return slopes_and_losses(losses_of, latents)

    def direction_of(latents, step_key):
        slopes, losses = slopes_on_all(latents)  # [B, P], [B]
        if selection_ratio is not None:
            rows = random_context(step_key, points=signals.shape[1], selection_ratio=selection_ratio, steps=1)[0]
            subset_weights = None if weights is None else weights[:, rows]
            subset_features = jax.tree.map(lambda leaf: leaf[:, rows], features)
            subset, _ = slopes_and_losses(
                losses_at(subset_features, signals[:, rows], weights=subset_weights, steps=1), latents
            )
            norm, subset_norm = (jnp.linalg.norm(s, axis=-1, keepdims=True) for s in (slopes, subset))
            slopes = slopes * subset_norm / jnp.maximum(norm, jnp.finfo(norm.dtype).tiny)
        return slopes, losses

    def plain_step(latents, step_key):
        slopes, losses = direction_of(latents, step_key)
        return latents - step_size * slopes, losses

    def guarded_step(carry, step_key):
        best, latents = carry
        slopes, losses = direction_of(latents, step_key)
        best = _keep_better(_Best(latents, losses, slopes, best.part), best)
        return (best, best.latents - best.part[:, None] * step_size * best.slopes), losses

    keys = None if selection_ratio is None else jax.random.split(key, steps)
    start = jnp.zeros((signals.shape[0], field.model.latent_dim), signals.dtype)
    if not safeguard:
        latents, losses = jax.lax.scan(plain_step, start, keys, length=steps)
        return FitResult(latents=latents, losses=losses.T)
    one = jnp.ones(start.shape[0], start.dtype)
    (best, latents), losses = jax.lax.scan(guarded_step, (_Best(start, one * jnp.inf, start, one), start), keys, steps)
    last = _keep_better(_Best(latents, slopes_on_all(latents)[1], start, one), best)
    return FitResult(latents=last.latents, losses=losses.T)


def _chunk(field: Field, points: int | None, batch: int) -> int:
    """Points of each of `batch` signals evaluated at once."""
    entries = _ENTRIES_AT_ONCE if jax.default_backend() == "cpu" else _ENTRIES_AT_ONCE_ON_ACCELERATORS
    return points or max(1, entries // (max(1, batch) * max(field.model.widths)))


class _Best(NamedTuple):
    """Each signal's best latent so far [B, P], its loss [B] and slope [B, P], and the part of the step size used."""

    latents: jax.Array
    losses: jax.Array
    slopes: jax.Array
    part: jax.Array


def _keep_better(new: _Best, best: _Best) -> _Best:
    """Where the loss did not grow, the new latent; elsewhere (or not finite) the old one, with half its step."""
    accepted = new.losses <= best.losses  # [B], False for NaN
    halved = best._replace(part=best.part / 2)
    return jax.tree.map(lambda a, b: jnp.where(accepted.reshape(-1, *[1] * (a.ndim - 1)), a, b), new, halved)


def fit_latent(
    field: Field,
    params: Params,
    signals: Array,
    *,
    coords: Array | None = None,
    weights: Array | None = None,
    steps: int = 20,
    step_size: float | Array = 1e-2,
    channel_loss: Literal["mean", "sum"] = "mean",
    safeguard: bool = False,
    rescale_ratio: float | None = None,
    points_per_chunk: int | None = None,
    key: jax.Array | None = None,
) -> FitResult:
    """Fit one latent to each signal; compiled once per shape.

    Args:
      field, params: from `load_field`, `field_from_layers` or `Field.init`; the dtype of `params` is used.
      signals: floating, the scale the field was trained on ([0, 1] for all that this package trains): [B, ..., D] on a
        grid with the field's number of axes, or [B, N, D] at explicit `coords`.
      coords: None for the grid over [-1, 1] (ends included), or [N, C] or [B, N, C].
      weights: None, or one weight >= 0 a point, [B, N] or [B, ...]; 0 masks a point, whatever its value (NaN too). Only
        their ratio within a signal matters.
      steps: H >= 1.
      step_size: alpha, a scalar or [P]. Fields from `load_field` are scaled so that the default is right.
      channel_loss: see `loss.signal_losses`.
      safeguard: take a step back wherever it raised a signal's loss, and halve that signal's step size from then on; a
        signal unlike the training data can then not diverge. Where no loss grows, nothing changes.
      rescale_ratio: None, or gamma in (0, 1]: each step takes the norm of the gradient on a random subset of that part
        of the points (the release's test-time rule).
      points_per_chunk: points of a signal in memory at once; None takes as many as suit the device: B times them, times
        the width of the network, stay below 2^20 on a processor and 2^24 elsewhere. Changes rounding only.
      key: PRNG key for `rescale_ratio`; key 0 where None.
    Returns:
      FitResult: latents [B, P], losses [B, steps] (mean squared error before each step).
    Raises:
      ValueError: shapes that do not belong together, integer signals, or an observed value that is not finite.
    """
    if points_per_chunk is not None and points_per_chunk < 1:
        raise ValueError(f"points_per_chunk must be at least 1, got {points_per_chunk}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if rescale_ratio is not None and not 0 < rescale_ratio <= 1:
        raise ValueError(f"rescale_ratio must be in (0, 1], got {rescale_ratio}")
    points = _points(field, signals, coords)
    dtype = params_dtype(params)
    batch, count = signals.shape[0], points.shape[-2]
    if weights is not None:
        if weights.size != batch * count or weights.shape[0] != batch:
            raise ValueError(f"weights {weights.shape} must be [B, N] = {(batch, count)}, one for each point")
        weights = jnp.reshape(weights, (batch, count)).astype(dtype)
    signals = signals.reshape(batch, count, field.channels)
    _check_finite(signals, weights)
    signals = jnp.asarray(signals, dtype)
    if weights is not None:
        signals = jnp.where(weights[:, :, None] > 0, signals, 0)
    return _fit(
        field, params, jnp.asarray(points, dtype), signals, weights, jnp.asarray(step_size, dtype),
        jax.random.key(0) if key is None else key,
        steps=steps, channel_loss=channel_loss, selection_ratio=rescale_ratio, safeguard=safeguard,
        points_per_chunk=_chunk(field, points_per_chunk, batch),
    )  # fmt: skip


def _points(field: Field, signals: Array, coords: Array | None) -> Array:
    """Coordinates [N, C] or [B, N, C] of `signals`, after checking that all shapes belong together."""
    if not jnp.issubdtype(signals.dtype, jnp.floating):
        raise ValueError(f"signals must be floating, in the range the field was trained on, got {signals.dtype}")
    if signals.ndim < 2 or signals.shape[-1] != field.channels:
        raise ValueError(f"signals {signals.shape} must end in the field's {field.channels} channel(s)")
    if coords is None:
        if signals.ndim != field.coord_dims + 2:
            raise ValueError(
                f"signals {signals.shape} must be [B, {field.coord_dims} grid axes, D] for this field; "
                "give coords for scattered points"
            )
        return grid(signals.shape[1:-1])
    _check_coords(field, coords, batch=signals.shape[0])
    if signals.ndim != 3 or signals.shape[1] != coords.shape[-2]:
        raise ValueError(f"signals {signals.shape} must be [B, N, D] with N = {coords.shape[-2]}, the points in coords")
    return coords


def _check_coords(field: Field, coords: Array, *, batch: int) -> None:
    fits = coords.ndim in (2, 3) and coords.shape[-1] == field.coord_dims and coords.shape[-2] > 0
    if not fits or (coords.ndim == 3 and coords.shape[0] != batch):
        raise ValueError(f"coords {coords.shape} must be [N, {field.coord_dims}] or [{batch}, N, {field.coord_dims}]")


def _check_finite(signals: Array, weights: Array | None) -> None:
    """A check for arrays on the host only: on a device it would stall the program."""
    if not isinstance(signals, np.ndarray):
        return
    bad = ~np.isfinite(signals).all(-1)  # [B, N]
    if weights is not None:
        bad &= np.asarray(weights) > 0
    if bad.any():
        first = int(np.flatnonzero(bad.any(-1))[0])
        raise ValueError(f"signal {first} holds values that are not finite; mask those points with weights = 0")


@functools.partial(jax.jit, static_argnames=("field", "chunk"))
def _evaluate(field, params, latents, coords, *, chunk):
    count = coords.shape[-2]
    if count <= chunk:
        return field.apply(params, latents, coords)
    pieces = -(-count // chunk)
    padding = [(0, 0)] * (coords.ndim - 2) + [(0, pieces * chunk - count), (0, 0)]
    split = jnp.pad(coords, padding).reshape(*coords.shape[:-2], pieces, chunk, coords.shape[-1])
    modulations = field.modulations(params, latents)  # once for all pieces

    def at(piece):
        return field.decode(params, modulations, field.point_features(params, piece))

    values = jax.lax.map(at, jnp.moveaxis(split, -3, 0))
    return jnp.moveaxis(values, 0, 1).reshape(latents.shape[0], pieces * chunk, -1)[:, :count]


def reconstruct(field: Field, params: Params, latents: Array, coords: Array, *, chunk: int | None = None) -> jax.Array:
    """Values of the fields of B latents at any coordinates, so at any resolution; not clipped.

    Differentiable in reverse mode, to any order (`jax.grad`, `jax.jacrev`); not in forward mode (`jax.jvp`), for the
    sake of products whose second derivatives copy nothing (see `product`).

    Args:
      field, params: the shared network.
      latents: [B, P].
      coords: [N, C], or [B, N, C], in [-1, 1].
      chunk: points of a signal evaluated at once; None as for `fit_latent`.
    Returns:
      [B, N, D].
    Raises:
      ValueError: shapes that do not belong together.
    """
    if latents.ndim != 2 or latents.shape[1] != field.model.latent_dim:
        raise ValueError(f"latents {latents.shape} must be [B, {field.model.latent_dim}]")
    _check_coords(field, coords, batch=latents.shape[0])
    dtype = params_dtype(params)
    return _evaluate(
        field, params, jnp.asarray(latents, dtype), jnp.asarray(coords, dtype),
        chunk=_chunk(field, chunk, latents.shape[0]),
    )  # fmt: skip
