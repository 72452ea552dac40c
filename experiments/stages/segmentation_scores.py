"""How well masks agree: the 95 % Hausdorff distance, and scores of several signals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import ndimage

from medfuncta_jax import metrics
from medfuncta_jax.segmentation import dice


def hausdorff_95(found: np.ndarray, mask: np.ndarray, spacing: Sequence[float]) -> float:
    """The 95 % Hausdorff distance of two structures, in the unit of `spacing`; NaN where one of them is empty.

    The result is the 95 % percentile of the distances from each boundary point of one structure to the nearest boundary
    point of the other, the larger of both directions. A boundary point is a point of the structure with a neighbour,
    along an axis, outside the structure or outside the grid.

    Args:
      found, mask: bool [*grid].
      spacing: of the points along each axis.
    """
    if not found.any() or not mask.any():
        return float("nan")
    edges = [some & ~ndimage.binary_erosion(some) for some in (found, mask)]
    ways = [
        np.percentile(ndimage.distance_transform_edt(~other, sampling=spacing)[edge], 95)
        for edge, other in (edges, edges[::-1])
    ]
    return float(max(ways))


def scores(
    found: np.ndarray,
    masks: np.ndarray,
    spacings: np.ndarray,
    *,
    names: Sequence[str],
    resamples: int,
    seed: int,
) -> tuple[dict[str, Any], np.ndarray]:
    """Scores of each structure, and the mean Dice of each signal over its structures, [n].

    Args:
      found, masks: classes [n, *grid]; 0 is the background, k the structure names[k - 1].
      spacings: [n, C], of the points of each signal.
      resamples, seed: of the bootstrap intervals, see `metrics.summary`.
    Returns:
      By structure, and for "mean" over the structures of a signal: `dice` and `hd95`, means with their intervals, None
      where no signal has any; and by structure `signals`, which have it, and `missed`, where only one of result and
      mask shows it: their Dice is 0, and they have no distance.
    """
    overlap = dice(found, masks, classes=len(names) + 1)
    distances = np.array([
        [hausdorff_95(one == k, true == k, spacing) for k in range(1, len(names) + 1)]
        for one, true, spacing in zip(found, masks, spacings, strict=True)
    ])  # fmt: skip

    def mean(values: np.ndarray) -> dict[str, Any] | None:
        known = values[~np.isnan(values)]
        if not len(known):
            return None
        summary = metrics.summary({"value": known}, resamples=resamples, seed=seed)
        return {"mean": summary["value"], "interval": summary["interval"]["value"]}

    table: dict[str, Any] = {}
    for k, name in enumerate(names):
        known = ~np.isnan(overlap[:, k])
        table[name] = {
            "dice": mean(overlap[:, k]),
            "hd95": mean(distances[:, k]),
            "signals": int((masks == k + 1).reshape(len(masks), -1).any(1).sum()),
            "missed": int((known & np.isnan(distances[:, k])).sum()),
        }
    by_signal, far = (_mean_of_known(values) for values in (overlap, distances))
    table["mean"] = {"dice": mean(by_signal), "hd95": mean(far)}
    return table, by_signal


def differences(
    by_signal: Mapping[str, Mapping[str, np.ndarray]], resamples: int, seed: int
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Mean Dice of each other method less that of the U-Net, paired, by part of the points."""
    found: dict[str, dict[str, Any]] = {}
    for name, parts in by_signal.items():
        if name == "unet" or "unet" not in by_signal:
            continue
        found[name] = {}
        for part, values in parts.items():
            gain = values - by_signal["unet"][part]
            gain = gain[~np.isnan(gain)]
            if len(gain):
                said = metrics.summary({"dice": gain}, resamples=resamples, seed=seed)
                found[name][part] = {"dice": said["dice"], "interval": said["interval"]["dice"]}
    return found


def _mean_of_known(values: np.ndarray) -> np.ndarray:
    """Means of rows over what is not NaN; NaN for a row without any."""
    count = (~np.isnan(values)).sum(1)
    return np.divide(np.nansum(values, 1), count, out=np.full(len(values), np.nan), where=count > 0)
