"""The latents of a data set: one file a split, with what is needed to read it by itself."""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medfuncta_jax.atomic import atomic_path


class LatentStoreError(ValueError):
    """A latent store is absent or damaged; the message names the file."""


@dataclass(frozen=True)
class LatentSplit:
    """The fitted signals of one split, in the order of the data set.

    Attributes:
      latents: float32 [n, P].
      labels: int [n], or [n, tasks] for multi-label sets; -1 where there is none.
      ids: n strings.
      psnr: float32 [n], of the clipped reconstruction, in dB.
      affines: float64 [n, 4, 4] voxel to world (mm, RAS+), or None for signals that have none.
      about: settings of the run, grid, classes, the field's checksum.
    """

    latents: np.ndarray
    labels: np.ndarray
    ids: tuple[str, ...]
    psnr: np.ndarray
    affines: np.ndarray | None
    about: dict[str, Any]


def write_split(path: Path | str, split: LatentSplit) -> None:
    """Write one split to one .npz file, whole or not at all."""
    arrays: dict[str, np.ndarray] = {
        "latents": split.latents,
        "labels": split.labels,
        "ids": np.asarray(split.ids, dtype=np.str_),
        "psnr": split.psnr,
        "about": np.asarray(json.dumps(split.about)),
    }
    if split.affines is not None:
        arrays["affines"] = split.affines
    with atomic_path(path) as partial:
        np.savez(partial, allow_pickle=False, **arrays)


def read_split(path: Path | str) -> LatentSplit:
    """Read what `write_split` wrote.

    Raises:
      LatentStoreError: no such file, or a damaged one.
    """
    if not Path(path).exists():
        raise LatentStoreError(f"no latents at {path}; extract them first (--mode=extract)")
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as stored:
            return LatentSplit(
                latents=stored["latents"],
                labels=stored["labels"],
                ids=tuple(str(name) for name in stored["ids"]),
                psnr=stored["psnr"],
                affines=stored["affines"] if "affines" in stored.files else None,
                about=json.loads(str(stored["about"])),
            )
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise LatentStoreError(f"{path} is damaged; remove it and extract again (--mode=extract)") from error


def load_latents(directory: Path | str) -> dict[str, LatentSplit]:
    """All splits of a store.

    Args:
      directory: a `latents` folder, or the run directory that holds one.
    Returns:
      split name -> LatentSplit.
    Raises:
      LatentStoreError: nothing there, or a damaged file.
    """
    directory = Path(directory)
    folder = directory / "latents" if (directory / "latents").is_dir() else directory
    files = sorted(folder.glob("*.npz"))
    if not files:
        raise LatentStoreError(f"no latents in {folder}; extract them first (--mode=extract)")
    return {file.stem: read_split(file) for file in files}
