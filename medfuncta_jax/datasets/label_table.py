"""A table of labels and patients beside a folder of signals, such as `participants.csv`.

A header line names the columns. The column "file", "filename", "path", "name" or "id", or else the first, says which
signal a row is about: its name relative to the data directory, its file name, either without suffixes, or the name of a
folder that it is in, so that one row can stand for all files of a patient. The most specific row counts.
"""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from medfuncta_jax.datasets.dataset import DataError, Task
from medfuncta_jax.datasets.delimited import read_rows, shown
from medfuncta_jax.datasets.prepared import file_md5

_log = logging.getLogger(__name__)

_NAME_COLUMNS = ("file", "filename", "path", "name", "id")

# "n/a" is what BIDS tables write.
_NO_VALUE = ("", "n/a")


@dataclass(frozen=True)
class Labels:
    """What is known of the signals by name.

    Attributes:
      classes: in order; empty if there are no labels.
      labels: the class of each signal that has one; others have -1.
      patients: the patient of every signal; None if not known.
      about: JSON-able: where this is from.
    """

    classes: tuple[str, ...]
    labels: Mapping[str, int]
    patients: Mapping[str, str] | None
    about: dict[str, Any]

    @property
    def task(self) -> Task:
        """What the labels mean."""
        return "none" if not self.classes else "binary-class" if len(self.classes) == 2 else "multi-class"


def ordered_classes(values: Iterable[str]) -> tuple[str, ...]:
    """The different values in sorted order; by size if all are whole numbers of no more than 18 digits."""
    different = sorted(set(values))
    if all(re.fullmatch(r"-?[0-9]{1,18}", value) for value in different):
        different.sort(key=int)
    return tuple(different)


def labels_of(
    values: Mapping[str, str],
    patients: Mapping[str, str] | None,
    about: dict[str, Any],
    classes: tuple[str, ...] | None = None,
) -> Labels:
    """Labels from the values of the signals: the name of a class, or "" or "n/a" for none.

    Args:
      values: by signal.
      patients: by signal, "" or "n/a" for a patient of its own; None if not known.
      about: JSON-able: where this is from.
      classes: all there are; None takes those in `values`.
    """
    named = {name: value for name, value in values.items() if value not in _NO_VALUE}
    classes = ordered_classes(named.values()) if classes is None else classes
    number = {value: i for i, value in enumerate(classes)}
    if patients is not None:
        # With a word before it, no stated patient can be the same as a signal without one.
        patients = {
            name: f"signal {name}" if patient in _NO_VALUE else f"patient {patient}"
            for name, patient in patients.items()
        }
        if alone := sum(patient.startswith("signal ") for patient in patients.values()):
            _log.warning("%d signals have no patient stated; each is taken to be a patient of its own", alone)
    return Labels(classes, {name: number[value] for name, value in named.items()}, patients, about)


def read_label_table(path: Path, names: Sequence[str], *, label_column: str, patient_column: str) -> Labels:
    """The labels and patients of named signals from a table.

    Cells that are empty or "n/a" hold no label. Every value in the label column is a class, whether a signal has it or
    not, so that a part of the signals has the same classes as all. What does not match is logged.

    Args:
      path: CSV or TSV with a header line.
      names: of the signals, unique, "/" between folders.
      label_column: "" takes the column "label" if there is one, or none if `patient_column` is given.
      patient_column: "" if patients are not known.
    Raises:
      DataError: names the file: unreadable, a column missing or twice, a short or long row, two rows for one signal,
        a row for several files of different folders, or no row for any signal.
    """
    rows = read_rows(path)
    header = next(rows, (1, []))[1]
    if len(header) < 2:
        raise DataError(f"{path}: no table with two columns or more (a header line, then one row a signal)")
    if not label_column and ("label" in header or not patient_column):
        label_column = "label"
    name_at = next((i for i, column in enumerate(header) if column.lower() in _NAME_COLUMNS), 0)
    label_at, patient_at = (_column(path, header, name) for name in (label_column, patient_column))
    found: dict[str, tuple[int, str, str]] = {}
    for line, row in rows:
        if not any(row):  # spreadsheets leave such rows at the end
            continue
        if len(row) != len(header):
            raise DataError(f"{path}: line {line} has {len(row)} cells, the header has {len(header)}; repair the row")
        key = _normal(row[name_at])
        if key in found:
            raise DataError(f"{path}: lines {found[key][0]} and {line} are both for {shown(row[name_at])}; keep one")
        found[key] = (
            line,
            "" if label_at is None else row[label_at],
            "" if patient_at is None else row[patient_at],
        )
    matched = _matched(path, names, found)
    values = {name: found[key][1] for name, key in matched.items()}
    patients = {name: found[matched[name]][2] if name in matched else "" for name in names}
    classes = ordered_classes(label for _, label, _ in found.values() if label not in _NO_VALUE)
    _report(path, names, values if label_at is not None else None, len(set(found) - set(matched.values())), classes)
    about = {"file": path.name, "md5": file_md5(path)}
    return labels_of(values, patients if patient_at is not None else None, about, classes)


def _column(path: Path, header: list[str], name: str) -> int | None:
    if not name:
        return None
    if header.count(name) != 1:
        problem = "several columns" if name in header else "no column"
        columns = ", ".join(shown(column) for column in header[:20])
        raise DataError(
            f"{path}: {problem} {shown(name)}, it has {columns}; name one with --config.data.label_column or "
            "patient_column"
        )
    return header.index(name)


def _matched(path: Path, names: Sequence[str], found: dict[str, tuple[int, str, str]]) -> dict[str, str]:
    """The row's key of each signal that has one."""
    matched: dict[str, str] = {}
    by_file: dict[str, str] = {}
    for name in names:
        place = PurePosixPath(_normal(name))
        pieces = place.name.split(".")
        short = [".".join(pieces[:n]) for n in range(len(pieces), 0, -1)]
        whole = [str(place.parent / one) for one in short if one]
        folders = [part for parent in place.parents for part in (str(parent), parent.name)]
        key = next((key for key in (*whole, *short, *folders) if key and key in found), None)
        if key is None:
            continue
        if key in short and key not in folders:
            if key in by_file:
                raise DataError(
                    f"{path}: line {found[key][0]} ({shown(key)}) could be {shown(by_file[key])} or {shown(name)}; "
                    "write names with their folders and suffixes, relative to the data directory"
                )
            by_file[key] = name
        matched[name] = key
    if not matched:
        raise DataError(
            f"{path}: no row names a signal: rows are like {shown(next(iter(found), ''))}, signals like "
            f"{shown(names[0])}; write file names, relative to the data directory"
        )
    return matched


def _report(
    path: Path, names: Sequence[str], values: dict[str, str] | None, rows_left: int, classes: tuple[str, ...]
) -> None:
    if rows_left:
        _log.warning("%s: %d rows are for no signal that is there", path, rows_left)
    if values is None:
        return
    labelled = sum(value not in _NO_VALUE for value in values.values())
    if labelled < len(names):
        _log.warning("%s: %d of %d signals have no label (-1)", path, len(names) - labelled, len(names))
    if len(classes) > max(10, labelled // 2):
        _log.warning("%s: %d different labels for %d signals; is this column a class?", path, len(classes), labelled)


def _normal(name: str) -> str:
    """One spelling for names that look alike: some systems write an accent as a character of its own."""
    return unicodedata.normalize("NFC", name.replace("\\", "/")).removeprefix("./")
