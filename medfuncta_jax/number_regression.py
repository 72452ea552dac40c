"""Numbers of signals from their latents: ridge regression and an MLP, both chosen on validation signals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from medfuncta_jax.arrays import Array
from medfuncta_jax.mlp_classifier import Mlp, normalisation, normalised, one_epoch, optimiser_of, outputs_of
from medfuncta_jax.settings import MlpSettings


class NumberFit(NamedTuple):
    """A regression.

    Attributes:
      predict: features [n, P] to numbers, float64 [n], in the units of those it was fitted to.
      val_error: mean squared error on validation, in squared units.
      parameters: trained ones.
      chosen: the penalty of ridge, or the epoch of the MLP, counted from 1.
    """

    predict: Callable[[Array], np.ndarray]
    val_error: float
    parameters: int
    chosen: float


def fit_ridge(
    features: Array, numbers: Array, val_features: Array, val_numbers: Array, *, penalties: Sequence[float]
) -> NumberFit:
    """Ridge regression of numbers [n] on features [n, P], with the penalty that is best on validation.

    Features and numbers are standardised by training: w minimises |y - X w|^2 / n + penalty |w|^2.

    Raises:
      ValueError: arrays that do not belong together.
    """
    x, y, val_x, val_y = _checked(features, numbers, val_features, val_numbers)
    shift, scale = normalisation(x, "standardise")
    mean, spread = y.mean(), y.std() or 1.0
    left, singular, right = np.linalg.svd((x - shift) / scale, full_matrices=False)
    projected = left.T @ ((y - mean) / spread)
    best: NumberFit | None = None
    for penalty in penalties:
        weights = right.T @ (projected * singular / (singular**2 + penalty * len(x)))

        def predict(features: Array, weights: np.ndarray = weights) -> np.ndarray:
            return mean + spread * ((np.asarray(features, np.float64) - shift) / scale @ weights)

        error = float(np.mean((predict(val_x) - val_y) ** 2))
        if best is None or error < best.val_error:
            best = NumberFit(predict, error, x.shape[1] + 1, penalty)
    if best is None:
        raise ValueError("penalties must hold at least one")
    return best


def fit_number_mlp(
    features: Array,
    numbers: Array,
    val_features: Array,
    val_numbers: Array,
    *,
    key: jax.Array,
    settings: MlpSettings = MlpSettings(epochs=100, hidden=(256, 64)),  # noqa: B008  (frozen)
    after_epoch: Callable[[float], None] = lambda val_error: None,
) -> NumberFit:
    """An MLP that gives a number, as `fit_mlp` trains one for classes; the epoch that is best on validation is kept.

    Features and numbers are standardised by training; the loss is the squared error.

    Args:
      features, val_features: floating, [n, P] and [m, P].
      numbers, val_numbers: [n] and [m].
      key: PRNG key for the initialisation, the order of the signals and dropout.
      settings: settings of the MLP and its training.
      after_epoch: called with the mean squared error on validation, of standardised numbers.
    Raises:
      ValueError: arrays that do not belong together.
    """
    x, y, val_x, val_y = _checked(features, numbers, val_features, val_numbers)
    shift, scale = normalisation(x, "standardise")
    mean, spread = y.mean(), y.std() or 1.0
    inputs, val_inputs = normalised(x, shift, scale), normalised(val_x, shift, scale)
    targets = jnp.asarray((y - mean) / spread, jnp.float32)[:, None]
    module = Mlp(settings.hidden, 1, settings.dropout)
    start, order = jax.random.split(key)
    params = module.init(start, inputs[:1])["params"]
    state: tuple[Any, Any] = (params, optimiser_of(settings).init(params))
    best, best_epoch, least = params, 0, np.inf
    for epoch in range(settings.epochs):
        state = one_epoch(module, settings, _squared_error, state, inputs, targets, jax.random.fold_in(order, epoch))
        found = np.asarray(outputs_of(module, state[0], val_inputs), np.float64)[:, 0]
        error = float(np.mean((found - (val_y - mean) / spread) ** 2))
        if error < least:
            best, best_epoch, least = state[0], epoch, error
        after_epoch(error)

    def predict(features: Array) -> np.ndarray:
        outputs = outputs_of(module, best, normalised(np.asarray(features), shift, scale))
        return mean + spread * np.asarray(outputs, np.float64)[:, 0]

    parameters = sum(leaf.size for leaf in jax.tree.leaves(best))
    return NumberFit(predict, least * spread**2, parameters, best_epoch + 1)


def _squared_error(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    return (outputs - targets) ** 2


def _checked(*arrays: Array) -> list[np.ndarray]:
    """Features [n, P] and numbers [n], of training and validation, float64."""
    x, y, val_x, val_y = (np.asarray(array, np.float64) for array in arrays)
    for features, numbers in ((x, y), (val_x, val_y)):
        if features.ndim != 2 or numbers.shape != features.shape[:1] or not len(numbers):
            raise ValueError(f"features {features.shape} must be [n, P], numbers {numbers.shape} [n], n at least 1")
        if not (np.isfinite(features).all() and np.isfinite(numbers).all()):
            raise ValueError("features and numbers must be finite")
    if x.shape[1] != val_x.shape[1]:
        raise ValueError(f"features {x.shape} and val_features {val_x.shape} must have the same width")
    return [x, y, val_x, val_y]
