"""Beats from the raw records of the MIT-BIH Arrhythmia Database (.hea, .dat, .atr), after Kachuee et al. 2018.

The lead is resampled to 125 Hz and cut into windows of 10 s, each scaled to [0, 1] by its minimum and maximum. An
annotated beat starts at its R peak, moved to the highest sample within 24 ms (and the window), and lasts 1.2 T, with T
the median RR interval of the window, at most 187 samples; the rest is 0. Left out: beats that exceed their window,
windows with fewer than two beats, without signal or with invalid samples, and the samples after the last whole window.
Annotations without an AAMI class (rhythm changes, noise, flutter waves) are no beats.

Honoured: rate, length, the lead's name, coding, gain, baseline and checksum in a header; samples, symbols and a
separate rate in annotations. Ignored: units (a window is scaled by itself), comments, and entries of other leads. An
annotation file is refused unless it has the proper end and its samples lie in the record, in order.

Splits are by patient: records 201 and 202 are of one patient. Reading the records needs the package `wfdb`.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from medfuncta_jax.datasets.contents import contents
from medfuncta_jax.datasets.dataset import SPLITS, DataError
from medfuncta_jax.datasets.splits import split_names

_log = logging.getLogger(__name__)

BEAT_SAMPLES = 187
CLASSES = ("N", "S", "V", "F", "Q")

RATE = 125
_WINDOW = 10 * RATE
_REACH = round(0.024 * RATE)
_LENGTH_IN_RR = 1.2

# Plausible sampling rates of an ECG, samples a second.
_RATES = (50, 10_000)

# The annotation symbols of each class (ANSI/AAMI EC57).
_SYMBOLS = {"N": "NLRejB", "S": "AaJS", "V": "VE", "F": "F", "Q": "/fQ"}
_CLASS_OF = {symbol: CLASSES.index(name) for name, symbols in _SYMBOLS.items() for symbol in symbols}

# Codes in an annotation file that add four bytes, or a stated number of bytes, to the same annotation.
_SKIP, _AUX = 59, 63

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
        return self.lead in (self._read("header").sig_name or [])

    def beats(self) -> list[Beat]:
        """The beats in their order.

        Raises:
          DataError: a file of the record is missing, truncated or corrupt.
        """
        record, notes = self._read("signal"), self._read("annotations")
        for rate in (record.fs, notes.fs or record.fs):
            if not _RATES[0] <= rate <= _RATES[1]:
                raise DataError(f"{self.header}: {rate:g} samples a second is no rate of an ECG; copy the record anew")
        if _is_wrong(record):
            raise DataError(f"{self.header}: the samples of {self.lead} do not add up to its checksum; copy it anew")
        # Annotations may have a separate sampling rate.
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
        kept, values, ranges = extract_beats(record.dac()[:, 0], float(record.fs), samples)
        unit = str((record.units or [""])[0])
        return [
            Beat(int(samples[i]), labels[i], beat, float(low), float(high), unit)
            for i, beat, (low, high) in zip(kept, values, ranges, strict=True)
        ]

    def _read(self, part: str) -> Any:
        place = str(self.header.with_suffix(""))
        try:
            with warnings.catch_warnings(action="ignore"):  # wfdb 4.3 uses what pandas 3 is about to remove
                import wfdb

                if part == "annotations":
                    _require_annotations(self.header.with_suffix(".atr"))
                    return wfdb.rdann(place, "atr")
                if part == "signal":
                    return wfdb.rdrecord(place, channel_names=[self.lead], physical=False)
                header = wfdb.rdheader(place)
                if header.n_sig != len(header.sig_name or []):
                    raise DataError(
                        f"{self.header}: cut short, for it names fewer than {header.n_sig} signals; copy it anew"
                    )
                return header
        except DataError:
            raise
        except ImportError as error:
            raise DataError(
                f"{self.header}: raw records need the package wfdb (pip install 'medfuncta_jax[ecg]'), or take "
                "data.format=csv"
            ) from error
        except FileNotFoundError as error:
            raise DataError(f"{error.filename or place}: no such file; copy the whole record anew") from error
        except OSError as error:
            raise DataError(f"{place}: cannot be read ({error.strerror or 'cut short'}); check the record") from error
        except Exception as error:  # wfdb parses any content and may raise anything
            path = self.header.with_suffix({"header": ".hea", "signal": ".dat", "annotations": ".atr"}[part])
            what = contents(path) if path.is_file() else ""
            reason = f"it is {what}" if what and (what, part) != ("text", "header") else "it is damaged or cut short"
            raise DataError(f"{place}: the {part} of the record cannot be read ({reason}); copy it anew") from error


def _is_wrong(record: Any) -> bool:
    """Whether samples differ from the header's checksum, if that is stated and not 0."""
    stated = (record.checksum or [None])[0]
    return bool(stated) and (int(record.d_signal.sum(dtype=np.int64)) - int(stated)) % (1 << 16) != 0


def _require_annotations(path: Path) -> None:
    """Refuse a file whose annotations do not lead to the two zero bytes at the end.

    An annotation is a word of 16 bits, a code above a count of samples; some codes say that more bytes follow.
    """
    data, at = path.read_bytes(), 0
    while at + 2 <= len(data):
        word = int.from_bytes(data[at : at + 2], "little")
        code, count = word >> 10, word & 0x3FF
        if not word and at:
            return
        if not word:
            break
        at += 2 + (4 if code == _SKIP else count + count % 2 if code == _AUX else 0)
    what = contents(path)
    reason = f"{what}, no annotations" if what else "cut short, for annotations end in two zero bytes"
    raise DataError(f"{path}: {reason}; copy it anew")


def extract_beats(signal: np.ndarray, rate: float, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The beats of one lead.

    Args:
      signal: [n], any unit; NaN where invalid.
      rate: samples a second, above 0.
      samples: int [m], annotated beats as indices into `signal`, rising.
    Returns:
      int [k], which of the m beats are kept; float32 [k, 187] in [0, 1]; and [k, 2], the values that became 0 and 1.
    """
    from scipy.signal import resample_poly

    ratio = Fraction(RATE / rate).limit_denominator(10_000)
    invalid = ~np.isfinite(signal)
    if invalid.any() and not invalid.all():
        signal = np.interp(np.arange(len(signal)), np.flatnonzero(~invalid), signal[~invalid])
    # The line from the first to the last sample is subtracted first, so that the ends do not ring.
    resampled = resample_poly(signal, ratio.numerator, ratio.denominator, padtype="line")
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
