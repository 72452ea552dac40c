"""Inverse problems: signals from measurements that are no points, by a finished field and by classical methods.

Every problem has one operator for all signals (`medfuncta_jax.observe`), whose measurements of test signals are all
that a method is given:

  slices_2, slices_4  slices 2 or 4 points thick along one axis, through a Gaussian profile
  kspace_4            a quarter of k-space: the centre, and samples that are rarer further out
  projections_30      30 parallel-beam projections over 180 degrees (images with equal sides)
  points_10           a tenth of the points, at random

The field is fitted from a latent of zeros, as in training, and what is not measured is left to it: a descent that stops
early stays near to what it knows. Its number of steps and the weight of total variation are those that are best on
validation signals.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.ndimage import map_coordinates
from scipy import ndimage

from experiments import figures
from experiments.runtime.interruption import StopRequest
from experiments.runtime.progress import Progress, log
from experiments.runtime.run_directory import RunDirectory, RunError, write_json
from experiments.stages.curves import interpolated
from experiments.stages.kept_rows import KeptRows
from medfuncta_jax import metrics, observe
from medfuncta_jax.checkpoint import load_field
from medfuncta_jax.coordinates import grid
from medfuncta_jax.datasets import Dataset
from medfuncta_jax.field import Field, Params
from medfuncta_jax.fit import fit_latent, reconstruct
from medfuncta_jax.latent_store import field_checksum
from medfuncta_jax.settings import InverseSettings, Settings

_FILE = "inverse.json"
_PICTURED = 6
_OURS = ("field", "field, consistent")
_CONSISTENT_STEPS = (1, 3, 10, 30)
_TV_WEIGHTS = (1e-3, 3e-3, 1e-2)
_TV_STEPS, _TV_INNER_STEPS = 50, 10
_CONVENTIONS = {
    "values": "clipped to [0, 1]; interval: percentile bootstrap of the mean over signals, 95 %",
    "difference": "PSNR less that of the best classical method by mean PSNR, paired, with its interval",
    "measurements": (
        "made of the test signals themselves, interpolated linearly between grid points where rays pass; no noise"
    ),
    "field": "fitted to the measurements from a latent of zeros; steps as chosen",
    "field, consistent": (
        "the field's signals, moved by the least change that explains the measurements (conjugate gradients, steps as "
        "chosen): what was measured is kept, the field says the rest"
    ),
    "total variation": (
        "least squares with a total-variation penalty (scikit-image's proximal step in FISTA), from the image of the "
        "other classical method"
    ),
    "chosen": "number of steps and weight: best mean PSNR on validation signals",
}


@dataclass(frozen=True)
class Problem:
    """One kind of measurement.

    Attributes:
      title: for people.
      operator: of points in [-1, 1].
      classical: name and method of what is usually done, from measurements [*shape, D] of one signal to [*grid, D].
    """

    title: str
    operator: observe.Operator
    classical: tuple[str, Callable[[np.ndarray], np.ndarray]]


def inverse(settings: Settings, dataset: Dataset, run: RunDirectory, stop: StopRequest) -> dict[str, Any]:
    """Write `inverse.json` and a picture for each problem, `figures/inverse_*.png`; returns the first.

    Raises:
      CheckpointError: no trained field.
      RunError: scikit-image is not installed, or a problem that these signals do not have was asked for.
      Interrupted: a stop was asked for; finished problems are kept.
    """
    began, wanted = time.monotonic(), settings.inverse
    try:
        import skimage  # noqa: F401
    except ModuleNotFoundError as error:
        raise RunError("--mode=inverse needs the package scikit-image; pip install 'medfuncta_jax[inverse]'") from error
    possible = {name: problem_of(name, dataset.grid, seed=settings.seed) for name in wanted.problems}
    problems = {name: problem for name, problem in possible.items() if problem is not None}
    for name in possible:
        if name not in problems and wanted.problems != InverseSettings().problems:  # by default those that there are
            raise RunError(
                f"inverse.problems names {name}, which signals on a grid of {'x'.join(map(str, dataset.grid))} do not "
                "have; leave it out"
            )
    field, params = load_field(run.path)
    chosen = {name: _rows(len(dataset.splits[name]), count) for name, count in (("test", wanted.signals), ("val", 6))}
    signals = {name: dataset.splits[name].signals(rows) for name, rows in chosen.items()}
    names = [dataset.splits["test"].annotations().ids[row] for row in chosen["test"]]
    folder = run.results("inverse")
    kept = KeptRows(folder / "inverse.problems.json", {
        "field_sha256": field_checksum(run.path),
        "signals": [hashlib.sha256(np.ascontiguousarray(some).tobytes()).hexdigest() for some in signals.values()],
        "settings": json.loads(json.dumps({
            "steps": wanted.steps, "seed": settings.seed, "resamples": settings.evaluate.resamples,
        })),
    })  # fmt: skip
    summary = functools.partial(metrics.summary, resamples=settings.evaluate.resamples, seed=settings.seed)
    done = [name in kept.rows for name in problems]
    with Progress("inverse", total=len(problems), done=sum(done), unit="problems") as progress:
        for name, problem in problems.items():
            if name in kept.rows:
                continue

            def may_stop() -> None:
                stop.check(f"finished problems are in {kept.path}")

            images, said = solved(problem, field, params, signals, steps=wanted.steps, may_stop=may_stop)
            quality = {method: _quality(image, signals["test"]) for method, image in images.items()}
            best = max((method for method in quality if method not in _OURS), key=lambda m: quality[m]["psnr"].mean())
            gains = {method: quality[method]["psnr"] - quality[best]["psnr"] for method in _OURS}
            figures.draw_methods(
                folder / "figures" / f"inverse_{name}.png", signals["test"], images,
                rows=_rows(len(names), _PICTURED), names=names, title=problem.title,
            )  # fmt: skip
            kept.add(name, {
                "title": problem.title,
                "measurements": math.prod(problem.operator.shape),
                "points": math.prod(dataset.grid),
                "methods": {method: summary(values) for method, values in quality.items()},
                "beside": best,
                "difference": {method: summary({"psnr": gain}) for method, gain in gains.items()},
                **said,
            })  # fmt: skip
            progress.advance(note=f"{name}: {gains[_OURS[1]].mean():+.2f} dB")
    result = {
        "signals": len(names),
        "grid": list(dataset.grid),
        "problems": {name: kept.rows[name] for name in problems},
        "conventions": _CONVENTIONS,
        "settings": asdict(wanted) | {"seed": settings.seed},
    }
    write_json(folder / _FILE, result)
    run.set_seconds("inverse", time.monotonic() - began)
    log.info("inverse problems in %s:\n%s", folder / _FILE, as_table(result))
    return result


def as_table(result: Mapping[str, Any]) -> str:
    """A line a problem: PSNR and SSIM of every method, and the field's difference with its interval."""
    lines = []
    for problem in result["problems"].values():
        cells = [f"{name} {of['psnr']:.2f} dB, {of['ssim']:.3f}" for name, of in problem["methods"].items()]
        for method, gain in problem["difference"].items():
            low, high = gain["interval"]["psnr"]
            cells.append(f"{method} {gain['psnr']:+.2f} dB ({low:+.2f} to {high:+.2f})")
        lines.append(f"{problem['title']}: {'; '.join(cells)} beside {problem['beside']}")
    return "\n".join(lines)


def problem_of(name: str, shape: tuple[int, ...], *, seed: int) -> Problem | None:
    """A problem on signals of a grid, None where they do not have it."""
    rng = np.random.default_rng(seed)
    if name.startswith("slices"):
        factor, axis = int(name.partition("_")[2]), (0 if len(shape) < 3 else 2)
        if shape[axis] % factor:
            return None
        slices = observe.SliceProfile(shape, axis, factor)

        def between(measured: np.ndarray) -> np.ndarray:
            zoom = [float(factor) if k == axis else 1.0 for k in range(len(shape))] + [1.0]
            return ndimage.zoom(measured, zoom, order=1, mode="nearest", grid_mode=True)

        return Problem(f"Slices {factor} points thick", slices, ("linear interpolation", between))
    if name == "kspace_4":
        if len(shape) == 1:
            return None
        samples = observe.KSpace.of_mask(mask_of(shape, 4, rng))
        return Problem("A quarter of k-space", samples, ("zero filling", functools.partial(zero_filled, samples)))
    if name == "projections_30":
        if len(shape) != 2 or shape[0] != shape[1]:
            return None
        angles = tuple(6.0 * k for k in range(30))
        rays = observe.Projections((shape[0], shape[1]), angles, math.ceil(math.sqrt(2) * shape[0]))
        return Problem("30 projections", rays, ("filtered backprojection", functools.partial(backprojected, rays)))
    points = np.sort(rng.permutation(math.prod(shape))[: max(1, math.prod(shape) // 10)])
    seen = np.isin(np.arange(math.prod(shape)), points)

    def spread(measured: np.ndarray) -> np.ndarray:
        signal = np.zeros((len(seen), measured.shape[-1]), measured.dtype)
        signal[seen] = measured
        return interpolated(signal.reshape(*shape, -1), seen)

    return Problem(
        "A tenth of the points", observe.Points(grid(shape)[points]),
        ("linear interpolation" if len(shape) < 3 else "inverse distance", spread),
    )  # fmt: skip


def mask_of(shape: tuple[int, ...], factor: int, rng: np.random.Generator) -> np.ndarray:
    """A mask of k-space, bool [*shape] with zero frequency first: whole lines along the last axis, as they are read
    out, whose number is `factor` times smaller than all.

    Lines nearer to the centre than a 25th of the axis are all there, others at random, with a probability that falls
    with the square of their distance.
    """
    phases = np.meshgrid(*(np.fft.fftfreq(n) for n in shape[:-1]), indexing="ij")
    distance = np.sqrt(sum(np.square(phase) for phase in phases)).ravel()
    score = -2 * np.log(0.02 + distance) + rng.gumbel(size=len(distance))  # draws without replacement
    score[distance <= 0.04] = np.inf
    lines = np.zeros(len(distance), bool)
    lines[np.argsort(-score, kind="stable")[: max(1, round(len(distance) / factor))]] = True
    return np.broadcast_to(lines.reshape(*shape[:-1], 1), shape).copy()


def zero_filled(operator: observe.KSpace, measured: np.ndarray) -> np.ndarray:
    """The real signal [*grid, D] of least energy with the measured samples [2, S, D]: a sample tells that of the
    opposite frequency, and all others are 0."""
    size, axes = operator.size, tuple(range(len(operator.size)))
    spectrum = np.zeros((math.prod(size), measured.shape[-1]), complex)
    there = np.zeros((math.prod(size), 1))
    spectrum[operator.rows], there[operator.rows] = measured[0] + 1j * measured[1], 1
    spectrum, there = spectrum.reshape(*size, -1), there.reshape(*size, 1)

    def opposite(array: np.ndarray) -> np.ndarray:
        return np.roll(np.flip(array, axes), 1, axes)

    both = (spectrum + np.conj(opposite(spectrum))) / np.maximum(there + opposite(there), 1)
    return np.fft.ifftn(both, axes=axes, norm="ortho").real.astype(measured.dtype)


def backprojected(operator: observe.Projections, measured: np.ndarray) -> np.ndarray:
    """Filtered backprojection (ramp filter) [n, n, D] of projections [angles, detectors, D]."""
    from skimage.transform import iradon

    images = [
        iradon(channel.T, theta=np.array(operator.angles), circle=False, output_size=operator.size[0])
        for channel in np.moveaxis(measured, -1, 0)
    ]
    return np.stack(images, -1).astype(measured.dtype)


def solved(
    problem: Problem,
    field: Field,
    params: Params,
    signals: Mapping[str, np.ndarray],
    *,
    steps: tuple[int, ...],
    may_stop: Callable[[], None],
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Test signals [n, *grid, D] as each method finds them, and what was chosen on validation.

    Args:
      signals: of "test" and "val", [n, *grid, D].
      steps: numbers of steps to choose from.
    """
    linear = _LinearMap(problem.operator, signals["test"].shape[1:-1])
    measured = {name: linear.forward(some) for name, some in signals.items()}
    shape = (*problem.operator.shape, signals["test"].shape[-1])

    def by_field(name: str, counts: tuple[int, ...]) -> list[np.ndarray]:
        found, latents, before = [], None, 0
        for count in counts:
            may_stop()
            fitted = fit_latent(
                field, params, measured[name].reshape(-1, *shape), observe=problem.operator, steps=count - before,
                safeguard=True, init=latents,
            )  # fmt: skip
            latents, before = fitted.latents, count
            values = reconstruct(field, params, latents, grid(signals[name].shape[1:-1]))
            found.append(np.clip(np.asarray(values).reshape(signals[name].shape), 0, 1))
        return found

    def by_total_variation(name: str, weight: float) -> np.ndarray:
        return total_variation(linear, measured[name], usual[name], weight=weight, may_stop=may_stop)

    def psnr(images: np.ndarray) -> float:
        return float(_quality(images, signals["val"])["psnr"].mean())

    method, as_usual = problem.classical
    usual = {name: np.stack([as_usual(one.reshape(shape)) for one in some]) for name, some in measured.items()}
    counts = tuple(sorted(set(steps)))
    fitted = by_field("val", counts)
    best = int(np.argmax([psnr(images) for images in fitted]))

    def moved(images: np.ndarray, name: str, steps: int) -> np.ndarray:
        return consistent(linear, measured[name], images, steps=steps)

    corrections = max(_CONSISTENT_STEPS, key=lambda steps: psnr(moved(fitted[best], "val", steps)))
    weight = max(_TV_WEIGHTS, key=lambda weight: psnr(by_total_variation("val", weight)))
    of_field = by_field("test", counts[: best + 1])[-1]
    images = {
        method: usual["test"],
        "total variation": by_total_variation("test", weight),
        "field": of_field,
        "field, consistent": moved(of_field, "test", corrections),
    }
    return images, {"chosen": {"steps": counts[best], "consistent": corrections, "total variation": weight}}


class _LinearMap:
    """An operator on signals of a grid, which are interpolated linearly between grid points, and its adjoint."""

    def __init__(self, operator: observe.Operator, shape: tuple[int, ...]):
        self._operator, self._shape = operator, shape
        coords = np.asarray(operator.coords)
        self._places = tuple((coords[:, k] + 1) / 2 * (n - 1) for k, n in enumerate(shape))
        self._coords = jnp.asarray(coords, jnp.float32)
        self._on_grid = operator.grid == shape
        # A matrix where that is small; rays pass far more places than there are pixels and measurements.
        entries = math.prod(shape) * math.prod(operator.shape)
        self._matrix = None if self._on_grid or entries > 2**26 else self._as_matrix()

    def _values(self, signals: jax.Array) -> jax.Array:
        """Values [n, N, D] at the operator's points of signals [n, *grid, D]."""
        if self._on_grid:
            return signals.reshape(len(signals), -1, signals.shape[-1])
        read = functools.partial(map_coordinates, coordinates=self._places, order=1, mode="nearest")
        return jax.vmap(jax.vmap(read, in_axes=-1, out_axes=-1))(signals)

    def _as_matrix(self) -> np.ndarray:
        """[M, points of the grid]: what is measured of each grid point alone, in few rows at a time."""
        rows, groups = [], self._operator.groups
        each, measured = len(self._coords) // groups, math.prod(self._operator.shape) // groups
        count = math.prod(self._shape)
        for group in range(groups):
            part = slice(group * each, (group + 1) * each)
            values = np.zeros((each, count), np.float32)
            # The 2^C corners around a place, each with its share.
            low = [
                np.clip(np.floor(p[part]).astype(int), 0, n - 2) for p, n in zip(self._places, self._shape, strict=True)
            ]
            share = [np.clip(p[part] - k, 0, 1) for p, k in zip(self._places, low, strict=True)]
            for corner in np.ndindex(*(2,) * len(low)):
                at = np.ravel_multi_index([k + c for k, c in zip(low, corner, strict=True)], self._shape)
                weight = np.prod([s if c else 1 - s for s, c in zip(share, corner, strict=True)], axis=0)
                np.add.at(values, (np.arange(each), at), weight)
            rows.append(
                np.asarray(self._operator(jnp.asarray(values)[None], self._coords[part])).reshape(measured, count)
            )
        return np.concatenate(rows)

    def forward(self, signals: np.ndarray) -> np.ndarray:
        """Measurements [n, M, D] of signals [n, *grid, D]."""
        if self._matrix is not None:
            flat = signals.reshape(len(signals), -1, signals.shape[-1])
            return np.einsum("mp,npd->nmd", self._matrix, flat, optimize=True).astype(np.float32)
        return np.asarray(self._forward(jnp.asarray(signals)))

    def adjoint(self, measured: np.ndarray) -> np.ndarray:
        """Signals [n, *grid, D] of measurements [n, M, D]."""
        shape = (len(measured), *self._shape, measured.shape[-1])
        if self._matrix is not None:
            return np.einsum("mp,nmd->npd", self._matrix, measured, optimize=True).reshape(shape)
        return np.asarray(self._adjoint(jnp.zeros(shape, jnp.float32), jnp.asarray(measured)))

    @functools.cached_property
    def _forward(self) -> Callable[[jax.Array], jax.Array]:
        return jax.jit(lambda signals: self._operator(self._values(signals), self._coords))

    @functools.cached_property
    def _adjoint(self) -> Callable[[jax.Array, jax.Array], jax.Array]:
        return jax.jit(lambda like, measured: jax.vjp(self._forward, like)[1](measured)[0])

    @functools.cached_property
    def norm(self) -> float:
        """The largest singular value."""
        signal = np.random.default_rng(0).random((1, *self._shape, 1), np.float32)
        for _ in range(30):
            signal = self.adjoint(self.forward(signal / np.linalg.norm(signal)))
        return math.sqrt(float(np.linalg.norm(signal)))


def consistent(linear: _LinearMap, measured: np.ndarray, images: np.ndarray, *, steps: int) -> np.ndarray:
    """Images [n, *grid, D] moved towards measurements [n, M, D] by `steps` conjugate gradients on |A x - y|^2.

    The change lies in what A measures, so that of all images with these measurements it goes to the nearest.
    """
    images, axes = images.copy(), tuple(range(1, images.ndim))
    rest = measured - linear.forward(images)
    gradient = linear.adjoint(rest)
    direction, size = gradient, np.square(gradient).sum(axes, keepdims=True)
    for _ in range(steps):
        seen = linear.forward(direction)
        length = size / np.maximum(np.square(seen).sum((1, 2)).reshape(size.shape), 1e-30)
        images = images + length * direction
        rest = rest - length.reshape(-1, 1, 1) * seen
        gradient = linear.adjoint(rest)
        following = np.square(gradient).sum(axes, keepdims=True)
        direction, size = gradient + following / np.maximum(size, 1e-30) * direction, following
    return images.clip(0, 1)


def total_variation(
    linear: _LinearMap, measured: np.ndarray, first: np.ndarray, *, weight: float, may_stop: Callable[[], None]
) -> np.ndarray:
    """Signals [n, *grid, D] in [0, 1] that minimise |A x - y|^2 / (2 |A|^2) + weight TV(x), by FISTA.

    Args:
      linear: A, with |A| its norm.
      measured: y, [n, M, D].
      first: images to begin with, [n, *grid, D].
      weight: > 0; a penalty that does not depend on the unit of the measurements.
    """
    from skimage.restoration import denoise_tv_chambolle

    step = 1 / linear.norm**2
    image = before = ahead = first
    momentum = 1.0
    for _ in range(_TV_STEPS):
        may_stop()
        moved = ahead - step * linear.adjoint(linear.forward(ahead) - measured)
        image = np.stack([
            denoise_tv_chambolle(one, weight=weight, eps=1e-5, max_num_iter=_TV_INNER_STEPS, channel_axis=-1)
            for one in moved
        ]).clip(0, 1)  # fmt: skip
        following = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
        ahead = image + (momentum - 1) / following * (image - before)
        before, momentum = image, following
    return image


def _rows(count: int, wanted: int) -> np.ndarray:
    """At most `wanted` rows, evenly spaced."""
    return np.unique(np.linspace(0, count - 1, min(wanted, count)).round().astype(int))


def _quality(images: np.ndarray, signals: np.ndarray) -> dict[str, np.ndarray]:
    values = metrics.signal_metrics(images.astype(np.float32), signals)
    return {name: np.asarray(value) for name, value in values.items()}
