"""PSNR, gradient norm and learning rate along a training."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.transforms import blended_transform_factory

from experiments.figures.page import axes_at, new_page, plain, write
from experiments.figures.style import BLUE, GREY, INK, MARGIN, NORMAL, ORANGE, RULE, SMALL, WIDTH

_Series = tuple[np.ndarray, np.ndarray]  # steps and values of one curve


def draw_learning_curve(path: str | os.PathLike[str], records: Sequence[Mapping[str, Any]]) -> Path:
    """PSNR in training and validation against meta-updates, gradient norm and learning rate below, as a PNG.

    Training PSNR is that of each record (from the mean loss since the previous record), drawn faint, with a running
    median; the best validation is marked. If a step was logged more than once (a resumed run), the last record counts.
    Values that are missing or not finite are left out, and a panel without any is not drawn.

    Args:
      path: the file to write; its folder is made where absent.
      records: lines of `metrics.jsonl`, each with `step` and any of `psnr`, `val_psnr` (dB), `gradient_norm`,
        `learning_rate`; other names are ignored.
    Returns:
      `path`.
    Raises:
      ValueError: no record has a finite `psnr` or `val_psnr`; nothing is written.
    """
    training, validation = _series(records, "psnr"), _series(records, "val_psnr")
    if not training[0].size and not validation[0].size:
        raise ValueError("no record holds a finite psnr or val_psnr: nothing to draw")
    norms, rates = _series(records, "gradient_norm"), _series(records, "learning_rate")
    norms = (norms[0][norms[1] > 0], norms[1][norms[1] > 0])  # the axis is logarithmic
    lower = [(name, series) for name, series in (("gradient norm", norms), ("learning rate", rates)) if series[0].size]

    left, head, height, small, between = 0.75, 0.42, 2.9, 0.75, 0.14
    figure = new_page(head + height + len(lower) * (small + between) + 0.5)
    panel = axes_at(figure, left, head, WIDTH - left - 2 * MARGIN, height)
    _draw_psnr(panel, training, validation)
    panels = [panel]
    for i, (name, series) in enumerate(lower):
        top_edge = head + height + i * (small + between) + between
        axes = axes_at(figure, left, top_edge, WIDTH - left - 2 * MARGIN, small, sharex=panel)
        _line(axes, series, noisy=name == "gradient norm", color=GREY, linewidth=1.0)
        axes.set_ylabel(name, fontsize=SMALL, color=INK)
        if name == "gradient norm":
            ticks = [10 ** np.floor(np.log10(series[1].min())), 10 ** np.ceil(np.log10(series[1].max()) + 1e-9)]
            axes.set_yscale("log")
            axes.minorticks_off()
        else:
            ticks = [0, series[1].max() or 1.0]
        axes.set_ylim(ticks[0], ticks[1] * 1.1)
        axes.set_yticks(ticks, [f"{t:.1e}".replace("e-0", "e-") if 0 < t < 0.01 else f"{t:g}" for t in ticks])
        panels.append(axes)
    for axes in panels:
        plain(axes)
        axes.grid(axis="y", color=RULE, linewidth=0.4)
        axes.set_axisbelow(True)
        # Labels are aligned down the page for any width of the numbers beside them.
        axes.yaxis.set_label_coords(0.2 / WIDTH, 0.5, blended_transform_factory(figure.transFigure, axes.transAxes))
        axes.tick_params(labelbottom=axes is panels[-1])
    panels[-1].xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}" if step == round(step) else "")
    panels[-1].set_xlabel("meta-updates", fontsize=NORMAL, color=INK)
    return write(figure, path)


def _series(records: Sequence[Mapping[str, Any]], name: str) -> _Series:
    """Steps and finite values of one name, in order of steps; the last record of a step counts."""
    values = {int(record["step"]): float(record[name]) for record in records if record.get(name) is not None}
    steps = sorted(step for step, value in values.items() if np.isfinite(value))
    return np.array(steps, int), np.array([values[step] for step in steps], float)


def _draw_psnr(axes: Axes, training: _Series, validation: _Series) -> None:
    if training[0].size:
        _line(axes, training, noisy=True, color=BLUE, linewidth=1.4, label="training")
    if validation[0].size:
        _line(axes, validation, color=ORANGE, linewidth=1.4, label="validation")
        best = int(np.argmax(validation[1]))
        step, value = int(validation[0][best]), float(validation[1][best])
        axes.plot(step, value, "o", markersize=6, markerfacecolor="white", markeredgecolor=ORANGE, markeredgewidth=1.6,
                  linestyle="none", label=f"best validation: {value:.2f} dB at {step:,}", zorder=5)  # fmt: skip
    axes.set_ylabel("PSNR (dB)", fontsize=NORMAL, color=INK)
    # The legend is above the panel, where it covers no curve.
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=4, frameon=False, fontsize=SMALL, labelcolor=INK,
                borderaxespad=0.2, borderpad=0.2, columnspacing=1.8, handlelength=1.6)  # fmt: skip


def _line(axes: Axes, series: _Series, *, noisy: bool = False, **style: Any) -> None:
    """A line. Few points get markers, so that a single point is visible; many noisy points get a running median."""
    few = series[0].size < 20
    if noisy and not few:
        faint = {"linewidth": 0.5, "alpha": 0.3} if series[0].size > 500 else {"linewidth": 0.7, "alpha": 0.5}
        axes.plot(*series, **style | faint)
        series = (series[0], _running_median(series[1]))
        style |= {"label": "running median"} if "label" in style else {}
    axes.plot(*series, marker="o" if few else None, markersize=3, **style)


def _running_median(values: np.ndarray) -> np.ndarray:
    """Median of a window of about a fiftieth of the curve, at least five values; narrower towards the ends."""
    half = max(2, len(values) // 100)
    return np.array([np.median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))])
