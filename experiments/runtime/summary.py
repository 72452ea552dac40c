"""One screen that says what a run did and where its results are."""

from __future__ import annotations

import json

from experiments.runtime.run_directory import RunDirectory
from medfuncta_jax.checkpoint import FIELD_FILE
from medfuncta_jax.datasets import Dataset
from medfuncta_jax.settings import Settings

# What stages leave in the directory of a run, and folders of which each entry is a result.
_RESULTS = (
    FIELD_FILE, "latents", "evaluation.json", "evaluation.csv", "curves.json", "compression.json",
    "classification.json", "classification.md", "regression.json", "inverse.json", "generation.json",
    "report.html", "figures", "metrics.jsonl", "tensorboard", "checkpoints",
)  # fmt: skip
_FOLDERS = ("decoded", "generated", "applied", "variants")


def summary(settings: Settings, dataset: Dataset, run: RunDirectory) -> str:
    """The run so far in a few lines, from the files in its directory."""
    model, inner = settings.model, settings.inner
    lines = [
        "",
        f"{dataset.name}: {model.layers} layers of {model.width}, latent of {model.latent_dim}, "
        f"G = {inner.steps}, H = {settings.fit.steps}, {settings.train.steps} steps of {settings.train.batch_size}",
    ]
    validated = [record for record in run.read_metrics() if "val_psnr" in record]
    if validated:
        best = max(validated, key=lambda record: record["val_psnr"])
        lines.append(f"best validation PSNR in training  {best['val_psnr']:.2f} dB at step {best['step']}")
    if run.evaluation_file.exists():
        results = json.loads(run.evaluation_file.read_text())
        lines.append(f"{'split':<8}{'signals':>8}{'PSNR dB':>10}{'MSE':>12}{'SSIM':>8}{'LPIPS':>8}")
        for name in (name for name in ("test", "val") if name in results):
            row = results[name]
            perceptual = f"{row['lpips']:.4f}" if "lpips" in row else "-"
            lines.append(
                f"{name:<8}{row['signals']:>8}{row['psnr']:>10.2f}{row['mse']:>12.3e}{row['ssim']:>8.4f}{perceptual:>8}"
            )
    spent = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in run.seconds().items())
    lines.append(f"time: {spent or 'none yet'}")
    there = [name for name in _RESULTS if (run.path / name).exists()]
    there += [f"{folder}/{path.name}" for folder in _FOLDERS for path in sorted((run.path / folder).glob("*"))]
    lines.append(f"results in {run.path}: {', '.join(there)}")
    return "\n".join(lines)
