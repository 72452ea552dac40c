"""The interface of a source: a plan of the signals before they are prepared, and the dataset that is read back."""

from __future__ import annotations

import functools
import itertools
import os
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np

from medfuncta_jax.units import Units

SPLITS = ("train", "val", "test")
# Options of sources that concern labels and not signals.
LABEL_OPTIONS = ("labels", "label_column", "no_value")
# The only split of new signals, to which a finished field is applied.
NEW = "new"

Task = Literal["none", "binary-class", "multi-class", "multi-label", "ordinal-regression"]

# Splits below this many bytes, as stored, are held in memory.
MEMORY_LIMIT = 1 << 30


class DataError(ValueError):
    """Data is missing, damaged or does not fit together; the one-line message names the file and the remedy."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))  # names and values in files may hold line breaks


class NoFinerGrid(Exception):
    """A source has no finer grid of its signals, or the file of this grid is absent; the message says which."""


@dataclass(frozen=True)
class Annotations:
    """Names, labels, affines and units of the signals of a split, in its order.

    Attributes:
      ids: n names.
      labels: int64 [n], -1 if none, or [n, classes] of 0 and 1 for "multi-label".
      affines: float64 [n, 4, 4], or None for signals without coordinates in space.
      units: the n original units of the values before scaling.
    """

    ids: tuple[str, ...]
    labels: np.ndarray
    affines: np.ndarray | None
    units: tuple[Units, ...] = ()


@dataclass(frozen=True)
class Example:
    """One signal as a source makes it.

    Attributes:
      signal: [*grid, D], uint8 in [0, 255] or float32 in [0, 1], as the plan states.
      id: unique within its split.
      label: a class, -1 if none, or one 0/1 a class.
      affine: [4, 4] for a plan with affines, else None.
      units: the original units of the values before scaling.
    """

    signal: np.ndarray
    id: str
    label: int | np.ndarray = -1
    affine: np.ndarray | None = None
    units: Units = Units()  # noqa: RUF009  (frozen)


@dataclass(frozen=True)
class Skipped:
    """A planned signal without an example, and the reason in one line that names its file."""

    id: str
    reason: str


def example_or_skipped(id: str, make: Callable[[], Example]) -> Example | Skipped:
    """The result of `make`, or `Skipped` if it raises `DataError` for one file among many."""
    try:
        return make()
    except DataError as error:
        return Skipped(id, str(error))


@dataclass(frozen=True)
class PlannedSplit:
    """`length` signals, made one at a time by each call of `examples`, in the order in which they are stored.

    A `DataError` that `examples` raises refuses the whole dataset.
    """

    length: int
    examples: Callable[[], Iterator[Example | Skipped]]


def splits_by_name(names: Mapping[str, Sequence[str]], example: Callable[[str], Example]) -> dict[str, PlannedSplit]:
    """Splits of signals that are made from their names alone; signals that cannot be made are skipped.

    Args:
      names: the names of each split, in order.
      example: makes one, or raises DataError.
    """

    def examples(split: str) -> Iterator[Example | Skipped]:
        for name in names[split]:
            yield example_or_skipped(name, functools.partial(example, name))

    return {split: PlannedSplit(len(names[split]), functools.partial(examples, split)) for split in names}


@dataclass(frozen=True)
class Plan:
    """A dataset without its signals. A plan is cheap to make, so it shows whether prepared data is still valid.

    Attributes:
      name: the source's name.
      grid, channels, classes, task, about: as in `Dataset`. `about` must determine every prepared byte.
      dtype: type of the stored signals.
      splits: "train", "val" and "test"; or "new" alone, of signals that a finished field is applied to.
      affines: whether every example has one.
      gathered: whether the signals are a user's own files; equal ones are then kept only once. A published set is not
        searched for equal signals.
      patients: by id, the patient of each signal where that is known.
      labels: the label of each labelled signal by id, for labels that are not part of the prepared data and may change
        without new preparation. None for examples that include their labels.
    """

    name: str
    grid: tuple[int, ...]
    channels: int
    dtype: Literal["uint8", "float32"]
    splits: Mapping[str, PlannedSplit]
    about: dict[str, Any]
    classes: tuple[str, ...] = ()
    task: Task = "none"
    affines: bool = False
    gathered: bool = False
    patients: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, int] | None = None

    @property
    def signal_shape(self) -> tuple[int, ...]:
        """[*grid, D]."""
        return (*self.grid, self.channels)

    @property
    def label_shape(self) -> tuple[int, ...]:
        """() for one class a signal, [classes] for several."""
        return (len(self.classes),) if self.task == "multi-label" else ()

    def signals(self, ids: Collection[str]) -> Iterator[tuple[str, np.ndarray]]:
        """Id and signal, float32 [*grid, D] in [0, 1], of the signals named in `ids`, in the order of the source.

        Signals of the source's test split come first. Nothing is prepared.

        Raises:
          DataError: the source holds no signal of such a name, or a damaged file.
        """
        missing = set(ids)
        # The source may put a run's test signals in another split when files were added since.
        for example in itertools.chain.from_iterable(self.splits[name].examples() for name in ("test", "val", "train")):
            if example.id in missing:
                if isinstance(example, Skipped):
                    raise DataError(example.reason)
                missing.remove(example.id)
                yield example.id, unit_signal(np.asarray(example.signal))
                if not missing:
                    return
        raise DataError(f"{self.name} at {'x'.join(map(str, self.grid))} holds no signal {sorted(missing)[0]}")


class Split(Sequence[dict[str, Any]]):
    """Signals with random access: `split[i]` is a dict.

    `signal`: float32 [*grid, D] in [0, 1]; `label`: int, -1 if none, or int64 [classes] of 0 and 1 for "multi-label";
    `id`: str; `units`: JSON of `Units`, the original units of the values; and, for sources with coordinates in space,
    `affine`: float64 [4, 4] of the grid to millimetres, RAS+.

    A split below `MEMORY_LIMIT` is read into memory on first use and stays there; others are read record by record.
    Threads may share a split.
    """

    def __init__(
        self,
        records: Sequence[Mapping[str, Any]],
        signal_shape: tuple[int, ...],
        dtype: str,
        labels: Mapping[str, int] | None = None,
    ):
        """From stored records: mappings with `signal` ([*grid, D] of `dtype`), `label`, `id` and perhaps `affine`.

        Labels by id replace those in the records; a signal without a label has -1.
        """
        self._labels = labels
        self._records = records
        self._shape = signal_shape
        self._dtype = np.dtype(dtype)
        self._memory: tuple[np.ndarray, list[dict[str, Any]]] | None = None
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._records)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = int(index) + (len(self) if index < 0 else 0)
        if not 0 <= i < len(self):
            raise IndexError(f"signal {index} of {len(self)}")
        memory = self._in_memory()
        if memory is None:
            record = self._decoded(self._records[i])
            return record | {"signal": unit_signal(record["signal"])}
        stored, rest = memory
        return rest[i] | {"signal": unit_signal(stored[i])}

    def signals(self, rows: slice | Sequence[int] | np.ndarray) -> np.ndarray:
        """Several signals at once, float32 [n, *grid, D] in [0, 1]; `rows` may repeat."""
        memory = self._in_memory()
        if memory is not None:
            return unit_signal(memory[0][rows])
        indices = range(*rows.indices(len(self))) if isinstance(rows, slice) else rows
        stored = np.empty((len(indices), *self._shape), self._dtype)
        for position, i in enumerate(indices):
            stored[position] = self._records[int(i)]["signal"]
        return unit_signal(stored)

    def annotations(self) -> Annotations:
        """Ids, labels and affines of all signals."""
        memory = self._in_memory()
        rest = [self._decoded(record) for record in self._records] if memory is None else memory[1]
        return Annotations(
            ids=tuple(record["id"] for record in rest),
            labels=np.stack([record["label"] for record in rest]).astype(np.int64),
            affines=np.stack([record["affine"] for record in rest]) if "affine" in rest[0] else None,
            units=tuple(Units.from_json(record["units"]) for record in rest),
        )

    def recorded(self, rows: slice | Sequence[int] | np.ndarray = slice(None)) -> np.ndarray | None:
        """Float32 [n, D], 0 for a channel that was not recorded, else 1; None if no signal of the split lacks one."""
        return None if self._recorded is None else self._recorded[rows]

    def complete(self, most: int) -> np.ndarray:
        """Rows of at most `most` signals, evenly spaced, of which every channel was recorded.

        Raises:
          DataError: there are none.
        """
        whole = np.arange(len(self)) if self._recorded is None else np.flatnonzero(self._recorded.all(1))
        if not len(whole):
            raise DataError(f"none of the {len(self)} signals has every channel, which is needed here")
        return np.unique(whole[np.linspace(0, len(whole) - 1, min(most, len(whole))).round().astype(int)])

    @functools.cached_property
    def _recorded(self) -> np.ndarray | None:
        if self._shape[-1] == 1 or self._dtype == np.uint8:  # images, and signals of one channel, which has values
            return None
        missing = [units.missing for units in self.annotations().units]
        recorded = np.ones((len(missing), self._shape[-1]), np.float32)
        for channels, one in zip(missing, recorded, strict=True):
            one[list(channels)] = 0
        return recorded if any(missing) else None

    @classmethod
    def of(cls, parts: Sequence[tuple[Split, Sequence[int] | np.ndarray]]) -> Split:
        """A split of chosen signals of one or more splits that hold signals of one shape and dtype, in this order."""
        places = [(split._records, int(i)) for split, rows in parts for i in rows]
        first = parts[0][0]
        labels = None
        if first._labels is not None:
            labels = {name: label for split, _ in parts for name, label in (split._labels or {}).items()}
        return cls(_Chosen(places), first._shape, first._dtype.name, labels)

    def _decoded(self, record: Mapping[str, Any]) -> dict[str, Any]:
        decoded = _decoded(record)
        if self._labels is not None:
            decoded["label"] = self._labels.get(decoded["id"], -1)
        return decoded

    def _in_memory(self) -> tuple[np.ndarray, list[dict[str, Any]]] | None:
        if self._memory is None and len(self) * self._dtype.itemsize * int(np.prod(self._shape)) < MEMORY_LIMIT:
            with self._lock:
                if self._memory is None:
                    stored, rest = np.empty((len(self), *self._shape), self._dtype), []
                    for i in range(len(self)):
                        record = self._decoded(self._records[i])
                        stored[i] = record.pop("signal")
                        rest.append(record)
                    self._memory = (stored, rest)
        return self._memory


class _Chosen(Sequence[Mapping[str, Any]]):
    """Records at places in other sequences, read on access."""

    def __init__(self, places: list[tuple[Sequence[Mapping[str, Any]], int]]):
        self._places = places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: Any) -> Any:
        records, i = self._places[index]
        return records[i]


def _decoded(record: Mapping[str, Any]) -> dict[str, Any]:
    label = np.asarray(record["label"])
    decoded = {
        "signal": np.asarray(record["signal"]),
        "label": int(label) if label.ndim == 0 else label.astype(np.int64),
        "id": _text(record["id"]),
        "units": _text(record.get("units", "")),
    }
    return decoded | ({"affine": np.array(record["affine"], np.float64)} if "affine" in record else {})


def without_labels(about: Mapping[str, Any]) -> dict[str, Any]:
    """The description of a data set without the origin of its labels."""
    rest = {name: value for name, value in about.items() if name != "labels"}
    if isinstance(options := rest.get("options"), Mapping):
        rest["options"] = {name: value for name, value in options.items() if name not in LABEL_OPTIONS}
    return rest


def _text(stored: bytes | str) -> str:
    return stored.decode() if isinstance(stored, bytes) else str(stored)


def unit_signal(stored: np.ndarray) -> np.ndarray:
    """uint8 in [0, 255] or float32 in [0, 1] to a new float32 array in [0, 1]."""
    if stored.dtype == np.uint8:
        return np.divide(stored, np.float32(255), dtype=np.float32)
    return np.array(stored, np.float32)


@dataclass(frozen=True)
class Contents:
    """Data that distinguishes the signals of a split, in its order.

    Attributes:
      ids: n names.
      fingerprints: uint16 [n, F], see `equal_signals.fingerprint`; None for a published set.
      patients: n names, or None where they are not known.
    """

    ids: tuple[str, ...]
    fingerprints: np.ndarray | None = None
    patients: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Dataset:
    """Signals of one kind on one grid.

    Attributes:
      name: the source.
      grid: the C sizes of the grid.
      channels: D.
      classes: names by label; empty if there are no labels.
      splits: "train", "val" and "test", or "new" alone; each a `Split` that is not empty.
      task: the meaning of the labels; "multi-label" has one 0/1 a class, "ordinal-regression" ordered classes.
      about: JSON-able: source, licence, options, checksums, split rule; under "skipped" the planned signals that cannot
        be used, {id: reason}; and under "repeated" the signals that are left out because they equal another one, {id:
        id of the signal that is kept}.
      contents: by split, for programs that compare signals with those of earlier runs; {} if not known.
    """

    name: str
    grid: tuple[int, ...]
    channels: int
    classes: tuple[str, ...]
    splits: dict[str, Split]
    task: Task = "none"
    about: dict[str, Any] = field(default_factory=dict)
    contents: Mapping[str, Contents] = field(default_factory=dict)

    def rearranged(self, places: Mapping[str, Sequence[tuple[str, int]]]) -> Dataset:
        """The same signals in other splits.

        Args:
          places: by new split, the present split and row of each of its signals.
        """
        splits, contents = {}, {}
        for name, rows in places.items():
            splits[name] = Split.of([(self.splits[split], [i]) for split, i in rows])
            held = [(self.contents[split], i) for split, i in rows]
            several = {
                part: [getattr(one, part)[i] for one, i in held if getattr(one, part) is not None]
                for part in ("fingerprints", "patients")
            }
            contents[name] = Contents(
                tuple(one.ids[i] for one, i in held),
                np.stack(several["fingerprints"]) if several["fingerprints"] else None,
                tuple(several["patients"]) or None,
            )
        about = self.about
        if "split" in about and set(about["split"]) == set(contents):
            about = about | {"split": {name: list(one.ids) for name, one in contents.items()}}
        return replace(self, splits=splits, contents=contents, about=about)


def cache_root(cache_dir: str) -> Path:
    """The folder of prepared and downloaded data: `cache_dir`, or `medfuncta_jax` in the user's cache folder."""
    if cache_dir:
        return Path(cache_dir).expanduser().absolute()
    user_cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(user_cache).expanduser().absolute() / "medfuncta_jax"


def required_folder(data_dir: str | None, what: str) -> Path:
    """`data_dir` as an existing folder.

    Raises:
      DataError: none was given, or it is no folder; `what` says what it should hold.
    """
    if data_dir is None:
        raise DataError(f"no data directory: give the folder that holds {what} as data_dir")
    folder = Path(data_dir).expanduser().absolute()
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; data_dir must name the folder that holds {what}")
    return folder
