"""Latent extraction: every signal of every split fitted with the exported field."""

from __future__ import annotations

import hashlib
import time

import numpy as np

from experiments.fit import fit_signals
from experiments.interruption import StopRequest
from experiments.progress import Progress, log
from experiments.run_directory import RunDirectory
from medfuncta_jax import sharding
from medfuncta_jax.checkpoint import FIELD_FILE, load_field_and_about
from medfuncta_jax.datasets import Dataset
from medfuncta_jax.latent_store import LatentSplit, LatentStoreError, read_split, write_split
from medfuncta_jax.meta_step import EXPORTED_STEP_SIZE
from medfuncta_jax.settings import Settings


def extract(settings: Settings, dataset: Dataset, run: RunDirectory, stop: StopRequest) -> None:
    """Write `latents/SPLIT.npz` for all splits; a split that this very field has been through already is kept.

    Raises:
      CheckpointError: no trained field.
      Interrupted: a stop was asked for; finished splits are kept.
    """
    field, params, _ = load_field_and_about(run.path)
    checksum = hashlib.sha256((run.path / FIELD_FILE).read_bytes()).hexdigest()
    mesh = sharding.data_mesh()
    began, fitted_any = time.monotonic(), False
    for name, split in dataset.splits.items():
        file = run.latents / f"{name}.npz"
        if _is_current(file, checksum, len(split)):
            continue
        fitted_any = True
        with Progress(f"extract {name}", total=len(split), unit="signals") as progress:

            def after_batch(count: int, psnr: float, progress=progress) -> None:
                progress.advance(count, note=f"PSNR {psnr:.2f} dB")
                stop.check(f"finished splits are in {run.latents}")

            fitted = fit_signals(
                field, params, split, np.arange(len(split)), settings, mesh,
                step_size=EXPORTED_STEP_SIZE, after_batch=after_batch,
            )  # fmt: skip
        examples = split.annotations()
        about = {
            "split": name,
            "field_sha256": checksum,
            "grid": list(dataset.grid),
            "classes": list(dataset.classes),
            "data": dataset.about,
            "settings": settings.to_dict(),
        }
        write_split(
            file, LatentSplit(fitted.latents, examples.labels, examples.ids, fitted.psnr, examples.affines, about)
        )
        log.info("extract %s: %d latents, mean PSNR %.2f dB, %s", name, len(split), fitted.psnr.mean(), file)
    if fitted_any:
        run.set_seconds("extract", time.monotonic() - began)


def _is_current(file, checksum: str, count: int) -> bool:
    if not file.exists():
        return False
    try:
        stored = read_split(file)
    except LatentStoreError:
        return False
    return stored.about["field_sha256"] == checksum and len(stored.latents) == count
