"""Signals beside reconstructions by several methods from their measurements, and sheets of signals."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from experiments.figures.page import axes_at, new_page, text_at, write
from experiments.figures.style import BLUE, GREY, INK, MARGIN, NORMAL, SMALL, WIDTH

# Inches: between pictures, below each, above all, and at the left for names.
GAP, CAPTION, HEAD, LABEL = 0.06, 0.16, 0.5, 1.1


def draw_methods(
    path: str | os.PathLike[str],
    signals: np.ndarray,
    images: Mapping[str, np.ndarray],
    *,
    rows: Sequence[int] | np.ndarray,
    names: Sequence[str],
    title: str,
) -> Path:
    """A row per signal: the signal, then the reconstruction of each method with its PSNR, as a PNG.

    Args:
      path: the file to write; its folder is made where absent.
      signals: [n, *grid, D] in [0, 1].
      images: method to reconstructions of the same shape.
      rows: which signals are drawn.
      names: names of all n signals.
      title: above the page.
    Returns:
      `path`.
    """
    columns = {"signal": signals, **images}
    cell = min((WIDTH - 2 * MARGIN - LABEL) / len(columns) - GAP, 1.5)
    height = cell if signals.ndim > 3 else 0.8
    head = MARGIN + HEAD
    figure = new_page(head + len(rows) * (height + CAPTION + GAP) + MARGIN, WIDTH)
    text_at(figure, MARGIN, MARGIN + 0.14, title, fontsize=NORMAL)
    for k, name in enumerate(columns):
        left = MARGIN + LABEL + k * (cell + GAP)
        text_at(figure, left + cell / 2, head - 0.05, name, ha="center", va="bottom", color=GREY)
        for i, row in enumerate(rows):
            top = head + i * (height + CAPTION + GAP)
            if k == 0:
                named = names[row] if len(names[row]) <= 18 else "…" + names[row][-17:]
                text_at(figure, MARGIN, top + height / 2, named, va="center")
            show(axes_at(figure, left, top, cell, height), columns[name][row])
            if name != "signal":
                error = float(np.square(columns[name][row].clip(0, 1) - signals[row]).mean())
                said = f"{min(100.0, -10 * np.log10(max(error, 1e-10))):.1f} dB"
                text_at(figure, left + cell / 2, top + height + 0.02, said, ha="center", va="top", color=INK)
    return write(figure, path)


def draw_sheet(
    path: str | os.PathLike[str], blocks: Sequence[tuple[str, np.ndarray]], *, across: int, title: str
) -> Path:
    """Rows of signals, each row with a name at its left, as a PNG.

    Args:
      path: the file to write; its folder is made where absent.
      blocks: name and signals [at most across, *grid, D] in [0, 1] of each row; "" continues the previous row.
      across: signals in a row.
      title: above the page.
    Returns:
      `path`.
    """
    cell = (WIDTH - 2 * MARGIN - LABEL) / across - GAP
    height = cell if blocks[0][1].ndim > 3 else 0.6
    head = MARGIN + 0.3
    figure = new_page(head + len(blocks) * (height + GAP) + MARGIN, WIDTH)
    text_at(figure, MARGIN, MARGIN + 0.14, title, fontsize=NORMAL)
    for i, (name, signals) in enumerate(blocks):
        top = head + i * (height + GAP)
        text_at(figure, MARGIN, top + height / 2, name, va="center", fontsize=SMALL)
        for k, signal in enumerate(signals[:across]):
            show(axes_at(figure, MARGIN + LABEL + k * (cell + GAP), top, cell, height), signal)
    return write(figure, path)


def show(axes: Axes, signal: np.ndarray) -> None:
    """A signal [*grid, D]: a curve a channel, an image, or the middle slice across the last axis of a volume."""
    axes.set_axis_off()
    if signal.ndim == 2:
        axes.plot(signal, linewidth=0.8, color=BLUE if signal.shape[1] == 1 else None)
        axes.set_ylim(-0.05, 1.05)
        return
    if signal.ndim == 4:
        signal = signal[::-1, ::-1, signal.shape[2] // 2].swapaxes(0, 1)
    colour = signal.shape[-1] == 3
    axes.imshow(signal.clip(0, 1) if colour else signal[..., 0], cmap="gray", vmin=0, vmax=1)
