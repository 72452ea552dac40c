"""Evaluation: reconstructions from the stored latents against the signals, on test and validation split."""

from __future__ import annotations

import time

import numpy as np

from experiments import figures
from experiments.interruption import StopRequest
from experiments.progress import Progress
from experiments.run_directory import RunDirectory, RunError, write_json
from medfuncta_jax import metrics
from medfuncta_jax.checkpoint import load_field
from medfuncta_jax.coordinates import grid
from medfuncta_jax.datasets import Dataset
from medfuncta_jax.inner_loop import reconstruct
from medfuncta_jax.latent_store import load_latents
from medfuncta_jax.settings import Settings

_PICTURED = 6


def evaluate(settings: Settings, dataset: Dataset, run: RunDirectory, stop: StopRequest) -> dict:
    """Write `evaluation.json` (means over signals; PSNR in dB) and `figures/`; returns the former.

    Raises:
      CheckpointError, LatentStoreError: nothing to evaluate yet.
      RunError: latents that belong to another data set.
    """
    began = time.monotonic()
    field, params = load_field(run.path)
    coords = grid(dataset.grid)
    results: dict = {}
    latents = load_latents(run.latents, splits=("test", "val"), field=run.path)
    for name in ("test", "val"):
        split, stored = dataset.splits[name], latents[name]
        if stored.ids != split.annotations().ids:
            raise RunError(f"the {name} latents in {run.latents} are of other data; run --mode=extract again")
        values: dict[str, list[np.ndarray]] = {}
        size = settings.fit.batch_size
        with Progress(f"evaluate {name}", total=len(split), unit="signals") as progress:
            for start in range(0, len(split), size):
                rows = np.arange(start, min(start + size, len(split)))
                signals = split.signals(rows)
                images = np.asarray(reconstruct(field, params, stored.latents[rows], coords)).reshape(signals.shape)
                for metric, value in metrics.signal_metrics(images, signals).items():
                    values.setdefault(metric, []).append(np.asarray(value))
                progress.advance(len(rows))
                stop.check("latents are kept, the evaluation starts over")
        means = {metric: float(np.concatenate(value).mean(dtype=np.float64)) for metric, value in values.items()}
        results[name] = {"signals": len(split), **means}
        if name == "test":
            _draw(field, params, split, stored, run)
    run.set_seconds("evaluate", time.monotonic() - began)
    results["seconds"] = {stage: run.seconds().get(stage, 0.0) for stage in ("train", "extract", "evaluate")}
    write_json(run.evaluation_file, results)
    return results


def _draw(field, params, split, stored, run: RunDirectory) -> None:
    """Test signals from the worst to the best PSNR, evenly spaced, and the learning curve."""
    order = np.argsort(stored.psnr)
    chosen = order[np.linspace(0, len(order) - 1, min(_PICTURED, len(order))).round().astype(int)]
    signals = split.signals(chosen)
    images = np.asarray(reconstruct(field, params, stored.latents[chosen], grid(signals.shape[1:-1])))
    affines = stored.affines
    figures.draw_reconstructions(
        run.figures / "reconstructions.png", signals, np.clip(images, 0, 1).reshape(signals.shape),
        titles=[stored.ids[i] for i in chosen], psnr=[float(stored.psnr[i]) for i in chosen],
        oriented=affines is not None,
        spacing=None if affines is None else np.linalg.norm(affines[chosen[0], :3, :3], axis=0),
    )  # fmt: skip
    records = run.read_metrics()
    if records:
        figures.draw_learning_curve(run.figures / "learning_curve.png", records)
