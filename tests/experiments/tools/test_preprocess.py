"""The preprocessing command: from DICOM to 1 mm, resumed, interrupted, killed, and patients that cannot be read."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel
import numpy as np
import pytest

pydicom = pytest.importorskip("pydicom", reason="the extra dicom is not installed")

from experiments.runtime.interruption import StopRequest  # noqa: E402
from experiments.tools import preprocess as command  # noqa: E402
from medfuncta_jax.datasets import lung_ct  # noqa: E402
from medfuncta_jax.datasets.dicom import read_ct  # noqa: E402
from medfuncta_jax.datasets.volumes import read_volume, resample_isotropic  # noqa: E402
from tests.datasets.dicom_files import rewrite, write_series  # noqa: E402
from tests.real_data import REAL, needs_real  # noqa: E402

ROOT = Path(__file__).parents[3]


def words(source, output, *extra):
    return [
        sys.executable, "-W", "error", "-m", "experiments.tools.preprocess",
        f"--data_dir={source}", f"--out={output}", *extra,
    ]  # fmt: skip


def run(source, output, *extra):
    return subprocess.run(words(source, output, *extra), cwd=ROOT, capture_output=True, text=True, timeout=120)


def patient(tmp_path, name="LIDC-IDRI-0001", *, keep_originals=True, **series):
    folder = tmp_path / "raw" / name
    if not folder.exists():
        write_series(folder / "a study" / "a series", **series)
    return command.Patient(name, folder, tmp_path / "out", keep_originals)


def report_of(output):
    return json.loads((output / "report.json").read_text())


def test_good_patients_are_converted_and_bad_ones_listed(tmp_path):
    raw, out = tmp_path / "raw", tmp_path / "out é"
    good = ("LIDC-IDRI-0001", "Patient é 2")
    for name in good:
        write_series(raw / name, patient=name)
    write_series(raw / "missing slice")[2].unlink()
    write_series(raw / "text")[5].write_text("hello")
    path = write_series(raw / "truncated")[0]
    path.write_bytes(path.read_bytes()[:-200])
    rewrite(write_series(raw / "no pixels")[1], lambda dataset: dataset.__delitem__("PixelData"))
    turned = write_series(raw / "mixed")[3]
    rewrite(turned, lambda dataset: setattr(dataset, "ImageOrientationPatient", [0, 1, 0, 1, 0, 0]))
    (raw / "empty").mkdir()
    os.symlink(raw, raw / "loop")
    write_series(raw / good[0] / "other", series="1.2.4", seed=5, patient=good[0])
    before = {path: path.read_bytes() for path in raw.rglob("*.dcm")}

    done = run(raw, out, "--processes=1")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    report = report_of(out)
    assert set(report["patients"]) == set(good)
    reasons = {
        "missing slice": "slices are missing between the positions 102.50 and 107.50 mm",
        "text": "no DICOM file; copy the file anew",
        "truncated": "unreadable slice",
        "no pixels": "no pixel data in it",
        "mixed": "its orientation is not that of the other slices",
        "empty": "no axial CT slices in it",
        "loop": "slices of 3 patients",
    }
    assert set(report["skipped"]) == set(reasons)
    for name, reason in reasons.items():
        assert reason in report["skipped"][name]
        assert "\n" not in report["skipped"][name]
        assert str(raw / name) in report["skipped"][name]
        assert report["skipped"][name] in done.stdout
    assert "2 converted, 0 done before, 7 skipped of 9 patients" in done.stdout
    assert "note on LIDC-IDRI-0001: series 1.2.4 left out: 6 slices as in 1.2.3" in done.stdout
    for name in good:
        image = nibabel.load(out / f"{name}.nii.gz")
        expected = resample_isotropic(read_ct(raw / name).volume, 1.0, -1000.0, name="a")
        assert image.get_data_dtype() == np.int16
        np.testing.assert_array_equal(image.affine, expected.affine)
        np.testing.assert_array_equal(image.get_fdata(), np.rint(expected.values))
        assert report["patients"][name]["shape"] == [32, 24, 15]
    assert before == {path: path.read_bytes() for path in raw.rglob("*.dcm")}
    assert {path.name for path in out.iterdir()} == {
        *(f"{name}.nii.gz" for name in good),
        "records",
        "report.json",
        ".lock",
    }


def test_only_what_changed_is_converted_again(tmp_path, monkeypatch):
    one = patient(tmp_path)
    assert command.convert(one).kind == "converted"
    assert command.convert(one).kind == "done before"
    whole = one.volume.read_bytes()
    one.volume.write_bytes(whole[:-5])
    assert command.convert(one).kind == "converted"
    assert one.volume.read_bytes() == whole
    one.volume.unlink()
    assert command.convert(one).kind == "converted"
    one.record.write_text("{")
    assert command.convert(one).kind == "converted"
    for path in one.folder.rglob("*.dcm"):
        rewrite(path, lambda dataset: setattr(dataset, "RescaleIntercept", "-1000"))
    assert command.convert(one).kind == "converted"
    assert one.volume.read_bytes() != whole
    monkeypatch.setattr(command, "SETTINGS", command.SETTINGS | {"version": 2})
    assert command.convert(one).kind == "converted"
    assert command.convert(one).kind == "done before"


def test_originals_go_only_when_told_and_only_after_they_are_converted(tmp_path):
    one = patient(tmp_path, keep_originals=False)
    (one.folder / "annotation.xml").write_text("<xml/>")
    write_series(one.folder / "second", count=3, series="1.2.8")
    assert command.convert(one).kind == "converted"
    left = {path.relative_to(one.folder).parts[0] for path in one.folder.rglob("*") if path.is_file()}
    assert left == {"annotation.xml", "second"}
    assert command.convert(one).kind == "done before"
    one.volume.unlink()
    outcome = command.convert(one)  # never the smaller series that is left
    assert outcome.kind == "skipped"
    assert "its originals were removed when it was converted" in outcome.reason
    bad = patient(tmp_path, "bad", keep_originals=False)
    next(bad.folder.rglob("*.dcm")).write_text("")
    assert command.convert(bad).kind == "skipped"
    assert len(list(bad.folder.rglob("*.dcm"))) == 6


def test_a_full_disk_ends_the_run_and_leaves_no_half_file(tmp_path, monkeypatch):
    one = patient(tmp_path)

    def full(path, *rest, **options):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(command, "write_volume", full)
    outcome = command.convert(one)
    assert outcome == command.Outcome(one.name, "full disk", f"{one.volume}: No space left on device")
    monkeypatch.setattr(command, "_outcomes", lambda *rest: iter([outcome]))
    with (
        StopRequest() as stop,
        pytest.raises(command.PreprocessError, match="free some space and run the same command"),
    ):
        command.preprocess(one.folder.parent, one.output, processes=1, keep_originals=True, stop=stop)
    assert not list(one.output.rglob("*.nii*"))


class Fatal(command.Patient):
    """Ends the process that it is sent to."""

    def __reduce__(self):
        return os._exit, (1,)


@pytest.mark.slow
def test_a_patient_whose_process_dies_is_skipped_and_the_others_are_not(tmp_path):
    good = [patient(tmp_path, name) for name in ("a", "c")]
    fatal = Fatal("b", tmp_path / "raw" / "b", tmp_path / "out", True)
    with StopRequest() as stop:
        outcomes = list(command._outcomes([good[0], fatal, good[1]], 1, stop))
    kinds = {outcome.name: outcome.kind for outcome in outcomes}
    assert kinds.pop("b") == "skipped"
    assert kinds == {"a": "converted", "c": "converted"}


@pytest.fixture
def many(tmp_path):
    """Thirty patients, all the same."""
    write_series(tmp_path / "one", count=10)
    (tmp_path / "raw").mkdir()
    for i in range(30):
        os.symlink(tmp_path / "one", tmp_path / "raw" / f"LIDC-IDRI-{i:04d}")
    return tmp_path / "raw"


def wait_for_outputs(output, process, count):
    for _ in range(1200):
        if len(list(output.glob("records/*.json"))) >= count:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    raise AssertionError("nothing was converted")


def children_of(pid):
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [int(word) for word in listed.stdout.split()]


@pytest.mark.slow
def test_interrupted_then_killed_it_goes_on_and_loses_nothing(many, tmp_path):
    out = tmp_path / "out"
    process = subprocess.Popen(
        words(many, out, "--processes=1"), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    wait_for_outputs(out, process, 3)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the children get it too
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 75, stderr
    assert "of 30 patients are done and kept; run the same command again to go on" in stderr
    assert "Traceback" not in stderr
    report = report_of(out)
    assert report["not_done"]
    assert not report["skipped"]
    done = {path.name: path.stat().st_mtime_ns for path in out.glob("*.nii.gz")}
    assert len(done) == len(report["patients"]) >= 3

    process = subprocess.Popen(words(many, out, "--processes=1"), cwd=ROOT, stderr=subprocess.DEVNULL)
    wait_for_outputs(out, process, len(done) + 3)
    children = children_of(process.pid)
    assert children
    process.kill()
    process.wait()
    for _ in range(500):
        if not any(Path(f"/proc/{pid}/stat").exists() for pid in children):
            break
        time.sleep(0.02)
    else:
        raise AssertionError("children outlive the command")
    count = sum(not path.name.startswith(".") for path in out.glob("records/*.json"))  # "." is of one half written
    (out / ".LIDC-IDRI-0029.nii.partial1.gz").write_bytes(b"half")

    last = run(many, out, "--processes=2")
    assert last.returncode == 0, last.stderr
    assert f"{30 - count} converted, {count} done before, 0 skipped of 30 patients" in last.stdout
    report = report_of(out)
    assert len(report["patients"]) == 30
    assert not report["not_done"]
    assert len({entry["output_md5"] for entry in report["patients"].values()}) == 1
    assert not list(out.rglob(".*partial*"))
    for name, state in done.items():
        assert (out / name).stat().st_mtime_ns == state


@pytest.mark.parametrize(
    ("extra", "code", "message"),
    [
        (["--data_dir="], 2, "--data_dir is missing; e.g. --data_dir=LIDC-IDRI"),
        (["--processes=0"], 2, "processes"),
        (["--procs=3"], 2, "Unknown command line flag 'procs'"),
        (["--data_dir=/no/such"], 1, "/no/such: no such folder; --data_dir must name"),
    ],
)
def test_faults_are_one_line(tmp_path, capsys, extra, code, message):
    options = command.flags.FlagValues()
    command.define_flags(options)
    assert command.main(["preprocess", f"--out={tmp_path / 'out'}", *extra], options) == code
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_folders_that_cannot_be_used(tmp_path):
    def refused(source, output, message):
        with StopRequest() as stop, pytest.raises(command.PreprocessError, match=message):
            command.preprocess(source, output, processes=1, keep_originals=True, stop=stop)

    (tmp_path / "raw").mkdir()
    refused(tmp_path / "raw", tmp_path / "out", "raw: empty")
    (tmp_path / "raw" / "bad").mkdir()
    refused(tmp_path / "raw", tmp_path / "out", "none of 1 patients could be converted; bad: .*no axial CT slices")
    assert list(report_of(tmp_path / "out")["skipped"]) == ["bad"]
    refused(tmp_path / "raw", tmp_path / "raw" / "out", "must not lie in each other")
    refused(tmp_path / "raw", tmp_path, "must not lie in each other")
    with command._alone(tmp_path / "out"):
        refused(tmp_path / "raw", tmp_path / "out", "another command is writing there")


@needs_real
def test_real_slices_lie_the_right_way_round(tmp_path):
    """Eight slices at the level of the heart, every second pixel: lungs dark, spine behind, heart and aorta left."""
    folder = tmp_path / "raw" / "RIDER"
    shutil.copytree(REAL / "ct_dicom" / "RIDER-1129164940", folder)
    for path in folder.iterdir():
        dataset = pydicom.dcmread(path)
        if not -230 < dataset.ImagePositionPatient[2] < -150:
            path.unlink()
            continue
        dataset.PixelData = np.ascontiguousarray(dataset.pixel_array[::2, ::2]).tobytes()
        dataset.Rows = dataset.Columns = 256
        dataset.PixelSpacing = [2 * float(step) for step in dataset.PixelSpacing]
        dataset.save_as(path)
    one = command.Patient("RIDER", folder, tmp_path / "out", True)
    assert command.convert(one).kind == "converted"
    volume = read_volume(one.volume)
    assert volume.values.shape == (295, 295, 80)
    x, y, _ = np.meshgrid(*(np.arange(n) for n in volume.values.shape), indexing="ij")
    centre = (abs(x - 147) < 110) & (abs(y - 147) < 100)
    lung = centre & (volume.values < -600)
    bone = centre & (volume.values > 300)
    soft = centre & (abs(volume.values - 40) < 60) & (y > y[lung].min()) & (y < y[lung].max())
    assert (lung & (x < 120)).sum() > 2e5
    assert (lung & (x > 175)).sum() > 2e5
    spine = bone & (abs(x - 147) < 30) & (y < y[lung].mean())
    breastbone = bone & (abs(x - 147) < 30) & (y > y[lung].mean())
    assert spine.sum() > 2 * breastbone.sum() > 0
    assert x[soft].mean() < x[spine].mean() - 5  # x grows to the patient's right
    example = lung_ct.preprocess(volume, lung_ct.Options(), name="RIDER").values
    assert example[5:8, 14:18, 14:18].mean() < 0.3 < 0.5 < example[14:18, 4:7, 14:18].mean()


@pytest.mark.slow
def test_mr_keeps_the_grid_and_the_direction_of_its_scan(tmp_path):
    """The command in a process of its own, and its file against the headers of the slices."""
    from tests.datasets.test_dicom_mr import SAGITTAL, assert_at_header_places, write_mr

    paths = write_mr(tmp_path / "raw" / "P1" / "study", direction=SAGITTAL, rescale=("0.25", "3"))
    write_mr(tmp_path / "raw" / "P2", seed=3, patient="P2")
    write_series(tmp_path / "raw" / "a CT", patient="P3")
    places, flags = (tmp_path / "raw", tmp_path / "nifti"), ("--kind=mr", "--processes=1")
    for outcome in ("2 converted, 0 done before", "0 converted, 2 done before"):
        done = run(*places, *flags)
        assert done.returncode == 0, done.stderr
        assert f"{outcome}, 1 skipped of 3 patients" in done.stdout
        assert "no MR slices in it" in done.stdout
    volume = read_volume(tmp_path / "nifti" / "P1.nii.gz")
    assert volume.values.shape == (6, 16, 16)
    assert_at_header_places(volume, paths)
    done = run(*places, *flags, "--series=t2")
    assert done.returncode == 1
    assert "no series described as 't2'; there are t1 mprage" in done.stderr.strip().splitlines()[-1]
