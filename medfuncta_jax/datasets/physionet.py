"""Beats from the raw records of the MIT-BIH Arrhythmia Database (.hea, .dat, .atr), after Kachuee et al. 2018.

The lead is resampled to 125 Hz and cut into windows of 10 s, each scaled to [0, 1] by its minimum and maximum. An
annotated beat starts at its R peak, moved to the highest sample within 24 ms (and the window), and lasts 1.2 T, with T
the median RR interval of the window, at most 187 samples; the rest is 0. Left out: beats that exceed their window,
windows with fewer than two beats, without signal or with invalid samples, and the samples after the last whole window.
Annotations without an AAMI class (rhythm changes, noise, flutter waves) are no beats.

What counts of a header and of annotations says `wfdb_file.py`. Ignored are units (a window is scaled by itself) and
what is said of other leads. An annotation file is refused unless its samples lie in the record, in order.

Splits are by patient: records 201 and 202 are of one patient. Reading the records needs the package `wfdb`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from medfuncta_jax.datasets.dataset import SPLITS, DataError
from medfuncta_jax.datasets.splits import split_names
from medfuncta_jax.datasets.wfdb_file import read_annotations, read_header, read_signals, require_rate, require_sums

_log = logging.getLogger(__name__)

BEAT_SAMPLES = 187
CLASSES = ("N", "S", "V", "F", "Q")

RATE = 125
_WINDOW = 10 * RATE
_REACH = round(0.024 * RATE)
_LENGTH_IN_RR = 1.2

# The annotation symbols of each class (ANSI/AAMI EC57).
_SYMBOLS = {"N": "NLRejB", "S": "AaJS", "V": "VE", "F": "F", "Q": "/fQ"}
_CLASS_OF = {symbol: CLASSES.index(name) for name, symbols in _SYMBOLS.items() for symbol in symbols}

_PATIENT_OF = {"202": "201"}


@dataclass(frozen=True)
class Beat:
    """One heartbeat.

    Attributes:
      sample: the place of its annotation, in samples of the record.
      label: index into `CLASSES`.
      values: float32 [187] in [0, 1].
      low, high: the values that became 0 and 1, the minimum and maximum of the 10 s around the beat.
      unit: the unit of low and high, such as "mV".
    """

    sample: int
    label: int
    values: np.ndarray
    low: float
    high: float
    unit: str


@dataclass(frozen=True)
class Record:
    """One record by its header file; the signal is read by `beats`."""

    header: Path
    lead: str

    @property
    def name(self) -> str:
        """Such as "100"."""
        return self.header.stem

    @property
    def patient(self) -> str:
        """The patient of the record."""
        return _PATIENT_OF.get(self.name, self.name)

    def has_lead(self) -> bool:
        """Whether the lead was recorded.

        Raises:
          DataError: `wfdb` is not installed, or the header cannot be read.
        """
        return self.lead in read_header(self.header).names

    def beats(self) -> list[Beat]:
        """The beats in their order.

        Raises:
          DataError: a file of the record is missing, truncated or corrupt.
        """
        record, notes = read_signals(self.header, [self.lead]), read_annotations(self.header)
        for rate in (record.fs, notes.fs or record.fs):
            require_rate(self.header, rate)
        require_sums(self.header, record)
        # Annotations may count in a rate of their own.
        samples = np.rint(np.asarray(notes.sample) * (record.fs / (notes.fs or record.fs))).astype(np.int64)
        length = len(record.d_signal)
        if len(samples) and (samples.min() < 0 or samples.max() >= length or (np.diff(samples) < 0).any()):
            raise DataError(
                f"{self.header.with_suffix('.atr')}: its annotations do not lie in the {length} samples of the record, "
                "in order; copy the record anew"
            )
        beats = [i for i, symbol in enumerate(notes.symbol) if symbol in _CLASS_OF]
        samples = samples[beats]
        labels = [_CLASS_OF[notes.symbol[i]] for i in beats]
        kept, values, ranges = extract_beats(record.p_signal[:, 0], float(record.fs), samples)
        unit = str((record.units or [""])[0])
        return [
            Beat(int(samples[i]), labels[i], beat, float(low), float(high), unit)
            for i, beat, (low, high) in zip(kept, values, ranges, strict=True)
        ]


def extract_beats(signal: np.ndarray, rate: float, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The beats of one lead.

    Args:
      signal: [n], any unit; NaN where invalid.
      rate: samples a second, above 0.
      samples: int [m], annotated beats as indices into `signal`, rising.
    Returns:
      int [k], which of the m beats are kept; float32 [k, 187] in [0, 1]; and [k, 2], the values that became 0 and 1.
    """
    invalid = ~np.isfinite(signal)
    if invalid.any() and not invalid.all():
        signal = np.interp(np.arange(len(signal)), np.flatnonzero(~invalid), signal[~invalid])
    resampled = at_rate(signal, rate, RATE)
    places = np.rint(samples * (RATE / rate)).astype(np.int64)
    kept: list[int] = []
    beats: list[np.ndarray] = []
    ranges: list[tuple[float, float]] = []
    for start in range(0, len(resampled) - _WINDOW + 1, _WINDOW):
        window = resampled[start : start + _WINDOW]
        inside = np.arange(*np.searchsorted(places, (start, start + _WINDOW)))
        first, end = (math.floor(edge / RATE * rate) for edge in (start, start + _WINDOW))
        if len(inside) < 2 or invalid[first:end].any() or not window.max() > window.min():
            continue
        unit = (window - window.min()) / (window.max() - window.min())
        peaks = np.array([_highest(unit, at) for at in places[inside] - start])
        length = min(round(_LENGTH_IN_RR * float(np.median(np.diff(peaks)))), BEAT_SAMPLES)
        for i, peak in zip(inside, peaks, strict=True):
            if peak + length <= _WINDOW and length > 0:
                beat = np.zeros(BEAT_SAMPLES, np.float32)
                beat[:length] = unit[peak : peak + length]
                kept.append(int(i))
                beats.append(beat)
                ranges.append((float(window.min()), float(window.max())))
    beats_array = np.array(beats, np.float32).reshape(-1, BEAT_SAMPLES)
    return np.array(kept, np.int64), beats_array, np.array(ranges).reshape(-1, 2)


def at_rate(signal: np.ndarray, rate: float, to: float) -> np.ndarray:
    """A signal [n, ...] of `rate` samples a second at `to` samples a second, anti-aliased; the first sample stays."""
    from scipy.signal import resample_poly

    ratio = Fraction(to / rate).limit_denominator(10_000)
    # A line from the first to the last sample is taken off first, so that the ends do not ring.
    resampled: np.ndarray = resample_poly(signal, ratio.numerator, ratio.denominator, padtype="line")
    return resampled


def _highest(unit: np.ndarray, at: int) -> int:
    first = max(at - _REACH, 0)
    return first + int(np.argmax(unit[first : at + _REACH + 1]))


@dataclass(frozen=True)
class RecordSplit:
    """Records by split.

    Attributes:
      records: in the order of their names.
      lengths: number of beats in each split.
      about: JSON-able: the rule, the records of each split, those left out, and the files.
    """

    records: Mapping[str, list[Record]]
    lengths: Mapping[str, int]
    about: dict[str, Any]


def split_records(
    folder: Path, *, lead: str, test_records: tuple[str, ...], fractions: Mapping[str, float], seed: int
) -> RecordSplit:
    """The records below a folder, split by patient; all records are read once, to count their beats.

    Args:
      folder: with records named by three digits, as published ("x_108" and the like there are excerpts), at any depth.
      lead: the lead of the beats; records without it are left out, and logged.
      test_records: all records to test on; empty draws them.
      fractions: fractions of the patients for "val" and "test".
      seed: seed of the split.
    Raises:
      DataError: no records, a record twice or damaged, a test record that is not there or shares a patient with
        others, or too few patients.
    """
    records, without = records_with_lead(folder, lead)
    patients = {name: record.patient for name, record in records.items()}
    if absent := sorted(set(test_records) - set(patients)):
        raise DataError(f"{folder}: test record {absent[0]} is not there or has no lead {lead}; name others")
    tested = {patients[name] for name in test_records}
    if shared := sorted(name for name in patients if patients[name] in tested and name not in test_records):
        raise DataError(f"{folder}: record {shared[0]} is of a patient in test_records; name it there too")
    drawn = {name: part for name, part in fractions.items() if name != "test" or not test_records}
    rest = [name for name in patients if name not in test_records]
    if len({patients[name] for name in rest}) <= len(drawn):
        raise DataError(f"{folder}: too few patients ({len(set(patients.values()))}) to train, validate and test")
    names = split_names(rest, drawn, seed=seed, groups=patients)
    if test_records:
        names["test"] = sorted(test_records)
    counts = {name: len(records[name].beats()) for name in patients}
    files = [path for name in patients for path in _files(records[name])]
    return RecordSplit(
        records={split: [records[name] for name in names[split]] for split in SPLITS},
        lengths={split: sum(counts[name] for name in names[split]) for split in SPLITS},
        about={
            "folder": str(folder.resolve()),
            "files": {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in files},
            "split_rule": f"by patient (201 and 202 are one), {', '.join(drawn)} drawn with seed {seed}"
            + ("; test as named" if test_records else ""),
            "split": {split: names[split] for split in SPLITS},
            "left_out": without,
        },
    )


def records_with_lead(folder: Path, lead: str) -> tuple[dict[str, Record], list[str]]:
    """The records below a folder that have a lead, by name, and the names of the other records, which are logged.

    Raises:
      DataError: no records, or one that is there twice or damaged.
    """
    records: dict[str, Record] = {}
    for header in sorted(folder.rglob("[0-9][0-9][0-9].hea")):
        if header.stem in records:
            raise DataError(f"{folder}: record {header.stem} is there twice ({records[header.stem].header}, {header})")
        records[header.stem] = Record(header, lead)
    if not records:
        raise DataError(
            f"{folder}: no records such as 100.hea, 100.dat and 100.atr there or below; data_dir must name the "
            "folder of the MIT-BIH Arrhythmia Database"
        )
    without = [name for name, record in records.items() if not record.has_lead()]
    if without:
        _log.warning("%s: records %s have no lead %s and are left out", folder, ", ".join(without), lead)
    return {name: record for name, record in records.items() if name not in without}, without


def _files(record: Record) -> Iterator[Path]:
    for suffix in (".hea", ".dat", ".atr"):
        path = record.header.with_suffix(suffix)
        if not path.is_file():
            raise DataError(f"{path}: no such file; copy the whole record anew")
        yield path
