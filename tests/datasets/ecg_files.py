"""ECG records of twelve leads: the real one that pydicom brings, second by second, as WFDB in the layout of PTB-XL."""

import functools
import warnings

import numpy as np
import pydicom
from pydicom.data import get_testdata_file

DICOM = get_testdata_file("waveform_ecg.dcm", download=False)
LEADS = ("I", "II", "III", "AVR", "AVL", "AVF", "V1", "V2", "V3", "V4", "V5", "V6")  # as PTB-XL spells them
RATE = 1000  # of the real recording, Hz
GAIN = 800.0  # a stored step is 1.25 uV
INVALID = -32768


@functools.cache
def stored():
    """Ten seconds of twelve leads as the file stores them, int [10000, 12]."""
    return pydicom.dcmread(DICOM).waveform_array(0).astype(np.float64) / 1.25


def millivolts(second):
    """One second of the recording in mV, [1000, 12]."""
    return stored()[RATE * second : RATE * (second + 1)] / GAIN


def write_record(folder, number, *, leads=LEADS, damage=lambda samples: None, units="mV", suffix="_hr"):
    """Second `number` of the recording as a WFDB record, of these of its leads, in any order; returns the header."""
    import wfdb

    folder.mkdir(parents=True, exist_ok=True)
    columns = [LEADS.index(lead) for lead in leads]
    samples = np.rint(stored()[RATE * number : RATE * (number + 1), columns]).astype(np.int64)
    damage(samples)
    name = f"{number + 1:05d}{suffix}"
    with warnings.catch_warnings(action="ignore"):
        wfdb.wrsamp(
            name, fs=RATE, units=[units] * len(leads), sig_name=list(leads), d_signal=samples,
            fmt=["16"] * len(leads), adc_gain=[GAIN] * len(leads), baseline=[0] * len(leads), write_dir=str(folder),
        )  # fmt: skip
    return folder / f"{name}.hea"


def write_ptbxl(folder, count=10):
    """Records of a second each in `records500/00000`, and a table of two patients a class; returns the folder."""
    for number in range(count):
        write_record(folder / "records500" / "00000", number)
    rows = [f"{i + 1},{i // 2},{'NORM' if i % 4 < 2 else 'MI'},records500/00000/{i + 1:05d}_hr" for i in range(count)]
    (folder / "ptbxl.csv").write_text("ecg_id,patient_id,class,filename_hr\n" + "\n".join(rows) + "\n")
    return folder


def changed_dicom(path, change, second=None):
    """The real file with something changed in its data set, perhaps of one second alone; returns the path."""
    file = pydicom.dcmread(DICOM)
    if second is not None:
        waveform = file.WaveformSequence[0]
        size = len(waveform.WaveformData) // 10
        waveform.WaveformData = waveform.WaveformData[size * second : size * (second + 1)]
        waveform.NumberOfWaveformSamples = RATE
    change(file)
    file.save_as(path)
    return path


def write_dicoms(folder, count=4):
    """The whole recording `count` times, each beginning two seconds later, as DICOM; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):

        def turn(file, number=number):
            data = file.WaveformSequence[0].WaveformData
            start = 2 * number * len(data) // 10
            file.WaveformSequence[0].WaveformData = data[start:] + data[:start]
            file.PatientID = str(number)

        changed_dicom(folder / f"{number}.dcm", turn)
    return folder
