"""Fitting latents: SGD on phi with the shared network held fixed (CAVIA, Zintgraf et al. 2019).

    phi_0 = 0,   phi_{g+1} = phi_g - alpha dL(phi_g; C_g)/dphi

`adapt` is the loop of meta-training, differentiable to second order; `fit_latent` the one of test time, on
every observed point; `reconstruct` reads a latent out at any coordinates.
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

from medfuncta_jax.context import random_context
from medfuncta_jax.coordinates import grid
from medfuncta_jax.field import Field, Params, params_dtype
from medfuncta_jax.product import PRODUCT
from medfuncta_jax.siren import Basis, PointFeatures

Array = jax.Array | np.ndarray

# Points (signals times coordinates) that are evaluated at once where nothing else is said: 64 MB an activation at width
# 256.
_POINTS_AT_ONCE = 65_536

# A context that is a smaller part of all points has its features computed again: taken from those of all points, their
# slope would be as large as these, in every step (measured in 3D: a quarter 15 % faster so, a tenth 7 % slower).
_TAKEN_PART = 1 / 6


@functools.partial(jax.tree_util.register_dataclass, data_fields=["latents", "losses"], meta_fields=[])
@dataclass(frozen=True)
class FitResult:
    """What `fit_latent` gives.

    Attributes:
      latents: [B, P], phi after the last step.
      losses: [B, steps], the mean squared error before each step.
    """

    latents: jax.Array
    losses: jax.Array


def signal_losses(
    field: Field,
    params: Params,
    latents: jax.Array,
    features: PointFeatures | Basis,
    signals: jax.Array,
    *,
    weights: jax.Array | None = None,
    channel_loss: Literal["mean", "sum"] = "mean",
) -> jax.Array:
    """Squared error of each signal: mean over points, mean or sum over channels.

    Args:
      field, params: the shared network.
      latents: [B, P].
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


def _losses_on(
    field: Field,
    params: Params,
    features: PointFeatures | Basis,
    signals: jax.Array,
    *,
    weights: jax.Array | None = None,
    channel_loss: Literal["mean", "sum"],
    steps: int,
) -> Callable[[jax.Array], jax.Array]:
    """`signal_losses` as a function of the latents [B, P] alone, for many calls on the same points.

    A basis shared by the batch is brought to its normal equations where `steps` calls repay them: they cost
    N (2L)^2 products, and a call, with its slope, then 2 (2L)^2 B D instead of 2 N 2L B D.
    """

    def on_points(latents: jax.Array) -> jax.Array:
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

    def on_equations(latents: jax.Array) -> jax.Array:
        errors = equations.errors(field.coefficients(params, latents))
        return errors.mean(-1) if channel_loss == "mean" else errors.sum(-1)

    return on_equations


def slopes_and_losses(losses_of: Callable[[jax.Array], jax.Array], latents: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Each signal's gradient [B, P] and loss [B] at latents [B, P]; `losses_of` gives the losses [B]."""

    def total(latents):
        losses = losses_of(latents)
        return losses.sum(), losses

    return jax.grad(total, has_aux=True)(latents)


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


Remat = Literal["none", "layers", "steps"]


def _checkpointed(function: Callable, remat: Remat) -> Callable:
    """`function` with what the backward pass keeps of it: all, the matrix products, or its arguments alone."""
    if remat == "none":
        return function
    policy = jax.checkpoint_policies.save_only_these_names(PRODUCT) if remat == "layers" else None
    return jax.checkpoint(function, prevent_cse=False, policy=policy)


def takes_features(rows: tuple[int, ...], points: int) -> bool:
    """Whether contexts of this shape, [n] or [B, n], take their features from those of all `points`: large ones that
    the signals at hand share."""
    return rows[-1] >= _TAKEN_PART * points and math.prod(rows) == rows[-1]


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
) -> FitResult:
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
      channel_loss: see `signal_losses`.
      points_per_chunk: points of a signal in memory at once, in each step; 0 for all. `remat` then acts on chunks.
      pruned_to: with a number of steps for `context`: each step takes the points, this many, whose squared errors have
        the largest slopes in the last layer (Tack et al. 2023); 0 takes all.
      features: of all points, where the caller has them: a derivative then goes through them once, and large
        contexts shared by the batch take theirs from there.
    Returns:
      FitResult with losses [B, G] on each step's context.
    """
    coords, signals = (jnp.asarray(array, params_dtype(params)) for array in (coords, signals))
    count = (pruned_to or signals.shape[1]) if isinstance(context, int) else context.shape[-1]
    in_chunks = 0 < points_per_chunk < count
    if isinstance(context, int):
        steps, rows_of_steps = context, None
        if not (in_chunks or pruned_to):
            features = field.point_features(params, coords) if features is None else features
            losses_on_all = _losses_on(field, params, features, signals, channel_loss=channel_loss, steps=steps)
    else:
        steps, rows_of_steps = context.shape[-2], jnp.asarray(context)
        if context.ndim == 3:
            rows_of_steps = jnp.moveaxis(rows_of_steps, 1, 0)  # [G, B, n]

    def features_at(rows: jax.Array) -> PointFeatures | Basis:
        if features is None or not takes_features(rows.shape, len(coords)):
            return field.point_features(params, coords[rows])
        return jax.tree.map(lambda leaf: leaf.at[:, rows.ravel()].get(mode="clip"), features)

    def at(latents: jax.Array, rows: jax.Array | None, weights: jax.Array | None = None):
        # rows: None for all points, [n] or [B, n]; weights [n]
        if rows is None:
            return slopes_and_losses(losses_on_all, latents)
        chosen = jnp.take_along_axis(signals, rows[:, :, None], axis=1) if rows.ndim == 2 else signals[:, rows]
        weights = None if weights is None else jnp.broadcast_to(weights, chosen.shape[:2])
        losses_of = _losses_on(
            field, params, features_at(rows), chosen,
            weights=weights, channel_loss=channel_loss, steps=1,
        )  # fmt: skip
        return slopes_and_losses(losses_of, latents)

    at = _checkpointed(at, remat)

    def at_chunks(latents: jax.Array, rows: jax.Array | None):
        pieces, real = point_chunks(jnp.arange(count) if rows is None else rows, points_per_chunk)

        def add(so_far, piece):
            rows, real = piece
            weights = real.astype(latents.dtype)
            part = weights.sum() / count
            return jax.tree.map(lambda a, b: a + part * b, so_far, at(latents, rows, weights)), None

        nothing = jnp.zeros_like(latents), jnp.zeros(latents.shape[0], latents.dtype)
        return jax.lax.scan(add, nothing, (pieces, real))[0]

    def step(latents: jax.Array, rows: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        if pruned_to:
            # A choice has no slope.
            rows = jax.lax.top_k(field.slope_norms(*jax.lax.stop_gradient((params, latents)), coords, signals), count)[
                1
            ]
        slopes, losses = (at_chunks if in_chunks else at)(latents, rows)  # [B, P], [B]
        if first_order:
            slopes = jax.lax.stop_gradient(slopes)
        return latents - step_size * slopes, losses

    start = jnp.zeros((signals.shape[0], field.model.latent_dim), signals.dtype)
    latents, losses = jax.lax.scan(step, start, rows_of_steps, length=steps)
    return FitResult(latents=latents, losses=losses.T)


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

    def pieces(array):  # [B or 1, N, ...] -> [m, B or 1, c, ...]
        return jnp.moveaxis(array[:, rows], 1, 0)

    chunks = jax.tree.map(pieces, (features, signals, shares))

    def slopes_of(latents):
        def add(so_far, chunk):
            (some_features, some_signals, some_shares), some_real = chunk
            some_shares = jnp.where(some_real, some_shares, 0)

            def losses_of(latents):
                losses = signal_losses(
                    field, params, latents, some_features, some_signals, weights=some_shares, channel_loss=channel_loss
                )
                return losses * some_shares.sum(-1)

            return jax.tree.map(jnp.add, so_far, slopes_and_losses(losses_of, latents)), None

        nothing = jnp.zeros_like(latents), jnp.zeros(latents.shape[0], latents.dtype)
        return jax.lax.scan(add, nothing, (chunks, real))[0]

    return slopes_of


@functools.partial(
    jax.jit, static_argnames=("field", "steps", "channel_loss", "selection_ratio", "safeguard", "points_per_chunk")
)
def _fit(
    field, params, coords, signals, weights, step_size, key,
    *, steps, channel_loss, selection_ratio, safeguard, points_per_chunk,
):  # fmt: skip
    features = field.point_features(params, coords)
    losses_on = functools.partial(_losses_on, field, params, channel_loss=channel_loss)
    if points_per_chunk < signals.shape[1] and isinstance(features, PointFeatures):
        slopes_on_all = _slopes_in_chunks(
            field, params, features, signals, weights, channel_loss=channel_loss, points_per_chunk=points_per_chunk
        )
    else:
        losses_of = losses_on(features, signals, weights=weights, steps=steps)
        slopes_on_all = functools.partial(slopes_and_losses, losses_of)

    def direction_of(latents, step_key):
        slopes, losses = slopes_on_all(latents)  # [B, P], [B]
        if selection_ratio is not None:
            rows = random_context(step_key, points=signals.shape[1], selection_ratio=selection_ratio, steps=1)[0]
            subset_weights = None if weights is None else weights[:, rows]
            subset_features = jax.tree.map(lambda leaf: leaf[:, rows], features)
            subset, _ = slopes_and_losses(
                losses_on(subset_features, signals[:, rows], weights=subset_weights, steps=1), latents
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


def _chunk(points: int | None, batch: int) -> int:
    """Points of each of `batch` signals evaluated at once."""
    return points or max(1, _POINTS_AT_ONCE // max(1, batch))


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
      channel_loss: see `signal_losses`.
      safeguard: take a step back wherever it raised a signal's loss, and halve that signal's step size from then on; a
        signal unlike the training data can then not diverge. Where no loss grows, nothing changes.
      rescale_ratio: None, or gamma in (0, 1]: each step takes the norm of the gradient on a random subset of that part
        of the points (the release's test-time rule).
      points_per_chunk: points of a signal in memory at once; None bounds B times them at 65,536. Changes rounding only.
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
        points_per_chunk=_chunk(points_per_chunk, batch),
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
    values = jax.lax.map(lambda piece: field.apply(params, latents, piece), jnp.moveaxis(split, -3, 0))
    return jnp.moveaxis(values, 0, 1).reshape(latents.shape[0], pieces * chunk, -1)[:, :count]


def reconstruct(field: Field, params: Params, latents: Array, coords: Array, *, chunk: int | None = None) -> jax.Array:
    """Values of the fields of B latents at any coordinates, so at any resolution; not clipped.

    Differentiable in reverse mode, to any order (`jax.grad`, `jax.jacrev`); not in forward mode (`jax.jvp`), for the
    sake of products whose second derivatives copy nothing (see `product`).

    Args:
      field, params: the shared network.
      latents: [B, P].
      coords: [N, C], or [B, N, C], in [-1, 1].
      chunk: points of a signal evaluated at once; None bounds B times the chunk at 65,536.
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
        field, params, jnp.asarray(latents, dtype), jnp.asarray(coords, dtype), chunk=_chunk(chunk, latents.shape[0])
    )
