"""A folder of the user's own files: the choice of files, their labels and their splits.

Labels and patients come from a table (`label_table.py`). Without a table, folders can state splits and classes: files
below `train`, `val` and `test` (or `training`, `valid`, `validation`, `testing`) stay in these splits, and a missing
`val` or `test` is drawn from `train`; if every file lies in exactly one further folder, and there are two or more of
these, a folder is a class. Other files are split by a hash of the seed and of the patient if a table states patients,
else of the file's name without its suffix, so that new files do not move others (`splits.split_names`).

Run directories inside the data directory are left out.
"""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from medfuncta_jax.datasets.dataset import SPLITS, DataError, Task
from medfuncta_jax.datasets.label_table import Labels, labels_of, read_label_table
from medfuncta_jax.datasets.splits import require_split_options, split_names
from medfuncta_jax.settings import SettingsError

_T = TypeVar("_T")

# Files by which a run directory is recognised: the first and one of the second.
_RUN_CONFIG, _RUN_REST = "config.json", ("signals.json", "checkpoints")

# Suffixes: names that differ only in these are one signal in two formats, or the two files of an Analyze image.
_SUFFIX = re.compile(r"(\.(nii|hdr|img|mgh|mgz|png|jpe?g|tiff?|csv|tsv|txt))?(\.gz)?$", re.IGNORECASE)

_SPLIT_FOLDERS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}


@dataclass(frozen=True, kw_only=True)
class FolderOptions:
    """Options that all sources of a folder of files share.

    Attributes:
      pattern: which files, a glob relative to the data directory; "**" is any folders (links to folders, which could
        lead in circles, are not followed).
      labels: a table of labels, relative to the data directory; "" if there is none.
      id_column, label_column, patient_column: columns of the table; see `label_table.read_label_table`.
      no_value: spellings of a missing label or patient in these columns, in any case, beside the empty cell, NA, nan,
        NULL and the like.
      seed: seed of the split.
      val_fraction, test_fraction: the probability of a patient, or of a file where patients are not known, to be in
        this split, above 0; each split has at least one.
    """

    pattern: str = "**/*"
    labels: str = ""
    id_column: str = ""
    label_column: str = ""
    patient_column: str = ""
    no_value: tuple[str, ...] = ()
    seed: int = 42
    val_fraction: float = 0.1
    test_fraction: float = 0.2

    def __post_init__(self):
        require_split_options(self.seed, self.val_fraction, self.test_fraction)
        parts = Path(self.pattern).parts
        circular = any("**" in part and part != "**" for part in parts)
        if not parts or Path(self.pattern).is_absolute() or ".." in parts or circular or "\0" in self.pattern:
            raise SettingsError(f"pattern must be a glob inside the data directory, got {self.pattern!r}")


def require_value_range(value_range: tuple[float, ...]) -> None:
    """Refuse a range that is neither empty nor two rising numbers.

    Raises:
      SettingsError: names the setting.
    """
    rising = len(value_range) == 2 and value_range[0] < value_range[1]
    if value_range and not (rising and all(map(math.isfinite, value_range))):
        raise SettingsError(f"value_range must be two rising numbers, or empty, got {value_range}")


@dataclass(frozen=True)
class Arrangement:
    """The split, label and patient of each signal.

    Attributes:
      splits: names by split, sorted.
      labels: their classes and patients.
      about: JSON-able: the rule of the split and the origin of labels.
    """

    splits: Mapping[str, list[str]]
    labels: Labels
    about: dict[str, Any]

    def label(self, name: str) -> int:
        """The class of a signal, -1 if none."""
        return self.labels.labels.get(name, -1)

    @property
    def of_plan(self) -> dict[str, Any]:
        """Fields of a `Plan`: classes, task, patients, and labels by id, which are not part of prepared data."""
        return {
            "classes": self.classes,
            "task": self.task,
            "labels": self.labels.labels,
            "gathered": True,
            "patients": self.labels.patients or {},
        }

    @property
    def classes(self) -> tuple[str, ...]:
        """Names by label."""
        return self.labels.classes

    @property
    def task(self) -> Task:
        """The meaning of the labels."""
        return self.labels.task


def files_below(folder: Path) -> Iterator[Path]:
    """All files at any depth below a folder, in a stable order; names that start with a dot are left out.

    Links to folders are followed, but no folder is visited twice, so that loops of links end. Run directories are left
    out.

    Raises:
      DataError: a folder that cannot be listed.
    """
    visited: set[tuple[int, int]] = set()

    def walk(directory: Path) -> Iterator[Path]:
        try:
            state = directory.stat()
            names = sorted(os.listdir(directory))
        except OSError as error:
            raise DataError(f"{directory}: cannot be listed ({error.strerror or error})") from error
        if (state.st_dev, state.st_ino) in visited or (_RUN_CONFIG in names and set(_RUN_REST) & set(names)):
            return
        visited.add((state.st_dev, state.st_ino))
        for path in (directory / name for name in names if not name.startswith(".")):
            if os.path.isdir(path):
                yield from walk(path)
            elif os.path.isfile(path):
                yield path

    return walk(folder)


def matching_files(folder: Path, options: FolderOptions, suffixes: Sequence[str] = ()) -> dict[str, Path]:
    """The files that match, by their names relative to `folder`, sorted.

    Hidden files, the table of labels and files in run directories are left out.

    Args:
      folder: the data directory.
      options: with the pattern.
      suffixes: in lower case; none for any.
    Raises:
      DataError: no files, or a file name that cannot be an id.
    """
    table = _table(folder, options)
    files = {}

    @functools.cache
    def in_run(directory: Path) -> bool:
        is_run = (directory / _RUN_CONFIG).is_file() and any((directory / name).exists() for name in _RUN_REST)
        return is_run or (directory != folder and in_run(directory.parent))

    for path in sorted(folder.glob(options.pattern)):
        # Copies from some systems come with "._name.nii.gz" files that are no images.
        if path.name.startswith(".") or path == table or not path.is_file() or in_run(path.parent):
            continue
        if suffixes and path.suffix.lower() not in suffixes:
            continue
        files[name_below(folder, path)] = path
    if not files:
        kinds = f" with a suffix of {' '.join(suffixes)}" if suffixes else ""
        raise DataError(
            f"{folder}: 0 files match {options.pattern!r}{kinds}, at least 3 are needed to train, validate and test; "
            "check data_dir and data.pattern"
        )
    return files


def name_below(folder: Path, path: Path) -> str:
    """The name of a file relative to a folder, "/" between folders, as an id.

    Raises:
      DataError: it cannot be an id.
    """
    name = path.relative_to(folder).as_posix()
    if len(name.splitlines()) > 1 or not _encodable(name):
        raise DataError(f"{folder}: file name {name!a} holds a line break or is not UTF-8; rename the file")
    return name


def first_readable(paths: Iterable[Path], read: Callable[[Path], _T]) -> _T:
    """The result of `read` for the first file for which it raises no `DataError`.

    Raises:
      DataError: that of the first file, if no file can be read.
    """
    first = None
    for path in paths:
        try:
            return read(path)
        except DataError as error:
            first = first or error
    raise first or DataError("no files")


def arranged(
    names: Sequence[str],
    folder: Path,
    options: FolderOptions,
    *,
    labels: Labels | None = None,
    by_folders: bool = True,
    columns_of_rows: bool = False,
) -> Arrangement:
    """Labels and splits of named signals.

    Args:
      names: unique, "/" between folders, relative to `folder`.
      folder: the data directory.
      options: the table of labels, the seed and the fractions.
      labels: where the source knows them itself; a table in `options` goes before, except for patients that it does
        not state.
      by_folders: whether folders may say splits and classes.
      columns_of_rows: whether `id_column` is of tables of signals, not of the table of labels.
    Raises:
      DataError: too few signals or patients to split, a table that cannot be used or is not named, or files beside the
        split folders.
    """
    given = _given_splits(folder, names) if by_folders else None
    table = _table(folder, options)
    if table is None and options.id_column and not columns_of_rows:
        raise DataError(f"{folder}: id_column is of a table of labels; name the table with data.labels")
    if table is not None:
        own = labels
        labels = read_label_table(
            table,
            names,
            label_column=options.label_column,
            id_column="" if columns_of_rows else options.id_column,
            patient_column=options.patient_column,
            no_value=options.no_value,
        )
        if own is not None and labels.patients is None:
            labels = replace(labels, patients=own.patients)
    by_class = _class_folders(names, given is not None) if by_folders else {}
    if by_class and (labels is None or (not labels.classes and not options.label_column)):
        patients, about = (None, {}) if labels is None else (labels.patients, labels.about)
        labels = labels_of(by_class, None, about | {"classes": "folders"})
        labels = Labels(labels.classes, labels.labels, patients, labels.about)
    labels = labels or Labels((), {}, None, {})
    fractions = {"test": options.test_fraction, "val": options.val_fraction}
    splits: dict[str, list[str]] = {}
    if given is not None:
        fractions = {name: part for name, part in fractions.items() if name not in given}
        splits = dict(given)
        names = splits["train"]
    groups = labels.patients or {name: _SUFFIX.sub("", name) for name in names}
    units = {groups[name] for name in names}
    if len(units) <= len(fractions):
        kind = "signals" if labels.patients is None else "patients"
        raise DataError(
            f"{folder}: {len(units)} {kind} of files that match {options.pattern!r}, at least {len(fractions) + 1} are "
            "needed to train, validate and test; check data_dir and data.pattern"
        )
    splits |= split_names(names, fractions, seed=options.seed, groups=groups)
    unit = "file" if labels.patients is None else "patient"
    rule = f"by {unit}, a hash with seed {options.seed}"
    if given is not None:
        rule = f"as in the folders {', '.join(given)}" + (f"; {', '.join(fractions)} {rule}" if fractions else "")
    return Arrangement(
        {name: splits[name] for name in SPLITS}, labels, {"split_rule": rule, "split": splits, "labels": labels.about}
    )


def about_files(source: str, folder: Path, options: Any, files: Mapping[str, Path]) -> dict[str, Any]:
    """The data that determines the signals of a folder: the options, and each file's size and time of change."""
    states = {name: path.stat() for name, path in files.items()}
    return {
        "source": source,
        "version": 2,  # version of the readers; a higher number prepares data anew
        "title": folder.name,
        "licence": "not known",
        "options": asdict(options),
        "folder": str(folder.resolve()),
        "files": {name: [state.st_size, state.st_mtime_ns] for name, state in states.items()},
    }


def _table(folder: Path, options: FolderOptions) -> Path | None:
    return folder / Path(options.labels).expanduser() if options.labels else None


def _encodable(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _given_splits(folder: Path, names: Sequence[str]) -> dict[str, list[str]] | None:
    """The names below each split's folder; None without a folder of training files."""
    given: dict[str, list[str]] = {}
    outside = []
    for name in names:
        parts = PurePosixPath(name).parts
        split = _SPLIT_FOLDERS.get(parts[0].lower()) if len(parts) > 1 else None
        if split is None:
            outside.append(name)
        else:
            given.setdefault(split, []).append(name)
    if "train" not in given:
        return None
    if outside:
        raise DataError(
            f"{folder}: {len(outside)} files such as {outside[0]} lie beside the folders of the splits "
            f"({', '.join(given)}); move them or choose files with data.pattern"
        )
    return {split: given[split] for split in SPLITS if split in given}


def _class_folders(names: Sequence[str], below_splits: bool) -> dict[str, str]:
    """The folder of each file, if every file is in exactly one and there are several; else {}."""
    parts = {name: PurePosixPath(name).parts[1 if below_splits else 0 :] for name in names}
    if any(len(one) != 2 for one in parts.values()) or len({one[0] for one in parts.values()}) < 2:
        return {}
    return {name: one[0] for name, one in parts.items()}
