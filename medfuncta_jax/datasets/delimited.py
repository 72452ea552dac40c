"""Delimited text (CSV, TSV, columns between blanks): rows with their line numbers, and what is a number in them."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from pathlib import Path

from medfuncta_jax.datasets.dataset import DataError

_DELIMITERS = ",;\t"


def read_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The rows of a text file in UTF-8, one by one; blank lines are skipped.

    The delimiter is the one of comma, semicolon and tab that the first line holds most of; blanks if it has none.

    Yields:
      The line number, from 1, and the cells without blanks around them.
    Raises:
      DataError: no such file, not UTF-8 text, or quotes that do not close.
    """
    line = 0
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            file.seek(0)
            delimiter = max(_DELIMITERS, key=first.count)
            if delimiter in first:
                rows = csv.reader(file, delimiter=delimiter, strict=True, skipinitialspace=True)
            else:
                rows = csv.reader((" ".join(text.split()) for text in file), delimiter=" ", strict=True)
            for row in rows:
                line = rows.line_num
                if row and row != [""]:
                    yield line, [cell.strip() for cell in row]
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not text in UTF-8 (byte {error.start}); save it as CSV in UTF-8") from error
    except csv.Error as error:
        raise DataError(f"{path}: line {line + 1}: not a readable table ({error}); repair the file") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); check the file") from error


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
    """A cell as it stands in a message: quoted, in one line, not too long."""
    return repr(cell if len(cell) <= 40 else f"{cell[:37]}...")
