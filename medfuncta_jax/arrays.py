"""Checks of arrays that callers pass in, of any framework."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from medfuncta_jax.coordinates import grid

Array = jax.Array | np.ndarray

# Signals or coordinates beyond these ranges are most likely in another unit (grey values to 255, pixels, millimetres).
_USUAL_SIGNALS, _USUAL_COORDS = (-0.5, 1.5), (-1.5, 1.5)


def as_array(name: str, value: Any) -> Array:
    """`value`, an array of any framework, as a JAX or numpy array.

    Raises:
      ValueError: it is no array of numbers; the message begins with `name`.
    """
    if isinstance(value, (jax.Array, np.ndarray)):
        array: Array = value
    else:
        if hasattr(value, "detach"):  # torch refuses to convert tensors that require a gradient
            value = value.detach().cpu()
        try:
            array = np.asarray(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{name} cannot be read as an array ({str(error).splitlines()[0]})") from None
    if array.dtype == object or not (jnp.issubdtype(array.dtype, jnp.number) or array.dtype == bool or _is_key(array)):
        raise ValueError(f"{name} must hold numbers, got {array.dtype}")
    return array


def _is_key(array: Array) -> bool:
    return jnp.issubdtype(array.dtype, jax.dtypes.prng_key)


def on_host(array: Array) -> np.ndarray | None:
    """The values of `array`, for checks; None if a transformation traces them or other processes hold some of them."""
    if isinstance(array, jax.core.Tracer) or (isinstance(array, jax.Array) and not array.is_fully_addressable):
        return None
    return np.asarray(array)


def points_of(signals: Array, coords: Any, *, coord_dims: int, channels: int) -> Array:
    """The points of signals.

    Args:
      signals: floating, [B, *grid, D] with B >= 1.
      coords: None for the grid over [-1, 1], or [*grid, C] shared by the signals, or [B, *grid, C]; *grid may be N.
      coord_dims, channels: C and D.
    Returns:
      [N, C] or [B, N, C].
    Raises:
      ValueError: shapes that do not belong together, integer signals, no signal, or coordinates that are not finite.
    """
    if not jnp.issubdtype(signals.dtype, jnp.floating):
        raise ValueError(f"signals must be floating, in the range the field was trained on, got {signals.dtype}")
    if signals.ndim < 2 or signals.shape[-1] != channels:
        raise ValueError(f"signals {signals.shape} must end in the field's {channels} channel(s)")
    if not signals.size:
        raise ValueError(f"signals {signals.shape} must hold at least one signal")
    if coords is None:
        if signals.ndim != coord_dims + 2:
            raise ValueError(
                f"signals {signals.shape} must be [B, {coord_dims} grid axes, D] for this field; "
                "give coords for scattered points"
            )
        return grid(signals.shape[1:-1])
    coords = checked_coords(coords, coord_dims=coord_dims)
    if coords.shape[:-1] == signals.shape[1:-1]:
        return coords.reshape(-1, coord_dims)
    if coords.shape[:-1] == signals.shape[:-1]:
        return coords.reshape(len(signals), -1, coord_dims)
    raise ValueError(
        f"coords {coords.shape} must be [N, {coord_dims}] or [{len(signals)}, N, {coord_dims}] for signals "
        f"{signals.shape}: they hold N = {coords.shape[-2]} points"
    )


def checked_coords(coords: Any, *, coord_dims: int) -> Array:
    """Coordinates [..., C] as an array.

    Raises:
      ValueError: no points, another number of coordinates, or values that are not finite.
    """
    coords = as_array("coords", coords)
    if coords.ndim < 2 or coords.shape[-1] != coord_dims or not coords.size:
        raise ValueError(f"coords {coords.shape} must be [N, {coord_dims}], or a grid of such points")
    values = on_host(coords)
    if values is not None:
        if not np.isfinite(values).all():
            raise ValueError("coords holds values that are not finite")
        _warn_beyond("coords", values, _USUAL_COORDS, "a field knows [-1, 1], the extent of its training signals")
    return coords


def check_signals(signals: Array, weights: Array | None, *, rows: np.ndarray | None = None) -> None:
    """Refuse signals [B, N, D] with observed values that are not finite; traced arrays are not checked.

    Args:
      signals: floating.
      weights: None, or [B, N, D or 1].
      rows: the numbers that the signals have for the caller, [B]; None is 0 to B - 1.
    Raises:
      ValueError: names the first such signal.
    """
    seen, shown = on_host(signals), None if weights is None else on_host(weights)
    if seen is None or (weights is not None and shown is None):
        return
    if shown is not None:
        seen = np.where(shown > 0, seen, 0)
    bad = ~np.isfinite(seen).all((1, 2))
    if bad.any():
        first = bad.argmax() if rows is None else rows[bad.argmax()]
        raise ValueError(f"signal {first} holds values that are not finite; mask those points with weights = 0")
    _warn_beyond("signals", seen, _USUAL_SIGNALS, "fields of this package are trained on [0, 1]")


def _warn_beyond(name: str, array: np.ndarray, usual: tuple[float, float], why: str) -> None:
    lowest, highest = float(array.min()), float(array.max())
    if lowest < usual[0] or highest > usual[1]:
        warnings.warn(f"{name} run from {lowest:.4g} to {highest:.4g}, but {why}", stacklevel=4)


def relative_weights(weights: Any, batch: int, points: int, channels: int) -> Array:
    """Weights of points or of their values, scaled to a maximum of 1 in each signal; only ratios within a signal count.

    Args:
      weights: [B, N], or [B, ...] with N entries a signal; or [B, N, D], or [B, ..., D] with N entries a channel.
      batch, points, channels: B, N and D.
    Returns:
      [B, N, 1] of points, or [B, N, D] of values.
    Raises:
      ValueError: another shape, or values that are negative or not finite, or a signal without a weight above 0.
    """
    weights = as_array("weights", weights)
    one_each = weights.size == batch * points
    if weights.shape[:1] != (batch,) or not (
        one_each or (weights.size == batch * points * channels and weights.shape[-1] == channels)
    ):
        of_values = f", or [B, N, D] = {(batch, points, channels)}, one for each value" if channels > 1 else ""
        raise ValueError(f"weights {weights.shape} must be [B, N] = {(batch, points)}, one for each point{of_values}")
    values = on_host(weights)
    if values is None:
        weights = weights.reshape(batch, points, -1)
        largest = weights.max((1, 2), keepdims=True)
        return weights / jnp.where(largest > 0, largest, 1)
    values = values.reshape(batch, points, -1).astype(np.float64)  # 1e-300 is a weight too
    if not np.isfinite(values).all() or (values < 0).any():
        raise ValueError("weights must be finite and not negative")
    largest = values.max((1, 2), keepdims=True)
    if not largest.all():
        raise ValueError(f"weights of signal {largest.ravel().argmin()} are all 0: nothing of it is observed")
    return values / largest
