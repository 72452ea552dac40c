"""A small U-Net (Ronneberger et al. 2015) for images and volumes on the grid of a field: what segmentation on fields is
measured by.

It sees a signal with 0 where it was not observed, and a channel that says where it was. Every update draws for each
signal a part of its points, of those that are asked for, so that sparse signals are none that it has not met.
"""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from medfuncta_jax.segmentation import dice, segmentation_loss

_VALIDATIONS = 10
_TIMED = 3


@dataclass(frozen=True)
class UNetTraining:
    """Settings of the network and its training; hashable.

    Attributes:
      widths: channels of each level; each but the first has half the points of the one before along every axis.
      batch_size: signals an update.
      learning_rate: peak rate of AdamW, with a cosine to 0.
      observed: parts of the points that updates see, each as often.
    """

    widths: tuple[int, ...] = (8, 16, 32)
    batch_size: int = 1
    learning_rate: float = 1e-2
    observed: tuple[float, ...] = (1.0,)

    @property
    def optimiser(self) -> optax.GradientTransformation:
        """AdamW but for the rate, so that one program serves any number of steps."""
        return optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(1e-4))


class UNet(nn.Module):
    """Signals [B, *grid, D] to logits [B, *grid, classes]; a grid that does not halve evenly is padded with 0."""

    widths: tuple[int, ...]
    classes: int

    @nn.compact
    def __call__(self, signals: jax.Array) -> jax.Array:
        grid, multiple = signals.shape[1:-1], 2 ** (len(self.widths) - 1)
        padding = [(0, -n % multiple) for n in grid]
        x, skipped = jnp.pad(signals, [(0, 0), *padding, (0, 0)]), []
        for k, width in enumerate(self.widths):
            if k:
                skipped.append(x)
                x = nn.max_pool(x, (2,) * len(grid), (2,) * len(grid))
            x = _convolved(width, x)
        for width in self.widths[-2::-1]:
            for axis in range(1, x.ndim - 1):
                x = jnp.repeat(x, 2, axis)
            x = _convolved(width, jnp.concatenate([skipped.pop(), x], -1))
        return nn.Dense(self.classes)(x[(slice(None), *(slice(n) for n in grid))])


class _Convolution(nn.Module):
    """Convolution of three points along each axis, as products: XLA's own takes twice as long in 3D on a CPU."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        *grid, channels = x.shape[1:]
        others = len(grid) - 1
        init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", in_axis=(*range(others + 1),))
        kernel = self.param("kernel", init, (*(3,) * others, 3 * channels, self.width), jnp.float32)
        x = jnp.pad(x, [(0, 0), *((1, 1) for _ in grid), (0, 0)])
        x = jnp.concatenate([x[..., k : k + grid[-1], :] for k in range(3)], -1)
        y = self.param("bias", nn.initializers.zeros, (self.width,), jnp.float32)
        for at in itertools.product(range(3), repeat=others):
            shifted = tuple(slice(k, k + n) for k, n in zip(at, grid, strict=False))
            y = y + x[(slice(None), *shifted)] @ kernel[at]
        return y


def _convolved(width: int, x: jax.Array) -> jax.Array:
    for _ in range(2):
        x = nn.relu(nn.GroupNorm(num_groups=math.gcd(width, 4))(_Convolution(width)(x)))
    return x


class UNetFit(NamedTuple):
    """A trained U-Net.

    Attributes:
      module, params: the network; the parameters are those of the best validation.
      step, steps: updates until that validation, and in all.
      val_dice: mean Dice of whole validation signals there; NaN where they show no structure.
    """

    module: UNet
    params: Any
    step: int
    steps: int
    val_dice: float

    def labels(self, signals: np.ndarray, observed: np.ndarray) -> np.ndarray:
        """Classes, uint8 [n, *grid], of signals [n, *grid, D] that were observed where `observed` [n or 1, *grid]."""
        seen = np.broadcast_to(observed, signals.shape[:-1])
        return np.concatenate([
            np.asarray(_classes(self.module, self.params, jnp.asarray(signal[None]), jnp.asarray(where[None])))
            for signal, where in zip(signals, seen, strict=True)
        ])  # fmt: skip


def fit_unet(
    signals: np.ndarray,
    masks: np.ndarray,
    val_signals: np.ndarray,
    val_masks: np.ndarray,
    *,
    classes: int,
    key: jax.Array,
    training: UNetTraining,
    steps: int = 0,
    seconds: float = 0.0,
    after: Callable[[int, int, float], None] = lambda step, steps, loss: None,
) -> UNetFit:
    """Train a U-Net.

    Args:
      signals, val_signals: [n, *grid, D] in [0, 1].
      masks, val_masks: whole numbers [n, *grid] in [0, classes).
      steps: updates; 0 takes as many as last `seconds`, by the time of the first few.
      after: called with the updates done, those in all and their loss, ten times.
    """
    module = UNet(training.widths, classes)
    start, draws = jax.random.split(key)
    given = (jnp.asarray(signals, jnp.float32), jnp.asarray(masks, jnp.uint8))
    first = jax.jit(module.init)(start, jnp.zeros((1, *signals.shape[1:-1], signals.shape[-1] + 1)))["params"]
    if not steps:
        state: Any = (first, training.optimiser.init(first), 0.0)
        for count in (1, _TIMED):  # the first one compiles
            began = time.monotonic()
            for _ in range(count):
                jax.block_until_ready(_update(module, training, state, given, draws, 0))
            each = (time.monotonic() - began) / count
        steps = max(1, round(seconds / each))
    params, moments, step = first, training.optimiser.init(first), 0
    best, part = None, math.ceil(steps / _VALIDATIONS)
    while step < steps:
        losses = []
        for _ in range(min(part, steps - step)):
            params, moments, loss = _update(module, training, (params, moments, step / steps), given, draws, step)
            losses.append(loss)
            step += 1
        after(step, steps, float(np.mean(losses)))
        state = UNetFit(module, params, step, steps, math.nan)
        overlap = dice(state.labels(val_signals, np.ones((1, *val_masks.shape[1:]))), val_masks, classes=classes)
        quality = float(np.nanmean(overlap)) if not np.isnan(overlap).all() else math.nan
        if best is None or not quality <= best.val_dice:
            best = state._replace(val_dice=quality)
    assert best is not None
    return best


def _seen(signals: jax.Array, observed: jax.Array) -> jax.Array:
    """What the network is given, [B, *grid, D + 1]."""
    where = observed[..., None].astype(signals.dtype)
    return jnp.concatenate([signals * where, where], -1)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _update(
    module: UNet, training: UNetTraining, state: tuple[Any, Any, Any], given: tuple[jax.Array, jax.Array],
    key: jax.Array, step: Any,
) -> tuple[Any, Any, jax.Array]:  # fmt: skip
    """One update, number `step`, of parameters and moments; the third of `state` is the part of the training before."""
    params, moments, done = state
    signals, masks = given
    keys = jax.random.split(jax.random.fold_in(key, step), 3)
    rows = jax.random.randint(keys[0], (training.batch_size,), 0, len(signals))
    parts = jax.random.choice(keys[1], jnp.asarray(training.observed), (training.batch_size,))
    chance = jax.random.uniform(keys[2], (training.batch_size, *masks.shape[1:]))
    seen = _seen(signals[rows], chance < parts.reshape(-1, *[1] * (masks.ndim - 1)))

    def loss_of(params: Any) -> jax.Array:
        return segmentation_loss(cast(jax.Array, module.apply({"params": params}, seen)), masks[rows])

    loss, gradient = jax.value_and_grad(loss_of)(params)
    changes, moments = training.optimiser.update(gradient, moments, params)
    rate = training.learning_rate * (1 + jnp.cos(jnp.pi * done)) / 2
    return jax.tree.map(lambda p, change: p - rate.astype(p.dtype) * change, params, changes), moments, loss


@functools.partial(jax.jit, static_argnums=0)
def _classes(module: UNet, params: Any, signals: jax.Array, observed: jax.Array) -> jax.Array:
    logits = cast(jax.Array, module.apply({"params": params}, _seen(signals, observed)))
    return logits.argmax(-1).astype(jnp.uint8)
