"""The cells of a table: axes, values, and the config and overrides of each cell."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.tools.cases import Case, settings_of
from medfuncta_jax.datasets import open_dataset
from medfuncta_jax.settings import DataSettings, Settings

_OURS = "baselines.medfuncta"
_VALIDATIONS = 10
METHODS = (
    "functa", "coinpp", "spatial_functa", "coinpp_patched", "first_order_maml", "autodecoder", "medfuncta",
)  # fmt: skip
# The batch without the reduced context, by the preset's size.
_HALF_BATCH = {"paper": 12, "cpu": 4}
# Overrides that turn off each part of the recipe, as in the baseline of the paper's table 5.
_OFF: dict[str, dict[str, Any]] = {
    "omega_schedule": {"model.omega_last": 20.0},  # = omega_first
    "cosine": {"train.schedule": "constant"},
    "reduced_context": {"inner.selection_ratio": 1.0, "train.batch_size": _HALF_BATCH},
}
COMPONENTS = ("baseline", *_OFF, "all")
# Options without gain in the paper. A pyramid has no residual connections, so the table has ours without them too.
_OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "gradient_context": {"train.method": "gradient_contexts"},
    "contrastive": {"train.method": "contrastive"},
    "codebook": {"train.method": "codebook"},
    "no_residual": {"model.residual": False},
    "pyramid": {"train.method": "pyramid", "model.residual": False, "baselines.last_width": {"paper": 64, "cpu": 16}},
}
# Faster optimisers, a linear start and other training points, for the deep field and the recipe of one modulated layer.
_MUON = {"train.optimizer": "muon"}
_GAUSS_NEWTON = {"inner.gauss_newton_damping": 0.03, "train.learning_rate": 3e-4}
_IMPROVEMENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "deep": (_OURS, {}),
    "deep_muon": (_OURS, _MUON),
    "deep_step_sizes": (_OURS, {"inner.learned_step_size": "per_latent"}),
    "one_layer": ("baselines.one_layer", {}),
    "one_layer_muon": ("baselines.one_layer", _MUON),
    "one_layer_gauss_newton": ("baselines.one_layer", _GAUSS_NEWTON),
    "one_layer_both": ("baselines.one_layer", {**_MUON, **_GAUSS_NEWTON}),
    "one_layer_wide": ("baselines.one_layer", {"model.width": 1024}),
    # The start alone: its updates are those of the setting, whatever the budget.
    "one_layer_linear": (
        "baselines.one_layer",
        {"model.width": 1024, "train.start": "linear", "train.steps": 0, "inner.steps": 2, "fit.steps": 10},
    ),
    "one_layer_augmentation": ("baselines.one_layer", {"train.augmentation": 0.1}),
    "one_layer_off_grid": ("baselines.one_layer", {"train.off_grid": True}),
}
_ONE_LABEL = {"data.flag": {"paper": "pneumoniamnist"}}  # for the contrastive loss; cpu presets have one label

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """A grid of cells.

    Attributes:
      axes: name to the values of the presets, those of "cpu" for every "cpu_..."; every combination is a cell.
      cell: maps values along the axes to a config and its overrides, each one value for all presets or one for some
        sizes.
      steps: meta-updates in the paper, if the config has another number.
      fit_steps: further numbers of test-time steps for the evaluation of every cell.
    """

    axes: Mapping[str, Mapping[str, Sequence[Any]]]
    cell: Callable[[Values], tuple[str, Values]]
    steps: int | None = None
    fit_steps: tuple[int, ...] = ()


def _both(*values: Any) -> dict[str, Sequence[Any]]:
    return {"paper": values, "cpu": values}


def _component(values: Values) -> tuple[str, Values]:
    kept = set(_OFF) if values["component"] == "all" else {values["component"]}
    return _OURS, {field: value for name in _OFF if name not in kept for field, value in _OFF[name].items()}


def _option(values: Values) -> tuple[str, Values]:
    return _OURS, {**_ONE_LABEL, **_OPTIONS[values["option"]]}


def _along(field: str) -> Callable[[Values], tuple[str, Values]]:
    """Ours with one changed setting, named by the axis."""
    return lambda values: (_OURS, {field: values[field.partition(".")[2]]})


TABLES = {
    "methods": Table({"method": _both(*METHODS)}, lambda values: (f"baselines.{values['method']}", {})),
    "components": Table({"component": _both(*COMPONENTS)}, _component),
    "options": Table({"option": _both(*_OPTIONS)}, _option),
    "improvements": Table({"improvement": _both(*_IMPROVEMENTS)}, lambda values: _IMPROVEMENTS[values["improvement"]]),
    "selection_ratio": Table(
        {"selection_ratio": _both(0.1, 0.25, 0.5, 0.75, 1.0)},
        lambda values: (_OURS, {"inner.selection_ratio": values["selection_ratio"], "train.batch_size": _HALF_BATCH}),
        steps=100_000,
    ),
    "omega": Table(
        {"omega_first": _both(10, 20, 30, 40, 50), "delta": _both(1, 2, 5, 10, 20)},
        lambda values: (
            _OURS,
            {
                "model.omega_first": float(values["omega_first"]),
                "model.omega_last": float(values["omega_first"] * values["delta"]),
            },
        ),
        steps=25_000,
    ),
    "inner_steps": Table(
        {"inner_steps": _both(1, 3, 5, 10)},
        lambda values: (_OURS, {"inner.steps": values["inner_steps"]}),
        fit_steps=(1, 3, 10, 20, 50, 100),
    ),
    "depth": Table({"layers": {"paper": (5, 10, 15, 20), "cpu": (3, 4, 5, 7)}}, _along("model.layers")),
    "latent_dim": Table(
        {"latent_dim": {"paper": (256, 512, 1024, 2048, 4096), "cpu": (32, 64, 128, 256, 512)}},
        _along("model.latent_dim"),
    ),
}


@dataclass(frozen=True)
class Cell:
    """One cell of a grid: its values, the arguments of its runs, and the shape of its signals."""

    values: Values
    case: Case
    overrides: tuple[str, ...]
    settings: Settings


def folder_name(values: Values) -> str:
    """The folder of a cell."""
    return ",".join(f"{axis}={value}" for axis, value in values.items())


def grid_of(table: Table, preset: str, changed: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """The values of every cell, the last axis running fastest.

    Args:
      table, preset: see `Table`.
      changed: axes with other values than the preset's.
    Raises:
      ValueError: an axis that the table does not have, or one without values, or with one twice.
    """
    unknown = sorted(set(changed) - set(table.axes))
    if unknown:
        raise ValueError(f"no axis {unknown[0]!r} in this table; known: {', '.join(table.axes)}")
    size = preset.partition("_")[0]
    axes = {name: tuple(changed.get(name, presets[size])) for name, presets in table.axes.items()}
    for name, values in axes.items():
        if not values or "" in values:
            raise ValueError(f"axis {name!r} is empty; give it values, e.g. --axis={name}={table.axes[name][size][0]}")
        if len(set(values)) < len(values):
            raise ValueError(f"axis {name!r} names a value twice: {', '.join(map(str, values))}")
        known = table.axes[name][size]
        wrong = [value for value in values if isinstance(value, str) != isinstance(known[0], str)]
        wrong += [value for value in values if isinstance(known[0], str) and value not in known]
        if wrong:
            raise ValueError(f"axis {name!r} has no value {wrong[0]!r}; e.g. {', '.join(map(str, known))}")
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def make_cell(table: Table, values: Values, preset: str, common: Sequence[str], data_dir: str | None) -> Cell:
    """A cell with its settings, checked, and the shape of its data.

    Raises:
      ValueError, SettingsError, DataError: an override or a value that no setting takes, or data that are not there.
    """
    config, changes = table.cell(values)
    config = config if preset == "paper" else f"{config}:{preset}"
    size = preset.partition("_")[0]
    by_size = {field: value if isinstance(value, dict) else {size: value} for field, value in changes.items()}
    chosen = {field: value[size] for field, value in by_size.items() if size in value}
    overrides = (*(f"{field}={value}" for field, value in chosen.items()), *common)
    settings = settings_of(Case(config, ()), list(overrides), None)
    grid, channels = _shape(settings.data, data_dir)
    return Cell(values, Case(config, grid, channels), overrides, settings)


@functools.lru_cache
def _shape(data: DataSettings, data_dir: str | None) -> tuple[tuple[int, ...], int]:
    """Grid and channels of the signals; the same for most cells."""
    dataset = open_dataset(data, data_dir=data_dir)
    return dataset.grid, dataset.channels


def budget(cell: Cell, steps: int) -> tuple[str, ...]:
    """Overrides for a number of steps, with warm-up in proportion and ten validations; none for a start alone."""
    train = cell.settings.train
    if steps == train.steps or train.steps == 0:
        return ()
    warmup = round(train.warmup_steps * steps / train.steps)
    return (f"train.steps={steps}", f"train.warmup_steps={warmup}", f"train.eval_every={-(-steps // _VALIDATIONS)}")
