"""One file of a latent store: consecutive signals of a split, readable by itself.

`SPLIT-00003-of-00012.safetensors` holds, row for row, `latents` [n, P], `labels`, `psnr`, `ids` (UTF-8, padded with
zeros), `units` (JSON of `units.Units`, padded likewise) and, where there are any, `affines`; its header holds one JSON
string, `about`. Files are written whole or not at all. `latent_store` opens the files of a store together.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from medfuncta_jax.atomic import atomic_path
from medfuncta_jax.units import Units

_DTYPES = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "I64": "<i8", "U8": "u1"}
# Entries of `about` that differ between the files of a split; the others are shared.
_OF_THE_FILE = ("rows", "sha256")
# The remedy that messages name for an unusable file.
REMEDY = "extract again, which fits only what is missing"


class LatentStoreError(ValueError):
    """A latent store is absent, incomplete, mixed or damaged; the one-line message names the file and the remedy."""


def file_name(split: str, part: int, parts: int) -> str:
    """The name of file `part` (from 0) of the `parts` files of a split."""
    return f"{split}-{part:05d}-of-{parts:05d}.safetensors"


def file_rows(length: int, signals_per_file: int) -> list[range]:
    """The rows of every file of a split of `length` signals; the layout depends on nothing else."""
    return [range(start, min(start + signals_per_file, length)) for start in range(0, length, signals_per_file)]


def write_file(
    path: Path | str,
    about: dict[str, Any],
    rows: range,
    *,
    latents: np.ndarray,
    labels: np.ndarray,
    ids: Sequence[str],
    psnr: np.ndarray,
    affines: np.ndarray | None,
    units: Sequence[Units] = (),
) -> None:
    """Write one file of a split, whole or not at all; the same content gives the same bytes.

    Args:
      path: in the store's folder, named by `file_name`.
      about: JSON values shared by all files of the split: `split` (its name), `splits` (the length of every split of
        the store), `field_sha256`, and further descriptions.
      rows: the n rows of the split that the file holds.
      latents: float32 or float16 [n, P].
      labels: int [n], or [n, tasks]; -1 where there is none.
      ids: n strings.
      psnr: [n], dB.
      affines: [n, 4, 4] voxel to world (mm, RAS+), or None.
      units: the n original units of signals scaled to [0, 1]; empty where they are not known.
    """
    arrays: dict[str, np.ndarray] = {
        "ids": _padded(ids),
        "labels": np.ascontiguousarray(labels, np.int64),
        "latents": np.ascontiguousarray(latents),
        "psnr": np.ascontiguousarray(psnr, np.float32),
    }
    if affines is not None:
        arrays["affines"] = np.ascontiguousarray(affines, np.float64)
    if units:
        arrays["units"] = _padded([one.to_json() for one in units])
    about = {**about, "rows": [rows.start, rows.stop]}
    about["sha256"] = _checksum(about, arrays)
    # Serialised in memory and written here, so that a full disk is an OSError.
    content = save(arrays, metadata={"about": json.dumps(about)})
    with atomic_path(path) as partial:
        partial.write_bytes(content)


def _padded(texts: Sequence[str]) -> np.ndarray:
    """uint8 [n, width]: UTF-8, padded with zeros."""
    encoded = np.array([text.encode() for text in texts])
    return encoded.view(np.uint8).reshape(len(texts), -1)


def _unpadded(array: np.ndarray) -> list[str]:
    return [text.decode() for text in array.reshape(-1).view(f"S{array.shape[1]}")]


def _checksum(about: dict[str, Any], arrays: dict[str, np.ndarray]) -> str:
    """SHA-256 of the entries and arrays of a file."""
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype.str} {arrays[name].shape}".encode())
        digest.update(arrays[name].data)
    return digest.hexdigest()


class LatentFile:
    """One file of a store, mapped into memory: opening reads its header, arrays are read as they are used.

    An open file keeps its content if the file on disk is replaced. Processes can share a file by pickling it.

    Attributes:
      path: the file's path.
      about: the JSON values of the header.
      arrays: by name, read-only.
    """

    path: Path
    about: dict[str, Any]
    arrays: dict[str, np.ndarray]

    def __init__(self, path: Path):
        """Open a file.

        Raises:
          LatentStoreError: it is gone, cut off, or no file of a store.
        """
        self.path = path
        try:
            with safe_open(path, "np") as checked:  # the header, and that the file has the length it states
                self.about = json.loads((checked.metadata() or {})["about"])
            # A row through safetensors' own slices takes 20 to 40 microseconds, through the mapped array below one.
            with open(path, "rb") as file:
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(size))
                self._mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self.arrays = {}
            for name, entry in header.items():
                if name != "__metadata__":
                    start, dtype = 8 + size + entry["data_offsets"][0], _DTYPES[entry["dtype"]]
                    count = int(np.prod(entry["shape"], dtype=int))
                    self.arrays[name] = np.frombuffer(self._mapped, dtype, count, start).reshape(entry["shape"])
            lengths = {len(self.arrays[name]) for name in ("ids", "labels", "latents", "psnr")}
            start, stop = self.about["rows"]
            known = {"field_sha256", "sha256", "split", "splits"} <= self.about.keys()
            if not known or self.about["split"] not in self.about["splits"] or lengths != {stop - start}:
                raise ValueError("the header and the arrays do not belong together")
        except FileNotFoundError:
            raise LatentStoreError(f"{path} is missing; {REMEDY}") from None
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise LatentStoreError(f"{path} is damaged or no file of a latent store; remove it and {REMEDY}") from error

    @property
    def common(self) -> dict[str, Any]:
        """The entries of `about` that all files of the split share."""
        return {name: value for name, value in self.about.items() if name not in _OF_THE_FILE}

    @property
    def ids(self) -> list[str]:
        """The names of its signals."""
        return _unpadded(self.arrays["ids"])

    @property
    def units(self) -> list[Units]:
        """The original units of its signals; the identity for stores without units."""
        if "units" not in self.arrays:
            return [Units()] * len(self.arrays["ids"])
        return [Units.from_json(text) for text in _unpadded(self.arrays["units"])]

    def is_whole(self) -> bool:
        """Whether the whole file has the checksum it was written with; reads all of it."""
        about = {name: value for name, value in self.about.items() if name != "sha256"}
        checksum = _checksum(about, self.arrays)
        self.release()
        return checksum == self.about["sha256"]

    def release(self) -> None:
        """Unmap the pages that were read, so that a pass over a store takes only the memory of a part.

        The system would reclaim such pages under pressure, but some clusters count them as the job's memory. Reads of
        single rows do not unmap pages: reading a row again would cost four times as much.
        """
        self._mapped.madvise(mmap.MADV_DONTNEED)

    def __reduce__(self):
        return _reopened, (self.path, self.about)


def _reopened(path: Path, about: dict[str, Any]) -> LatentFile:
    file = LatentFile(path)
    if file.about != about:
        raise LatentStoreError(f"{path} was written anew since the store was opened; open it again")
    return file
