"""One ECG of several leads: a WFDB record (.hea and its .dat, as PTB-XL has them) or a DICOM waveform.

Leads are known by their names, in any case and without what files add ("AVR" and "Lead aVR (Goldberger)" are aVR).
Values are in mV. `wfdb_file.py` says which fields of a WFDB header count. A DICOM file counts with its first waveform
that is not derived (as the median beat beside it is): sampling frequency, channels, samples, their type and padding
value, sensitivity with its correction and unit, baseline, the source or else the label of each channel, and the
patient. Filters, annotations, time offsets and skews are ignored.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medfuncta_jax.datasets import wfdb_file
from medfuncta_jax.datasets.dataset import DataError
from medfuncta_jax.datasets.delimited import shown
from medfuncta_jax.datasets.dicom_file import pydicom_module

SUFFIXES = (".hea", ".dcm")

# Units of voltage, in mV.
_MILLIVOLTS = {"V": 1e3, "mV": 1.0, "uV": 1e-3, "µV": 1e-3, "μV": 1e-3, "nV": 1e-6}

# Characters around the name of a lead in files.
_AROUND = re.compile(r"^(mdc[_ ])?(ecg[_ ])?lead[_ ]+|\(.*?\)", re.IGNORECASE)

# DICOM's codes of samples that are proportional to a voltage, by the bits of a sample.
_KINDS = {("SB", 8): "i1", ("UB", 8): "u1", ("SS", 16): "<i2", ("US", 16): "<u2", ("SL", 32): "<i4", ("UL", 32): "<u4"}


def lead_key(name: str) -> str:
    """A key that is equal for all names of a lead."""
    return " ".join(_AROUND.sub("", name.strip()).split()).casefold()


@dataclass(frozen=True)
class EcgFile:
    """What the header of an ECG says.

    Attributes:
      path: of the WFDB header, or the DICOM file.
      leads: names in the file.
      rate: samples a second.
      patient: as DICOM states it; None where it is not known.
      files: all that hold the ECG.
    """

    path: Path
    leads: tuple[str, ...]
    rate: float
    patient: str | None
    files: tuple[Path, ...]

    def place(self, lead: str) -> int | None:
        """The number of a lead among those of the file; None if it is not there."""
        keys = [lead_key(one) for one in self.leads]
        return keys.index(lead_key(lead)) if lead_key(lead) in keys else None

    def values(self, leads: Sequence[str]) -> np.ndarray:
        """Some leads of the file, by their names: float64 [n, len(leads)] in mV, NaN where a sample is invalid.

        Raises:
          DataError: a file that is missing, truncated or damaged, or a lead that is no voltage.
        """
        places = [place for place in map(self.place, leads) if place is not None]
        read = _wfdb_values if self.path.suffix.lower() == ".hea" else _dicom_values
        values, units = read(self.path)
        if len(units) != len(self.leads):
            raise DataError(f"{self.path}: {len(units)} signals, its header names {len(self.leads)}; copy it anew")
        for place in places:
            if units[place] not in _MILLIVOLTS:
                raise DataError(
                    f"{self.path}: the unit of {self.leads[place]} is {shown(units[place])}, no voltage; leave it out "
                    "with data.leads"
                )
        return values[:, places] * np.array([_MILLIVOLTS[units[place]] for place in places])


def read_header(path: Path) -> EcgFile:
    """The header of an ECG.

    Raises:
      DataError: the package that reads it is not installed, or a file that is unreadable, holds no ECG, names a lead
        twice or states no sampling frequency.
    """
    if path.suffix.lower() == ".hea":
        header = wfdb_file.read_header(path)
        beside = (path.parent / name for name in header.files)
        found = EcgFile(path, header.names, header.rate, None, (path, *beside))
    else:
        with _dicom(path) as (file, waveform):
            names = tuple(_lead_of(path, k, channel) for k, channel in enumerate(waveform.ChannelDefinitionSequence))
            patient = str(file.get("PatientID") or "").strip() or None
            found = EcgFile(path, names, float(waveform.SamplingFrequency), patient, (path,))
    wfdb_file.require_rate(path, found.rate)
    keys = [lead_key(name) for name in found.leads]
    twice = [name for name, key in zip(found.leads, keys, strict=True) if keys.count(key) > 1]
    if twice or not keys:
        raise DataError(f"{path}: {f'two leads are named {shown(twice[0])}' if twice else 'no leads'}; name each once")
    return found


def _wfdb_values(path: Path) -> tuple[np.ndarray, list[str]]:
    record = wfdb_file.read_signals(path)
    wfdb_file.require_sums(path, record)
    return record.p_signal, [str(unit) for unit in record.units]


def _dicom_values(path: Path) -> tuple[np.ndarray, list[str]]:
    with _dicom(path) as (_, waveform):
        stored = _stored(path, waveform)
        values, padding, units = stored.astype(np.float64), waveform.get("WaveformPaddingValue"), []
        if padding is not None:
            number = np.frombuffer(padding, stored.dtype, 1)[0] if isinstance(padding, bytes) else padding
            values[stored == number] = np.nan
        for k, channel in enumerate(waveform.ChannelDefinitionSequence):
            unit = channel.get("ChannelSensitivityUnitsSequence")
            if not unit or channel.get("ChannelSensitivity") is None:
                raise DataError(
                    f"{path}: ChannelSensitivity or its unit is missing in channel {k + 1}, so its values are no "
                    "voltage; export the file anew or remove it"
                )
            scale = float(channel.ChannelSensitivity) * float(channel.get("ChannelSensitivityCorrectionFactor") or 1)
            values[:, k] = values[:, k] * scale + float(channel.get("ChannelBaseline") or 0)
            units.append(str(unit[0].get("CodeValue", "")))
    return values, units


@contextlib.contextmanager
def _dicom(path: Path) -> Iterator[tuple[Any, Any]]:
    """The data set of a file and its one waveform that is not derived; what cannot be read of them is refused."""
    pydicom = pydicom_module()
    try:
        with warnings.catch_warnings(action="ignore"):  # about malformed values of elements that do not matter here
            file = pydicom.dcmread(path, specific_tags=["SOPClassUID", "PatientID", "WaveformSequence"])
            groups = file.get("WaveformSequence") or []
            if not groups:
                raise DataError(f"{path}: no waveform in it but {pydicom.uid.UID(file.get('SOPClassUID', '')).name}")
            original = [group for group in groups if group.get("WaveformOriginality") != "DERIVED"]
            if len(original) != 1 or not file.original_encoding[1]:
                kind = "in big endian" if len(original) == 1 else "original, of which one with all leads is needed"
                raise DataError(f"{path}: {len(original)} waveforms {kind}; export the file anew or remove it")
            _require_fields(path, original[0])
            yield file, original[0]
    except DataError:
        raise
    except pydicom.errors.InvalidDicomError as error:
        raise DataError(f"{path}: no DICOM file; copy it anew or remove it") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or 'cut short'}); check the file") from error
    except Exception as error:  # pydicom parses whatever the file holds
        raise DataError(f"{path}: unreadable DICOM waveform (damaged or cut short); copy it anew") from error


def _require_fields(path: Path, waveform: Any) -> None:
    if not waveform.get("SamplingFrequency"):
        raise DataError(f"{path}: SamplingFrequency is missing; export the file anew or remove it")
    channels, stated = len(waveform.get("ChannelDefinitionSequence") or []), waveform.get("NumberOfWaveformChannels")
    if not channels or channels != stated:
        raise DataError(f"{path}: {channels} channels are defined, NumberOfWaveformChannels is {stated}; copy it anew")


def _lead_of(path: Path, number: int, channel: Any) -> str:
    source = channel.get("ChannelSourceSequence")
    name = (source[0].get("CodeMeaning") if source else None) or channel.get("ChannelLabel")
    if not name:
        raise DataError(f"{path}: ChannelSourceSequence of channel {number + 1} names no lead; export the file anew")
    return " ".join(str(name).split())


def _stored(path: Path, waveform: Any) -> np.ndarray:
    """Samples as they are stored, integers [n, channels]."""
    kind = (waveform.get("WaveformSampleInterpretation"), waveform.get("WaveformBitsAllocated"))
    if kind not in _KINDS:
        raise DataError(f"{path}: samples {kind[0]} of {kind[1]} bits are not read; export the file anew")
    channels, samples = int(waveform.NumberOfWaveformChannels), waveform.get("NumberOfWaveformSamples")
    data, dtype = waveform.get("WaveformData") or b"", np.dtype(_KINDS[kind])
    count = channels * int(samples or 0)
    if not count or len(data) < count * dtype.itemsize:
        raise DataError(
            f"{path}: WaveformData holds {len(data)} bytes, {samples} samples of {channels} channels are stated; copy "
            "it anew"
        )
    return np.frombuffer(data, dtype, count).reshape(-1, channels)
