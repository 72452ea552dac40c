"""The columns of a file of numbers, and whether its first line is a header or data.

A line is a header if none of its cells is a number, if it has the name of a column in an option, if it starts with "#",
or if it counts three columns or more (0, 1, 2, ... as pandas names them) and the count does not continue below. A file
whose first line could be either is refused unless the option `header` decides. An unnamed column that counts the rows,
as pandas and R write it, is left out.
"""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from medfuncta_jax.datasets.dataset import DataError
from medfuncta_jax.datasets.delimited import delimiter_of, read_rows, shown

_log = logging.getLogger(__name__)

# Minimum number of columns for a header that counts them, and for evenly spaced numbers that may be a header.
_COUNTED, _EVEN = 3, 8


@dataclass(frozen=True)
class Columns:
    """The columns of a file.

    Attributes:
      width: number of columns.
      header: whether the first line names them.
      bare_commas: whether commas separate the columns and no header states their number.
      samples: the columns of samples.
      at: the other columns, by the option that names them.
      names: names of all columns; () without a header.
    """

    width: int
    header: bool
    bare_commas: bool
    samples: tuple[int, ...]
    at: Mapping[str, int]
    names: tuple[str, ...] = ()

    @classmethod
    def of_file(
        cls, path: Path, header: Literal["auto", "yes", "no"], named: Mapping[str, str], samples: tuple[str, ...] = ()
    ) -> Columns:
        """Read the columns from the first line, and from the lines below if the first line could be either.

        Args:
          path: the file.
          header: "yes" or "no" if it is known.
          named: the columns that hold no samples, by the option that names them: a name in the header, or a position
            ("0" is the first, "-1" the last); "" for none.
          samples: the columns of samples, named likewise; empty takes all others.
        Raises:
          DataError: names the file: unreadable, empty, a column that is not there, or a first line of either kind.
        """
        first, marked = _without_mark(next(read_rows(path), (1, []))[1])
        if not first:
            raise DataError(f"{path}: holds no numbers; remove the file")
        named = {option: name for option, name in named.items() if name}
        text = {_by_number(name, len(first)) for name in named.values() if name not in first}
        asked = [name for name in (*named.values(), *samples) if _by_number(name, len(first)) is None]
        if header == "auto":
            numbers = [i for i in range(len(first)) if i not in text]
            is_header = marked or any(name in first for name in asked) or _is_header(path, first, numbers)
        else:
            is_header = header == "yes"
        at = {option: _position(path, first, is_header, name, option) for option, name in named.items()}
        chosen = tuple(_position(path, first, is_header, name, "columns") for name in samples)
        if not chosen:
            index = {0} if is_header and not first[0] and 0 not in at.values() and _counts_rows(path) else set()
            chosen = tuple(i for i in range(len(first)) if i not in {*at.values(), *index})
        bare = not is_header and delimiter_of(path) == ","
        return cls(len(first), is_header, bare, chosen, at, tuple(first) if is_header else ())

    def rows(self, path: Path) -> Iterator[tuple[int, list[str]]]:
        """The lines below the header; all as long as the first."""
        for line, row in itertools.islice(read_rows(path), int(self.header), None):
            if len(row) != self.width:
                raise DataError(f"{path}: line {line} has {len(row)} cells, line 1 has {self.width}; repair the line")
            yield line, row


def _without_mark(first: list[str]) -> tuple[list[str], bool]:
    """A first line without the "#" that some writers put before a header, and whether there was one."""
    if not first or not first[0].startswith("#"):
        return first, False
    name = first[0].lstrip("# ")
    return ([name, *first[1:]] if name else first[1:]), True


def _is_header(path: Path, first: list[str], numbers: list[int]) -> bool:
    """Whether the first line names the columns.

    Args:
      path: the file, for the lines below.
      first: the cells.
      numbers: the cells that are numbers if the line is data.
    Raises:
      DataError: it could be either.
    """
    cells = [first[i] for i in numbers]
    values = [_as_float(cell) for cell in cells]
    if any(cells) and all(value is None for value in values):
        return True
    if not first[0] and cells[1:] == [str(i) for i in range(len(cells) - 1)]:  # the index that pandas writes
        return True
    counted = cells == [str(i) for i in range(len(cells))] or (
        first[0] == "0" and all(first[i] == str(i) for i in numbers)
    )
    plain = all(cell == str(i) for i, cell in enumerate(first))  # no names beside the numbers
    with np.errstate(all="ignore"):
        steps = np.diff([np.nan if value is None else value for value in values])
        even = len(cells) >= _EVEN and steps[0] != 0 and np.allclose(steps, steps[0], rtol=1e-3)
    even = even or (len(cells) >= _COUNTED and values == list(range(len(cells))))  # 0.0, 1.0, 2.0
    if not cells or not (counted or even):
        return False
    below = [
        [row[i] for i in numbers] for _, row in itertools.islice(read_rows(path), 1, None) if len(row) == len(first)
    ]
    if not below or _goes_on(values, [_as_float(cell) for cell in below[0]]):
        return False
    written = [{_is_whole(row[k]) for row in below if row[k]} for k in range(len(cells))]
    if counted and any(len(kinds) > 1 for kinds in written) and len(cells) < _COUNTED:
        return False  # a writer may leave out ".0", so "0" is a sample like others
    if counted and len(cells) >= (_COUNTED if plain else _EVEN) and all(len(kinds) == 1 for kinds in written):
        return True
    begin = ", ".join(map(shown, cells[:4])) + ", ..." * (len(cells) > 4)
    raise DataError(f"{path}: line 1 ({begin}) could be a header or data; say which with data.header=yes or no")


def _goes_on(first: list[float | None], second: list[float | None]) -> bool:
    """Whether each number of the second line is one higher than in the first line."""
    return all(a is not None and b == a + 1 for a, b in zip(first, second, strict=True))


def _is_whole(cell: str) -> bool:
    return re.fullmatch(r"[+-]?\d+", cell) is not None


def _as_float(cell: str) -> float | None:
    """The number in a cell, also NaN and infinity, which are refused later."""
    try:
        return float(cell)
    except ValueError:
        return None


def _counts_rows(path: Path) -> bool:
    """Whether the first column, which has no name, counts the lines below the header.

    Raises:
      DataError: it holds something else.
    """
    cells = [row[0] for _, row in itertools.islice(read_rows(path), 1, None) if row]
    if not all(_is_whole(cell) for cell in cells) or any(int(b) - int(a) != 1 for a, b in itertools.pairwise(cells)):
        raise DataError(
            f"{path}: its first column has no name and does not count the rows; name it in line 1 or remove it"
        )
    _log.info("%s: its first column has no name and counts the rows, and is left out", path)
    return True


def _by_number(name: str, width: int) -> int | None:
    if not (name.isascii() and name.removeprefix("-").isdigit()):
        return None
    at = int(name)
    return at % width if -width <= at < width else None


def _position(path: Path, first: list[str], header: bool, name: str, setting: str) -> int:
    if header and first.count(name) == 1:
        return first.index(name)
    at = _by_number(name, len(first))
    if at is None:
        have = ", ".join(shown(cell) for cell in first[:20]) if header else f"{len(first)} columns without a header"
        raise DataError(f"{path}: no column {shown(name)}, it has {have}; change data.{setting}")
    return at
