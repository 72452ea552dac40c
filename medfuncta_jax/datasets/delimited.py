"""Delimited text (CSV, TSV, columns between blanks): rows with line numbers, numeric cells and cells without a value.

A last line without a line break is refused if it looks cut: its last cell is shorter than all cells above it, which
have one format, or it is the beginning of a word in one of them.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from medfuncta_jax.datasets.dataset import DataError

_DELIMITERS = ",;\t"

# Spellings of a missing value in any case, and Python's, which counts only as written.
_NO_VALUE = {"", "na", "n/a", "<na>", "#na", "#n/a", "#n/a n/a", "nan", "-nan", "null"}
_NO_VALUE |= {"1.#ind", "-1.#ind", "1.#qnan", "-1.#qnan"}  # Microsoft's
_PYTHONS_NONE = "None"


def read_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The rows of a text file in UTF-8, one by one; blank lines are skipped.

    The delimiter is the most frequent of comma, semicolon and tab in the first line; blanks if it has none of these.

    Yields:
      The line number, from 1, and the cells without blanks around them.
    Raises:
      DataError: no such file, not UTF-8 text, or quotes that do not close.
    """
    line, ends = 0, _Ends()
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            delimiter = _delimiter(file.readline())
            file.seek(0)
            if delimiter == " ":
                rows = csv.reader((" ".join(text.split()) for text in ends.watched(file)), delimiter=" ", strict=True)
            else:
                rows = csv.reader(ends.watched(file), delimiter=delimiter, strict=True, skipinitialspace=True)
            for row in rows:
                line = rows.line_num
                if row and row != [""]:
                    cells = [cell.strip() for cell in row]
                    ends.add(cells[-1])
                    yield line, cells
            if ends.last_is_cut:
                raise DataError(
                    f"{path}: line {line} has no line break, and its last cell {shown(ends.last)} looks cut beside "
                    f"{shown(ends.before)}; copy the file anew, or end the line if it is whole"
                )
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not text in UTF-8 (byte {error.start}); save it as CSV in UTF-8") from error
    except csv.Error as error:
        reason = "a quote that is not closed or not alone, a zero byte, or a cell of more than 100000 characters"
        raise DataError(f"{path}: line {line + 1}: not a readable table ({reason}); repair the file") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); check the file") from error


def delimiter_of(path: Path) -> str:
    """The delimiter of a file: a comma, a semicolon, a tab, or " " for any blanks; see `read_rows`."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        return _delimiter(file.readline())


def _delimiter(first: str) -> str:
    most = max(_DELIMITERS, key=first.count)
    return most if most in first else " "


class _Ends:
    """The last cells of lines, to find out whether the last line is cut."""

    def __init__(self) -> None:
        self.last, self.before, self._line = "", "", "\n"
        self._count, self._shapes, self._words = 0, set[str](), set[str]()

    def watched(self, file: Iterable[str]) -> Iterator[str]:
        """The lines of a file; the last one is kept."""
        for text in file:
            self._line = text
            yield text

    def add(self, cell: str) -> None:
        """The last cell of the next row."""
        if self._count > 1:  # the first may be a header
            if finite_number(self.last) is None:
                self._words.add(self.last)
            else:
                self._shapes.add(_shape(self.last))
        self.last, self.before, self._count = cell, self.last, self._count + 1

    @property
    def last_is_cut(self) -> bool:
        """Whether the last line has no break and its last cell is only the beginning of a cell like the others."""
        if self._line.endswith(("\n", "\r")):
            return False
        if self._count > 3 and len(self._shapes) == 1 and not self._words:
            (shape,) = self._shapes
            mine = _shape(self.last)
            return len(mine) < len(shape) and shape.startswith(mine)
        words = self._words - {""}
        few = 2 * len(words) < self._count  # repeated words, such as classes, unlike names
        return few and bool(self.last) and self.last not in words and any(one.startswith(self.last) for one in words)


def _shape(number: str) -> str:
    """The decimals with every digit as 0: most writers give every line the same number of decimals."""
    return re.sub(r"\d", "0", number.partition(".")[2])


def stated(cell: str, no_value: Sequence[str] = ()) -> str | None:
    """A cell as it is, or None if it spells a missing value.

    Args:
      cell: without blanks around it.
      no_value: further spellings of a missing value beside the common ones (NA, nan, NULL and the like), in any case.
    """
    nothing = cell.casefold() in _NO_VALUE | {word.casefold() for word in no_value} or cell == _PYTHONS_NONE
    return None if nothing else cell


def finite_number(cell: str) -> float | None:
    """The finite number that a cell holds, or None."""
    # float() takes 1_000 too, which no other reader of such files does.
    if "_" in cell:
        return None
    try:
        value = float(cell)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def shown(cell: str) -> str:
    """A cell in the form for a message: quoted, in one line, not too long."""
    return repr(cell if len(cell) <= 40 else f"{cell[:37]}...")
