"""The inner loop of meta-training: SGD on phi with the shared network held fixed (CAVIA, Zintgraf et al. 2019).

    phi_0 = 0,   phi_{g+1} = phi_g - alpha dL(phi_g; C_g)/dphi

and its reverse pass, from the cotangent of phi_G to the cotangents of the shared weights and of alpha: `Loop.descend`,
then `Loop.pull_back`. `fit.fit_latent` is the loop of test time, on every observed point.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from medfuncta_jax.context import random_context
from medfuncta_jax.field import Field, Params
from medfuncta_jax.point_field import ChannelLoss, Targets, over_chunks, shares, take
from medfuncta_jax.settings import InnerSteps, SettingsError
from medfuncta_jax.siren import Modulations

# The two halves of a field's parameters (`Field.split`): layers that read points, and layers that read latents.
Halves = tuple[Params, Params]


@dataclass(frozen=True)
class InnerLoop(InnerSteps):
    """Settings of the inner loop (`settings.InnerSteps`), and of the outer loss behind it; hashable.

    Attributes:
      channel_loss: squared errors averaged ("mean", the release) or summed ("sum", MedFuncta, eq. 5) over channels.
      points_per_chunk: points of a signal in memory at once, in each step and in the outer loss; 0 for all.
      micro_batches: parts of the batch, one of which is in memory at once.
    """

    channel_loss: ChannelLoss = "mean"
    points_per_chunk: int = 0
    micro_batches: int = 1

    def __post_init__(self):
        super().__post_init__()
        if self.micro_batches < 1:
            raise SettingsError(f"micro_batches must be at least 1, got {self.micro_batches}")
        if self.points_per_chunk < 0:
            raise SettingsError(f"points_per_chunk must not be negative, got {self.points_per_chunk}")
        if self.channel_loss not in ("mean", "sum"):
            raise SettingsError(f"channel_loss must be one of ('mean', 'sum'), got {self.channel_loss!r}")

    def contexts(self, key: jax.Array, *, points: int, signals: int) -> jax.Array | None:
        """Random contexts of all steps, [signals, G, n] or, shared, [G, n]; None where all points are seen."""
        if self.selection_ratio == 1:
            return None
        return random_context(
            key, points=points, selection_ratio=self.selection_ratio, steps=self.steps,
            signals=None if self.shared_context else signals,
        )  # fmt: skip


class Source(NamedTuple):
    """The source of the features of points; exactly one attribute is set.

    Attributes:
      params: layers that read points, which compute features from coordinates.
      features: the features of all points.
      summary: a `PointField.summary`, which stands for all points and their targets.
    """

    params: Params | None = None
    features: Any = None
    summary: Any = None


@dataclass(frozen=True)
class Observed:
    """Signals at points, evaluated in chunks.

    Attributes:
      field: the network.
      coords: [N, C]; not needed by a source that has features.
      signals: [B, N, D].
      channel_loss: see `InnerLoop`.
      points_per_chunk: points of a signal in memory at once; 0 for all.
      weights: None, or weights of points or of values, [B, N, 1 or D].
    """

    field: Field
    coords: jax.Array
    signals: jax.Array
    channel_loss: ChannelLoss
    points_per_chunk: int
    weights: jax.Array | None = None

    def at(self, source: Source, rows: jax.Array | None, share: jax.Array) -> tuple[Any, Targets | None]:
        """Features and targets of the points `rows`, [n] or [B, n] (None: all), with the given `Targets.shares`."""
        if source.summary is not None:
            return source.summary, None
        if source.params is None:
            features = jax.tree.map(lambda leaf: take(leaf, rows), source.features)
        else:
            coords = self.coords if rows is None else self.coords[rows]
            features = self.field.points.features(source.params, coords if coords.ndim == 3 else coords[None])
        return features, Targets(take(self.signals, rows), share)

    def gradient(
        self, halves: Halves, source: Source, latents: jax.Array, rows: jax.Array | None
    ) -> tuple[Modulations, jax.Array, jax.Array, Any]:
        """dL/dm, dL/dphi [B, P], the losses [B] at the points `rows`, and what `PointField.gradient` keeps."""
        params, readers = halves
        modulations, pull = jax.vjp(functools.partial(self.field.modulations, readers), latents)

        def at(rows, share, _):
            gradient, losses, kept = self.field.points.gradient(params, modulations, *self.at(source, rows, share))
            return (gradient, losses), kept

        whole = replace(self, points_per_chunk=0) if source.summary is not None else self
        (gradient, losses), kept = whole.over_chunks(at, rows, self.share(rows))
        return gradient, pull(gradient)[0], losses, kept

    def share(self, rows: jax.Array | None) -> jax.Array:
        """`Targets.shares` of the points `rows`, [n] or [B, n] (None: all)."""
        weights = None if self.weights is None else take(self.weights, rows)
        points = self.signals.shape[1] if rows is None else rows.shape[-1]
        return shares(weights, points, self.signals, self.channel_loss)

    def over_chunks(self, function: Callable, rows: jax.Array | None, share: jax.Array, given: Any = None) -> Any:
        """`point_field.over_chunks` of the points `rows`."""
        points = self.signals.shape[1] if rows is None else rows.shape[-1]
        return over_chunks(function, rows, share, points=points, size=self.points_per_chunk, given=given)


class Step(NamedTuple):
    """Arrays of one inner step that are kept for the reverse pass.

    Attributes:
      latents: phi_g, [B, P].
      rows: the points of its context, or None for all.
      gradient: dL/dm, by name of the modulation.
      latent_gradient: dL/dphi, [B, P].
      kept: see `InnerSteps.remat`.
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
      gradient: dL/dm, from which dL/dphi is computed.
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

    Attributes:
      inner: the loop's settings.
      observed: the batch.
      context: points of each step, [G, n] or [G, B, n]; None for all.
      alpha: step sizes, [P].
    """

    inner: InnerLoop
    observed: Observed
    context: jax.Array | None
    alpha: jax.Array

    def descend(self, halves: Halves, source: Source) -> tuple[jax.Array, jax.Array, Step]:
        """phi_G [B, P], the losses before each step [G, B], and the kept arrays of each step, stacked over steps."""

        def step(latents: jax.Array, rows: jax.Array | None):
            gradient, latent_gradient, losses, kept = self.observed.gradient(halves, source, latents, rows)
            left = Step(latents, rows, gradient, latent_gradient, self._to_keep(kept))
            return latents - self.alpha * latent_gradient, (losses, left)

        start = jnp.zeros((len(self.observed.signals), len(self.alpha)), self.alpha.dtype)
        latents, (losses, steps) = self._scan(step, start, self.context)
        return latents, losses, steps

    def pull_back(
        self, halves: Halves, source: Source, steps: Step, ct_latents: jax.Array
    ) -> tuple[Params, Source, jax.Array, Reading]:
        """Cotangents of the layers that read points, of source and of alpha, from those of phi_G [B, P]; and the
        readings of all steps, from which `ct_readers` computes the cotangents of the other layers."""
        (params, readers), points = halves, self.observed.field.points
        modulate = functools.partial(self.observed.field.modulations, readers)

        def step(carry, step: Step):
            ct_latents, ct_alpha, ct_params, ct_source = carry
            ct_alpha = ct_alpha - (ct_latents * step.latent_gradient).sum(0)
            if self.inner.first_order:  # the gradient is a constant
                nothing = jax.tree.map(jnp.zeros_like, (step.gradient, ct_latents))
                return (ct_latents, ct_alpha, ct_params, ct_source), Reading(step.latents, step.gradient, *nothing)
            ct_latent_gradient = -self.alpha * ct_latents
            modulations, ct_gradient = jax.jvp(modulate, (step.latents,), (ct_latent_gradient,))

            def at(rows, share, kept):
                features, pull, targets = jax.vjp(
                    lambda source: self.observed.at(source, rows, share), source, has_aux=True
                )
                own, ct_modulations, ct_features = points.pull_gradient(
                    params, modulations, features, targets, kept, ct_gradient
                )
                return (own, ct_modulations, pull(ct_features)[0]), None

            parts, _ = self.observed.over_chunks(at, step.rows, self.observed.share(step.rows), step.kept)
            own, ct_modulations, from_features = parts

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

    def _to_keep(self, kept: Any) -> Any:
        if self.inner.remat == "steps":
            return None
        return kept if self.inner.remat == "none" else self.observed.field.points.thin(kept)


def ct_readers(field: Field, readers: Params, readings: Reading) -> Params:
    """Cotangents of the layers that read latents, from readings with axes [..., B, P] and [..., B, L].

    The kernels of these layers are most of the parameters, [P, L] each. One reading adds to their gradient the outer
    product of a latent and the cotangent of its modulations. Here the readings of all steps, signals and micro-batches
    are the rows of one product; a loop would read and write the gradient in every step.
    """
    ndim = readings.latents.ndim
    readings = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[ndim - 1 :]), readings)

    def read(readers: Params) -> tuple[Modulations, jax.Array]:
        modulations, pull = jax.vjp(functools.partial(field.modulations, readers), readings.latents)
        return modulations, pull(readings.gradient)[0]

    return jax.vjp(read, readers)[1]((readings.ct_modulations, readings.ct_latent_gradient))[0]
