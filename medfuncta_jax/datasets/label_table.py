"""A table of labels and patients beside a folder of signals, such as `participants.csv`.

A header line names the columns. The id column is the one that `id_column` names, or else "file", "filename", "path",
"name" or "id", or else the first. It names the signal of a row by the name relative to the data directory, the file
name, either without suffixes, or the name of a folder that contains the file, so that one row can stand for all files
of a patient. The most specific row counts.

If no row names a signal in this way, rows may stand for subjects: in another case; by the beginning of the name of a
file or folder (`sub-01` for `sub-01_T1w.nii.gz`, not for `sub-011`); or by a number in it (296 for
`IXI296-HH-1970_T1.nii.gz`). The first way that finds a row is used for all signals, and logged. A signal that fits two
rows is refused. If a row stands for several files and no column states patients, these files belong to one patient.
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
from medfuncta_jax.datasets.delimited import finite_number, read_rows, shown, stated
from medfuncta_jax.datasets.prepared import file_md5

_log = logging.getLogger(__name__)

# The line number of a row, its label and its patient.
_Row = tuple[int, str | None, str | None]

_NAME_COLUMNS = ("file", "filename", "path", "name", "id")


@dataclass(frozen=True)
class Labels:
    """Labels and patients of signals, by name.

    Attributes:
      classes: in order; empty if there are no labels.
      labels: the class of each signal that has one; others have -1.
      patients: the patient of every signal; None if not known.
      about: JSON-able: the origin of labels and patients.
    """

    classes: tuple[str, ...]
    labels: Mapping[str, int]
    patients: Mapping[str, str] | None
    about: dict[str, Any]

    @property
    def task(self) -> Task:
        """The meaning of the labels."""
        return "none" if not self.classes else "binary-class" if len(self.classes) == 2 else "multi-class"


def ordered_classes(values: Iterable[str]) -> tuple[str, ...]:
    """The different values in sorted order; by size if all are whole numbers of no more than 18 digits."""
    different = sorted(set(values))
    if all(re.fullmatch(r"-?[0-9]{1,18}", value) for value in different):
        different.sort(key=int)
    return tuple(different)


def labels_of(
    values: Mapping[str, str | None],
    patients: Mapping[str, str | None] | None,
    about: dict[str, Any],
    classes: tuple[str, ...] | None = None,
) -> Labels:
    """Labels from the values of the signals; the number of unlabelled signals is logged.

    Args:
      values: by signal, the name of a class or None; empty if there are no labels.
      patients: by signal, None for a patient of its own; None if not known.
      about: JSON-able: the origin of the labels.
      classes: all classes; None takes those in `values`.
    """
    named = {name: value for name, value in values.items() if value is not None}
    classes = ordered_classes(named.values()) if classes is None else classes
    number = {value: i for i, value in enumerate(classes)}
    if len(named) < len(values):
        _log.warning("%d of %d signals have no label (-1)", len(values) - len(named), len(values))
    if patients is not None:
        # The prefix keeps stated patients different from signals without a patient.
        units = {
            name: f"signal {name}" if patient is None else f"patient {patient}" for name, patient in patients.items()
        }
        if alone := sum(patient is None for patient in patients.values()):
            _log.warning("%d signals have no patient stated; each is taken to be a patient of its own", alone)
    return Labels(
        classes, {name: number[value] for name, value in named.items()}, None if patients is None else units, about
    )


def read_numbers(path: Path, names: Sequence[str], *, column: str) -> dict[str, float]:
    """The numbers in a column of a table, by signal, for signals that have one; rows match as for labels.

    Raises:
      DataError: as `read_label_table`, or a cell that is neither a finite number nor says that there is none.
    """
    read = read_label_table(path, names, label_column=column, patient_column="", warn=False)
    numbers = {}
    for name, place in read.labels.items():
        number = finite_number(read.classes[place])
        if number is None:
            raise DataError(
                f"{path}: {shown(read.classes[place])} in the column {shown(column)} is no number; repair it"
            )
        numbers[name] = number
    return numbers


def read_label_table(
    path: Path,
    names: Sequence[str],
    *,
    label_column: str,
    patient_column: str,
    id_column: str = "",
    no_value: Sequence[str] = (),
    warn: bool = True,
) -> Labels:
    """The labels and patients of named signals from a table.

    Cells with a missing value (`delimited.stated`) hold no label and no patient. Every other value in the label column
    is a class, even without a signal, so that a part of the signals has the same classes as all. Rows and signals
    without a match are logged.

    Args:
      path: CSV or TSV with a header line.
      names: names of the signals, unique, "/" between folders.
      label_column: "" takes the column "label" if there is one, or none if `patient_column` is given.
      patient_column: "" if patients are not known.
      id_column: the column that names the signal of a row; "" chooses it as described for this module.
      no_value: further spellings of a missing value.
      warn: whether to warn of so many labels that they may not be classes.
    Raises:
      DataError: names the file: unreadable, a column missing or twice, a short or long row, two rows for one signal,
        a row for several files of different folders, a signal that two rows fit, or no row for any signal.
    """
    rows = read_rows(path)
    header = next(rows, (1, []))[1]
    if len(header) < 2:
        raise DataError(f"{path}: no table with two columns or more (a header line, then one row a signal)")
    if not label_column and ("label" in header or not patient_column):
        label_column = "label"
    id_at, label_at, patient_at = (_column(path, header, name) for name in (id_column, label_column, patient_column))
    usual = next((i for i, column in enumerate(header) if column.lower() in _NAME_COLUMNS), 0)
    name_at = usual if id_at is None else id_at
    found: dict[str, _Row] = {}
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
            None if label_at is None else stated(row[label_at], no_value),
            None if patient_at is None else stated(row[patient_at], no_value),
        )
    matched = _matched(path, names, found)
    rows_of = {name: found.get(matched.get(name, "\0"), (0, None, None)) for name in names}
    patients = {name: row[2] for name, row in rows_of.items()} if patient_at is not None else None
    if patients is None and len(set(matched.values())) < len(matched):
        _log.info("%s: rows stand for several files each; the files of a row are kept in one split", path)
        patients = {name: matched.get(name) for name in names}
    if rows_left := len(set(found) - set(matched.values())):
        _log.warning("%s: %d rows are for no signal that is there", path, rows_left)
    classes = ordered_classes(label for _, label, _ in found.values() if label is not None)
    labels = labels_of(
        {name: row[1] for name, row in rows_of.items()} if label_at is not None else {},
        patients,
        {"file": path.name, "md5": file_md5(path)},
        classes,
    )
    labelled = len(labels.labels)
    if warn and len(classes) > max(10, labelled // 2):
        _log.warning("%s: %d different labels for %d signals; is this column a class?", path, len(classes), labelled)
    return labels


def _column(path: Path, header: list[str], name: str) -> int | None:
    if not name:
        return None
    if header.count(name) != 1:
        problem = "several columns" if name in header else "no column"
        columns = ", ".join(shown(column) for column in header[:20])
        raise DataError(
            f"{path}: {problem} {shown(name)}, it has {columns}; name one with data.label_column, "
            "patient_column or id_column"
        )
    return header.index(name)


def _matched(
    path: Path, names: Sequence[str], found: Mapping[str, tuple[int, str | None, str | None]]
) -> dict[str, str]:
    """The key of the matching row of each signal that has one."""
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
    for way, rows_for in (("case", _by_case), ("beginning", _by_beginning), ("number", _by_number)):
        if matched:
            break
        candidates = {name: keys for name, keys in rows_for(names, list(found)).items() if keys}
        for name, keys in candidates.items():
            if len(keys) > 1:
                raise DataError(
                    f"{path}: lines {found[keys[0]][0]} ({shown(keys[0])}) and {found[keys[1]][0]} ({shown(keys[1])}) "
                    f"both fit {shown(name)}; write file names, relative to the data directory"
                )
            matched[name] = keys[0]
        if matched:
            one = next(iter(matched))
            _log.warning(
                "%s: no row names a file, so rows are matched by %s: %s is %s; %d of %d files have a row",
                path, way, shown(matched[one]), shown(one), len(matched), len(names),
            )  # fmt: skip
    if not matched:
        rows, signals = (", ".join(shown(one) for one in list(some)[:3]) or "none" for some in (found, names))
        raise DataError(
            f"{path}: no row names a signal: rows are like {rows}, signals like {signals}; write file names, relative "
            "to the data directory, or name their column with data.id_column"
        )
    return matched


def _parts(name: str) -> list[str]:
    """The names of a file without its suffixes, and of the folders that it is in."""
    place = PurePosixPath(_normal(name).casefold())
    stem = place.name.split(".")[0] or place.name
    return [stem, *(part for part in place.parent.parts if part)]


def _by_case(names: Sequence[str], keys: Sequence[str]) -> dict[str, list[str]]:
    """For each name, the keys of rows that equal it in any case."""
    folded: dict[str, list[str]] = {}
    for key in keys:
        folded.setdefault(key.casefold(), []).append(key)
    found = {}
    for name in names:
        place = PurePosixPath(_normal(name).casefold())
        ways = [str(place), place.name, str(place.with_name(_parts(name)[0])), *_parts(name)]
        found[name] = next((folded[way] for way in ways if way in folded), [])
    return found


def _by_beginning(names: Sequence[str], keys: Sequence[str]) -> dict[str, list[str]]:
    """For each name, the longest keys that it, or one of its folders, begins with; words and numbers stay whole."""
    folded: dict[str, list[str]] = {}
    for key in keys:
        folded.setdefault(key.casefold(), []).append(key)
    found = {}
    for name in names:
        starts = [
            part[:end]
            for part in _parts(name)
            for end in range(len(part), 0, -1)
            if end == len(part) or not _one_word(part[end - 1], part[end])
        ]
        longest = max((start for start in starts if start in folded), key=len, default=None)
        found[name] = [] if longest is None else folded[longest]
    return found


def _one_word(left: str, right: str) -> bool:
    return (left.isdigit() and right.isdigit()) or (left.isalpha() and right.isalpha())


def _by_number(names: Sequence[str], keys: Sequence[str]) -> dict[str, list[str]]:
    """For each name, the keys that equal one of its numbers, at the same place from the left in all names.

    The place that finds most rows counts. Its number must differ between names, unlike the 1 of T1.
    """
    rows: dict[int, list[str]] = {}
    for key in keys:
        if re.fullmatch(r"[0-9]{1,18}", key):
            rows.setdefault(int(key), []).append(key)
    numbers = {}
    for name in names:
        stem, *folders = _parts(name)
        numbers[name] = [int(one) for one in re.findall(r"[0-9]{1,18}", "/".join([*folders, stem]))]
    best: dict[str, list[str]] = {}
    most, tied = 0, False
    for k in range(max(map(len, numbers.values()), default=0)):
        held = {name: some[k] for name, some in numbers.items() if len(some) > k}
        found = {name: rows[number] for name, number in held.items() if number in rows}
        different = len({held[name] for name in found})
        if found and (different > 1 or len(names) == 1) and different >= most and found != best:
            best, most, tied = found, different, different == most
    return {} if tied else best


def _normal(name: str) -> str:
    """One spelling for names that look alike: some systems write an accent as a separate character."""
    return unicodedata.normalize("NFC", name.replace("\\", "/")).removeprefix("./")
