"""Input, reconstruction and absolute difference of signals, side by side."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from experiments.figures.page import axes_at, new_page, plain, text_at, write
from experiments.figures.style import BLUE, GREY, INK, MARGIN, NORMAL, ORANGE, SMALL, WIDTH

MOST_SIGNALS = 16

_GAP = 0.06  # inches: between the pictures of a block
_TITLE, _ROW_LABEL, _FOOTER = 0.26, 0.22, 0.55  # inches
_PARTS = ("input", "reconstruction", "absolute difference")
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
    is the mean over channels); with any other number of channels, and in volumes, the first channel is shown.

    Volumes are shown as three orthogonal slices through the centre. RAS+ volumes stand upright, superior or anterior
    up, the radiological way: the patient's right is on the left of coronal and axial slices, anterior on the left of
    sagittal ones.

    Args:
      path: the file to write; its folder is made where absent.
      signals: floating, [n, *grid, D] in [0, 1] with one to three grid axes, 1 <= n <= MOST_SIGNALS.
      reconstructions: the same shape.
      titles: n names, shortened in the middle if they do not fit.
      psnr: n values in dB, written beside the names.
      difference_max: end of the scale of differences, > 0; None takes the 99.9th percentile of what is shown, rounded
        up. Larger differences are clipped to this value, and the scale ends in an arrow.
      spacing: size of a grid step along each axis, in any unit; None for equal ones.
      oriented: volumes are RAS+. False draws slices in array order and names the axis of each cut.
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
    return write(figure, path)


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
    # right, so axes whose growing end belongs on top or on the left are reversed.
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
    block = (WIDTH - 2 * MARGIN - label - (across - 1) * 2 * MARGIN) / across
    cell = (block - 2 * _GAP) / 3
    # One scale for all views, so that slices of one volume keep their relative sizes in the body.
    scale = min(cell / max(v.size[1] for v in views), 1.5 * cell / max(v.size[0] for v in views))
    heights = [max(scale * view.size[0], 0.05) for view in views]
    block_height = _TITLE + sum(heights) + _GAP * len(views)
    head = MARGIN + 0.2
    rows = -(-count // across)
    figure = new_page(head + rows * block_height + (rows - 1) * MARGIN + _FOOTER)

    for column in range(across):
        for part, name in enumerate(_PARTS):
            left = MARGIN + label + column * (block + 2 * MARGIN) + part * (cell + _GAP)
            text_at(figure, left + cell / 2, head - 0.02, name, ha="center", va="bottom", color=GREY)
    for i, caption in enumerate(captions):
        row, column = divmod(i, across)
        left = MARGIN + label + column * (block + 2 * MARGIN)
        top_edge = head + row * (block_height + MARGIN)
        _caption(figure, left, top_edge + _TITLE - 0.06, block, caption)
        top_edge += _TITLE
        for view, height in zip(views, heights, strict=True):
            if view.label and column == 0:
                text_at(figure, left - 0.06, top_edge + height / 2, view.label, rotation=90, ha="right", va="center")
            for part, values in enumerate((signals[i], shown[i], differences[i])):
                axes = axes_at(figure, left + part * (cell + _GAP), top_edge, cell, height)
                axes.set_axis_off()
                image = view.take(values if part == 2 or colour else values[..., 0])
                colours, end = ("magma", top) if part == 2 else ("gray", 1.0)
                axes.imshow(image, cmap=colours, vmin=0, vmax=end, extent=(0, view.size[1], view.size[0], 0))
                if part == 0 and view.mark:
                    axes.text(0.02, 0.5, view.mark, transform=axes.transAxes, color="white", fontsize=SMALL,
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
    block = (WIDTH - 2 * MARGIN - (across - 1) * 2 * MARGIN) / across
    width = block - tick_room
    height, below = min(max(1.0, 0.4 * channels), 5.0), 0.42
    block_height = _TITLE + height + between + below + 0.12
    rows = -(-count // across)
    figure = new_page(MARGIN + rows * block_height + 0.3 + _FOOTER)
    lanes = np.arange(channels)[::-1]  # the first channel on top

    for i, caption in enumerate(captions):
        row, column = divmod(i, across)
        left = MARGIN + tick_room + column * (block + 2 * MARGIN)
        top_edge = MARGIN + row * block_height
        _caption(figure, left, top_edge + _TITLE - 0.06, width, caption)
        upper = axes_at(figure, left, top_edge + _TITLE, width, height)
        lower = axes_at(figure, left, top_edge + _TITLE + height + between, width, below)
        # The input is broad and pale, so that it is visible on both sides of the reconstruction.
        broad = upper.plot(signals[i] + lanes, color="#b0b0b0", linewidth=3, solid_capstyle="round")
        thin = upper.plot(shown[i] + lanes, color=BLUE, linewidth=1)
        upper.set_ylim(-0.05, channels + 0.05)
        if channels == 1:
            upper.set_yticks([0, 0.5, 1], ["0", "0.5", "1"])
        else:
            upper.set_yticks(lanes + 0.5, [f"{channel + 1}" for channel in range(channels)])
        below_thin = lower.plot(np.minimum(differences[i], top), color=ORANGE, linewidth=0.8)
        lower.set_ylim(0, top * 1.02)
        lower.set_yticks([0, top], ["0", f"{top:g}"])
        for axes in (upper, lower):
            plain(axes)
            axes.set_xlim(0, max(points - 1, 1))
        last = i + across >= count  # no panel below
        upper.tick_params(labelbottom=False)
        lower.tick_params(labelbottom=last)
        lower.set_xlabel("sample" if last else "", fontsize=SMALL, color=GREY, labelpad=1)

    base = figure.get_figheight()
    figure.legend(
        [broad[0], thin[0], below_thin[0]], _PARTS, loc="lower left", ncols=3, frameon=False, fontsize=SMALL,
        labelcolor=INK, borderaxespad=0, bbox_to_anchor=((MARGIN + tick_room) / WIDTH, 0.28 / base),
    )  # fmt: skip
    note = "Curves: from 0 to 1. " if channels == 1 else f"Curves: {channels} channels, each in a lane from 0 to 1. "
    note += f"Differences: one scale, 0 to {top:g}" + (f" (larger ones drawn as {top:g})." if clipped else ".")
    text_at(figure, MARGIN + tick_room, base - 0.1, note, va="bottom", color=GREY)
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
        text_at(figure, MARGIN, base - _FOOTER + first + 0.16 * line, note, va="center", color=GREY)
    width = 2.3
    bar = axes_at(figure, WIDTH - MARGIN - width - 0.12, base - _FOOTER + 0.22, width, 0.09)
    colours, end = ScalarMappable(Normalize(0, top), "magma"), "max" if clipped else "neither"
    scale = figure.colorbar(colours, cax=bar, orientation="horizontal", extend=end)
    scale.set_ticks([0, top / 2, top], labels=["0", f"{top / 2:g}", f"{top:g}"])
    scale.outline.set_visible(False)
    bar.tick_params(labelsize=SMALL, labelcolor=INK, length=2, color=GREY, pad=1.5)
    text_at(figure, WIDTH - MARGIN - width / 2 - 0.12, base - _FOOTER + 0.19, _PARTS[2], ha="center", va="bottom",
          color=GREY)  # fmt: skip


def _caption(figure: Figure, left: float, base: float, width: float, caption: tuple[str, str]) -> None:
    """Name on the left, PSNR on the right of a block."""
    title, value = caption
    most = max(4, int((width - 0.7) / (0.0087 * NORMAL)))  # characters at the font's mean width
    if len(title) > most:
        title = title[: most // 2 - 1] + "…" + title[-(most - most // 2) :]
    text_at(figure, left, base, title, va="baseline", fontsize=NORMAL)
    text_at(figure, left + width, base, value, va="baseline", ha="right", fontsize=NORMAL)
