"""Quality of reconstructed test signals against the input of the fit, beside classical methods.

Three curves, of PSNR and SSIM with 95 % intervals of the mean:

  steps      the number H of test-time steps, on every point
  fractions  the part of the points that is observed, at random and seeded; all points are compared. The baseline is
             an interpolation of the same points: linear, in volumes by inverse distance
  scales     multiples of the training resolution, against the source's own signals there, between the outermost
             training samples. The baselines are linear and cubic interpolation of the signal on the training grid
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.runtime.progress import Progress, log
from experiments.runtime.run import Run
from experiments.runtime.run_directory import write_json
from experiments.stages.kept_rows import KeptRows
from medfuncta_jax import metrics, sharding
from medfuncta_jax.batched import decode_batches, fit_options, fit_signals
from medfuncta_jax.checkpoint import load_field
from medfuncta_jax.coordinates import grid, inner_samples
from medfuncta_jax.datasets import NoFinerGrid, finer_plan
from medfuncta_jax.datasets.volumes import resample
from medfuncta_jax.latent_store import field_checksum
from medfuncta_jax.settings import SettingsError

# Number of values that are decoded and compared at once.
_VALUES_AT_ONCE = 2**22

_CONVENTIONS = {
    "values": "clipped to [0, 1]; interval: percentile bootstrap of the mean over signals, 95 %",
    "steps": "each H is a fit of its own, from a latent of zeros, on every point of the training grid",
    "fractions": (
        "random points of the training grid, each signal's own, smaller sets parts of larger ones; compared on all "
        "points. The loss is a mean over the observed points, so the step size is the same for every fraction; with "
        "fit.safeguard a step that raises this loss is taken back and the signal's step size halved"
    ),
    "scales": (
        "both grids share centre and field of view, and a sample stands for the middle of its cell; compared are the "
        "fine samples between the outermost training samples. Training signals may be means over their cells: field "
        "and interpolation start from the same. Where the grid is finer than the source's own sampling, the truth is "
        "itself interpolated. agreement_psnr: the fine signals, brought down to the training grid by means over cells, "
        "against the training signals; where it is low, the two grids differ by more than resolution"
    ),
}


@dataclass(frozen=True)
class CurvesSettings:
    """Quality of test signals against the input of a fit (--mode=curves).

    Attributes:
      signals: maximum number of test signals, evenly spaced over the split.
      steps: numbers H >= 1 of test-time steps.
      fractions: parts of the points that are observed, in (0, 1].
      scales: multiples >= 2 of the training resolution.
    """

    signals: int = 64
    steps: tuple[int, ...] = (1, 2, 3, 5, 10, 20, 50, 100)
    fractions: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25, 0.1, 0.05, 0.02, 0.01)
    scales: tuple[int, ...] = (2, 4)

    def __post_init__(self):
        if self.signals < 1:
            raise SettingsError(f"signals must be at least 1, got {self.signals}")
        if not self.steps or min(self.steps) < 1:
            raise SettingsError(f"steps must be numbers of at least 1, got {self.steps}")
        if not self.fractions or not all(0 < part <= 1 for part in self.fractions):
            raise SettingsError(f"fractions must be in (0, 1], got {self.fractions}")
        if not all(scale >= 2 for scale in self.scales):
            raise SettingsError(f"scales must be at least 2, got {self.scales}")


def curves(run: Run) -> None:
    """Write `curves.json` and one picture for each curve, `figures/curve_*.png`.

    Raises:
      CheckpointError: no trained field.
      Interrupted: a stop was asked for; finished points are kept, in `curves.points.json`.
    """
    settings, dataset, directory = run.settings, run.dataset, run.directory
    field, params = load_field(directory.path)
    split, wanted = dataset.splits["test"], settings.curves
    rows = split.complete(wanted.signals)
    ids = split.annotations().ids
    signals, mesh = split.signals(rows), sharding.data_mesh()

    folder = directory.results("curves")
    kept = KeptRows(folder / "curves.points.json", {
        "field_sha256": field_checksum(directory.path),
        "signals": hashlib.sha256(np.ascontiguousarray(signals).tobytes()).hexdigest(),
        "settings": json.loads(json.dumps({
            "fit": asdict(settings.fit), "seed": settings.seed, "resamples": settings.evaluate.resamples,
        })),
    })  # fmt: skip

    def fitted(steps: int, weights: np.ndarray | None = None) -> np.ndarray:
        changed = dataclasses.replace(settings, fit=dataclasses.replace(settings.fit, steps=steps))
        may_stop()
        return fit_signals(
            field, params, split, rows=rows, weights=weights, mesh=mesh, after_batch=lambda batch: may_stop(),
            **fit_options(changed),
        ).latents  # fmt: skip

    def may_stop() -> None:
        run.stop.check(f"finished points are in {kept.path}")

    def summary(values: Mapping[str, np.ndarray]) -> dict:
        return metrics.summary(values, resamples=settings.evaluate.resamples, seed=settings.seed)

    def of_field(latents: np.ndarray) -> dict:
        return summary(_decoded_quality(field, params, latents, grid(dataset.grid), signals))

    @functools.cache
    def latents() -> np.ndarray:
        return fitted(settings.fit.steps)

    order = _random_orders(settings.seed, rows, int(np.prod(dataset.grid)))

    def at_steps(steps: int) -> dict:
        return {"steps": steps, "field": of_field(fitted(steps))}

    def at_fraction(fraction: float) -> dict:
        points = max(1, round(fraction * order.shape[1]))
        observed = order < points  # [n, N]
        point = {"fraction": fraction, "points": points}
        point["field"] = of_field(fitted(settings.fit.steps, observed.astype(np.float32)))
        if points < order.shape[1]:  # with all points, the interpolation is the signal
            images = []
            for signal, seen in zip(signals, observed, strict=True):
                images.append(interpolated(signal, seen))
                may_stop()
            baseline = "linear" if len(dataset.grid) < 3 else "inverse distance"
            point[baseline] = summary(_quality(np.stack(images), signals))
        return point

    def at_scale(scale: int) -> dict:
        try:
            plan = finer_plan(settings.data, scale, data_dir=run.data_dir)
        except NoFinerGrid as reason:
            log.info("curves: no true signals at %dx the training resolution: %s", scale, reason)
            return {"absent": str(reason)}
        values: dict[str, list[dict[str, np.ndarray]]] = {}
        place = {ids[row]: k for k, row in enumerate(rows)}
        for name, truth in plan.signals(place.keys()):
            k = place[name]
            one = _against_truth(field, params, latents()[k : k + 1], signals[k], truth)
            for method, value in one.items():
                values.setdefault(method, []).append(value)
            may_stop()
        figures_of = {method: summary(_joined(of)) for method, of in values.items()}
        agreement = figures_of.pop("agreement")["psnr"]
        return {"scale": scale, "grid": list(plan.grid), "agreement_psnr": agreement, **figures_of}

    makers: dict[str, tuple[Callable[[Any], dict], tuple]] = {
        "steps": (at_steps, wanted.steps),
        "fraction": (at_fraction, wanted.fractions),
        "scale": (at_scale, wanted.scales),
    }
    asked = [(along, value) for along, (_, values) in makers.items() for value in sorted(set(values))]
    done = [f"{along} {value:g}" in kept.rows for along, value in asked]
    found: dict[str, list[dict]] = {along: [] for along in makers}
    absent = {}
    with Progress("curves", total=len(asked), done=sum(done), unit="points") as progress:
        for (along, value), is_done in zip(asked, done, strict=True):
            name = f"{along} {value:g}"
            # An absent finer grid may be available by now.
            if not is_done or "absent" in kept.rows[name]:
                kept.add(name, makers[along][0](value))
            if "absent" in kept.rows[name]:
                absent[str(value)] = kept.rows[name]["absent"]
            else:
                found[along].append(kept.rows[name])
            progress.advance(0 if is_done else 1)
    by_steps, by_fraction, by_scale = found.values()
    _draw(folder / "figures", by_steps, by_fraction, by_scale, steps=settings.fit.steps)
    write_json(folder / "curves.json", {
        "signals": len(rows),
        "ids": [ids[row] for row in rows],
        "grid": list(dataset.grid),
        "steps": by_steps,
        "fractions": by_fraction,
        "scales": by_scale,
        "absent": absent,
        "conventions": _CONVENTIONS,
        "settings": {name: settings.to_dict()[name] for name in ("curves", "fit", "seed")},
    })  # fmt: skip


def _random_orders(seed: int, rows: np.ndarray, points: int) -> np.ndarray:
    """int [n, N]: each signal's points in its own random order, which depends only on the seed and the row."""
    return np.stack([np.random.default_rng([seed, int(row)]).permutation(points) for row in rows])


def interpolated(signal: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """The observed points of a signal, interpolated on its grid.

    Series and images are interpolated linearly (Delaunay), and by the nearest point outside the hull. Volumes take the
    mean of the 8 nearest points, weighted by the inverse cube of their distance: on brain MRI this is within 0.7 dB of
    linear interpolation, which takes seconds for each volume of 32x32x32.

    Args:
      signal: [*grid, D].
      observed: bool [N], N the points of the grid, at least one True.
    Returns:
      [*grid, D]; observed points keep their values.
    """
    from scipy import interpolate  # imported late, because every start reads this stage's settings
    from scipy.spatial import KDTree, QhullError

    coords, values = grid(signal.shape[:-1]), signal.reshape(-1, signal.shape[-1])
    places, known = coords[observed], values[observed]
    if coords.shape[1] == 1:
        found = np.stack([np.interp(coords[:, 0], places[:, 0], channel) for channel in known.T], -1)
    elif coords.shape[1] == 2:
        found = interpolate.NearestNDInterpolator(places, known)(coords)
        with contextlib.suppress(QhullError, ValueError):  # too few points for a triangle, or all on one line
            linear = interpolate.LinearNDInterpolator(places, known)(coords)
            found = np.where(np.isnan(linear), found, linear)
    else:
        distances, nearest = KDTree(places).query(coords, k=range(1, min(8, len(places)) + 1))  # [N, 8]
        weights = np.maximum(distances, 1e-6) ** -3.0
        found = (weights[..., None] * known[nearest]).sum(1) / weights.sum(1, keepdims=True)
    return found.astype(signal.dtype).reshape(signal.shape)


def _against_truth(field, params, latent: np.ndarray, signal: np.ndarray, truth: np.ndarray) -> dict:
    """Metrics [1] of one signal on a finer grid, by method."""
    from scipy import ndimage

    coarse, fine = signal.shape[:-1], truth.shape[:-1]
    inner, coords = inner_samples(coarse, fine)
    expected = truth[inner][None]
    zoom = [m / n for n, m in zip(coarse, fine, strict=True)] + [1]
    results = {"field": _decoded_quality(field, params, latent, coords, expected)}
    for name, degree in (("linear", 1), ("cubic", 3)):
        # The grid mode of scipy has the same convention: samples are the centres of cells.
        image = ndimage.zoom(signal, zoom, order=degree, mode="reflect", grid_mode=True)
        results[name] = _quality(image[inner][None], expected)
    steps = [m / n for n, m in zip(coarse, fine, strict=True)]
    down = np.stack([resample(channel, coarse, steps) for channel in np.moveaxis(truth, -1, 0)], -1)
    results["agreement"] = _quality(down[None], signal[None])
    return results


def _decoded_quality(field, params, latents, coords: np.ndarray, signals: np.ndarray) -> dict[str, np.ndarray]:
    """Metrics [n] of the fields of latents [n, P] at the points [N, C] of signals [n, *grid, D]."""
    size = max(1, _VALUES_AT_ONCE // int(np.prod(signals.shape[1:])))
    found = []
    for start, images in zip(
        range(0, len(signals), size), decode_batches(field, params, latents, coords, batch_size=size), strict=True
    ):
        part = signals[start : start + size]
        found.append(_quality(images.reshape(part.shape), part))
    return _joined(found)


def _quality(images: np.ndarray, signals: np.ndarray) -> dict[str, np.ndarray]:
    return {name: np.asarray(value) for name, value in metrics.signal_metrics(images, signals).items()}


def _joined(found: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([one[name] for one in found]) for name in found[0]}


def _draw(folder: Path, by_steps: list, by_fraction: list, by_scale: list, *, steps: int) -> None:
    from experiments import figures

    figures.draw_quality(
        folder / "curve_steps.png", by_steps, along="steps", label="test-time steps H", marked=steps,
        ticks={point["steps"]: str(point["steps"]) for point in by_steps},
    )  # fmt: skip
    figures.draw_quality(
        folder / "curve_fractions.png", by_fraction, along="fraction", label="observed part of the points",
        ticks={point["fraction"]: f"{100 * point['fraction']:.3g}%" for point in by_fraction},
    )  # fmt: skip
    if by_scale:
        figures.draw_quality(
            folder / "curve_scales.png", by_scale, along="scale", label="resolution (times that of training)",
            ticks={point["scale"]: f"{point['scale']}x\n{'x'.join(map(str, point['grid']))}" for point in by_scale},
        )  # fmt: skip
