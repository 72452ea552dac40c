"""Time series of the user's own in CSV, TSV or TXT files, brought to one length and scaled to [0, 1].

`layout="file"`: a file is a signal, a line a sample, a column a channel. `layout="row"`: a line is a signal of one
channel, a cell a sample, and columns of the same table may hold its id, label and patient; empty cells at the end of a
line end the signal. A first line in which no cell is a number is a header. Columns are called by their name in the
header, or by their position: "0" is the first, "-1" the last. Numbers have decimal points.

Labels and splits: see `folder_files.py`; ids are the names relative to the data directory, in tables followed by the
id of the row, or else by its line.

A signal that is no series of finite numbers that vary is skipped. But a table of rows whose columns are in doubt, by a
line that is too short or an id that is there twice, is refused.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from medfuncta_jax.datasets.dataset import (
    SPLITS,
    DataError,
    Example,
    Plan,
    PlannedSplit,
    Skipped,
    example_or_skipped,
    required_folder,
)
from medfuncta_jax.datasets.delimited import finite_number, read_rows, shown
from medfuncta_jax.datasets.folder_files import (
    Arrangement,
    FolderOptions,
    about_files,
    arranged,
    first_readable,
    matching_files,
    require_value_range,
)
from medfuncta_jax.datasets.label_table import labels_of
from medfuncta_jax.settings import SettingsError

_SUFFIXES = (".csv", ".tsv", ".txt")


@dataclass(frozen=True, kw_only=True)
class Options(FolderOptions):
    """Settings of the source, and those of `FolderOptions`.

    In tables of rows, `label_column` and `patient_column` are columns of these tables unless `labels` names another.

    Attributes:
      layout: "file" or "row".
      length: samples of the grid, 2 to 1,000,000.
      fit: "resample" stretches or shrinks every signal to `length`, anti-aliased; "crop" keeps the samples as they are,
        cuts off what is beyond `length` and pads with 0 after the end.
      scale: "signal" scales a signal by its own minimum and maximum, "channel" does so channel by channel.
      value_range: (low, high), values that become 0 and 1 in all signals, clipped outside; goes before `scale`.
      columns: of the channels, in files of one signal; empty takes all. Leave out a column of times here.
      id_column: of tables of rows, whose ids must differ; "" takes line numbers.
    """

    layout: Literal["file", "row"] = "file"
    length: int = 256
    fit: Literal["resample", "crop"] = "resample"
    scale: Literal["signal", "channel"] = "signal"
    value_range: tuple[float, ...] = ()
    columns: tuple[str, ...] = ()
    id_column: str = ""

    def __post_init__(self):
        super().__post_init__()
        if not 2 <= self.length <= 1_000_000:
            raise SettingsError(f"length must be 2 to 1000000, got {self.length}")
        require_value_range(self.value_range)
        if self.columns and self.layout == "row":
            raise SettingsError("columns are channels of files of one signal; layout 'row' has one channel")
        if self.id_column and self.layout == "file":
            raise SettingsError("id_column is of tables with layout 'row'; a file's id is its name")


def plan(options: Options, *, data_dir: str | None, cache_root: Path) -> Plan:
    """The folder's series. Tables of rows are read through once for ids and labels.

    Raises:
      DataError: no folder, no files that match, too few to split, or a table that cannot be used.
    """
    folder = required_folder(data_dir, "the series")
    files = matching_files(folder, options, _SUFFIXES)
    if options.layout == "file":
        channels = first_readable(files.values(), functools.partial(_file_series, options=options)).shape[1]
        arrangement = arranged(list(files), folder, options)
        examples = functools.partial(_file_examples, files, channels, arrangement, options)
    else:
        channels = 1
        arrangement = _row_arrangement(folder, files, options)
        examples = functools.partial(_row_examples, files, arrangement, options)
    return Plan(
        name="series_folder",
        grid=(options.length,),
        channels=channels,
        dtype="float32",
        splits={
            split: PlannedSplit(len(arrangement.splits[split]), functools.partial(examples, split)) for split in SPLITS
        },
        classes=arrangement.classes,
        task=arrangement.task,
        about=about_files("series_folder", folder, options, files) | arrangement.about,
    )


@dataclass(frozen=True)
class _Columns:
    """The columns of a file: how many, whether a header names them, and which hold what."""

    width: int
    header: bool
    chosen: tuple[int, ...]
    id: int | None = None
    label: int | None = None
    patient: int | None = None

    @classmethod
    def of_file(cls, path: Path, options: Options) -> _Columns:
        """From the first line, by the options."""
        _, first = next(read_rows(path), (1, []))
        if not first:
            raise DataError(f"{path}: holds no numbers; remove the file")
        if options.layout == "file":
            header = _is_header(first)
            chosen = tuple(_position(path, first, header, name, "columns") for name in options.columns)
            return cls(len(first), header, chosen or tuple(range(len(first))))
        # Columns beside the samples hold any text, so they do not tell a header.
        names = {"id_column": options.id_column}
        if not options.labels:
            names |= {"label_column": options.label_column, "patient_column": options.patient_column}
        text = {_by_number(name, len(first)) for name in names.values() if name not in first}
        header = _is_header([cell for i, cell in enumerate(first) if i not in text])
        at = {setting: _position(path, first, header, name, setting) for setting, name in names.items() if name}
        return cls(
            len(first),
            header,
            tuple(i for i in range(len(first)) if i not in at.values()),
            at.get("id_column"),
            at.get("label_column"),
            at.get("patient_column"),
        )

    def rows(self, path: Path) -> Iterator[tuple[int, list[str]]]:
        """The lines below the header; all as long as the first."""
        for line, row in itertools.islice(read_rows(path), int(self.header), None):
            if len(row) != self.width:
                raise DataError(f"{path}: line {line} has {len(row)} cells, line 1 has {self.width}; repair the line")
            yield line, row


def _is_header(cells: list[str]) -> bool:
    return any(cells) and all(_as_float(cell) is None for cell in cells)


def _as_float(cell: str) -> float | None:
    """Also NaN and infinity, which are numbers, if no usable ones."""
    try:
        return float(cell)
    except ValueError:
        return None


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
        raise DataError(f"{path}: no column {shown(name)}, it has {have}; change --config.data.{setting}")
    return at


def _file_examples(
    files: dict[str, Path], channels: int, arrangement: Arrangement, options: Options, split: str
) -> Iterator[Example | Skipped]:
    def example(name: str) -> Example:
        series = _file_series(files[name], options)
        if series.shape[1] != channels:
            raise DataError(
                f"{files[name]}: {series.shape[1]} channels, the first series has {channels}; channel counts must not "
                "be mixed: choose files with --config.data.pattern or columns with --config.data.columns"
            )
        return Example(_fitted(series, str(files[name]), options), name, arrangement.label(name))

    for name in arrangement.splits[split]:
        yield example_or_skipped(name, functools.partial(example, name))


def _file_series(path: Path, options: Options) -> np.ndarray:
    """The signal of a file, [n, D], n >= 2, as it is written."""
    columns = _Columns.of_file(path, options)
    values = [_numbers(path, line, row, columns.chosen) for line, row in columns.rows(path)]
    _require_samples(len(values), str(path))
    return np.array(values, np.float64)


def _row_arrangement(folder: Path, files: dict[str, Path], options: Options) -> Arrangement:
    labels: dict[str, str] = {}
    patients: dict[str, str] = {}
    lines: dict[str, int] = {}
    for name, path in files.items():
        columns = _Columns.of_file(path, options)
        if not columns.chosen:
            raise DataError(f"{path}: no column of samples is left; change --config.data.id_column or label_column")
        for line, row in columns.rows(path):
            one = _row_name(name, line, row, columns)
            if one in lines:
                raise DataError(f"{path}: lines {lines[one]} and {line} have one id; ids must differ")
            lines[one] = line
            labels[one] = "" if columns.label is None else row[columns.label]
            patients[one] = "" if columns.patient is None else row[columns.patient]
    stated = options.patient_column and not options.labels
    known = labels_of(labels, patients if stated else None, {"columns": options.label_column})
    arrangement = arranged(list(lines), folder, options, labels=known, by_folders=False)
    # In the order of the tables, in which they are stored. Every row is in `about` by the state of its file alone.
    order = {one: i for i, one in enumerate(lines)}
    splits = {split: sorted(names, key=order.__getitem__) for split, names in arrangement.splits.items()}
    about: dict[str, Any] = {key: value for key, value in arrangement.about.items() if key != "split"}
    about["split_rule"] = about["split_rule"].replace("by file", "by row")
    return Arrangement(splits, arrangement.labels, about)


def _row_name(file: str, line: int, row: list[str], columns: _Columns) -> str:
    """Unique over all files, and in one line whatever the cell holds."""
    return f"{file}:{line:06d}" if columns.id is None else f"{file}:{' '.join(row[columns.id].split())}"


def _row_examples(
    files: dict[str, Path], arrangement: Arrangement, options: Options, split: str
) -> Iterator[Example | Skipped]:
    def example(path: Path, line: int, cells: list[str], name: str) -> Example:
        while cells and not cells[-1]:
            cells.pop()
        place = f"{path}: line {line}"
        _require_samples(len(cells), place)
        series = np.array(_numbers(path, line, cells, tuple(range(len(cells)))), np.float64)[:, None]
        return Example(_fitted(series, place, options), name, arrangement.label(name))

    wanted = set(arrangement.splits[split])
    for name, path in files.items():
        columns = _Columns.of_file(path, options)
        for line, row in columns.rows(path):
            one = _row_name(name, line, row, columns)
            if one in wanted:
                cells = [row[i] for i in columns.chosen]
                yield example_or_skipped(one, functools.partial(example, path, line, cells, one))


def _numbers(path: Path, line: int, row: list[str], columns: tuple[int, ...]) -> list[float]:
    numbers = []
    for i in columns:
        value = finite_number(row[i])
        if value is None:
            raise DataError(
                f"{path}: line {line}, column {i + 1}: {shown(row[i])} is no finite number; repair the cell"
            )
        numbers.append(value)
    return numbers


def _require_samples(count: int, place: str) -> None:
    if count < 2:
        raise DataError(f"{place}: {count} samples, a series has at least 2; remove it")


def _fitted(series: np.ndarray, place: str, options: Options) -> np.ndarray:
    """[n, D] of any unit to float32 [length, D] in [0, 1]."""
    if options.value_range:
        low, high = (np.float64(value) for value in options.value_range)
    else:
        axes = 0 if options.scale == "channel" else None
        low, high = series.min(axes), series.max(axes)
        if np.any(low == high):
            raise DataError(
                f"{place}: the series is constant ({np.max(low[low == high]):g}); remove it or set "
                "--config.data.value_range"
            )
    if np.any(high / 2 - low / 2 > 1e100) or np.any(high - low < 1e-100):
        raise DataError(
            f"{place}: values from {np.min(low):g} to {np.max(high):g} cannot be scaled; repair or remove it"
        )
    unit = np.clip((np.clip(series, low, high) - low) / (high - low), 0, 1)
    if options.fit == "resample":
        unit = resampled(unit, options.length)
    fitted = np.zeros((options.length, series.shape[1]), np.float32)
    fitted[: min(len(unit), options.length)] = unit[: options.length]
    return np.clip(fitted, 0, 1)


def resampled(values: np.ndarray, length: int) -> np.ndarray:
    """`volumes.resample` along one axis over its whole extent, in memory that grows with the longer side only.

    A sample is the mean over a window as wide as the output's step, or one input step if that is wider.

    Args:
      values: [n, D].
      length: of the output.
    Returns:
      float64 [length, D].
    """
    n = len(values)
    step = n / length
    centres = (np.arange(length) + 0.5) * step
    half = max(step, 1.0) / 2
    lower, upper = np.maximum(centres - half, 0), np.minimum(centres + half, n)
    edges = np.arange(n + 1)
    out = np.empty((length, values.shape[1]))
    for d in range(values.shape[1]):
        integral = np.concatenate([[0.0], np.cumsum(values[:, d])])
        out[:, d] = (np.interp(upper, edges, integral) - np.interp(lower, edges, integral)) / (upper - lower)
    return out
