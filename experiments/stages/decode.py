"""Decoding: files of signals from their latents, at any resolution, in the signals' own units."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from experiments.runtime.interruption import StopRequest
from experiments.runtime.memory import host_free_bytes
from experiments.runtime.progress import Progress, log
from experiments.runtime.run import Run
from experiments.runtime.run_directory import RunError, write_json
from experiments.stages.signal_files import UNIT, file_name, suffix_of, units_said, write_list, write_signal
from medfuncta_jax.batched import decode_batches
from medfuncta_jax.checkpoint import load_field
from medfuncta_jax.field import Field, Params
from medfuncta_jax.latent_store import LatentSplit, load_latents
from medfuncta_jax.settings import SettingsError

# Signals decoded at once if the config gives no number.
_SIGNALS_AT_ONCE = 64


@dataclass(frozen=True)
class DecodeSettings:
    """Writing signals back to files from their latents.

    Attributes:
      splits: names of the splits.
      resolution: points along each axis of the grid; () is the training grid times `scale`.
      scale: > 0, points along each axis per point of the training grid.
      limit: number of signals per split, from the first; 0 is all.
      values: "own" writes the units and sample type of the signal's file; "unit" writes the scale [0, 1] of the field,
        images as 8-bit pictures.
    """

    splits: tuple[str, ...] = ("test",)
    resolution: tuple[int, ...] = ()
    scale: float = 1.0
    limit: int = 0
    values: Literal["own", "unit"] = "own"

    def __post_init__(self):
        if not self.splits:
            raise SettingsError("splits must name at least one split, e.g. ('test',)")
        check_grid(self.resolution, self.scale)
        if self.limit < 0:
            raise SettingsError(f"limit must not be negative, got {self.limit}")


def decode(run: Run) -> None:
    """Write `decoded/SPLIT/ROW-ID.nii.gz` (3D), `.png` or `.tif` (2D) or `.csv` (1D) from the field and the latents.

    Values are clipped to [0, 1], the scale the field was trained on, and written in the units of the signal's file (see
    `signal_files.write_signal`); `signals.csv` beside the files holds the scale of each. A grid other than that of
    training is written to `decoded/SPLIT-128x128`, and `decode.values=unit` to `decoded/SPLIT-unit`. Existing files are
    kept.

    Raises:
      CheckpointError, LatentStoreError: no field, or no latents of it.
      SettingsError: `decode` asks for what the field, the files or the memory cannot give.
      RunError: the folder holds files decoded otherwise.
      Interrupted: a stop was asked for; finished files are kept.
    """
    config, directory = run.settings.decode, run.directory
    field, params = load_field(directory.path)
    store = load_latents(directory.latents, splits=config.splits, field=directory.path)
    for name, split in store.items():
        trained = split.about["grid"]
        shape = decoded_shape(config.resolution, config.scale, trained)
        said = ("" if list(shape) == list(trained) else f"-{'x'.join(map(str, shape))}") + (
            "-unit" if config.values == "unit" else ""
        )
        folder = directory.results("decode") / "decoded" / f"{name}{said}"
        claim(folder, {"grid": list(shape), "values": config.values, "latents": split.about})
        count = write_split(
            field, params, split, folder, shape,
            count=min(config.limit or len(split), len(split)), own=config.values == "own",
            size=run.settings.fit.batch_size, stop=run.stop,
        )  # fmt: skip
        words = units_said(split.units) if config.values == "own" else "in [0, 1]"
        log.info("decode %s: %d files of %s in %s, %s", name, count, "x".join(map(str, shape)), folder, words)


def write_split(
    field: Field,
    params: Params,
    split: LatentSplit,
    folder: Path,
    shape: Sequence[int],
    *,
    count: int,
    own: bool,
    size: int,
    stop: StopRequest,
) -> int:
    """Decode the first `count` signals of a split on a grid and write missing files; returns `count`.

    Args:
      folder: the folder for the files and their `signals.csv`.
      own: whether to write the signals' own units, else [0, 1].
      size: signals decoded at once, 0 for the default.
    Raises:
      SettingsError: images of 2 channels or more than 3, or a grid too large for the memory.
    """
    if len(shape) == 2 and field.channels not in (1, 3):
        raise SettingsError(f"a PNG holds 1 or 3 channels, this field has {field.channels}")
    require_memory(shape, field.channels)
    units = [one if own else UNIT for one in split.units[:count]]
    suffixes = [suffix_of(len(shape), field.channels, one) for one in units]
    names = [file_name(row, count=len(split), name=split.ids[row], suffix=suffixes[row]) for row in range(count)]
    left = [row for row in range(count) if not (folder / names[row]).exists()]
    affines, trained = split.affines, split.about["grid"]
    with Progress(f"decode {split.about['split']}", total=count, done=count - len(left), unit="files") as progress:
        rows = iter(left)
        batches = decode_batches(
            field, params, split.latents, shape, rows=left, batch_size=size or _SIGNALS_AT_ONCE
        )  # fmt: skip
        for values in batches if left else ():
            for signal in np.clip(values, 0, 1):
                row = next(rows)
                affine = None if affines is None else affines[row]
                write_signal(folder / names[row], signal, units[row], trained=trained, affine=affine)
            progress.advance(len(values))
            stop.check(f"finished files are in {folder}")
    write_list(folder / "signals.csv", names, split.ids[:count], split.psnr[:count], units)
    return count


def require_memory(shape: Sequence[int], channels: int, *, group: str = "decode") -> None:
    """Refuse a grid if one signal on it does not fit into the host's memory.

    Args:
      group: the group of settings that the error names.
    Raises:
      SettingsError: says what it needs and what there is.
    """
    # Coordinates in float32 and float64, and copies of values: decoded, clipped, scaled and written.
    needed, free = math.prod(shape) * (12 * len(shape) + 32 * channels), host_free_bytes()
    if free is not None and needed > free:
        raise SettingsError(
            f"{group}.scale or {group}.resolution: a signal of {'x'.join(map(str, shape))} takes about "
            f"{needed / 1e9:.3g} GB of memory, and {free / 1e9:.3g} GB are free; decode at a coarser grid"
        )


def decoded_shape(
    resolution: tuple[int, ...], scale: float, trained: Sequence[int], *, group: str = "decode"
) -> tuple[int, ...]:
    """The grid to decode at.

    Args:
      resolution, scale: as in `DecodeSettings`.
      trained: points along each axis of the training grid.
      group: the group of settings that the error names.
    Raises:
      SettingsError: another number of axes, or several points along an axis that was trained with one.
    """
    if resolution and len(resolution) != len(trained):
        raise SettingsError(f"{group}.resolution must have {len(trained)} entries, got {resolution}")
    shape = resolution or tuple(max(1, round(n * scale)) if n > 1 else 1 for n in trained)
    for n, m in zip(trained, shape, strict=True):
        if n == 1 and m > 1:
            raise SettingsError(
                f"{group}.resolution must be 1 where the training grid {tuple(trained)} is, got {shape}"
            )
    return shape


def check_grid(resolution: tuple[int, ...], scale: float) -> None:
    """Refuse contradictory settings of a grid, for any training grid."""
    if min(resolution, default=1) < 1:
        raise SettingsError(f"resolution must be at least 1 everywhere, got {resolution}")
    if not scale > 0:
        raise SettingsError(f"scale must be above 0, got {scale}")
    if resolution and scale != 1.0:
        raise SettingsError("resolution and scale exclude each other; give one of them")


def claim(folder: Path, made_of: dict[str, Any], *, kind: str = "files decoded from other latents") -> None:
    """Record the origin of a folder's files, or compare with the record; partial files of a killed run are removed.

    Raises:
      RunError: it holds files made of something else, which `kind` names.
    """
    about = folder / "about.json"
    if about.exists():
        try:
            same = json.loads(about.read_text()) == made_of
        except ValueError:
            same = False
        if not same:
            raise RunError(f"{folder} holds {kind}; move or remove that folder")
    else:
        write_json(about, made_of)
    for stale in folder.glob(".*.partial*"):
        stale.unlink(missing_ok=True)
