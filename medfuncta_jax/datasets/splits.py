"""Seeded splits: of names or groups (patients) by their hashes, and a stratified part of labelled rows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import numpy as np

from medfuncta_jax.settings import SettingsError


def require_split_options(seed: int, val_fraction: float, test_fraction: float) -> None:
    """Refuse a split that cannot be made.

    Raises:
      SettingsError: a negative seed, or fractions that are not above 0 and together below 1.
    """
    if seed < 0:
        raise SettingsError(f"seed must not be negative, got {seed}")
    if not (min(val_fraction, test_fraction) > 0 and val_fraction + test_fraction < 1):
        raise SettingsError("val_fraction and test_fraction must be above 0 and together below 1")


def split_names(
    names: Iterable[str], fractions: Mapping[str, float], *, seed: int, groups: Mapping[str, str] | None = None
) -> dict[str, list[str]]:
    """Names split into "train" and parts of it by a hash of the seed and of each name, or group, by itself.

    So the split of a name does not depend on what else is there: names that are added or taken away move no other.
    No rule can do that and also fill every split of a few names, whatever these are. A split that the hashes leave
    empty therefore takes one unit from the largest, which it gives back only if names of its own come later; a run
    keeps the split that it began with (`experiments/runtime/signal_record.py`).

    Args:
      names: without repetition; their order does not matter.
      fractions: the chance of a name, or of a group, to be in each split other than "train". Parts of many units come
        close to these; of n units the standard deviation of a part f is sqrt(f (1 - f) / n).
      seed: of the hashes.
      groups: the group of each name, such as a patient; a group is in one split only. None takes every name by itself.
    Returns:
      "train" and the splits of `fractions`, each list sorted, none empty if there are as many units as splits.
    """
    of = {name: name if groups is None else groups[name] for name in names}
    rank = {unit: _rank(seed, unit) for unit in of.values()}
    units: dict[str, list[str]] = {split: [] for split in ("train", *fractions)}
    for unit in sorted(rank, key=lambda unit: (rank[unit], unit)):
        passed = 0.0
        for split, part in fractions.items():
            passed += part
            if rank[unit] < passed:
                units[split].append(unit)
                break
        else:
            units["train"].append(unit)
    for held in units.values():
        largest = max(units.values(), key=len)
        if not held and len(largest) > 1:
            held.append(largest.pop(0))
    place = {unit: split for split, held in units.items() for unit in held}
    splits: dict[str, list[str]] = {split: [] for split in units}
    for name in sorted(of):
        splits[place[of[name]]].append(name)
    return splits


def _rank(seed: int, unit: str) -> float:
    """Evenly spread in [0, 1), and the same on every machine."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{unit}".encode()).digest()[:6]) / 2**48


def stratified_part(labels: np.ndarray, fraction: float, *, seed: int) -> np.ndarray:
    """A random part of every class: of n rows round(fraction n), at least one, and none of a class with a single row.

    Args:
      labels: int [n].
      fraction: in (0, 1).
      seed: of the permutations, one a class in rising order of the labels.
    Returns:
      bool [n], whether a row is in the part.
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    chosen = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        rows = generator.permutation(np.flatnonzero(labels == label))
        if len(rows) > 1:
            chosen[rows[: min(len(rows) - 1, max(1, round(fraction * len(rows))))]] = True
    return chosen
