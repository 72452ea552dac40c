"""Curves of quality against the input of a fit, and against the bits of a code."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import LogLocator
from matplotlib.transforms import blended_transform_factory

from experiments.figures.page import axes_at, new_page, plain, write
from experiments.figures.style import BLUE, COLUMN, GREEN, INK, MARGIN, ORANGE, RULE, SERIES, SMALL

# A method has the same colour, marker and line in every picture, distinct also in grey.
_METHODS = {
    "field": ("field", BLUE, "o", "-"),
    "linear": ("linear interpolation", ORANGE, "s", "--"),
    "cubic": ("cubic interpolation", GREEN, "^", "-."),
    "inverse distance": ("inverse distance", ORANGE, "s", "--"),
}


def draw_quality(
    path: str | os.PathLike[str],
    points: Sequence[Mapping[str, Any]],
    *,
    along: str,
    label: str,
    ticks: Mapping[float, str],
    marked: float | None = None,
) -> Path:
    """PSNR and SSIM of each method against one quantity, with the intervals of their means, as a PNG.

    Args:
      path: the file to write; its folder is made where absent.
      points: at least one; `along` to a value above 0, and each of "field", "linear", "cubic", "inverse distance" that
        was measured to the result of `metrics.summary`.
      along, label: the quantity on the logarithmic horizontal axis, and its name in words.
      ticks: places on the axis and their labels; labels that would touch the previous one are left out.
      marked: a place drawn as a thin line, the setting of the run.
    Returns:
      `path`.
    """
    left, head, height, between, foot = 0.56, 0.4, 1.35, 0.1, 0.55
    figure = new_page(head + 2 * height + between + foot, COLUMN)
    low, high = min(ticks), max(ticks)
    few, span = len(ticks) <= 3, high / low if high > low else 2.0
    room = span ** (0.3 if few else 0.06)  # few places have long labels
    shown: dict[float, str] = {}
    for place in sorted(ticks):
        if not shown or place / max(shown) >= (high / low) ** 0.125:  # a label needs an eighth of the axis
            shown[place] = ticks[place]
    for i, (name, unit) in enumerate((("psnr", "PSNR (dB)"), ("ssim", "SSIM"))):
        axes = axes_at(figure, left, head + i * (height + between), COLUMN - left - MARGIN, height)
        if marked is not None and low <= marked <= high:
            axes.axvline(marked, color=RULE, linewidth=0.8, linestyle=":")
        measured = [method for method in _METHODS if any(method in point for point in points)]
        for k, method in enumerate(measured):
            title, colour, marker, line = _METHODS[method]
            there = [point for point in points if method in point]
            places = np.array([point[along] for point in there], float)
            if few:  # side by side, because intervals would hide each other
                places *= span ** (0.05 * (k - (len(measured) - 1) / 2))
            means = [point[method][name] for point in there]
            bounds = np.array([point[method]["interval"][name] for point in there])
            if not few:
                axes.fill_between(places, bounds[:, 0], bounds[:, 1], color=colour, alpha=0.15, linewidth=0)
            axes.vlines(places, bounds[:, 0], bounds[:, 1], color=colour, linewidth=0.8)
            axes.plot(
                places, means, color=colour, marker=marker, linestyle=line, markersize=3, linewidth=1.1, label=title
            )
        axes.set_xscale("log")
        axes.set_xlim(low / room, high * room)
        axes.set_xticks(list(shown), list(shown.values()) if i else [])
        axes.minorticks_off()
        axes.set_ylabel(unit, fontsize=SMALL, color=INK)
        axes.grid(axis="y", color=RULE, linewidth=0.4)
        axes.set_axisbelow(True)
        plain(axes)
        axes.yaxis.set_label_coords(0.17 / COLUMN, 0.5, blended_transform_factory(figure.transFigure, axes.transAxes))
        if i == 0:
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2, frameon=False, fontsize=SMALL,
                        labelcolor=INK, borderaxespad=0.2, borderpad=0, columnspacing=1.2, handlelength=2)  # fmt: skip
    axes.set_xlabel(label, fontsize=SMALL, color=INK)
    return write(figure, path)


def draw_rate_distortion(
    path: str | os.PathLike[str], curves: Mapping[str, Sequence[tuple[float, float]]], *, unit: str
) -> Path:
    """PSNR against the rate of several codecs, as a PNG; the rate is logarithmic.

    Args:
      path: the file to write; its folder is made where absent.
      curves: name to (rate > 0, PSNR in dB) in any order.
      unit: unit of the rate.
    Returns:
      `path`.
    """
    left, head, height, foot = 0.5, 0.3, 2.2, 0.4
    figure = new_page(head + height + foot, COLUMN)
    axes = axes_at(figure, left, head, COLUMN - left - MARGIN, height)
    for k, (name, points) in enumerate(curves.items()):
        colour, marker, line = SERIES[k % len(SERIES)]
        rates, psnr = zip(*sorted(points), strict=True)
        axes.plot(rates, psnr, color=colour, marker=marker, linestyle=line, markersize=3.2, linewidth=1.1, label=name)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(10, (1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda rate, _: f"{rate:g}")
    axes.minorticks_off()
    axes.set_xlabel(unit, fontsize=SMALL, color=INK)
    axes.set_ylabel("PSNR (dB)", fontsize=SMALL, color=INK)
    axes.grid(color=RULE, linewidth=0.4)
    axes.set_axisbelow(True)
    plain(axes)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3, frameon=False, fontsize=SMALL, labelcolor=INK,
                borderaxespad=0.2, borderpad=0, columnspacing=1.0, handlelength=1.8)  # fmt: skip
    return write(figure, path)
