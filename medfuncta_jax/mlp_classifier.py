"""The paper's classifier on latents (MedFuncta, MIDL 2026, table 3): an MLP, P -> 1024 -> 512 -> classes.

ReLU and dropout after the hidden layers, softmax for one class a signal, sigmoids for several labels, AdamW; the epoch
with the best validation accuracy is kept.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from medfuncta_jax.arrays import Array, as_array
from medfuncta_jax.product import FULL
from medfuncta_jax.settings import MlpSettings


class Mlp(nn.Module):
    """Features [n, P] to logits [n, outputs]."""

    hidden: tuple[int, ...]
    outputs: int
    dropout: float = 0.0

    @nn.compact
    def __call__(self, features: Any, *, training: bool = False) -> jax.Array:
        for width in self.hidden:
            features = nn.relu(nn.Dense(width, precision=FULL)(features))
            features = nn.Dropout(self.dropout, deterministic=not training)(features)
        return nn.Dense(self.outputs, precision=FULL)(features)


class MlpFit(NamedTuple):
    """A trained MLP.

    Attributes:
      module: the network; `module.apply({"params": params}, ...)` gives logits.
      params: parameters of the best epoch.
      shift, scale: [P]; the network sees (features - shift) / scale.
      multi_label: whether outputs are one sigmoid a label instead of a softmax over classes.
      epoch: the best epoch, counted from 1; the first of equal ones.
      val_accuracy: [epochs], in [0, 1]; the mean over labels at 0.5 where there are several.
    """

    module: Mlp
    params: Any
    shift: np.ndarray
    scale: np.ndarray
    multi_label: bool
    epoch: int
    val_accuracy: np.ndarray

    def probabilities(self, features: Array) -> np.ndarray:
        """float32 [n, classes] of features [n, P]: rows sum to 1, or one probability a label."""
        logits = outputs_of(self.module, self.params, normalised(features, self.shift, self.scale))
        return np.asarray(jax.nn.sigmoid(logits) if self.multi_label else jax.nn.softmax(logits))


def fit_mlp(
    features: Array,
    labels: Array,
    val_features: Array,
    val_labels: Array,
    *,
    classes: int,
    key: jax.Array,
    normalise: Literal["none", "scale", "standardise"] = "standardise",
    settings: MlpSettings = MlpSettings(),  # noqa: B008  (frozen)
    after_epoch: Callable[[float], None] = lambda val_accuracy: None,
) -> MlpFit:
    """Train the MLP; the same arguments give the same network.

    Args:
      features, val_features: floating, [n, P] and [m, P], of any scale and framework.
      labels, val_labels: int [n] and [m] in [0, classes), or 0 and 1, [n, classes], for several labels a signal.
      classes: number of classes or labels.
      key: PRNG key for the initialisation, the order of the signals and dropout.
      normalise: "none", "scale" (all features divided by one number, their standard deviation) or "standardise" (each
        feature minus its mean, divided by its own deviation). Unscaled latents are small numbers, on which an MLP
        learns slowly.
      settings: settings of the MLP and its training. No signal is dropped: the last batch of an epoch is a smaller one.
      after_epoch: called with the validation accuracy of every epoch.
    Raises:
      ValueError: arrays that do not belong together.
    """
    features, val_features = (
        np.asarray(as_array(name, x)) for name, x in (("features", features), ("val_features", val_features))
    )
    labels, val_labels = (np.asarray(as_array(name, y)) for name, y in (("labels", labels), ("val_labels", val_labels)))
    multi_label = labels.ndim == 2
    for x, y in ((features, labels), (val_features, val_labels)):
        if x.ndim != 2 or x.shape[1:] != features.shape[1:] or len(x) != len(y) or len(x) == 0:
            raise ValueError(f"features {x.shape} and labels {y.shape} do not belong together")
        if y.ndim != labels.ndim or (multi_label and y.shape[1] != classes):
            raise ValueError(f"labels {y.shape} are neither [n] nor [n, {classes}]")
        if y.min() < 0 or y.max() >= (2 if multi_label else classes):
            raise ValueError(f"a label lies outside the {classes} classes")
    shift, scale = normalisation(features, normalise)
    inputs, val_inputs = normalised(features, shift, scale), normalised(val_features, shift, scale)
    targets = jnp.asarray(labels if multi_label else np.eye(classes)[labels], jnp.float32)

    module = Mlp(settings.hidden, classes, settings.dropout)
    start, order = jax.random.split(key)
    params = module.init(start, inputs[:1])["params"]
    moments = optimiser_of(settings).init(params)
    loss_of = optax.sigmoid_binary_cross_entropy if multi_label else optax.softmax_cross_entropy
    best, best_epoch, accuracies = params, 0, np.zeros(settings.epochs)
    for epoch in range(settings.epochs):
        params, moments = one_epoch(
            module, settings, loss_of, (params, moments), inputs, targets, jax.random.fold_in(order, epoch)
        )
        logits = np.asarray(outputs_of(module, params, val_inputs))
        predicted = logits > 0 if multi_label else logits.argmax(1)
        accuracies[epoch] = np.mean(predicted == val_labels)
        if epoch == 0 or accuracies[epoch] > accuracies[best_epoch]:
            best, best_epoch = params, epoch
        after_epoch(float(accuracies[epoch]))
    return MlpFit(module, jax.tree.map(np.asarray, best), shift, scale, multi_label, best_epoch + 1, accuracies)


def normalisation(features: Array, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Shift and scale, float64 [P], of a kind of normalisation; constant features are divided by 1."""
    features = np.asarray(features)
    shift, scale = np.zeros(features.shape[1]), np.ones(features.shape[1])
    if kind == "scale":
        scale *= features.std(dtype=np.float64)
    elif kind == "standardise":
        shift, scale = features.mean(0, dtype=np.float64), features.std(0, dtype=np.float64)
    return shift, np.where(scale > 0, scale, 1.0)


def normalised(features: Array, shift: np.ndarray, scale: np.ndarray) -> jax.Array:
    """Features [n, P] less `shift`, divided by `scale`, float32."""
    return jnp.asarray((np.asarray(features) - shift) / scale, jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def outputs_of(module: Mlp, params: Any, inputs: jax.Array) -> Any:
    """The network's outputs [n, outputs] for inputs [n, P], without dropout."""
    return module.apply({"params": params}, inputs)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def one_epoch(
    module: Mlp,
    settings: MlpSettings,
    loss_of: Callable[[jax.Array, jax.Array], jax.Array],
    state: tuple[Any, Any],
    inputs: jax.Array,
    targets: jax.Array,
    key: jax.Array,
) -> tuple[Any, Any]:
    """One pass over all signals in a new order: a scan over batches, the last of them padded with weight 0.

    Args:
      loss_of: outputs and targets to losses, with the signals in the first axis.
      state: parameters, and the moments of `optimiser_of`.
    """
    count, size = len(inputs), min(settings.batch_size, len(inputs))
    steps = math.ceil(count / size)
    order_key, dropout_key = jax.random.split(key)
    order = jnp.resize(jax.random.permutation(order_key, count), (steps, size))
    weights = (jnp.arange(steps * size) < count).astype(jnp.float32).reshape(steps, size)
    optimiser = optimiser_of(settings)

    def step(carry, batch):
        params, moments = carry
        number, rows, weight = batch

        def loss(params):
            rngs = {"dropout": jax.random.fold_in(dropout_key, number)}
            logits: Any = module.apply({"params": params}, inputs[rows], training=True, rngs=rngs)
            losses = loss_of(logits, targets[rows]).reshape(size, -1).mean(1)
            return (weight * losses).sum() / weight.sum()

        updates, moments = optimiser.update(jax.grad(loss)(params), moments, params)
        return (optax.apply_updates(params, updates), moments), None

    return jax.lax.scan(step, state, (jnp.arange(steps), order, weights))[0]


def optimiser_of(settings: MlpSettings) -> optax.GradientTransformation:
    """AdamW at one rate."""
    return optax.adamw(settings.learning_rate, weight_decay=settings.weight_decay)
