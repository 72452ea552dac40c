"""Signals with the masks of several methods laid over them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.colors import to_rgb

from experiments.figures.methods import CAPTION, GAP, HEAD, LABEL, show
from experiments.figures.page import axes_at, new_page, text_at, write
from experiments.figures.style import GREY, INK, MARGIN, NORMAL, SERIES, SMALL, WIDTH

_OPACITY = 0.55


def draw_segmentations(
    path: str | os.PathLike[str],
    signals: np.ndarray,
    masks: np.ndarray,
    found: Mapping[str, np.ndarray],
    *,
    dice: Mapping[str, Sequence[float] | np.ndarray],
    names: Sequence[str],
    structures: Sequence[str],
) -> Path:
    """A row a signal: the signal, its mask, then each method's with its mean Dice, as a PNG.

    Of volumes the slice across the last axis is shown in which the mask is largest.

    Args:
      path: the file to write; its folder is made where absent.
      signals: [n, *grid, D] in [0, 1], images or volumes.
      masks: classes [n, *grid], 0 for none.
      found: method to the same shape.
      dice: method to n figures; NaN is not written.
      names: of the n signals.
      structures: of the classes from 1 on.
    Returns:
      `path`.
    """
    columns = {"signal": np.zeros_like(masks), "mask": masks, **found}
    colours = np.array([to_rgb(SERIES[k % len(SERIES)][0]) for k in range(len(structures))])
    cell = min((WIDTH - 2 * MARGIN - LABEL) / len(columns) - GAP, 1.5)
    head = MARGIN + HEAD
    figure = new_page(head + len(signals) * (cell + CAPTION + GAP) + MARGIN, WIDTH)
    text_at(figure, MARGIN, MARGIN + 0.14, "Masks of test signals; mean Dice below", fontsize=NORMAL)
    left = MARGIN + 3.2
    for name, colour in zip(structures, colours, strict=True):
        text_at(figure, left, MARGIN + 0.14, f"■ {name}", fontsize=SMALL, color=colour)
        left += 0.25 + 0.07 * len(name)
    for i, signal in enumerate(signals):
        top = head + i * (cell + CAPTION + GAP)
        named = names[i].rpartition("/")[2]
        named = named if len(named) <= 18 else "…" + named[-17:]
        text_at(figure, MARGIN, top + cell / 2, named, va="center")
        place = slice(None)
        if masks.ndim == 4:
            largest = int((masks[i] > 0).sum((0, 1)).argmax())
            place = slice(largest, largest + 1)
        for k, (name, labels) in enumerate(columns.items()):
            left = MARGIN + LABEL + k * (cell + GAP)
            if i == 0:
                text_at(figure, left + cell / 2, head - 0.05, name, ha="center", va="bottom", color=GREY)
            shown = labels[i][..., place]
            grey = signal[..., place, :] if masks.ndim == 4 else signal
            show(axes_at(figure, left, top, cell, cell), _overlaid(grey, shown, colours))
            if name in dice and not np.isnan(dice[name][i]):
                said = f"{dice[name][i]:.3f}"
                text_at(figure, left + cell / 2, top + cell + 0.02, said, ha="center", va="top", color=INK)
    return write(figure, path)


def _overlaid(signal: np.ndarray, labels: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """[*grid, 3]: the mean of the channels in grey, and classes above 0 in their colours."""
    grey = np.repeat(signal.mean(-1, keepdims=True).clip(0, 1), 3, -1)
    laid = np.where(labels[..., None] > 0, colours[np.maximum(labels, 1).astype(int) - 1], grey)
    return (1 - _OPACITY) * grey + _OPACITY * laid
