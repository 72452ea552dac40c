"""Classification of a finished run's latents, as in the paper's table 3, beside PCA of equal size and the signals."""

from __future__ import annotations

import functools
import itertools
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from experiments.runtime.progress import Progress, log
from experiments.runtime.run import Run
from experiments.runtime.run_directory import RunError, write_json
from experiments.stages.features import FEATURES, digest, matching_latents, mean_and_spread, require_distinct, vectors
from experiments.stages.kept_rows import KeptRows
from medfuncta_jax.atomic import atomic_path
from medfuncta_jax.datasets import Dataset
from medfuncta_jax.datasets.dataset import SPLITS, Task
from medfuncta_jax.latent_store import LatentSplit
from medfuncta_jax.settings import MlpSettings, SettingsError

if TYPE_CHECKING:
    from experiments.stages.classifiers import Outcome

JSON_FILE, TABLE_FILE, FIGURE_FILE = "classification.json", "classification.md", "confusion.png"
ROWS_FILE = "classification.rows.json"
# Rows above this part of the work are logged before they begin.
_COSTLY = 0.4

_NETWORKS = {"resnet50": "ResNet50", "efficientnet_b0": "EfficientNet-B0"}

# Heading, name in the row, and format; a column without any value is left out of the table.
_COLUMNS = (
    ("accuracy %", "accuracy", 100, 1),
    ("macro F1", "macro_f1", 1, 3),
    ("balanced accuracy %", "balanced_accuracy", 100, 1),
    ("AUROC", "auroc", 1, 3),
    ("mean absolute error", "mean_absolute_error", 1, 3),
    ("quadratic kappa", "quadratic_kappa", 1, 3),
)


@dataclass(frozen=True)
class ClassifySettings(MlpSettings):
    """Classification of a finished run's latents (MedFuncta, table 3), beside PCA of equal size and raw values.

    Attributes: beside those of `MlpSettings`, which also apply to image networks,
      classifiers: some of "knn", "mlp", "resnet50" and "efficientnet_b0"; the last two take images and need the extra
        `classify-images`.
      features: inputs of k-NN and the MLP: "latents", "metric" (latents whose distances are those of their signals, see
        `signal_metric`), "pca" (as many components as the latent has entries) and "values" (the signal, flattened).
      normalise: normalisations of the MLP's features, see `fit_mlp`. The one with the best validation accuracy is kept
        for each kind of features; k-NN takes unchanged features.
      neighbours: all k of k-NN.
      seeds: repetitions of each training: seeds `seed`, `seed` + 1 and so on.

    The paper writes that the MLP's `hidden` layers are 1024 and 512 wide, but its 1.2e6 parameters (P = 2048) are those
    of 512 and 256; 1024 and 512 have 2.6e6.
    """

    classifiers: tuple[Literal["knn", "mlp", "resnet50", "efficientnet_b0"], ...] = ("knn", "mlp")
    features: tuple[Literal["latents", "metric", "pca", "values"], ...] = ("latents", "metric", "pca", "values")
    normalise: tuple[Literal["none", "scale", "standardise"], ...] = ("standardise", "scale")
    neighbours: tuple[int, ...] = (1, 3)
    seeds: int = 3

    def __post_init__(self):
        super().__post_init__()
        for name in ("classifiers", "features", "normalise", "neighbours"):
            require_distinct(name, getattr(self, name))
        if min(self.neighbours) < 1:
            raise SettingsError(f"neighbours must be at least 1, got {self.neighbours}")
        if self.seeds < 1:
            raise SettingsError(f"seeds must be at least 1, got {self.seeds}")


def classify(run: Run) -> dict[str, Any]:
    """Write `classification.json`, `classification.md` and a figure of confusion matrices; returns the first.

    Everything is trained on the training split, chosen on validation and scored once, on test. Signals without a label
    are left out, except that PCA, like the field, uses all training signals. The most expensive rows are logged before
    they begin; each row is kept in `classification.rows.json` when it is done, so that a stop loses only the current
    row.

    Raises:
      RunError: no labels, latents of other data, or an extra not installed.
      SettingsError: a classifier that cannot see these signals.
      CheckpointError, LatentStoreError: no field, no latents, latents that are incomplete or of another field.
      Interrupted: a stop was asked for; finished rows are kept.
    """
    try:
        from experiments.stages import classifiers
        from experiments.stages.classification_scores import scores
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "sklearn":
            raise
        raise RunError("--mode=classify needs scikit-learn: pip install 'medfuncta_jax[classify]'") from error

    from experiments import figures  # imported late, because every start reads this stage's settings

    began, settings, dataset = time.monotonic(), run.settings, run.dataset
    ours = settings.classify
    networks = [name for name in ours.classifiers if name in classifiers.IMAGE_NETWORKS]
    if networks and len(dataset.grid) != 2:
        raise SettingsError(
            f"classify.classifiers: {networks[0]} sees images, {dataset.name} has {len(dataset.grid)}D signals; "
            "leave it out"
        )
    if networks:
        classifiers.import_keras()
    require_labels(dataset)
    latents = matching_latents(run)
    labels = {name: split.annotations().labels for name, split in dataset.splits.items()}
    rows = {
        name: np.flatnonzero((np.reshape(values, (len(values), -1)) >= 0).all(1)) for name, values in labels.items()
    }
    labels = {name: values[rows[name]] for name, values in labels.items()}
    notes = presence_notes(labels, rows, latents, dataset)
    classes = len(dataset.classes)
    if "knn" in ours.classifiers and max(ours.neighbours) > len(labels["train"]):
        raise SettingsError(
            f"classify.neighbours: {max(ours.neighbours)} neighbours of {len(labels['train'])} labelled signals"
        )

    def labelled(features: Mapping[str, np.ndarray]) -> list[classifiers.Labelled]:
        return [classifiers.Labelled(features[name][rows[name]], labels[name]) for name in SPLITS]

    def may_stop() -> None:
        run.stop.check(f"finished rows are in {kept.path}")

    def watched(name: str) -> Callable[[float], None]:
        """The function that the training of a classifier calls after every epoch."""
        epochs = itertools.count(1)

        def after_epoch(accuracy: float) -> None:
            shown = f"{name}, epoch {next(epochs)} of {ours.epochs}: validation accuracy {100 * accuracy:.1f} %"
            progress.advance(0, note=shown)
            may_stop()

        return after_epoch

    def done(outcome: classifiers.Outcome) -> classifiers.Outcome:
        progress.advance()
        may_stop()
        return outcome

    def row(classifier: str, features: str, outcomes: list[classifiers.Outcome]) -> dict[str, Any]:
        names = {"classifier": classifier, "features": features}
        return names | summary_of(outcomes, labels["test"], scores, dataset.task)

    seeds = range(settings.seed, settings.seed + ours.seeds)
    neighbours = ours.neighbours if "knn" in ours.classifiers else ()
    normalisations = ours.normalise if "mlp" in ours.classifiers else ()
    features = ours.features if neighbours or normalisations else ()
    fits = len(features) * (len(neighbours) + len(seeds) * len(normalisations)) + len(seeds) * len(networks)
    say_costs(run, len(labels["train"]), normalisations, features)
    folder = run.directory.results("classify")
    kept = KeptRows(folder / ROWS_FILE, {
        "field_sha256": latents["test"].about["field_sha256"],
        "latents": digest(*(np.asarray(latents[name].latents) for name in SPLITS)),
        "labels": digest(*(labels[name] for name in SPLITS), *(rows[name] for name in SPLITS)),
        "settings": json.loads(json.dumps({"classify": asdict(ours), "seed": settings.seed, "task": dataset.task})),
    })  # fmt: skip
    table: list[dict[str, Any]] = []
    with Progress("classify", total=fits, unit="classifiers") as progress:

        def add(name: str, fits: int, make: Callable[[], dict[str, Any]]) -> None:
            if name in kept.rows:
                progress.advance(fits)
            else:
                kept.add(name, make())
            table.append(kept.rows[name])

        @functools.lru_cache(maxsize=1)
        def of_kind(kind: str) -> list[classifiers.Labelled]:
            said: list[str] = []
            found = labelled(vectors(kind, run, latents, said))
            kept.notes[kind] = said
            return found

        def neighbour_row(kind: str, k: int) -> dict[str, Any]:
            train, _, test = of_kind(kind)
            outcome = classifiers.nearest_neighbours(train, test, neighbours=k, classes=classes)
            return row(f"k-NN, k = {k}", FEATURES[kind], [done(outcome)])

        def mlp_row(kind: str) -> dict[str, Any]:
            train, val, test = of_kind(kind)
            candidates = [
                {"normalise": normalise}
                | row("MLP", FEATURES[kind], [
                    done(classifiers.mlp(
                        train, val, test,
                        classes=classes, seed=seed, normalise=normalise, settings=ours, after_epoch=watched("MLP"),
                    ))
                    for seed in seeds
                ])
                for normalise in normalisations
            ]  # fmt: skip
            tried = {each["normalise"]: each["val_accuracy"]["mean"] for each in candidates}
            return max(candidates, key=lambda each: tried[each["normalise"]]) | {"tried": tried}

        def network_row(name: str) -> dict[str, Any]:
            images = labelled({name: split.signals(slice(None)) for name, split in dataset.splits.items()})
            return row(_NETWORKS[name], "images", [
                done(classifiers.image_network(
                    name, *images, classes=classes, seed=seed, settings=ours,
                    after_epoch=watched(_NETWORKS[name]), after_batch=may_stop,
                ))
                for seed in seeds
            ])  # fmt: skip

        for kind in features:
            for k in neighbours:
                add(f"k-NN {k}, {kind}", 1, functools.partial(neighbour_row, kind, k))
            if normalisations:
                add(f"MLP, {kind}", len(seeds) * len(normalisations), functools.partial(mlp_row, kind))
        for name in networks:
            add(name, len(seeds), functools.partial(network_row, name))
    notes += [note for kind in features for note in kept.notes.get(kind, [])]

    result = {
        "data": dataset.about.get("title", dataset.name),
        "task": dataset.task,
        "classes": list(dataset.classes),
        "signals": {name: len(chosen) for name, chosen in rows.items()},
        "latent_dim": settings.model.latent_dim,
        "field_sha256": latents["test"].about["field_sha256"],
        "seed": settings.seed,
        "settings": asdict(ours),
        "notes": notes,
        "rows": table,
    }
    write_json(folder / JSON_FILE, result)
    markdown = as_markdown(result)
    with atomic_path(folder / TABLE_FILE) as partial:
        partial.write_text(markdown)
    figures.draw_confusion(folder / "figures" / FIGURE_FILE, result)
    run.directory.set_seconds("classify", time.monotonic() - began)
    log.info("classification in %s:\n%s", folder / TABLE_FILE, markdown)
    return result


def say_costs(run: Run, count: int, normalisations: Sequence[str], features: Sequence[str]) -> None:
    """Log the rows that take most of the time, and the settings that leave them out.

    Args:
      run: the run to classify.
      count: labelled training signals.
      normalisations, features: those of the MLPs, () for none.
    """
    settings, dataset = run.settings, run.dataset
    ours, values = settings.classify, math.prod(dataset.grid) * dataset.channels
    sizes = {kind: values if kind == "values" else settings.model.latent_dim for kind in features}
    parameters = {
        kind: sum((a + 1) * b for a, b in itertools.pairwise([size, *ours.hidden, len(dataset.classes)]))
        for kind, size in sizes.items()
    }
    if not normalisations or not parameters:
        return
    whole, fits = sum(parameters.values()), ours.seeds * len(normalisations)
    for kind, own in parameters.items():
        others = tuple(one for one in features if one != kind)
        if others and own > _COSTLY * whole:
            log.info(
                "classify: the MLP on %s has %.3g parameters and is trained %d times, %d epochs on %d signals: %d %% "
                "of all MLPs' work; --config.classify.features=\"%s\" leaves it out",
                FEATURES[kind], own, fits, ours.epochs, count, round(100 * own / whole), others,
            )  # fmt: skip


def require_labels(dataset: Dataset) -> None:
    """Raise RunError for data without labels."""
    if dataset.task == "none" or not dataset.classes:
        raise RunError(
            f"{dataset.name} has no labels to classify by; choose a source that has some, or name a table of them with "
            "data.labels where the source reads one"
        )


def presence_notes(
    labels: Mapping[str, np.ndarray],
    rows: Mapping[str, np.ndarray],
    latents: Mapping[str, LatentSplit],
    dataset: Dataset,
) -> list[str]:
    """Unusual properties of the labels, one sentence each, which are also logged.

    Raises:
      RunError: a split without labels, or a training split with one class.
    """
    notes = []
    for name in SPLITS:
        absent = len(latents[name].ids) - len(rows[name])
        if not len(rows[name]):
            raise RunError(f"no signal of the {name} split has a label; classification needs some in all three")
        if absent:
            notes.append(f"{absent} of {len(latents[name].ids)} {name} signals have no label and are left out.")
        several = labels[name].ndim == 2
        counts = labels[name].sum(0) if several else np.bincount(labels[name], minlength=len(dataset.classes))
        if name == "train" and not several and (counts > 0).sum() < 2:
            raise RunError("all labels of the train split are of one class; there is nothing to tell apart")
        for wanted, said in ((0, "absent from"), (1, "one member in")):
            found = [dataset.classes[i] for i in np.flatnonzero(counts == wanted)]
            if found:
                notes.append(f"{'Class' if len(found) == 1 else 'Classes'} {', '.join(found)}: {said} {name}.")
    for note in notes:
        log.warning("classify: %s", note)
    return notes


def summary_of(
    outcomes: Sequence[Outcome], labels: np.ndarray, scores: Callable[..., dict[str, Any]], task: Task
) -> dict[str, Any]:
    """Scores over the seeds of one classifier; `confusion` is a sum over seeds, with true classes in rows."""
    results = [scores(labels, outcome.probabilities, task=task) for outcome in outcomes]
    confusion = None
    if task != "multi-label":
        confusion = np.zeros((outcomes[0].probabilities.shape[1],) * 2, int)
        for outcome in outcomes:
            np.add.at(confusion, (labels, outcome.probabilities.argmax(1)), 1)
    return {
        "parameters": outcomes[0].parameters,
        "seeds": len(outcomes),
        "seconds": round(float(np.mean([outcome.seconds for outcome in outcomes])), 3),
        "val_accuracy": mean_and_spread([outcome.val_accuracy for outcome in outcomes]),
        **{name: mean_and_spread([result[name] for result in results]) for name in results[0]},
        "confusion": None if confusion is None else confusion.tolist(),
    }


def as_markdown(result: Mapping[str, Any]) -> str:
    """The table; means and standard deviations over seeds."""
    columns = [column for column in _COLUMNS if any(row.get(column[1]) for row in result["rows"])]
    headings = ["classifier", "features", "parameters", "seconds", *(heading for heading, *_ in columns)]
    signals = " / ".join(f"{count} {name}" for name, count in result["signals"].items())
    lines = [
        f"{result['data']}, {result['task']}, {len(result['classes'])} classes; {signals} signals; "
        f"latents of {result['latent_dim']}; scores of the test split.",
        *result["notes"],
        "",
        f"| {' | '.join(headings)} |",
        f"|{'---|' * len(headings)}",
    ]
    for row in result["rows"]:
        normalised = f" ({row['normalise']}d)" if row.get("normalise", "none") != "none" else ""
        cells = [
            row["classifier"],
            row["features"] + normalised,
            f"{row['parameters']:,}" if row["parameters"] else "none",
            f"{row['seconds']:.3g}" if row["seconds"] < 1000 else f"{row['seconds']:.0f}",
            *(_cell(row.get(name), factor, digits) for _, name, factor, digits in columns),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(value: Mapping[str, float | None] | None, factor: float, digits: int) -> str:
    if value is None or value["mean"] is None:
        return "undefined"
    text = f"{factor * value['mean']:.{digits}f}"
    spread = value["spread"]
    return text if spread is None or math.isnan(spread) else f"{text} ± {factor * spread:.{digits}f}"
