"""Decoding: signals written back to files from their latents, at any resolution."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from experiments.interruption import StopRequest
from experiments.progress import Progress, log
from experiments.run_directory import RunDirectory, RunError, write_json
from medfuncta_jax.atomic import atomic_path
from medfuncta_jax.checkpoint import load_field
from medfuncta_jax.coordinates import grid, resampled_affine
from medfuncta_jax.datasets.volumes import write_volume
from medfuncta_jax.fit import reconstruct
from medfuncta_jax.latent_store import LatentSplit, load_latents
from medfuncta_jax.settings import DecodeSettings, Settings, SettingsError

_SUFFIX = {1: ".csv", 2: ".png", 3: ".nii.gz"}
# Of a file's name; file systems allow 255 bytes, and the row and the suffix take some.
_LONGEST_NAME = 120
# Values decoded at once, beside what `reconstruct` needs: 64 MB.
_VALUES_AT_ONCE = 2**24
# Signals decoded at once where the config says no number.
_SIGNALS_AT_ONCE = 64


def decode(settings: Settings, run: RunDirectory, stop: StopRequest) -> None:
    """Write `decoded/SPLIT/ROW-ID.nii.gz` (3D), `.png` (2D) or `.csv` (1D) from the field and the latents alone.

    Values are clipped to [0, 1], the scale the field was trained on. Volumes are float32 with the affine of their
    grid, channels in a fourth axis; images are 8-bit grey or RGB, whose rounding (59 dB) is far below what a field
    loses; series have a column of positions, in samples of the training grid, and one a channel. Files that are there
    are kept.

    Raises:
      CheckpointError, LatentStoreError: no field, or no latents of it.
      SettingsError: `decode` asks for what the field or the files cannot give.
      RunError: the folder holds files decoded otherwise.
      Interrupted: a stop was asked for; finished files are kept.
    """
    config = settings.decode
    field, params = load_field(run.path)
    store = load_latents(run.latents, splits=config.splits, field=run.path)
    for name, split in store.items():
        shape = decoded_shape(config, split.about["grid"])
        if len(shape) == 2 and field.channels not in (1, 3):
            raise SettingsError(f"a PNG holds 1 or 3 channels, this field has {field.channels}")
        folder = run.path / "decoded" / name
        _claim(folder, {"grid": list(shape), "latents": split.about})
        count = min(config.limit or len(split), len(split))
        names = (file_name(row, count=len(split), name=split.ids[row], axes=len(shape)) for row in range(count))
        paths = [folder / one for one in names]
        left = [row for row, path in enumerate(paths) if not path.exists()]
        coords = grid(shape)
        size = max(
            1, min(settings.fit.batch_size or _SIGNALS_AT_ONCE, _VALUES_AT_ONCE // (len(coords) * field.channels))
        )
        with Progress(f"decode {name}", total=count, done=count - len(left), unit="files") as progress:
            for start in range(0, len(left), size):
                rows = left[start : start + size]
                # The last batch is padded, so that one shape is compiled.
                latents = split.latents[np.resize(rows, size)]
                values = np.clip(np.asarray(reconstruct(field, params, latents, coords)), 0, 1)
                for row, signal in zip(rows, values.reshape(size, *shape, field.channels)[: len(rows)], strict=True):
                    _write(paths[row], signal, split, row)
                progress.advance(len(rows))
                stop.check(f"finished files are in {folder}")
        log.info("decode %s: %d files of %s in %s", name, count, "x".join(map(str, shape)), folder)


def decoded_shape(config: DecodeSettings, trained: Sequence[int]) -> tuple[int, ...]:
    """The grid to decode at.

    Args:
      config: `resolution`, or `scale`.
      trained: points along each axis of the training grid.
    Raises:
      SettingsError: another number of axes, or several points along an axis that was trained with one.
    """
    if config.resolution and len(config.resolution) != len(trained):
        raise SettingsError(f"decode.resolution must have {len(trained)} entries, got {config.resolution}")
    shape = config.resolution or tuple(max(1, round(n * config.scale)) if n > 1 else 1 for n in trained)
    for n, m in zip(trained, shape, strict=True):
        if n == 1 and m > 1:
            raise SettingsError(f"decode.resolution must be 1 where the training grid {tuple(trained)} is, got {shape}")
    return shape


def file_name(row: int, *, count: int, name: str, axes: int) -> str:
    """A name that every file system takes: the row, which makes it unique and keeps the order, and what is left of the
    id without its folders and suffixes.

    Args:
      row: of the split.
      count: signals in the split, which fixes the digits of the row.
      name: the id.
      axes: of the grid, which decides the suffix.
    """
    bare = re.sub(r"\.(nii|nii\.gz|png|jpe?g|tiff?|csv|tsv|txt)$", "", name.rpartition("/")[2], flags=re.IGNORECASE)
    safe = re.sub(r"[^A-Za-z0-9._-]+", "_", bare)[:_LONGEST_NAME].strip("._")
    return f"{row:0{len(str(count - 1))}d}-{safe}".rstrip("-") + _SUFFIX[axes]


def _claim(folder: Path, made_of: dict[str, Any]) -> None:
    """Note what the files of a folder are made of, or compare; stale parts of a killed run are removed.

    Raises:
      RunError: it holds files decoded at another resolution or from other latents.
    """
    about = folder / "about.json"
    if about.exists():
        try:
            same = json.loads(about.read_text()) == made_of
        except ValueError:
            same = False
        if not same:
            raise RunError(
                f"{folder} holds files decoded at another resolution or from other latents; move or remove that folder"
            )
    else:
        write_json(about, made_of)
    for stale in folder.glob(".*.partial*"):
        stale.unlink(missing_ok=True)


def _write(path: Path, signal: np.ndarray, split: LatentSplit, row: int) -> None:
    """Write one signal [*grid, D] in [0, 1]."""
    *shape, channels = signal.shape
    trained = split.about["grid"]
    if len(shape) == 3:
        affine = np.eye(4) if split.affines is None else split.affines[row]
        affine = resampled_affine(affine, trained, shape)
        write_volume(path, signal[..., 0] if channels == 1 else signal, affine)
    elif len(shape) == 2:
        pixels = np.rint(signal * 255).astype(np.uint8)
        with atomic_path(path) as partial:
            Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(partial)
    else:
        positions = (grid(shape)[:, 0] + 1) / 2 * (trained[0] - 1)
        with atomic_path(path) as partial, open(partial, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["position", *(["value"] if channels == 1 else [f"value_{c}" for c in range(channels)])])
            for x, values in zip(positions, signal, strict=True):
                writer.writerow([f"{x:.10g}", *(f"{value:.9g}" for value in values)])
