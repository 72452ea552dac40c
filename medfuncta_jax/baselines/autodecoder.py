"""Joint training of the network and a latent for each training signal, without an inner loop (DeepSDF, Park 2019).

Latents of signals that training has not seen are fitted like all others, with `fit_latent`.
"""

from __future__ import annotations

from collections.abc import Callable

import jax

from medfuncta_jax.field import Field
from medfuncta_jax.latent_loss import latent_loss, latent_noise
from medfuncta_jax.meta_step import MetaState, Trainable, descend
from medfuncta_jax.point_field import Targets, shares
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
            shown = trainable.latents[rows]
            noise = latent_noise(train, jax.random.fold_in(key, state.step), shown.shape, shown.dtype)
            latents, cost = latent_loss(train, noise, None, shown)
            point_params, readers = field.split(trainable.field)
            features = field.points.features(point_params, coords[None])
            targets = Targets(signals, shares(None, len(coords), signals, train.channel_loss))
            losses = field.points.losses(point_params, field.modulations(readers, latents), features, targets)
            return losses.mean() + cost

        return descend(state, *jax.value_and_grad(loss_of)(state.trainable), train)

    return update
