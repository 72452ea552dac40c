"""Conversion of raw scans to the files of a data source: CT and MR from DICOM to NIfTI.

    python -m experiments.tools.preprocess --data_dir=LIDC-IDRI --out=lidc_1mm --processes=8
    python -m experiments.main --config=configs/lung_ct.py --workdir=runs/lung --data_dir=lidc_1mm

    python -m experiments.tools.preprocess --kind=mr --series=T1 --data_dir=DICOM --out=t1
    python -m experiments.main --config=configs/brain_mri.py:folder --workdir=runs/t1 --data_dir=t1

Every folder in --data_dir is a patient, with DICOM files at any depth. The largest series of each becomes
OUTPUT/PATIENT.nii.gz, RAS+ and uncropped; --series chooses series by their descriptions. With --kind=ct, the output has
only axial series, in Hounsfield units as int16, interpolated by cubic splines to cubic voxels of 1 mm. With --kind=mr,
it has the values as scaled by the scanner, float32, on the grid and in the direction of the scan. A patient that cannot
be converted is skipped, and OUTPUT/report.json gives the reason. A repeated command converts only missing or changed
patients; original files are kept unless --nokeep_originals is given.

Exit codes: 0 done, perhaps with patients skipped; 1 refused, or not one patient could be converted, with one line that
says why; 2 a flag is wrong; 75 stopped by Ctrl-C or SIGTERM: the same command resumes.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Generator, Iterator, Sequence
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from absl import app, flags

from experiments.runtime import command
from experiments.runtime.interruption import StopRequest
from experiments.runtime.progress import Progress
from experiments.runtime.run_directory import write_json
from medfuncta_jax.datasets.dataset import DataError
from medfuncta_jax.datasets.dicom import read_scan
from medfuncta_jax.datasets.dicom_file import AIR, KINDS, READING
from medfuncta_jax.datasets.folder_files import files_below
from medfuncta_jax.datasets.lung_ct import SPACING
from medfuncta_jax.datasets.prepared import file_md5
from medfuncta_jax.datasets.volumes import resample_isotropic
from medfuncta_jax.nifti import write_volume

# Settings that determine an output beside its source; a change converts anew. `Patient.settings` has those of MR.
SETTINGS = {"version": 1, "reading": READING, "spacing_mm": SPACING, "interpolation": "cubic spline", "dtype": "int16"}

log = logging.getLogger("medfuncta")


class PreprocessError(Exception):
    """The command cannot go on; the one-line message says why."""


@dataclass(frozen=True)
class Patient:
    """One folder to convert.

    Attributes:
      name: name of the folder and of the output.
      folder: the DICOM files, at any depth.
      output: the folder for the NIfTI file and, in `records/`, its record.
      keep_originals: whether the slices are kept.
      kind: a key of `KINDS`.
      series: text that the description of the series must contain.
    """

    name: str
    folder: Path
    output: Path
    keep_originals: bool
    kind: str = "ct"
    series: str = ""

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that determine the output beside its source; a change converts anew."""
        own = dict(SETTINGS) if self.kind == "ct" else {"version": 1, "reading": READING, "kind": self.kind}
        return own | ({"series": self.series} if self.series else {})

    @property
    def volume(self) -> Path:
        return self.output / f"{self.name}.nii.gz"

    @property
    def record(self) -> Path:
        return self.output / "records" / f"{self.name}.json"


@dataclass(frozen=True)
class Outcome:
    """The outcome for a patient; `reason` is that of a skip or of a full disk, in one line."""

    name: str
    kind: Literal["converted", "done before", "skipped", "full disk"]
    reason: str = ""


def convert(patient: Patient) -> Outcome:
    """Convert one patient unless that is done; never raises, so that one patient cannot stop the others."""
    try:
        record = _record(patient)
        whole = record is not None and record["settings"] == patient.settings and _is_whole(patient, record)
        removed = record is not None and record["originals_removed"]
        if removed and not whole:  # the remaining files may be another series
            raise DataError(
                f"{patient.folder}: its originals were removed when it was converted, and {patient.volume} is damaged, "
                "gone or of other settings; bring the originals back and remove its record in records/"
            )
        source = _listing_checksum(patient.folder)
        fresh = record is None or not whole or not (removed or record["source"] == source)
        if record is None or fresh:
            record = _converted(patient, source)
        if not patient.keep_originals:
            _remove_originals(patient, record)
        return Outcome(patient.name, "converted" if fresh else "done before")
    except DataError as error:
        return Outcome(patient.name, "skipped", str(error))
    except OSError as error:
        reason = f"{error.filename or patient.folder}: {error.strerror or error}"
        return Outcome(patient.name, "full disk" if error.errno in command.FULL_DISK else "skipped", reason)
    except MemoryError:
        return Outcome(patient.name, "skipped", f"{patient.folder}: memory ran out; try fewer --processes")
    except Exception as error:  # the other patients continue after any error
        log.exception("%s", patient.folder)
        reason = f"{patient.folder}: {type(error).__name__}, a fault of this program; report it with the lines above"
        return Outcome(patient.name, "skipped", reason)


def _converted(patient: Patient, source: str) -> dict[str, Any]:
    scan = read_scan(patient.folder, KINDS[patient.kind], patient.series)
    volume, dtype = scan.volume, "float32"
    if patient.kind == "ct":
        volume, dtype = resample_isotropic(volume, SPACING, AIR, name=str(patient.folder)), str(SETTINGS["dtype"])
    write_volume(patient.volume, volume.values, volume.affine, dtype=dtype)
    record = {
        "source": source,
        "settings": patient.settings,
        "series": scan.series,
        "slices": len(scan.files),
        "scanned_spacing_mm": scan.volume.spacing.round(4).tolist(),
        "shape": list(volume.values.shape),
        "notes": list(scan.notes),
        "output": patient.volume.name,
        "output_md5": file_md5(patient.volume),
        "originals_removed": False,
        "files": sorted(path.relative_to(patient.folder).as_posix() for path in scan.files),
    }
    write_json(patient.record, record)
    return record


def _record(patient: Patient) -> dict[str, Any] | None:
    """The record of an earlier conversion."""
    try:
        record = json.loads(patient.record.read_text())
    except (FileNotFoundError, ValueError):
        return None
    known = {"source", "settings", "output_md5", "originals_removed", "files", "notes"}
    return record if isinstance(record, dict) and known <= record.keys() else None


def _is_whole(patient: Patient, record: dict[str, Any]) -> bool:
    return patient.volume.is_file() and file_md5(patient.volume) == record["output_md5"]


def _remove_originals(patient: Patient, record: dict[str, Any]) -> None:
    # Recorded before the removal: after a kill here, the remaining slices must not count as the whole scan.
    if not record["originals_removed"]:
        write_json(patient.record, record | {"originals_removed": True})
    for name in record["files"]:
        (patient.folder / name).unlink(missing_ok=True)


def _listing_checksum(folder: Path) -> str:
    """A hash of the names, sizes and times of all files; reading every byte would take as long as converting."""
    digest = hashlib.sha256()
    for path in files_below(folder):
        state = path.stat()
        line = [path.relative_to(folder).as_posix(), state.st_size, state.st_mtime_ns]
        digest.update(json.dumps(line).encode())
    return digest.hexdigest()


def find_patients(
    source: Path, output: Path, *, keep_originals: bool, kind: str = "ct", series: str = ""
) -> list[Patient]:
    """The folders in `source`, or `source` itself if it holds files only.

    Raises:
      PreprocessError: no such folder, nothing in it, or folders that lie in each other.
    """
    if not source.is_dir():
        raise PreprocessError(f"{source}: no such folder; --data_dir must name the folder that holds the patients")
    if output.resolve().is_relative_to(source.resolve()) or source.resolve().is_relative_to(output.resolve()):
        raise PreprocessError(f"{output}: --out and --data_dir must not lie in each other")
    visible = [path for path in sorted(source.iterdir()) if not path.name.startswith(".")]
    folders = [path for path in visible if path.is_dir()] or [source for path in visible[:1]]
    if not folders:
        raise PreprocessError(f"{source}: empty; --data_dir must name the folder that holds the patients")
    return [Patient(folder.name, folder, output, keep_originals, kind, series) for folder in folders]


def preprocess(
    source: Path,
    output: Path,
    *,
    processes: int,
    keep_originals: bool,
    stop: StopRequest,
    kind: str = "ct",
    series: str = "",
) -> dict[str, Any]:
    """Convert every patient and write `output/report.json`.

    Args:
      source, output: --data_dir and --out.
      processes: number of patients at the same time.
      keep_originals: False removes the slices of converted patients.
      stop: checked between patients; running conversions are finished.
      kind, series: --kind and --series.
    Returns:
      The report: "patients" converted now or before, with their records, and "skipped" ones, with their reasons.
    Raises:
      PreprocessError: refused, a full disk, or no patient could be converted.
      Interrupted: a stop was asked for.
    """
    patients = find_patients(source, output, keep_originals=keep_originals, kind=kind, series=series)
    output.mkdir(parents=True, exist_ok=True)
    outcomes: dict[str, Outcome] = {}
    with _alone(output), Progress("preprocess", total=len(patients), unit="patients") as progress:
        for left in [*output.glob(".*.partial*"), *output.glob("records/.*.partial*")]:
            left.unlink(missing_ok=True)  # of a killed job
        try:
            for outcome in _outcomes(patients, processes, stop):
                outcomes[outcome.name] = outcome
                if outcome.kind == "full disk":
                    raise PreprocessError(f"{outcome.reason}; free some space and run the same command again")
                if outcome.kind == "skipped":
                    progress.message(f"{outcome.name} skipped: {outcome.reason}")
                progress.advance()
            if len(outcomes) < len(patients):
                stop.check(f"{len(outcomes)} of {len(patients)} patients are done and kept")
        except KeyboardInterrupt:
            for child in multiprocessing.active_children():
                child.kill()
            raise
        finally:
            report = _report(source, patients, outcomes)
            write_json(output / "report.json", report)
    if not report["patients"]:
        name, reason = next(iter(report["skipped"].items()))
        raise PreprocessError(f"none of {len(patients)} patients could be converted; {name}: {reason}")
    return report


def _outcomes(patients: Sequence[Patient], processes: int, stop: StopRequest) -> Iterator[Outcome]:
    """Outcomes in the order of completion. A patient whose process is killed is tried again alone, and then skipped."""
    waiting, suspects = list(patients), []
    while waiting and not stop:
        lost = yield from _pooled(waiting, processes, stop)
        suspects += lost
    for patient in suspects:
        if not stop and (yield from _pooled([patient], 1, stop)):
            reason = f"{patient.folder}: its process was killed; perhaps memory ran out, try fewer --processes"
            yield Outcome(patient.name, "skipped", reason)


def _pooled(waiting: list[Patient], processes: int, stop: StopRequest) -> Generator[Outcome, None, list[Patient]]:
    """Outcomes of patients taken from `waiting`; returns the patients in conversion when a process was killed."""
    running: dict[futures.Future, Patient] = {}
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads can hang
    pool = futures.ProcessPoolExecutor(min(processes, len(waiting)), context, initializer=_end_with_parent)
    try:
        while running or (waiting and not stop):
            while waiting and len(running) < processes and not stop:
                # Ctrl-C reaches the whole group; children inherit the mask and finish their work.
                before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
                try:
                    running[pool.submit(convert, waiting[0])] = waiting[0]
                    del waiting[0]
                finally:
                    signal.pthread_sigmask(signal.SIG_SETMASK, before)
            finished, _ = futures.wait(running, timeout=0.5, return_when=futures.FIRST_COMPLETED)
            for future in finished:
                outcome = future.result()
                del running[future]
                yield outcome
        return []
    except BrokenProcessPool:
        return list(running.values())
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _end_with_parent() -> None:
    """End a child when the parent is killed, because that does not close the pool's pipes."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Refuse a second command on the same output; the system releases the lock when a job dies."""
    with open(output / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise PreprocessError(f"{output}: another command is writing there; wait for it") from error
        except OSError:
            pass  # a file system without locks
        yield


def _report(source: Path, patients: Sequence[Patient], outcomes: dict[str, Outcome]) -> dict[str, Any]:
    report: dict[str, Any] = {
        "input": str(source),
        "settings": patients[0].settings,
        "patients": {},
        "skipped": {},
        "not_done": [],
    }
    for patient in patients:
        outcome = outcomes.get(patient.name)
        if outcome is None:
            report["not_done"].append(patient.name)
        elif outcome.reason:
            report["skipped"][patient.name] = outcome.reason
        else:
            record = json.loads(patient.record.read_text())
            report["patients"][patient.name] = {"outcome": outcome.kind} | record
    return report


def summary(report: dict[str, Any], output: Path) -> str:
    """The report for people: counts, and a line for every patient that was skipped or has notes."""
    kinds = [entry["outcome"] for entry in report["patients"].values()]
    lines = [f"{kinds.count('converted')} converted, {kinds.count('done before')} done before, "
             f"{len(report['skipped'])} skipped of {len(kinds) + len(report['skipped'])} patients"]  # fmt: skip
    lines += [f"  skipped {name}: {reason}" for name, reason in report["skipped"].items()]
    lines += [f"  note on {name}: {note}" for name, entry in report["patients"].items() for note in entry["notes"]]
    return "\n".join([*lines, f"details in {output / 'report.json'}"])


def define_flags(options: flags.FlagValues = flags.FLAGS) -> None:
    """Define the command's flags, not at import, because other commands share some names."""
    flags.DEFINE_enum("kind", "ct", sorted(KINDS), "What is taken from --data_dir.", flag_values=options)
    flags.DEFINE_string(
        "series", "", "Only series in whose description this is found, in any case.", flag_values=options
    )
    flags.DEFINE_string(
        "data_dir", None, "Folder with one folder a patient; only read, unless --nokeep_originals.", flag_values=options
    )
    flags.DEFINE_string("out", None, "Folder for the NIfTI files and report.json; made if absent.", flag_values=options)
    flags.DEFINE_integer(
        "processes", os.cpu_count() or 1, "Patients converted at the same time, about 2 GB each.", lower_bound=1,
        flag_values=options,
    )  # fmt: skip
    flags.DEFINE_bool(
        "keep_originals", True, "Whether the DICOM slices of a patient stay once it is converted.", flag_values=options
    )


def main(argv: Sequence[str], options: flags.FlagValues = flags.FLAGS) -> int:
    """Run the command; returns the exit code."""
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # names of any bytes are shown
    try:
        command.parse(
            argv, required=("data_dir", "out"), example="--data_dir=LIDC-IDRI --out=lidc_1mm", options=options
        )
    except flags.Error as error:
        return command.refuse(error, code=2)
    source, output = (Path(str(place)).expanduser().absolute() for place in (options.data_dir, options.out))

    def convert_all() -> None:
        with StopRequest() as stop, stop.held():  # until the current patients are written
            report = preprocess(
                source, output, processes=options.processes, keep_originals=options.keep_originals, stop=stop,
                kind=options.kind, series=options.series,
            )  # fmt: skip
        print(summary(report, output))

    return command.carry_out(
        convert_all, refusals=(PreprocessError,), place=output,
        when_stopped="stopped at once; finished patients are kept, run the same command again",
    )  # fmt: skip


if __name__ == "__main__":
    define_flags()
    app.define_help_flags()
    sys.exit(main(sys.argv))
