"""One WFDB record, as PhysioNet has them: a header, signals and annotations, read with the package `wfdb`.

Honoured of a header: rate, length, names of the signals, coding, gain, baseline, units and checksums; of annotations:
samples, symbols and a rate of their own. Refused: a header without a rate (for which WFDB assumes 250 Hz), records in
several segments, signals that do not add up to their checksums, and an annotation file that does not end as such files
do. Ignored: comments.

What a plan needs of a header (rate, names, files) is read here, for `wfdb` takes 10 ms for one, and PTB-XL has 21,837.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np

from medfuncta_jax.datasets.contents import contents
from medfuncta_jax.datasets.dataset import DataError

# Samples a second that an ECG is recorded with.
_RATES = (50, 10_000)

# Codes in an annotation file after which four bytes, or as many as are counted, belong to the same annotation.
_SKIP, _AUX = 59, 63


@dataclass(frozen=True)
class Header:
    """What a header says first.

    Attributes:
      rate: samples a second.
      names: of the signals, "" for one without.
      files: beside the header, that hold the signals; each there once.
    """

    rate: float
    names: tuple[str, ...]
    files: tuple[str, ...]


def read_header(path: Path) -> Header:
    """A header, by its own file.

    Raises:
      DataError: `wfdb`, which the signals need, is not installed, or the file is missing, cut short or no such header,
        states no sampling frequency, or is of several segments.
    """
    with _refusing(path, "header"):
        import_wfdb()
        text = path.read_bytes().decode("ascii", "ignore")
        lines = [line for line in (line.partition("#")[0].strip() for line in text.splitlines()) if line]
        record, *signals = lines
        name, count, *rest = record.split()
        if "/" in name:
            raise DataError(f"{path}: a record of several segments, which is not read; write it as one")
        if len(signals) < int(count):
            raise DataError(f"{path}: cut short, for it names fewer than {count} signals; copy it anew")
        if not rest:
            raise DataError(f"{path}: states no sampling frequency; write it after the number of signals, in Hz")
        # File, format, gain, resolution, zero, first value, checksum, block size, and then the name.
        fields = [line.split(None, 8) for line in signals[: int(count)]]
        names = tuple(each[8].strip() if len(each) > 8 else "" for each in fields)
        files = dict.fromkeys(each[0] for each in fields if each[0] != "~")
        return Header(float(rest[0].partition("/")[0]), names, tuple(files))


def import_wfdb() -> ModuleType:
    """The package, imported on first use; without it, ImportError."""
    with warnings.catch_warnings(action="ignore"):  # wfdb 4.3 uses what pandas 3 is about to remove
        import wfdb
    return wfdb


def read_signals(header: Path, names: list[str] | None = None) -> Any:
    """The record that `wfdb` makes, its signals as they are stored (d_signal) and in their units (p_signal).

    Args:
      header: the file.
      names: of the signals to read; None reads all.
    Raises:
      DataError: `wfdb` is not installed, or a file is missing, truncated or corrupt.
    """
    with _refusing(header, "signal"):
        record = import_wfdb().rdrecord(str(header.with_suffix("")), channel_names=names, physical=False)
        record.p_signal = record.dac()
        return record


def read_annotations(header: Path) -> Any:
    """The annotations beside a header, as `wfdb` gives them.

    Raises:
      DataError: `wfdb` is not installed, or the file is missing, truncated or corrupt.
    """
    with _refusing(header, "annotations"):
        _require_annotations(header.with_suffix(".atr"))
        return import_wfdb().rdann(str(header.with_suffix("")), "atr")


@contextlib.contextmanager
def _refusing(header: Path, part: Literal["header", "signal", "annotations"]) -> Iterator[None]:
    """Refuse a part of a record by what is wrong with it, whatever reading it raises."""
    place = str(header.with_suffix(""))
    try:
        with warnings.catch_warnings(action="ignore"):  # see `import_wfdb`
            yield
    except DataError:
        raise
    except ImportError as error:
        raise DataError(f"{header}: WFDB records need the package wfdb (pip install 'medfuncta_jax[ecg]')") from error
    except FileNotFoundError as error:
        raise DataError(f"{error.filename or place}: no such file; copy the whole record anew") from error
    except OSError as error:
        raise DataError(f"{place}: cannot be read ({error.strerror or 'cut short'}); check the record") from error
    except Exception as error:  # wfdb parses whatever the files hold
        path = header.with_suffix({"header": ".hea", "signal": ".dat", "annotations": ".atr"}[part])
        what = contents(path) if path.is_file() else ""
        reason = f"it is {what}" if what and (what, part) != ("text", "header") else "it is damaged or cut short"
        raise DataError(f"{place}: the {part} of the record cannot be read ({reason}); copy it anew") from error


def require_rate(path: Path, rate: float) -> None:
    """Refuse a number of samples a second that no ECG has.

    Raises:
      DataError: names the file.
    """
    if not _RATES[0] <= rate <= _RATES[1]:
        raise DataError(f"{path}: {rate:g} samples a second is no rate of an ECG; copy the record anew")


def require_sums(header: Path, record: Any) -> None:
    """Refuse signals, as they were read, that differ from a checksum in the header, where one is stated other than 0.

    Raises:
      DataError: names the file and the signal.
    """
    if any((count or 1) != 1 for count in record.samps_per_frame or []):
        return  # means over the samples of a frame
    for k, stated in enumerate(record.checksum or []):
        if stated and (int(record.d_signal[:, k].sum(dtype=np.int64)) - int(stated)) % (1 << 16):
            raise DataError(
                f"{header}: the samples of {record.sig_name[k]} do not add up to its checksum; copy it anew"
            )


def _require_annotations(path: Path) -> None:
    """Refuse what does not go on, annotation by annotation, to the two zero bytes that end such a file.

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
