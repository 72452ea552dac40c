"""The original units of a signal that is scaled to [0, 1], kept with the signal and with its latent."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self

import numpy as np


@dataclass(frozen=True)
class Units:
    """The scaling of one signal; the defaults are those of a signal that was in [0, 1] from the start.

    Attributes:
      offset, scale: one a channel, or one for all channels: value = offset + scale * signal.
      unit: of the values, such as "HU" or "mV"; "" for stored numbers without one.
      dtype: of the samples as the file stores them, a name of numpy; "" where that is not known or the file is text.
      slope, intercept: of the file: value = slope * stored sample + intercept.
      clipped: the part of the file's values that lay outside the range which became [0, 1], in [0, 1].
      shared: who else has this scale: "" nobody, "channels" all channels of the signal, "signals" all signals.
      time: of a series, (first, step): the sample k of the grid is at first + step * k; () where it has no times.
      columns: of a series: the name of the column of times where there are times, then one name a channel; () where
        the file names none.
      missing: the channels that were not recorded; what stands in the signal for them is no measurement.
    """

    offset: tuple[float, ...] = (0.0,)
    scale: tuple[float, ...] = (1.0,)
    unit: str = ""
    dtype: str = ""
    slope: float = 1.0
    intercept: float = 0.0
    clipped: float = 0.0
    shared: Literal["", "channels", "signals"] = "signals"
    time: tuple[float, ...] = ()
    columns: tuple[str, ...] = ()
    missing: tuple[int, ...] = ()

    def values(self, signal: np.ndarray) -> np.ndarray:
        """A signal [..., D] in [0, 1] in its own units, float64; NaN where a channel was not recorded."""
        values: np.ndarray = np.asarray(self.offset) + np.asarray(self.scale) * np.asarray(signal, np.float64)
        if self.missing:
            values[..., list(self.missing)] = np.nan
        return values

    def stored(self, signal: np.ndarray) -> np.ndarray:
        """A signal [..., D] in [0, 1] as the file would store it: whole numbers are rounded and cut at their range."""
        samples = (self.values(signal) - self.intercept) / self.slope
        kind = np.dtype(self.dtype or "float32")
        if kind.kind in "iu":
            limits = np.iinfo(kind)
            samples = np.clip(np.rint(samples), limits.min, limits.max)
        return samples.astype(kind)

    @property
    def notes(self) -> str:
        """A note for readers of the values: a shared scale, clipped values, missing channels; "" if there is none."""
        shared = {"": "", "channels": "one scale for all channels", "signals": "one scale for all signals"}[self.shared]
        clipped = f"{100 * self.clipped:.3g} % of the values were clipped" if self.clipped else ""
        missing = f"not recorded: {', '.join(map(self._channel, self.missing))}" if self.missing else ""
        return "; ".join(note for note in (shared, clipped, missing) if note)

    def _channel(self, number: int) -> str:
        names = self.columns[1:] if self.time else self.columns
        return names[number] if names else f"channel {number}"

    def to_json(self) -> str:
        """One line of JSON; entries with default values are left out."""
        default = asdict(Units())
        return json.dumps({name: value for name, value in asdict(self).items() if value != default[name]})

    @classmethod
    def from_json(cls, text: str) -> Self:
        """From the text of `to_json`; entries of later versions are left out."""
        known = {field.name for field in fields(cls)}
        entries: dict[str, Any] = json.loads(text or "{}")
        arguments: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in entries.items() if name in known
        }
        return cls(**arguments)


def units_between(
    low: np.ndarray | float,
    high: np.ndarray | float,
    *,
    values: np.ndarray | None = None,
    unit: str = "",
    shared: Literal["", "channels", "signals"] = "",
) -> Units:
    """The units of a signal whose values `low` and `high`, one a channel or one for all, became 0 and 1.

    Args:
      low, high: in the units of the file.
      values: the file's values [..., D], to count those outside the range; None counts nothing.
      unit, shared: see `Units`.
    """
    bottom, top = np.atleast_1d(np.asarray(low, np.float64)), np.atleast_1d(np.asarray(high, np.float64))
    clipped = 0.0 if values is None else float(np.mean((values < bottom) | (values > top)))
    return Units(
        tuple(bottom.tolist()), tuple((top - bottom).tolist()), unit=unit, clipped=clipped, shared=shared,
    )  # fmt: skip
