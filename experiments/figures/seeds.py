"""Runs over several seeds: ranked, on a grid of two settings, and along one setting."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.transforms import blended_transform_factory

from experiments.figures.page import axes_at, new_page, plain, write
from experiments.figures.style import BLUE, COLUMN, GREY, INK, MARGIN, NORMAL, ORANGE, RULE, SERIES, SMALL, WIDTH


def draw_ranking(
    path: str | os.PathLike[str], names: Sequence[str], panels: Mapping[str, Sequence[Sequence[float]]]
) -> Path:
    """Results of several systems, one below the other: every seed as a ring, the mean as a bar, as a PNG.

    Args:
      path: the file to write; its folder is made where absent.
      names: names of the systems, from the top.
      panels: panels side by side; name and unit to the values of each system, one per seed, or none.
    Returns:
      `path`.
    """
    left, head, foot, row = 0.09 * max(map(len, names)) + 0.15, 0.1, 0.5, 0.27
    figure = new_page(head + row * len(names) + foot)
    width = (WIDTH - left - 2 * MARGIN) / len(panels)
    for i, (unit, values) in enumerate(panels.items()):
        axes = axes_at(figure, left + i * width, head, width - 0.2, row * len(names))
        for k, seeds in enumerate(values):
            if not len(seeds):
                axes.text(0.5, k, "no result", transform=axes.get_yaxis_transform(), fontsize=SMALL, color=GREY,
                          ha="center", va="center")  # fmt: skip
                continue
            mean = float(np.mean(seeds))
            axes.plot([mean, mean], [k - 0.3, k + 0.3], color=ORANGE, linewidth=1.8)
            axes.plot(seeds, [k] * len(seeds), "o", markersize=4.5, markerfacecolor="none", markeredgecolor=BLUE)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_yticks(range(len(names)), names if i == 0 else [])
        axes.margins(x=0.08)
        axes.grid(axis="both", color=RULE, linewidth=0.4)
        axes.set_axisbelow(True)
        axes.set_xlabel(unit, fontsize=NORMAL, color=INK)
        plain(axes)
        axes.tick_params(axis="y", length=0, labelsize=NORMAL)
    figure.legend(
        [Line2D([], [], linestyle="none", marker="o", markerfacecolor="none", markeredgecolor=BLUE),
         Line2D([], [], linestyle="none", marker="|", markersize=9, markeredgewidth=1.8, color=ORANGE)],
        ["one seed", "mean"], loc="lower left", bbox_to_anchor=(0, 0), ncols=2, frameon=False, fontsize=SMALL,
        labelcolor=INK, handletextpad=0.2, columnspacing=1.0,
    )  # fmt: skip
    return write(figure, path)


def draw_heat_map(
    path: str | os.PathLike[str],
    values: np.ndarray,
    marked: np.ndarray,
    *,
    ticks: tuple[Sequence[Any], Sequence[Any]],
    labels: tuple[str, str],
    unit: str,
) -> Path:
    """A grid of values as colours and numbers, as a PNG; cells with a collapsed run are hatched.

    Args:
      path: the file to write; its folder is made where absent.
      values: [rows, columns], NaN for a missing value.
      marked: bool [rows, columns]: a run collapsed.
      ticks: labels of columns and rows.
      labels: names of both axes.
      unit: unit of the values.
    Returns:
      `path`.
    """
    rows, columns = values.shape
    left, head, cell, foot, scale = 0.62, 0.1, 0.5, 0.45, 0.62
    figure = new_page(head + cell * rows + foot, left + cell * columns + scale + MARGIN)
    axes = axes_at(figure, left, head, cell * columns, cell * rows)
    finite = values[np.isfinite(values)]
    span = Normalize(*((finite.min(), finite.max()) if finite.size else (0, 1)))
    axes.imshow(np.ma.masked_invalid(values), cmap="viridis", norm=span, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        if marked[row, column]:
            axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, hatch="////", edgecolor=GREY,
                                     linewidth=0))  # fmt: skip
        if np.isfinite(value):
            text, colour = f"{value:.1f}", "white" if span(value) < 0.6 else INK
        else:
            text, colour = ("collapsed" if marked[row, column] else "no result"), INK
        style = [] if np.isfinite(value) and not marked[row, column] else [withStroke(linewidth=2, foreground="white")]
        axes.text(column, row, text, ha="center", va="center", fontsize=SMALL if np.isfinite(value) else 6,
                  color=INK if style else colour, path_effects=style)  # fmt: skip
    axes.set_xticks(range(columns), [f"{tick}" for tick in ticks[0]])
    axes.set_yticks(range(rows), [f"{tick}" for tick in ticks[1]])
    plain(axes)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_xlabel(labels[0], fontsize=NORMAL, color=INK)
    axes.set_ylabel(labels[1], fontsize=NORMAL, color=INK)
    bar = figure.colorbar(ScalarMappable(span, "viridis"), cax=axes_at(figure, left + cell * columns + 0.1, head, 0.1,
                                                                     cell * rows))  # fmt: skip
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=SMALL, labelcolor=INK, length=2, color=GREY, pad=1.5)
    bar.set_label(unit, fontsize=SMALL, color=INK)
    return write(figure, path)


def draw_sweep(
    path: str | os.PathLike[str],
    panels: Mapping[str, Mapping[str, Sequence[Sequence[float]]]],
    *,
    ticks: Sequence[Any],
    label: str,
) -> Path:
    """Results against one setting, means over seeds with every seed as a point, as a PNG.

    Args:
      path: the file to write; its folder is made where absent.
      panels: panels one above the other; name and unit to the series, by name ("" for a single one), each with the
        values of every seed at every tick, or none.
      ticks: the values of the setting, at equal distances.
      label: the setting's name in words.
    Returns:
      `path`.
    """
    names = list(dict.fromkeys(name for series in panels.values() for name in series if name))
    longest = max(map(len, names), default=0)
    columns = 4 if sum(map(len, names)) < 40 else 3 if longest < 12 else 2 if longest < 20 else 1
    left, height, between, foot = 0.6, 1.25, 0.1, 0.38
    head = 0.16 + 0.16 * max(1, -(-len(names) // columns))
    figure = new_page(head + len(panels) * (height + between) + foot, COLUMN)
    for i, (unit, series) in enumerate(panels.items()):
        axes = axes_at(figure, left, head + i * (height + between), COLUMN - left - MARGIN, height)
        for k, (name, values) in enumerate(series.items()):
            colour, marker, line = SERIES[k % len(SERIES)]
            there = [x for x, seeds in enumerate(values) if len(seeds)]
            axes.plot(there, [np.mean(values[x]) for x in there], color=colour, linestyle=line, linewidth=1.1,
                      marker=marker, markersize=3.2, label=name)  # fmt: skip
            for x in there:
                axes.plot([x] * len(values[x]), values[x], ".", color=colour, markersize=2.5, alpha=0.6)
        axes.set_xlim(-0.4, len(ticks) - 0.6)
        axes.set_xticks(range(len(ticks)), [f"{tick}" for tick in ticks] if i == len(panels) - 1 else [])
        axes.margins(y=0.12)
        axes.set_ylabel(unit, fontsize=SMALL, color=INK)
        axes.grid(axis="y", color=RULE, linewidth=0.4)
        axes.set_axisbelow(True)
        plain(axes)
        axes.yaxis.set_label_coords(0.17 / COLUMN, 0.5, blended_transform_factory(figure.transFigure, axes.transAxes))
        if i == 0 and "" not in series:
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=columns, frameon=False, fontsize=SMALL,
                        labelcolor=INK, borderaxespad=0.2, borderpad=0, columnspacing=1.0,
                        handlelength=1.8)  # fmt: skip
    axes.set_xlabel(label, fontsize=SMALL, color=INK)
    return write(figure, path)
