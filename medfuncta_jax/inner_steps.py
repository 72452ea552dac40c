"""The inner loop of meta-training: SGD on phi with the shared network held fixed (CAVIA, Zintgraf et al. 2019).

    phi_0 = 0,   phi_{g+1} = phi_g - alpha dL(phi_g; C_g)/dphi

and the way back through it, from a cotangent of phi_G to those of the shared weights and of alpha. Both read from top
to bottom: `descend`, then `pull_back`. The loop of test time, on every observed point, is `fit.fit_latent`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from medfuncta_jax.context import random_context
from medfuncta_jax.field import Field, Params
from medfuncta_jax.point_field import ChannelLoss, Observed, over_chunks, shares
from medfuncta_jax.settings import SettingsError
from medfuncta_jax.siren import Modulations

# A context that is a smaller part of all points has its features computed again: taken from those of all points, their
# cotangents would be as large as these, in every step (measured in 3D: a quarter 15 % faster so, a tenth 7 % slower).
_TAKEN_PART = 1 / 6


@functools.partial(jax.tree_util.register_dataclass, data_fields=["latents", "losses"], meta_fields=[])
@dataclass(frozen=True)
class FitResult:
    """The result of a loop of steps on latents.

    Attributes:
      latents: [B, P], phi after the last step.
      losses: [B, steps], the mean squared error before each step.
    """

    latents: jax.Array
    losses: jax.Array


@dataclass(frozen=True)
class InnerLoop:
    """Settings of the inner loop and of the outer loss behind it; hashable.

    Attributes:
      steps: G >= 1 SGD steps on the latent.
      step_size: alpha > 0.
      selection_ratio: gamma in (0, 1], the part of the points in the context of a step.
      shared_context: one random context a step for the whole batch (the release) instead of one a signal (the paper).
      first_order: hold the inner gradients constant (first-order MAML); exact second order otherwise.
      remat: the arrays of each step that are kept for the way back. "none": all, and the steps are unrolled, so that
        nothing is copied; "layers": two arrays a layer; "steps": the latent alone, and the step is computed again.
        The gradient is the same.
      channel_loss: squared errors averaged ("mean", the release) or summed ("sum", MedFuncta, eq. 5) over channels.
      points_per_chunk: points of a signal in memory at once, in each step and in the outer loss; 0 for all.
      micro_batches: parts of the batch, one of which is in memory at once.
    """

    steps: int = 10
    step_size: float = 1e-2
    selection_ratio: float = 0.25
    shared_context: bool = False
    first_order: bool = False
    remat: Literal["none", "layers", "steps"] = "steps"
    channel_loss: ChannelLoss = "mean"
    points_per_chunk: int = 0
    micro_batches: int = 1

    def __post_init__(self):
        for name in ("steps", "micro_batches"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.step_size > 0:
            raise SettingsError(f"step_size must be above 0, got {self.step_size}")
        if not 0 < self.selection_ratio <= 1:
            raise SettingsError(f"selection_ratio must be in (0, 1], got {self.selection_ratio}")
        if self.points_per_chunk < 0:
            raise SettingsError(f"points_per_chunk must not be negative, got {self.points_per_chunk}")
        for name, known in (("remat", ("none", "layers", "steps")), ("channel_loss", ("mean", "sum"))):
            if getattr(self, name) not in known:
                raise SettingsError(f"{name} must be one of {known}, got {getattr(self, name)!r}")

    def contexts(self, key: jax.Array, *, points: int, signals: int) -> jax.Array | None:
        """Random contexts of all steps, [signals, G, n] or, shared, [G, n]; None where all points are seen."""
        if self.selection_ratio == 1:
            return None
        return random_context(
            key, points=points, selection_ratio=self.selection_ratio, steps=self.steps,
            signals=None if self.shared_context else signals,
        )  # fmt: skip


def takes_features(rows: tuple[int, ...], points: int) -> bool:
    """Whether contexts of this shape, [n] or [B, n], gain from the features of all points: large ones that the signals
    at hand share."""
    return rows[-1] >= _TAKEN_PART * points and math.prod(rows) == rows[-1]


class Step(NamedTuple):
    """Arrays of one inner step that are kept for the way back.

    Attributes:
      latents: phi_g, [B, P].
      rows: the points of its context, or None for all.
      gradient: dL/dm, by name of the modulation.
      latent_gradient: dL/dphi, [B, P].
      kept: see `InnerLoop.remat`.
    """

    latents: jax.Array
    rows: jax.Array | None
    gradient: Modulations
    latent_gradient: jax.Array
    kept: Any


class Reading(NamedTuple):
    """One evaluation of the modulations of latents, and its cotangents; axes [..., B, P] and [..., B, L].

    Attributes:
      latents: phi.
      gradient: dL/dm, from which dL/dphi was made.
      ct_modulations: cotangents of the modulations.
      ct_latent_gradient: cotangents of dL/dphi.
    """

    latents: jax.Array
    gradient: Modulations
    ct_modulations: Modulations
    ct_latent_gradient: jax.Array


@dataclass(frozen=True)
class Loop:
    """The inner loop of a batch, forward and back; `ct_` names cotangents.

    `params` are the layers that read points, `readers` those that read latents (`Field.split`), and `source` is
    where the features of `observed` come from.

    Attributes:
      field, inner: the network and the loop's settings.
      observed: the batch.
      context: points of each step, [G, n] or [G, B, n]; None for all.
      alpha: step sizes, [P].
    """

    field: Field
    inner: InnerLoop
    observed: Observed
    context: jax.Array | None
    alpha: jax.Array

    def descend(self, params: Params, readers: Params, source: Any) -> tuple[FitResult, Step]:
        """phi_G, and the kept arrays of each step, stacked over steps."""
        field, points = self.field, self.field.points

        def step(latents: jax.Array, rows: jax.Array | None):
            modulations, pull = jax.vjp(functools.partial(field.modulations, readers), latents)

            def at(rows, weights, _):
                features, targets = self.observed.at(source, rows, weights)
                gradient, losses, kept = points.gradient(params, modulations, features, targets)
                return (gradient, losses), self._to_keep(kept)

            (gradient, losses), kept = self._over_chunks(at, rows)
            latent_gradient = pull(gradient)[0]
            left = Step(latents, rows, gradient, latent_gradient, kept)
            return latents - self.alpha * latent_gradient, (losses, left)

        start = jnp.zeros((len(self.observed.signals), len(self.alpha)), self.alpha.dtype)
        latents, (losses, steps) = self._scan(step, start, self.context)
        return FitResult(latents=latents, losses=losses.T), steps

    def pull_back(
        self, params: Params, readers: Params, source: Any, steps: Step, ct_latents: jax.Array
    ) -> tuple[Params, Any, jax.Array, Reading]:
        """Cotangents of params, source and alpha from those of phi_G, [B, P]; and the readings of all steps.

        `ct_readers` makes the cotangents of `readers` of all readings at once.
        """
        field, points = self.field, self.field.points
        modulate = functools.partial(field.modulations, readers)

        def step(carry, step: Step):
            ct_latents, ct_alpha, ct_params, ct_source = carry
            ct_alpha = ct_alpha - (ct_latents * step.latent_gradient).sum(0)
            if self.inner.first_order:  # the gradient is a constant
                nothing = jax.tree.map(jnp.zeros_like, (step.gradient, ct_latents))
                return (ct_latents, ct_alpha, ct_params, ct_source), Reading(step.latents, step.gradient, *nothing)
            ct_latent_gradient = -self.alpha * ct_latents
            modulations, ct_gradient = jax.jvp(modulate, (step.latents,), (ct_latent_gradient,))

            def at(rows, weights, kept):
                features, pull, targets = jax.vjp(
                    lambda source: self.observed.at(source, rows, weights), source, has_aux=True
                )
                own, ct_modulations, ct_features = points.pull_gradient(
                    params, modulations, features, targets, kept, ct_gradient
                )
                return (own, ct_modulations, pull(ct_features)[0]), None

            (own, ct_modulations, from_features), _ = self._over_chunks(at, step.rows, step.kept)

            def read(latents):
                modulations, pull = jax.vjp(modulate, latents)
                return modulations, pull(step.gradient)[0]

            before = jax.vjp(read, step.latents)[1]((ct_modulations, ct_latent_gradient))[0]
            ct_params, ct_source = jax.tree.map(jnp.add, (ct_params, ct_source), (own, from_features))
            reading = Reading(step.latents, step.gradient, ct_modulations, ct_latent_gradient)
            return (ct_latents + before, ct_alpha, ct_params, ct_source), reading

        zeros = jax.tree.map(jnp.zeros_like, (self.alpha, params, source))
        (_, ct_alpha, ct_params, ct_source), readings = self._scan(step, (ct_latents, *zeros), steps, reverse=True)
        return ct_params, ct_source, ct_alpha, readings

    def _scan(self, step: Callable, start: Any, given: Any, *, reverse: bool = False) -> tuple[Any, Any]:
        length = self.inner.steps if self.context is None else len(self.context)
        return jax.lax.scan(step, start, given, length, reverse, unroll=self.inner.remat == "none" or 1)

    def _over_chunks(self, function: Callable, rows: jax.Array | None, given: Any = None) -> tuple[Any, Any]:
        signals = self.observed.signals
        points = signals.shape[1] if rows is None else rows.shape[-1]
        weights = shares(None, points, signals, self.inner.channel_loss)
        return over_chunks(function, rows, weights, points=points, size=self.inner.points_per_chunk, given=given)

    def _to_keep(self, kept: Any) -> Any:
        if self.inner.remat == "steps":
            return None
        return kept if self.inner.remat == "none" else self.field.points.thin(kept)


def ct_readers(field: Field, readers: Params, readings: Reading) -> Params:
    """Cotangents of the layers that read latents, from readings with axes [..., B, P] and [..., B, L].

    The weights of these layers are most of the parameters, [P, L] each. One reading adds to their gradient the outer
    product of a latent and the cotangent of its modulations. Here the readings of all steps, signals and micro-batches
    are the rows of one product; a loop would read and write the gradient in every step.
    """
    ndim = readings.latents.ndim
    readings = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[ndim - 1 :]), readings)

    def read(readers: Params) -> tuple[Modulations, jax.Array]:
        modulations, pull = jax.vjp(functools.partial(field.modulations, readers), readings.latents)
        return modulations, pull(readings.gradient)[0]

    return jax.vjp(read, readers)[1]((readings.ct_modulations, readings.ct_latent_gradient))[0]
