"""Inverse problems: signals from indirect measurements, by a finished field and by classical methods.

Every problem has one operator for all signals (`medfuncta_jax.operators`); a method gets only the operator's
measurements of test signals:

  slices_2, slices_4  slices 2 or 4 points thick along one axis, through a Gaussian profile
  kspace_4            a quarter of k-space: the centre, and samples with a density that falls outwards
  projections_30      30 parallel-beam projections over 180 degrees (images with equal sides)
  points_10           a tenth of the points, at random

The field is fitted from a latent of zeros, as in training, and, where the run has latents of training signals, along
the axes of their Gaussian prior (`medfuncta_jax.prior`), with the level of the noise. Early stopping keeps unmeasured
values of the first near what the field has learned, the prior those of the second. Validation signals choose between
the two, the number of steps, and the weight of total variation.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from experiments.runtime.progress import Progress, log
from experiments.runtime.run import Run
from experiments.runtime.run_directory import RunError, write_json
from experiments.stages.inverse_problems import (
    PROBLEMS,
    LinearMap,
    Name,
    Problem,
    problem_of,
    total_variation,
)
from experiments.stages.kept_rows import KeptRows
from medfuncta_jax import metrics
from medfuncta_jax.batched import decode_latents
from medfuncta_jax.checkpoint import load_field
from medfuncta_jax.field import Field, Params
from medfuncta_jax.fit import fit_latent
from medfuncta_jax.latent_store import field_checksum, load_latents
from medfuncta_jax.measurements import observed_field
from medfuncta_jax.point_field import ChannelLoss
from medfuncta_jax.prior import FEWEST, GaussianPrior, gaussian_prior
from medfuncta_jax.settings import SettingsError

_FILE = "inverse.json"
_PICTURED = 6
_VALIDATION_SIGNALS = 6
# Weights of total variation: the first trial, the factor between trials, and the maximum number of trials to each side.
_TV_FIRST, _TV_RATIO, _TV_SIDE = 1e-3, math.sqrt(10), 5
_CONVENTIONS = {
    "values": "clipped to [0, 1]; interval: percentile bootstrap of the mean over signals, 95 %",
    "difference": "PSNR of the field less that of the best classical method by mean PSNR, paired, with its interval",
    "measurements": (
        "made of the test signals themselves, interpolated linearly between grid points where rays pass; noise is "
        "Gaussian, in standard deviations of the measurements of the test signals"
    ),
    "field": (
        "fitted to the measurements from a latent of zeros, or with a Gaussian prior of the training latents and the "
        "level of the noise; its rays integrate the field itself"
    ),
    "total variation": (
        "least squares with a total-variation penalty (scikit-image's proximal step in FISTA), from the image of the "
        "other classical method, through the very map that made the measurements, until an iteration changes images by "
        "less than 5e-4 of their norm; with a small weight and few measurements it stays where it begins"
    ),
    "chosen": (
        "prior, number of steps and weight: best mean PSNR on validation signals; weights from 3e-6 to 0.3 are tried "
        "until the neighbours of the best one, a factor of 3.2 away, are no better. iterations: of total variation on "
        "the test signals, 300 at most"
    ),
}  # fmt: skip


@dataclass(frozen=True)
class InverseSettings:
    """Signals from indirect measurements (--mode=inverse), beside classical methods.

    Attributes:
      problems: "slices_2", "slices_4" (thick slices), "kspace_4" (a quarter of k-space), "projections_30", "points_10"
        (a tenth of the points); () is all problems that the signals have.
      signals: maximum number of test signals, evenly spaced over the split.
      steps: numbers of steps of the fit; the best one on validation signals is taken.
      noise: standard deviation of Gaussian noise on the measurements, relative to that of all measurements of test
        signals.
    """

    problems: tuple[Name, ...] = ()
    signals: int = 24
    steps: tuple[int, ...] = (20, 60, 200, 600)
    noise: float = 0.0

    def __post_init__(self):
        if len(set(self.problems)) < len(self.problems):
            raise SettingsError(f"problems must name each once, got {self.problems}")
        if self.signals < 1:
            raise SettingsError(f"signals must be at least 1, got {self.signals}")
        if not self.steps or min(self.steps) < 1:
            raise SettingsError(f"steps must be numbers of at least 1, got {self.steps}")
        if not 0 <= self.noise < float("inf"):
            raise SettingsError(f"noise must be at least 0, got {self.noise}")


def inverse(run: Run) -> None:
    """Write `inverse.json` and a picture for each problem, `figures/inverse_*.png`.

    Raises:
      CheckpointError: no trained field.
      RunError: scikit-image is not installed, or a problem that these signals do not have was asked for.
      LatentStoreError: training latents that are damaged, incomplete, or of another field.
      Interrupted: a stop was asked for; finished problems are kept, in `inverse.problems.json`.
    """
    if importlib.util.find_spec("skimage") is None:
        raise RunError("--mode=inverse needs the package scikit-image; pip install 'medfuncta_jax[inverse]'")
    from experiments import figures  # imported late, because every start reads this stage's settings

    settings, dataset, directory = run.settings, run.dataset, run.directory
    wanted = settings.inverse
    possible = {name: problem_of(name, dataset.grid, seed=settings.seed) for name in wanted.problems or PROBLEMS}
    problems = {name: problem for name, problem in possible.items() if problem is not None}
    for name in wanted.problems:
        if name not in problems:
            raise RunError(
                f"inverse.problems names {name}, which signals on a grid of {'x'.join(map(str, dataset.grid))} do not "
                "have; leave it out"
            )
    field, params = load_field(directory.path)
    prior = prior_of(run, field, params)
    chosen = {
        name: dataset.splits[name].complete(count)
        for name, count in (("test", wanted.signals), ("val", _VALIDATION_SIGNALS))
    }
    signals = {name: dataset.splits[name].signals(rows) for name, rows in chosen.items()}
    names = [dataset.splits["test"].annotations().ids[row] for row in chosen["test"]]
    folder = directory.results("inverse")
    kept = KeptRows(folder / "inverse.problems.json", {
        "field_sha256": field_checksum(directory.path),
        "signals": [hashlib.sha256(np.ascontiguousarray(some).tobytes()).hexdigest() for some in signals.values()],
        "settings": {
            "steps": list(wanted.steps), "noise": wanted.noise, "seed": settings.seed,
            "resamples": settings.evaluate.resamples, "prior": prior is not None,
        },
    })  # fmt: skip
    summary = functools.partial(metrics.summary, resamples=settings.evaluate.resamples, seed=settings.seed)

    def may_stop() -> None:
        run.stop.check(f"finished problems are in {kept.path}" if kept.rows else "no problem is finished yet")

    with Progress("inverse", total=len(problems), done=len(kept.rows.keys() & problems), unit="problems") as progress:
        for name, problem in problems.items():
            if name in kept.rows:
                continue
            linear = LinearMap(problem.operator, dataset.grid)
            rng, exact = np.random.default_rng(settings.seed), {key: linear.forward(x) for key, x in signals.items()}
            spread = wanted.noise * exact["test"].std()
            measured = {key: y + (spread * rng.standard_normal(y.shape)).astype(y.dtype) for key, y in exact.items()}
            images, said = solved(
                problem, linear, (field, params), signals["val"], measured, prior=prior, noise=float(spread),
                steps=wanted.steps, channel_loss=settings.train.channel_loss, may_stop=may_stop,
            )  # fmt: skip
            quality = {method: _quality(image, signals["test"]) for method, image in images.items()}
            best = max((method for method in quality if method != "field"), key=lambda m: quality[m]["psnr"].mean())
            gain = quality["field"]["psnr"] - quality[best]["psnr"]
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
                "difference": summary({"psnr": gain}),
                **said,
            })  # fmt: skip
            progress.advance(note=f"{name}: {gain.mean():+.2f} dB")
    result = {
        "signals": len(names),
        "validation_signals": len(chosen["val"]),
        "grid": list(dataset.grid),
        "problems": {name: kept.rows[name] for name in problems},
        "conventions": _CONVENTIONS,
        "settings": asdict(wanted) | {"seed": settings.seed},
    }
    write_json(folder / _FILE, result)
    log.info("inverse problems in %s:\n%s", folder / _FILE, as_table(result))


def prior_of(run: Run, field: Field, params: Params) -> GaussianPrior | None:
    """The prior of the run's training latents; None where there are none or too few, or the field takes none.

    Raises:
      LatentStoreError: latents that are damaged, incomplete, or of another field.
    """
    folder = run.directory.latents
    if not any(folder.glob("train-*.safetensors")):
        log.info("inverse problems are solved without a prior: no latents of training signals in %s", folder)
        return None
    latents = load_latents(folder, splits=("train",), field=run.directory.path)["train"].latents
    if len(latents) < FEWEST:
        log.info("inverse problems are solved without a prior: it needs %d training latents", FEWEST)
        return None
    try:
        return gaussian_prior(field, params, latents[:])
    except SettingsError as error:
        log.info("inverse problems are solved without a prior: %s", error)
        return None


def as_table(result: Mapping[str, Any]) -> str:
    """A line per problem: PSNR and SSIM of every method, and the field's difference with its interval."""
    lines = []
    for problem in result["problems"].values():
        cells = [f"{name} {of['psnr']:.2f} dB, {of['ssim']:.3f}" for name, of in problem["methods"].items()]
        gain, (low, high) = problem["difference"]["psnr"], problem["difference"]["interval"]["psnr"]
        lines.append(
            f"{problem['title']}: {'; '.join(cells)}; field less {problem['beside']} {gain:+.2f} dB ({low:+.2f} to "
            f"{high:+.2f})"
        )
    return "\n".join(lines)


def solved(
    problem: Problem,
    linear: LinearMap,
    network: tuple[Field, Params],
    val: np.ndarray,
    measured: Mapping[str, np.ndarray],
    *,
    prior: GaussianPrior | None,
    noise: float,
    steps: tuple[int, ...],
    channel_loss: ChannelLoss,
    may_stop: Callable[[], None],
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Test signals [n, *grid, D] by each method, and the choices on validation signals.

    Args:
      linear: the problem's operator on the grid of the signals.
      val: validation signals, [n, *grid, D].
      measured: measurements of "test" and "val", [n, M, D].
      prior: of the latents of training signals, for a second kind of fit to choose from; None leaves it out.
      noise: the standard deviation of the noise in `measured`.
      steps: numbers of steps to choose from.
      channel_loss: as in the field's training.
    """
    shape = (*problem.operator.shape, val.shape[-1])
    observe = observed_field(*network, problem.operator)

    def by_field(name: str, counts: tuple[int, ...], prior: GaussianPrior | None) -> list[np.ndarray]:
        found, latents, before = [], None, 0
        for count in counts:
            may_stop()
            fitted = fit_latent(
                *network, measured[name].reshape(-1, *shape), observe=observe, prior=prior,
                noise=0.0 if prior is None else noise, steps=count - before, channel_loss=channel_loss, safeguard=True,
                init=latents,
            )  # fmt: skip
            latents, before = fitted.latents, count
            found.append(decode_latents(*network, np.asarray(latents), val.shape[1:-1]).clip(0, 1))
        return found

    def psnr(images: np.ndarray) -> float:
        return float(_quality(images, val)["psnr"].mean())

    def by_total_variation(name: str, weight: float) -> tuple[np.ndarray, int]:
        return total_variation(linear, measured[name], usual[name], weight=weight, may_stop=may_stop)

    method, as_usual = problem.classical
    usual = {name: np.stack([as_usual(one.reshape(shape)) for one in some]) for name, some in measured.items()}
    counts = tuple(sorted(set(steps)))
    kinds = {"steps": None} | ({} if prior is None else {"steps_with_prior": prior})
    tried = {
        kind: dict(zip(counts, map(psnr, by_field("val", counts, some)), strict=True)) for kind, some in kinds.items()
    }
    kind, chosen = max(((kind, count) for kind in kinds for count in counts), key=lambda one: tried[one[0]][one[1]])
    weight, weights = best_weight(lambda weight: psnr(by_total_variation("val", weight)[0]))
    penalised, iterations = by_total_variation("test", weight)
    images = {
        method: usual["test"],
        "total variation": penalised,
        "field": by_field("test", counts[: counts.index(chosen) + 1], kinds[kind])[-1],
    }
    return images, {
        "chosen": {"steps": chosen, "prior": kind != "steps", "weight": weight, "iterations": iterations},
        "tried": {kind: {str(count): dB for count, dB in by.items()} for kind, by in tried.items()}
        | {"weight": weights},
    }


def best_weight(quality: Callable[[float], float]) -> tuple[float, dict[str, float]]:
    """The weight of the highest quality, with neighbours that are no better, and the quality of all trials."""
    tried: dict[int, float] = {}
    place, best = None, 0
    while place != best:
        place = best
        for k in (place, place - 1, place + 1):
            if k not in tried and abs(k) <= _TV_SIDE:
                tried[k] = quality(_TV_FIRST * _TV_RATIO**k)
        best = max(tried, key=lambda k: tried[k])
    return _TV_FIRST * _TV_RATIO**best, {f"{_TV_FIRST * _TV_RATIO**k:.2g}": tried[k] for k in sorted(tried)}


def _rows(count: int, wanted: int) -> np.ndarray:
    """At most `wanted` rows, evenly spaced."""
    return np.unique(np.linspace(0, count - 1, min(wanted, count)).round().astype(int))


def _quality(images: np.ndarray, signals: np.ndarray) -> dict[str, np.ndarray]:
    values = metrics.signal_metrics(images.astype(np.float32), signals)
    return {name: np.asarray(value) for name, value in values.items()}
