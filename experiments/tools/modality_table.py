"""Train the cpu variant of every modality with available real data, beside PCA and the mean signal.

    python -m experiments.tools.modality_table --workdir=runs/table --data_dir=DIR [--rows=ecg,grey_64]

Writes table.json and table.md. A row is a run of the launcher in WORKDIR/NAME, so the command resumes; a failed row is
listed, and the others continue.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from absl import app, flags

from experiments.runtime.run_directory import write_json
from experiments.settings import RunSettings
from experiments.stages.principal_axes import principal_axes
from medfuncta_jax import metrics
from medfuncta_jax.datasets import Dataset, Split, open_dataset


@dataclass(frozen=True)
class Row:
    """A line of the table: a config, and the overrides to read the available data."""

    config: str
    overrides: tuple[str, ...] = ()


ROWS = {
    "ecg": Row("ecg.py:cpu"),
    "pneumonia_28": Row("pneumonia_xray_28.py"),
    "grey_64": Row("chest_xray.py:cpu", ("data.flag=medicalmnist",)),
    "rgb_64": Row("dermatoscope.py:cpu", ("data.flag=bccdcells",)),
    "hippocampus": Row(
        "brain_mri.py:folder_cpu",
        ("data.pattern=hippocampus/imagesTr/*.nii.gz", "data.spacing=0.0", "model.latent_dim=64"),
    ),
    "ixi_t1": Row("brain_mri.py:folder_cpu", ("data.pattern=ixi_t1_2mm/*.nii.gz",)),
    "adrenal_3d": Row("medmnist_3d.py:cpu"),
}


def linear_metrics(split: Split, mean: np.ndarray, axes: np.ndarray) -> dict[str, float]:
    """Mean metrics of the test signals projected on `axes` [k, F] about `mean`; no axes leave the mean signal."""
    signals = split.signals(slice(None))
    flat = signals.reshape(len(signals), -1) - mean
    images = (mean + flat @ axes.T @ axes).reshape(signals.shape).astype(np.float32)
    return {name: float(np.mean(value)) for name, value in metrics.signal_metrics(images, signals).items()}


def baselines(dataset: Dataset, components: int) -> dict[str, dict[str, float] | None]:
    """PCA with `components`, None if the training split is too small, and the mean signal."""
    train, test = dataset.splits["train"], dataset.splits["test"]
    mean = train.signals(slice(None)).reshape(len(train), -1).mean(0, dtype=np.float64)
    results: dict[str, dict[str, float] | None] = {
        "mean": linear_metrics(test, mean, np.zeros((0, len(mean)))),
        "pca": None,
    }
    if components < len(train):
        pca = principal_axes(train.signals(slice(None)).reshape(len(train), -1), components)
        results["pca"] = linear_metrics(test, pca.mean, pca.axes)
    return results


def make_row(name: str, row: Row, workdir: Path, data_dir: str) -> dict:
    """Run or resume one row to its end, and measure its baselines.

    Raises:
      subprocess.CalledProcessError: the launcher failed; it has said why.
    """
    run = workdir / name
    words = [f"--config=configs/{row.config}", f"--workdir={run}", f"--data_dir={data_dir}"]
    overrides = [f"--config.{override}" for override in row.overrides]
    subprocess.run([sys.executable, "-m", "experiments.main", *words, *overrides], check=True)
    settings = RunSettings.from_saved(json.loads((run / "config.json").read_text()))
    dataset = open_dataset(settings.data, data_dir=data_dir)
    evaluation = json.loads((run / "evaluation.json").read_text())
    return {
        "config": row.config,
        "grid": list(dataset.grid),
        "channels": dataset.channels,
        "signals": {name: len(split) for name, split in dataset.splits.items()},
        "latent_dim": settings.model.latent_dim,
        "train_seconds": evaluation["seconds"]["train"],
        "field": evaluation["test"],
        **baselines(dataset, settings.model.latent_dim),
    }


def as_markdown(rows: dict[str, dict]) -> str:
    """The table as Markdown; PSNR in dB, SSIM in parentheses."""

    def cell(result: dict | None) -> str:
        return "none" if result is None else f"{result['psnr']:.1f} ({result['ssim']:.3f})"

    lines = [
        "| data | train / test | grid | P | training | test MSE | field: PSNR dB (SSIM) | PCA, P components | mean |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, row in rows.items():
        if "error" in row:
            lines.append(f"| {name} | failed: {row['error']} | | | | | | | |")
            continue
        grid = "x".join(map(str, row["grid"])) + (" RGB" if row["channels"] == 3 else "")
        lines.append(
            f"| {name} | {row['signals']['train']} / {row['signals']['test']} | {grid} | {row['latent_dim']} "
            f"| {row['train_seconds']:.0f} s | {row['field']['mse']:.2e} | {cell(row['field'])} | {cell(row['pca'])} "
            f"| {cell(row['mean'])} |"
        )
    return "\n".join(lines) + "\n"


def define_flags() -> None:
    """Define the command's flags, not at import, so that tests can import this module beside other commands."""
    flags.DEFINE_string("workdir", None, "Folder for the runs and the table.", required=True)
    flags.DEFINE_string("data_dir", None, "Folder with the data of all rows.", required=True)
    flags.DEFINE_list("rows", None, "Names of rows to make; all by default.")


def main(argv: list[str]) -> None:
    """Flags in, table out."""
    del argv
    logging.getLogger().setLevel(logging.WARNING)  # app.run enables INFO logging of every library
    options = flags.FLAGS
    names = options.rows or list(ROWS)
    unknown = sorted(set(names) - set(ROWS))
    if unknown:
        raise app.UsageError(f"--rows: no row {unknown[0]!r}; known: {', '.join(ROWS)}")
    workdir = Path(options.workdir).absolute()
    table = workdir / "table.json"
    rows = json.loads(table.read_text()) if table.exists() else {}
    for name in names:
        try:
            rows[name] = make_row(name, ROWS[name], workdir, options.data_dir)
        except subprocess.CalledProcessError as error:
            rows[name] = {"error": f"the launcher ended with code {error.returncode}"}
        ordered = {key: rows[key] for key in ROWS if key in rows}
        write_json(table, ordered)
        (workdir / "table.md").write_text(as_markdown(ordered))
    print((workdir / "table.md").read_text())
    sys.exit(any("error" in rows[name] for name in names))


if __name__ == "__main__":
    define_flags()
    app.run(main)
