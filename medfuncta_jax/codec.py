"""A latent as few bits: uniform quantisation of its entries, and entropy coding of the result (COIN++, Dupont 2022).

Each entry is standardised by mean and deviation of the training latents and rounded to the middle of one of 2^bits bins
over plus and minus `spread`; a range coder (package `constriction`, the extra `compress`) then takes -log2(p) bits for
a bin of frequency p among the training latents. Codec and field are shared by all signals.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np


@dataclass(frozen=True)
class LatentCodec:
    """The codec that sender and receiver share; made by `fit_codec`.

    Attributes:
      mean, scale: mean and standard deviation of every entry, float64 [P].
      spread: the bins span mean - spread scale to mean + spread scale.
      probabilities: float64 [2^bits], one a bin, above 0 and summing to 1.
    """

    mean: np.ndarray
    scale: np.ndarray
    spread: float
    probabilities: np.ndarray

    def quantise(self, latents: np.ndarray) -> np.ndarray:
        """Bins, int32 [..., P] from 0; the outermost bins take all entries beyond them."""
        count = len(self.probabilities)
        places = ((np.asarray(latents, np.float64) - self.mean) / self.scale + self.spread) * count / (2 * self.spread)
        return np.clip(np.floor(places), 0, count - 1).astype(np.int32)

    def dequantise(self, bins: np.ndarray) -> np.ndarray:
        """The middles of bins [..., P], float32."""
        step = 2 * self.spread / len(self.probabilities)
        return (self.mean + self.scale * ((bins + 0.5) * step - self.spread)).astype(np.float32)

    def encode(self, latent: np.ndarray) -> bytes:
        """One latent [P] as bytes, a multiple of four."""
        import constriction

        encoder = constriction.stream.queue.RangeEncoder()
        encoder.encode(self.quantise(latent), self._model)
        return encoder.get_compressed().astype("<u4").tobytes()

    def decode(self, code: bytes) -> np.ndarray:
        """The decoded latent [P], float32: `dequantise(quantise(latent))`.

        Raises:
          ValueError: not a multiple of four bytes.
        """
        import constriction

        decoder = constriction.stream.queue.RangeDecoder(np.frombuffer(code, "<u4").astype(np.uint32))
        return self.dequantise(decoder.decode(self._model, len(self.mean)))

    @cached_property
    def _model(self) -> Any:
        import constriction

        return constriction.stream.model.Categorical(self.probabilities, perfect=False)


def fit_codec(latents: np.ndarray, *, bits: int, spread: float = 3.0) -> LatentCodec:
    """Fit a codec to training latents.

    Args:
      latents: [n, P] of training signals, n >= 2.
      bits: size of a bin's number before entropy coding, 1 to 16.
      spread: half the range of the bins in deviations, > 0.
    Raises:
      ValueError: too few latents, or an argument out of range.
    """
    if latents.ndim != 2 or len(latents) < 2:
        raise ValueError(f"a codec needs latents [n, P] of at least 2 signals, got {latents.shape}")
    if not 1 <= bits <= 16 or spread <= 0:
        raise ValueError(f"bits must be 1 to 16 and spread above 0, got {bits} and {spread}")
    mean, scale = np.mean(latents, 0, dtype=np.float64), np.std(latents, 0, dtype=np.float64)
    scale = np.where(scale > 0, scale, 1.0)
    uniform = LatentCodec(np.asarray(mean), scale, spread, np.full(2**bits, 2.0**-bits))
    # Every count starts at one, so that every bin can be coded.
    counts = 1 + np.bincount(uniform.quantise(latents).ravel(), minlength=2**bits)
    return replace(uniform, probabilities=counts / counts.sum())
