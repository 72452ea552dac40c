"""The launcher on ECG records of several leads, some of which are missing: from training to files in mV."""

import csv
import json

import numpy as np
import pytest
from scipy.signal import resample_poly

import medfuncta_jax as mf
from tests.experiments.conftest import run

pytest.importorskip("wfdb", exc_type=ImportError)
pytest.importorskip("pydicom")


def table(path):
    """The header and the numbers of a file."""
    with open(path, newline="") as file:
        rows = list(csv.reader(file))
    return rows[0], np.array(rows[1:], float)


def at_125(values):
    """A second at 1000 Hz, 125 times a second."""
    return resample_poly(values, 1, 8, padtype="line")


def psnr(values, meant):
    """In dB, of values in mV that are scaled by the range of all leads."""
    return -10 * np.log10(np.mean((values - meant) ** 2) / np.ptp(meant) ** 2)


@pytest.mark.slow
def test_records_with_missing_leads_from_training_to_millivolts(tmp_path):
    from tests.datasets.ecg_files import LEADS, changed_dicom, millivolts, write_ptbxl, write_record

    folder = write_ptbxl(tmp_path / "data")
    for number in range(1, 10, 2):
        for path in (folder / "records500" / "00000").glob(f"{number + 1:05d}_hr.*"):
            path.unlink()
        write_record(folder / "records500" / "00000", number, leads=LEADS[:-1])
    started = {
        "config": "configs/ecg.py:leads_cpu", "data__seconds": 1.0, "data__rate": 125.0,
        "data__test_fraction": 0.4,
        "train__steps": 30, "train__eval_every": 15, "train__batch_size": 4, "train__warmup_steps": 5,
        "extra": [f"--data_dir={folder}"],
    }  # fmt: skip
    workdir = tmp_path / "run"
    done = run(workdir, **started)
    assert done.returncode == 0, done.stderr
    stored = mf.load_latents(workdir)
    units = {id: one for split in stored.values() for id, one in zip(split.ids, split.units, strict=True)}
    lacking = {id for id, one in units.items() if one.missing}
    assert lacking == {f"records500/00000/{number + 1:05d}_hr" for number in range(1, 10, 2)}
    assert {units[id].missing for id in lacking} == {(11,)}
    assert "channels" in json.loads((workdir / "evaluation.json").read_text())["protocol"]

    done = run(workdir, mode="decode", **started)
    assert done.returncode == 0, done.stderr
    assert "nan in channels that were not recorded" in done.stderr
    with open(workdir / "evaluation.csv", newline="") as file:
        figures = {row["id"]: float(row["psnr"]) for row in csv.DictReader(file)}
    seen = 0
    for i, id in enumerate(stored["test"].ids):
        (path,) = (workdir / "decoded").rglob(f"test/{i}-*.csv")
        header, values = table(path)
        assert header == ["seconds", "I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6"]
        np.testing.assert_allclose(values[:, 0], np.arange(125) / 125, atol=1e-9)
        recorded = 11 if id in lacking else 12
        assert np.isnan(values[:, 1 + recorded :]).all()
        meant = at_125(millivolts(int(id[-8:-3]) - 1))[:, :recorded]
        assert psnr(values[:, 1 : 1 + recorded], meant) == pytest.approx(figures[id], abs=1e-3)
        assert stored["test"].psnr[i] == pytest.approx(figures[id], abs=1e-3)
        seen += recorded == 11
    assert seen

    changed_dicom(tmp_path / "new.dcm", lambda file: None, second=6)
    done = run(workdir, mode="apply", **{**started, "extra": [f"--data_dir={tmp_path / 'new.dcm'}"]})
    assert done.returncode == 0, done.stderr
    (path,) = (workdir / "applied").rglob("reconstructions/*new*.csv")
    (latents,) = mf.load_latents(workdir / "applied" / "new.dcm" / "latents").values()
    assert psnr(table(path)[1][:, 1:], at_125(millivolts(6))) == pytest.approx(latents.psnr[0], abs=1e-3)
