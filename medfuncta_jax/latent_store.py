"""The latents of a data set as a data set: files of consecutive signals (`latent_file`), opened as one.

Files are written whole or not at all, so a store is complete once all are there.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import operator
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from medfuncta_jax.checkpoint import FIELD_FILE, CheckpointError
from medfuncta_jax.latent_file import REMEDY, LatentFile, LatentStoreError, file_name
from medfuncta_jax.units import Units

_NAME = re.compile(r"(?P<split>.+)-(?P<part>\d{5,})-of-(?P<parts>\d{5,})\.safetensors")


def field_checksum(field: Path | str) -> str:
    """SHA-256 of an exported field, which identifies the field of a store's latents.

    Args:
      field: a run directory, or an exported `field.safetensors`.
    Raises:
      CheckpointError: no such file.
    """
    file = Path(field) / FIELD_FILE if Path(field).is_dir() else Path(field)
    if not file.exists():
        raise CheckpointError(f"no trained field at {file}; train first, or name its run directory")
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


class Latents:
    """The latents of a split, an array [n, P] stored in files; rows are read on access.

    `latents[rows]` takes an int, a slice, or an array of ints or of n booleans, and gives a numpy array as numpy does;
    `np.asarray(latents)` reads all.
    """

    ndim = 2

    def __init__(self, files: Sequence[LatentFile]):
        self._parts = [file.arrays["latents"] for file in files]
        self._files = files
        self._stops = np.cumsum([len(part) for part in self._parts])

    @property
    def shape(self) -> tuple[int, int]:
        """(n, P)."""
        return int(self._stops[-1]), self._parts[0].shape[1]

    @property
    def dtype(self) -> np.dtype:
        """float32 or float16, native."""
        return self._parts[0].dtype.newbyteorder("=")

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> np.ndarray:
        if isinstance(rows, tuple):
            raise IndexError("latents are indexed by rows; take columns of the result: latents[rows][:, columns]")
        if isinstance(rows, slice):
            rows = range(*rows.indices(len(self)))
            if rows.step == 1:
                return self._consecutive(rows)
        indices = np.asarray(rows)
        if indices.dtype == bool:
            if indices.shape != (len(self),):
                raise IndexError(f"a mask of shape {indices.shape} for {len(self)} rows")
            indices = np.flatnonzero(indices)
        if indices.size == 0:  # an empty list has dtype float64
            indices = indices.astype(int)
        if not np.issubdtype(indices.dtype, np.integer):
            raise IndexError(f"rows must be integers, a slice or a mask, got {indices.dtype}")
        wrong = (indices < -len(self)) | (indices >= len(self))
        if wrong.any():
            raise IndexError(f"row {indices[wrong].flat[0]} of {len(self)}")
        return self._chosen(np.where(indices < 0, indices + len(self), indices))

    def _consecutive(self, rows: range) -> np.ndarray:
        out = np.empty((len(rows), self.shape[1]), self.dtype)
        for file, part, stop in zip(self._files, self._parts, self._stops, strict=True):
            start = stop - len(part)
            low, high = max(rows.start, start), min(rows.stop, stop)
            if low < high:
                out[low - rows.start : high - rows.start] = part[low - start : high - start]
                file.release()
        return out

    def _chosen(self, rows: np.ndarray) -> np.ndarray:
        flat = rows.reshape(-1)
        out = np.empty((flat.size, self.shape[1]), self.dtype)
        places = np.searchsorted(self._stops, flat, side="right")
        for place in np.unique(places):
            part, here = self._parts[place], places == place
            out[here] = part[flat[here] - (self._stops[place] - len(part))]
        return out.reshape(*rows.shape, self.shape[1])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("latents lie in files: an array of them is always a copy")
        return self[:] if dtype is None else self[:].astype(dtype, copy=False)

    def __reduce__(self):
        return Latents, (self._files,)

    def __repr__(self) -> str:
        return f"Latents(shape={self.shape}, dtype={self.dtype}, files={len(self._parts)})"


class LatentSplit:
    """The fitted signals of one split, in the order of the data set.

    A split is also a source of examples with random access, as `tfds.data_source`, `grain.MapDataset.source` and
    PyTorch's `DataLoader` take one: `split[i]` is a dict of `latent` [P], `label` (an int, or [tasks]), `id` (a str),
    `psnr` (a float, dB) and, where signals have one, `affine` [4, 4]. Only headers are read on opening, data on access.

    Attributes:
      latents: `Latents`, float32 or float16 [n, P].
      about: settings of the run, grid, channels, classes, task, data, the field's checksum.
      files: in the order of their rows.
    """

    def __init__(self, files: Sequence[LatentFile]):
        """Join the files of one split, in order; `load_latents` checks the files first."""
        self.files = tuple(files)
        self.about = files[0].common
        self.latents = Latents(self.files)

    @cached_property
    def labels(self) -> np.ndarray:
        """int64 [n], or [n, tasks] for multi-label sets; -1 where there is none."""
        return self._joined("labels")

    @cached_property
    def psnr(self) -> np.ndarray:
        """float32 [n], dB, of the clipped reconstruction from the latent as stored."""
        return self._joined("psnr")

    @cached_property
    def affines(self) -> np.ndarray | None:
        """float64 [n, 4, 4] voxel of the training grid to world (mm, RAS+), or None for signals that have none."""
        return self._joined("affines") if "affines" in self.files[0].arrays else None

    @cached_property
    def ids(self) -> tuple[str, ...]:
        """n names."""
        return tuple(itertools.chain.from_iterable(file.ids for file in self.files))

    @cached_property
    def units(self) -> tuple[Units, ...]:
        """The n original units of the signals, which convert decoded values from [0, 1]."""
        return tuple(itertools.chain.from_iterable(file.units for file in self.files))

    def _joined(self, name: str) -> np.ndarray:
        return np.concatenate([file.arrays[name] for file in self.files])

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Iterable[int]) -> list[dict[str, Any]]:
        """Several examples at once."""
        rows = np.array([operator.index(i) for i in indices], int)
        examples = []
        for i, latent in zip(rows, self.latents[rows], strict=True):
            label = self.labels[i]
            example = {
                "latent": latent,
                "label": int(label) if label.ndim == 0 else label,
                "id": self.ids[i],
                "psnr": float(self.psnr[i]),
            }
            examples.append(example if self.affines is None else example | {"affine": self.affines[i]})
        return examples

    def __repr__(self) -> str:
        return f"LatentSplit({self.about['split']!r}, {self.latents!r})"


def load_latents(
    directory: Path | str,
    *,
    splits: Sequence[str] | None = None,
    field: Path | str | None = None,
    verify: bool = False,
) -> dict[str, LatentSplit]:
    """Open a store: headers are read and checked now, latents when they are used.

    Args:
      directory: a `latents` folder, or the run directory that holds one.
      splits: which; None is all.
      field: a run directory or `field.safetensors`; latents of any other field are then refused.
      verify: read all files and compare their checksums.
    Returns:
      split name -> LatentSplit, in the order train, val, test where these are the names.
    Raises:
      LatentStoreError: nothing there; a file that is missing, there twice, of another field or other settings than
        the rest, or damaged. The message names it.
      CheckpointError: `field` is not there.
    """
    directory = Path(directory)
    folder = directory / "latents" if (directory / "latents").is_dir() else directory
    found = _files_by_split(folder, splits)
    if not any(folder.glob("*.safetensors")):
        raise LatentStoreError(f"no latents in {folder}; extract them first")
    lengths: dict[str, int] | None = None
    opened: dict[str, list[LatentFile]] = {}
    for name in found:
        opened[name] = [LatentFile(path) for path in found[name]]
        for file in opened[name] if verify else ():
            if not file.is_whole():
                raise LatentStoreError(f"{file.path} is damaged (its checksum differs); remove it and {REMEDY}")
        _check_rows(name, opened[name])
        lengths = opened[name][0].about["splits"]
    absent = [name for name in (lengths or () if splits is None else splits) if name not in found]
    if absent:
        raise LatentStoreError(
            f"no latents of a split {absent[0]!r} in {folder}: there is none of that name, or the store is still being "
            f"written, or a job of it did not end; {REMEDY}"
        )
    files = [file for name in opened for file in opened[name]]
    if field is not None:
        _check_field(files, field)
    _check_alike(files)
    order = [name for name in lengths or () if name in opened]
    return {name: LatentSplit(opened[name]) for name in order}


def _files_by_split(folder: Path, splits: Sequence[str] | None) -> dict[str, list[Path]]:
    """The files of each requested split, in order; a missing file or a second set of files is an error."""
    found: dict[str, dict[int, set[int]]] = {}
    for path in sorted(folder.glob("[!.]*.safetensors")):
        match = _NAME.fullmatch(path.name)
        if match and (splits is None or match["split"] in splits):
            found.setdefault(match["split"], {}).setdefault(int(match["parts"]), set()).add(int(match["part"]))
    for name, layouts in found.items():
        if len(layouts) > 1:
            examples = " and ".join(file_name(name, min(there), parts) for parts, there in sorted(layouts.items()))
            raise LatentStoreError(
                f"{folder} holds the split {name!r} more than once ({examples}); remove the files of all but one set"
            )
        ((parts, there),) = layouts.items()
        missing = sorted(set(range(parts)) - there)
        if missing:
            more = f" and {len(missing) - 1} more are" if missing[1:] else " is"
            raise LatentStoreError(
                f"{folder / file_name(name, missing[0], parts)}{more} missing: the store is still being written, or a "
                f"job of it did not end; {REMEDY} (for a job array with its extract.shard and shards)"
            )
    return {
        name: [folder / file_name(name, k, n) for n in layouts for k in range(n)] for name, layouts in found.items()
    }


def _check_rows(name: str, files: Sequence[LatentFile]) -> None:
    """Check that the files of a split have no gaps, and end where the split ends."""
    expected = 0
    for file in files:
        start, stop = file.about["rows"]
        if file.about["split"] != name or start != expected:
            raise LatentStoreError(
                f"{file.path} holds rows {start} to {stop} of split {file.about['split']!r}, where row {expected} of "
                f"{name!r} belongs: a copy of another file, or renamed; remove it and {REMEDY}"
            )
        expected = stop
    length = files[0].about["splits"][name]
    if expected != length:
        raise LatentStoreError(f"{files[-1].path} ends at row {expected} of {length}; remove it and {REMEDY}")


def _check_field(files: Sequence[LatentFile], field: Path | str) -> None:
    checksum = field_checksum(field)
    for file in files:
        if file.about["field_sha256"] != checksum:
            raise LatentStoreError(
                f"{file.path} holds latents of another field than {field}; extract again, or name the field "
                "they were fitted with"
            )


def _check_alike(files: Sequence[LatentFile]) -> None:
    """Check that all files come from one field, one data set and the same settings."""

    def shared(file: LatentFile) -> dict[str, Any]:
        latents = file.arrays["latents"]
        return file.common | {"split": None, "dtype": latents.dtype.str, "latent size": latents.shape[1]}

    alike: dict[str, list[LatentFile]] = {}
    for file in files:
        alike.setdefault(json.dumps(shared(file), sort_keys=True), []).append(file)
    if len(alike) > 1:
        most, *_, fewest = (some[0] for some in sorted(alike.values(), key=len, reverse=True))
        differing = sorted(name for name, value in shared(fewest).items() if shared(most).get(name) != value)
        what = "latents of another field" if "field_sha256" in differing else f"other {', '.join(differing)}"
        raise LatentStoreError(
            f"{fewest.path} has {what} than {most.path.name}: the store is being extracted anew, or files of two were "
            "mixed; extract again"
        )
