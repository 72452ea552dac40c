"""Arrays in .npz files, read item by item: nothing is unpickled, and memory does not grow with an array in C order.

Honoured: the whole header, that is the type, byte order, shape and order of an array (an array in Fortran order is read
as a whole).
Refused: Python objects and texts, sizes that do not agree with the file, and damage.
"""

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

from medfuncta_jax.datasets.contents import contents
from medfuncta_jax.datasets.dataset import DataError

# Largest ratio that deflate reaches; an entry that claims more is corrupt or a decompression bomb.
_LARGEST_DEFLATE_RATIO = 1032

_DAMAGED = "truncated or corrupt .npz file"


@dataclass(frozen=True)
class ArrayInFile:
    """An array of a .npz file by its header; `items` reads it.

    Attributes:
      path, key: the file and the array's name.
      shape, dtype: as the header states, checked against the size in the file.
      fortran: whether the first axis runs fastest in the file.
    """

    path: Path
    key: str
    shape: tuple[int, ...]
    dtype: np.dtype
    fortran: bool = False

    def items(self) -> Iterator[np.ndarray]:
        """The entries of the first axis, one by one; the checksum is verified after the last.

        Raises:
          DataError: truncated or corrupt.
        """
        # In Fortran order an entry is spread over the whole array, so the array is read at once.
        count, shape = (1, self.shape) if self.fortran else (self.shape[0], self.shape[1:])
        size = self.dtype.itemsize * math.prod(shape)
        with contextlib.ExitStack() as stack:
            with _damage_named(self.path, self.key):
                archive = stack.enter_context(zipfile.ZipFile(self.path))
                stream = stack.enter_context(archive.open(f"{self.key}.npy"))
                _header(stream)
            for _ in range(count):
                with _damage_named(self.path, self.key):
                    item = stream.read(size)
                    if len(item) != size:
                        raise EOFError("the array ends too early")
                values = np.frombuffer(item, self.dtype).reshape(shape, order="F" if self.fortran else "C")
                yield from values if self.fortran else [values]  # outside, so that exceptions of the caller pass
            with _damage_named(self.path, self.key):
                if stream.read(1):  # zipfile compares the checksum only when the end is read
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
        or a header that does not agree with the size of its array and of the file.
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
                raise DataError(f"{path}: {key} holds Python objects, which are never loaded; save an array of numbers")
            if not shape or dtype.kind not in "biufc" or min(shape) < 0 or 0 in shape[1:]:
                raise DataError(
                    f"{path}: {key} is {dtype} {shape}, no array of numbers; save it as one or leave it out"
                )
            held = min(entry.compress_size, path.stat().st_size)
            problem = ""
            if entry.file_size != start + dtype.itemsize * math.prod(shape):
                problem = f"the header of {key}, {shape} {dtype}, does not agree with its size"
            elif entry.file_size > _LARGEST_DEFLATE_RATIO * held + 1024:
                problem = f"{key} claims more data than the file can hold"
            if problem:
                raise DataError(f"{path}: {_DAMAGED} ({problem}); copy or download it anew")
            arrays[key] = ArrayInFile(path, key, shape, dtype, fortran and len(shape) > 1)
    return arrays


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(stream)
    reader = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if reader is None:
        raise ValueError(f"unknown version {version} of the array format")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the format of old headers
        return reader(stream)


@contextlib.contextmanager
def _damage_named(path: Path, key: str) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except (PermissionError, IsADirectoryError) as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the file") from error
    except MemoryError as error:
        raise DataError(
            f"{path}: {key} does not fit into memory; save it in C order, which is read in parts"
        ) from error
    except Exception as error:  # zipfile, its decompressors and numpy's parser raise nearly anything on broken data
        place = f"{path} ({key})" if key else f"{path}"
        what = contents(path)
        if isinstance(error, (RuntimeError, NotImplementedError)):  # zipfile's errors about a password or a method
            reason, remedy = (
                "encrypted or compressed in a way that is not read",
                "save it anew with numpy.savez_compressed",
            )
        elif what not in ("", "a ZIP archive"):
            reason, remedy = f"it is {what}, no archive of arrays", "copy or download it anew"
        else:
            reason, remedy = "its bytes are damaged or end too early", "copy or download it anew"
        raise DataError(f"{place}: {_DAMAGED} ({reason}); {remedy}") from error
