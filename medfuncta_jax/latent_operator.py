"""Operators between latents: from those of signals to those of what belongs to them, such as their masks.

Where a field of masks is trained beside that of signals, on masks of one channel a class, an MLP can take the latent of
a signal to that of its mask. Both are measured as their signals are (see `signal_metric`): it reads vectors whose
distances are those of signals, and its error is that of the masks it stands for, to first order.
"""

from __future__ import annotations

import functools
import math
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

_VALIDATIONS = 10


class LatentMlp(nn.Module):
    """A linear map, and a residual MLP beside it: vectors [n, P] to [n, features].

    Attributes:
      features: of the output.
      width, blocks: of the MLP.
      dropout: in its blocks.
    """

    features: int
    width: int
    blocks: int
    dropout: float

    @nn.compact
    def __call__(self, vectors: jax.Array, *, training: bool = False) -> jax.Array:
        hidden = nn.Dense(self.width)(vectors)
        for _ in range(self.blocks):
            inner = nn.silu(nn.Dense(self.width)(nn.LayerNorm()(hidden)))
            inner = nn.Dropout(self.dropout, deterministic=not training)(inner)
            hidden = hidden + nn.Dense(self.width, kernel_init=nn.initializers.zeros)(inner)
        return nn.Dense(self.features)(vectors) + nn.Dense(self.features)(nn.LayerNorm()(hidden))


@dataclass(frozen=True)
class OperatorTraining:
    """Settings of the operator and its training; hashable.

    Attributes:
      width, blocks, dropout: of `LatentMlp`.
      steps: updates in all.
      batch_size: latents an update, drawn with replacement.
      learning_rate: peak rate of AdamW, with a cosine to 0.
      weight_decay: AdamW's.
    """

    width: int = 256
    blocks: int = 2
    dropout: float = 0.3
    steps: int = 2000
    batch_size: int = 64
    learning_rate: float = 3e-4
    weight_decay: float = 0.1

    @property
    def optimiser(self) -> optax.GradientTransformation:
        """AdamW."""
        return optax.adamw(optax.cosine_decay_schedule(self.learning_rate, self.steps), weight_decay=self.weight_decay)


class Operator(NamedTuple):
    """A trained operator from latents to latents.

    Attributes:
      module, params: the network; the parameters are those of the best validation.
      metric: [P, P], by which latents are multiplied before they are standardised.
      given, made: shift and scale, [P] and [Q], of what the network reads and gives.
      step: of the best validation.
      val_error: there, the mean squared difference of signals in the metric of the outputs, to first order.
    """

    module: LatentMlp
    params: Any
    metric: np.ndarray
    given: tuple[np.ndarray, np.ndarray]
    made: tuple[np.ndarray, np.ndarray]
    step: int
    val_error: float

    def latents(self, latents: Array) -> np.ndarray:
        """Latents of the other field, float32 [n, Q], of latents [n, P]."""
        vectors = normalised(np.asarray(as_array("latents", latents)) @ self.metric, *self.given)
        found = np.asarray(_mapped(self.module, self.params, vectors), np.float64)
        return (found * self.made[1] + self.made[0]).astype(np.float32)


def fit_operator(
    latents: Array,
    targets: Array,
    val_latents: Array,
    val_targets: Array,
    *,
    metric: Array,
    target_metric: Array,
    key: jax.Array,
    training: OperatorTraining = OperatorTraining(),
    after: Callable[[int, float], None] = lambda step, loss: None,
) -> Operator:
    """Train an operator from latents of one field to those of another; the same arguments give the same one.

    Args:
      latents: [n, P], or [V, n, P] of several latents of each signal, of which each update draws one.
      targets: [n, Q], of the same signals.
      val_latents, val_targets: [m, P] and [m, Q], which choose among ten states of the training.
      metric, target_metric: [P, P] and [Q, Q], of `signal_metric`.
      key: of the initialisation and of all draws.
      after: called with the number of updates and their loss, ten times.
    Raises:
      ValueError: arrays that do not belong together.
    """
    latents, val_latents = (np.asarray(as_array("latents", some)) for some in (latents, val_latents))
    targets, val_targets = (np.asarray(as_array("targets", some)) for some in (targets, val_targets))
    metric, target_metric = np.asarray(metric), np.asarray(target_metric)
    latents = latents if latents.ndim == 3 else latents[None]
    for some, of in ((latents[0], targets), (val_latents, val_targets)):
        sizes = (*some.shape[1:], *of.shape[1:])
        if len(some) != len(of) or not len(of) or metric.shape != 2 * sizes[:1] or target_metric.shape != 2 * sizes[1:]:
            raise ValueError(
                f"latents {some.shape}, targets {of.shape} and metrics {metric.shape}, {target_metric.shape} do not "
                "belong together"
            )
    vectors = latents @ metric
    given = normalisation(vectors.reshape(-1, vectors.shape[-1]), "standardise")
    made = normalisation(targets, "standardise")
    # A difference of standardised outputs to one whose square is that of signals, in units of their variance.
    difference = made[1][:, None] * target_metric
    spread = np.square((targets - made[0]) @ target_metric).sum(-1).mean()
    weights = jnp.asarray(difference / math.sqrt(spread if spread > 0 else 1.0), jnp.float32)
    module = LatentMlp(targets.shape[1], training.width, training.blocks, training.dropout)
    known = (normalised(vectors, *given), normalised(targets, *made))
    val = (normalised(val_latents @ metric, *given), normalised(val_targets, *made))
    start, draws = jax.random.split(key)
    params = jax.jit(module.init)(start, val[0][:1])["params"]
    moments, step, best = training.optimiser.init(params), 0, None
    while step < training.steps:
        count = min(math.ceil(training.steps / _VALIDATIONS), training.steps - step)
        params, moments, loss, error = _operator_updates(
            module, training, count, (params, moments, step), (known, val, weights), draws
        )
        step += count
        after(step, float(loss))
        if best is None or not float(error) >= best.val_error:
            best = Operator(module, jax.tree.map(np.asarray, params), metric, given, made, step, float(error))
    assert best is not None
    return best._replace(val_error=best.val_error * float(spread))


@functools.partial(jax.jit, static_argnums=0)
def _mapped(module: LatentMlp, params: Any, vectors: jax.Array) -> Any:
    return module.apply({"params": params}, vectors)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _operator_updates(
    module: LatentMlp, training: OperatorTraining, count: int, state: tuple[Any, Any, Any], arrays: Any, key: jax.Array
) -> tuple[Any, Any, jax.Array, jax.Array]:
    """`count` updates: parameters, moments, the mean loss, and the error in validation afterwards."""
    params, moments, first = state
    (vectors, targets), (val_vectors, val_targets), weights = arrays
    kinds, signals, _ = vectors.shape

    def error(found: Any, wanted: jax.Array) -> jax.Array:
        return jnp.square((found - wanted) @ weights).sum(-1).mean()

    def update(carry: tuple[Any, Any], step: jax.Array) -> tuple[tuple[Any, Any], jax.Array]:
        params, moments = carry
        keys = jax.random.split(jax.random.fold_in(key, step), 3)
        rows = jax.random.randint(keys[0], (training.batch_size,), 0, signals)
        kind = jax.random.randint(keys[1], (training.batch_size,), 0, kinds)

        def loss_of(params: Any) -> jax.Array:
            found = module.apply({"params": params}, vectors[kind, rows], training=True, rngs={"dropout": keys[2]})
            return error(found, targets[rows])

        loss, gradient = jax.value_and_grad(loss_of)(params)
        changes, moments = training.optimiser.update(gradient, moments, params)
        return (optax.apply_updates(params, changes), moments), loss

    (params, moments), losses = jax.lax.scan(update, (params, moments), first + jnp.arange(count))
    return params, moments, losses.mean(), error(module.apply({"params": params}, val_vectors), val_targets)
