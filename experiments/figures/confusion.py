"""Confusion matrices of a classification as a figure: true classes against predictions."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments.figures.page import axes_at, new_page, write
from experiments.figures.style import GREY, INK, MARGIN, NORMAL, SMALL, WIDTH

MOST_CLASSES = 12


def draw_confusion(path: str | os.PathLike[str], result: Mapping[str, Any]) -> Path | None:
    """One matrix for each trained classifier and kind of features, as a PNG.

    Rows are true classes and sum to 100 %, over all seeds; cells below 1 % are left empty.

    Args:
      path: the file to write; its folder is made where absent.
      result: the result of `classify`.
    Returns:
      `path`, or None where there is nothing to draw: several labels a signal, more than MOST_CLASSES classes, or no
      trained classifier.
    """
    classes = result["classes"]
    rows = [row for row in result["rows"] if row["confusion"] and row["val_accuracy"]]
    if not rows or len(classes) > MOST_CLASSES:
        return None
    across = min(3, len(rows))
    down = -(-len(rows) // across)
    left, top, between, below = 0.85, 0.35, 0.18, 0.45
    if len(classes) > 3:
        below += 0.07 * min(12, max(map(len, classes)))  # vertical names
    side = (WIDTH - left - MARGIN - (across - 1) * between) / max(across, 2)
    block = top + side + below
    figure = new_page(down * block, left + across * side + (across - 1) * between + MARGIN)
    for i, row in enumerate(rows):
        line, column = divmod(i, across)
        x, y = left + column * (side + between), line * block + top
        axes = axes_at(figure, x, y, side, side)
        counts = np.asarray(row["confusion"], float)
        totals = counts.sum(1, keepdims=True)
        part = np.divide(counts, totals, out=np.full_like(counts, np.nan), where=totals > 0)
        axes.imshow(part, cmap="Blues", vmin=0, vmax=1)
        for (true, predicted), value in np.ndenumerate(part):
            if np.isfinite(value) and (value >= 0.01 or true == predicted):
                axes.text(predicted, true, f"{100 * value:.0f}", ha="center", va="center", fontsize=SMALL,
                          color="white" if value > 0.6 else INK)  # fmt: skip
        names = [name if len(name) <= 12 else name[:11] + "…" for name in classes]
        # Long names are vertical below, and also at the left for up to three classes.
        short = max(map(len, names)) <= 3
        axes.set_xticks(range(len(names)), names, rotation=0 if short or len(names) <= 3 else 90)
        axes.set_yticks(range(len(names)), names if column == 0 else [""] * len(names),
                        rotation=90 if not short and len(names) <= 3 else 0, va="center")  # fmt: skip
        axes.tick_params(labelsize=SMALL, labelcolor=INK, length=0, pad=3)
        axes.spines[:].set_visible(False)
        axes.set_title(f"{row['classifier']} on {row['features']}: {100 * row['accuracy']['mean']:.1f} %",
                       fontsize=NORMAL, color=INK, loc="left", parse_math=False)  # fmt: skip
        axes.set_xlabel("taken for (% of the true class)", fontsize=SMALL, color=GREY)
        if column == 0:
            axes.set_ylabel("true class", fontsize=SMALL, color=GREY)
    return write(figure, path)
