"""Fitting many signals with a fixed field: padded batches over all devices, for validation and extraction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from medfuncta_jax import metrics, sharding
from medfuncta_jax.coordinates import grid
from medfuncta_jax.datasets import Split
from medfuncta_jax.field import Field, Params
from medfuncta_jax.inner_loop import fit_latent, reconstruct
from medfuncta_jax.settings import Settings


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
    fit = settings.fit
    size = min(fit.batch_size, -(-len(indices) // mesh.size) * mesh.size)
    sharding.check_batch_size(mesh, size, "fit.batch_size")
    params = sharding.replicate(mesh, params)
    latents, psnr = [], []
    for start in range(0, len(indices), size):
        rows = indices[start : start + size]
        padded = np.concatenate([rows, np.full(size - len(rows), rows[-1])])
        signals = split.signals(padded)
        batch = sharding.split_batch(mesh, signals)
        shown = None if weights is None else weights[np.minimum(np.arange(start, start + size), len(indices) - 1)]
        fitted = fit_latent(
            field, params, batch, weights=sharding.split_batch(mesh, shown),
            steps=fit.steps, step_size=step_size, channel_loss=settings.train.channel_loss, safeguard=fit.safeguard,
            rescale_ratio=settings.inner.selection_ratio if fit.context == "rescaled" else None,
            key=jax.random.key(settings.seed),
        )  # fmt: skip
        rounded = fitted.latents.astype(dtype)
        values = reconstruct(field, params, rounded, grid(signals.shape[1:-1]))
        batch_psnr = metrics.psnr(jnp.clip(values, 0, 1), batch.reshape(values.shape))
        latents.append(sharding.to_host(rounded)[: len(rows)])
        psnr.append(sharding.to_host(batch_psnr).astype(np.float32)[: len(rows)])
        after_batch(len(rows), float(psnr[-1].mean()))
    return FittedSignals(np.concatenate(latents), np.concatenate(psnr))
