"""Latent extraction: every signal of every split fitted with the exported field, file by file."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from experiments.runtime.progress import Progress, log
from experiments.runtime.run import Run
from experiments.runtime.run_directory import RunDirectory
from experiments.tools.latent_card import latent_card
from medfuncta_jax import sharding
from medfuncta_jax.atomic import atomic_path
from medfuncta_jax.batched import FittedSignals, fit_options, fit_signals
from medfuncta_jax.checkpoint import load_field
from medfuncta_jax.datasets import Dataset, Split
from medfuncta_jax.datasets.dataset import NEW, Annotations, without_labels
from medfuncta_jax.latent_file import LatentFile, LatentStoreError, file_name, file_rows, write_file
from medfuncta_jax.latent_store import field_checksum, load_latents
from medfuncta_jax.settings import SettingsError

CARD = "README.md"
# Entries that may differ between the machines of one job array, such as places and times of files; names in each split,
# which the ids hold; and other files of the source.
_NOT_KEPT = ("folder", "files", "split", "repeated", "labels")
# Entries that may change without another fit: the labels and their meaning.
_OF_LABELS = ("classes", "task")


@dataclass(frozen=True)
class ExtractSettings:
    """Writing the latents of every split, in files that several jobs can share.

    Attributes:
      splits: names of the splits; leaving out "train" saves much time if only the evaluation needs latents.
      signals_per_file: maximum number of latents in a file.
      shard, shards: this job is number `shard` (from 0) of `shards`, and fits every file whose number over all splits
        leaves `shard` when divided by `shards`. The files are the same for any number of jobs.
      dtype: type of the stored latents; "float16" halves the files, and the stored PSNR is that of the rounded latent.
    """

    splits: tuple[Literal["train", "val", "test"], ...] = ("train", "val", "test")
    signals_per_file: int = 4096
    shard: int = 0
    shards: int = 1
    dtype: Literal["float32", "float16"] = "float32"

    def __post_init__(self):
        if not self.splits:
            raise SettingsError("splits must name at least one split, e.g. ('val', 'test')")
        if self.signals_per_file < 1:
            raise SettingsError(f"signals_per_file must be at least 1, got {self.signals_per_file}")
        if self.shards < 1:
            raise SettingsError(f"shards must be at least 1, got {self.shards}")
        if not 0 <= self.shard < self.shards:
            raise SettingsError(f"shard must be 0 to {self.shards - 1} (shards - 1), got {self.shard}")


@dataclass(frozen=True)
class _Part:
    """One file to write: its path, and its rows of the split."""

    path: Path
    rows: range


def extract(run: Run) -> None:
    """Write `latents/SPLIT-K-of-N.safetensors` for the splits asked for, and `latents/README.md` when all exist.

    Raises:
      CheckpointError, LatentStoreError, Interrupted: as `write_store`.
    """
    began = time.monotonic()
    if write_store(run, run.directory.latents):
        run.directory.set_seconds("extract", time.monotonic() - began)


def write_store(run: Run, folder: Path) -> bool:
    """Write the latents of the splits asked for, or of all new signals, to a folder; returns whether any were fitted.

    A file is written as soon as its signals are fitted, and existing files of the same field are kept, so a killed run
    fits only missing files; splits that were extracted before stay in the store. With `extract.shards` above 1 only the
    files of this job are fitted; files and layout are the same for any number of jobs.

    Raises:
      CheckpointError: no trained field.
      LatentStoreError: files of another layout are there, or latents that float16 cannot hold.
      Interrupted: a stop was asked for; finished files are kept.
    """
    settings, dataset = run.settings, run.dataset
    config = settings.extract
    field, params = load_field(run.directory.path)
    mesh = sharding.data_mesh(jax.local_devices())
    # Each of several processes counts as a job.
    shard = config.shard * jax.process_count() + jax.process_index()
    shards = config.shards * jax.process_count()
    fitted_any = False
    splits: dict[str, Split] = {
        name: split for name, split in dataset.splits.items()
        if name in (*config.splits, NEW) or _is_there(folder, name, run.directory)
    }  # fmt: skip
    parts = _layout(folder, splits, config.signals_per_file)
    numbers = itertools.count()
    for name, split in splits.items():
        own = [part for part in parts[name] if next(numbers) % shards == shard]
        about, examples = _about(name, splits, dataset, run.directory), split.annotations()
        left = [part for part in own if not _is_fitted(part, about, examples)]
        if not left:
            continue
        fitted_any = True
        (folder / CARD).unlink(missing_ok=True)  # the card describes a complete store
        job = f" (job {shard} of {shards})" if shards > 1 else ""
        total, missing = (sum(len(part.rows) for part in some) for some in (own, left))
        psnr = []
        with (
            Progress(f"extract {name}{job}", total=total, done=total - missing, unit="signals") as progress,
            ThreadPoolExecutor(1) as writer,
        ):

            def after_batch(batch: FittedSignals, progress=progress) -> None:
                progress.advance(len(batch.psnr), note=f"PSNR {batch.psnr.mean():.2f} dB")
                run.stop.check(f"finished files are in {folder}")

            writes: list[Future[None]] = []
            for part in left:
                for stale in part.path.parent.glob(f".{part.path.stem}.partial*"):
                    stale.unlink(missing_ok=True)  # of a killed job
                fitted = fit_signals(
                    field, params, split, rows=part.rows, mesh=mesh, dtype=config.dtype, after_batch=after_batch,
                    **fit_options(settings),
                )  # fmt: skip
                psnr.append(fitted.psnr)
                for write in writes:  # one file is written while the next is fitted
                    write.result()
                writes.append(writer.submit(_write, part, about, examples, fitted))
            for write in writes:
                write.result()
        log.info(
            "extract %s: %d latents in %d files, mean PSNR %.2f dB, %s",
            name, missing, len(left), np.concatenate(psnr).mean(dtype=np.float64), folder,
        )  # fmt: skip
    _finish(run.directory, folder, shards)
    return fitted_any


def _layout(folder: Path, splits: Mapping[str, Split], signals_per_file: int) -> dict[str, list[_Part]]:
    """The files of every split.

    Raises:
      LatentStoreError: the folder holds files of another layout; they may have cost hours, so they stay.
    """
    parts = {}
    for name, split in splits.items():
        rows = file_rows(len(split), signals_per_file)
        parts[name] = [_Part(folder / file_name(name, k, len(rows)), some) for k, some in enumerate(rows)]
        names = {part.path.name for part in parts[name]}
        other = sorted(path for path in folder.glob(f"{name}-*-of-*.safetensors") if path.name not in names)
        if other:
            raise LatentStoreError(
                f"{other[0]} is of another layout: {len(split)} signals with "
                f"--config.extract.signals_per_file={signals_per_file} make {len(rows)} file(s); give the "
                "signals_per_file it was written with, or remove it and the files like it"
            )
    return parts


def _is_there(folder: Path, split: str, run: RunDirectory) -> bool:
    """Whether a folder holds all latents of a split, of the field of this run."""
    try:
        return split in load_latents(folder, splits=(split,), field=run.path)
    except LatentStoreError:
        return False


def _about(name: str, splits: Mapping[str, Split], dataset: Dataset, run: RunDirectory) -> dict[str, Any]:
    config = run.settings.extract
    about = {
        "split": name,
        "splits": {other: len(split) for other, split in splits.items()},
        "field_sha256": field_checksum(run.path),
        "grid": list(dataset.grid),
        "channels": dataset.channels,
        "classes": list(dataset.classes),
        "task": dataset.task,
        "data": {key: value for key, value in without_labels(dataset.about).items() if key not in _NOT_KEPT},
        "settings": run.settings_of_the_run()
        | {"extract": {"signals_per_file": config.signals_per_file, "dtype": config.dtype}},
    }
    return json.loads(json.dumps(about))  # in the form that is read back: tuples become lists


def _is_fitted(part: _Part, about: dict[str, Any], examples: Annotations) -> bool:
    """Whether a file holds undamaged latents of these signals by this field; other labels, and splits that came to the
    store, are written to the file.
    """
    try:
        file = LatentFile(part.path)
    except LatentStoreError:
        return False
    rows = slice(part.rows.start, part.rows.stop)
    fitted = (
        file.common == about | {name: file.about.get(name) for name in ("splits", *_OF_LABELS)}
        and file.about["rows"] == [rows.start, rows.stop]
        and file.ids == list(examples.ids[rows])
        and file.is_whole()
        and file.units == list(examples.units[rows])
    )
    labels = file.arrays["labels"]
    if fitted and not (file.common == about and np.array_equal(labels, examples.labels[rows])):
        _write(part, about, examples, FittedSignals(file.arrays["latents"].copy(), file.arrays["psnr"].copy()))
    return fitted


def _write(part: _Part, about: dict[str, Any], examples: Annotations, fitted: FittedSignals) -> None:
    if fitted.latents.dtype == np.float16 and not np.isfinite(fitted.latents).all():
        raise LatentStoreError(f"{part.path} has latents beyond float16's range; give --config.extract.dtype=float32")
    rows = slice(part.rows.start, part.rows.stop)
    write_file(
        part.path, about, part.rows, latents=fitted.latents, psnr=fitted.psnr, labels=examples.labels[rows],
        ids=examples.ids[rows], affines=None if examples.affines is None else examples.affines[rows],
        units=examples.units[rows],
    )  # fmt: skip


def _finish(run: RunDirectory, folder: Path, shards: int) -> None:
    """Describe the store if it is complete, as it is for the last of several jobs."""
    try:
        store = load_latents(folder, field=run.path)
    except LatentStoreError as error:
        if shards == 1:
            raise
        log.info("extract: the files of this job are written, the store waits for others (%s)", error)
        return
    with atomic_path(folder / CARD) as partial:
        partial.write_text(latent_card(store))
