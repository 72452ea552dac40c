"""The state of training: one pytree, saved in checkpoints."""

from __future__ import annotations

from typing import NamedTuple

import jax
import optax

from medfuncta_jax.field import Params


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
    """The state of training.

    Attributes:
      step: int32, updates made.
      trainable: see `Trainable`.
      optimizer: state of the optax optimizer.
    """

    step: jax.Array
    trainable: Trainable
    optimizer: optax.OptState
