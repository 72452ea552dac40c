"""The squared error of signals at points as a function of modulations, and its derivatives.

    L_i(theta, m) = sum_n sum_d c_nd (f(x_n; m_i) - y_n)_d^2

An inner step needs the gradient s = dL/dm. Its vector-Jacobian product with v is the gradient of a directional
derivative,

    v . ds/d(theta, m) = d/d(theta, m) [ d/de L(theta, m + e v) at e = 0 ]

so no reverse pass is differentiated in reverse. `PointField` states this rule for any network; `passes` writes it out
for those without scale modulations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp

from medfuncta_jax.siren import ModulatedSiren, Modulations

Params = dict[str, dict[str, jax.Array]]

ChannelLoss = Literal["mean", "sum"]


class Targets(NamedTuple):
    """Target values at some points.

    Attributes:
      signals: y, [B, n, D].
      shares: c, the factor of each squared error, [B or 1, n or 1, D or 1].
    """

    signals: jax.Array
    shares: jax.Array


@dataclass(frozen=True)
class PointField:
    """A field as a function of modulations and points, with the derivatives of its squared error for any network.

    `params` are the layers that read points (`Field.split`), `features` a pytree from `features`.

    Attributes:
      module: the network.
    """

    module: ModulatedSiren

    def features(self, params: Params, coords: jax.Array) -> Any:
        """The part that needs no modulations, for coords [1 or B, n, C]; every leaf is [1 or B, n, ...]."""
        return self.module.apply({"params": params}, coords, method="features")

    def values(self, params: Params, modulations: Modulations, features: Any) -> jax.Array:
        """f, [B, n, D]."""
        return cast(jax.Array, self.module.apply({"params": params}, modulations, features, method="values"))

    def elements(self, batch: int, *, shared: bool) -> int:
        """Numbers in memory for a point of each of `batch` latents, and whether all have the same point."""
        del shared
        return batch * self.module.model.width

    def summarises(self, batch: int, points: int, channels: int, steps: int) -> bool:
        """Whether `summary` saves more than it costs for this many gradients on the same points."""
        del batch, points, channels, steps
        return False

    def summary(self, features: Any, targets: Targets) -> Any:
        """A replacement of features and targets, for points that all signals share with equal weights."""
        raise ValueError("this kind of field has no summary")

    def thin(self, kept: Any) -> Any:
        """The half of the arrays kept by `gradient` that saves most work."""
        return kept

    def losses(self, params: Params, modulations: Modulations, features: Any, targets: Targets | None) -> jax.Array:
        """L_i, [B]."""
        assert targets is not None
        errors = jnp.square(self.values(params, modulations, features) - targets.signals)
        return (targets.shares * errors).sum((1, 2))

    def gradient(
        self, params: Params, modulations: Modulations, features: Any, targets: Targets | None
    ) -> tuple[Modulations, jax.Array, Any]:
        """s, the losses [B], and arrays that `pull_gradient` may use."""

        def total(modulations: Modulations) -> tuple[jax.Array, jax.Array]:
            losses = self.losses(params, modulations, features, targets)
            return losses.sum(), losses

        gradient, losses = jax.grad(total, has_aux=True)(modulations)
        return gradient, losses, None

    def full_gradient(
        self, params: Params, modulations: Modulations, features: Any, targets: Targets | None
    ) -> tuple[jax.Array, tuple[Params, Modulations, Any]]:
        """The losses [B], and the gradient of their sum in params, modulations and features."""

        def of(params: Params, modulations: Modulations, features: Any) -> jax.Array:
            return self.losses(params, modulations, features, targets)

        losses, pull = jax.vjp(of, params, modulations, features)
        return losses, pull(jnp.ones_like(losses))

    def pull_gradient(
        self,
        params: Params,
        modulations: Modulations,
        features: Any,
        targets: Targets | None,
        kept: Any,
        v: Modulations,
    ) -> tuple[Params, Modulations, Any]:
        """The vector-Jacobian product of s with `v`: cotangents of params, modulations and features.

        `kept` is the third result of `gradient` for the same arguments, or `thin` of it; None computes it again.
        """
        del kept

        def along(params: Params, modulations: Modulations, features: Any) -> jax.Array:
            def total(modulations: Modulations) -> jax.Array:
                return self.losses(params, modulations, features, targets).sum()

            return jax.jvp(total, (modulations,), (v,))[1]

        return jax.grad(along, argnums=(0, 1, 2))(params, modulations, features)


def shares(weights: jax.Array | None, points: int, signals: jax.Array, channel_loss: ChannelLoss) -> jax.Array:
    """`Targets.shares` of a mean over points, and the mean or sum over the channels of `signals`.

    Args:
      weights: None, or [B, n, D or 1] >= 0; only ratios within a signal count, and a signal of weights 0 does not.
      points: n.
    Returns:
      The shape of `weights`; without weights [1, 1, 1].
    """
    channels = signals.shape[-1]
    whole = 1 if channel_loss == "mean" else channels
    if weights is None:
        return jnp.full((1, 1, 1), whole / (points * channels), signals.dtype)
    total = weights.sum((1, 2), keepdims=True) * (channels // weights.shape[2])
    return weights * whole / jnp.where(total > 0, total, 1)


def over_chunks(
    function: Callable[[jax.Array | None, jax.Array, Any], tuple[Any, Any]],
    rows: jax.Array | None,
    share: jax.Array,
    *,
    points: int,
    size: int,
    given: Any = None,
) -> tuple[Any, Any]:
    """Sums over points, with at most `size` points a signal in memory at once.

    Args:
      function: `function(rows, share, given)` returns (terms to sum over chunks, values to stack).
      rows: the points, integers [n] or [B, n], or None for all.
      share: their `Targets.shares`, [B or 1, n or 1, D or 1]; those of padding are 0.
      points: n.
      size: 0 or n for all points in one call; else the points are in the fewest chunks of equal length up to `size`.
      given: a pytree stacked over chunks, as an earlier call returned it.
    Returns:
      (sums, stacked); stacked as `function` gives it where all is one chunk.
    """
    if not 0 < size < points:
        return function(rows, share, given)
    chunks = -(-points // size)
    length = -(-points // chunks)
    places = jnp.arange(chunks * length).reshape(chunks, length)
    real = (places < points).astype(share.dtype)
    if rows is None:
        pieces = jnp.minimum(places, points - 1)
    else:
        pieces = jnp.moveaxis(rows[..., jnp.minimum(places, points - 1)], -2, 0)

    def at(chunk: Any) -> tuple[Any, Any]:
        rows, places, real, given = chunk
        return function(rows, take(share, places) * real[:, None], given)

    def add(sums: Any, chunk: Any) -> tuple[Any, Any]:
        more, stacked = at(chunk)
        return jax.tree.map(jnp.add, sums, more), stacked

    every = pieces, jnp.minimum(places, points - 1), real, given
    like = jax.eval_shape(lambda chunk: at(chunk)[0], jax.tree.map(lambda leaf: leaf[0], every))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)
    return jax.lax.scan(add, zeros, every)


def take(array: jax.Array, rows: jax.Array | None) -> jax.Array:
    """The points `rows`, [n] or [B, n], of an array [B or 1, N, ...]; all where None."""
    if rows is None or array.shape[1] == 1:
        return array
    if rows.ndim == 1 or len(rows) == len(array) == 1:  # whole rows of the array are copied
        return array.at[:, rows.ravel()].get(mode="clip")
    return jnp.take_along_axis(array, rows.reshape(*rows.shape, *[1] * (array.ndim - 2)), axis=1)
