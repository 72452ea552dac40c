"""Features for classifiers and regressions of signals: latents, PCA of equal size, or the values themselves."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from experiments.runtime.progress import log
from experiments.runtime.run import Run
from experiments.runtime.run_directory import RunError
from experiments.stages.principal_axes import principal_axes
from medfuncta_jax.checkpoint import load_field
from medfuncta_jax.coordinates import grid
from medfuncta_jax.datasets.dataset import SPLITS, without_labels
from medfuncta_jax.latent_store import LatentSplit, load_latents
from medfuncta_jax.settings import SettingsError
from medfuncta_jax.signal_metric import signal_metric

# Kinds of features, and their names in tables.
FEATURES = {"latents": "latents", "metric": "latents, signal metric", "pca": "PCA", "values": "values"}


def matching_latents(run: Run) -> dict[str, LatentSplit]:
    """The latents of all splits, after checking that they are this field's and this data set's.

    Raises:
      CheckpointError, LatentStoreError: no field, no latents, a split is missing, or latents of another field.
      RunError: latents of other data.
    """
    directory, dataset = run.directory, run.dataset
    latents = load_latents(directory.latents, splits=SPLITS, field=directory.path)
    for name in SPLITS:
        place, remedy = directory.latents / name, "remove the latents and extract again (--mode=extract)"
        stored, known = latents[name], dataset.splits[name].annotations()
        about = json.loads(json.dumps(without_labels(dataset.about)))
        described = without_labels(stored.about.get("data", {}))  # a part of the data set's description
        same = bool(described) and all(about.get(key) == value for key, value in described.items())
        same = same and list(stored.ids) == list(known.ids)
        if not same:
            raise RunError(f"{place}: latents of other data than {dataset.name} as it is now; {remedy}")
        if not np.isfinite(np.asarray(stored.latents)).all():
            raise RunError(f"{place}: some latents are not finite; {remedy}")
    return latents


def vectors(kind: str, run: Run, latents: Mapping[str, LatentSplit], notes: list[str]) -> dict[str, np.ndarray]:
    """One kind of features, [n, F] of all signals of a split; remarks about them are added to `notes`."""
    if kind in ("latents", "metric"):
        found = {name: np.asarray(split.latents) for name, split in latents.items()}
        if kind == "metric":
            field, params = load_field(run.directory.path)
            key = jax.random.key(run.settings.seed)
            metric = signal_metric(field, params, found["train"], grid(run.dataset.grid), key=key).astype(np.float32)
            found = {name: values @ metric for name, values in found.items()}
        return found
    signals = {name: split.signals(slice(None)).reshape(len(split), -1) for name, split in run.dataset.splits.items()}
    return signals if kind == "values" else principal_components(signals, run.settings.model.latent_dim, notes)


def principal_components(signals: Mapping[str, np.ndarray], components: int, notes: list[str]) -> dict[str, np.ndarray]:
    """Scores [n, components] on the principal axes of the training signals [n, F], all or as many as there are."""
    pca = principal_axes(signals["train"], components)
    if len(pca.axes) < components:
        notes.append(
            f"PCA has {len(pca.axes)} components, the most that {len(signals['train'])} training signals give, not "
            f"{components}."
        )
        log.warning("classify: %s", notes[-1])
    return {name: pca.scores(values) for name, values in signals.items()}


def digest(*arrays: np.ndarray) -> str:
    """SHA-256 of arrays with their types and shapes."""
    found = hashlib.sha256()
    for array in arrays:
        found.update(f"{array.dtype} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def mean_and_spread(values: list[Any]) -> Any:
    """Mean and standard deviation (of a sample) over seeds, item by item for lists; None if a value is not defined."""
    if isinstance(values[0], list):
        return [mean_and_spread(list(items)) for items in zip(*values, strict=True)]
    if any(value is None for value in values):
        return None
    return {"mean": float(np.mean(values)), "spread": float(np.std(values, ddof=1)) if len(values) > 1 else None}


def require_distinct(name: str, values: Sequence[Any]) -> None:
    """Refuse an empty list, or one with repeated items, in a setting.

    Raises:
      SettingsError: names the setting.
    """
    if not values:
        raise SettingsError(f"{name} must not be empty")
    if len(set(values)) != len(values):
        raise SettingsError(f"{name} must name each once, got {values}")
