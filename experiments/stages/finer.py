"""The source of a run on a finer grid: the true signals that a field read out at a higher resolution is held against.

All sources keep centre and field of view when their size changes, and a sample stands for the middle of its cell. So
sample j of m along an axis lies at (j + 1/2) n / m - 1/2 in samples of a training grid of n.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import itertools
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medfuncta_jax.datasets import SOURCES, DataError, source_options
from medfuncta_jax.datasets.dataset import Plan, Skipped, cache_root
from medfuncta_jax.settings import DataSettings, SettingsError, dataclass_from_dict


class NoFinerGrid(Exception):
    """The source has no finer grid, or its file is absent; the message says which."""


def finer_plan(data: DataSettings, scale: int, *, data_dir: str | None) -> Plan:
    """What the source makes of its signals on a grid `scale` times finer, or of MedMNIST's size nearest to that.

    Nothing is downloaded, and nothing prepared.

    Raises:
      NoFinerGrid: there is none.
    """
    options = dataclass_from_dict(source_options(data.source), dict(data.options), "data")
    root = cache_root(data.cache_dir)
    try:
        if data.source == "medmnist":
            finer = _at_hand(options, scale, [*([Path(data_dir)] if data_dir else []), root / "downloads" / "medmnist"])
        else:
            finer = dataclasses.replace(options, **_changes(data.source, options, scale))
        return importlib.import_module(SOURCES[data.source]).plan(finer, data_dir=data_dir, cache_root=root)
    except (DataError, SettingsError) as error:
        raise NoFinerGrid(str(error)) from error


def _changes(source: str, options: Any, scale: int) -> dict[str, Any]:
    """The options that make the grid `scale` times finer over the same field of view."""
    if source == "series_folder" and options.fit == "resample":
        return {"length": scale * options.length}
    if source == "nifti_folder":
        return {"grid": tuple(scale * side for side in options.grid), "spacing": options.spacing / scale}
    if source in ("brats", "image_folder", "lung_ct", "nibabel_slices"):
        size = options.size
        return {"size": scale * size if isinstance(size, int) else tuple(scale * side for side in size)}
    raise NoFinerGrid(f"the source {source} has its signals at one resolution only")


def _at_hand(options: Any, scale: int, folders: Sequence[Path]) -> Any:
    """MedMNIST comes in sizes: 64 stands for twice 28, 224 for four times 64. An evaluation downloads none of them."""
    wanted, near = scale * options.size, []
    for size in sorted({28, 64, 128, 224, wanted}, key=lambda size: max(size / wanted, wanted / size)):
        if max(size / wanted, wanted / size) < 2**0.5:
            with contextlib.suppress(SettingsError):  # not a size of this set
                near.append(dataclasses.replace(options, size=size))
    for finer in near:
        if any((folder / finer.file).is_file() for folder in folders):
            return finer
    names = " or ".join(finer.file for finer in near)
    raise NoFinerGrid(
        f"{names} is not in {' or '.join(map(str, folders))}" if near else f"{options.flag} has no size near {wanted}"
    )


def true_signals(plan: Plan, ids: Collection[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Id and signal, float32 [*grid, D] in [0, 1], of the signals named in `ids`, in the order of the source.

    Those of its test split come first.

    Raises:
      DataError: the source holds no test signal of such a name, or a damaged file.
    """
    missing = set(ids)
    # A run may test on signals that the source, with other files beside them now, puts elsewhere.
    for example in itertools.chain.from_iterable(plan.splits[name].examples() for name in ("test", "val", "train")):
        if example.id in missing:
            if isinstance(example, Skipped):
                raise DataError(example.reason)
            missing.remove(example.id)
            yield example.id, np.asarray(example.signal, np.float32) / (255 if plan.dtype == "uint8" else 1)
            if not missing:
                return
    raise DataError(f"{plan.name} at {'x'.join(map(str, plan.grid))} holds no test signal {sorted(missing)[0]}")


def inner_samples(coarse: Sequence[int], fine: Sequence[int]) -> tuple[tuple[slice, ...], np.ndarray]:
    """The samples of the fine grid that lie between the outermost samples of the coarse one.

    Beyond them a field would be asked outside [-1, 1], and an interpolation would have to extrapolate.

    Args:
      coarse, fine: shapes of the two grids over one field of view, with equal numbers of axes.
    Returns:
      A slice of each axis of the fine grid, and the coordinates [N, C] in [-1, 1] of the samples in them.
    """
    slices, axes = [], []
    for n, m in zip(coarse, fine, strict=True):
        places = (np.arange(m) + 0.5) * n / m - 0.5  # in samples of the coarse grid
        inside = np.flatnonzero((places >= 0) & (places <= n - 1))
        slices.append(slice(int(inside[0]), int(inside[-1]) + 1))
        axes.append(2 * places[slices[-1]] / max(n - 1, 1) - 1)
    return tuple(slices), np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(axes))
