"""Generation of new signals by a flow on the latents of a finished run, at any resolution, and their scores."""

from __future__ import annotations

import csv
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import serialization

from experiments.runtime.interruption import StopRequest
from experiments.runtime.progress import Progress, log
from experiments.runtime.run import Run
from experiments.runtime.run_directory import RunError, write_json
from experiments.stages.decode import check_grid, claim, decoded_shape, require_memory
from experiments.stages.principal_axes import principal_axes
from experiments.stages.signal_files import UNIT, file_name, suffix_of, write_signal
from medfuncta_jax.atomic import atomic_path
from medfuncta_jax.batched import decode_batches, decode_latents
from medfuncta_jax.checkpoint import load_field
from medfuncta_jax.datasets import Dataset
from medfuncta_jax.field import Field, Params
from medfuncta_jax.flow import Flow, FlowState, FlowTraining, Velocity, first_state, fit_flow
from medfuncta_jax.latent_store import load_latents
from medfuncta_jax.settings import SettingsError

_FILE = "generation.json"
_ACROSS, _MOST_ROWS = 8, 6
_CONVENTIONS = {
    "reference": (
        "test signals of classes that training has, in scores on the principal axes of training signals; samples have "
        "their classes"
    ),
    "density, coverage": "Naeem et al. 2020; 1 and up to 1 are those of the real distribution",
    "frechet": "squared Frechet distance to the test signals in the same scores; 0 for the same mean and covariance",
    "nearest": "median distance to the nearest training signal in the same scores, over that of test signals; well "
    "below 1 is copying",
    "Gaussians": "with mean and covariance of each class by itself",
    "training signals": "drawn by class, as many as samples: what a perfect generator would score, but for copying",
}


@dataclass(frozen=True)
class GenerateSettings:
    """New signals from a flow on latents (--mode=generate).

    Attributes:
      samples: number of written signals; classes of labelled sets have equal numbers.
      judged: number of samples for the scores, at most the number of test signals.
      resolution, scale: the grid of the files, as in `DecodeSettings`.
      flow_steps: steps of the integration from noise to latents.
      steps, batch_size, learning_rate: settings of the flow's training.
      width, blocks: size of the flow's residual MLP.
      decay: decay of the exponential moving average of the flow's weights.
      components: components of PCA, the space of the Frechet distance and neighbours.
      neighbours: k of density and coverage.
    """

    samples: int = 64
    judged: int = 1000
    resolution: tuple[int, ...] = ()
    scale: float = 1.0
    flow_steps: int = 50
    steps: int = 4000
    batch_size: int = 128
    learning_rate: float = 1e-3
    width: int = 512
    blocks: int = 3
    decay: float = 0.999
    components: int = 64
    neighbours: int = 5

    def __post_init__(self):
        for name in ("samples", "judged", "flow_steps", "steps", "batch_size", "width", "blocks", "components",
                     "neighbours"):  # fmt: skip
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} must be at least 1, got {getattr(self, name)}")
        check_grid(self.resolution, self.scale)
        if not self.learning_rate > 0:
            raise SettingsError(f"learning_rate must be above 0, got {self.learning_rate}")
        if not 0 <= self.decay < 1:
            raise SettingsError(f"decay must be in [0, 1), got {self.decay}")

    @property
    def training(self) -> FlowTraining:
        """The settings of the flow."""
        return FlowTraining(
            self.width, self.blocks, self.steps, self.batch_size, self.learning_rate, self.decay
        )  # fmt: skip


def generate(run: Run) -> None:
    """Write `generated/` (a file a sample, `signals.csv`), `generation.json` and pictures.

    The flow is kept beside its training latents, in `flows/`, under a name for everything that it depends on; other
    samples or another grid of the same flow need no training.

    Raises:
      CheckpointError, LatentStoreError: no field, or no latents of training signals.
      RunError: latents of other data, too few labels or test signals, or `generated/` holds other samples.
      SettingsError: a grid that the field, the files or the memory cannot give.
      Interrupted: a stop was asked for; training goes on from there, files that are there are kept.
    """
    from experiments import figures  # imported late, because every start reads this stage's settings
    from experiments.stages.generation_scores import nearest

    settings, dataset, directory, wanted = run.settings, run.dataset, run.directory, run.settings.generate
    field, params = load_field(directory.path)
    stored = load_latents(directory.latents, splits=("train",), field=directory.path)["train"]
    if stored.ids != dataset.splits["train"].annotations().ids:
        raise RunError(f"the training latents in {directory.latents} are of other data; run --mode=extract again")
    shape = decoded_shape(wanted.resolution, wanted.scale, dataset.grid, group="generate")
    if len(shape) == 2 and field.channels not in (1, 3):
        raise SettingsError(f"a PNG holds 1 or 3 channels, this field has {field.channels}")
    require_memory(shape, field.channels, group="generate")
    classes, labels = _classes(dataset), {name: _kinds(dataset, name) for name in ("train", "test")}
    present = np.unique(labels["train"][labels["train"] >= 0])
    if not len(present):
        raise RunError("no training signal has a label; generate from a run with data.labels, or without any")
    judges = np.flatnonzero(np.isin(labels["test"], present))
    if len(judges) < 2:
        raise RunError("samples are judged by test signals, and fewer than two have a class that training has")
    folder, latents = directory.results("generate"), np.asarray(stored.latents, np.float32)
    flow, made_of = _trained(
        latents, labels["train"], len(classes), wanted.training, seed=settings.seed,
        folder=directory.results("extract") / "flows", stop=run.stop,
    )  # fmt: skip

    def decoded(some: np.ndarray) -> np.ndarray:
        """Signals [n, *grid, D] in [0, 1]."""
        run.stop.check("the flow is kept, and files that are there")
        return decode_latents(field, params, some, dataset.grid, batch_size=settings.fit.batch_size).clip(0, 1)

    train = dataset.splits["train"].signals(slice(None))
    axes = principal_axes(train.reshape(len(train), -1), wanted.components)

    def features(signals: np.ndarray) -> np.ndarray:
        return axes.scores(signals.reshape(len(signals), -1))

    # The written samples, and their nearest training signals.
    kinds = present[np.arange(wanted.samples) % len(present)]
    noise = np.asarray(
        jax.random.normal(jax.random.key(settings.seed + 1), (wanted.samples, latents.shape[1]), np.float32)
    )
    made = flow.latents(noise, kinds, steps=wanted.flow_steps)
    signals, known = decoded(made), features(train)
    distances, copies = nearest(known, features(signals))
    claim(folder / "generated", {"flow": made_of}, kind="samples of another flow")
    suffix = suffix_of(len(shape), field.channels, UNIT)
    names = [
        file_name(row, count=len(kinds), name=classes[kind], suffix=suffix) for row, kind in enumerate(kinds)
    ]  # fmt: skip
    _write(folder / "generated", names, made, shape, (field, params), trained=dataset.grid,
           size=settings.fit.batch_size, stop=run.stop)  # fmt: skip
    with atomic_path(folder / "generated" / "signals.csv") as partial, partial.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["file", "class", "nearest_training_id", "distance"])
        for name, kind, row, distance in zip(names, kinds, copies, distances, strict=True):
            writer.writerow([name, classes[kind], stored.ids[row], f"{distance:.6g}"])
    figures.draw_sheet(
        folder / "figures" / "generated.png", _pairs(signals, train[copies], kinds, classes), across=_ACROSS,
        title="Samples of the flow, and below each its nearest training signal",
    )  # fmt: skip
    ways = _ways(noise, kinds, classes, lambda some, kind: decoded(flow.latents(some, kind, steps=wanted.flow_steps)))
    if ways:
        figures.draw_sheet(folder / "figures" / "interpolations.png", ways, across=_ACROSS,
                           title="From one sample to another of its class")  # fmt: skip

    rng = np.random.default_rng(settings.seed)
    count = min(wanted.judged, len(judges))
    asked = rng.permutation(labels["test"][judges])[:count]
    random = np.asarray(rng.standard_normal((count, latents.shape[1])))
    by_class = [np.flatnonzero(labels["train"] == kind) for kind in range(len(classes))]
    pictured = _gaussian(known, by_class, asked, rng) @ axes.axes + axes.mean
    scores = _scores(
        {
            "flow": features(decoded(flow.latents(random, asked, steps=wanted.flow_steps))),
            "Gaussian on latents": features(decoded(_gaussian(latents, by_class, asked, rng).astype(np.float32))),
            "Gaussian on PCA scores": features(np.clip(pictured, 0, 1)),
            "training signals": known[[rng.choice(by_class[kind]) for kind in asked]],
        },
        real=features(dataset.splits["test"].signals(judges)), known=known, neighbours=wanted.neighbours,
    )  # fmt: skip
    result = {
        "samples": wanted.samples,
        "classes": [classes[kind] for kind in present],
        "flow": {"loss": flow.loss, "parameters": sum(leaf.size for leaf in jax.tree.leaves(flow.params))},
        "judged": count,
        "test_signals": len(judges),
        "components": len(axes.axes),
        "scores": scores,
        "conventions": _CONVENTIONS,
        "settings": asdict(wanted) | {"seed": settings.seed},
    }
    write_json(folder / _FILE, result)
    log.info("generation: %d files in %s\n%s", len(names), folder / "generated", as_table(result))


def as_table(result: Mapping[str, Any]) -> str:
    """A table with a line per kind of samples."""
    return "\n".join(
        f"{name}: density {of['density']:.3f}, coverage {of['coverage']:.3f}, Frechet {of['frechet']:.3f}, "
        f"nearest training signal {of['nearest']:.3f}"
        for name, of in result["scores"].items()
    )


def _classes(dataset: Dataset) -> tuple[str, ...]:
    """Names of the flow's classes; a single name without labels."""
    return ("signal",) if dataset.task in ("none", "multi-label") else dataset.classes


def _kinds(dataset: Dataset, split: str) -> np.ndarray:
    """int [n]: the class of each signal; -1 for a signal without a label, which is left out of training."""
    labels = dataset.splits[split].annotations().labels
    return np.zeros(len(labels), int) if dataset.task in ("none", "multi-label") else labels


def _trained(
    latents: np.ndarray, labels: np.ndarray, classes: int, training: FlowTraining, *, seed: int, folder: Path,
    stop: StopRequest,
) -> tuple[Flow, str]:  # fmt: skip
    """The flow, resumed from the state of an earlier start in `folder`, and a checksum of everything it depends on."""
    latents, labels = latents[labels >= 0], labels[labels >= 0]
    made_of = hashlib.sha256(json.dumps([asdict(training), seed, classes]).encode() + latents.tobytes()
                             + labels.astype(np.int64).tobytes()).hexdigest()  # fmt: skip
    file = folder / f"{made_of[:16]}.msgpack"
    key, module = jax.random.key(seed), Velocity(latents.shape[1], classes, training.width, training.blocks)
    start = _kept(file, first_state(module, training, key))
    last_kept = time.monotonic()
    done = 0 if start is None else int(start.step)
    with Progress("generate: flow", total=training.steps, done=done, unit="updates") as progress:

        def after(state: FlowState) -> None:
            nonlocal done, last_kept
            progress.advance(int(state.step) - done, note=f"loss {float(state.loss):.3f}")
            done = int(state.step)
            if stop or done == training.steps or time.monotonic() - last_kept > 30:
                with atomic_path(file) as partial:
                    partial.write_bytes(serialization.to_bytes(jax.tree.map(np.asarray, state)))
                last_kept = time.monotonic()
            stop.check(f"the flow so far is in {file}")

        flow = fit_flow(latents, labels, classes=classes, key=key, training=training, start=start, after=after)
    return flow, made_of


def _kept(file: Path, like: FlowState) -> FlowState | None:
    try:
        return serialization.from_bytes(like, file.read_bytes())
    except (OSError, ValueError, KeyError, TypeError):
        return None  # training starts anew without a state or with a damaged one


def _write(
    folder: Path, names: Sequence[str], latents: np.ndarray, shape: tuple[int, ...], network: tuple[Field, Params], *,
    trained: tuple[int, ...], size: int, stop: StopRequest,
) -> None:  # fmt: skip
    """Decode samples on a grid, and write missing files."""
    left = [row for row, name in enumerate(names) if not (folder / name).exists()]
    with Progress("generate: files", total=len(names), done=len(names) - len(left), unit="files") as progress:
        rows = iter(left)
        for values in decode_batches(*network, latents, shape, rows=left, batch_size=size) if left else ():
            for signal in np.clip(values, 0, 1):
                write_signal(folder / names[next(rows)], signal, UNIT, trained=trained)
            progress.advance(len(values))
            stop.check(f"the flow is kept, and finished files in {folder}")


def _gaussian(
    vectors: np.ndarray, by_class: Sequence[np.ndarray], kinds: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Gaussian draws [n, F], one per entry of `kinds`, with mean and covariance of the class's vectors [m, F]."""
    out = np.empty((len(kinds), vectors.shape[1]))
    for kind in np.unique(kinds):
        some, places = vectors[by_class[kind]].astype(np.float64), kinds == kind
        # Sums of deviations with random factors have the covariance of the vectors, without forming it.
        factors = rng.standard_normal((int(places.sum()), len(some))) / np.sqrt(max(1, len(some) - 1))
        out[places] = some.mean(0) + factors @ (some - some.mean(0))
    return out


def _scores(
    samples: Mapping[str, np.ndarray], *, real: np.ndarray, known: np.ndarray, neighbours: int
) -> dict[str, dict[str, float]]:
    """Scores of each kind of samples, from features of them, of test and of training signals."""
    from experiments.stages.generation_scores import density_and_coverage, frechet_distance, nearest

    ordinary = float(np.median(nearest(known, real)[0]))
    return {
        name: density_and_coverage(real, some, neighbours=min(neighbours, len(real) - 1))
        | {"frechet": frechet_distance(real, some), "nearest": float(np.median(nearest(known, some)[0])) / ordinary}
        for name, some in samples.items()
    }


def _pairs(
    signals: np.ndarray, copies: np.ndarray, kinds: np.ndarray, classes: tuple[str, ...]
) -> list[tuple[str, np.ndarray]]:
    """Rows of samples of a class, with their nearest training signals below."""
    rows, shown = [], np.unique(kinds)[:_MOST_ROWS]
    for kind in shown:
        places = np.flatnonzero(kinds == kind)
        for start in range(0, min(len(places), _ACROSS * (_MOST_ROWS // len(shown))), _ACROSS):
            some = places[start : start + _ACROSS]
            rows += [(classes[kind], signals[some]), ("nearest training", copies[some])]
    return rows


def _ways(
    noise: np.ndarray, kinds: np.ndarray, classes: tuple[str, ...],
    made: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> list[tuple[str, np.ndarray]]:  # fmt: skip
    """For each class with two samples, an interpolation between them along the circle through their noise."""
    rows = []
    for kind in np.unique(kinds)[:_MOST_ROWS]:
        ends = noise[kinds == kind][:2]
        if len(ends) == 2:
            angles = np.linspace(0, np.pi / 2, _ACROSS)[:, None]
            way = np.cos(angles) * ends[0] + np.sin(angles) * ends[1]
            rows.append((classes[kind], made(way, np.full(_ACROSS, kind))))
    return rows
