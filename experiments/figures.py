"""Pictures of a run: reconstructions beside their signals, the learning curve, and curves of quality.

Figures are 8 inches wide and 1600 pixels, made for a page that shows them 800 pixels wide; curves of quality are as
wide as a column of a paper. Each is drawn whole in memory and then moved into place, so a file that is there is a
finished picture. No global state of matplotlib is used.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.transforms import blended_transform_factory

from medfuncta_jax.atomic import atomic_path

MOST_SIGNALS = 16

_WIDTH, _COLUMN, _DPI = 8.0, 3.5, 200  # inches, inches, dots per inch
_MARGIN, _GAP = 0.1, 0.06  # inches: around the page and between columns of blocks, between the pictures of a block
_TITLE, _ROW_LABEL, _FOOTER = 0.26, 0.22, 0.55  # inches
_SMALL, _NORMAL = 7.5, 8.5  # points
_INK, _GREY, _RULE = "#222222", "#666666", "#cccccc"
_BLUE, _ORANGE, _GREEN = "#0072b2", "#d55e00", "#009e73"  # Okabe and Ito 2008: told apart with any colour vision
_PARTS = ("input", "reconstruction", "absolute difference")
Series = tuple[np.ndarray, np.ndarray]  # steps and values of one curve
_NICE = np.array([1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10])


def draw_reconstructions(
    path: str | os.PathLike[str],
    signals: np.ndarray,
    reconstructions: np.ndarray,
    *,
    titles: Sequence[str],
    psnr: Sequence[float],
    difference_max: float | None = None,
    spacing: Sequence[float] | None = None,
    oriented: bool = True,
) -> Path:
    """Input, reconstruction and absolute difference of each signal side by side, as a PNG.

    Input and reconstruction share one scale, [0, 1]; reconstructions are clipped to it, as the metrics do. The
    differences of all signals share one scale, drawn below the pictures. Time series are drawn as curves, one over the
    other, with the difference below. Images are grey with one channel and in colour with three (then the difference
    is the mean over channels); of any other number of channels, and in volumes, the first is shown.

    Of a volume three orthogonal slices through the centre are shown. RAS+ volumes stand upright, superior or anterior
    up, the radiological way: the patient's right is on the left of coronal and axial slices, anterior on the left of
    sagittal ones.

    Args:
      path: the file to write; its folder is made where absent.
      signals: floating, [n, *grid, D] in [0, 1] with one to three grid axes, 1 <= n <= MOST_SIGNALS.
      reconstructions: the same shape.
      titles: n names, shortened in the middle where they do not fit.
      psnr: n values in dB, written beside the names.
      difference_max: end of the scale of differences, > 0; None takes the 99.9th percentile of what is shown, rounded
        up. Larger differences are drawn as this one, and the scale ends in an arrow.
      spacing: size of a grid step along each axis, in any unit; None for equal ones.
      oriented: volumes are RAS+. False draws slices as they lie in the array and names the axis they cut.
    Returns:
      `path`.
    Raises:
      ValueError: shapes or counts that do not belong together; nothing is written.
    """
    signals = np.asarray(signals)
    shown = np.clip(np.asarray(reconstructions), 0, 1)
    axes, count = signals.ndim - 2, signals.shape[0]
    if signals.shape != shown.shape or axes not in (1, 2, 3) or 0 in signals.shape:
        raise ValueError(f"signals {signals.shape} and reconstructions {shown.shape} must be one [n, *grid, D]")
    if count > MOST_SIGNALS or len(titles) != count or len(psnr) != count:
        got = f"{count} signals, {len(titles)} titles and {len(psnr)} PSNR"
        raise ValueError(f"{got}: numbers must be equal and at most {MOST_SIGNALS}")
    spacing = (1.0,) * axes if spacing is None else tuple(float(step) for step in spacing)
    if len(spacing) != axes or min(spacing) <= 0:
        raise ValueError(f"spacing {spacing} must be {axes} lengths above 0")
    captions = [(str(title), f"{value:.1f} dB") for title, value in zip(titles, psnr, strict=True)]
    if axes == 1:
        figure = _curves(signals, shown, captions, difference_max)
    else:
        figure = _pictures(signals, shown, captions, difference_max, spacing, oriented)
    return _write(figure, path)


@dataclass(frozen=True)
class _View:
    """One way to look at a signal: an image, or a slice of a volume."""

    label: str  # name of the slice, "" for an image
    mark: str  # letter of the anatomical direction at the left edge, "" where unknown
    take: Callable[[np.ndarray], np.ndarray]  # [*grid, ...] -> [rows, columns, ...], the first row on top
    size: tuple[float, float]  # height and width in the unit of the spacing


def _views(shape: Sequence[int], spacing: Sequence[float], oriented: bool) -> list[_View]:
    extent = [n * step for n, step in zip(shape, spacing, strict=True)]
    if len(shape) == 2:
        return [_View("", "", lambda image: image, (extent[0], extent[1]))]
    x, y, z = (n // 2 for n in shape)
    if not oriented:
        sizes = ((extent[1], extent[2]), (extent[0], extent[2]), (extent[0], extent[1]))
        cuts = (lambda v: v[x], lambda v: v[:, y], lambda v: v[:, :, z])
        return [_View(f"across axis {k}", "", cuts[k], sizes[k]) for k in range(3)]
    # RAS+: indices grow to the right, to anterior and to superior. Rows run from top to bottom and columns from left to
    # right, so each axis is reversed whose growing end belongs on top or on the left.
    return [
        _View("sagittal", "A", lambda v: v[x, ::-1, ::-1].swapaxes(0, 1), (extent[2], extent[1])),
        _View("coronal", "R", lambda v: v[::-1, y, ::-1].swapaxes(0, 1), (extent[2], extent[0])),
        _View("axial", "R", lambda v: v[::-1, ::-1, z].swapaxes(0, 1), (extent[1], extent[0])),
    ]


def _pictures(signals, shown, captions, difference_max, spacing, oriented) -> Figure:
    """One block a signal: three pictures in a row, a row for each view; many signals in two columns."""
    count, channels = signals.shape[0], signals.shape[-1]
    views = _views(signals.shape[1:-1], spacing, oriented)
    volume = len(views) > 1
    colour = channels == 3 and not volume
    if not colour:
        signals, shown = signals[..., :1], shown[..., :1]
    differences = np.abs(signals - shown).mean(-1)
    visible = np.concatenate([view.take(values).ravel() for values in differences for view in views])
    top, clipped = _difference_scale(visible, difference_max)

    across = 1 if count <= (1 if volume else 3) else 2
    label = _ROW_LABEL if volume else 0.0
    block = (_WIDTH - 2 * _MARGIN - label - (across - 1) * 2 * _MARGIN) / across
    cell = (block - 2 * _GAP) / 3
    # One scale for all views, so that slices of one volume have the size they have in the body.
    scale = min(cell / max(v.size[1] for v in views), 1.5 * cell / max(v.size[0] for v in views))
    heights = [max(scale * view.size[0], 0.05) for view in views]
    block_height = _TITLE + sum(heights) + _GAP * len(views)
    head = _MARGIN + 0.2
    rows = -(-count // across)
    figure = _page(head + rows * block_height + (rows - 1) * _MARGIN + _FOOTER)

    for column in range(across):
        for part, name in enumerate(_PARTS):
            left = _MARGIN + label + column * (block + 2 * _MARGIN) + part * (cell + _GAP)
            _text(figure, left + cell / 2, head - 0.02, name, ha="center", va="bottom", color=_GREY)
    for i, caption in enumerate(captions):
        row, column = divmod(i, across)
        left = _MARGIN + label + column * (block + 2 * _MARGIN)
        top_edge = head + row * (block_height + _MARGIN)
        _caption(figure, left, top_edge + _TITLE - 0.06, block, caption)
        top_edge += _TITLE
        for view, height in zip(views, heights, strict=True):
            if view.label and column == 0:
                _text(figure, left - 0.06, top_edge + height / 2, view.label, rotation=90, ha="right", va="center")
            for part, values in enumerate((signals[i], shown[i], differences[i])):
                axes = _axes(figure, left + part * (cell + _GAP), top_edge, cell, height)
                axes.set_axis_off()
                image = view.take(values if part == 2 or colour else values[..., 0])
                colours, end = ("magma", top) if part == 2 else ("gray", 1.0)
                axes.imshow(image, cmap=colours, vmin=0, vmax=end, extent=(0, view.size[1], view.size[0], 0))
                if part == 0 and view.mark:
                    axes.text(0.02, 0.5, view.mark, transform=axes.transAxes, color="white", fontsize=_SMALL,
                              va="center", path_effects=[withStroke(linewidth=1.5, foreground="black")])  # fmt: skip
            top_edge += height + _GAP

    notes = ["Input and reconstruction: one scale, 0 to 1."]
    if volume and oriented:
        notes.append("Radiological: patient's right (R) on the left; sagittal: anterior (A) on the left.")
    if colour:
        notes.append("Difference: mean over the three channels.")
    elif channels > 1:
        notes.append(f"The first of {channels} channels is shown; PSNR is over all.")
    _footer(figure, notes, top, clipped)
    return figure


def _curves(signals, shown, captions, difference_max) -> Figure:
    """One block a signal: both curves in one panel (channels in lanes, one above the other), the difference below."""
    count, points, channels = signals.shape
    differences = np.abs(signals - shown)
    top, clipped = _difference_scale(differences.ravel(), difference_max)
    across = 1 if count == 1 else 2
    tick_room, between = 0.42, 0.08
    block = (_WIDTH - 2 * _MARGIN - (across - 1) * 2 * _MARGIN) / across
    width = block - tick_room
    height, below = min(max(1.0, 0.4 * channels), 5.0), 0.42
    block_height = _TITLE + height + between + below + 0.12
    rows = -(-count // across)
    figure = _page(_MARGIN + rows * block_height + 0.3 + _FOOTER)
    lanes = np.arange(channels)[::-1]  # the first channel on top

    for i, caption in enumerate(captions):
        row, column = divmod(i, across)
        left = _MARGIN + tick_room + column * (block + 2 * _MARGIN)
        top_edge = _MARGIN + row * block_height
        _caption(figure, left, top_edge + _TITLE - 0.06, width, caption)
        upper = _axes(figure, left, top_edge + _TITLE, width, height)
        lower = _axes(figure, left, top_edge + _TITLE + height + between, width, below)
        # The input is broad and pale, so that it shows at both sides of a reconstruction that runs along it.
        broad = upper.plot(signals[i] + lanes, color="#b0b0b0", linewidth=3, solid_capstyle="round")
        thin = upper.plot(shown[i] + lanes, color=_BLUE, linewidth=1)
        upper.set_ylim(-0.05, channels + 0.05)
        if channels == 1:
            upper.set_yticks([0, 0.5, 1], ["0", "0.5", "1"])
        else:
            upper.set_yticks(lanes + 0.5, [f"{channel + 1}" for channel in range(channels)])
        below_thin = lower.plot(np.minimum(differences[i], top), color=_ORANGE, linewidth=0.8)
        lower.set_ylim(0, top * 1.02)
        lower.set_yticks([0, top], ["0", f"{top:g}"])
        for axes in (upper, lower):
            _plain(axes)
            axes.set_xlim(0, max(points - 1, 1))
        last = i + across >= count  # nothing below it
        upper.tick_params(labelbottom=False)
        lower.tick_params(labelbottom=last)
        lower.set_xlabel("sample" if last else "", fontsize=_SMALL, color=_GREY, labelpad=1)

    base = figure.get_figheight()
    figure.legend(
        [broad[0], thin[0], below_thin[0]], _PARTS, loc="lower left", ncols=3, frameon=False, fontsize=_SMALL,
        labelcolor=_INK, borderaxespad=0, bbox_to_anchor=((_MARGIN + tick_room) / _WIDTH, 0.28 / base),
    )  # fmt: skip
    note = "Curves: from 0 to 1. " if channels == 1 else f"Curves: {channels} channels, each in a lane from 0 to 1. "
    note += f"Differences: one scale, 0 to {top:g}" + (f" (larger ones drawn as {top:g})." if clipped else ".")
    _text(figure, _MARGIN + tick_room, base - 0.1, note, va="bottom", color=_GREY)
    return figure


def _difference_scale(differences: np.ndarray, difference_max: float | None) -> tuple[float, bool]:
    """End of the common scale of differences, and whether any difference lies beyond it."""
    finite = differences[np.isfinite(differences)]
    if difference_max is None:
        wanted = max(float(np.quantile(finite, 0.999)) if finite.size else 1.0, 1e-6)
        power = 10.0 ** np.floor(np.log10(wanted))
        difference_max = float(power * _NICE[np.searchsorted(_NICE, wanted / power * (1 - 1e-9))])
    elif not difference_max > 0:
        raise ValueError(f"difference_max must be above 0, got {difference_max}")
    return difference_max, bool(finite.size and finite.max() > difference_max)


def _footer(figure: Figure, notes: Sequence[str], top: float, clipped: bool) -> None:
    """Notes on the left, the one scale of differences on the right."""
    base = figure.get_figheight()
    first = 0.3 - 0.08 * (len(notes) - 1)  # centred
    for line, note in enumerate(notes):
        _text(figure, _MARGIN, base - _FOOTER + first + 0.16 * line, note, va="center", color=_GREY)
    width = 2.3
    bar = _axes(figure, _WIDTH - _MARGIN - width - 0.12, base - _FOOTER + 0.22, width, 0.09)
    colours, end = ScalarMappable(Normalize(0, top), "magma"), "max" if clipped else "neither"
    scale = figure.colorbar(colours, cax=bar, orientation="horizontal", extend=end)
    scale.set_ticks([0, top / 2, top], labels=["0", f"{top / 2:g}", f"{top:g}"])
    scale.outline.set_visible(False)
    bar.tick_params(labelsize=_SMALL, labelcolor=_INK, length=2, color=_GREY, pad=1.5)
    _text(figure, _WIDTH - _MARGIN - width / 2 - 0.12, base - _FOOTER + 0.19, _PARTS[2], ha="center", va="bottom",
          color=_GREY)  # fmt: skip


def _caption(figure: Figure, left: float, base: float, width: float, caption: tuple[str, str]) -> None:
    """Name on the left, PSNR on the right of a block."""
    title, value = caption
    most = max(4, int((width - 0.7) / (0.0087 * _NORMAL)))  # of characters, at the font's mean width
    if len(title) > most:
        title = title[: most // 2 - 1] + "…" + title[-(most - most // 2) :]
    _text(figure, left, base, title, va="baseline", fontsize=_NORMAL)
    _text(figure, left + width, base, value, va="baseline", ha="right", fontsize=_NORMAL)


def draw_learning_curve(path: str | os.PathLike[str], records: Sequence[Mapping[str, Any]]) -> Path:
    """PSNR in training and validation against meta-updates, gradient norm and learning rate below, as a PNG.

    Training PSNR is that of each record (the mean loss since the one before), drawn faint, with a running median; the
    best validation is marked. Where a step was logged more than once (a run that resumed), the last record counts.
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
    norms = (norms[0][norms[1] > 0], norms[1][norms[1] > 0])  # its axis is logarithmic
    lower = [(name, series) for name, series in (("gradient norm", norms), ("learning rate", rates)) if series[0].size]

    left, head, height, small, between = 0.75, 0.42, 2.9, 0.75, 0.14
    figure = _page(head + height + len(lower) * (small + between) + 0.5)
    panel = _axes(figure, left, head, _WIDTH - left - 2 * _MARGIN, height)
    _draw_psnr(panel, training, validation)
    panels = [panel]
    for i, (name, series) in enumerate(lower):
        top_edge = head + height + i * (small + between) + between
        axes = _axes(figure, left, top_edge, _WIDTH - left - 2 * _MARGIN, small, sharex=panel)
        _line(axes, series, noisy=name == "gradient norm", color=_GREY, linewidth=1.0)
        axes.set_ylabel(name, fontsize=_SMALL, color=_INK)
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
        _plain(axes)
        axes.grid(axis="y", color=_RULE, linewidth=0.4)
        axes.set_axisbelow(True)
        # Labels in one line down the page, however wide the numbers beside them are.
        axes.yaxis.set_label_coords(0.2 / _WIDTH, 0.5, blended_transform_factory(figure.transFigure, axes.transAxes))
        axes.tick_params(labelbottom=axes is panels[-1])
    panels[-1].xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}" if step == round(step) else "")
    panels[-1].set_xlabel("meta-updates", fontsize=_NORMAL, color=_INK)
    return _write(figure, path)


# A method keeps its colour, marker and line in every picture, and is told apart in grey too.
_METHODS = {
    "field": ("field", _BLUE, "o", "-"),
    "linear": ("linear interpolation", _ORANGE, "s", "--"),
    "cubic": ("cubic interpolation", _GREEN, "^", "-."),
    "inverse distance": ("inverse distance", _ORANGE, "s", "--"),
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
    """PSNR and SSIM of each method along one quantity, with the intervals of their means, as a PNG.

    Args:
      path: the file to write; its folder is made where absent.
      points: at least one; `along` to a value above 0, and each of "field", "linear", "cubic", "inverse distance" that
        was measured to what `metrics.summary` gives.
      along, label: the quantity on the horizontal axis, which is logarithmic, and its name in words.
      ticks: places on it and what is written there; texts that would touch the one before are left out.
      marked: a place drawn as a thin line, the setting of the run.
    Returns:
      `path`.
    """
    left, head, height, between, foot = 0.56, 0.4, 1.35, 0.1, 0.55
    figure = _page(head + 2 * height + between + foot, _COLUMN)
    low, high = min(ticks), max(ticks)
    few, span = len(ticks) <= 3, high / low if high > low else 2.0
    room = span ** (0.3 if few else 0.06)  # few places have long texts
    shown: dict[float, str] = {}
    for place in sorted(ticks):
        if not shown or place / max(shown) >= (high / low) ** 0.125:  # an eighth of the axis is what a text needs
            shown[place] = ticks[place]
    for i, (name, unit) in enumerate((("psnr", "PSNR (dB)"), ("ssim", "SSIM"))):
        axes = _axes(figure, left, head + i * (height + between), _COLUMN - left - _MARGIN, height)
        if marked is not None and low <= marked <= high:
            axes.axvline(marked, color=_RULE, linewidth=0.8, linestyle=":")
        measured = [method for method in _METHODS if any(method in point for point in points)]
        for k, method in enumerate(measured):
            title, colour, marker, line = _METHODS[method]
            there = [point for point in points if method in point]
            places = np.array([point[along] for point in there], float)
            if few:  # side by side, where intervals would hide each other
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
        axes.set_ylabel(unit, fontsize=_SMALL, color=_INK)
        axes.grid(axis="y", color=_RULE, linewidth=0.4)
        axes.set_axisbelow(True)
        _plain(axes)
        axes.yaxis.set_label_coords(0.17 / _COLUMN, 0.5, blended_transform_factory(figure.transFigure, axes.transAxes))
        if i == 0:
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2, frameon=False, fontsize=_SMALL,
                        labelcolor=_INK, borderaxespad=0.2, borderpad=0, columnspacing=1.2, handlelength=2)  # fmt: skip
    axes.set_xlabel(label, fontsize=_SMALL, color=_INK)
    return _write(figure, path)


_SERIES = ((_BLUE, "o", "-"), (_ORANGE, "s", "--"), (_GREEN, "^", "-."), ("#cc79a7", "D", ":"), ("#e69f00", "v", "-"),
           ("#56b4e9", "P", "--"), ("#4d4d4d", "X", "-."))  # fmt: skip


def draw_ranking(
    path: str | os.PathLike[str], names: Sequence[str], panels: Mapping[str, Sequence[Sequence[float]]]
) -> Path:
    """Figures of several systems, one below the other: every seed as a ring, their mean as a bar, as a PNG.

    Args:
      path: the file to write; its folder is made where absent.
      names: of the systems, from the top.
      panels: side by side; name and unit to the values of each system, one a seed, none where there is none.
    Returns:
      `path`.
    """
    left, head, foot, row = 0.09 * max(map(len, names)) + 0.15, 0.1, 0.5, 0.27
    figure = _page(head + row * len(names) + foot)
    width = (_WIDTH - left - 2 * _MARGIN) / len(panels)
    for i, (unit, values) in enumerate(panels.items()):
        axes = _axes(figure, left + i * width, head, width - 0.2, row * len(names))
        for k, seeds in enumerate(values):
            if not len(seeds):
                axes.text(0.5, k, "no result", transform=axes.get_yaxis_transform(), fontsize=_SMALL, color=_GREY,
                          ha="center", va="center")  # fmt: skip
                continue
            mean = float(np.mean(seeds))
            axes.plot([mean, mean], [k - 0.3, k + 0.3], color=_ORANGE, linewidth=1.8)
            axes.plot(seeds, [k] * len(seeds), "o", markersize=4.5, markerfacecolor="none", markeredgecolor=_BLUE)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_yticks(range(len(names)), names if i == 0 else [])
        axes.margins(x=0.08)
        axes.grid(axis="both", color=_RULE, linewidth=0.4)
        axes.set_axisbelow(True)
        axes.set_xlabel(unit, fontsize=_NORMAL, color=_INK)
        _plain(axes)
        axes.tick_params(axis="y", length=0, labelsize=_NORMAL)
    figure.legend(
        [Line2D([], [], linestyle="none", marker="o", markerfacecolor="none", markeredgecolor=_BLUE),
         Line2D([], [], linestyle="none", marker="|", markersize=9, markeredgewidth=1.8, color=_ORANGE)],
        ["one seed", "mean"], loc="lower left", bbox_to_anchor=(0, 0), ncols=2, frameon=False, fontsize=_SMALL,
        labelcolor=_INK, handletextpad=0.2, columnspacing=1.0,
    )  # fmt: skip
    return _write(figure, path)


def draw_heat_map(
    path: str | os.PathLike[str],
    values: np.ndarray,
    marked: np.ndarray,
    *,
    ticks: tuple[Sequence[Any], Sequence[Any]],
    labels: tuple[str, str],
    unit: str,
) -> Path:
    """A grid of figures in colour and in words, as a PNG; cells in which a run collapsed are hatched.

    Args:
      path: the file to write; its folder is made where absent.
      values: [rows, columns], NaN where there is none.
      marked: bool [rows, columns]: a run collapsed.
      ticks: what is written at columns and rows.
      labels: of both axes.
      unit: of the values.
    Returns:
      `path`.
    """
    rows, columns = values.shape
    left, head, cell, foot, scale = 0.62, 0.1, 0.5, 0.45, 0.62
    figure = _page(head + cell * rows + foot, left + cell * columns + scale + _MARGIN)
    axes = _axes(figure, left, head, cell * columns, cell * rows)
    finite = values[np.isfinite(values)]
    span = Normalize(*((finite.min(), finite.max()) if finite.size else (0, 1)))
    axes.imshow(np.ma.masked_invalid(values), cmap="viridis", norm=span, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        if marked[row, column]:
            axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, hatch="////", edgecolor=_GREY,
                                     linewidth=0))  # fmt: skip
        if np.isfinite(value):
            text, colour = f"{value:.1f}", "white" if span(value) < 0.6 else _INK
        else:
            text, colour = ("collapsed" if marked[row, column] else "no result"), _INK
        style = [] if np.isfinite(value) and not marked[row, column] else [withStroke(linewidth=2, foreground="white")]
        axes.text(column, row, text, ha="center", va="center", fontsize=_SMALL if np.isfinite(value) else 6,
                  color=_INK if style else colour, path_effects=style)  # fmt: skip
    axes.set_xticks(range(columns), [f"{tick}" for tick in ticks[0]])
    axes.set_yticks(range(rows), [f"{tick}" for tick in ticks[1]])
    _plain(axes)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_xlabel(labels[0], fontsize=_NORMAL, color=_INK)
    axes.set_ylabel(labels[1], fontsize=_NORMAL, color=_INK)
    bar = figure.colorbar(ScalarMappable(span, "viridis"), cax=_axes(figure, left + cell * columns + 0.1, head, 0.1,
                                                                     cell * rows))  # fmt: skip
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=_SMALL, labelcolor=_INK, length=2, color=_GREY, pad=1.5)
    bar.set_label(unit, fontsize=_SMALL, color=_INK)
    return _write(figure, path)


def draw_sweep(
    path: str | os.PathLike[str],
    panels: Mapping[str, Mapping[str, Sequence[Sequence[float]]]],
    *,
    ticks: Sequence[Any],
    label: str,
) -> Path:
    """Figures along one setting, means over seeds with every seed as a point, as a PNG.

    Args:
      path: the file to write; its folder is made where absent.
      panels: one above the other; name and unit to the series, by name ("" for a single one), each with the values of
        every seed at every tick, none where there is none.
      ticks: the values of the setting, which stand at equal distances.
      label: its name in words.
    Returns:
      `path`.
    """
    left, head, height, between, foot = 0.6, 0.32, 1.25, 0.1, 0.38
    figure = _page(head + len(panels) * (height + between) + foot, _COLUMN)
    for i, (unit, series) in enumerate(panels.items()):
        axes = _axes(figure, left, head + i * (height + between), _COLUMN - left - _MARGIN, height)
        for k, (name, values) in enumerate(series.items()):
            colour, marker, line = _SERIES[k % len(_SERIES)]
            there = [x for x, seeds in enumerate(values) if len(seeds)]
            axes.plot(there, [np.mean(values[x]) for x in there], color=colour, linestyle=line, linewidth=1.1,
                      marker=marker, markersize=3.2, label=name)  # fmt: skip
            for x in there:
                axes.plot([x] * len(values[x]), values[x], ".", color=colour, markersize=2.5, alpha=0.6)
        axes.set_xlim(-0.4, len(ticks) - 0.6)
        axes.set_xticks(range(len(ticks)), [f"{tick}" for tick in ticks] if i == len(panels) - 1 else [])
        axes.margins(y=0.12)
        axes.set_ylabel(unit, fontsize=_SMALL, color=_INK)
        axes.grid(axis="y", color=_RULE, linewidth=0.4)
        axes.set_axisbelow(True)
        _plain(axes)
        axes.yaxis.set_label_coords(0.17 / _COLUMN, 0.5, blended_transform_factory(figure.transFigure, axes.transAxes))
        if i == 0 and "" not in series:
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=4, frameon=False, fontsize=_SMALL,
                        labelcolor=_INK, borderaxespad=0.2, borderpad=0, columnspacing=1.0,
                        handlelength=1.8)  # fmt: skip
    axes.set_xlabel(label, fontsize=_SMALL, color=_INK)
    return _write(figure, path)


def draw_rate_distortion(
    path: str | os.PathLike[str], curves: Mapping[str, Sequence[tuple[float, float]]], *, unit: str
) -> Path:
    """PSNR against the rate of several codecs, as a PNG; the rate is logarithmic.

    Args:
      path: the file to write; its folder is made where absent.
      curves: name to (rate > 0, PSNR in dB) in any order.
      unit: of the rate.
    Returns:
      `path`.
    """
    left, head, height, foot = 0.5, 0.3, 2.2, 0.4
    figure = _page(head + height + foot, _COLUMN)
    axes = _axes(figure, left, head, _COLUMN - left - _MARGIN, height)
    for k, (name, points) in enumerate(curves.items()):
        colour, marker, line = _SERIES[k % len(_SERIES)]
        rates, psnr = zip(*sorted(points), strict=True)
        axes.plot(rates, psnr, color=colour, marker=marker, linestyle=line, markersize=3.2, linewidth=1.1, label=name)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda rate, _: f"{rate:g}")
    axes.set_xlabel(unit, fontsize=_SMALL, color=_INK)
    axes.set_ylabel("PSNR (dB)", fontsize=_SMALL, color=_INK)
    axes.grid(color=_RULE, linewidth=0.4)
    axes.set_axisbelow(True)
    _plain(axes)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3, frameon=False, fontsize=_SMALL, labelcolor=_INK,
                borderaxespad=0.2, borderpad=0, columnspacing=1.0, handlelength=1.8)  # fmt: skip
    return _write(figure, path)


# Classes beyond these are drawn in one grey: more colours cannot be told apart.
_CLASS_COLOURS = (_BLUE, _ORANGE, _GREEN, "#cc79a7", "#e69f00", "#56b4e9", "#7f3c8d", "#222222", "#a65628")


def draw_latent_map(
    path: str | os.PathLike[str],
    train: np.ndarray,
    latents: np.ndarray,
    *,
    labels: np.ndarray | None = None,
    classes: Sequence[str] = (),
    psnr: np.ndarray | None = None,
) -> Path:
    """Latents on the first two principal axes of those of training, as a PNG.

    Args:
      path: the file to write; its folder is made where absent.
      train: [n, P], n >= 2, which the axes are of.
      latents: [m, P], which are drawn.
      labels: [m], a class each or -1 (drawn in grey, below the others); None colours by `psnr`.
      classes: their names.
      psnr: [m] in dB, where there are no labels.
    Returns:
      `path`.
    """
    train, latents = np.asarray(train, np.float64), np.asarray(latents, np.float64)
    mean = train.mean(0)
    _, values, axes = np.linalg.svd(train - mean, full_matrices=False)
    share = values**2 / max(float((values**2).sum()), np.finfo(float).tiny)
    places = (latents - mean) @ axes[:2].T  # [m, 2]
    if places.shape[1] < 2:  # a latent of one number
        places, share = np.pad(places, ((0, 0), (0, 1))), np.pad(share, (0, 1))
    left, head, height, foot = 0.62, 0.5, 4.4, 0.5
    figure = _page(head + height + foot)
    room = 0.0 if labels is not None else 0.9
    panel = _axes(figure, left, head, _WIDTH - left - 2 * _MARGIN - room, height)
    style: dict[str, Any] = {"s": 14.0 if len(latents) < 1000 else 5.0, "linewidths": 0, "alpha": 0.75}
    if labels is None:
        shown = panel.scatter(places[:, 0], places[:, 1], c=psnr, cmap="viridis", **style)
        scale = figure.colorbar(shown, cax=_axes(figure, _WIDTH - room, head, 0.12, height))
        scale.set_label("PSNR (dB)", fontsize=_SMALL, color=_INK)
        scale.outline.set_visible(False)
        scale.ax.tick_params(labelsize=_SMALL, labelcolor=_INK, length=2, color=_GREY)
    else:
        for number, name in ((-1, "no label"), *enumerate(classes)):
            rows = np.flatnonzero(labels == number)
            if len(rows):
                known = 0 <= number < len(_CLASS_COLOURS)
                colour = _CLASS_COLOURS[number] if known else _RULE
                panel.scatter(places[rows, 0], places[rows, 1], color=colour, label=name, **style)
        panel.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=4, frameon=False, fontsize=_SMALL,
                     labelcolor=_INK, borderaxespad=0.2, borderpad=0, handletextpad=0.2, columnspacing=1.4,
                     markerscale=1.6)  # fmt: skip
    _plain(panel)
    across, upwards = (f"principal axis {i + 1} ({100 * share[i]:.0f} % of variance)" for i in (0, 1))
    panel.set_xlabel(across, fontsize=_NORMAL, color=_INK)
    panel.set_ylabel(upwards, fontsize=_NORMAL, color=_INK)
    return _write(figure, path)


def _series(records: Sequence[Mapping[str, Any]], name: str) -> Series:
    """Steps and finite values of one name, in order of steps; the last record of a step counts."""
    values = {int(record["step"]): float(record[name]) for record in records if record.get(name) is not None}
    steps = sorted(step for step, value in values.items() if np.isfinite(value))
    return np.array(steps, int), np.array([values[step] for step in steps], float)


def _draw_psnr(axes: Axes, training: Series, validation: Series) -> None:
    if training[0].size:
        _line(axes, training, noisy=True, color=_BLUE, linewidth=1.4, label="training")
    if validation[0].size:
        _line(axes, validation, color=_ORANGE, linewidth=1.4, label="validation")
        best = int(np.argmax(validation[1]))
        step, value = int(validation[0][best]), float(validation[1][best])
        axes.plot(step, value, "o", markersize=6, markerfacecolor="white", markeredgecolor=_ORANGE, markeredgewidth=1.6,
                  linestyle="none", label=f"best validation: {value:.2f} dB at {step:,}", zorder=5)  # fmt: skip
    axes.set_ylabel("PSNR (dB)", fontsize=_NORMAL, color=_INK)
    # Above the panel, where no curve can pass beneath it.
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=4, frameon=False, fontsize=_SMALL, labelcolor=_INK,
                borderaxespad=0.2, borderpad=0.2, columnspacing=1.8, handlelength=1.6)  # fmt: skip


def _line(axes: Axes, series: Series, *, noisy: bool = False, **style: Any) -> None:
    """A line; few points are marked, so that a single one is seen, and many noisy ones get a running median."""
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


def _page(height: float, width: float = _WIDTH) -> Figure:
    figure = Figure(figsize=(width, height), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _axes(figure: Figure, left: float, top: float, width: float, height: float, **options: Any) -> Axes:
    """Axes at a place in inches, `top` counted downwards from the top of the page."""
    across, page = figure.get_size_inches()
    return figure.add_axes((left / across, 1 - (top + height) / page, width / across, height / page), **options)


def _text(figure: Figure, left: float, top: float, text: str, **style: Any) -> None:
    """Text at a place in inches from the top left; dollars in names are no mathematics."""
    style = {"fontsize": _SMALL, "color": _INK, **style}
    figure.text(left / _WIDTH, 1 - top / figure.get_figheight(), text, parse_math=False, **style)


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set(color=_GREY, linewidth=0.6)
    axes.tick_params(labelsize=_SMALL, labelcolor=_INK, color=_GREY, width=0.6, length=2.5, pad=2)


def _write(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """The figure as a PNG that appears whole or not at all."""
    with atomic_path(Path(path)) as unfinished:
        # Without matplotlib's version in it, the same data give the same file.
        figure.savefig(unfinished, format="png", metadata={"Software": None})
    return Path(path)
