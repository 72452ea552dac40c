"""Segmentation on fitted fields: a classifier of points (`latent_operator` has the other way, between latents).

The last hidden units h_{K-1}(x; phi) of a fitted field (see `siren`) say what is at a point x and where it lies in its
signal. An MLP reads them at phi = 0, and how far the latent moves them, in units of its own (a linear start has fields
whose latents move them by hundredths). Where it is given the signals too, it also reads what latents leave of them near
a point (`local_detail`). Trained with cross-entropy and the Dice loss on signals with masks, it gives a class for any
point of any fitted signal: at any resolution, and for signals of which few points were observed (`fit_head`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from medfuncta_jax.arrays import Array, as_array
from medfuncta_jax.coordinates import grid
from medfuncta_jax.field import Field, Params, params_dtype
from medfuncta_jax.local_detail import at_points, detail_count, local_means, residuals
from medfuncta_jax.product import FULL

# Latents, and points of all of them, that are classified at once.
_LATENTS_AT_ONCE, _POINTS_AT_ONCE = 8, 2**15
_VALIDATIONS = 10


@dataclass(frozen=True)
class HeadTraining:
    """Settings of the classifier of points and its training; hashable.

    Attributes:
      hidden: widths of its hidden layers.
      steps: updates in all.
      signals, points: numbers of signals and points of an update, drawn at random; the signals share the points.
      learning_rate: peak rate of AdamW, with a cosine to 0.
      weight_decay: AdamW's.
      detail: widths of the means of residuals that it reads, in spacings of the signals' grid (see `local_detail`); ()
        for a head on latents alone.
    """

    hidden: tuple[int, ...] = (128, 128)
    steps: int = 1000
    signals: int = 8
    points: int = 1024
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    detail: tuple[float, ...] = ()

    @property
    def optimiser(self) -> optax.GradientTransformation:
        """AdamW."""
        return optax.adamw(optax.cosine_decay_schedule(self.learning_rate, self.steps), weight_decay=self.weight_decay)


class PointMlp(nn.Module):
    """What all signals have at a point, [1, n, L], and what each of them has, [B, n, S], to logits [B, n, classes]."""

    hidden: tuple[int, ...]
    classes: int

    @nn.compact
    def __call__(self, shared: jax.Array, own: jax.Array) -> jax.Array:
        first, *others = (*self.hidden, self.classes)
        # One layer of both; the product with `shared` is not repeated for each signal.
        x = nn.Dense(first, precision=FULL)(own) + nn.Dense(first, use_bias=False, precision=FULL)(shared)
        for width in others:
            x = nn.Dense(width, precision=FULL)(nn.relu(x))
        return x


class Examples(NamedTuple):
    """Signals with masks; arrays of any framework.

    Attributes:
      latents: [n, P], or, for training, [V, n, P] of several latents of each signal, such as of all points and of a
        tenth of them, of which each update draws one.
      masks: whole numbers [n, *grid], 0 the background.
      signals: [n, *grid, D], for a head that reads details.
      seen: bool, [*grid], or [V, *grid], the points that latents were fitted to; None for all.
    """

    latents: Array
    masks: Array
    signals: Array | None = None
    seen: Array | None = None


class Head(NamedTuple):
    """A trained classifier of points.

    Attributes:
      field, field_params: the network whose hidden units it reads.
      spread: root mean squares, over training signals, of what latents add to hidden units, and of residuals.
      grid, detail: that of its training masks, and `HeadTraining.detail`, which is in spacings of it.
      module, params: the MLP; those of the best validation.
      step: of that validation.
      val_dice: mean Dice of validation signals there; NaN where they show no structure.
    """

    field: Field
    field_params: Params
    spread: tuple[float, float]
    grid: tuple[int, ...]
    detail: tuple[float, ...]
    module: PointMlp
    params: Any
    step: int
    val_dice: float

    def labels(
        self, latents: Array, where: Sequence[int] | Array, *, signals: Array | None = None, seen: Array | None = None
    ) -> np.ndarray:  # fmt: skip
        """Classes, uint8 [n, *grid] or [n, N], of latents [n, P].

        Args:
          latents: of the signals, fitted to what was seen of them.
          where: sizes of a grid, or points [N, C] or [*grid, C] in [-1, 1].
          signals: [n, *grid, D] on the grid of the training masks, for a head that reads details; a value that is not
            finite leaves a residual of 0.
          seen: bool, the points [*grid] of the signals that were observed; None for all.
        Raises:
          ValueError: arrays that do not belong together, or no signals for a head that reads details.
        """
        points = np.asarray(as_array("where", where))
        shape = tuple(points.tolist()) if points.ndim == 1 else points.shape[:-1]
        coords = grid(shape) if points.ndim == 1 else points.reshape(-1, self.field.coord_dims)
        latents = np.asarray(as_array("latents", latents))
        _require_grid(signals, self.grid, self.detail)
        observed = _observed(self.field, self.field_params, latents[None], signals, seen, self.detail)
        return self._labels(latents, coords, observed).reshape(len(latents), *shape)

    def _labels(self, latents: np.ndarray, coords: np.ndarray, observed: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        """Classes, uint8 [n, N], at coords [N, C], of latents [n, P] with one residual each (see `_observed`)."""
        (left, seen), at = observed, jnp.asarray(coords, params_dtype(self.field_params))
        batches = max(1, math.ceil(len(latents) / _LATENTS_AT_ONCE))
        size = max(1, math.ceil(len(latents) / batches))
        chunk = _POINTS_AT_ONCE // size
        of_head = (self.field_params, self.params, self.spread)
        found = np.empty((len(latents), len(at)), np.uint8)
        for start in range(0, len(latents), size):
            rows = np.minimum(np.arange(start, start + size), len(latents) - 1)  # of one shape, for one program
            of_signals = (latents[rows], _means(self.detail, left[0, rows], seen[0]))
            for first in range(0, len(at), chunk):
                some = at[first : first + chunk]
                classes = _classes(self.field, self.module, self.detail, of_head, of_signals, some)
                found[rows, first : first + len(some)] = classes
        return found


def last_hidden(field: Field, params: Params, latents: jax.Array, coords: jax.Array) -> jax.Array:
    """h_{K-1} [B, n, L] of latents [B, P] at coords [n, C] in [-1, 1]."""
    point_params, readers = field.split(params)
    features = field.module.apply({"params": point_params}, coords[None], method="features")
    modulations = field.modulations(readers, latents)
    return cast(
        jax.Array, field.module.apply({"params": point_params}, modulations, features, method="last_hidden")
    )  # fmt: skip


def head_input(
    field: Field, params: Params, latents: jax.Array, coords: jax.Array, details: Sequence[jax.Array],
    spread: tuple[jax.Array | float, jax.Array | float],
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """What a head reads: hidden units at phi = 0, [1, n, L]; differences from these and details (each [B, n, D]) over
    `Head.spread`, [B, n, L + S]."""
    at_zero = last_hidden(field, params, jnp.zeros_like(latents[:1]), coords)
    moved = (last_hidden(field, params, latents, coords) - at_zero) / spread[0]
    return at_zero, jnp.concatenate([moved, *(some / spread[1] for some in details)], -1)


def fit_head(
    field: Field,
    params: Params,
    train: Examples,
    val: Examples,
    *,
    classes: int,
    key: jax.Array,
    training: HeadTraining = HeadTraining(),
    after: Callable[[int, float], None] = lambda step, loss: None,
) -> Head:
    """Train a classifier of points; the same arguments give the same one.

    Args:
      field, params: the shared network, which stays as it is.
      train: what the head learns from.
      val: what chooses among ten states of the training, by their Dice; one latent a signal.
      classes: with the background; masks are in [0, classes).
      key: of the initialisation and of all draws.
      after: called with the number of updates and their loss, ten times.
    Raises:
      ValueError: arrays that do not belong together, no signals for a head that reads details, or a class that there
        is not.
    """
    latents, val_latents = (np.asarray(as_array("latents", some.latents)) for some in (train, val))
    masks, val_masks = (np.asarray(as_array("masks", some.masks)) for some in (train, val))
    latents = latents if latents.ndim == 3 else latents[None]
    for some, of in ((latents[0], masks), (val_latents, val_masks)):
        if some.shape[1:] != (field.model.latent_dim,) or len(some) != len(of) or not len(of):
            raise ValueError(f"latents {some.shape} and masks {of.shape} do not belong together")
        if of.ndim != field.coord_dims + 1 or of.dtype.kind not in "iu" or of.min() < 0 or of.max() >= classes:
            raise ValueError(f"masks {of.shape} must be [n, *grid], whole numbers from 0 to {classes - 1}")
    for examples in (train, val):
        _require_grid(examples.signals, masks.shape[1:], training.detail)
    coords, val_coords = jnp.asarray(grid(masks.shape[1:]), params_dtype(params)), grid(val_masks.shape[1:])
    left, where_seen = _observed(field, params, latents, train.signals, train.seen, training.detail)
    val_observed = _observed(field, params, val_latents[None], val.signals, val.seen, training.detail)
    spread = _spread(field, params, jnp.asarray(latents[0]), coords), _root_mean_square(left, where_seen)
    flat = jnp.asarray(masks.reshape(len(masks), -1), jnp.uint8)
    given = _Given(params, jnp.asarray(latents), flat, coords, jnp.asarray(left), jnp.asarray(where_seen), spread)
    module = PointMlp(training.hidden, classes)
    start, draws = jax.random.split(key)
    units = field.module.units(field.model.layers - 1)
    details = detail_count(training.detail, axes=field.coord_dims, channels=field.channels)
    sizes = (jnp.zeros((1, 1, count), coords.dtype) for count in (units, units + details))
    head = jax.jit(module.init)(start, *sizes)["params"]
    moments, step, best = training.optimiser.init(head), 0, None
    while step < training.steps:
        count = min(math.ceil(training.steps / _VALIDATIONS), training.steps - step)
        head, moments, loss = _updates(field, module, training, count, (head, moments, step), given, draws)
        step += count
        after(step, float(loss))
        kept = jax.tree.map(np.asarray, head)
        state = Head(field, params, spread, masks.shape[1:], training.detail, module, kept, step, math.nan)
        overlap = dice(state._labels(val_latents, val_coords, val_observed), val_masks, classes=classes)
        quality = float(np.nanmean(overlap)) if not np.isnan(overlap).all() else math.nan
        # The last state is kept where validation signals show no structure.
        if best is None or not quality <= best.val_dice:
            best = state._replace(val_dice=quality)
    assert best is not None
    return best


def dice(found: np.ndarray, masks: np.ndarray, *, classes: int) -> np.ndarray:
    """Dice 2 |A and B| / (|A| + |B|) of each signal and structure, [n, classes - 1]; NaN where neither has it.

    Args:
      found, masks: whole numbers [n, *grid].
      classes: with the background, 0, which is no structure.
    """
    flat, true = (np.asarray(some).reshape(len(some), -1) for some in (found, masks))
    out = np.full((len(flat), classes - 1), np.nan)
    for k in range(1, classes):
        size = (flat == k).sum(1) + (true == k).sum(1)
        shared = ((flat == k) & (true == k)).sum(1)
        np.divide(2 * shared, size, out=out[:, k - 1], where=size > 0)
    return out


def segmentation_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross-entropy, and one less the mean Dice of probabilities over structures, of all points together.

    Args:
      logits: [..., classes].
      labels: whole numbers [...], 0 the background.
    """
    true = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype).reshape(-1, logits.shape[-1])
    logits = logits.reshape(true.shape)
    probabilities = jax.nn.softmax(logits)
    # With the ones, one point more or less does not decide the overlap of a structure that no point shows.
    overlap = (2 * (probabilities * true).sum(0) + 1) / ((probabilities + true).sum(0) + 1)
    return optax.softmax_cross_entropy(logits, true).mean() + 1 - overlap[1:].mean()


class _Given(NamedTuple):
    """Parameters of the field, latents [V, n, P], masks [n, N], coords [N, C], residuals [V, n, *grid, D], the points
    [V, *grid] where signals were seen, and the spread of `Head`."""

    params: Params
    latents: jax.Array
    masks: jax.Array
    coords: jax.Array
    left: jax.Array
    seen: jax.Array
    spread: tuple[float, float]


def _require_grid(signals: Array | None, shape: tuple[int, ...], detail: tuple[float, ...]) -> None:
    """Refuse signals on another grid, in whose spacings details are."""
    if detail and signals is not None and np.shape(signals)[1:-1] != shape:
        raise ValueError(f"signals {np.shape(signals)} must be on the grid of the training masks, {shape}")


def _observed(
    field: Field, params: Params, latents: np.ndarray, signals: Array | None, seen: Array | None,
    detail: tuple[float, ...],
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Residuals of signals, [V, n, *grid, D] for V latents of each, and where they were seen, [V, *grid]; of one point
    each for a head that reads none."""
    kinds, count, _ = latents.shape
    if not detail:
        point = (1,) * field.coord_dims
        return np.zeros((kinds, count, *point, field.channels), np.float16), np.ones((kinds, *point), bool)
    if signals is None:
        raise ValueError(f"a head that reads details (detail = {detail}) needs the signals beside their latents")
    values = np.asarray(as_array("signals", signals))
    if values.ndim != field.coord_dims + 2 or len(values) != count or values.shape[-1] != field.channels:
        raise ValueError(f"signals {values.shape} and latents {latents.shape} do not belong together")
    shape = values.shape[1:-1]
    where = np.ones(shape, bool) if seen is None else np.asarray(as_array("seen", seen)).astype(bool)
    if where.shape not in (shape, (kinds, *shape)):
        raise ValueError(f"seen {where.shape} must be of the grid of the signals, {shape}")
    where = np.broadcast_to(where, (kinds, *shape))
    left = [residuals(field, params, some, values, points) for some, points in zip(latents, where, strict=True)]
    return np.stack(left), where


@functools.partial(jax.jit, static_argnums=0)
def _means(detail: tuple[float, ...], left: jax.Array, seen: jax.Array) -> list[jax.Array]:
    """`local_means` of residuals [B, *grid, D], at the points [*grid] or [B, *grid] that were seen."""
    return local_means(left.astype(jnp.float32), jnp.broadcast_to(seen, left.shape[:-1]), detail)


def _root_mean_square(left: np.ndarray, seen: np.ndarray) -> float:
    """That of residuals [V, n, *grid, D] in `Head.spread`, at the points [V, *grid] that were seen."""
    count = seen.sum() * left.shape[1] * left.shape[-1]
    flat = left.reshape(-1)
    return math.sqrt(np.einsum("i,i->", flat, flat, dtype=np.float64) / max(1, count)) or 1.0


def _spread(field: Field, params: Params, latents: jax.Array, coords: jax.Array) -> float:
    """That of hidden units in `Head.spread`, from 64 latents at 256 points, evenly spaced."""
    some, places = (
        np.linspace(0, len(all_of) - 1, min(count, len(all_of))).round().astype(int)
        for all_of, count in ((latents, 64), (coords, 256))
    )
    hidden = last_hidden(field, params, latents[some], coords[places])
    moved = hidden - last_hidden(field, params, jnp.zeros_like(latents[:1]), coords[places])
    return float(jnp.sqrt(jnp.square(moved).mean())) or 1.0


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _updates(
    field: Field, module: PointMlp, training: HeadTraining, count: int, state: tuple[Any, Any, Any], given: _Given,
    key: jax.Array,
) -> tuple[Any, Any, jax.Array]:  # fmt: skip
    """`count` updates: the head, its moments, and the mean loss."""
    head, moments, first = state
    kinds, signals, _ = given.latents.shape

    def update(carry: tuple[Any, Any], step: jax.Array) -> tuple[tuple[Any, Any], jax.Array]:
        head, moments = carry
        keys = jax.random.split(jax.random.fold_in(key, step), 3)
        rows = jax.random.randint(keys[0], (training.signals,), 0, signals)
        kind = jax.random.randint(keys[1], (training.signals,), 0, kinds)
        points = jax.random.randint(keys[2], (training.points,), 0, len(given.coords))
        means = _means(training.detail, given.left[kind, rows], given.seen[kind])
        coords = given.coords[points]
        details = at_points(means, coords, training.detail)
        read = head_input(field, given.params, given.latents[kind, rows], coords, details, given.spread)
        labels = given.masks[rows][:, points]

        def loss_of(head: Any) -> jax.Array:
            return segmentation_loss(cast(jax.Array, module.apply({"params": head}, *read)), labels)

        loss, gradient = jax.value_and_grad(loss_of)(head)
        changes, moments = training.optimiser.update(gradient, moments, head)
        return (optax.apply_updates(head, changes), moments), loss

    (head, moments), losses = jax.lax.scan(update, (head, moments), first + jnp.arange(count))
    return head, moments, losses.mean()


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _classes(
    field: Field, module: PointMlp, detail: tuple[float, ...], of_head: tuple[Params, Any, tuple[float, float]],
    of_signals: tuple[jax.Array, list[jax.Array]], coords: jax.Array,
) -> jax.Array:  # fmt: skip
    """Classes, uint8 [B, n], at coords [n, C].

    Args:
      of_head: the parameters of the field and of the head, and its spread.
      of_signals: latents [B, P], and means of residuals.
    """
    (of_field, head, spread), (latents, means) = of_head, of_signals
    details = at_points(means, coords, detail)
    logits = cast(
        jax.Array, module.apply({"params": head}, *head_input(field, of_field, latents, coords, details, spread))
    )  # fmt: skip
    return logits.argmax(-1).astype(jnp.uint8)
