"""Sine layers without residual connections, whose widths change evenly from the first to the last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from medfuncta_jax.field import Field
from medfuncta_jax.meta_step import checked, exported_params, init, update
from medfuncta_jax.settings import Settings, SettingsError
from medfuncta_jax.siren import ModulatedSiren

__all__ = ["PyramidField", "check", "exported_params", "init", "update"]


class PyramidSiren(ModulatedSiren):
    """A `ModulatedSiren` whose sine layers have from `model.width` to `last_width` units."""

    last_width: int

    def units(self, k: int) -> int:
        model = self.model
        if k == model.layers:
            return self.channels
        return model.width + round((self.last_width - model.width) * (k - 1) / (model.layers - 2))


@dataclass(frozen=True)
class PyramidField(Field):
    """A `Field` with sine layers of various widths.

    Attributes:
      last_width: units of the last sine layer.
    """

    last_width: int

    def __post_init__(self):
        super().__post_init__()
        if self.model.residual:
            raise SettingsError("train.method=pyramid needs model.residual=False: its layers differ in width")

    @property
    def module(self) -> PyramidSiren:
        return PyramidSiren(self.model, self.coord_dims, self.channels, last_width=self.last_width)


def check(settings: Settings, shape: Sequence[int], channels: int, *, task: str | None = None) -> Field:
    """See `methods.Method`."""
    del task
    return checked(PyramidField(settings.model, len(shape), channels, settings.baselines.last_width), settings)
