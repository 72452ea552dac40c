"""A finished field on new signals: latents, reconstructions, PSNR, and signals that are unlike those of the run."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from experiments.runtime.batch_size import settled
from experiments.runtime.progress import log
from experiments.runtime.run import Run
from experiments.runtime.run_directory import RunDirectory, RunError, write_json
from experiments.stages.decode import decoded_shape, write_split
from experiments.stages.extract import write_store
from experiments.stages.signal_files import units_said
from medfuncta_jax.atomic import atomic_path
from medfuncta_jax.checkpoint import load_field
from medfuncta_jax.datasets import new_signals
from medfuncta_jax.datasets.dataset import NEW
from medfuncta_jax.latent_file import LatentStoreError
from medfuncta_jax.latent_store import load_latents
from medfuncta_jax.prepare import trained_on

# The part of the run's own held-out signals that would also count as unlike the others.
_UNUSUAL = 0.01
# Number of training latents for mean and spread, evenly spaced.
_LATENTS = 4096


def apply(run: Run) -> Path:
    """Fit the run's field to new signals; returns the folder of the results.

    Signals are resampled and scaled as in training. The stage writes `latents/` (a latent store with the one split
    "new"), `reconstructions/` in the units of the files, `signals.csv` (a row per signal: PSNR, scale, whether it is
    unlike those of the run and why) and `apply.json`. Existing files are kept, so the same command resumes after a
    stop.

    Args:
      run: `data_dir` is a file, or a folder of files, of the run's source; `out` is the folder for the results, None
        for `WORKDIR/applied/NAME`, by the name of that file or folder.
    Raises:
      CheckpointError: no field.
      DataError: no files, or none that can be used.
      RunError: no `data_dir`, or a folder that cannot be written.
      LatentStoreError: the folder holds latents of other signals in another layout.
      Interrupted: a stop was asked for; finished files are kept.
    """
    directory, data_dir = run.directory, run.data_dir
    if data_dir is None:
        raise RunError("--mode=apply needs the new signals: --data_dir=FOLDER or FILE")
    field, params = load_field(directory.path)
    _, grid, channels = trained_on(directory.path)
    dataset = new_signals(run.settings.data, data_dir, grid=grid, channels=channels)
    settings = directory.settings = settled(run.settings, dataset, directory)
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", Path(data_dir).expanduser().absolute().name) or "new"
    folder = Path(run.out).expanduser().absolute() if run.out else directory.path / "applied" / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{folder} cannot be made ({error.strerror}); name another --out") from error
    write_store(replace(run, data=dataset), folder / "latents")
    split = load_latents(folder / "latents", field=directory.path)[NEW]
    shape = decoded_shape(settings.decode.resolution, settings.decode.scale, grid)
    write_split(
        field, params, split, folder / "reconstructions", shape,
        count=len(split), own=settings.decode.values == "own", size=settings.fit.batch_size, stop=run.stop,
    )  # fmt: skip
    usual = usual_of(directory)
    reasons = [""] * len(split) if usual is None else usual.reasons(np.asarray(split.latents), split.psnr)
    rows = [
        [name, f"{psnr:.6g}", "yes" if reason else "" if usual is None else "no", reason, units.notes]
        for name, psnr, reason, units in zip(split.ids, split.psnr, reasons, split.units, strict=True)
    ]
    with atomic_path(folder / "signals.csv") as partial, partial.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([["id", "psnr", "unlike the run", "why", "scale"], *rows])
    unlike = {one: reason for one, reason in zip(split.ids, reasons, strict=True) if reason}
    write_json(folder / "apply.json", {
        "signals": len(split),
        "psnr": float(split.psnr.mean(dtype=np.float64)),
        "unlike": unlike,
        "compared_with": None if usual is None else usual.said,
        "skipped": dataset.about["skipped"],
        "grid": list(shape),
        "field_sha256": split.about["field_sha256"],
        "data": str(Path(data_dir).expanduser().absolute()),
    })  # fmt: skip
    for one, reason in list(unlike.items())[:20]:
        log.warning("unlike the signals of the run: %s: %s", one, reason)
    log.info(
        "apply: %d signals, PSNR %.2f dB (lowest %.2f), %s unlike the run, %d skipped; reconstructions %s; %s",
        len(split), split.psnr.mean(dtype=np.float64), split.psnr.min(),
        "not known how many" if usual is None else len(unlike), len(dataset.about["skipped"]),
        units_said(split.units) if settings.decode.values == "own" else "in [0, 1]", folder,
    )  # fmt: skip
    return folder


@dataclass(frozen=True)
class Usual:
    """Statistics of a run's held-out signals.

    Attributes:
      psnr: lower limit of most held-out signals, dB.
      distance: upper limit of the distance of most latents from the mean of training, in standard deviations (root mean
        square of entries).
      mean, spread: statistics of training latents, [P].
      said: the origin of these statistics, in words.
    """

    psnr: float
    distance: float
    mean: np.ndarray
    spread: np.ndarray
    said: str

    def reasons(self, latents: np.ndarray, psnr: np.ndarray) -> list[str]:
        """The reasons why each of n signals is unlike those of the run, "" for the others."""
        return [
            "; ".join(filter(None, (
                "" if quality >= self.psnr else f"PSNR {quality:.2f} dB, usual is above {self.psnr:.2f}",
                "" if far <= self.distance else f"latent {far:.2f} deviations from the mean, usual is below "
                f"{self.distance:.2f}",
            )))
            for quality, far in zip(psnr, distances(latents, self.mean, self.spread), strict=True)
        ]  # fmt: skip


def distances(latents: np.ndarray, mean: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """[n]: root mean square of the entries of latents [n, P] about a mean [P], in units of a spread [P]."""
    return np.sqrt(np.mean(((latents - mean) / spread) ** 2, axis=1))


def usual_of(run: RunDirectory) -> Usual | None:
    """Mean and spread of the run's training latents, and limits of its held-out splits; None without a store."""
    try:
        store = load_latents(run.latents, field=run.path)
    except LatentStoreError as error:
        log.warning("which signals are unlike those of the run is not said, for want of its own latents (%s)", error)
        return None
    held_out: Sequence[str] = [name for name in ("val", "test") if name in store] or list(store)
    first = store.get("train", store[held_out[0]])
    rows = np.unique(np.linspace(0, len(first) - 1, min(len(first), _LATENTS)).astype(int))
    of_training = first.latents[rows].astype(np.float64)
    mean, spread = of_training.mean(0), of_training.std(0)
    spread = np.where(spread > 0, spread, 1.0)
    far = np.concatenate([distances(np.asarray(store[name].latents), mean, spread) for name in held_out])
    psnr = np.concatenate([store[name].psnr for name in held_out])
    return Usual(
        float(np.quantile(psnr, _UNUSUAL)), float(np.quantile(far, 1 - _UNUSUAL)), mean, spread,
        f"{len(psnr)} signals of {' and '.join(held_out)}: below the {_UNUSUAL:g} quantile of their PSNR, or beyond "
        f"the {1 - _UNUSUAL:g} quantile of the distance of their latents from the mean of training",
    )  # fmt: skip
