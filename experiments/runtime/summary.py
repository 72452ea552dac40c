"""A summary of a run and the places of its results, on one screen."""

from __future__ import annotations

import json

from experiments.runtime.run_directory import RunDirectory
from experiments.stages import STAGES
from medfuncta_jax.datasets import Dataset


def summary(dataset: Dataset, run: RunDirectory) -> str:
    """The run so far in a few lines, from the files in its directory."""
    settings = run.settings
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
        evaluated = json.loads(run.evaluation_file.read_text())
        lines.append(f"{'split':<8}{'signals':>8}{'PSNR dB':>10}{'MSE':>12}{'SSIM':>8}{'LPIPS':>8}")
        for name in (name for name in ("test", "val") if name in evaluated):
            row = evaluated[name]
            perceptual = f"{row['lpips']:.4f}" if "lpips" in row else "-"
            lines.append(
                f"{name:<8}{row['signals']:>8}{row['psnr']:>10.2f}{row['mse']:>12.3e}{row['ssim']:>8.4f}{perceptual:>8}"
            )
    spent = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in run.seconds().items())
    lines.append(f"time: {spent or 'none yet'}")
    results = [name for stage in STAGES.values() for name in stage.writes] + ["variants/"]
    there = [name for name in results if not name.endswith("/") and (run.path / name).exists()]
    for folder in (name for name in results if name.endswith("/")):
        there += [f"{folder}{path.name}" for path in sorted((run.path / folder).glob("*"))]
    lines.append(f"results in {run.path}: {', '.join(there)}")
    return "\n".join(lines)
