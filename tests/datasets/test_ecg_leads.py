"""Records of several leads: WFDB and DICOM against the real recording, missing leads, and what cannot be read."""

import logging
import re
import tempfile
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import resample_poly

import medfuncta_jax as mf
from medfuncta_jax.checkpoint import save_field
from medfuncta_jax.datasets import DataError, ecg, open_dataset
from medfuncta_jax.datasets.dataset import Example, Skipped
from medfuncta_jax.datasets.ecg_file import lead_key, read_header
from medfuncta_jax.datasets.ecg_leads import STANDARD
from medfuncta_jax.settings import ModelSettings, Settings, SettingsError
from tests.datasets.damage import DAMAGE, assert_refusal, damaged

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # wfdb 4.3 uses what pandas 3 is about to remove
    pytest.importorskip("wfdb", exc_type=ImportError)
pytest.importorskip("pydicom")

from tests.datasets.ecg_files import (
    DICOM,
    INVALID,
    LEADS,
    changed_dicom,
    millivolts,
    write_ptbxl,
    write_record,
)

SECOND = {"format": "leads", "seconds": 1.0, "rate": 1000.0}
TABLE = {"labels": "ptbxl.csv", "id_column": "filename_hr", "label_column": "class", "patient_column": "patient_id"}


@pytest.fixture(scope="module")
def ptbxl(tmp_path_factory):
    """Ten records, with a table."""
    return write_ptbxl(tmp_path_factory.mktemp("ptb") / "xl é")


def opened(tmp_path, folder, **options):
    return open_dataset("ecg", data_dir=str(folder), cache_dir=str(tmp_path / "cache"), **{**SECOND, **options})


def new(path, **options):
    """The examples of a file or folder that no run has seen."""
    chosen, path = ecg.Options(**{**SECOND, **options}), Path(path)
    files = {path.name: path} if path.is_file() else ecg.new_files(path, chosen)
    plan = ecg.plan_new(chosen, path if path.is_dir() else path.parent, files, grid=(), channels=0)
    examples = list(plan.splits["new"].examples())
    assert len(examples) == plan.splits["new"].length
    return examples


def refusal(path, **options):
    """Why the one record at `path` is skipped, in one line that names it."""
    (one,) = new(path, **options)
    assert isinstance(one, Skipped)
    assert_refusal(DataError(one.reason), str(path).removesuffix(".hea"))
    return one.reason


def test_records_of_ptbxl_are_the_recording(tmp_path, ptbxl):
    data = opened(tmp_path, ptbxl, **TABLE)
    assert (data.grid, data.channels, data.classes, data.task) == ((1000,), 12, ("MI", "NORM"), "binary-class")
    seen, patients = {}, {}
    for name, split in data.splits.items():
        known = split.annotations()
        for i, (id, units) in enumerate(zip(known.ids, known.units, strict=True)):
            number = int(id.removeprefix("records500/00000/").removesuffix("_hr")) - 1
            values = units.values(split[i]["signal"])
            np.testing.assert_allclose(values, millivolts(number), atol=1e-6)  # float32 of a range of 3 mV
            assert (units.unit, units.shared, units.missing) == ("mV", "channels", ())
            assert (units.time, units.columns) == ((0.0, 0.001), ("seconds", *STANDARD))
            assert data.classes[known.labels[i]] == ("NORM" if number % 4 < 2 else "MI")
            seen[number] = name
            patients.setdefault(number // 2, set()).add(name)
    assert sorted(seen) == list(range(10))
    assert all(len(splits) == 1 for splits in patients.values())


@pytest.mark.parametrize("rate", [100.0, 125.0, 360.0])
def test_dicom_at_any_rate_is_resampled_as_by_scipy(rate):
    (one,) = new(DICOM, seconds=10.0, rate=rate, scale="channel")
    whole = np.concatenate([millivolts(second) for second in range(10)])
    ratio = int(rate) // np.gcd(int(rate), 1000), 1000 // np.gcd(int(rate), 1000)
    meant = resample_poly(whole, *ratio, padtype="line")
    assert one.signal.shape == (10 * rate, 12)
    np.testing.assert_allclose(one.units.values(one.signal), meant, atol=1e-6)
    assert one.units.time == (0.0, 1 / rate)
    np.testing.assert_array_equal([one.signal.min(0), one.signal.max(0)], [[0] * 12, [1] * 12])


def test_leads_are_matched_by_name_and_chosen(tmp_path):
    same = [["aVR", "AVR", " Lead aVR (Goldberger)", "MDC_ECG_LEAD_AVR", "ecg lead avr"], ["I", "Lead I (Einthoven)"]]
    assert [{lead_key(name) for name in names} for names in same] == [{"avr"}, {"i"}]
    shuffled = write_record(tmp_path, 3, leads=("V6", "AVL", "II"))
    (one,) = new(shuffled, leads=("ii", "aVL"))
    np.testing.assert_allclose(one.units.values(one.signal), millivolts(3)[:, [1, 4]], atol=1e-6)
    assert one.units.columns == ("seconds", "ii", "aVL")
    (ranged,) = new(shuffled, leads=("ii", "aVL"), value_range=(-0.1, 0.5))
    values = millivolts(3)[:, [1, 4]]
    np.testing.assert_allclose(ranged.units.values(ranged.signal), np.clip(values, -0.1, 0.5), atol=1e-6)
    assert ranged.units.clipped == pytest.approx(np.mean((values < -0.1) | (values > 0.5)))
    assert ranged.units.shared == "signals"


def flat_and_invalid(samples):
    """V2 flat, and a sample of V3 invalid."""
    samples[:, LEADS.index("V2")], samples[40, LEADS.index("V3")] = 7, INVALID


@pytest.mark.parametrize("scale", ["signal", "channel"])
def test_a_missing_lead_is_a_masked_channel(tmp_path, scale):
    path = write_record(tmp_path, 0, leads=tuple(lead for lead in LEADS if lead != "V6"), damage=flat_and_invalid)
    (one,) = new(path, scale=scale)
    missing = [STANDARD.index(lead) for lead in ("V2", "V3", "V6")]
    assert one.units.missing == tuple(missing)
    assert one.units.notes.endswith("not recorded: V2, V3, V6")
    values, there = one.units.values(one.signal), [k for k in range(12) if k not in missing]
    assert np.isnan(values[:, missing]).all()
    np.testing.assert_allclose(values[:, there], millivolts(0)[:, there], atol=1e-6)
    # In the signal it is a line at 0 mV.
    offset, size = (np.broadcast_to(part, 12)[missing] for part in (one.units.offset, one.units.scale))
    np.testing.assert_allclose(offset + size * one.signal[:, missing], np.zeros((1000, 3)), atol=1e-6)
    assert type(one.units).from_json(one.units.to_json()) == one.units


def test_a_lead_a_signal_keeps_a_record_in_one_split(tmp_path, ptbxl, caplog):
    for number in range(10):
        lacks = ("V6",) if number in (2, 5) else ()
        write_record(
            tmp_path / "data", number, leads=tuple(lead for lead in LEADS if lead not in lacks),
            damage=flat_and_invalid if number == 4 else lambda samples: None,
        )  # fmt: skip
    with caplog.at_level(logging.WARNING):
        data = opened(tmp_path, tmp_path / "data", layout="signals", leads=("V1", "V2", "V6"))
    assert "leads are missing: V6 in 2 of 10 records" in caplog.text
    assert (data.grid, data.channels) == ((1000,), 1)
    splits, ids = {}, []
    for name, split in data.splits.items():
        known = split.annotations()
        assert data.contents[name].patients == tuple(f"record {id.partition(':')[0]}" for id in known.ids)
        for id, units, one in zip(known.ids, known.units, split, strict=True):
            record, _, lead = id.partition(":")
            number = int(record[:5]) - 1
            meant = millivolts(number)[:, [STANDARD.index(lead)]]
            np.testing.assert_allclose(units.values(one["signal"]), meant, atol=1e-6)
            assert (units.columns, units.shared) == (("seconds", lead), "")
            splits.setdefault(record, set()).add(name)
            ids.append(id)
    assert all(len(some) == 1 for some in splits.values())
    left = {"00003_hr:V6", "00006_hr:V6", "00005_hr:V2"}
    assert set(ids) == {f"{i + 1:05d}_hr:{lead}" for i in range(10) for lead in ("V1", "V2", "V6")} - left
    assert "flat, or with invalid samples" in data.about["skipped"]["00005_hr:V2"]


def test_dicom_files_of_a_patient_stay_together_also_beside_a_table(tmp_path):
    folder = tmp_path / "dicom"
    folder.mkdir()
    for i in range(8):
        changed_dicom(folder / f"{i}.dcm", lambda file, i=i: setattr(file, "PatientID", f"p{i // 2}"), second=i)
    (folder / "labels.csv").write_text("file,label\n" + "\n".join(f"{i}.dcm,{i % 2}" for i in range(8)))
    for options in ({}, {"labels": "labels.csv"}):
        data = opened(tmp_path, folder, **options)
        held = {name: {int(id[0]) // 2 for id in split.annotations().ids} for name, split in data.splits.items()}
        assert sum(map(len, held.values())) == 4
        assert len(data.classes) == (2 if options else 0)


def _without(name, where=lambda file: file.WaveformSequence[0]):
    return lambda file: delattr(where(file), name)


def _channel(file):
    return file.WaveformSequence[0].ChannelDefinitionSequence[2]


def _with(name, value, where=lambda file: file.WaveformSequence[0]):
    return lambda file: setattr(where(file), name, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without("SamplingFrequency"), "SamplingFrequency is missing"),
        (_with("SamplingFrequency", "1"), "1 samples a second is no rate of an ECG"),
        (_without("WaveformSequence", lambda file: file), "no waveform in it but 12-lead ECG Waveform Storage"),
        (_with("WaveformOriginality", "DERIVED"), "0 waveforms original"),
        (_without("ChannelSensitivity", _channel), "ChannelSensitivity or its unit is missing in channel 3"),
        (_without("ChannelSourceSequence", _channel), "ChannelSourceSequence of channel 3 names no lead"),
        (_with("NumberOfWaveformChannels", 11), "12 channels are defined, NumberOfWaveformChannels is 11"),
        (_with("NumberOfWaveformSamples", 10001), "WaveformData holds 240000 bytes, 10001 samples of 12"),
        (_with("WaveformSampleInterpretation", "MB"), "samples MB of 16 bits are not read"),
        (
            _with("CodeValue", "mm[Hg]", lambda file: _channel(file).ChannelSensitivityUnitsSequence[0]),
            r"the unit of Lead III is 'mm\[Hg\]', no voltage",
        ),
        (
            _with("CodeMeaning", "Lead II", lambda file: _channel(file).ChannelSourceSequence[0]),
            "two leads are named 'Lead II'",
        ),
    ],
)
def test_dicom_that_cannot_be_used_is_named_in_one_line(tmp_path, change, message):
    assert re.search(message, refusal(changed_dicom(tmp_path / "a.dcm", change)))


def test_padding_and_baseline_of_dicom_count(tmp_path):
    def change(file):
        waveform = file.WaveformSequence[0]
        samples = np.frombuffer(waveform.WaveformData, "<i2").reshape(-1, 12).copy()
        samples[5, 0] = INVALID
        waveform.WaveformData = samples.tobytes()
        waveform.add_new("WaveformPaddingValue", "OW", np.int16(INVALID).tobytes())
        _channel(file).ChannelBaseline, _channel(file).ChannelSensitivityCorrectionFactor = "250", "2"

    (one,) = new(changed_dicom(tmp_path / "a.dcm", change, second=1))
    assert one.units.missing == (0,)
    values = one.units.values(one.signal)
    np.testing.assert_allclose(values[:, 2], 2 * millivolts(1)[:, 2] + 0.25, atol=1e-6)
    np.testing.assert_allclose(values[:, 3], millivolts(1)[:, 3], atol=1e-6)


@pytest.mark.parametrize(
    ("suffix", "damage", "message"),
    [
        (".dat", None, r"00001_hr\.dat: no such file"),
        (".dat", lambda data: data[:-50], "the signal of the record cannot be read"),
        (".dat", lambda data: bytes([data[0] ^ 1]) + data[1:], "the samples of I do not add up to its checksum"),
        (".hea", lambda data: b"", "the header of the record cannot be read"),
        (".hea", lambda data: data.replace(b" 12 1000 1000", b" 12"), r"00001_hr\.hea: states no sampling frequency"),
        (".hea", lambda data: data.replace(b"/mV", b"/mmHg"), "the unit of I is 'mmHg', no voltage"),
        (".hea", lambda data: data.replace(b"AVR", b"I"), "two leads are named 'I'"),
        (".hea", lambda data: b"a/3 12 1000 1000\nb 300\nc 300\nd 400\n", "several segments, which is not read"),
    ],
)
def test_records_that_cannot_be_used_are_named_in_one_line(tmp_path, suffix, damage, message):
    header = write_record(tmp_path, 0)
    path = header.with_suffix(suffix)
    data = path.read_bytes()
    path.unlink()
    if damage:
        path.write_bytes(damage(data))
    assert re.search(message, refusal(header))


def test_a_record_that_is_too_short_and_one_without_the_leads(tmp_path):
    header = write_record(tmp_path, 0, leads=("V1", "V2"))
    assert "1 s, 2.5 are needed; lower data.seconds" in refusal(header, leads=("V1",), seconds=2.5)
    assert "none of the leads II, V6; name others" in refusal(header, leads=("II", "V6"))


def test_folders_that_cannot_be_used(tmp_path, ptbxl):
    with pytest.raises(DataError, match=r"no record has the lead V9; name leads in data\.leads of I, II, III, AVR"):
        opened(tmp_path, ptbxl, leads=("I", "V9"))
    write_record(tmp_path / "both" / "records100" / "00000", 0, suffix="_lr")
    write_record(tmp_path / "both" / "records500" / "00000", 0)
    with pytest.raises(DataError, match="00001_lr and 00001_hr are one ECG at two rates; choose one"):
        opened(tmp_path, tmp_path / "both")
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"0 files match .* with a suffix of \.hea \.dcm"):
        opened(tmp_path, tmp_path / "none")
    (tmp_path / "none" / "a.dcm").write_text("text")
    with pytest.raises(DataError, match=r"a\.dcm: no DICOM file"):
        opened(tmp_path, tmp_path / "none")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"leads": ()}, "leads must be names"),
        ({"leads": ("aVR", "AVR")}, "leads must be names, each there once"),
        ({"rate": 0.0}, "rate must be above 0"),
        ({"seconds": 0.001}, "seconds times rate must be 2 to 1000000 samples"),
        ({"value_range": (1.0, 1.0)}, "value_range must be two rising numbers"),
        ({"layout": "rows"}, r"data\.layout must be one of 'channels', 'signals'"),
    ],
)
def test_options_out_of_range(tmp_path, ptbxl, options, message):
    with pytest.raises(SettingsError, match=message):
        opened(tmp_path, ptbxl, **options)


def test_new_records_are_as_in_training(tmp_path, ptbxl):
    """With the leads of the run, by name, whatever the file has; arrays in mV too."""
    leads = ("II", "V1", "V6")
    values = {"data": {"source": "ecg", "cache_dir": str(tmp_path), **SECOND, "leads": leads}}
    run = Settings.from_dict(values | {"model": {"layers": 3, "width": 8, "latent_dim": 4}})
    dataset = open_dataset(run.data, data_dir=str(ptbxl))
    field = mf.Field(run.model, 1, dataset.channels)
    params = field.init(jax.random.key(0))
    save_field(tmp_path / "field.safetensors", field, params, {"settings": run.to_dict(), "grid": list(dataset.grid)})
    seen = {id: signal for split in dataset.splits.values() for id, signal in
            zip(split.annotations().ids, split.signals(slice(None)), strict=True)}  # fmt: skip
    prepared = mf.prepare(tmp_path / "field.safetensors", ptbxl)
    assert set(prepared.ids) == set(seen)
    for id, signal in zip(prepared.ids, prepared.values, strict=True):
        np.testing.assert_array_equal(signal, seen[id])
    path = write_record(tmp_path / "new", 7, leads=("V6", "I", "II"))
    prepared = mf.prepare(tmp_path / "field.safetensors", path)
    back = prepared.in_own_units(prepared.values)
    np.testing.assert_allclose(back[0][:, [0, 2]], millivolts(7)[:, [1, 11]], atol=1e-6)
    assert np.isnan(back[0][:, 1]).all()
    np.testing.assert_array_equal(prepared.weights, np.broadcast_to([[[1, 0, 1]]], prepared.values.shape))
    array = np.where(np.isnan(back[0]), 0, back[0])  # a flat lead is a missing one
    np.testing.assert_allclose(
        mf.prepare(tmp_path / "field.safetensors", array).values[0], prepared.values[0], atol=1e-6
    )
    with pytest.raises(DataError, match=r"\[1000 or more, 3\] is needed, 1 s in mV at 1000 Hz, got \(1000, 2\)"):
        mf.prepare(tmp_path / "field.safetensors", array[:, :2])


def test_recorded_leads_are_fitted_alone(tmp_path):
    """What stands for a missing lead moves no latent, at points and through an operator."""
    (one,) = new(write_record(tmp_path, 0), rate=50.0, leads=("I", "V1", "V6"))
    field = mf.Field(ModelSettings(layers=3, width=16, latent_dim=8), 1, 3)
    params, recorded = field.init(jax.random.key(0)), np.array([1, 1, 0], np.float32)
    signals = np.where(recorded, one.signal, 0)[None] + (1 - recorded) * np.array([[[0]], [[0.9]]], np.float32)
    weights = np.broadcast_to(recorded, signals.shape)
    for options in ({}, {"observe": mf.operators.Points(mf.grid((50,)))}):
        fitted = mf.fit_latent(field, params, signals, weights=weights, steps=2, step_size=1.0, **options)
        np.testing.assert_allclose(fitted.latents[0], fitted.latents[1], rtol=1e-5)
        assert np.abs(fitted.latents).max() > 1e-3
        np.testing.assert_allclose(fitted.losses[1], fitted.losses[0], rtol=1e-5)
        assert fitted.losses[0, -1] < fitted.losses[0, 0]


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(suffix=st.sampled_from([".hea", ".hea", ".dat", ".dcm", ".dcm"]), damage=DAMAGE)
def test_any_record_is_read_or_refused_in_one_line(ptbxl, suffix, damage):
    with tempfile.TemporaryDirectory() as folder:
        if suffix == ".dcm":
            path = Path(folder) / "a.dcm"
            path.write_bytes(damaged(Path(DICOM).read_bytes(), damage, head=12_000))
        else:
            path = Path(folder) / "00001_hr.hea"
            for part in (".hea", ".dat"):
                content = (ptbxl / "records500" / "00000" / "00001_hr").with_suffix(part).read_bytes()
                path.with_suffix(part).write_bytes(damaged(content, damage) if part == suffix else content)
        (one,) = new(path)
        if isinstance(one, Skipped):
            assert_refusal(DataError(one.reason), folder)
            return
    assert isinstance(one, Example)
    assert one.signal.shape == (1000, 12)
    assert 0 <= one.signal.min() <= one.signal.max() <= 1


def test_header_of_the_real_file():
    found = read_header(Path(DICOM))
    assert (found.rate, found.patient, len(found.leads)) == (1000.0, "642341", 12)
    assert [found.place(lead) for lead in STANDARD] == list(range(12))
    assert found.place("V9") is None
