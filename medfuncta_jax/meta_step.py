"""Meta-training: one update of the shared weights along the gradient of the meta-loss (`meta_loss`)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from medfuncta_jax import sharding
from medfuncta_jax.arrays import Array
from medfuncta_jax.augmentation import resized_and_moved
from medfuncta_jax.conditioning import check_conditioning, conditioned, gauss_newton_factor
from medfuncta_jax.context import off_grid, random_context
from medfuncta_jax.coordinates import grid
from medfuncta_jax.field import Field, Params, rescale_latent
from medfuncta_jax.inner_steps import InnerLoop
from medfuncta_jax.latent_loss import latent_loss, latent_noise
from medfuncta_jax.linear_code import halved
from medfuncta_jax.outer_loss import meta_loss
from medfuncta_jax.settings import InnerSettings, InnerSteps, Settings, SettingsError, TrainSettings
from medfuncta_jax.training_state import MetaState, Trainable


def learning_rate_schedule(train: TrainSettings, peak: float) -> optax.Schedule:
    """Linear warm-up to `peak`, then cosine annealing to 0 at `train.steps`, or constant."""
    decay_steps = max(1, train.steps - train.warmup_steps)
    main = (
        optax.cosine_decay_schedule(peak, decay_steps) if train.schedule == "cosine" else optax.constant_schedule(peak)
    )
    if train.warmup_steps == 0:
        return main
    return optax.join_schedules([optax.linear_schedule(0.0, peak, train.warmup_steps), main], [train.warmup_steps])


def make_optimizer(train: TrainSettings, field: Field) -> optax.GradientTransformation:
    """Clipping by the global norm, then AdamW on the field and Adam on the logarithm of the step size.

    With `optimizer` "muon", Muon (Jordan et al. 2024) updates the weights of hidden layers and modulations: a step is
    the momentum of the gradient with all its singular values set to about 1. AdamW updates the first and the last
    layer, which read coordinates and output channels.
    """
    ends = field.end_layers()

    def labels(trainable: Trainable) -> Trainable:
        every = Trainable(
            *(jax.tree.map(lambda _, part=part: part, getattr(trainable, part)) for part in trainable._fields)
        )
        if train.optimizer == "adamw":
            return every
        kinds = {
            name: jax.tree.map(lambda leaf, end=name in ends: "field" if end or leaf.ndim < 2 else "hidden", layer)
            for name, layer in trainable.field.items()
        }
        return every._replace(field=kinds)

    def rate(peak: float) -> optax.Schedule:
        return learning_rate_schedule(train, peak)

    parts = {
        "field": optax.adamw(rate(train.learning_rate), weight_decay=train.weight_decay),
        "log_step_size": optax.adam(rate(train.step_size_learning_rate)),
    }
    if train.method == "autodecoder":
        parts["latents"] = optax.adam(rate(train.latent_learning_rate))
    if train.optimizer == "muon":
        # With Schatten scaling three iterations train as well as five, in two thirds of the time.
        parts["hidden"] = optax.contrib.muon(
            rate(train.muon_learning_rate), ns_steps=3, preconditioning="schatten", weight_decay=train.weight_decay
        )
    each = optax.partition(parts, labels)
    return optax.chain(optax.clip_by_global_norm(train.clip_norm), each) if train.clip_norm else each


def step_size(trainable: Trainable, inner: InnerSettings) -> float | jax.Array:
    """alpha of the inner loop: fixed, or exp of the learned logarithm, in its shape (see `Trainable`)."""
    if trainable.log_step_size is None:
        return inner.step_size
    learned = jnp.exp(trainable.log_step_size)
    return jnp.clip(learned, *inner.step_size_range) if inner.step_size_range else learned


def step_sizes(field: Field, trainable: Trainable, inner: InnerSettings) -> float | jax.Array:
    """`step_size`, one for all entries of the latent or one for each; it is the same at every place of a grid."""
    alpha = step_size(trainable, inner)
    return jnp.tile(alpha, field.model.places) if inner.learned_step_size == "per_latent" else alpha


def inner_loop_of(settings: Settings) -> InnerLoop:
    """The inner loop of a run's settings."""
    inner, train = settings.inner, settings.train
    return InnerLoop(
        **{each.name: getattr(inner, each.name) for each in fields(InnerSteps)},
        channel_loss=train.channel_loss,
        points_per_chunk=train.points_per_chunk,
        micro_batches=train.batch_size // (train.micro_batch or train.batch_size),
    )


@dataclass(frozen=True)
class Training:
    """The constants of a training run.

    Attributes:
      field: the field that is trained, from `check`.
      settings: the run's settings.
      shape: points along each axis of a signal, N in all.
      labels: int [n] of the training signals, for the methods that need them.
      recorded: float [n, D] of the training signals, 0 for a channel that was not recorded, else 1; None if all were.
      mesh: the devices that signals are split over; None for one.
    """

    field: Field
    settings: Settings
    shape: tuple[int, ...]
    labels: jax.Array | None = None
    recorded: jax.Array | None = None
    mesh: Mesh | None = None

    def weights(self, rows: jax.Array | None, like: jax.Array) -> jax.Array | None:
        """Weights of the values of the signals `rows` [B], in the shape of `like`, [B, n, D]; None: all count."""
        if self.recorded is None:
            return None
        assert rows is not None
        return jnp.broadcast_to(jnp.asarray(self.recorded)[rows][:, None], like.shape)


class Sample(NamedTuple):
    """The data of an update: the arguments of `meta_loss` for coords [N, C] and signals [B, N, D]."""

    coords: jax.Array
    signals: jax.Array
    context: jax.Array | None
    weights: jax.Array | None
    latent_loss: jax.tree_util.Partial


def check(settings: Settings, shape: Sequence[int], channels: int, *, task: str | None = None) -> Field:
    """The field of these settings for signals [*shape, channels]; see `methods.Method`."""
    del task
    return checked(Field(settings.model, len(shape), channels), settings)


def checked(field: Field, settings: Settings) -> Field:
    """The field itself.

    Raises:
      SettingsError: the latent cannot be split over as many devices as asked for; or inner steps are Gauss-Newton
        steps, or the start is linear, and the latent is not one vector that modulations are linear in.
    """
    if settings.inner.gauss_newton_damping:
        check_conditioning(field)
    if settings.train.start == "linear":
        halved(field)
    shards, entries = settings.train.modulation_shards, field.model.latent_features
    if entries % shards:
        raise SettingsError(
            f"train.modulation_shards = {shards} does not divide the latent's {entries} entries (of one place); try "
            f"{math.gcd(shards, entries)}"
        )
    return field


def init(
    field: Field, settings: Settings, key: jax.Array, *, signals: int | None = None, dtype: Any = jnp.float32
) -> MetaState:
    """The state before the first update; see `methods.Method`."""
    del signals
    inner = settings.inner
    shape = {"none": None, "scalar": (), "per_latent": (field.model.latent_features,)}[inner.learned_step_size]
    log_step_size = None if shape is None else jnp.full(shape, np.log(inner.step_size), dtype)
    return start(field, Trainable(field.init(key, dtype), log_step_size), settings.train)


def start(field: Field, trainable: Trainable, train: TrainSettings) -> MetaState:
    """The state before the first update of these parameters."""
    return MetaState(jnp.zeros((), jnp.int32), trainable, make_optimizer(train, field).init(trainable))


def update(
    training: Training, state: MetaState, signals: jax.Array, key: jax.Array, rows: jax.Array | None = None
) -> tuple[MetaState, dict[str, jax.Array]]:
    """One meta-update on signals [B, N, D]; see `methods.Method`."""
    sample = draw(training, state, signals, key, rows)
    return optimizer_step(training, state, *loss_and_gradient(training, state.trainable, sample))


def draw(
    training: Training,
    state: MetaState,
    signals: jax.Array,
    key: jax.Array,
    rows: jax.Array | None,
    *,
    coords: jax.Array | None = None,
) -> Sample:
    """The random choices of the next update: changes of signals, points of the outer loss, contexts, noise.

    `key` is that of the run; `state.step` is folded into it, so that a resumed run draws the same. Without `coords` the
    signals are on the grid of `training.shape`. `rows` [B] are their numbers in the training split.
    """
    field, train = training.field, training.settings.train
    key, inner = jax.random.fold_in(key, state.step), inner_loop_of(training.settings)
    if train.augmentation:
        signals = resized_and_moved(jax.random.fold_in(key, 4), signals, training.shape, largest=train.augmentation)
    sets = [(jnp.asarray(grid(training.shape), signals.dtype) if coords is None else coords, signals)]
    if train.off_grid:
        sets.append(off_grid(jax.random.fold_in(key, 3), signals, training.shape))
    if train.selection_ratio < 1:
        shown = random_context(
            jax.random.fold_in(key, 1), points=signals.shape[1], selection_ratio=train.selection_ratio, steps=1
        )[0]
        sets = [(points[shown], values[:, shown]) for points, values in sets]
    batch, points, _ = sets[0][1].shape
    context = inner.contexts(key, points=points, signals=batch)
    if train.off_grid and context is None:  # inner steps see the points of the grid alone
        context = jnp.broadcast_to(jnp.arange(points), (inner.steps, points))
    coords, signals = (jnp.concatenate(part, axis=-2) for part in zip(*sets, strict=True))
    noise = latent_noise(train, jax.random.fold_in(key, 2), (batch, field.model.latent_dim), signals.dtype)
    of_latents = jax.tree_util.Partial(functools.partial(latent_loss, train), noise)
    return Sample(coords, signals, context, training.weights(rows, signals), of_latents)


def loss_and_gradient(training: Training, trainable: Trainable, sample: Sample) -> tuple[jax.Array, Trainable]:
    """The meta-loss of a sample and its gradient, in the `layout` of `trainable`.

    Each device of the mesh computes the gradient of its own signals, and the gradients are summed once. (The compiler
    alone would sum them in every inner step of every micro-batch.)
    """
    field, settings, mesh = training.field, training.settings, training.mesh

    def of_signals(trainable: Trainable, sample: Sample) -> tuple[jax.Array, Trainable]:
        def loss_of(trainable: Trainable) -> jax.Array:
            params = inner_params(field, trainable, settings.inner, sample.coords)
            return meta_loss(
                field, params, sample.signals, sample.context, inner=inner_loop_of(settings),
                coords=sample.coords, weights=sample.weights, step_size=step_sizes(field, trainable, settings.inner),
                latent_loss=sample.latent_loss,
            )  # fmt: skip

        return jax.value_and_grad(loss_of)(trainable)

    if mesh is None or mesh.size == 1:
        return of_signals(trainable, sample)
    one, many, specs = sharding.WHOLE, sharding.SIGNALS, sharding.layout(field, trainable, mesh)
    own_context = sample.context is not None and sample.context.ndim == 3

    def on_one_device(trainable: Trainable, sample: Sample) -> tuple[jax.Array, Trainable]:
        own = of_signals(sharding.gather(trainable, specs), sample)
        return sharding.mean_over_devices(own, (one, specs))

    of_sample = Sample(one, many, many if own_context else one, many, many)  # type: ignore[arg-type]
    return jax.shard_map(
        on_one_device, mesh=mesh, in_specs=(specs, of_sample), out_specs=(one, specs), check_vma=False
    )(trainable, sample)


def inner_params(field: Field, trainable: Trainable, inner: InnerSettings, coords: jax.Array | None) -> Params:
    """The field that the inner loop runs on: conditioned at `coords` [N, C] where its steps are Gauss-Newton steps."""
    if not inner.gauss_newton_damping:
        return trainable.field
    assert coords is not None
    factor = gauss_newton_factor(field, trainable.field, coords, damping=inner.gauss_newton_damping)
    return conditioned(field, trainable.field, factor)


def optimizer_step(
    training: Training, state: MetaState, loss: jax.Array, gradient: Trainable
) -> tuple[MetaState, dict[str, jax.Array]]:
    """The state after a step of the optimizer along the gradient, and the metrics of the update."""
    train, mesh = training.settings.train, training.mesh
    changes, optimizer_state = make_optimizer(train, training.field).update(gradient, state.optimizer, state.trainable)
    metrics = {
        "loss": loss,
        "gradient_norm": optax.tree.norm(gradient),
        "learning_rate": jnp.asarray(learning_rate_schedule(train, train.learning_rate)(state.step)),
    }
    state = MetaState(state.step + 1, optax.apply_updates(state.trainable, changes), optimizer_state)
    if mesh is not None:
        state = sharding.constrain(mesh, state, sharding.layout(training.field, state, mesh))
    return state, metrics


def exported_params(
    field: Field, trainable: Trainable, inner: InnerSettings, coords: jax.Array | None = None
) -> Params:
    """The field with its latent rescaled so that a default step of `fit_latent` is `inner.fit_ratio` of a step in
    training. See `methods.Method`.
    """
    alpha = inner.fit_ratio * step_size(trainable, inner)
    return rescale_latent(field, inner_params(field, trainable, inner, coords), alpha)


def make_train_step(
    field: Field, inner: InnerLoop, optimizer: optax.GradientTransformation, *, coords: Array | None = None
) -> Callable[..., tuple[Params, optax.OptState, dict[str, jax.Array]]]:
    """The pure function `train_step(params, optimizer_state, signals, key) -> (params, optimizer_state, metrics)`.

    One meta-update with any optimizer, for your own training loop; jit the function. `signals` and `coords` are those
    of `meta_loss`, `key` draws the contexts, and metrics are the scalars `loss` and `gradient_norm`.
    """

    def train_step(
        params: Params, optimizer_state: optax.OptState, signals: Array, key: jax.Array
    ) -> tuple[Params, optax.OptState, dict[str, jax.Array]]:
        loss, gradient = jax.value_and_grad(
            lambda params: meta_loss(field, params, signals, key, inner=inner, coords=coords)
        )(params)
        changes, optimizer_state = optimizer.update(gradient, optimizer_state, params)
        metrics = {"loss": loss, "gradient_norm": optax.tree.norm(gradient)}
        return optax.apply_updates(params, changes), optimizer_state, metrics

    return train_step
