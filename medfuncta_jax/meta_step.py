"""Meta-training: one update of the shared weights down the slope of the outer loss (`outer_loss`)."""

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
from medfuncta_jax.context import context_size, random_context
from medfuncta_jax.field import Field, Params
from medfuncta_jax.inner_loop import Array, Readings, no_nudges, slopes_of_readers
from medfuncta_jax.loss import regularised
from medfuncta_jax.outer_loss import loss_and_readings
from medfuncta_jax.settings import InnerSettings, Settings, TrainSettings

# The step size that every exported field is scaled to; `fit_latent`'s default.
EXPORTED_STEP_SIZE = 1e-2


class Trainable(NamedTuple):
    """What the outer loop learns.

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
    """All that a run carries from update to update, one pytree.

    Attributes:
      step: int32, updates made.
      trainable: see `Trainable`.
      optimizer: optax state.
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
    """How a state, or a part of one, lies on the devices of `mesh`: a `PartitionSpec` for every array.

    Split over "model" are the weights [P, ...] of `Field.latent_layers`, in whatever has the form of `Trainable`: the
    parameters themselves, their slopes, the optimizer's moments.
    """

    def of(part: Any) -> Any:
        specs = jax.tree.map(lambda _: sharding.WHOLE, part)
        if isinstance(part, Trainable) and mesh.shape["model"] > 1:
            for name in field.latent_layers():  # mapped, as optax masks what one of its parts does not see
                specs.field[name]["kernel"] = jax.tree.map(lambda _: sharding.SPLIT, part.field[name]["kernel"])
        return specs

    return jax.tree.map(of, tree, is_leaf=lambda part: isinstance(part, Trainable))


def step_size(trainable: Trainable, inner: InnerSettings) -> float | jax.Array:
    """alpha of the inner loop: fixed, or exp of what was learned, in its shape (see `Trainable`)."""
    if trainable.log_step_size is None:
        return inner.step_size
    learned = jnp.exp(trainable.log_step_size)
    return jnp.clip(learned, *inner.step_size_range) if inner.step_size_range else learned


def _loss_and_slopes(
    field: Field,
    settings: Settings,
    trainable: Trainable,
    coords: jax.Array,
    signals: jax.Array,
    context: Array | int,
    key: jax.Array,
    labels: jax.Array | None = None,
) -> tuple[jax.Array, Trainable]:
    """The outer loss of signals [B, N, D] and its slopes, in micro-batches where settings say so."""
    inner, train, points = settings.inner, settings.train, signals.shape[1]
    pruned = inner.context == "gradient" and inner.selection_ratio < 1
    steps = context if isinstance(context, int) else context.shape[-2]

    def loss_of(
        trainable: Trainable, nudges: Readings, signals: jax.Array, context: Array | int, key: jax.Array
    ) -> tuple[jax.Array, Readings]:
        alpha = step_size(trainable, inner)
        if inner.learned_step_size == "per_latent":  # the same at every place of a latent grid
            alpha = jnp.tile(alpha, field.model.places)
        return loss_and_readings(
            field, trainable.field, coords, signals, context, step_size=alpha, first_order=inner.first_order,
            remat=inner.remat, channel_loss=train.channel_loss, points_per_chunk=train.points_per_chunk,
            pruned_to=context_size(points, inner.selection_ratio) if pruned else 0,
            of_latents=functools.partial(regularised, train=train, key=key, labels=labels), nudges=nudges,
        )  # fmt: skip

    def of_part(signals: jax.Array, context: Array | int, key: jax.Array):
        nudges = no_nudges(field, steps=steps + 1, batch=len(signals), dtype=signals.dtype)
        return jax.value_and_grad(loss_of, argnums=(0, 1), has_aux=True)(trainable, nudges, signals, context, key)

    if train.micro_batch in (0, train.batch_size):
        (loss, readings), (slopes, back) = of_part(signals, context, key)
    else:
        # Signal i goes to micro-batch i % count: each then lies on all devices that the batch is split over.
        count = train.batch_size // train.micro_batch
        parts = signals.reshape(-1, count, *signals.shape[1:])
        contexts = None
        if not isinstance(context, int) and context.ndim == 3:
            contexts = context.reshape(-1, count, *context.shape[1:])

        def add(so_far, i):
            some = context if contexts is None else contexts[:, i]
            (loss, readings), (slopes, back) = of_part(parts[:, i], some, jax.random.fold_in(key, i))
            total = jax.tree.map(lambda a, b: a + b / count, so_far, (loss, slopes))
            return total, (readings, jax.tree.map(lambda slope: slope / count, back))

        nothing = jnp.zeros((), signals.dtype), jax.tree.map(jnp.zeros_like, trainable)
        (loss, slopes), (readings, back) = jax.lax.scan(add, nothing, jnp.arange(count))
    readers = slopes_of_readers(field, trainable.field, readings, back)
    return loss, slopes._replace(field=jax.tree.map(jnp.add, slopes.field, readers))


Update = Callable[..., tuple[MetaState, dict[str, jax.Array]]]


def make_update(field: Field, settings: Settings, coords: jax.Array, mesh: Mesh | None = None) -> Update:
    """The pure function `update(state, signals, key, labels=None) -> (state, metrics)`.

    The caller jits it, donating the state. `signals` is [B, N, D] in [0, 1] and `key` the key of the run:
    `state.step` is folded into it, so that a resumed run draws the same contexts. Metrics are scalars: `loss`
    (at phi_G), `gradient_norm` (before clipping), `learning_rate`. `labels` [B] are for the contrastive loss.

    Signals that lie split over a `mesh` of several devices give one gradient a device, and these one sum. Left to
    itself, the compiler sums parameters' gradients in every inner step of every micro-batch. Where the mesh has a
    "model" axis, the state comes and goes in its `layout`.
    """
    inner, train = settings.inner, settings.train
    gradient = functools.partial(_loss_and_slopes, field, settings)

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
        context: Array | int = inner.steps
        if inner.selection_ratio < 1 and inner.context == "random":
            context = random_context(
                key,
                points=signals.shape[1],
                selection_ratio=inner.selection_ratio,
                steps=inner.steps,
                signals=None if inner.shared_context else signals.shape[0],
            )
        own_key = jax.random.fold_in(key, 2)
        # What a signal's loss owes to others of the batch, or to a draw for all of it, is for the compiler to split.
        if mesh is None or mesh.size == 1:
            loss, slopes = gradient(state.trainable, points, signals, context, own_key, labels)
        elif labels is not None or train.latent_noise:
            whole = sharding.constrain(mesh, state.trainable, jax.tree.map(lambda _: sharding.WHOLE, state.trainable))
            loss, slopes = gradient(whole, points, signals, context, own_key, labels)
        else:
            per_signal = not isinstance(context, int) and context.ndim == 3
            given = None if isinstance(context, int) else context
            one, many = sharding.WHOLE, sharding.SIGNALS
            specs = layout(field, state.trainable, mesh)

            def on_one_device(trainable, points, signals, given, key):
                whole = sharding.gather(trainable, specs)
                own = gradient(whole, points, signals, context if given is None else given, key)
                return sharding.mean_over_devices(own, (one, specs))

            loss, slopes = jax.shard_map(
                on_one_device, mesh=mesh, in_specs=(specs, one, many, many if per_signal else one, one),
                out_specs=(one, specs), check_vma=False,
            )(state.trainable, points, signals, given, own_key)  # fmt: skip
        state, metrics = descend(state, loss, slopes, train)
        return state if mesh is None else sharding.constrain(mesh, state, layout(field, state, mesh)), metrics

    return update


def descend(
    state: MetaState, loss: jax.Array, slopes: Trainable, train: TrainSettings
) -> tuple[MetaState, dict[str, jax.Array]]:
    """One step of the optimizer; metrics as in `make_update`."""
    changes, optimizer_state = make_optimizer(train).update(slopes, state.optimizer, state.trainable)
    metrics = {
        "loss": loss,
        "gradient_norm": optax.tree.norm(slopes),
        "learning_rate": jnp.asarray(learning_rate_schedule(train, train.learning_rate)(state.step)),
    }
    return MetaState(state.step + 1, optax.apply_updates(state.trainable, changes), optimizer_state), metrics


def exported_params(field: Field, trainable: Trainable, inner: InnerSettings) -> Params:
    """The field with its latent rescaled so that `EXPORTED_STEP_SIZE` is the right step size.

    With phi_p = r_p psi_p and r_p = sqrt(alpha_p / a), SGD on psi with step a visits the same fields as SGD on phi
    with steps alpha_p, because d/dpsi_p = r_p d/dphi_p. The latent enters linearly, so scaling row p of every
    modulation kernel by r_p is the whole change.

    A field of patches was trained on single ones, each with a loss of its own. Of a whole signal the loss is the mean
    over patches, whose slope is that many times smaller, and the step size so many times larger.
    """
    alpha = jnp.asarray(step_size(trainable, inner))
    if field.model.latent_interpolation == "patches":
        alpha = alpha * field.model.places
    ratio = jnp.sqrt(alpha / EXPORTED_STEP_SIZE)
    scaled = {}
    for name in field.latent_layers():
        layer = trainable.field[name]
        scaled[name] = {**layer, "kernel": (ratio[..., None] * layer["kernel"]).astype(layer["kernel"].dtype)}
    if field.model.codebook:  # in the scale of the latent, which is one for all entries
        scaled["codebook"] = jax.tree.map(lambda leaf: (leaf / ratio).astype(leaf.dtype), trainable.field["codebook"])
    return {**trainable.field, **scaled}
