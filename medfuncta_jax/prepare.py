"""New signals for a finished field: resampled and scaled as in its training, and back to their own units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medfuncta_jax.arrays import Array
from medfuncta_jax.checkpoint import CheckpointError, load_field_and_about
from medfuncta_jax.settings import DataSettings, Settings
from medfuncta_jax.units import Units


@dataclass(frozen=True)
class PreparedSignals:
    """Signals as a field takes them, with their original units.

    Attributes:
      values: float32 [n, *grid, D] in [0, 1], for `fit_latent`.
      ids: n names.
      units: n of them: the scaling of each.
      affines: float64 [n, 4, 4] of the grid to world (mm, RAS+), None for signals without a place in space.
      skipped: signals that cannot be used, name to reason.
    """

    values: np.ndarray
    ids: tuple[str, ...]
    units: tuple[Units, ...]
    affines: np.ndarray | None
    skipped: dict[str, str]

    @property
    def weights(self) -> np.ndarray | None:
        """Weights for `fit_latent`, float32 [n, *grid, D]: 0 in channels that were not recorded, else 1; None if all
        were.
        """
        if not any(units.missing for units in self.units):
            return None
        weights = np.ones_like(self.values)
        for units, one in zip(self.units, weights, strict=True):
            one[..., list(units.missing)] = 0
        return weights

    def in_own_units(self, signals: Array) -> np.ndarray:
        """Signals in [0, 1] back in the units of their files (HU, mV, grey values), float64.

        Args:
          signals: [n, ..., D] in the order of `ids`, such as `reconstruct` gives; values outside [0, 1] are cut.
        Raises:
          ValueError: another number of signals.
        """
        signals = np.clip(np.asarray(signals), 0, 1)
        if len(signals) != len(self.units):
            raise ValueError(f"signals {signals.shape} must be {len(self.units)} in number, as `ids` are")
        return np.stack([units.values(signal) for units, signal in zip(self.units, signals, strict=True)])


def prepare(
    run: Path | str, data: Path | str | Array | Sequence[Any], *, affine: np.ndarray | None = None
) -> PreparedSignals:
    """New signals for a field, resampled and scaled as in the field's training.

        prepared = mf.prepare("runs/chest", "tomorrow/scan.nii.gz")
        fit = mf.fit_latent(field, params, prepared.values, weights=prepared.weights)
        values = mf.reconstruct(field, params, fit.latents, mf.grid(prepared.values.shape[1:-1]))
        hounsfield = prepared.in_own_units(values)  # [n, N, D]

    Args:
      run: a run directory, or the `field.safetensors` of one; the field file holds the source, its options and the
        grid.
      data: a file of the run's source, a folder of such files, or an array as a file would hold it: a volume [X, Y, Z],
        an image [H, W] or [H, W, D], a series [n] or [n, D]; or a list of such arrays.
      affine: [4, 4] of a volume that is given as an array, voxel indices to mm, RAS+; None: voxels of 1 mm.
    Raises:
      CheckpointError: no field, or one that does not say what it was trained on.
      DataError: no such file, or of the signals none can be used; of several, others are listed in `skipped`.
    """
    from medfuncta_jax.datasets import new_plan
    from medfuncta_jax.datasets.dataset import NEW, DataError, Skipped, unit_signal

    data_settings, grid, channels = trained_on(run)
    if isinstance(data, (str, Path)):
        plan = new_plan(data_settings, data, grid=grid, channels=channels)
        made = list(plan.splits[NEW].examples())
    else:
        made = _of_arrays(data_settings, data, affine=affine, grid=grid, channels=channels)
    examples = [one for one in made if not isinstance(one, Skipped)]
    skipped = {one.id: one.reason for one in made if isinstance(one, Skipped)}
    if not examples:
        raise DataError(next(iter(skipped.values()), f"{data}: holds no signals"))
    affines = [one.affine for one in examples if one.affine is not None]
    return PreparedSignals(
        values=np.stack([unit_signal(np.asarray(one.signal)) for one in examples]),
        ids=tuple(one.id for one in examples),
        units=tuple(one.units for one in examples),
        affines=np.stack(affines) if affines else None,
        skipped=skipped,
    )


def trained_on(run: Path | str) -> tuple[DataSettings, tuple[int, ...], int]:
    """The data settings, the grid and the channels of a field's training.

    Raises:
      CheckpointError: no field, or one that does not say it.
    """
    field, _, about = load_field_and_about(run)
    try:
        settings = Settings.from_saved(about["settings"])
        return settings.data, tuple(about["grid"]), field.channels
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{run}: this field does not say which data it was trained on; scale signals yourself, for fit_latent"
        ) from error


def _of_arrays(
    data: DataSettings, arrays: Any, *, affine: np.ndarray | None, grid: tuple[int, ...], channels: int
) -> list[Any]:
    from medfuncta_jax.datasets import source_module, source_options
    from medfuncta_jax.datasets.dataset import DataError
    from medfuncta_jax.settings import dataclass_from_dict

    module = source_module(data.source)
    if not hasattr(module, "example_of"):
        raise DataError(f"the source {data.source} of this run makes its signals of files alone; give a file")
    options = dataclass_from_dict(source_options(data.source), dict(data.options), "data")
    several = list(arrays) if isinstance(arrays, (list, tuple)) else [arrays]
    if not several:
        raise DataError("data holds no arrays")
    made = []
    for i, array in enumerate(several):
        values = np.asarray(array)
        if values.dtype.kind not in "biuf" or not np.isfinite(values).all():
            raise DataError(f"array {i}: {values.dtype} {values.shape} must be finite real numbers")
        made.append(module.example_of(options, values, f"array {i}", affine=affine, grid=grid, channels=channels))
    return made
