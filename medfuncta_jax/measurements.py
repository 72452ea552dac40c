"""Measurements of fields by an operator, and the loss of latents against them.

The memory that a network of width L needs at N points is L times that of the values. Points are therefore evaluated in
chunks, and again in the reverse pass, so that memory holds only the values of all points. If the measurements come in
independent groups (`Operator.groups`), it holds only the values of some groups.

A field with one modulated layer is a sum of functions of the point (`basis.BasisField`), and a linear operator maps
such a sum to the sum of the measured functions. The measured functions are computed once (`observed_field`); every step
then costs as much as with points.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from medfuncta_jax.arrays import Array, as_array, checked_coords, on_host, relative_weights
from medfuncta_jax.basis import Basis, BasisField
from medfuncta_jax.chunks import chunk_of
from medfuncta_jax.coordinates import grid
from medfuncta_jax.field import Field, Params, params_dtype
from medfuncta_jax.operators import Operator, Points
from medfuncta_jax.point_field import ChannelLoss, Targets, shares

# Points of the grid of `step_ratio`, and steps of the power iteration in `steepness`.
_REFERENCE_POINTS, _POWER_STEPS = 1024, 24


@functools.partial(jax.tree_util.register_dataclass, data_fields=["operator", "params", "basis"], meta_fields=[])
@dataclass(frozen=True)
class ObservedField:
    """What fits of measurements need of an operator and a field, whatever was measured (see `observed_field`).

    Attributes:
      operator: the operator.
      params: the shared network.
      basis: the measured functions of a field with one modulated layer, for a linear operator; else None.
    """

    operator: Operator
    params: Params
    basis: Basis | None

    def check(self, params: Params) -> None:
        """Refuse parameters other than those this was computed for.

        Traced ones are others, unless they are the very same: their derivatives would miss the measured functions.
        """
        ours, theirs = (dict(jax.tree_util.tree_leaves_with_path(some)) for some in (self.params, params))
        if ours.keys() != theirs.keys() or not all(_same(ours[path], theirs[path]) for path in ours):
            raise ValueError("observe was computed for other params: call observed_field with these, also within a jit")


def _same(one: Array, other: Array) -> bool:
    """Whether two arrays are known to be equal."""
    if one is other:
        return True
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    here, there = on_host(one), on_host(other)
    return here is not None and there is not None and np.array_equal(here, there)


def observed_field(
    field: Field, params: Params, operator: Operator, *, points_per_chunk: int | None = None
) -> ObservedField:
    """What several fits of one field to measurements by one operator share: give it to `fit_latent` as `observe`.

    With one modulated layer and a linear operator, the values at all points of the operator often cost more than the
    steps: 30 projections of 64x64 pixels have sixty times as many points as the image. Nothing is saved otherwise.

    Args:
      field, params, operator: see `measure`.
      points_per_chunk: points in memory at once; None as in `fit_latent`.
    Raises:
      ValueError: no operator, or one of another number of coordinates.
    """
    _check_operator(operator, field=field)
    basis = None
    if isinstance(field.points, BasisField) and operator.linear:
        basis = _measured_basis(field, params, operator, chunk_of(field, points_per_chunk, 1, shared=True))
    return ObservedField(operator, params, basis)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _measured_basis(field: Field, params: Params, operator: Operator, size: int) -> Basis:
    """Measurements by a linear operator of the functions that a field with one modulated layer is a sum of."""
    points, point_params = field.points, field.split(params)[0]

    def functions(coords: jax.Array) -> jax.Array:
        basis: Any = points.features(point_params, coords[None])
        return jnp.concatenate([basis.constant, basis.functions], -1)

    measured = _in_chunks(operator, functions, jnp.asarray(operator.coords, params_dtype(params)), size)
    return Basis(measured[..., : field.channels], measured[..., field.channels :])


def measure(
    field: Field, params: Params, latents: Array, operator: Operator, *, points_per_chunk: int | None = None
) -> jax.Array:
    """Measurements of the fields of latents by an operator; differentiable.

    Args:
      field, params: the shared network.
      latents: [B, P].
      operator: an operator on points with the field's number of coordinates.
      points_per_chunk: as in `fit_latent`; None takes all points at once.
    Returns:
      [B, *operator.shape, D].
    """
    points, (point_params, readers) = field.points, field.split(params)
    dtype = params_dtype(params)
    modulations = field.modulations(readers, jnp.asarray(latents, dtype))

    def values(coords: jax.Array) -> jax.Array:
        return points.values(point_params, modulations, points.features(point_params, coords[None]))

    measured = _in_chunks(operator, values, jnp.asarray(operator.coords, dtype), points_per_chunk or 0)
    return measured.reshape(len(latents), *operator.shape, field.channels)


def _in_chunks(operator: Operator, values: Callable[[jax.Array], jax.Array], coords: jax.Array, size: int) -> jax.Array:
    """Measurements [B, M, D] of `values`, a function from coords [n, C] to [B, n, D], evaluated at about `size` points
    (0: all) at a time."""
    count, groups = len(coords), operator.groups
    if not 0 < size < count:
        return operator(values(coords), coords)
    each = count // groups

    def parts(coords: jax.Array) -> jax.Array:
        return _mapped(values, coords, len(coords) // _divisor(len(coords), size) if each > size else 1)

    together = _divisor(groups, max(1, size // each))
    return _mapped(lambda coords: operator(parts(coords), coords), coords, groups // together)


def _mapped(function: Callable[[jax.Array], jax.Array], coords: jax.Array, pieces: int) -> jax.Array:
    """`function` of coords, piece by equal piece, [B, n, ...]; the reverse pass computes each piece again."""
    if pieces == 1:
        return function(coords)
    found = jax.lax.map(jax.checkpoint(function), coords.reshape(pieces, -1, coords.shape[-1]))
    found = jnp.moveaxis(found, 0, 1)
    return found.reshape(found.shape[0], -1, *found.shape[3:])


def _divisor(number: int, most: int) -> int:
    """The largest divisor of a number that is at most `most`."""
    return max(k for k in range(1, min(number, most) + 1) if number % k == 0)


def measured_loss(
    field: Field,
    params: Params,
    operator: Operator | ObservedField,
    measurements: jax.Array,
    *,
    weights: jax.Array | None = None,
    channel_loss: ChannelLoss = "mean",
    points_per_chunk: int = 0,
    gradients: int = 20,
) -> Callable[[jax.Array], jax.Array]:
    """The loss of measurements as a function from latents [B, P] to one number a signal, [B]; differentiable.

    It is the squared difference of measurements, averaged over them by their weights, in squared units of the
    measurements. Terms that do not depend on latents are computed here, once.

    Args:
      field, params, operator: see `measure`; or, computed before, the `observed_field` of all three.
      measurements: [B, M, D].
      weights: None, or [B, M] or [B, M, D] >= 0, the inverse variance of the noise; only ratios within a signal matter.
      channel_loss: "mean" or "sum" over channels.
      points_per_chunk: points of a signal in memory at once; 0 for all.
      gradients: the approximate number of gradients, which decides whether normal equations pay.
    Raises:
      ValueError: weights that `fit_latent` refuses.
    """
    points, (point_params, readers) = field.points, field.split(params)
    count = measurements.shape[1]
    if weights is not None:
        weights = jnp.asarray(relative_weights(weights, *measurements.shape), measurements.dtype)
        measurements = jnp.where(weights > 0, measurements, 0)
    targets = Targets(measurements, shares(weights, count, measurements, channel_loss))
    # All signals share one set of functions, so a chunk may have B times as many points.
    observed = _observed(field, params, operator, points_per_chunk * len(measurements))
    basis = observed.basis
    if basis is None:

        def losses(latents: jax.Array) -> jax.Array:
            seen = measure(field, params, latents, observed.operator, points_per_chunk=points_per_chunk)
            return (targets.shares * jnp.square(seen.reshape(targets.signals.shape) - targets.signals)).sum((1, 2))

        return losses
    shared: Any = basis
    known: Targets | None = targets
    if weights is None and points.summarises(len(measurements), count, field.channels, gradients):
        shared, known = points.summary(basis, targets), None
    return lambda latents: points.losses(point_params, field.modulations(readers, latents), shared, known)


def _observed(field: Field, params: Params, operator: Operator | ObservedField, size: int) -> ObservedField:
    """The `observed_field` of an operator, or the one that is given; `size` points in memory at once, 0 for all."""
    if isinstance(operator, ObservedField):
        operator.check(params)
        return operator
    return observed_field(field, params, operator, points_per_chunk=size or len(operator.coords))


def step_ratio(
    field: Field, params: Params, operator: Operator | ObservedField, *, points_per_chunk: int = 0
) -> jax.Array:  # fmt: skip
    """The ratio of the step size for `measured_loss` to the step size for values at points.

    The ratio is the largest curvature of the mean squared error of values on a grid, divided by that of the loss of
    measurements, both in the latent around zero, without weights, by power iteration. A step size that suits the field
    then suits every operator, in any unit of measurements. The ratio is below 1 for operators that sum values.

    Args:
      field, params, operator: see `measured_loss`.
    """
    side = max(2, round(_REFERENCE_POINTS ** (1 / field.coord_dims)))
    reference = Points(grid((side,) * field.coord_dims))
    below = steepness(field, params, operator, points_per_chunk=points_per_chunk)
    above = steepness(field, params, reference, points_per_chunk=points_per_chunk)
    return jnp.where(below > 0, above / jnp.where(below > 0, below, 1), 1)


def steepness(
    field: Field, params: Params, operator: Operator | ObservedField, *, points_per_chunk: int = 0
) -> jax.Array:
    """The largest eigenvalue of J^T J / M, J the derivative of the M measurements in the latent, around zero.

    Descent on `measured_loss` with a step size beyond the inverse of this oscillates.
    """
    latent = jnp.zeros(field.model.latent_dim, params_dtype(params))
    points, (point_params, readers) = field.points, field.split(params)
    observed = _observed(field, params, operator, points_per_chunk)

    def seen(latent: jax.Array) -> jax.Array:
        if observed.basis is not None:
            return points.values(point_params, field.modulations(readers, latent[None]), observed.basis)[0]
        return measure(field, params, latent[None], observed.operator, points_per_chunk=points_per_chunk)[0]

    push = functools.partial(jax.jvp, seen, (latent,))
    _, pull = jax.vjp(seen, latent)

    def step(carry: Any, _: Any) -> Any:
        vector = pull(push((carry[0],))[1])[0]
        size = jnp.linalg.norm(vector)
        return (vector / jnp.where(size > 0, size, 1), size), None

    start = jax.random.normal(jax.random.key(0), latent.shape, latent.dtype)
    first = (start / jnp.linalg.norm(start), jnp.zeros((), latent.dtype))
    (_, size), _ = jax.lax.scan(step, first, length=_POWER_STEPS)
    return size / math.prod(observed.operator.shape)


def checked_measurements(operator: Operator, measurements: Any, weights: Any, *, field: Field) -> tuple[Array, Any]:
    """Measurements [B, M, D] and weights [B, M, D or 1] or None.

    Raises:
      ValueError: they do not belong to the operator, or the operator not to the field; values that are not finite, or
        weights as `fit_latent` refuses them.
    """
    _check_operator(operator, field=field)
    measurements = as_array("signals", measurements)
    shape = (*operator.shape, field.channels)
    if not jnp.issubdtype(measurements.dtype, jnp.floating):
        raise ValueError(f"signals must be floating measurements, got {measurements.dtype}; a k-space is [2, S] reals")
    if measurements.shape[1:] != shape or not len(measurements):
        raise ValueError(
            f"signals {measurements.shape} must be [B, {', '.join(map(str, shape))}], the measurements of "
            f"{type(operator).__name__} for a field of {field.channels} channel(s)"
        )
    measurements = measurements.reshape(len(measurements), -1, field.channels)
    if weights is not None:
        weights = relative_weights(weights, *measurements.shape)
    seen, shown = on_host(measurements), None if weights is None else on_host(weights)
    if seen is not None and (weights is None or shown is not None):
        bad = ~np.isfinite(seen if shown is None else np.where(shown > 0, seen, 0)).all((1, 2))
        if bad.any():
            raise ValueError(f"signal {bad.argmax()} holds measurements that are not finite; give those a weight of 0")
    return measurements, weights


def _check_operator(operator: Any, *, field: Field) -> None:
    if not isinstance(operator, Operator):
        raise ValueError(f"observe must be an operator of medfuncta_jax.operators, got {type(operator).__name__}")
    checked_coords(operator.coords, coord_dims=field.coord_dims)
