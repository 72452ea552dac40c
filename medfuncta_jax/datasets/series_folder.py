"""Time series of the user's own in CSV, TSV or TXT files, brought to one length and scaled to [0, 1].

`layout="file"`: a file is a signal, a line a sample, a column a channel. `layout="row"`: a line is a signal of one
channel, a cell a sample, and columns of the same table may hold its id, label and patient; empty cells at the end of a
line end the signal. Columns are named by their name in the header or by their position: "0" is the first, "-1" the
last; `series_columns.py` defines headers. Numbers have decimal points; a file that may have decimal commas is refused.
The only ignored content is an unnamed column that counts the rows.

`folder_files.py` describes labels and splits; ids are the names relative to the data directory, followed in tables by
the id of the row, or else by its line number.

In files of one signal, a first column that rises from line to line, over eight lines or more of the first readable
file, is time and no channel, unless `columns` names the channels. The column is kept as the times of the signal.
Samples at uneven times are first interpolated at even times.

A signal without variation or with numbers that are not finite is skipped. A table of rows with a short line or a
repeated id is refused, because its columns are in doubt.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from medfuncta_jax.datasets.dataset import (
    NEW,
    SPLITS,
    DataError,
    Example,
    NoFinerGrid,
    Plan,
    PlannedSplit,
    Skipped,
    example_or_skipped,
    required_folder,
    splits_by_name,
)
from medfuncta_jax.datasets.delimited import finite_number, shown, stated
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
from medfuncta_jax.datasets.series_columns import Columns
from medfuncta_jax.settings import SettingsError
from medfuncta_jax.units import Units, units_between

_log = logging.getLogger(__name__)

_SUFFIXES = (".csv", ".tsv", ".txt")

# Parts of a number with a decimal comma in a file with commas between cells, unlike usual numbers: 05, 007, -0.
_PART = re.compile(r"[+-]?0\d+|-0")

# Minimum number of rising lines; fewer may rise by chance.
_LEAST_RISING = 8

# Largest deviation of even time steps, as a part of their mean; writers round.
_EVEN_STEPS = 1e-2

# A line of two whole numbers, or of one number with a decimal comma.
_DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+")


@dataclass(frozen=True, kw_only=True)
class Options(FolderOptions):
    """Settings of the source, and those of `FolderOptions`.

    In tables of rows, `label_column` and `patient_column` are columns of these tables unless `labels` names another.
    `id_column` always is, and its ids must differ; "" takes line numbers.

    Attributes:
      layout: "file" or "row".
      length: samples of the grid, 2 to 1,000,000.
      fit: "resample" stretches or shrinks every signal to `length`, anti-aliased; "crop" keeps the samples as they are,
        cuts off samples beyond `length` and pads with 0 after the end.
      scale: "signal" scales a signal by its own minimum and maximum, "channel" does so channel by channel.
      value_range: (low, high), values that become 0 and 1 in all signals, clipped outside; overrides `scale`.
      columns: the columns of the channels, in files of one signal; empty takes all but a first column of times. Columns
        named here are always channels, and the signals then have no times.
      header: "yes" or "no" where the first line could be a header of numbers or data, see `series_columns.py`.
    """

    layout: Literal["file", "row"] = "file"
    length: int = 256
    fit: Literal["resample", "crop"] = "resample"
    scale: Literal["signal", "channel"] = "signal"
    value_range: tuple[float, ...] = ()
    columns: tuple[str, ...] = ()
    header: Literal["auto", "yes", "no"] = "auto"

    def __post_init__(self):
        super().__post_init__()
        if not 2 <= self.length <= 1_000_000:
            raise SettingsError(f"length must be 2 to 1000000, got {self.length}")
        require_value_range(self.value_range)
        if self.columns and self.layout == "row":
            raise SettingsError("columns are channels of files of one signal; layout 'row' has one channel")
        if self.id_column and self.layout == "file" and not self.labels:
            raise SettingsError("id_column is of tables with layout 'row', or of the table that labels names")


def plan(options: Options, *, data_dir: str | None, cache_root: Path) -> Plan:
    """The folder's series. Tables of rows are read once for ids and labels.

    Raises:
      DataError: no folder, no files that match, too few to split, or a table that cannot be used.
    """
    folder = required_folder(data_dir, "the series")
    files = matching_files(folder, options, _SUFFIXES)
    timed = False
    if options.layout == "file":
        first = first_readable(files.values(), functools.partial(_file_series, options=options, timed=None))
        timed, channels = first.times is not None, first.values.shape[1]
        if timed:
            _log.info(
                "%s: the first column rises from line to line and is taken for time, not for a channel; name the "
                "channels with data.columns if it is one", folder,
            )  # fmt: skip
        arrangement = arranged(list(files), folder, options)
        examples = functools.partial(_file_examples, files, _Layout(channels, timed), arrangement, options)
    else:
        channels = 1
        arrangement = _row_arrangement(folder, files, options)
        examples = functools.partial(_row_examples, files, arrangement, options)
    splits = {
        split: PlannedSplit(len(arrangement.splits[split]), functools.partial(examples, split)) for split in SPLITS
    }
    about = about_files("series_folder", folder, options, files) | {"time_column": timed} | arrangement.about
    labels = arrangement.of_plan
    if options.layout == "row" and not options.labels:  # columns of labels are no samples
        labels["labels"] = None
    return _plan(options, channels, splits, about, **labels)


def finer(options: Options, scale: int, *, data_dir: str | None, cache_root: Path) -> Options:
    """The options of a grid `scale` times finer over the same times.

    Raises:
      NoFinerGrid: series that are cut or padded keep their samples.
    """
    if options.fit != "resample":
        raise NoFinerGrid(f"the source series_folder has its signals at one resolution only with fit={options.fit!r}")
    return replace(options, length=scale * options.length)


def new_files(folder: Path, options: Options) -> dict[str, Path]:
    """The files in a folder of new signals, by name."""
    return matching_files(folder, options, _SUFFIXES)


def plan_new(
    options: Options, folder: Path, files: Mapping[str, Path], *, grid: tuple[int, ...], channels: int
) -> Plan:
    """New series, all in the split "new", as `plan` would make them."""
    about = about_files("series_folder", folder, options, files)
    if options.layout == "file":
        # A column beside the channels of the run can only hold times.
        def example(name: str) -> Example:
            width = len(_columns(files[name], options).samples)
            return _file_example(files[name], name, options, _Layout(channels, width == channels + 1))

        return _plan(options, channels, splits_by_name({NEW: list(files)}, example), about)
    # New tables need not have the columns of labels and patients.
    known = {name: _columns(path, options) for name, path in files.items()}
    rows = [
        _row_name(name, line, row, known[name]) for name, path in files.items() for line, row in known[name].rows(path)
    ]
    arrangement = Arrangement({NEW: rows}, labels_of({}, None, {}), {})
    examples = functools.partial(_row_examples, dict(files), arrangement, options, NEW)
    return _plan(options, channels, {NEW: PlannedSplit(len(rows), examples)}, about)


def example_of(
    options: Options, values: np.ndarray, name: str, *, affine: np.ndarray | None, grid: tuple[int, ...], channels: int
) -> Example:
    """One series [n] or [n, D] of any unit."""
    series = np.asarray(values, np.float64)
    series = series[:, None] if series.ndim == 1 else series
    if series.ndim != 2 or series.shape[1] != channels:
        raise DataError(f"{name}: a series [n, {channels}] is needed, got {values.shape}")
    _require_samples(len(series), name)
    return _example(_Series(series, None, ()), name, options, name)


def _plan(
    options: Options, channels: int, splits: Mapping[str, PlannedSplit], about: dict[str, Any], **labels: Any
) -> Plan:
    return Plan(
        name="series_folder", grid=(options.length,), channels=channels, dtype="float32", splits=splits, about=about,
        **labels,
    )  # fmt: skip


@dataclass(frozen=True)
class _Layout:
    """Channels of a file, and whether a column of times comes first."""

    channels: int
    timed: bool


@dataclass(frozen=True)
class _Series:
    """Values [n, D] as written, with (first, step) of their times and the names of the columns if there are any."""

    values: np.ndarray
    times: tuple[float, float] | None
    columns: tuple[str, ...]


def _columns(path: Path, options: Options) -> Columns:
    if options.layout == "file":
        return Columns.of_file(path, options.header, {}, options.columns)
    named = {"id_column": options.id_column}
    if not options.labels:
        named |= {"label_column": options.label_column, "patient_column": options.patient_column}
    return Columns.of_file(path, options.header, named)


def _file_examples(
    files: dict[str, Path], layout: _Layout, arrangement: Arrangement, options: Options, split: str
) -> Iterator[Example | Skipped]:
    def example(name: str) -> Example:
        return replace(_file_example(files[name], name, options, layout), label=arrangement.label(name))

    for name in arrangement.splits[split]:
        yield example_or_skipped(name, functools.partial(example, name))


def _file_example(path: Path, name: str, options: Options, layout: _Layout) -> Example:
    series = _file_series(path, options, timed=layout.timed)
    if series.values.shape[1] != layout.channels:
        raise DataError(
            f"{path}: {series.values.shape[1]} channels, the first series has {layout.channels}; channel counts must "
            "not be mixed: choose files with data.pattern or columns with data.columns"
        )
    return _example(series, name, options, str(path))


def _file_series(path: Path, options: Options, *, timed: bool | None) -> _Series:
    """The signal of a file, n >= 2 samples; `timed` tells whether the first column is time, None to find out."""
    columns = _columns(path, options)
    rows = list(columns.rows(path))
    values = [_numbers(path, line, row, columns.samples, columns.bare_commas) for line, row in rows]
    _require_samples(len(values), str(path))
    series = np.array(values, np.float64)
    if columns.bare_commas and not options.columns and all(_DECIMAL_COMMA.fullmatch(",".join(row)) for _, row in rows):
        raise DataError(
            f"{path}: lines such as {shown(','.join(rows[0][1]))} could be one column with decimal commas, or two of "
            "whole numbers; write decimal points, or name both with data.columns=\"('0','1')\""
        )
    names = tuple(columns.names[i] for i in columns.samples) if columns.names else ()
    rises = series.shape[1] > 1 and bool((np.diff(series[:, 0]) > 0).all())
    if timed is None:
        timed = rises and len(series) >= _LEAST_RISING and not options.columns
    if not timed:
        return _Series(series, None, names)
    if not rises:
        raise DataError(
            f"{path}: its first column does not rise from line to line, as times do and that of the other series does; "
            "repair it, or name the channels with data.columns"
        )
    return _even(series[:, 0], series[:, 1:], names)


def _even(times: np.ndarray, values: np.ndarray, names: tuple[str, ...]) -> _Series:
    """Values [n, D] at n rising times, interpolated linearly at even ones if they are not even."""
    step = (times[-1] - times[0]) / (len(times) - 1)
    if np.abs(np.diff(times) - step).max() > _EVEN_STEPS * step:
        even = np.linspace(times[0], times[-1], len(times))
        values = np.stack([np.interp(even, times, channel) for channel in values.T], -1)
    return _Series(values, (float(times[0]), float(step)), names)


def _row_arrangement(folder: Path, files: dict[str, Path], options: Options) -> Arrangement:
    labels: dict[str, str | None] = {}
    patients: dict[str, str | None] = {}
    lines: dict[str, int] = {}
    for name, path in files.items():
        columns = _columns(path, options)
        if not columns.samples:
            raise DataError(f"{path}: no column of samples is left; change data.id_column or label_column")
        label, patient = (columns.at.get(option) for option in ("label_column", "patient_column"))
        for line, row in columns.rows(path):
            one = _row_name(name, line, row, columns)
            if one in lines:
                raise DataError(f"{path}: lines {lines[one]} and {line} have one id; ids must differ")
            lines[one] = line
            if label is not None:
                labels[one] = stated(row[label], options.no_value)
            if patient is not None:
                patients[one] = stated(row[patient], options.no_value)
    known = labels_of(labels, patients or None, {"columns": options.label_column})
    arrangement = arranged(list(lines), folder, options, labels=known, by_folders=False, columns_of_rows=True)
    # Rows are stored in the order of the tables. `about` holds the state of each file, and so of each row.
    order = {one: i for i, one in enumerate(lines)}
    splits = {split: sorted(names, key=order.__getitem__) for split, names in arrangement.splits.items()}
    about: dict[str, Any] = {key: value for key, value in arrangement.about.items() if key != "split"}
    about["split_rule"] = about["split_rule"].replace("by file", "by row")
    return Arrangement(splits, arrangement.labels, about)


def _row_name(file: str, line: int, row: list[str], columns: Columns) -> str:
    """A name that is unique over all files, in one line for any content of the cell."""
    at = columns.at.get("id_column")
    return f"{file}:{line:06d}" if at is None else f"{file}:{' '.join(row[at].split())}"


def _row_examples(
    files: dict[str, Path], arrangement: Arrangement, options: Options, split: str
) -> Iterator[Example | Skipped]:
    def example(path: Path, line: int, cells: list[str], name: str, bare_commas: bool) -> Example:
        while cells and not cells[-1]:
            cells.pop()
        place = f"{path}: line {line}"
        _require_samples(len(cells), place)
        series = np.array(_numbers(path, line, cells, tuple(range(len(cells))), bare_commas), np.float64)[:, None]
        return replace(_example(_Series(series, None, ()), name, options, place), label=arrangement.label(name))

    wanted = set(arrangement.splits[split])
    for name, path in files.items():
        columns = _columns(path, options)
        for line, row in columns.rows(path):
            one = _row_name(name, line, row, columns)
            if one in wanted:
                cells = [row[i] for i in columns.samples]
                yield example_or_skipped(one, functools.partial(example, path, line, cells, one, columns.bare_commas))


def _numbers(path: Path, line: int, row: list[str], columns: tuple[int, ...], bare_commas: bool) -> list[float]:
    numbers = []
    for i in columns:
        value = finite_number(row[i])
        part = bare_commas and _PART.fullmatch(row[i])
        if value is None or part:
            problem = "a part of a number with a decimal comma" if part else "no finite number"
            remedy = "write decimal points" if part or _DECIMAL_COMMA.fullmatch(row[i]) else "repair the cell"
            raise DataError(f"{path}: line {line}, column {i + 1}: {shown(row[i])} is {problem}; {remedy}")
        numbers.append(value)
    return numbers


def _require_samples(count: int, place: str) -> None:
    if count < 2:
        raise DataError(f"{place}: {count} samples, a series has at least 2; remove it")


def _example(found: _Series, name: str, options: Options, place: str) -> Example:
    """Values of any unit to float32 [length, D] in [0, 1]."""
    series = found.values
    if options.value_range:
        low, high = (np.float64(value) for value in options.value_range)
    else:
        axes = 0 if options.scale == "channel" else None
        low, high = series.min(axes), series.max(axes)
        if np.any(low == high):
            raise DataError(
                f"{place}: the series is constant ({np.max(low[low == high]):g}); remove it or set data.value_range"
            )
    if np.any(high / 2 - low / 2 > 1e100) or np.any(high - low < 1e-100):
        raise DataError(
            f"{place}: values from {np.min(low):g} to {np.max(high):g} cannot be scaled; repair or remove it"
        )
    alone = options.scale == "channel" or series.shape[1] == 1
    shared: Literal["", "channels", "signals"] = "signals" if options.value_range else "" if alone else "channels"
    units = units_between(low, high, values=series, shared=shared)
    unit = np.clip((np.clip(series, low, high) - low) / (high - low), 0, 1)
    if options.fit == "resample":
        unit = resampled(unit, options.length)
    fitted = np.zeros((options.length, series.shape[1]), np.float32)
    fitted[: min(len(unit), options.length)] = unit[: options.length]
    return Example(np.clip(fitted, 0, 1), name, units=_with_times(units, found, options))


def _with_times(units: Units, series: _Series, options: Options) -> Units:
    if series.times is None:
        return replace(units, columns=series.columns)
    first, step = series.times
    ratio = len(series.values) / options.length if options.fit == "resample" else 1.0
    # A sample of the grid stands for the middle of its window.
    return replace(units, time=(first + ((ratio - 1) / 2) * step, ratio * step), columns=series.columns)


def resampled(values: np.ndarray, length: int) -> np.ndarray:
    """`volumes.resample` along one axis over its whole extent, in memory that grows with the longer side only.

    A sample is the mean over a window as wide as the output's step, or one input step if that is wider.

    Args:
      values: [n, D].
      length: number of output samples.
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
