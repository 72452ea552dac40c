"""A permanent record of a run's signals and their first splits, in `WORKDIR/signals.json`.

The files of a data directory change: new patients come in, a file is removed, another directory is named. Training
signals must not become test signals then, and test signals stay comparable. Every start therefore compares the present
signals with the record. A signal that the record knows, by its name, by its content under another name, or by its
patient, stays in the recorded split (the first of train, val and test, if there are several); a new signal is split by
its hash (`medfuncta_jax.datasets.splits`) and recorded.
"""

from __future__ import annotations

import base64
import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.runtime.progress import log
from experiments.runtime.run_directory import RunDirectory, RunError, write_json
from medfuncta_jax.checkpoint import CheckpointError, load_field_and_about
from medfuncta_jax.datasets import Dataset
from medfuncta_jax.datasets.dataset import SPLITS
from medfuncta_jax.datasets.equal_signals import equal, near

# Tolerance of fingerprints: the last digit may differ for the same values prepared on another machine.
_SAME = 2

# Maximum number of names in a line of the log.
_NAMED = 3


@dataclass
class _Entry:
    """A signal of a record."""

    id: str
    split: str
    patient: str | None
    fingerprint: np.ndarray | None

    def same_content(self, other: _Entry) -> bool:
        if self.fingerprint is None or other.fingerprint is None:
            return True  # no evidence of a difference
        if self.fingerprint.shape != other.fingerprint.shape:
            return False
        return bool(np.abs(self.fingerprint.astype(int) - other.fingerprint.astype(int)).max() <= _SAME)


def held_apart(dataset: Dataset, run: RunDirectory) -> Dataset:
    """The dataset with every signal in its first split in this run; the record is written or extended.

    Changes are logged: signals that are missing, changed, new, renamed, or kept in another split than a new draw would
    give.

    Raises:
      RunError: the record is damaged, or missing in a run that was trained; none of its signals is there; or a split is
        empty.
    """
    file = run.path / "signals.json"
    entries = _entries(dataset)
    if not file.exists():
        known = _known_before(dataset, run)
        if run.writes:
            write_json(file, _as_json(known or entries))
        if not known:
            return dataset
    try:
        known = _from_json(json.loads(file.read_text())) if file.exists() else known
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{file} is damaged, and says which signals this run was trained on; bring it back or name another "
            "--workdir"
        ) from error
    found = _compared(dataset, entries, known)
    _tell(found, file.name)
    if not any(found.known_as):
        raise RunError(
            f"none of the {len(known)} signals that this run began with, such as {known[0].id}, is in the data given "
            f"now (there is {entries[0].id}); give the data directory of the run, or name another --workdir"
        )
    recorded = [*known, *(entry for entry in entries if not found.unchanged(entry))]
    if run.writes and len(recorded) > len(known):
        write_json(file, _as_json(recorded))
    if not found.moved:
        return dataset
    places: dict[str, list[tuple[str, int]]] = {split: [] for split in SPLITS}
    for entry, (split, row) in sorted(zip(entries, found.places, strict=True), key=lambda pair: pair[0].id):
        places[entry.split].append((split, row))
    for split, rows in places.items():
        if not rows:
            raise RunError(
                f"no signal is left for the {split} split: those that would be in it belong to others of this run, "
                f"such as {found.moved[0].id} to {found.moved[0].split}; give more data, or name another --workdir"
            )
    return dataset.rearranged(places)


def _known_before(dataset: Dataset, run: RunDirectory) -> list[_Entry]:
    """The signals of a run without a record, which drew its split in another way; its field names them.

    Raises:
      RunError: it does not.
    """
    drawn = "split" in dataset.about or any(one.fingerprints is not None for one in dataset.contents.values())
    if not drawn or not (run.checkpoints.is_dir() and any(run.checkpoints.iterdir())):
        return []
    try:
        named = load_field_and_about(run.path)[2]["data"]["split"]
        entries = [_Entry(id, split, None, None) for split in SPLITS for id in named[split]]
    except (CheckpointError, KeyError, TypeError):
        entries = []
    if not {entry.id for entry in entries} & {id for one in dataset.contents.values() for id in one.ids}:
        raise RunError(
            f"workdir {run.path} was trained before runs kept the splits of their signals, which are drawn in another "
            "way now; name another --workdir"
        )
    return entries


class _Found:
    """The result of a comparison; `known_as` has the entry of each signal, or None."""

    def __init__(self, entries: list[_Entry], known: list[_Entry], places: list[tuple[str, int]]):
        self.entries, self.places = entries, places
        self.of_id: dict[str, list[_Entry]] = {}
        for one in known:
            self.of_id.setdefault(one.id, []).append(one)
        self.known_as: list[_Entry | None] = [next(iter(self.of_id.get(one.id, ())), None) for one in entries]
        self.moved: list[_Entry] = []
        self.renamed: dict[str, str] = {}
        self.missing: list[str] = []

    def unchanged(self, entry: _Entry) -> bool:
        return any(one.same_content(entry) for one in self.of_id.get(entry.id, ()))


def _compared(dataset: Dataset, entries: list[_Entry], known: list[_Entry]) -> _Found:
    """Assign each entry to its split by the rules of the module's docstring."""
    places = [(split, row) for split in SPLITS for row in range(len(dataset.splits[split]))]
    found = _Found(entries, known, places)
    twins = _same_content(dataset, found, known)
    patients: dict[str, set[str]] = {}
    for one in known:
        if one.patient is not None:
            patients.setdefault(one.patient, set()).add(one.split)
    for row, entry in enumerate(entries):
        splits = {one.split for one in found.of_id.get(entry.id, ())}
        if not found.unchanged(entry):
            splits |= {one.split for one in twins.get(row, ())} | patients.get(entry.patient or "", set())
        if entry.id not in found.of_id and row in twins:
            found.known_as[row] = twins[row][0]
            found.renamed[entry.id] = twins[row][0].id
        split = next((name for name in SPLITS if name in splits), entry.split)
        if split != entry.split:
            entry.split = split
            found.moved.append(entry)
    there = {entry.id for entry in entries} | set(found.renamed.values()) | set(dataset.about.get("repeated", ()))
    found.missing = [id for id in found.of_id if id not in there]
    return found


def _same_content(dataset: Dataset, found: _Found, known: list[_Entry]) -> dict[int, list[_Entry]]:
    """Known signals with the same content as a new or changed signal, by the row of the latter."""
    rows = [i for i, entry in enumerate(found.entries) if not found.unchanged(entry)]
    held = [one for one in known if one.fingerprint is not None]
    if not rows or not held or found.entries[0].fingerprint is None:
        return {}
    place_of = {entry.id: i for i, entry in enumerate(found.entries)}

    def signal(row: int) -> np.ndarray:
        split, i = found.places[row]
        return dataset.splits[split].signals([i])[0]

    def is_equal(row: int, one: _Entry) -> bool:
        there = place_of.get(one.id)
        if there is None or not found.entries[there].same_content(one):
            return True  # the values are gone: the fingerprint decides, on the safe side
        return equal(signal(row), signal(there))

    candidates = near(
        np.stack([found.entries[row].fingerprint for row in rows]),  # type: ignore[misc]
        np.stack([one.fingerprint for one in held]),  # type: ignore[misc]
    )
    twins = {
        row: [held[k] for k in some if held[k].id != found.entries[row].id and is_equal(row, held[k])]
        for row, some in zip(rows, candidates, strict=True)
    }
    return {row: ones for row, ones in twins.items() if ones}


def _tell(found: _Found, file: str) -> None:
    changed = [one.id for one in found.entries if one.id in found.of_id and not found.unchanged(one)]
    new = [one for one in found.entries if one.id not in found.of_id and one.id not in found.renamed]
    if found.missing:
        log.warning("%s of %s: missing or unreadable now: %s", _count(found.missing), file, _listed(found.missing))
    if changed:
        log.warning("%s of %s: changed since this run began: %s", _count(changed), file, _listed(changed))
    if found.renamed:
        log.warning(
            "%s of %s: there under another name: %s", _count(found.renamed), file,
            _listed([f"{one} is {other}" for one, other in found.renamed.items()]),
        )  # fmt: skip
    if new:
        where = Counter(one.split for one in new)
        log.warning(
            "%s new since this run began (%s): %s", _count(new),
            ", ".join(f"{where[split]} {split}" for split in SPLITS if where[split]), _listed([one.id for one in new]),
        )  # fmt: skip
    if found.moved:
        moved = _listed([f"{one.id} in {one.split}" for one in found.moved])
        log.warning("%s kept in the split of this run, not that of a new draw: %s", _count(found.moved), moved)


def _count(some: Any) -> str:
    return f"{len(some)} signal{'s' * (len(some) != 1)}"


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


def _entries(dataset: Dataset) -> list[_Entry]:
    entries = []
    for split in SPLITS:
        held = dataset.contents[split]
        for i, id in enumerate(held.ids):
            patient = None if held.patients is None else held.patients[i]
            entries.append(_Entry(id, split, patient, None if held.fingerprints is None else held.fingerprints[i]))
    return entries


def _as_json(entries: list[_Entry]) -> dict[str, Any]:
    """By split: ids, patients or null, and fingerprints, uint16 little-endian [n, F] in base64, or null."""
    splits = {}
    for split in SPLITS:
        held = [one for one in entries if one.split == split]
        prints = [one.fingerprint for one in held if one.fingerprint is not None]
        splits[split] = {
            "ids": [one.id for one in held],
            "patients": [one.patient for one in held] if any(one.patient is not None for one in held) else None,
            "fingerprints": base64.b64encode(np.stack(prints).astype("<u2").tobytes()).decode() if prints else None,
        }
    return {"version": 1, "splits": splits}


def _from_json(values: dict[str, Any]) -> list[_Entry]:
    entries = []
    for split in SPLITS:
        held = values["splits"][split]
        ids, patients = held["ids"], held["patients"] or [None] * len(held["ids"])
        prints: Any = [None] * len(ids)
        if held["fingerprints"] is not None:
            prints = np.frombuffer(base64.b64decode(held["fingerprints"], validate=True), "<u2").reshape(len(ids), -1)
        entries += [_Entry(id, split, patient, one) for id, patient, one in zip(ids, patients, prints, strict=True)]
    if not entries:
        raise ValueError("no signals")
    return entries
