"""Seeded splits: of names at random or by group (a patient), and a stratified part of labelled rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
    names: Sequence[str], fractions: Mapping[str, float], *, seed: int, groups: Mapping[str, str] | None = None
) -> dict[str, list[str]]:
    """Names split at random into "train" and parts of it; the same names, fractions and seed give the same split.

    Args:
      names: without repetition, in an order that does not change from run to run.
      fractions: of the names, or of the groups, for each split other than "train"; at least one each.
      seed: of the permutation.
      groups: the group of each name; a group is in one split only. None takes every name by itself.
    Returns:
      "train" (empty if the others need all) and the splits of `fractions`; each list is sorted.
    """
    of = {name: name if groups is None else groups[name] for name in names}
    units = list(names) if groups is None else sorted(set(of.values()))
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(units))
    place: dict[str, str] = {}
    taken = 0
    for split, part in fractions.items():
        count = max(1, round(part * len(units)))
        place |= {units[i]: split for i in order[taken : taken + count]}
        taken += count
    splits: dict[str, list[str]] = {split: [] for split in ("train", *fractions)}
    for name in sorted(names):
        splits[place.get(of[name], "train")].append(name)
    return splits


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
