"""A learned codebook (van den Oord et al. 2017): each piece of a latent is decoded as the nearest codebook vector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from medfuncta_jax.field import Field, Params
from medfuncta_jax.meta_step import checked, exported_params, init, update
from medfuncta_jax.product import FULL
from medfuncta_jax.settings import Settings, SettingsError
from medfuncta_jax.siren import ModulatedSiren, Modulations, uniform

__all__ = ["CodebookField", "check", "exported_params", "init", "update"]


class CodebookSiren(ModulatedSiren):
    """A `ModulatedSiren` with an array `codebook/embedding` [vectors, entries]."""

    vectors: int
    entries: int

    def setup(self):
        super().setup()
        self.codebook = nn.Embed(self.vectors, self.entries, embedding_init=uniform(1 / self.vectors))

    def modulations(self, latents: jax.Array) -> Modulations:
        """Modulations by the nearest codebook vector of each piece.

        The gradient in a piece is that of its nearest vector (straight-through), so that inner steps move the piece.
        """
        vectors = self.codebook.embedding
        pieces = latents.reshape(len(latents), -1, self.entries)
        products = jnp.matmul(pieces, vectors.T, precision=FULL)
        distances = jnp.square(vectors).sum(-1) - 2 * products  # without |piece|^2, the same for all vectors
        nearest = self.codebook(jnp.argmin(distances, axis=-1)).reshape(latents.shape)
        return super().modulations(nearest + latents - jax.lax.stop_gradient(latents))


@dataclass(frozen=True)
class CodebookField(Field):
    """A `Field` that decodes its latent through a codebook, with straight-through gradients.

    Attributes:
      vectors: vectors in the codebook.
      entries: entries of a vector, a divisor of the latent's entries (of one place).
    """

    vectors: int
    entries: int

    def __post_init__(self):
        super().__post_init__()
        if self.model.latent_features % self.entries:
            raise SettingsError(
                f"baselines.codebook_entries must divide the latent's {self.model.latent_features} entries, got "
                f"{self.entries}"
            )

    @property
    def module(self) -> CodebookSiren:
        return CodebookSiren(self.model, self.coord_dims, self.channels, vectors=self.vectors, entries=self.entries)

    def rescaled(self, params: Params, ratio: jax.Array) -> Params:
        """As `Field.rescaled`, for one ratio: the codebook is in the scale of the latent."""
        codebook = jax.tree.map(lambda leaf: (leaf / ratio).astype(leaf.dtype), params["codebook"])
        return {**super().rescaled(params, ratio), "codebook": codebook}


def check(settings: Settings, shape: Sequence[int], channels: int, *, task: str | None = None) -> Field:
    """See `methods.Method`."""
    del task
    if settings.inner.learned_step_size == "per_latent":
        raise SettingsError("train.method=codebook needs inner.learned_step_size=none or scalar: one scale for all")
    own = settings.baselines
    field = CodebookField(
        settings.model, len(shape), channels, vectors=own.codebook_vectors, entries=own.codebook_entries
    )
    return checked(field, settings)
