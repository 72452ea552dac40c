"""Meta-training: one update of the shared weights along the gradient of the meta-loss (`meta_loss`)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from medfuncta_jax import sharding
from medfuncta_jax.arrays import Array
from medfuncta_jax.context import GradientContext, context_size, random_context
from medfuncta_jax.field import Field, Params, rescale_latent
from medfuncta_jax.inner_steps import InnerLoop
from medfuncta_jax.latent_loss import latent_loss, latent_noise
from medfuncta_jax.outer_loss import meta_loss
from medfuncta_jax.settings import InnerSettings, Settings, TrainSettings


class Trainable(NamedTuple):
    """The parameters that the outer loop learns.

    Attributes:
      field: the shared parameters.
      log_step_size: the logarithm of the inner step size, a scalar or one an entry of the latent (of one place, where
        the latent is a grid); None where it is fixed.
      latents: [n, P] of the n training signals, for an auto-decoder; else None.
    """

    field: Params
    log_step_size: jax.Array | None
    latents: jax.Array | None = None


class MetaState(NamedTuple):
    """The state of training, one pytree.

    Attributes:
      step: int32, updates made.
      trainable: see `Trainable`.
      optimizer: state of the optax optimizer.
    """

    step: jax.Array
    trainable: Trainable
    optimizer: optax.OptState


def learning_rate_schedule(train: TrainSettings, peak: float) -> optax.Schedule:
    """Linear warm-up to `peak`, then cosine annealing to 0 at `train.steps`, or constant."""
    decay_steps = max(1, train.steps - train.warmup_steps)
    main = (
        optax.cosine_decay_schedule(peak, decay_steps) if train.schedule == "cosine" else optax.constant_schedule(peak)
    )
    if train.warmup_steps == 0:
        return main
    return optax.join_schedules([optax.linear_schedule(0.0, peak, train.warmup_steps), main], [train.warmup_steps])


def make_optimizer(train: TrainSettings) -> optax.GradientTransformation:
    """Clipping by the global norm, then AdamW on the field and Adam on the logarithm of the step size."""

    def labels(trainable: Trainable) -> Trainable:
        return Trainable(
            *(jax.tree.map(lambda _, part=part: part, getattr(trainable, part)) for part in trainable._fields)
        )

    adamw = optax.adamw(learning_rate_schedule(train, train.learning_rate), weight_decay=train.weight_decay)
    adam = optax.adam(learning_rate_schedule(train, train.step_size_learning_rate))
    parts = {"field": adamw, "log_step_size": adam}
    if train.method == "autodecoder":
        parts["latents"] = optax.adam(learning_rate_schedule(train, train.latent_learning_rate))
    each = optax.partition(parts, labels)
    return optax.chain(optax.clip_by_global_norm(train.clip_norm), each) if train.clip_norm else each


def _initial_log_step_size(inner: InnerSettings, entries: int, dtype) -> jax.Array | None:
    shape = {"none": None, "scalar": (), "per_latent": (entries,)}[inner.learned_step_size]
    return None if shape is None else jnp.full(shape, np.log(inner.step_size), dtype)


def init_state(
    field: Field, settings: Settings, key: jax.Array, dtype=jnp.float32, *, signals: int | None = None
) -> MetaState:
    """The state before the first update; an auto-decoder has a latent of zeros for each of `signals` training signals.

    Raises:
      ValueError: an auto-decoder without their number.
    """
    log_step_size = _initial_log_step_size(settings.inner, field.model.latent_features, dtype)
    latents = None
    if settings.train.method == "autodecoder":
        if signals is None:
            raise ValueError("an auto-decoder needs the number of training signals")
        latents = jnp.zeros((signals, field.model.latent_dim), dtype)
    trainable = Trainable(field.init(key, dtype), log_step_size, latents)
    optimizer = make_optimizer(settings.train).init(trainable)
    return MetaState(step=jnp.zeros((), jnp.int32), trainable=trainable, optimizer=optimizer)


def layout(field: Field, tree: Any, mesh: Mesh) -> Any:
    """The layout of a state, or a part of one, on the devices of `mesh`: a `PartitionSpec` for every array.

    The weights [P, ...] of `Field.latent_layers` are split over "model", in everything of the form of `Trainable`: the
    parameters, their gradient, the optimizer's moments.
    """

    def of(part: Any) -> Any:
        specs = jax.tree.map(lambda _: sharding.WHOLE, part)
        if isinstance(part, Trainable) and mesh.shape["model"] > 1:
            for name in field.latent_layers():  # mapped, because optax masks parts of the tree
                specs.field[name]["kernel"] = jax.tree.map(lambda _: sharding.SPLIT, part.field[name]["kernel"])
        return specs

    return jax.tree.map(of, tree, is_leaf=lambda part: isinstance(part, Trainable))


def step_size(trainable: Trainable, inner: InnerSettings) -> float | jax.Array:
    """alpha of the inner loop: fixed, or exp of what was learned, in its shape (see `Trainable`)."""
    if trainable.log_step_size is None:
        return inner.step_size
    learned = jnp.exp(trainable.log_step_size)
    return jnp.clip(learned, *inner.step_size_range) if inner.step_size_range else learned


def inner_loop_of(settings: Settings, *, points: int) -> InnerLoop:
    """The inner loop of a run's settings, for signals of `points` points."""
    inner, train = settings.inner, settings.train
    pruned = inner.context == "gradient" and inner.selection_ratio < 1
    return InnerLoop(
        steps=inner.steps,
        step_size=inner.step_size,
        selection_ratio=inner.selection_ratio,
        shared_context=inner.shared_context,
        first_order=inner.first_order,
        remat=inner.remat,
        channel_loss=train.channel_loss,
        points_per_chunk=train.points_per_chunk,
        micro_batches=train.batch_size // (train.micro_batch or train.batch_size),
        choose=GradientContext(context_size(points, inner.selection_ratio)) if pruned else None,
    )


def _loss_and_gradient(
    field: Field,
    settings: Settings,
    trainable: Trainable,
    coords: jax.Array,
    signals: jax.Array,
    context: jax.Array | None,
    latent_loss: jax.tree_util.Partial,
) -> tuple[jax.Array, Trainable]:
    """The meta-loss of signals [B, N, D] and its gradient."""

    def loss_of(trainable: Trainable) -> jax.Array:
        alpha = step_size(trainable, settings.inner)
        if settings.inner.learned_step_size == "per_latent":  # the same at every place of a latent grid
            alpha = jnp.tile(alpha, field.model.places)
        return meta_loss(
            field, trainable.field, signals, context, inner=inner_loop_of(settings, points=len(coords)), coords=coords,
            step_size=alpha, latent_loss=latent_loss,
        )  # fmt: skip

    return jax.value_and_grad(loss_of)(trainable)


Update = Callable[..., tuple[MetaState, dict[str, jax.Array]]]


def make_update(field: Field, settings: Settings, coords: jax.Array, mesh: Mesh | None = None) -> Update:
    """The pure function `update(state, signals, key, labels=None) -> (state, metrics)`.

    The caller jits it, donating the state. `signals` is [B, N, D] in [0, 1] and `key` the key of the run:
    `state.step` is folded into it, so that a resumed run draws the same contexts. Metrics are scalars: `loss`
    (at phi_G), `gradient_norm` (before clipping), `learning_rate`. `labels` [B] are for the contrastive loss.

    Signals are split over the devices of a `mesh`; each device computes the gradient of its own, and the gradients are
    summed once. (The compiler by itself would sum in every inner step of every micro-batch.) If the mesh has a "model"
    axis, the state is in its `layout`, before and after.
    """
    train = settings.train
    gradient_of = functools.partial(_loss_and_gradient, field, settings)

    def update(
        state: MetaState, signals: jax.Array, key: jax.Array, labels: jax.Array | None = None
    ) -> tuple[MetaState, dict[str, jax.Array]]:
        key = jax.random.fold_in(key, state.step)
        points = coords
        if train.selection_ratio < 1:
            rows = random_context(
                jax.random.fold_in(key, 1), points=len(coords), selection_ratio=train.selection_ratio, steps=1
            )[0]  # fmt: skip
            points, signals = coords[rows], signals[:, rows]
        batch = len(signals)
        context = inner_loop_of(settings, points=len(points)).contexts(key, points=len(points), signals=batch)
        noise = latent_noise(train, jax.random.fold_in(key, 2), (batch, field.model.latent_dim), signals.dtype)
        of_latents = jax.tree_util.Partial(functools.partial(latent_loss, train), noise, labels)
        if mesh is None or mesh.size == 1:
            loss, gradient = gradient_of(state.trainable, points, signals, context, of_latents)
        elif labels is not None:  # the contrastive loss joins signals of all devices: for the compiler to split
            whole = sharding.constrain(mesh, state.trainable, jax.tree.map(lambda _: sharding.WHOLE, state.trainable))
            loss, gradient = gradient_of(whole, points, signals, context, of_latents)
        else:
            one, many = sharding.WHOLE, sharding.SIGNALS
            specs = layout(field, state.trainable, mesh)

            def on_one_device(trainable, *given):
                own = gradient_of(sharding.gather(trainable, specs), *given)
                return sharding.mean_over_devices(own, (one, specs))

            loss, gradient = jax.shard_map(
                on_one_device, mesh=mesh, out_specs=(one, specs), check_vma=False,
                in_specs=(specs, one, many, many if context is not None and context.ndim == 3 else one, many),
            )(state.trainable, points, signals, context, of_latents)  # fmt: skip
        state, metrics = descend(state, loss, gradient, train)
        return state if mesh is None else sharding.constrain(mesh, state, layout(field, state, mesh)), metrics

    return update


def make_train_step(
    field: Field, inner: InnerLoop, optimizer: optax.GradientTransformation, *, coords: Array | None = None
) -> Callable[..., tuple[Params, optax.OptState, dict[str, jax.Array]]]:
    """The pure function `train_step(params, optimizer_state, signals, key) -> (params, optimizer_state, metrics)`.

    One meta-update with any optimizer, for a training loop of one's own; jit it. `signals` and `coords` are those of
    `meta_loss`, `key` draws the contexts, and metrics are the scalars `loss` and `gradient_norm`.
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


def descend(
    state: MetaState, loss: jax.Array, gradient: Trainable, train: TrainSettings
) -> tuple[MetaState, dict[str, jax.Array]]:
    """One step of the optimizer; metrics as in `make_update`."""
    changes, optimizer_state = make_optimizer(train).update(gradient, state.optimizer, state.trainable)
    metrics = {
        "loss": loss,
        "gradient_norm": optax.tree.norm(gradient),
        "learning_rate": jnp.asarray(learning_rate_schedule(train, train.learning_rate)(state.step)),
    }
    return MetaState(state.step + 1, optax.apply_updates(state.trainable, changes), optimizer_state), metrics


def exported_params(field: Field, trainable: Trainable, inner: InnerSettings) -> Params:
    """The field with its latent rescaled so that the default step size of `fit_latent` is the trained one.

    A field of patches was trained on single ones, each with a loss of its own. The loss of a whole signal is the mean
    over patches, whose gradient is that many times smaller, and the step size so many times larger.
    """
    alpha = jnp.asarray(step_size(trainable, inner))
    if field.model.latent_interpolation == "patches":
        alpha = alpha * field.model.places
    return rescale_latent(field, trainable.field, alpha)
