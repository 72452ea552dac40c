"""Generation: new signals from a flow on the latents of a finished run, at any resolution, and how good they are."""

from __future__ import annotations

import csv
import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import serialization

from experiments import figures
from experiments.runtime.interruption import StopRequest
from experiments.runtime.progress import Progress, log
from experiments.runtime.run_directory import RunDirectory, RunError, write_json
from experiments.stages.decode import decoded_shape, require_memory
from experiments.stages.generation_scores import density_and_coverage, frechet_distance, nearest
from experiments.stages.principal_axes import PrincipalAxes, principal_axes
from experiments.stages.signal_files import UNIT, file_name, suffix_of, write_signal
from medfuncta_jax.atomic import atomic_path
from medfuncta_jax.checkpoint import load_field
from medfuncta_jax.coordinates import grid
from medfuncta_jax.datasets import Dataset
from medfuncta_jax.field import Field, Params
from medfuncta_jax.fit import reconstruct
from medfuncta_jax.flow import Flow, FlowState, FlowTraining, Velocity, first_state, fit_flow
from medfuncta_jax.latent_store import load_latents
from medfuncta_jax.settings import DecodeSettings, GenerateSettings, Settings

_FILE = "generation.json"
_ACROSS, _MOST_ROWS = 8, 6
_CONVENTIONS = {
    "reference": "test signals, in scores on the principal axes of training signals; samples have their classes",
    "density, coverage": "Naeem et al. 2020; 1 and up to 1 are those of the real distribution",
    "frechet": "squared Frechet distance to the test signals in the same scores; 0 for the same mean and covariance",
    "nearest": "median distance to the nearest training signal in the same scores, over that of test signals; well "
    "below 1 is copying",
    "Gaussians": "with mean and covariance of each class by itself",
    "training signals": "drawn by class, as many as samples: what a perfect generator would score, but for copying",
}


def generate(settings: Settings, dataset: Dataset, run: RunDirectory, stop: StopRequest) -> dict[str, Any]:
    """Write `generated/` (a file a sample, `signals.csv`), `generation.json` and pictures; returns the JSON's content.

    Raises:
      CheckpointError, LatentStoreError: no field, or no latents of training signals.
      RunError: latents of other data.
      SettingsError: a grid that the field or the memory cannot give.
      Interrupted: a stop was asked for; training goes on from there, files that are there are kept.
    """
    began, wanted = time.monotonic(), settings.generate
    field, params = load_field(run.path)
    stored = load_latents(run.latents, splits=("train",), field=run.path)["train"]
    if stored.ids != dataset.splits["train"].annotations().ids:
        raise RunError(f"the training latents in {run.latents} are of other data; run --mode=extract again")
    shape = decoded_shape(DecodeSettings(resolution=wanted.resolution, scale=wanted.scale), dataset.grid)
    require_memory(shape, field.channels)
    classes = _classes(dataset)
    labels = {name: _kinds(dataset, name) for name in ("train", "test")}
    latents = np.asarray(stored.latents, np.float32)
    folder = run.results("generate")
    flow = _trained(latents, labels["train"], len(classes), settings, folder, stop)

    key = jax.random.key(settings.seed + 1)
    size = settings.fit.batch_size

    def decoded(some: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Signals [n, *shape, D] in [0, 1], in batches of one shape."""
        parts = []
        for start in range(0, len(some), size):
            batch = np.resize(some[start : start + size], (size, some.shape[1]))
            values = np.asarray(reconstruct(field, params, batch, grid(shape)))[: len(some) - start]
            parts.append(np.clip(values, 0, 1).reshape(-1, *shape, field.channels))
            stop.check("the flow is kept; files that are there too")
        return np.concatenate(parts)

    train = dataset.splits["train"].signals(slice(None))
    features = _Features(principal_axes(train.reshape(len(train), -1), wanted.components))
    known = features(train)

    # The samples that are written, and their nearest training signals.
    kinds = np.arange(wanted.samples) % len(classes)
    noise = np.asarray(jax.random.normal(key, (wanted.samples, latents.shape[1])))
    made = flow.latents(noise, kinds, steps=wanted.flow_steps)
    signals = decoded(made, dataset.grid)
    distances, copies = nearest(known, features(signals))
    names = _write(folder / "generated", made, classes, kinds, shape, (field, params), stop)
    with atomic_path(folder / "generated" / "signals.csv") as partial, partial.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["file", "class", "nearest_training_id", "distance"])
        for name, kind, row, distance in zip(names, kinds, copies, distances, strict=True):
            writer.writerow([name, classes[kind], stored.ids[row], f"{distance:.6g}"])
    _draw(folder / "figures", signals, train[copies], kinds, classes)
    _draw_between(folder / "figures", flow, noise, kinds, classes, wanted, lambda some: decoded(some, dataset.grid))

    result = {
        "samples": wanted.samples,
        "classes": list(classes),
        "flow": {"loss": flow.loss, "parameters": sum(leaf.size for leaf in jax.tree.leaves(flow.params))},
        **_judged(dataset, labels, latents, flow, features, settings, lambda some: decoded(some, dataset.grid)),
        "conventions": _CONVENTIONS,
        "settings": asdict(wanted) | {"seed": settings.seed},
    }
    write_json(folder / _FILE, result)
    run.set_seconds("generate", time.monotonic() - began)
    log.info("generation: %d files in %s\n%s", len(names), folder / "generated", as_table(result))
    return result


def as_table(result: Mapping[str, Any]) -> str:
    """A line a kind of samples."""
    return "\n".join(
        f"{name}: density {of['density']:.3f}, coverage {of['coverage']:.3f}, Frechet {of['frechet']:.3f}, "
        f"nearest training signal {of['nearest']:.3f}"
        for name, of in result["scores"].items()
    )


def _classes(dataset: Dataset) -> tuple[str, ...]:
    """Names of the kinds that the flow knows: the classes, or one."""
    return ("signal",) if dataset.task in ("none", "multi-label") else dataset.classes


def _kinds(dataset: Dataset, split: str) -> np.ndarray:
    """int [n]: the kind of each signal. One without a label is left out of training, where its kind is -1."""
    labels = dataset.splits[split].annotations().labels
    return np.zeros(len(labels), int) if dataset.task in ("none", "multi-label") else labels


class _Features:
    """Scores of signals on principal axes."""

    def __init__(self, axes: PrincipalAxes):
        self.axes = axes

    def __call__(self, signals: np.ndarray) -> np.ndarray:
        return self.axes.scores(signals.reshape(len(signals), -1))


def _trained(
    latents: np.ndarray, labels: np.ndarray, classes: int, settings: Settings, folder: Path, stop: StopRequest
) -> Flow:
    """The flow, trained on, from what an earlier start has left in `flow.msgpack`."""
    wanted, key = settings.generate, jax.random.key(settings.seed)
    training = FlowTraining(
        wanted.width, wanted.blocks, wanted.steps, wanted.batch_size, wanted.learning_rate, wanted.decay
    )
    latents, labels = latents[labels >= 0], labels[labels >= 0]
    if not len(latents):
        raise RunError("no training signal has a label; generate from a run with data.labels, or without any")
    made_of = json.dumps([asdict(training), settings.seed, classes, hashlib.sha256(latents.tobytes()).hexdigest(),
                          hashlib.sha256(labels.tobytes()).hexdigest()])  # fmt: skip
    file = folder / "flow.msgpack"
    module = Velocity(latents.shape[1], classes, training.width, training.blocks)
    start = _kept(file, made_of, first_state(module, training, key))
    last_kept = time.monotonic()

    def keep(state: FlowState) -> None:
        with atomic_path(file) as partial:
            partial.write_bytes(serialization.msgpack_serialize({
                "made_of": made_of, "state": serialization.to_bytes(jax.tree.map(np.asarray, state)),
            }))  # fmt: skip

    done = 0 if start is None else int(start.step)
    with Progress("generate: flow", total=wanted.steps, done=done, unit="updates") as progress:

        def after(state: FlowState) -> None:
            nonlocal done, last_kept
            progress.advance(int(state.step) - done, note=f"loss {float(state.loss):.3f}")
            done = int(state.step)
            if stop or done == wanted.steps or time.monotonic() - last_kept > 30:
                keep(state)
                last_kept = time.monotonic()
            stop.check(f"the flow so far is in {file}")

        return fit_flow(latents, labels, classes=classes, key=key, training=training, start=start, after=after)


def _kept(file: Path, made_of: str, like: FlowState) -> FlowState | None:
    try:
        stored = serialization.msgpack_restore(file.read_bytes())
        if stored["made_of"] != made_of:
            return None
        return serialization.from_bytes(like, stored["state"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # none, or a damaged one, is begun anew


def _write(
    folder: Path, latents: np.ndarray, classes: tuple[str, ...], kinds: np.ndarray, shape: tuple[int, ...],
    network: tuple[Field, Params], stop: StopRequest,
) -> list[str]:  # fmt: skip
    """Decode samples on a grid and write each to a file; returns the names."""
    field, params = network
    suffix = suffix_of(len(shape), field.channels, UNIT)
    names = [
        file_name(row, count=len(latents), name=classes[kind], suffix=suffix) for row, kind in enumerate(kinds)
    ]  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    for row, name in enumerate(names):
        values = np.asarray(reconstruct(field, params, latents[row : row + 1], grid(shape)))
        signal = np.clip(values, 0, 1).reshape(*shape, field.channels)
        write_signal(folder / name, signal, UNIT, trained=shape)
        stop.check(f"finished files are in {folder}")
    return names


def _judged(
    dataset: Dataset, labels: Mapping[str, np.ndarray], latents: np.ndarray, flow: Flow, features: _Features,
    settings: Settings, decoded: Any,
) -> dict[str, Any]:  # fmt: skip
    """Scores of the flow's samples, of two Gaussians and of training signals, against test signals."""
    wanted, rng = settings.generate, np.random.default_rng(settings.seed)
    real_rows = np.flatnonzero(labels["test"] >= 0)
    real = features(dataset.splits["test"].signals(real_rows))
    known = features(dataset.splits["train"].signals(slice(None)))
    count = min(wanted.judged, len(real_rows))
    kinds = rng.permutation(labels["test"][real_rows])[:count]
    present = np.unique(labels["train"][labels["train"] >= 0])
    kinds = np.where(np.isin(kinds, present), kinds, present[0])  # a class that was never seen has no Gaussian

    def by_class(vectors: np.ndarray) -> np.ndarray:
        out = np.empty((count, vectors.shape[1]))
        for kind in np.unique(kinds):
            some = vectors[labels["train"] == kind].astype(np.float64)
            places = kinds == kind
            # A draw from the Gaussian of n vectors: their mean, and them about it with random factors.
            factors = rng.standard_normal((int(places.sum()), len(some))) / np.sqrt(max(1, len(some) - 1))
            out[places] = some.mean(0) + factors @ (some - some.mean(0))
        return out

    noise = rng.standard_normal((count, latents.shape[1]))
    mean, axes = features.axes.mean, features.axes.axes
    pictured = np.clip(by_class(known) @ axes + mean, 0, 1)
    drawn = np.array([rng.choice(np.flatnonzero(labels["train"] == kind)) for kind in kinds])
    kinds_of_samples = {
        "flow": features(decoded(flow.latents(noise, kinds, steps=wanted.flow_steps))),
        "Gaussian on latents": features(decoded(by_class(latents).astype(np.float32))),
        "Gaussian on PCA scores": features(pictured),
        "training signals": known[drawn],
    }
    ordinary = float(np.median(nearest(known, real)[0]))
    k = min(wanted.neighbours, len(real) - 1)
    scores = {
        name: density_and_coverage(real, samples, neighbours=k)
        | {
            "frechet": frechet_distance(real, samples),
            "nearest": float(np.median(nearest(known, samples)[0])) / ordinary,
        }
        for name, samples in kinds_of_samples.items()
    }
    return {"judged": count, "test_signals": len(real), "components": len(axes), "scores": scores}


def _draw(folder: Path, signals: np.ndarray, copies: np.ndarray, kinds: np.ndarray, classes: tuple[str, ...]) -> None:
    """Samples, and below each its nearest training signal."""
    blocks = []
    for kind in range(min(len(classes), _MOST_ROWS)):
        rows = np.flatnonzero(kinds == kind)
        for start in range(0, min(len(rows), _ACROSS * max(1, _MOST_ROWS // len(classes))), _ACROSS):
            some = rows[start : start + _ACROSS]
            blocks += [(classes[kind], signals[some]), ("nearest training", copies[some])]
    figures.draw_sheet(folder / "generated.png", blocks, across=_ACROSS,
                       title="Samples of the flow, and below each its nearest training signal")  # fmt: skip


def _draw_between(
    folder: Path, flow: Flow, noise: np.ndarray, kinds: np.ndarray, classes: tuple[str, ...],
    wanted: GenerateSettings, decoded: Any,
) -> None:  # fmt: skip
    """Ways from one sample to another of its class, along the circle through their noise."""
    blocks = []
    for kind in range(min(len(classes), _MOST_ROWS)):
        ends = noise[kinds == kind][:2]
        if len(ends) < 2:
            continue
        angles = np.linspace(0, np.pi / 2, _ACROSS)[:, None]
        way = np.cos(angles) * ends[0] + np.sin(angles) * ends[1]
        found = flow.latents(way, np.full(_ACROSS, kind), steps=wanted.flow_steps)
        blocks.append((classes[kind], decoded(found)))
    if blocks:
        figures.draw_sheet(folder / "interpolations.png", blocks, across=_ACROSS,
                           title="From one sample to another of its class")  # fmt: skip
