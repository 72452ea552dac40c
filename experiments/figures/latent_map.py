"""Latents on a plane."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.figures.page import axes_at, new_page, plain, write
from experiments.figures.style import BLUE, GREEN, GREY, INK, MARGIN, NORMAL, ORANGE, RULE, SMALL, WIDTH
from experiments.stages.principal_axes import principal_axes

# Colours of classes; further classes are grey, because more colours are hard to distinguish.
_CLASS_COLOURS = (BLUE, ORANGE, GREEN, "#cc79a7", "#e69f00", "#56b4e9", "#7f3c8d", "#222222", "#a65628")


def draw_latent_map(
    path: str | os.PathLike[str],
    train: np.ndarray,
    latents: np.ndarray,
    *,
    labels: np.ndarray | None = None,
    classes: Sequence[str] = (),
    psnr: np.ndarray | None = None,
) -> Path:
    """Latents on the first two principal axes of training latents, as a PNG.

    Args:
      path: the file to write; its folder is made where absent.
      train: [n, P], n >= 2, the latents that define the axes.
      latents: [m, P], the latents to draw.
      labels: [m], a class or -1 for each (-1 is grey, below the others); None colours by `psnr`.
      classes: names of the classes.
      psnr: [m] in dB, for colours without labels.
    Returns:
      `path`.
    """
    plane = principal_axes(train, 2)
    places, shares = plane.scores(latents), plane.shares  # [m, 2], [2]
    if len(shares) < 2:  # a latent of one number
        places, shares = np.pad(places, ((0, 0), (0, 1))), np.pad(shares, (0, 1))
    left, head, height, foot = 0.62, 0.5, 4.4, 0.5
    figure = new_page(head + height + foot)
    room = 0.0 if labels is not None else 0.9
    panel = axes_at(figure, left, head, WIDTH - left - 2 * MARGIN - room, height)
    style: dict[str, Any] = {"s": 14.0 if len(latents) < 1000 else 5.0, "linewidths": 0, "alpha": 0.75}
    if labels is None:
        shown = panel.scatter(places[:, 0], places[:, 1], c=psnr, cmap="viridis", **style)
        scale = figure.colorbar(shown, cax=axes_at(figure, WIDTH - room, head, 0.12, height))
        scale.set_label("PSNR (dB)", fontsize=SMALL, color=INK)
        scale.outline.set_visible(False)
        scale.ax.tick_params(labelsize=SMALL, labelcolor=INK, length=2, color=GREY)
    else:
        for number, name in ((-1, "no label"), *enumerate(classes)):
            rows = np.flatnonzero(labels == number)
            if len(rows):
                known = 0 <= number < len(_CLASS_COLOURS)
                colour = _CLASS_COLOURS[number] if known else RULE
                panel.scatter(places[rows, 0], places[rows, 1], color=colour, label=name, **style)
        panel.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=4, frameon=False, fontsize=SMALL,
                     labelcolor=INK, borderaxespad=0.2, borderpad=0, handletextpad=0.2, columnspacing=1.4,
                     markerscale=1.6)  # fmt: skip
    plain(panel)
    across, upwards = (f"principal axis {i + 1} ({100 * shares[i]:.0f} % of variance)" for i in (0, 1))
    panel.set_xlabel(across, fontsize=NORMAL, color=INK)
    panel.set_ylabel(upwards, fontsize=NORMAL, color=INK)
    return write(figure, path)
