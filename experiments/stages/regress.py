"""Regression of numbers, such as an age, on a finished run's latents, beside PCA of equal size and the signals."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from experiments.runtime.progress import Progress, log
from experiments.runtime.run import Run
from experiments.runtime.run_directory import RunError, write_json
from experiments.stages.features import (
    FEATURES,
    digest,
    matching_latents,
    mean_and_spread,
    require_distinct,
    vectors,
)
from experiments.stages.kept_rows import KeptRows
from medfuncta_jax.atomic import atomic_path
from medfuncta_jax.datasets import Dataset
from medfuncta_jax.datasets.dataset import SPLITS
from medfuncta_jax.datasets.label_table import read_numbers
from medfuncta_jax.number_regression import NumberFit, fit_number_mlp, fit_ridge
from medfuncta_jax.settings import MlpSettings, SettingsError

JSON_FILE, TABLE_FILE, ROWS_FILE = "regression.json", "regression.md", "regression.rows.json"


@dataclass(frozen=True)
class RegressSettings(MlpSettings):
    """Regression of numbers, such as an age, on a finished run's latents (--mode=regress), beside PCA and raw values.

    Attributes: beside those of `MlpSettings`,
      column: the table's column of numbers.
      table: CSV or TSV, relative to the data directory; "" is that of `data.labels`.
      models: "ridge" (linear, with the best penalty on validation) and "mlp".
      features: "latents", "metric", "pca" and "values", as in `ClassifySettings`.
      penalties: > 0, penalties of ridge, for features and numbers of unit variance.
      seeds: repetitions of the MLP: seeds `seed`, `seed` + 1 and so on.
    """

    epochs: int = 100
    hidden: tuple[int, ...] = (256, 64)
    column: str = ""
    table: str = ""
    models: tuple[Literal["ridge", "mlp"], ...] = ("ridge", "mlp")
    features: tuple[Literal["latents", "metric", "pca", "values"], ...] = ("latents", "pca", "values")
    penalties: tuple[float, ...] = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
    seeds: int = 3

    def __post_init__(self):
        super().__post_init__()
        for name in ("models", "features", "penalties"):
            require_distinct(name, getattr(self, name))
        if not min(self.penalties) > 0:
            raise SettingsError(f"penalties must be above 0, got {self.penalties}")
        if self.seeds < 1:
            raise SettingsError(f"seeds must be at least 1, got {self.seeds}")


def regress(run: Run) -> dict[str, Any]:
    """Write `regression.json` and `regression.md`: R2 and mean absolute error on the test split; returns the first.

    Everything is trained on the training split, chosen on validation and scored once, on test. Signals without a number
    are left out, except that PCA, like the field, uses all training signals. The first row predicts the mean of
    training. Each row is kept when it is done.

    Raises:
      SettingsError: no column or no table is named.
      DataError: a table that cannot be used, or cells that are no numbers.
      RunError: latents of other data, or a split without numbers.
      CheckpointError, LatentStoreError: no field, no latents, latents that are incomplete or of another field.
      Interrupted: a stop was asked for; finished rows are kept.
    """
    began, settings, dataset = time.monotonic(), run.settings, run.dataset
    ours = settings.regress
    table = table_of(run)
    latents = matching_latents(run)
    rows, numbers = numbers_of(table, ours.column, dataset)
    folder = run.directory.results("regress")
    kept = KeptRows(folder / ROWS_FILE, {
        "latents": digest(*(np.asarray(latents[name].latents) for name in SPLITS)),
        "numbers": digest(*numbers.values(), *rows.values()),
        "settings": json.loads(json.dumps({"regress": asdict(ours), "seed": settings.seed})),
    })  # fmt: skip
    fits = len(ours.features) * (("ridge" in ours.models) + ours.seeds * ("mlp" in ours.models))
    with Progress("regress", total=fits, unit="regressions") as progress:

        def may_stop() -> None:
            run.stop.check(f"finished rows are in {kept.path}")

        @functools.lru_cache(maxsize=1)
        def of_kind(kind: str) -> list[np.ndarray]:
            said: list[str] = []
            found = vectors(kind, run, latents, said)
            kept.notes[kind] = said
            return [found[name][rows[name]] for name in SPLITS]

        def row(kind: str, make: Callable[[int], NumberFit], seeds: int) -> dict[str, Any]:
            test, began, results = of_kind(kind)[2], time.monotonic(), []
            for seed in range(settings.seed, settings.seed + seeds):
                fit = make(seed)
                results.append(scores(numbers["test"], fit.predict(test)) | {"val_error": fit.val_error})
                progress.advance()
                may_stop()
            return {
                "features": FEATURES[kind],
                "parameters": fit.parameters,
                "seeds": seeds,
                "seconds": round((time.monotonic() - began) / seeds, 3),
                **{name: mean_and_spread([result[name] for result in results]) for name in results[0]},
            }

        def ridge(kind: str, seed: int) -> NumberFit:
            train, val, _ = of_kind(kind)
            return fit_ridge(train, numbers["train"], val, numbers["val"], penalties=ours.penalties)

        def mlp(kind: str, seed: int) -> NumberFit:
            train, val, _ = of_kind(kind)
            return fit_number_mlp(
                train, numbers["train"], val, numbers["val"],
                key=jax.random.key(seed), settings=ours, after_epoch=lambda error: may_stop(),
            )  # fmt: skip

        made = {"ridge": (ridge, 1, "ridge"), "mlp": (mlp, ours.seeds, "MLP")}
        results = [{"model": "mean of training", "features": "none", "parameters": 1, "seeds": 1, "seconds": 0.0} | {
            name: mean_and_spread([value])
            for name, value in scores(numbers["test"], np.full(len(numbers["test"]), numbers["train"].mean())).items()
        }]  # fmt: skip
        for kind in ours.features:
            for model in ours.models:
                fit, seeds, title = made[model]
                name = f"{title}, {kind}"
                if name in kept.rows:
                    progress.advance(seeds)
                else:
                    kept.add(name, {"model": title} | row(kind, functools.partial(fit, kind), seeds))
                results.append(kept.rows[name])
    result = {
        "data": dataset.about.get("title", dataset.name),
        "column": ours.column,
        "table": table.name,
        "signals": {name: len(chosen) for name, chosen in rows.items()},
        "test": {"mean": float(numbers["test"].mean()), "sd": float(numbers["test"].std())},
        "latent_dim": settings.model.latent_dim,
        "field_sha256": latents["test"].about["field_sha256"],
        "settings": asdict(ours),
        "seed": settings.seed,
        "notes": [note for kind in ours.features for note in kept.notes.get(kind, [])],
        "rows": results,
    }
    write_json(folder / JSON_FILE, result)
    markdown = as_markdown(result)
    with atomic_path(folder / TABLE_FILE) as partial:
        partial.write_text(markdown)
    run.directory.set_seconds("regress", time.monotonic() - began)
    log.info("regression in %s:\n%s", folder / TABLE_FILE, markdown)
    return result


def table_of(run: Run) -> Path:
    """The table with the numbers.

    Raises:
      SettingsError: none is named, or no column.
    """
    settings = run.settings
    name = settings.regress.table or str(dict(settings.data.options).get("labels", ""))
    if not settings.regress.column:
        raise SettingsError("regress.column names no column of numbers; e.g. --config.regress.column=AGE")
    if not name:
        raise SettingsError("regress.table names no table; e.g. --config.regress.table=participants.csv")
    return Path(run.data_dir or ".").expanduser().absolute() / Path(name).expanduser()


def numbers_of(table: Path, column: str, dataset: Dataset) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The rows of signals with a number, and the numbers, float64, by split.

    Raises:
      DataError: as `label_table.read_numbers`.
      RunError: a split without, or with a single one where more are needed.
    """
    ids = {name: dataset.splits[name].annotations().ids for name in SPLITS}
    known = read_numbers(table, [one for name in SPLITS for one in ids[name]], column=column)
    rows = {name: np.flatnonzero([one in known for one in ids[name]]) for name in SPLITS}
    for name, least in (("train", 2), ("val", 1), ("test", 1)):
        if len(rows[name]) < least:
            raise RunError(f"{table}: {len(rows[name])} signals of the {name} split have a number, {least} are needed")
        absent = len(ids[name]) - len(rows[name])
        if absent:
            log.warning("regress: %d of %d %s signals have no number and are left out", absent, len(ids[name]), name)
    return rows, {name: np.array([known[ids[name][i]] for i in rows[name]]) for name in SPLITS}


def scores(numbers: np.ndarray, predicted: np.ndarray) -> dict[str, float | None]:
    """R2 (1 is perfect, 0 is the mean of these numbers; None where they do not vary) and mean absolute error."""
    total = float(np.sum((numbers - numbers.mean()) ** 2))
    r2 = 1 - float(np.sum((numbers - predicted) ** 2)) / total if total > 0 else None
    return {"r2": r2, "mean_absolute_error": float(np.mean(np.abs(numbers - predicted)))}


def as_markdown(result: Mapping[str, Any]) -> str:
    """The table; means and standard deviations over seeds."""
    signals = " / ".join(f"{count} {name}" for name, count in result["signals"].items())
    lines = [
        f"{result['data']}, {result['column']} of {result['table']}; {signals} signals; latents of "
        f"{result['latent_dim']}; scores of the test split, where it is {result['test']['mean']:.4g} ± "
        f"{result['test']['sd']:.3g}.",
        *result["notes"],
        "",
        "| model | features | parameters | seconds | R2 | mean absolute error |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        cells = [_cell(row[name]) for name in ("r2", "mean_absolute_error")]
        cells = [row["model"], row["features"], f"{row['parameters']:,}", f"{row['seconds']:.3g}", *cells]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(value: Mapping[str, float | None] | None) -> str:
    if value is None or value["mean"] is None:
        return "undefined"
    return f"{value['mean']:.3f}" + ("" if value["spread"] is None else f" ± {value['spread']:.3f}")
