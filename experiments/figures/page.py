"""Placement in inches on a page, which is written whole; no global state of matplotlib is used."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.figures.style import DPI, GREY, INK, SMALL, WIDTH
from medfuncta_jax.atomic import atomic_path


def new_page(height: float, width: float = WIDTH) -> Figure:
    """A white page of a size in inches."""
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def axes_at(figure: Figure, left: float, top: float, width: float, height: float, **options: Any) -> Axes:
    """Axes at a place in inches, `top` counted downwards from the top of the page."""
    across, page = figure.get_size_inches()
    return figure.add_axes((left / across, 1 - (top + height) / page, width / across, height / page), **options)


def text_at(figure: Figure, left: float, top: float, text: str, **style: Any) -> None:
    """Text at a place in inches from the top left; dollar signs are literal."""
    style = {"fontsize": SMALL, "color": INK, **style}
    figure.text(left / WIDTH, 1 - top / figure.get_figheight(), text, parse_math=False, **style)


def plain(axes: Axes) -> None:
    """Axes without a frame above and at the right, with small grey ticks."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set(color=GREY, linewidth=0.6)
    axes.tick_params(labelsize=SMALL, labelcolor=INK, color=GREY, width=0.6, length=2.5, pad=2)


def write(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """The figure as a PNG that appears whole or not at all."""
    with atomic_path(Path(path)) as unfinished:
        # The file leaves out matplotlib's version, so that the same data give the same file.
        figure.savefig(unfinished, format="png", metadata={"Software": None})
    return Path(path)
