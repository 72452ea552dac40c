"""Whole ECG records of several leads, with their names: WFDB as PTB-XL lays it out, and DICOM (see `ecg_file.py`).

`layout="channels"`: a record is a signal [N, leads]. `layout="signals"`: a lead is a signal [N, 1], and all leads of a
record, as all records of a patient, are in one split. N is `seconds` times `rate`: the first seconds of a record,
resampled, anti-aliased; a shorter record is skipped. Values are scaled from mV, and their scale is kept with them.

A lead is missing if the record does not have it, has an invalid sample in it, or shows one flat line, as an electrode
that is off does. With `layout="signals"` a missing lead is left out. With `layout="channels"` it is a masked channel,
which `Units.missing` names: training, fits and figures take the recorded leads alone, and its values in mV are NaN. (A
line at 0 mV stands for it in the signal.) Values and PCA scores in `classify`, and `generate`, see the line;
`compress`, `curves` and `inverse` take records of all leads.

Your own code gives `fit_latent` the weights of the values, 0 in missing leads:

    prepared = mf.prepare("runs/ecg", "tomorrow/00001_hr.hea")
    fitted = mf.fit_latent(field, params, prepared.values, weights=prepared.weights)

Labels, patients and splits: see `folder_files.py`, but folders say nothing, as those of PTB-XL count records. Where no
table says patients, those of DICOM files do; a WFDB record is a patient of its own. Ids are names relative to the data
directory, of WFDB records without ".hea", followed by the lead where it is a signal.
"""

from __future__ import annotations

import functools
import logging
import math
from collections import Counter
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
    Plan,
    PlannedSplit,
    Skipped,
    example_or_skipped,
)
from medfuncta_jax.datasets.ecg_file import SUFFIXES, EcgFile, lead_key, read_header
from medfuncta_jax.datasets.folder_files import (
    FolderOptions,
    about_files,
    arranged,
    matching_files,
    require_value_range,
)
from medfuncta_jax.datasets.label_table import labels_of
from medfuncta_jax.datasets.physionet import at_rate
from medfuncta_jax.settings import SettingsError
from medfuncta_jax.units import units_between

_log = logging.getLogger(__name__)

STANDARD = ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")

_LONGEST, _FASTEST = 1_000_000, 10_000

# Endings of the names of a record in PTB-XL at 100 and at 500 Hz.
_SLOW, _FAST = "_lr", "_hr"


@dataclass(frozen=True, kw_only=True)
class LeadOptions(FolderOptions):
    """Settings of records of several leads, and those of `FolderOptions`.

    Attributes:
      leads: names, in any case, in the order of the channels.
      layout: "channels" makes every lead a channel of one signal, "signals" a signal of its own.
      rate: samples a second of the signals, above 0, at most 10,000 Hz.
      seconds: of each record, from its beginning; times `rate` 2 to 1,000,000 samples.
      scale: "signal" scales a record by its own minimum and maximum, so that leads keep their proportions, "channel"
        does so lead by lead.
      value_range: (low, high) in mV, values that become 0 and 1 in all signals, clipped outside; goes before `scale`.
    """

    leads: tuple[str, ...] = STANDARD
    layout: Literal["channels", "signals"] = "channels"
    rate: float = 100.0
    seconds: float = 10.0
    scale: Literal["signal", "channel"] = "signal"
    value_range: tuple[float, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        keys = [lead_key(lead) for lead in self.leads]
        if not all(keys) or len(set(keys)) < len(keys) or not keys:
            raise SettingsError(f"leads must be names, each there once, got {self.leads}")
        if not 0 < self.rate <= _FASTEST:
            raise SettingsError(f"rate must be above 0 and at most {_FASTEST} Hz, got {self.rate:g}")
        if not (0 < self.seconds < math.inf and 2 <= self.length <= _LONGEST):
            raise SettingsError(
                f"seconds times rate must be 2 to {_LONGEST} samples, got {self.seconds:g} s at {self.rate:g} Hz"
            )
        require_value_range(self.value_range)

    @property
    def length(self) -> int:
        """Samples of a signal."""
        return round(self.seconds * self.rate)

    @property
    def channels(self) -> int:
        """Channels of a signal."""
        return len(self.leads) if self.layout == "channels" else 1


# A record's header, or why it cannot be read.
_Found = EcgFile | str


def plan(options: LeadOptions, folder: Path) -> Plan:
    """The records of a folder, of which the headers are read.

    Raises:
      DataError: no files that match, none that can be read, a lead that no record has, one ECG at two rates, too few to
        split, or a table of labels that cannot be used.
    """
    records = _records(_named(matching_files(folder, options, SUFFIXES)))
    headers = {name: one for name, one in records.items() if isinstance(one, EcgFile)}
    if not headers:
        raise DataError(str(next(iter(records.values()))))
    _require_leads(folder, headers, options)
    _require_one_rate(folder, records)
    stated = {name: one.patient if isinstance(one, EcgFile) else None for name, one in records.items()}
    known = labels_of({}, stated if any(stated.values()) else None, {})
    arrangement = arranged(list(records), folder, options, labels=known, by_folders=False)
    of_plan = arrangement.of_plan
    ids = {name: _ids(name, one, options) for name, one in records.items()}
    labels, patients = of_plan["labels"], of_plan["patients"]
    of_plan["labels"] = {id: labels[name] for name in labels for id in ids[name]}
    if patients or options.layout == "signals":
        of_plan["patients"] = {id: patients.get(name, f"record {name}") for name in ids for id in ids[name]}

    def examples(split: str) -> Iterator[Example | Skipped]:
        for name in arrangement.splits[split]:
            for one in _examples(name, records[name], options):
                yield replace(one, label=arrangement.label(name)) if isinstance(one, Example) else one

    counts = {split: sum(len(ids[name]) for name in arrangement.splits[split]) for split in SPLITS}
    splits = {split: PlannedSplit(counts[split], functools.partial(examples, split)) for split in SPLITS}
    return _plan(options, splits, _about(folder, options, records) | arrangement.about, **of_plan)


def new_files(folder: Path, options: LeadOptions) -> dict[str, Path]:
    """The files of a folder that a finished field is applied to, by name."""
    return matching_files(folder, options, SUFFIXES)


def plan_new(options: LeadOptions, folder: Path, files: Mapping[str, Path]) -> Plan:
    """Records that no run has seen, all in the split "new", as `plan` would make them."""
    records = _records(_named(files))

    def examples() -> Iterator[Example | Skipped]:
        for name, one in records.items():
            yield from _examples(name, one, options)

    count = sum(len(_ids(name, one, options)) for name, one in records.items())
    return _plan(options, {NEW: PlannedSplit(count, examples)}, _about(folder, options, records))


def example_of(options: LeadOptions, values: np.ndarray, name: str) -> Example:
    """One record [n, leads] in mV at the rate of the options, a column a lead (a flat one is missing); or one lead [n]
    as a signal."""
    leads = options.leads if options.layout == "channels" else ("value",)
    series = np.asarray(values, np.float64)
    series = series[:, None] if series.ndim == 1 else series
    if series.ndim != 2 or series.shape[1] != len(leads) or len(series) < options.length:
        raise DataError(
            f"{name}: [{options.length} or more, {len(leads)}] is needed, {options.seconds:g} s in mV at "
            f"{options.rate:g} Hz, got {values.shape}"
        )
    return _example(_recorded(series[: options.length]), name, leads, options, name)


def _plan(options: LeadOptions, splits: Mapping[str, PlannedSplit], about: dict[str, Any], **of_plan: Any) -> Plan:
    return Plan(
        name="ecg", grid=(options.length,), channels=options.channels, dtype="float32", splits=splits, about=about,
        **of_plan,
    )  # fmt: skip


def _named(files: Mapping[str, Path]) -> dict[str, Path]:
    return {name.removesuffix(".hea"): path for name, path in files.items()}


def _records(files: Mapping[str, Path]) -> dict[str, _Found]:
    records: dict[str, _Found] = {}
    for name, path in files.items():
        try:
            records[name] = read_header(path)
        except DataError as error:
            records[name] = str(error)
    return records


def _about(folder: Path, options: LeadOptions, records: Mapping[str, _Found]) -> dict[str, Any]:
    """The facts that determine the signals, or that a record cannot be read."""
    files = {path for one in records.values() if isinstance(one, EcgFile) for path in one.files if path.is_file()}
    about = about_files("ecg", folder, options, {str(path.relative_to(folder)): path for path in sorted(files)})
    return about | {"unreadable": {name: one for name, one in records.items() if isinstance(one, str)}}


def _require_leads(folder: Path, headers: Mapping[str, EcgFile], options: LeadOptions) -> None:
    there = {lead_key(lead): lead for one in headers.values() for lead in one.leads}
    if absent := [lead for lead in options.leads if lead_key(lead) not in there]:
        has = ", ".join(list(there.values())[:20])
        raise DataError(f"{folder}: no record has the lead {', '.join(absent)}; name leads in data.leads of {has}")
    lacking = Counter(lead for one in headers.values() for lead in options.leads if one.place(lead) is None)
    if lacking:
        said = ", ".join(f"{lead} in {count}" for lead, count in lacking.items())
        _log.warning("%s: leads are missing: %s of %d records", folder, said, len(headers))
    if left := set(there) - {lead_key(lead) for lead in options.leads}:
        _log.warning("%s: leads %s are left out", folder, ", ".join(sorted(there[key] for key in left)))


def _require_one_rate(folder: Path, records: Mapping[str, _Found]) -> None:
    stems = {name.rpartition("/")[2] for name in records}
    twice = sorted(stem for stem in stems if stem.endswith(_SLOW) and stem.removesuffix(_SLOW) + _FAST in stems)
    if twice:
        raise DataError(
            f"{folder}: {twice[0]} and {twice[0].removesuffix(_SLOW) + _FAST} are one ECG at two rates; choose one of "
            "them with data.pattern='records100/**/*' or 'records500/**/*'"
        )


def _ids(name: str, found: _Found, options: LeadOptions) -> list[str]:
    """The ids of the signals of a record; one that cannot be used has one."""
    if options.layout == "channels" or isinstance(found, str):
        return [name]
    return [f"{name}:{lead}" for lead in options.leads if found.place(lead) is not None] or [name]


def _examples(name: str, found: _Found, options: LeadOptions) -> Iterator[Example | Skipped]:
    """The signals of a record, in the order of `_ids`."""
    ids = _ids(name, found, options)
    try:
        if isinstance(found, str):
            raise DataError(found)
        leads = [lead for lead in options.leads if found.place(lead) is not None]
        if not leads:
            raise DataError(f"{found.path}: none of the leads {', '.join(options.leads)}; name others in data.leads")
        series = _series(found, leads, options)
    except DataError as error:
        yield from (Skipped(id, str(error)) for id in ids)
        return
    if options.layout == "channels":
        wide = np.full((options.length, len(options.leads)), np.nan)
        wide[:, [options.leads.index(lead) for lead in leads]] = series
        series, leads, columns = wide, list(options.leads), [slice(None)]
    else:
        columns = [slice(k, k + 1) for k in range(len(leads))]
    for id, column in zip(ids, columns, strict=True):
        make = functools.partial(
            _example, series[:, column], id, tuple(leads[column]), options, f"{found.path} ({', '.join(leads[column])})"
        )
        yield example_or_skipped(id, make)


def _series(file: EcgFile, leads: list[str], options: LeadOptions) -> np.ndarray:
    """The first seconds of leads that the file has, [length, leads] in mV at the rate asked for; see `_recorded`."""
    values = file.values(leads)
    if round(len(values) / file.rate * options.rate) < options.length:
        took = len(values) / file.rate
        raise DataError(f"{file.path}: {took:g} s, {options.seconds:g} are needed; lower data.seconds or remove it")
    values = _recorded(values[: math.ceil(options.seconds * file.rate)])
    there = ~np.isnan(values[0])
    series = np.full((options.length, len(leads)), np.nan)
    series[:, there] = at_rate(values[:, there], file.rate, options.rate)[: options.length]
    return _recorded(series)


def _recorded(values: np.ndarray) -> np.ndarray:
    """Values [n, leads], all NaN in leads that have one that is not finite, or that are constant."""
    finite = np.isfinite(values).all(0)
    varied = finite & (np.where(finite, values, 0).max(0) > np.where(finite, values, 0).min(0))
    return np.where(varied, values, np.nan)


def _example(series: np.ndarray, name: str, leads: tuple[str, ...], options: LeadOptions, place: str) -> Example:
    """Leads [length, leads] in mV, NaN where missing, to float32 in [0, 1]."""
    there = ~np.isnan(series[0])
    if not there.any():
        raise DataError(f"{place}: flat, or with invalid samples, in its first {options.seconds:g} s; remove it")
    filled, alone = np.where(there, series, 0), len(leads) == 1 or options.scale == "channel"
    low: np.ndarray | float
    high: np.ndarray | float
    if options.value_range:
        low, high = options.value_range
    elif options.scale == "channel":
        low, high = filled.min(0), np.where(there, filled.max(0), 1)
    else:
        low, high = float(filled[:, there].min()), float(filled[:, there].max())
    units = units_between(
        low, high, values=filled[:, there] if options.value_range else None, unit="mV",
        shared="signals" if options.value_range else "" if alone else "channels",
    )  # fmt: skip
    units = replace(
        units, time=(0.0, 1 / options.rate), columns=("seconds", *leads), missing=tuple(np.flatnonzero(~there).tolist())
    )  # fmt: skip
    return Example(np.clip((filled - low) / (high - low), 0, 1).astype(np.float32), name, units=units)
