"""ECG: beats of one lead, with their class, or whole records of several leads.

Beats are those of the MIT-BIH arrhythmia database (Moody and Mark 2001) as Kachuee et al. 2018 cut them: resampled to
125 Hz, in [0, 1], of five AAMI classes. A beat is 187 samples long since that is 1.5 s at 125 Hz: room for 1.2 RR
intervals from 48 beats a minute upwards. What a faster heart leaves of it is 0, and a slower beat is cut off.

`format="csv"` reads two files of 188 columns without a header line (187 samples, then the class), the layout of the
"ECG Heartbeat Categorization" files on Kaggle. No validation split is published: a stratified tenth of the training
file is held out by a seed. These files do not name the patient of a beat, so training and validation share patients.
Ids name the file and the line.

`format="physionet"` cuts the beats from the raw records (see `physionet.py`) and splits them by patient. Ids name the
record and the sample of the annotation.

`format="leads"` reads whole records of several leads, in WFDB or DICOM, at any rate: see `ecg_leads.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from medfuncta_jax.datasets import ecg_leads
from medfuncta_jax.datasets.contents import contents
from medfuncta_jax.datasets.dataset import NEW, SPLITS, DataError, Example, Plan, PlannedSplit, required_folder
from medfuncta_jax.datasets.delimited import finite_number, shown
from medfuncta_jax.datasets.ecg_leads import LeadOptions
from medfuncta_jax.datasets.folder_files import about_files, files_below, name_below
from medfuncta_jax.datasets.physionet import BEAT_SAMPLES, CLASSES, RATE, Beat, Record, records_with_lead, split_records
from medfuncta_jax.datasets.prepared import file_md5
from medfuncta_jax.datasets.splits import stratified_part
from medfuncta_jax.settings import SettingsError
from medfuncta_jax.units import Units

# Values have at least four decimals, so a larger overshoot is no rounding.
_ROUNDING = 1e-4

_TIME, _COLUMNS = (0.0, 1 / RATE), ("seconds", "value")
# CSV files hold scaled values.
_SCALED = Units(time=_TIME, columns=_COLUMNS)


@dataclass(frozen=True, kw_only=True)
class Options(LeadOptions):
    """Settings of the source; of beats these and the seed and fractions of the split, and of leads `LeadOptions`.

    `val_fraction` is of the training file, class by class; or of the patients of raw records, as `test_fraction`, which
    is not used for CSV.

    Attributes:
      format: "csv", "physionet" or "leads".
      train_file, test_file: names of the CSV files, anywhere below the data directory.
      lead: of the raw records that beats are cut from; records without it are left out.
      test_records: raw records to test on, such as ("100", "103"); empty draws them.
    """

    format: Literal["csv", "physionet", "leads"] = "csv"
    train_file: str = "mitbih_train.csv"
    test_file: str = "mitbih_test.csv"
    lead: str = "MLII"
    test_records: tuple[str, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        for name, file in (("train_file", self.train_file), ("test_file", self.test_file)):
            if not file or Path(file).name != file:
                raise SettingsError(f"{name} must be a file name without folders, got {file!r}")
        if self.train_file == self.test_file:
            raise SettingsError(f"train_file and test_file must be two files, got {self.train_file!r} twice")


def plan(options: Options, *, data_dir: str | None, cache_root: Path) -> Plan:
    """The signals. CSV files are read through once for their classes, raw records for their beats.

    Raises:
      DataError: files missing or found twice, or damaged; for raw records also that `wfdb` is not installed. For leads
        see `ecg_leads.plan`.
    """
    if options.format == "leads":
        return ecg_leads.plan(options, required_folder(data_dir, "the records"))
    folder = required_folder(
        data_dir, f"{options.train_file} and {options.test_file}" if options.format == "csv" else "the MIT-BIH records"
    )
    splits, about = _csv_splits(folder, options) if options.format == "csv" else _record_splits(folder, options)
    described = {"source": "ecg", "version": 2, "title": "MIT-BIH arrhythmia beats", "licence": "ODC-By 1.0"}
    return _plan(splits, described | {"options": asdict(options)} | about)


def new_files(folder: Path, options: Options) -> dict[str, Path]:
    """The CSV files, or the headers of raw records, of a folder that a finished field is applied to, by name."""
    if options.format == "leads":
        return ecg_leads.new_files(folder, options)
    if options.format == "physionet":
        return {name: record.header for name, record in records_with_lead(folder, options.lead)[0].items()}
    return {name_below(folder, path): path for path in files_below(folder) if path.suffix.lower() == ".csv"}


def plan_new(
    options: Options, folder: Path, files: Mapping[str, Path], *, grid: tuple[int, ...], channels: int
) -> Plan:
    """All beats or leads of files that no run has seen, in the split "new", as `plan` would make them."""
    if options.format == "leads":
        return ecg_leads.plan_new(options, folder, files)

    def of_file(name: str, path: Path) -> Iterator[Example]:
        if options.format == "physionet":
            for beat in Record(path, options.lead).beats():
                yield _example(name, beat)
            return
        for line, text in _lines(path):
            values, label = _beat(path, line, text)
            yield Example(values[:, None], f"{name}:{line:06d}", label, units=_SCALED)

    def examples() -> Iterator[Example]:
        for name, path in files.items():
            yield from of_file(name, path)

    counts = [
        len(Record(path, options.lead).beats()) if options.format == "physionet" else len(_scanned(path)[1])
        for path in files.values()
    ]
    return _plan({NEW: PlannedSplit(sum(counts), examples)}, about_files("ecg", folder, options, files))


def example_of(
    options: Options, values: np.ndarray, name: str, *, affine: np.ndarray | None, grid: tuple[int, ...], channels: int
) -> Example:
    """One beat of 187 samples in [0, 1] at 125 Hz; for leads see `ecg_leads.example_of`."""
    if options.format == "leads":
        return ecg_leads.example_of(options, values, name)
    values = np.reshape(values, -1)
    if len(values) != BEAT_SAMPLES or values.min() < -_ROUNDING or values.max() > 1 + _ROUNDING:
        raise DataError(f"{name}: a beat is {BEAT_SAMPLES} samples in [0, 1], got {values.shape}")
    return Example(np.clip(values, 0, 1).astype(np.float32)[:, None], name, units=_SCALED)


def _plan(splits: Mapping[str, PlannedSplit], about: dict[str, Any]) -> Plan:
    return Plan(
        name="ecg", grid=(BEAT_SAMPLES,), channels=1, dtype="float32", classes=CLASSES, task="multi-class",
        splits=splits, about=about,
    )  # fmt: skip


def _example(record: str, beat: Beat) -> Example:
    units = Units((beat.low,), (beat.high - beat.low,), unit=beat.unit, shared="", time=_TIME, columns=_COLUMNS)
    return Example(beat.values[:, None], f"{record}:{beat.sample:06d}", beat.label, units=units)


def _record_splits(folder: Path, options: Options) -> tuple[dict[str, PlannedSplit], dict[str, object]]:
    split = split_records(
        folder,
        lead=options.lead,
        test_records=options.test_records,
        fractions={"test": options.test_fraction, "val": options.val_fraction},
        seed=options.seed,
    )

    def examples(name: str) -> Iterator[Example]:
        for record in split.records[name]:
            for beat in record.beats():
                yield _example(record.name, beat)

    return {name: PlannedSplit(split.lengths[name], functools.partial(examples, name)) for name in SPLITS}, split.about


def _csv_splits(folder: Path, options: Options) -> tuple[dict[str, PlannedSplit], dict[str, object]]:
    train, test = (_found(folder, name) for name in (options.train_file, options.test_file))
    train_md5, labels = _scanned(train)
    test_md5, test_labels = _scanned(test)
    held_out = stratified_part(labels, options.val_fraction, seed=options.seed)
    chosen = {"train": (train, ~held_out), "val": (train, held_out), "test": (test, np.ones(len(test_labels), bool))}

    def examples(name: str) -> Iterator[Example]:
        path, wanted = chosen[name]
        for row, (line, text) in enumerate(_lines(path)):
            if wanted[row]:
                values, label = _beat(path, line, text)
                yield Example(values[:, None], f"{path.name}:{line:06d}", label, units=_SCALED)

    return (
        {name: PlannedSplit(int(chosen[name][1].sum()), functools.partial(examples, name)) for name in SPLITS},
        {
            "md5": {train.name: train_md5, test.name: test_md5},
            "split_rule": f"test is {test.name}; val is {options.val_fraction:g} of each class of {train.name}, drawn "
            f"with seed {options.seed}; files do not name patients, so val and train share them",
        },
    )


def _found(folder: Path, name: str) -> Path:
    """The file of that name: in the folder, in `ecg` below it, or the only one further down."""
    for place in (folder / name, folder / "ecg" / name):
        if place.is_file():
            return place
    places = sorted(path for path in folder.rglob("*.*") if path.name == name and path.is_file())
    if len(places) > 1:
        raise DataError(f"{folder}: {name} is there {len(places)} times ({places[0]}, {places[1]}); name one folder")
    if not places:
        raise DataError(
            f"{folder}: no file {name} there or below; data_dir must name its folder, or name the files with "
            "data.train_file and test_file, or take data.format=physionet for raw records"
        )
    return places[0]


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, by their number from 1."""
    try:
        with open(path, "rb") as file:
            for line, text in enumerate(file, 1):
                text = (text.removeprefix(b"\xef\xbb\xbf") if line == 1 else text).strip()
                if text:
                    yield line, text
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); check the file") from error


def _scanned(path: Path) -> tuple[str, np.ndarray]:
    """The MD5 and the label of each line, int64 [n]; samples are checked when they are read."""
    if (what := contents(path)) not in ("", "text", "an empty file"):
        raise DataError(f"{path}: {what}, no table of beats; copy the file anew")
    labels = np.fromiter((_label(path, line, text) for line, text in _lines(path)), np.int64)
    if not len(labels):
        raise DataError(f"{path}: holds no beats; copy the file anew")
    return file_md5(path), labels


def _label(path: Path, line: int, text: bytes) -> int:
    cells = text.count(b",") + 1
    last = text.rpartition(b",")[2].decode("ascii", "replace")
    value = finite_number(last)
    if line == 1 and (value is None or (cells == BEAT_SAMPLES + 1 and value == BEAT_SAMPLES)):
        raise DataError(f"{path}: line 1 is a header (it ends with {shown(last)}); remove it, every line is a beat")
    if cells != BEAT_SAMPLES + 1:
        raise DataError(
            f"{path}: line {line} has {cells} columns, {BEAT_SAMPLES} samples and a class are needed; repair the line"
        )
    if value is None or value not in range(len(CLASSES)):
        raise DataError(
            f"{path}: line {line}: class {shown(last)} is none of 0 to {len(CLASSES) - 1}; repair or remove the line"
        )
    return int(value)


def _beat(path: Path, line: int, text: bytes) -> tuple[np.ndarray, int]:
    """float32 [187] and the class."""
    label = _label(path, line, text)
    cells = text.decode("ascii", "replace").split(",")[:-1]
    numbers = [finite_number(cell) for cell in cells]
    for column, (cell, value) in enumerate(zip(cells, numbers, strict=True), 1):
        if value is None or not -_ROUNDING <= value <= 1 + _ROUNDING:
            problem = "no finite number" if value is None else "outside 0 to 1"
            raise DataError(f"{path}: line {line}, column {column}: {shown(cell)} is {problem}; repair or remove it")
    return np.clip(np.array(numbers, np.float32), 0, 1), label
