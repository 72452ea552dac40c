"""New latents: a rectified flow (Liu et al. 2023) on standardised latents, with class conditioning.

A residual MLP v learns the velocity of straight lines from noise to latents,

    x_t = (1 - t) x_0 + t x_1,   x_0 ~ N(0, 1),   min E |v(x_t, t, class) - (x_1 - x_0)|^2

and new latents are noise integrated along v from t = 0 to 1 (Heun's method), with an exponential moving average of the
weights. Every update depends on its number and the key alone, so that training can stop and resume.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from medfuncta_jax.arrays import Array, as_array
from medfuncta_jax.mlp_classifier import normalisation, normalised

_FREQUENCIES = 8
_UPDATES_AT_ONCE = 100


class Velocity(nn.Module):
    """v: points [n, P], times [n] in [0, 1] and classes int [n] to velocities [n, P].

    Attributes:
      features: P.
      classes: number of classes, each with a learned vector; 1 where there are none.
      width, blocks: size of the residual MLP.
    """

    features: int
    classes: int
    width: int
    blocks: int

    @nn.compact
    def __call__(self, points: jax.Array, times: jax.Array, labels: jax.Array) -> jax.Array:
        rates = jnp.asarray(np.pi / 4 * 2.0 ** np.arange(_FREQUENCIES), times.dtype)
        angles = rates * times[:, None]
        said = nn.Dense(self.width)(jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1))
        said = nn.silu(said + nn.Embed(self.classes, self.width)(labels))
        hidden = nn.Dense(self.width)(points)
        for _ in range(self.blocks):
            inner = nn.Dense(self.width)(nn.silu(nn.LayerNorm()(hidden))) + nn.Dense(self.width)(said)
            # Every block starts as the identity.
            hidden = hidden + nn.Dense(self.width, kernel_init=nn.initializers.zeros)(nn.silu(inner))
        return nn.Dense(self.features, kernel_init=nn.initializers.zeros)(nn.LayerNorm()(hidden))


@dataclass(frozen=True)
class FlowTraining:
    """Settings of the network and its training; hashable.

    Attributes:
      width, blocks: size of `Velocity`.
      steps: updates in all.
      batch_size: latents an update, drawn with replacement.
      learning_rate: peak rate of Adam, with a short warm-up and a cosine to 0.
      decay: decay of the moving average of the weights, in [0, 1).
    """

    width: int = 512
    blocks: int = 3
    steps: int = 4000
    batch_size: int = 128
    learning_rate: float = 1e-3
    decay: float = 0.999

    @property
    def optimiser(self) -> optax.GradientTransformation:
        """Adam with clipped gradients, because those of a few batches are large."""
        warmup = min(100, self.steps // 10)
        rate = optax.warmup_cosine_decay_schedule(0.0, self.learning_rate, warmup, max(self.steps, warmup + 1))
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))


class FlowState(NamedTuple):
    """Training state: parameters, their moving average, Adam's moments, updates done, mean loss of the last updates."""

    params: Any
    average: Any
    moments: Any
    step: Any
    loss: Any


class Flow(NamedTuple):
    """A trained flow.

    Attributes:
      module: the network, which sees (latents - shift) / scale.
      params: the moving average.
      shift, scale: [P].
      loss: mean of the last updates; about 1 where nothing is learned.
    """

    module: Velocity
    params: Any
    shift: np.ndarray
    scale: np.ndarray
    loss: float

    def latents(self, noise: Array, labels: Array | None = None, *, steps: int = 50) -> np.ndarray:
        """Latents, float32 [n, P], of standard normal noise [n, P] and classes int [n], in `steps` steps."""
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        noise = as_array("noise", noise)
        if noise.ndim != 2 or noise.shape[1] != self.module.features:
            raise ValueError(f"noise {noise.shape} must be [n, {self.module.features}]")
        labels = _labels(labels, count=len(noise), classes=self.module.classes)
        carried = _carried(self.module, steps, self.params, jnp.asarray(noise, jnp.float32), labels)
        return (np.asarray(carried, np.float64) * self.scale + self.shift).astype(np.float32)


def fit_flow(
    latents: Array,
    labels: Array | None = None,
    *,
    classes: int = 1,
    key: jax.Array,
    training: FlowTraining = FlowTraining(),
    start: FlowState | None = None,
    after: Callable[[FlowState], None] = lambda state: None,
) -> Flow:
    """Train a flow; the same arguments give the same flow, with or without a stop on the way.

    Args:
      latents: floating [n, P].
      labels: int [n] in [0, classes), or None for one class.
      classes: number of classes.
      key: PRNG key for the initialisation and all draws.
      start: a state that was passed to `after`; training resumes from it.
      after: called every hundred updates and at the end.
    Raises:
      ValueError: arrays that do not belong together or hold values that are not finite.
    """
    latents = np.asarray(as_array("latents", latents))
    if latents.ndim != 2 or not latents.size or not np.isfinite(latents).all():
        raise ValueError(f"latents {latents.shape} must be finite, [n, P] with n at least 1")
    given = _labels(labels, count=len(latents), classes=classes)
    shift, scale = normalisation(latents, "standardise")
    inputs = normalised(latents, shift, scale)
    module = Velocity(latents.shape[1], classes, training.width, training.blocks)
    state = start if start is not None else first_state(module, training, key)
    while state.step < training.steps:
        count = min(_UPDATES_AT_ONCE, training.steps - int(state.step))
        state = _updates(module, training, count, state, inputs, given, key)
        after(state)
    return Flow(module, jax.tree.map(np.asarray, state.average), shift, scale, float(state.loss))


def first_state(module: Velocity, training: FlowTraining, key: jax.Array) -> FlowState:
    """The state before the first update."""
    some = jnp.zeros((1, module.features), jnp.float32)
    params = module.init(key, some, some[:, 0], jnp.zeros(1, jnp.int32))["params"]
    return FlowState(
        params, params, training.optimiser.init(params), jnp.zeros((), jnp.int32), jnp.ones((), jnp.float32)
    )


def _labels(labels: Array | None, *, count: int, classes: int) -> jax.Array:
    if labels is None:
        return jnp.zeros(count, jnp.int32)
    array = np.asarray(as_array("labels", labels))
    if array.shape != (count,) or array.dtype.kind not in "iu" or array.min() < 0 or array.max() >= classes:
        raise ValueError(f"labels {array.shape} must be [{count}], whole numbers from 0 to {classes - 1}")
    return jnp.asarray(array, jnp.int32)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _updates(
    module: Velocity, training: FlowTraining, count: int, state: FlowState, inputs: jax.Array, labels: jax.Array,
    key: jax.Array,
) -> FlowState:  # fmt: skip
    optimiser = training.optimiser

    def update(state: FlowState, _: Any) -> tuple[FlowState, jax.Array]:
        keys = jax.random.split(jax.random.fold_in(key, state.step), 3)
        rows = jax.random.randint(keys[0], (training.batch_size,), 0, len(inputs))
        ends = inputs[rows]
        noise = jax.random.normal(keys[1], ends.shape, ends.dtype)
        times = jax.random.uniform(keys[2], (training.batch_size,), ends.dtype)

        def loss(params: Any) -> jax.Array:
            between = noise + times[:, None] * (ends - noise)
            found: Any = module.apply({"params": params}, between, times, labels[rows])
            return jnp.square(found - (ends - noise)).mean()

        value, gradient = jax.value_and_grad(loss)(state.params)
        updates, moments = optimiser.update(gradient, state.moments, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        # The first averages are over all updates so far, so that the initial weights lose their influence quickly.
        done = state.step.astype(jnp.float32)
        decay = jnp.minimum(training.decay, (1 + done) / (10 + done))
        average = optax.incremental_update(params, state.average, 1 - decay)
        return FlowState(params, average, moments, state.step + 1, state.loss), value

    state, losses = jax.lax.scan(update, state, length=count)
    return state._replace(loss=losses.mean())


@functools.partial(jax.jit, static_argnums=(0, 1))
def _carried(module: Velocity, steps: int, params: Any, noise: jax.Array, labels: jax.Array) -> jax.Array:
    def velocity(points: jax.Array, time: jax.Array) -> Any:
        return module.apply({"params": params}, points, jnp.full(len(points), time), labels)

    def step(points: jax.Array, k: jax.Array) -> tuple[jax.Array, None]:
        time = k / steps
        first = velocity(points, time)
        second = velocity(points + first / steps, time + 1 / steps)
        return points + (first + second) / (2 * steps), None

    return jax.lax.scan(step, noise, jnp.arange(steps, dtype=noise.dtype))[0]
