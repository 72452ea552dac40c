"""Beats from records in PhysioNet's format, against a plain statement of the extraction on a made-up ECG."""

import logging
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medfuncta_jax.datasets import DataError, open_dataset
from medfuncta_jax.datasets.physionet import Record, extract_beats
from medfuncta_jax.settings import DataSettings
from tests.datasets.damage import DAMAGE, assert_refusal, damaged

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # wfdb 4.3 uses what pandas 3 is about to remove
    wfdb = pytest.importorskip("wfdb", exc_type=ImportError)

# Times of R peaks on the raster of 125 Hz, so that the highest sample is never in doubt.
KINDS = ["N", "L", "V", "A", "F", "/", "+", "~", "!", "e"]


def _made_up(seed, seconds=35.0):
    """R peaks [m] in seconds, symbols, and the ECG as a function of time."""
    rng = np.random.default_rng(seed)
    times = 0.4 + np.cumsum(rng.integers(70, 140, 200)) / 125
    times = times[times < seconds - 0.5]
    heights = rng.uniform(0.7, 1.3, len(times))

    def ecg(t):
        away = t[:, None] - times
        waves = np.exp(-0.5 * (away / 0.016) ** 2) + 0.25 * np.exp(-0.5 * ((away - 0.25) / 0.04) ** 2)
        return 0.1 * np.sin(t) + waves @ heights

    return times, [KINDS[i] for i in rng.integers(0, len(KINDS), len(times))], ecg


def _write_record(folder, name, seed, leads=("MLII", "V5")):
    times, symbols, ecg = _made_up(seed)
    signal = ecg(np.arange(35 * 360) / 360)
    samples = np.round(times * 360).astype(int) + np.random.default_rng(seed).integers(-4, 5, len(times))
    folder.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wfdb.wrsamp(
            name, fs=360, units=["mV", "mV"], sig_name=list(leads), p_signal=np.stack([signal, -signal], 1),
            fmt=["212", "212"], write_dir=str(folder),
        )  # fmt: skip
        wfdb.wrann(name, "atr", samples, symbols, write_dir=str(folder))
    return samples, symbols, ecg


def _expected(samples, symbols, ecg):
    """The extraction, stated plainly: {sample: (class, beat)}."""
    classes = dict.fromkeys("NLRejB", 0) | dict.fromkeys("AaJS", 1) | dict.fromkeys("VE", 2) | {"F": 3}
    classes |= dict.fromkeys("/fQ", 4)
    signal = ecg(np.arange(35 * 125) / 125)
    beats = {}
    for start in (0, 1250, 2500):
        window = signal[start : start + 1250]
        window = (window - window.min()) / (window.max() - window.min())
        peaks = []
        for sample, symbol in zip(samples, symbols, strict=True):
            place = round(sample * 125 / 360) - start
            if symbol in classes and 0 <= place < 1250:
                near = range(max(0, place - 3), min(1250, place + 4))
                peaks.append((max(near, key=lambda i: window[i]), sample, classes[symbol]))
        length = 1.2 * np.median(np.diff([peak for peak, _, _ in peaks]))
        length = min(187, int(np.round(length)))
        for peak, sample, label in peaks:
            if peak + length <= 1250:
                beats[sample] = (label, np.pad(window[peak : peak + length], (0, 187 - length)))
    return beats


def _open(tmp_path, **options):
    options = {"format": "physionet", "val_fraction": 0.2} | options
    source = DataSettings("ecg", str(tmp_path / "cache"), tuple(sorted(options.items())))
    return open_dataset(source, data_dir=str(tmp_path / "mit bih é"))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Six records with the lead, one without, and an excerpt as PhysioNet has them in a folder of its own."""
    folder = tmp_path_factory.mktemp("records")
    names = ("100", "101", "103", "201", "202", "203")
    made = {name: _write_record(folder, name, seed) for seed, name in enumerate(names)}
    _write_record(folder, "102", 9, leads=("V5", "V2"))
    _write_record(folder / "x_mitdb", "x_108", 10)
    return folder, made


@pytest.fixture
def records(tmp_path, written):
    """What the records hold; they are copied into this test's data directory."""
    shutil.copytree(written[0], tmp_path / "mit bih é")
    return written[1]


def test_beats_equal_the_plain_statement(tmp_path, records, caplog):
    with caplog.at_level(logging.WARNING):
        data = _open(tmp_path)
    assert "records 102 have no lead MLII" in caplog.text
    found = {}
    for split in data.splits.values():
        found |= {example["id"]: example for example in split}
    expected = {}
    for name, made in records.items():
        expected |= {f"{name}:{sample:06d}": beat for sample, beat in _expected(*made).items()}
    assert found.keys() == expected.keys()
    assert len(found) > 100
    for name, (label, beat) in expected.items():
        assert found[name]["label"] == label
        # 12 bits of the record, and the filter of the resampling.
        np.testing.assert_allclose(found[name]["signal"][:, 0], beat, atol=0.01, err_msg=name)
        assert found[name]["signal"][0, 0] > 0.4


def test_splits_are_by_patient_seeded_and_written_down(tmp_path, records):
    data = _open(tmp_path)
    split = data.about["split"]
    assert sorted(name for names in split.values() for name in names) == ["100", "101", "103", "201", "202", "203"]
    for name, names in split.items():
        assert {one.split(":")[0] for one in data.splits[name].annotations().ids} == set(names)
        assert ("201" in names) == ("202" in names)
    assert data.about["left_out"] == ["102"]
    assert _open(tmp_path).about["split"] == split
    assert any(_open(tmp_path, seed=seed).about["split"] != split for seed in (1, 2, 3))


def test_test_records_by_name(tmp_path, records):
    assert _open(tmp_path, test_records=("203", "100")).about["split"]["test"] == ["100", "203"]
    with pytest.raises(DataError, match="record 202 is of a patient in test_records"):
        _open(tmp_path, test_records=("201",))
    with pytest.raises(DataError, match="test record 102 is not there or has no lead MLII"):
        _open(tmp_path, test_records=("102",))


@pytest.mark.parametrize(
    ("suffix", "damage", "message"),
    [
        (".dat", lambda data: data[: len(data) // 2], "100: the signal of the record cannot be read"),
        (".dat", None, r"100\.dat: no such file"),
        (".atr", None, r"100\.atr: no such file"),
        (".hea", lambda data: b"\xff\xfe junk", "100: the header of the record cannot be read"),
        (".hea", lambda data: b"", "100: the header of the record cannot be read"),
        (".hea", lambda data: data.replace(b" 360 ", b" 0 "), r"100\.hea: 0 samples a second is no rate of an ECG"),
        (".hea", lambda data: data.replace(b" 360 ", b" 0.001 "), r"100\.hea: 0\.001 samples a second is no rate"),
    ],
)
def test_damaged_record_is_named_in_one_line(tmp_path, records, suffix, damage, message):
    path = (tmp_path / "mit bih é" / "100").with_suffix(suffix)
    data = path.read_bytes()
    path.unlink()
    if damage:
        path.write_bytes(damage(data))
    with pytest.raises(DataError, match=message) as caught:
        _open(tmp_path)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda whole: whole[: len(whole) // 4 * 2], "cut short, for annotations end in two zero bytes"),
        (lambda whole: whole[:-2], "cut short, for annotations end in two zero bytes"),
        (lambda whole: b"", "an empty file, no annotations"),
        (lambda whole: bytes(len(whole)), "a file of zeros, no annotations"),
        (lambda whole: b"<html><body>" + b"404 not found. " * 40 + b"</body></html>", "an HTML page, no annotations"),
        (lambda whole: b"version https://git-lfs.github.com/spec/v1\nsize 12\n", "a Git LFS pointer, no annotations"),
        (
            lambda whole: (1 << 10 | 1023).to_bytes(2, "little") * 40 + bytes(2),
            "its annotations do not lie in",
        ),
    ],
)
def test_what_are_no_annotations_is_refused(tmp_path, records, content, message):
    path = tmp_path / "mit bih é" / "100.atr"
    path.write_bytes(content(path.read_bytes()))
    with pytest.raises(DataError, match=rf"100\.atr: {message}.*; copy (it|the record) anew"):
        Record(path.with_suffix(".hea"), "MLII").beats()


def test_annotations_that_are_cut_are_refused_wherever_they_are_cut(written):
    with tempfile.TemporaryDirectory() as folder:
        for part in (".hea", ".dat", ".atr"):
            shutil.copy(written[0] / f"100{part}", folder)
        path = Path(folder) / "100.atr"
        whole = path.read_bytes()
        for length in range(0, len(whole), 7):
            path.write_bytes(whole[:length])
            with pytest.raises(DataError, match=r"100\.atr: (cut short|an empty file)"):
                Record(path.with_suffix(".hea"), "MLII").beats()


def test_annotations_may_count_at_a_rate_of_their_own(tmp_path):
    samples, symbols, _ = _write_record(tmp_path, "100", 0)
    record = Record(tmp_path / "100.hea", "MLII")
    before = record.beats()
    with warnings.catch_warnings(action="ignore"):
        wfdb.wrann("100", "atr", samples * 2, symbols, write_dir=str(tmp_path), fs=720)
    after = record.beats()
    assert [beat.label for beat in after] == [beat.label for beat in before]
    np.testing.assert_array_equal([beat.values for beat in after], [beat.values for beat in before])


def test_a_signal_that_does_not_add_up_is_refused(tmp_path, records):
    path = tmp_path / "mit bih é" / "100.dat"
    content = bytearray(path.read_bytes())
    content[3000] ^= 1  # of format 212, the first byte of three is of the first lead
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"100\.hea: the samples of MLII do not add up to its checksum; copy it anew"):
        Record(path.with_suffix(".hea"), "MLII").beats()
    header = path.with_suffix(".hea")
    text = header.read_text().splitlines()
    fields = text[1].split()
    fields[6] = "0"  # as it is written where no checksum is known
    header.write_text("\n".join([text[0], " ".join(fields), *text[2:]]))
    assert Record(header, "MLII").beats()


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    form=st.sampled_from(["16", "212", "24", "32", "80"]), gain=st.sampled_from([200.0, -200.0, 11.5]),
    baseline=st.sampled_from([0, 100, -50]), unit=st.sampled_from(["mV", "uV"]), length=st.booleans(),
)  # fmt: skip
def test_any_header_is_read_as_it_is_meant(form, gain, baseline, unit, length):
    """Beats are those of the ECG, or of its negative where the gain is negative: a window is scaled by itself."""
    times, symbols, ecg = _made_up(3)
    digital = np.rint(ecg(np.arange(35 * 360) / 360) * (50.0 if form == "80" else 500.0)).astype(np.int64)
    samples = np.round(times * 360).astype(int)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(action="ignore"):
        wfdb.wrsamp(
            "100", fs=360, units=["x", unit], sig_name=["V5", "MLII"], d_signal=np.stack([digital[::-1], digital], 1),
            fmt=[form] * 2, adc_gain=[7.0, abs(gain)], baseline=[1, baseline], write_dir=folder,
        )  # fmt: skip
        wfdb.wrann("100", "atr", samples, symbols, write_dir=folder)
        header = Path(folder) / "100.hea"
        text = header.read_text().replace(f" {abs(gain):g}", f" {gain:g}")
        header.write_text(text if length else text.replace(f" 360 {len(digital)}", " 360", 1))
        found = Record(header, "MLII").beats()
    samples = samples[[symbol in "NLRejBAaJSVEF/fQ" for symbol in symbols]]
    kept, expected, _ = extract_beats(digital * np.sign(gain), 360, samples)
    assert len(kept) > 10
    np.testing.assert_array_equal([beat.sample for beat in found], samples[kept])
    np.testing.assert_allclose([beat.values for beat in found], expected, atol=1e-3)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(suffix=st.sampled_from([".hea", ".hea", ".dat", ".atr"]), damage=DAMAGE)
def test_any_record_is_read_or_refused_in_one_line(written, suffix, damage):
    with tempfile.TemporaryDirectory() as folder:
        for part in (".hea", ".dat", ".atr"):
            content = (written[0] / f"100{part}").read_bytes()
            (Path(folder) / f"100{part}").write_bytes(damaged(content, damage) if part == suffix else content)
        record = Record(Path(folder) / "100.hea", "MLII")
        try:
            beats = record.beats() if record.has_lead() else []
        except DataError as error:
            assert_refusal(error, folder)
            return
    for beat in beats:
        assert beat.values.shape == (187,)
        assert beat.values.min() >= 0
        assert beat.values.max() <= 1
        assert beat.label in range(5)


def test_no_records_too_few_and_a_record_twice(tmp_path):
    folder = tmp_path / "mit bih é"
    folder.mkdir()
    with pytest.raises(DataError, match=r"no records such as 100\.hea"):
        _open(tmp_path)
    _write_record(folder, "100", 0)
    with pytest.raises(DataError, match=r"too few patients \(1\)"):
        _open(tmp_path)
    _write_record(folder / "copy", "100", 0)
    with pytest.raises(DataError, match="record 100 is there twice"):
        _open(tmp_path)


def test_windows_without_signal_or_beats_are_left_out():
    times, _, ecg = _made_up(0)
    signal = ecg(np.arange(35 * 360) / 360)
    samples = np.round(times * 360).astype(int)
    whole, _, _ = extract_beats(signal, 360, samples)
    gap = signal.copy()
    gap[5000:5010] = np.nan  # in the second window
    kept, beats, _ = extract_beats(gap, 360, samples)
    assert set(kept) == {i for i in whole if not 3600 <= samples[i] < 7200}
    assert np.isfinite(beats).all()
    assert extract_beats(np.zeros(8000), 360, samples[samples < 8000])[1].shape == (0, 187)
    assert extract_beats(np.full(8000, np.nan), 360, samples[:5])[1].shape == (0, 187)
    assert extract_beats(signal, 360, samples[:0])[1].shape == (0, 187)
    assert extract_beats(signal[:100], 360, samples[:0])[1].shape == (0, 187)


def test_without_wfdb_the_message_says_what_to_install(tmp_path, records, monkeypatch):
    monkeypatch.setitem(sys.modules, "wfdb", None)
    with pytest.raises(DataError, match=r"pip install 'medfuncta_jax\[ecg\]'") as caught:
        _open(tmp_path)
    assert len(str(caught.value).splitlines()) == 1
