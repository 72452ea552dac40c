"""Prepared data: a plan's signals, written once as array_record by tensorflow-datasets and read with random access.

The name of a prepared folder is a hash of everything that determines its content, so that other settings or source
files make another folder. The folder is written under a temporary name and moved when whole. No TensorFlow is needed.

Signals that a source cannot make are skipped during writing, logged, and listed in the metadata. Equal signals of 64
samples or more among a user's own files (copies, links, one scan in two formats) are kept once, the first in the order
train, val, test, so that no signal is in two splits; the others are logged, and left out when the folder is read.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import json
import logging
import math
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import tensorflow_datasets as tfds

from medfuncta_jax.atomic import atomic_path
from medfuncta_jax.datasets import equal_signals
from medfuncta_jax.datasets.dataset import (
    Contents,
    DataError,
    Dataset,
    Example,
    Plan,
    Split,
    unit_signal,
    without_labels,
)

_log = logging.getLogger(__name__)

# Part of the hash: a new layout of the records makes new folders.
_LAYOUT = 5

_STAGING = ".staging-"

# The folder in which tfds writes the records and their metadata.
_RECORDS = Path("signals") / "1.0.0"

# Ids, fingerprints and repetitions of all signals, beside the records.
_CONTENTS = "contents.npz"

# Maximum number of skipped or repeated signals with a line in the log.
_LOGGED = 20

# Bytes of signals stored as one part of a split.
PART_BYTES = 1 << 28


def prepared_dataset(plan: Plan, cache_root: Path) -> Dataset:
    """The dataset of a plan, prepared first if it is not in the cache.

    If two jobs request the same plan at once, one prepares and the other waits. A killed job leaves only a staging
    folder, which the next job removes.

    Raises:
      DataError: an empty split, also one whose signals all repeat others, more than half of the signals skipped, a
        fault of the whole source, or a cache directory that cannot be written or read.
    """
    for name in plan.splits:
        if plan.splits[name].length < 1:
            raise DataError(
                f"{plan.name}: the {name} split is empty; give more data or change the split fractions in config.data"
            )
    folder = cache_root / "prepared" / f"{plan.name}-{_content_hash(plan)}"
    if not folder.is_dir():
        _prepare(plan, folder)
    try:
        splits, skipped = _read(plan, folder)
        contents, kept, repeated = _contents(plan, folder, splits)
    except PermissionError as error:
        raise DataError(f"{folder}: prepared data cannot be read ({error.strerror}); ask for the right to") from error
    except Exception as error:  # a damaged folder makes tfds, json or array_record raise anything
        raise DataError(f"{folder}: prepared data is damaged or not all there; remove this folder") from error
    if skipped:
        _log.warning(
            "%d of %d signals were skipped, as they cannot be used; %s lists them",
            len(skipped),
            _planned(plan),
            folder / _RECORDS / "metadata.json",
        )
    if repeated:
        first = ", ".join(f"{one} is {other}" for one, other in list(repeated.items())[:3])
        _log.warning(
            "%d of %d signals are there under two names (%s%s); one of each is kept",
            len(repeated), _planned(plan), first, ", ..." * (len(repeated) > 3),
        )  # fmt: skip
        for name in plan.splits:
            if not len(kept[name]):
                raise DataError(
                    f"{plan.name}: the {name} split is empty, for all of its signals repeat others ({first}); remove "
                    "what is there twice and give more data, or change data.seed"
                )
        splits = {name: Split.of([(splits[name], kept[name])]) for name in plan.splits}
    return Dataset(
        name=plan.name,
        grid=plan.grid,
        channels=plan.channels,
        classes=plan.classes,
        splits=splits,
        task=plan.task,
        about=plan.about | {"skipped": skipped, "repeated": repeated},
        contents=contents,
    )


def _planned(plan: Plan) -> int:
    return sum(split.length for split in plan.splits.values())


def _content_hash(plan: Plan) -> str:
    content = {
        "layout": _LAYOUT,
        "about": plan.about if plan.labels is None else without_labels(plan.about),
        "shape": plan.signal_shape,
        "dtype": plan.dtype,
        "lengths": {name: split.length for name, split in plan.splits.items()},
    }
    if plan.labels is None:
        content |= {"classes": plan.classes, "task": plan.task}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _prepare(plan: Plan, folder: Path) -> None:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder) as locked:
            if folder.is_dir():  # another job made it while this one waited
                return
            if locked:
                for left in folder.parent.glob(f"{_STAGING}{folder.name}-*"):
                    shutil.rmtree(left, ignore_errors=True)
            staging = Path(tempfile.mkdtemp(prefix=f"{_STAGING}{folder.name}-", dir=folder.parent))
            try:
                _log.info("preparing %s in %s", plan.name, folder)
                _write(plan, staging)
                try:
                    staging.chmod(0o755)  # mkdtemp makes a private folder, a cache may be shared
                    staging.rename(folder)
                except OSError:
                    if not folder.is_dir():  # without a lock, another job may have been faster
                        raise
            finally:
                shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise DataError(
            f"{folder.parent}: cannot write prepared data ({error.strerror or _one_line(error)}); free space there or "
            "name a writable directory with data.cache_dir=DIR"
        ) from error


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    """Hold the folder's lock, which the system releases when a job dies; False on file systems without locks."""
    with open(folder.with_name(f"{folder.name}.lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _log.info("waiting for another job that prepares %s", folder)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            yield False
            return
        yield True


def _parts(plan: Plan, name: str) -> dict[str, int | None]:
    """The number of examples in each part of a split; None for all remaining examples.

    tfds sorts a split in memory up to 1 GB, and on disk with TensorFlow above. A larger split is therefore stored as
    several parts, which need neither much memory nor TensorFlow, and read as their concatenation.
    """
    largest = max(1, PART_BYTES // (math.prod(plan.signal_shape) * np.dtype(plan.dtype).itemsize))
    count = math.ceil(plan.splits[name].length / largest)
    return {f"{name}_{k:05d}": largest if k < count - 1 else None for k in range(count)}


class _Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Stores any plan; sources need not know tfds."""

    VERSION = tfds.core.Version("1.0.0")
    name = "signals"

    def __init__(self, plan: Plan, directory: Path):
        self._plan = plan
        self.ids: dict[str, list[str]] = {name: [] for name in plan.splits}
        self.fingerprints: dict[str, list[np.ndarray]] = {name: [] for name in plan.splits}
        super().__init__(data_dir=str(directory))

    def _info(self) -> tfds.core.DatasetInfo:
        plan, raw = self._plan, tfds.features.Encoding.BYTES
        features = {
            "signal": tfds.features.Tensor(shape=plan.signal_shape, dtype=np.dtype(plan.dtype), encoding=raw),
            "label": tfds.features.Tensor(shape=plan.label_shape, dtype=np.int64),
            "id": tfds.features.Text(),
            "units": tfds.features.Text(),
        }
        if plan.affines:
            features["affine"] = tfds.features.Tensor(shape=(4, 4), dtype=np.float64, encoding=raw)
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features),
            metadata=tfds.core.MetadataDict(plan.about | {"skipped": {}, "stored": {}}),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        parts = {}
        for name in self._plan.splits:
            # tfds makes the parts one after the other, in this order, so they can share one pass over the source.
            examples = self._usable(name)
            for part, length in _parts(self._plan, name).items():
                parts[part] = self._generate_examples(part, examples, length)
        return parts

    def _usable(self, name: str) -> Iterator[Example]:
        """The examples of a split; signals that cannot be made are logged and listed in the metadata.

        Raises:
          DataError: all of them are skipped, or more than half of those of all splits.
        """
        planned, used, skipped = self._plan.splits[name].length, 0, self.info.metadata["skipped"]
        before = len(skipped)
        for one in self._plan.splits[name].examples():
            if isinstance(one, Example):
                used += 1
                self.ids[name].append(one.id)
                if self._plan.gathered:
                    self.fingerprints[name].append(equal_signals.fingerprint(unit_signal(one.signal)))
                yield one
                continue
            skipped[one.id] = one.reason
            if 2 * len(skipped) > _planned(self._plan):
                self._refuse(f"more than half of the {_planned(self._plan)} signals cannot be used")
            if len(skipped) <= _LOGGED:
                _log.warning("skipped: %s", one.reason)
        if used + len(skipped) - before != planned:
            raise AssertionError(f"{self._plan.name} made {used} examples of {name} and had planned {planned}")
        if not used:
            self._refuse(f"the {name} split is empty, for none of its {planned} signals can be used", before)

    def _refuse(self, problem: str, first: int = 0) -> NoReturn:
        reason = list(self.info.metadata["skipped"].values())[first]
        raise DataError(f"{self._plan.name}: {problem}; the first: {reason}")

    def _generate_examples(
        self, part: str, examples: Iterator[Example], length: int | None
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        plan, count = self._plan, 0
        for example in itertools.islice(examples, length):
            yield count, self._record(example)
            count += 1
        self.info.metadata["stored"][part] = count
        if not count:  # tfds stores no empty part; a part with only this record is not read
            label = np.zeros(plan.label_shape, np.int64)
            yield 0, self._record(Example(np.zeros(plan.signal_shape, plan.dtype), "", label, np.eye(4)))

    def _record(self, example: Example) -> dict[str, Any]:
        record = {
            "signal": np.ascontiguousarray(example.signal, np.dtype(self._plan.dtype)),
            "label": np.asarray(example.label, np.int64),
            "id": example.id,
            "units": example.units.to_json(),
        }
        return record | ({"affine": np.asarray(example.affine, np.float64)} if self._plan.affines else {})

    def _log_download_bytes(self) -> None:
        """Replaces tfds' output to stdout; the log has this information."""

    def _log_download_done(self) -> None:
        """As above."""


def _write(plan: Plan, directory: Path) -> None:
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    scratch = directory / ".downloads"  # tfds requires one, and leaves it empty
    builder = _Builder(plan, directory)
    try:
        builder.download_and_prepare(
            file_format="array_record",
            download_dir=str(scratch),
            download_config=tfds.download.DownloadConfig(try_download_gcs=False),
        )
        splits, skipped = _read(plan, directory)
    except RuntimeError as error:  # array_record's report of a full disk
        raise OSError(None, _one_line(error).split(";")[0]) from error
    lengths = {name: len(split) for name, split in splits.items()}
    if sum(lengths.values()) != _planned(plan) - len(skipped):
        raise OSError(None, f"of {plan.name} only {lengths} signals were written")
    _write_contents(plan, directory, builder, splits)
    shutil.rmtree(scratch, ignore_errors=True)


def _write_contents(plan: Plan, directory: Path, builder: _Builder, splits: dict[str, Split]) -> None:
    """Write the data that distinguishes signals, and the repeated rows, counted over all splits in order."""
    ids = [id for name in plan.splits for id in builder.ids[name]]
    arrays = {"ids": np.frombuffer(json.dumps(ids).encode(), np.uint8), "same_as": np.full(len(ids), -1)}
    if plan.gathered:
        places = [(name, i) for name in plan.splits for i in range(len(builder.ids[name]))]

        def signal(row: int) -> np.ndarray:
            name, i = places[row]
            return splits[name].signals([i])[0]

        arrays["fingerprints"] = np.stack([one for name in plan.splits for one in builder.fingerprints[name]])
        if math.prod(plan.signal_shape) >= equal_signals.FEWEST_SAMPLES:
            arrays["same_as"] = np.array(equal_signals.repeated(arrays["fingerprints"], signal))
        for row in np.flatnonzero(arrays["same_as"] >= 0)[:_LOGGED]:
            (name, i), (kept, k) = places[row], places[arrays["same_as"][row]]
            differs = not np.array_equal(splits[name][i]["label"], splits[kept][k]["label"])
            _log.warning(
                "left out: %s (%s) holds the same signal as %s (%s)%s",
                ids[row], name, ids[arrays["same_as"][row]], kept, ", with another label" if differs else "",
            )  # fmt: skip
    with atomic_path(directory / _CONTENTS) as partial:
        np.savez_compressed(partial, allow_pickle=False, **arrays)


def _contents(
    plan: Plan, folder: Path, splits: dict[str, Split]
) -> tuple[dict[str, Contents], dict[str, np.ndarray], dict[str, str]]:
    """The `Contents` and the rows to keep, by split; and the ids left out, with the ids that they repeat."""
    with np.load(folder / _CONTENTS) as arrays:
        ids = json.loads(bytes(arrays["ids"]))
        same_as, fingerprints = arrays["same_as"], arrays.get("fingerprints")
    if len(ids) != sum(len(split) for split in splits.values()):
        raise ValueError(folder)
    contents, kept, first = {}, {}, 0
    for name in plan.splits:
        kept[name] = np.flatnonzero(same_as[first : first + len(splits[name])] < 0)
        rows = first + kept[name]
        own = tuple(ids[row] for row in rows)
        patients = tuple(plan.patients.get(id, id) for id in own) if plan.patients else None
        contents[name] = Contents(own, None if fingerprints is None else fingerprints[rows], patients)
        first += len(splits[name])
    return contents, kept, {ids[row]: ids[same_as[row]] for row in np.flatnonzero(same_as >= 0)}


def _read(plan: Plan, folder: Path) -> tuple[dict[str, Split], dict[str, str]]:
    """The splits, and the reasons of the signals that were skipped, by id."""
    builder = tfds.builder_from_directory(str(folder / _RECORDS))
    metadata = builder.info.metadata
    splits = {}
    for name in plan.splits:
        parts = [part for part in _parts(plan, name) if metadata["stored"][part]]
        records = builder.as_data_source("+".join(parts))
        records[len(records) - 1]  # raises here if the file is damaged
        splits[name] = Split(records, plan.signal_shape, plan.dtype, plan.labels)
    return splits, metadata["skipped"]


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def file_md5(path: Path) -> str:
    """The MD5 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()
