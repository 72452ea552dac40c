"""The launcher on ECG records of several leads, some of which are missing: from training to files in mV."""

import csv
import json

import numpy as np
import pytest

import medfuncta_jax as mf
from tests.experiments.conftest import run

pytest.importorskip("wfdb", exc_type=ImportError)
pytest.importorskip("pydicom")


@pytest.mark.slow
def test_records_with_missing_leads_from_training_to_millivolts(tmp_path):
    from tests.datasets.ecg_files import LEADS, changed_dicom, millivolts, write_ptbxl, write_record

    folder = write_ptbxl(tmp_path / "data")
    for number in (0, 3, 8):  # one of them is in a split that is evaluated, whatever the seed
        for path in (folder / "records500" / "00000").glob(f"{number + 1:05d}_hr.*"):
            path.unlink()
        write_record(folder / "records500" / "00000", number, leads=LEADS[:-1])
    started = {
        "config": "configs/ecg.py:leads_cpu", "data__seconds": 1.0, "data__rate": 125.0, "data__seed": 3,
        "train__steps": 30, "train__eval_every": 15, "train__batch_size": 4, "train__warmup_steps": 5,
        "extra": [f"--data_dir={folder}"],
    }  # fmt: skip
    workdir = tmp_path / "run"
    done = run(workdir, **started)
    assert done.returncode == 0, done.stderr
    stored = mf.load_latents(workdir)
    units = {id: one for split in stored.values() for id, one in zip(split.ids, split.units, strict=True)}
    lacking = {id for id, one in units.items() if one.missing}
    assert lacking == {f"records500/00000/{number + 1:05d}_hr" for number in (0, 3, 8)}
    assert {units[id].missing for id in lacking} == {(11,)}
    assert "channels" in json.loads((workdir / "evaluation.json").read_text())["protocol"]

    done = run(workdir, mode="decode", **started)
    assert done.returncode == 0, done.stderr
    assert "nan in channels that were not recorded" in done.stderr
    seen = 0
    for path in (workdir / "decoded").rglob("*_hr.csv"):
        with open(path, newline="") as file:
            rows = list(csv.reader(file))
        values = np.array(rows[1:], float)
        assert rows[0] == ["seconds", "I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6"]
        np.testing.assert_allclose(values[:, 0], np.arange(125) / 125, atol=1e-9)
        without = any(id.endswith(path.stem.partition("-")[2]) for id in lacking)
        assert np.isnan(values[:, 12]).all() == without
        number = int(path.stem.partition("-")[2][:5]) - 1
        assert np.abs(values[:, 1:12] - millivolts(number)[::8, :11]).mean() < 0.2  # mV, of a range of 3
        seen += without
    assert seen

    changed_dicom(tmp_path / "new.dcm", lambda file: None, second=6)
    done = run(workdir, mode="apply", **{**started, "extra": [f"--data_dir={tmp_path / 'new.dcm'}"]})
    assert done.returncode == 0, done.stderr
    (path,) = (workdir / "applied").rglob("*new*.csv")
    values = np.loadtxt(path, delimiter=",", skiprows=1)
    assert values.shape == (125, 13)
    assert np.abs(values[:, 1:] - millivolts(6)[::8]).mean() < 0.2
