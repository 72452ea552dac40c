"""Fitting many signals with a fixed field: padded batches over all devices, for validation and extraction.

While the devices fit a batch, the host reads the next one and takes over the one before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from medfuncta_jax import metrics, sharding
from medfuncta_jax.coordinates import grid
from medfuncta_jax.datasets import Split
from medfuncta_jax.field import Field, Params
from medfuncta_jax.fit import fit_latent, reconstruct
from medfuncta_jax.settings import FitSettings, Settings


@dataclass(frozen=True)
class FittedSignals:
    """latents [n, P] and their PSNR in dB, float32 [n], in the order asked for."""

    latents: np.ndarray
    psnr: np.ndarray


def fit_signals(
    field: Field,
    params: Params,
    split: Split,
    indices: np.ndarray,
    settings: Settings,
    mesh: Mesh,
    *,
    step_size: float | jax.Array,
    dtype: Literal["float32", "float16"] = "float32",
    weights: np.ndarray | None = None,
    after_batch: Callable[[int, float], None] = lambda count, psnr: None,
) -> FittedSignals:
    """Fit the signals `indices` of `split`; none is dropped, the last batch is padded with repeats.

    Args:
      step_size: alpha, a scalar or [P].
      dtype: of the latents returned; their PSNR is measured after the rounding to it.
      weights: None, or [len(indices), N]: one a point, 0 hides it from the fit (PSNR is of all points).
      after_batch: called with the signals fitted and their mean PSNR after every batch.
    """
    size = min(settings.fit.batch_size, -(-len(indices) // mesh.size) * mesh.size)
    sharding.check_batch_size(mesh, size, "fit.batch_size")
    params = sharding.replicate(mesh, params)

    def under_way() -> Iterator[tuple[int, jax.Array, jax.Array]]:
        for start in range(0, len(indices), size):
            places = np.minimum(np.arange(start, start + size), len(indices) - 1)
            batch = sharding.split_batch(mesh, split.signals(indices[places]))
            shown = None if weights is None else sharding.split_batch(mesh, weights[places])
            yield (
                min(size, len(indices) - start),
                *fit_batch(field, params, batch, shown, step_size, dtype=dtype, **rules_of(settings)),
            )

    latents, psnr = [], []
    for count, some, their_psnr in _one_ahead(under_way()):
        latents.append(sharding.to_host(some)[:count])
        psnr.append(sharding.to_host(their_psnr).astype(np.float32)[:count])
        after_batch(count, float(psnr[-1].mean()))
    return FittedSignals(np.concatenate(latents), np.concatenate(psnr))


def _one_ahead(items: Iterator[Any]) -> Iterator[Any]:
    """The same items, each only once the next one is made."""
    former = next(items)
    for item in items:
        yield former
        former = item
    yield former


def rules_of(settings: Settings) -> dict[str, Any]:
    """The keywords of `fit_batch` that a run's settings say."""
    return {
        "fit": settings.fit,
        "channel_loss": settings.train.channel_loss,
        "selection_ratio": settings.inner.selection_ratio,
        "key": jax.random.key(settings.seed),
    }


@functools.partial(jax.jit, static_argnames=("field", "dtype", "fit", "channel_loss", "selection_ratio"))
def fit_batch(
    field: Field,
    params: Params,
    signals: jax.Array,
    weights: jax.Array | None,
    step_size: float | jax.Array,
    *,
    dtype: Literal["float32", "float16"],
    fit: FitSettings,
    channel_loss: Literal["mean", "sum"],
    selection_ratio: float,
    key: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Latents [B, P] of signals [B, *grid, D], and the PSNR [B] in dB of what they decode to, in one program."""
    fitted = fit_latent(
        field, params, signals, weights=weights, steps=fit.steps, step_size=step_size, channel_loss=channel_loss,
        safeguard=fit.safeguard, rescale_ratio=selection_ratio if fit.context == "rescaled" else None, key=key,
    )  # fmt: skip
    rounded = fitted.latents.astype(dtype)
    values = reconstruct(field, params, rounded, grid(signals.shape[1:-1]))
    return rounded, metrics.psnr(jnp.clip(values, 0, 1), signals.reshape(values.shape))
