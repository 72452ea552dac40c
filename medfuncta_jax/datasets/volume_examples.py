"""Examples of a file, of an array and of new files, shared by the sources of volume files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from medfuncta_jax.datasets.contents import IgnoredFields
from medfuncta_jax.datasets.dataset import NEW, Example, PlannedSplit, splits_by_name
from medfuncta_jax.datasets.splits import split_names
from medfuncta_jax.datasets.volume_files import Volume, canonical_volume, nan_value, read_volume, sample_type

# Makes the example of a volume: the volume in RAS+, the example's name, the source's options (with `nan`), and the file
# or another name for messages.
Make = Callable[[Volume, str, Any, str], Example]


def example_of_file(path: Path, name: str, options: Any, ignored: IgnoredFields, make: Make) -> Example:
    """The example of a file, whose units say how its samples are stored.

    Raises:
      DataError: as `read_volume` and `make`.
    """
    example = make(read_volume(path, ignored, nan_value(options.nan)), name, options, str(path))
    dtype, slope, intercept = sample_type(path)
    return replace(example, units=replace(example.units, dtype=dtype, slope=slope, intercept=intercept))


def example_of_array(values: np.ndarray, name: str, options: Any, affine: np.ndarray | None, make: Make) -> Example:
    """The example of an array [X, Y, Z], whose affine [4, 4] (mm, RAS+) is that of 1 mm voxels where None."""
    return make(canonical_volume(values, np.eye(4) if affine is None else affine), name, options, name)


def splits_by_patient(
    files: Mapping[str, Path], patients: Mapping[str, str], options: Any, make: Make
) -> tuple[dict[str, PlannedSplit], dict[str, Any]]:
    """Files, by name, in splits by a hash of the patient, and what `Plan.about` says of it.

    Args:
      files, patients: by name.
      options: those of the source, with `seed`, `test_fraction` and `val_fraction`.
      make: see `Make`.
    """
    ignored = IgnoredFields()
    fractions = {"test": options.test_fraction, "val": options.val_fraction}
    names = split_names(list(files), fractions, seed=options.seed, groups=patients)
    rule = f"by patient, a hash with seed {options.seed}: test, then val, the rest to train"
    splits = splits_by_name(names, lambda name: example_of_file(files[name], name, options, ignored, make))
    return splits, {"split_rule": rule, "split": names}


def new_splits(files: Mapping[str, Path], options: Any, make: Make) -> dict[str, PlannedSplit]:
    """New files, by name, in the one split "new"."""
    ignored = IgnoredFields()
    return splits_by_name({NEW: list(files)}, lambda name: example_of_file(files[name], name, options, ignored, make))
