"""The methods of training by the names of `train.method`: MedFuncta's, and the systems that it is compared with. A
method is a module with the functions of `Method`. All methods share one type of state, so one loop trains them. Adding
one takes a module in `baselines`, a line here, and its name in `settings.Method`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import jax

from medfuncta_jax import meta_step, settings
from medfuncta_jax.baselines import autodecoder, codebook, contrastive, gradient_contexts, patches, pyramid
from medfuncta_jax.field import Field, Params
from medfuncta_jax.meta_step import Training
from medfuncta_jax.settings import InnerSettings, Settings
from medfuncta_jax.training_state import MetaState, Trainable


class Method(Protocol):
    """The functions that the training loop needs of a method."""

    def check(self, settings: Settings, shape: Sequence[int], channels: int, *, task: str | None = None) -> Field:
        """The field of these settings for signals [*shape, channels], with labels of the kind `task` if that is known.

        Raises:
          SettingsError: the signals have other dimensions than the latent's grid, or settings do not go together.
        """

    def init(self, field: Field, settings: Settings, key: jax.Array, *, signals: int, dtype: Any = ...) -> MetaState:
        """The state before the first update, for `signals` training signals."""

    def update(
        self, training: Training, state: MetaState, signals: jax.Array, key: jax.Array, rows: jax.Array
    ) -> tuple[MetaState, dict[str, jax.Array]]:
        """One update on signals [B, N, D] in [0, 1], to be jitted with the state donated.

        The state is in the `sharding.layout` of `training.mesh`, before and after. `key` is the key of the run, and
        `rows` [B] are the numbers of the signals in the training split. Metrics are scalars: `loss`, `gradient_norm`
        (before clipping), `learning_rate`.
        """

    def exported_params(
        self, field: Field, trainable: Trainable, inner: InnerSettings, coords: jax.Array | None = None
    ) -> Params:
        """The field with its latent rescaled so that a default step of `fit_latent` is `inner.fit_ratio` of a step in
        training.

        `coords` [N, C] are the grid of the training signals; Gauss-Newton steps need them.
        """


METHODS: dict[settings.Method, Method] = {
    "meta": meta_step,
    "autodecoder": autodecoder,
    "codebook": codebook,
    "contrastive": contrastive,
    "gradient_contexts": gradient_contexts,
    "patches": patches,
    "pyramid": pyramid,
}

# The field classes of all methods, by their name in a saved field.
FIELDS = {kind.__name__: kind for kind in (Field, codebook.CodebookField, patches.PatchField, pyramid.PyramidField)}
