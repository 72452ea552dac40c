"""Joint training of the network and a latent for each training signal, without an inner loop (DeepSDF, Park 2019).

Latents of signals that training has not seen are fitted like all others, with `fit_latent`.
"""

from __future__ import annotations

from collections.abc import Callable

import jax

from medfuncta_jax.field import Field
from medfuncta_jax.loss import regularised, signal_losses
from medfuncta_jax.meta_step import MetaState, Trainable, descend
from medfuncta_jax.settings import Settings


def make_update(
    field: Field, settings: Settings, coords: jax.Array
) -> Callable[[MetaState, jax.Array, jax.Array, jax.Array], tuple[MetaState, dict[str, jax.Array]]]:
    """The pure function `update(state, signals, key, rows) -> (state, metrics)`; see `meta_step.make_update`.

    `rows` [B] are the signals' numbers in the training split. The optimizer goes on moving a latent by its momentum in
    updates that do not show its signal, as it does in DeepSDF.
    """
    train = settings.train

    def update(
        state: MetaState, signals: jax.Array, key: jax.Array, rows: jax.Array
    ) -> tuple[MetaState, dict[str, jax.Array]]:
        def loss_of(trainable: Trainable) -> jax.Array:
            assert trainable.latents is not None
            latents, penalty = regularised(
                trainable.latents[rows], train=train, key=jax.random.fold_in(key, state.step)
            )
            features = field.point_features(trainable.field, coords)
            losses = signal_losses(
                field, trainable.field, latents, features, signals, channel_loss=train.channel_loss
            )  # fmt: skip
            return losses.mean() + penalty

        return descend(state, *jax.value_and_grad(loss_of)(state.trainable), train)

    return update
