"""Arrays in .npz files, read item by item: nothing is unpickled, and memory does not grow with the array."""

from __future__ import annotations

import contextlib
import math
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from medfuncta_jax.datasets.dataset import DataError

# Deflate cannot do better than this, so an entry that claims more is corrupt or a bomb.
_LARGEST_DEFLATE_RATIO = 1032


@dataclass(frozen=True)
class ArrayInFile:
    """An array of a .npz file by its header; `items` reads it.

    Attributes:
      path, key: the file and the array's name.
      shape, dtype: as the header states, checked against the size in the file.
    """

    path: Path
    key: str
    shape: tuple[int, ...]
    dtype: np.dtype

    def items(self) -> Iterator[np.ndarray]:
        """The entries of the first axis, one by one; the checksum is verified after the last.

        Raises:
          DataError: truncated or corrupt.
        """
        size = self.dtype.itemsize * math.prod(self.shape[1:])
        with contextlib.ExitStack() as stack:
            with _damage_named(self.path, self.key):
                archive = stack.enter_context(zipfile.ZipFile(self.path))
                stream = stack.enter_context(archive.open(f"{self.key}.npy"))
                _header(stream)
            for _ in range(self.shape[0]):
                with _damage_named(self.path, self.key):
                    item = stream.read(size)
                    if len(item) != size:
                        raise EOFError("the array ends too early")
                yield np.frombuffer(item, self.dtype).reshape(self.shape[1:])  # outside: what a caller throws passes
            with _damage_named(self.path, self.key):
                if stream.read(1):  # reading the end is what makes zipfile compare the checksum
                    raise ValueError("the array is longer than its header states")

    def read(self) -> np.ndarray:
        """The whole array, [*shape].

        Raises:
          DataError: truncated or corrupt.
        """
        return np.stack(list(self.items())) if self.shape[0] else np.empty(self.shape, self.dtype)


def npz_arrays(path: Path) -> dict[str, ArrayInFile]:
    """The arrays of a .npz file, by name, from their headers alone.

    Raises:
      DataError: no such file, not a .npz file, truncated, an array of anything but numbers (Python objects above all),
        Fortran order, or a header that does not agree with the size of its array and of the file.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    arrays = {}
    with _damage_named(path, ""), zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if not entry.filename.endswith(".npy"):
                continue
            key = entry.filename.removesuffix(".npy")
            with archive.open(entry) as stream:
                shape, fortran, dtype = _header(stream)
                start = stream.tell()
            if dtype.hasobject:
                raise ValueError(f"{key} holds Python objects, which are never loaded")
            if not shape or (fortran and len(shape) > 1):
                raise ValueError(f"{key} is a scalar or in Fortran order; save it as a C-ordered array")
            if dtype.kind not in "biufc" or min(shape) < 0 or 0 in shape[1:]:
                raise ValueError(f"{key} is {dtype} {shape}, no array of numbers")
            if entry.file_size != start + dtype.itemsize * math.prod(shape):
                raise ValueError(f"the header of {key}, {shape} {dtype}, does not agree with its size")
            held = min(entry.compress_size, path.stat().st_size)
            if entry.file_size > _LARGEST_DEFLATE_RATIO * held + 1024:
                raise ValueError(f"{key} claims more data than the file can hold")
            arrays[key] = ArrayInFile(path, key, shape, dtype)
    return arrays


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(stream)
    reader = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if reader is None:
        raise ValueError(f"unknown version {version} of the array format")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the spelling of old headers
        return reader(stream)


@contextlib.contextmanager
def _damage_named(path: Path, key: str) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # zipfile, its decompressors and numpy's parser raise nearly anything on broken data
        place = f"{path} ({key})" if key else f"{path}"
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{place}: truncated or corrupt .npz file ({reason}); copy or download it anew") from error
