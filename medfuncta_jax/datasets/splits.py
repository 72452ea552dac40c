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

    The split of a name therefore does not depend on other names: adding or removing names does not move the others. No
    such rule also fills every split for any few names. A split that the hashes leave empty therefore takes one unit
    from the largest split, until it has names of its own; a run keeps its first split
    (`experiments/runtime/signal_record.py`).

    Args:
      names: without repetition; their order does not matter.
      fractions: the probability of a name, or of a group, to be in each split other than "train". The standard
        deviation of a part f of n units is sqrt(f (1 - f) / n).
      seed: seed of the hashes.
      groups: the group of each name, such as a patient; a group is in one split only. None makes every name a group.
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
    """A hash, uniform in [0, 1) and the same on every machine."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{unit}".encode()).digest()[:6]) / 2**48


def stratified_part(labels: np.ndarray, fraction: float, *, seed: int) -> np.ndarray:
    """A random part of every class: round(fraction n) of n rows, at least one, and none of a class with a single row.

    Args:
      labels: int [n].
      fraction: in (0, 1).
      seed: seed of the permutations, one a class in ascending order of the labels.
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
