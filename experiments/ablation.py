"""A grid of runs of the launcher over several seeds, with an equal budget: the paper's comparisons as one command each.

    python -m experiments.ablation --table=methods --preset=cpu --workdir=runs/methods --data_dir=DIR --seconds=300
    python -m experiments.ablation --table=omega --preset=paper --workdir=DIR --data_dir=DIR --shard=3 --shards=25

Every cell is first measured alone (seconds and memory of an update): one that does not fit in memory is skipped, and
with --seconds the steps of a cell are what it makes in that time. Then its seeds are trained, fitted and evaluated, in
WORKDIR/CELL/seed-S. A cell that fails is listed and ends nothing. The same command goes on where it was, also after
Ctrl-C or SIGTERM (exit code 75); the shards of a job array share one WORKDIR. Writes table.json, table.md, table.png,
and, for methods and components, learning.png.
"""

from __future__ import annotations

import ast
import functools
import itertools
import json
import logging
import multiprocessing
import os
import queue
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

from experiments import benchmark, figures
from experiments.interruption import EXIT_INTERRUPTED, Interrupted, StopRequest
from experiments.run_directory import RunError, write_json
from medfuncta_jax.atomic import atomic_path
from medfuncta_jax.datasets import DataError, open_dataset
from medfuncta_jax.settings import DataSettings, Settings, SettingsError

log = logging.getLogger("medfuncta")

_ROOT = Path(__file__).parents[1]
_OURS = "baselines.medfuncta"
_VALIDATIONS = 10
METHODS = (
    "functa", "coinpp", "spatial_functa", "coinpp_patched", "first_order_maml", "autodecoder", "medfuncta",
)  # fmt: skip
# Without the reduced context; by the preset's size, as an override may be.
_HALF_BATCH = {"paper": 12, "cpu": 4}
# What each part of the recipe brings back, of those that the baseline of the paper's table 5 has off.
_OFF: dict[str, dict[str, Any]] = {
    "omega_schedule": {"model.omega_last": 20.0},  # = omega_first
    "cosine": {"train.schedule": "constant"},
    "reduced_context": {"inner.selection_ratio": 1.0, "train.batch_size": _HALF_BATCH},
}
COMPONENTS = ("baseline", *_OFF, "all")
# Test set, table 5 and table 4 (MedFuncta, MIDL 2026): mean PSNR in dB.
_PUBLISHED: dict[str, dict[Any, float]] = {
    "methods": {
        "functa": 34.304, "coinpp": 34.566, "spatial_functa": 32.782, "coinpp_patched": 38.477, "medfuncta": 40.719
    },
    "components": {
        "baseline": 37.836, "cosine": 38.282, "omega_schedule": 39.684, "reduced_context": 37.338, "all": 40.719
    },
    "selection_ratio": {0.1: 34.33, 0.25: 35.62, 0.5: 36.22, 0.75: 36.53, 1.0: 36.60},
}  # fmt: skip

_TITLES = {
    "functa": "Functa", "coinpp": "COIN++", "spatial_functa": "Spatial Functa", "coinpp_patched": "COIN++, patches",
    "first_order_maml": "first-order MAML", "autodecoder": "auto-decoder", "medfuncta": "MedFuncta",
    "baseline": "constant omega", "omega_schedule": "+ omega schedule", "cosine": "+ cosine", "all": "+ all",
    "reduced_context": "+ reduced context",
}  # fmt: skip

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """A grid of cells.

    Attributes:
      axes: name to the values of the presets, those of "cpu" for every "cpu_..."; every combination is a cell.
      cell: values along the axes to a config and overrides of it, a value for all presets or one for each size.
      steps: meta-updates in the paper, where they are not those of the config.
      fit_steps: numbers of test-time steps that every cell is also evaluated at.
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


def _along(field: str) -> Callable[[Values], tuple[str, Values]]:
    """Ours with one setting changed, which has the axis' name."""
    return lambda values: (_OURS, {field: values[field.partition(".")[2]]})


TABLES = {
    "methods": Table({"method": _both(*METHODS)}, lambda values: (f"baselines.{values['method']}", {})),
    "components": Table({"component": _both(*COMPONENTS)}, _component),
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
    """One place of a grid: where it is, what its runs are made of, and the shape of its signals."""

    values: Values
    case: benchmark.Case
    overrides: tuple[str, ...]
    settings: Settings


def folder_name(values: Values) -> str:
    """Of a cell."""
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
    chosen = {field: value[size] if isinstance(value, dict) else value for field, value in changes.items()}
    overrides = (*(f"{field}={value}" for field, value in chosen.items()), *common)
    settings = benchmark.settings_of(benchmark.Case(config, ()), list(overrides), None)
    grid, channels = _shape(settings.data, data_dir)
    return Cell(values, benchmark.Case(config, grid, channels), overrides, settings)


@functools.lru_cache
def _shape(data: DataSettings, data_dir: str | None) -> tuple[tuple[int, ...], int]:
    """Of the signals, and channels; the same for most cells."""
    dataset = open_dataset(data, data_dir=data_dir)
    return dataset.grid, dataset.channels


def budget(cell: Cell, steps: int) -> tuple[str, ...]:
    """Overrides for a number of steps, with warm-up in proportion and ten validations."""
    train = cell.settings.train
    if steps == train.steps:
        return ()
    warmup = round(train.warmup_steps * steps / train.steps)
    return (f"train.steps={steps}", f"train.warmup_steps={warmup}", f"train.eval_every={-(-steps // _VALIDATIONS)}")


def _measured(cell: Cell, place: Path, device: str | None) -> dict[str, Any]:
    """Seconds and memory of an update, once for all seeds, in a process of its own; `error` says why there are none."""
    file = place / "measured.json"
    if file.exists():
        return json.loads(file.read_text())
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=_use_device, initargs=(device,)) as pool:
        try:
            row = pool.submit(benchmark.measure, cell.case, cell.settings, mode="train", repeats=5).result()
        except BrokenProcessPool:
            return {"error": "does not fit in memory: its process was killed", "status": "skipped"}
        except RunError as error:
            return {"error": str(error), "status": "skipped"}
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            return {"error": reason, "status": "skipped" if "RESOURCE_EXHAUSTED" in reason else "failed"}
        except (SettingsError, ValueError) as error:
            return {"error": str(error), "status": "failed"}
    write_json(file, row)
    return row


def _use_device(device: str | None) -> None:
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device


def _run(
    cell: Cell, place: Path, seed: int, extra: Sequence[str], table: Table, data_dir: str | None, device: str | None,
    stop: StopRequest,
) -> dict[str, Any]:  # fmt: skip
    """One seed of one cell to its end; its outcome is kept beside it.

    Raises:
      Interrupted: a stop was asked for, and passed on to the launcher.
    """
    run = place / f"seed-{seed}"
    name, _, variant = cell.case.config.partition(":")
    config = f"configs/{name.replace('.', '/')}.py" + (f":{variant}" if variant else "")
    stages = ["all"]
    curves = []
    if table.fit_steps:
        stages.append("curves")
        curves = [
            f"curves.steps={table.fit_steps}",
            "curves.fractions=(1.0,)",
            "curves.scales=()",
            "curves.signals=256",
        ]
    words = [f"--config={config}", f"--workdir={run}", f"--config.seed={seed}"]
    words += [f"--data_dir={Path(data_dir).absolute()}"] if data_dir else []
    own = (*extra, *curves, "extract.splits=('test',)")
    words += [f"--config.{override}" for override in (*cell.overrides, *own)]
    for stage in stages:
        stop.check(f"what was finished is in {place}")
        place.mkdir(parents=True, exist_ok=True)
        with open(place / f"seed-{seed}.log", "a") as output:
            child = subprocess.Popen(
                [sys.executable, "-m", "experiments.main", f"--mode={stage}", *words],
                cwd=_ROOT, stdout=output, stderr=output, start_new_session=True,  # so that a Ctrl-C reaches it once
                env=os.environ if device is None else {**os.environ, "CUDA_VISIBLE_DEVICES": device},
            )  # fmt: skip
            told = False
            while child.poll() is None:
                try:
                    child.wait(0.5)
                except subprocess.TimeoutExpired:
                    if stop and not told:
                        child.send_signal(signal.SIGTERM)
                        told = True
        if child.returncode:
            stop.check(f"what was finished is in {place}")  # it ended because it was told to, early or late
            outcome = {"status": "failed", "reason": _last_line(place / f"seed-{seed}.log", child.returncode)}
            if "collapsed to" in outcome["reason"] or "not finite" in outcome["reason"]:
                outcome["status"] = "collapsed"  # a result: it would come again
            write_json(place / f"seed-{seed}.json", outcome)
            return outcome
    outcome = _outcome(run, table)
    write_json(place / f"seed-{seed}.json", outcome)
    return outcome


def _last_line(file: Path, code: int) -> str:
    lines = file.read_text(errors="replace").replace("\r", "\n").strip().splitlines()
    return (lines[-1].removeprefix("error: ") if lines else "") or f"the launcher ended with code {code}"


def _outcome(run: Path, table: Table) -> dict[str, Any]:
    """What a finished run gives to the table."""
    evaluation = json.loads((run / "evaluation.json").read_text())
    metrics = {
        name: evaluation["test"][name] for name in ("mse", "psnr", "ssim", "lpips") if name in evaluation["test"]
    }
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    learning = {record["step"]: record["val_psnr"] for record in records if "val_psnr" in record}
    outcome = {
        "status": "done",
        **metrics,
        "train_seconds": evaluation["seconds"]["train"],
        "learning": [[step, psnr] for step, psnr in sorted(learning.items())],
    }
    if table.fit_steps:
        points = json.loads((run / "curves.json").read_text())["steps"]
        outcome["by_fit_steps"] = {str(p["steps"]): {m: p["field"][m] for m in ("psnr", "ssim")} for p in points}
    return outcome


def read_rows(grid: Sequence[Values], seeds: int, workdir: Path) -> list[dict[str, Any]]:
    """A row for each cell, from the files in its folder: values, what was measured, and each seed's outcome."""
    rows = []
    for values in grid:
        place = workdir / folder_name(values)
        row: dict[str, Any] = {"values": dict(values), "seeds": []}
        for name in ("measured", "refused"):
            if (place / f"{name}.json").exists():
                row[name] = json.loads((place / f"{name}.json").read_text())
        for seed in range(seeds):
            file = place / f"seed-{seed}.json"
            outcome = json.loads(file.read_text()) if file.exists() else {"status": "missing"}
            row["seeds"].append({"seed": seed, **row.get("refused", outcome)})
        done = [outcome for outcome in row["seeds"] if outcome["status"] == "done"]
        row["done"] = len(done)
        for name in ("mse", "psnr", "ssim", "lpips", "train_seconds"):
            found = [outcome[name] for outcome in done if name in outcome]
            if found:
                row[name] = {"mean": float(np.mean(found)), "std": float(np.std(found, ddof=1)) if found[1:] else None}
        rows.append(row)
    return rows


def as_markdown(rows: Sequence[Mapping[str, Any]], title: str, published: Mapping[Any, float]) -> str:
    """The rows as Markdown: means over seeds, with their standard deviation."""

    def spread(row: Mapping[str, Any], name: str, digits: int, factor: float = 1.0) -> str:
        if name not in row:
            return ""
        mean, std = row[name]["mean"] * factor, row[name]["std"]
        return f"{mean:.{digits}f}" + ("" if std is None else f" ± {std * factor:.{digits}f}")

    axes = list(rows[0]["values"])
    head = [*axes, "parameters", "memory", "s / 100 updates", "updates", "training s"]
    head += ["MSE x 1e3", "PSNR dB", "SSIM", "LPIPS"]
    head += ["published PSNR"] if published else []
    lines = [title, "", "| " + " | ".join([*head, "seeds"]) + " |", "|---" * (len(head) + 1) + "|"]
    for row in rows:
        measured = row.get("measured", {})
        texts = [str(value) for value in row["values"].values()]
        texts += [f"{measured['parameters'] / 1e6:.2f}e6", _size(_memory_gb(measured))] if measured else ["", ""]
        texts += [f"{100 * measured['best_s']:.1f}" if measured else "", str(measured.get("steps", ""))]
        texts += [
            spread(row, "train_seconds", 0),
            spread(row, "mse", 3, 1e3),
            spread(row, "psnr", 2),
            spread(row, "ssim", 4),
            spread(row, "lpips", 3),
        ]
        texts += [f"{published.get(next(iter(row['values'].values())), '')}"] if published else []
        states: dict[str, list[int]] = {}
        for outcome in row["seeds"]:
            if outcome["status"] != "done":
                states.setdefault(f"{outcome['status']}: {outcome.get('reason', 'not run')}", []).append(
                    outcome["seed"]
                )
        notes = [f"{row['done']} of {len(row['seeds'])}", *(f"{', '.join(map(str, s))} {t}" for t, s in states.items())]
        lines.append("| " + " | ".join([*texts, "; ".join(notes).replace("|", "/")]) + " |")
    fits = [row for row in rows if any("by_fit_steps" in outcome for outcome in row["seeds"])]
    if fits:
        steps = list(next(o["by_fit_steps"] for o in fits[0]["seeds"] if "by_fit_steps" in o))
        lines += ["", "PSNR dB at H test-time steps", "", f"| {axes[0]} | " + " | ".join(steps) + " |"]
        lines.append("|---" * (len(steps) + 1) + "|")
        for row in fits:
            done = [o["by_fit_steps"] for o in row["seeds"] if "by_fit_steps" in o]
            means = [f"{np.mean([one[h]['psnr'] for one in done]):.2f}" for h in steps]
            lines.append(f"| {row['values'][axes[0]]} | " + " | ".join(means) + " |")
    return "\n".join(lines) + "\n"


def _size(gb: float) -> str:
    return f"{gb:.2f} GB" if gb >= 0.1 else f"{1e3 * gb:.0f} MB"


def _memory_gb(measured: Mapping[str, Any]) -> float:
    """Of one update: the compiled program's temporaries."""
    return (measured.get("temp_bytes") or 0) / 1e9


def _name(value: Any) -> str:
    return _TITLES.get(str(value), str(value).replace("_", " "))


def draw(path: Path, table: str, rows: Sequence[Mapping[str, Any]]) -> bool:
    """The table's figure, where any seed of it is done; says whether it was drawn."""

    def of(row: Mapping[str, Any], name: str) -> list[Any]:
        return [outcome[name] for outcome in row["seeds"] if outcome["status"] == "done"]

    if not any(row["done"] for row in rows):
        return False
    axes = list(rows[0]["values"])
    names = [_name(row["values"][axes[0]]) for row in rows]
    if table in ("methods", "components"):
        figures.draw_ranking(path, names, {"PSNR (dB)": [of(row, "psnr") for row in rows],
                                           "SSIM": [of(row, "ssim") for row in rows]})  # fmt: skip
    elif table == "omega":
        across, down = (list(dict.fromkeys(row["values"][axis] for row in rows)) for axis in axes)
        means = np.full((len(down), len(across)), np.nan)
        collapsed = np.zeros(means.shape, bool)
        for row in rows:
            at = down.index(row["values"][axes[1]]), across.index(row["values"][axes[0]])
            means[at] = row["psnr"]["mean"] if row["done"] else np.nan
            collapsed[at] = any(outcome["status"] == "collapsed" for outcome in row["seeds"])
        labels = ("first frequency $\\omega_1$", "$\\delta = \\omega_K / \\omega_1$")
        figures.draw_heat_map(path, means, collapsed, ticks=(across, down), labels=labels, unit="PSNR (dB)")
    elif table == "inner_steps":
        steps = list(next(o["by_fit_steps"] for row in rows for o in row["seeds"] if "by_fit_steps" in o))
        panels = {
            unit: {
                f"G = {name}": [[fit[h][metric] for fit in of(row, "by_fit_steps")] for h in steps]
                for name, row in zip(names, rows, strict=True)
                if row["done"]
            }
            for unit, metric in (("PSNR (dB)", "psnr"), ("SSIM", "ssim"))
        }
        figures.draw_sweep(path, panels, ticks=steps, label="test-time steps H")
    else:
        panels = {
            unit: {"": [of(row, name) for row in rows]} for unit, name in (("PSNR (dB)", "psnr"), ("SSIM", "ssim"))
        }
        measured = [row.get("measured") for row in rows]
        if table == "selection_ratio":
            panels["memory (GB)"] = {"": [[_memory_gb(m)] if m else [] for m in measured]}
            panels["s / 100 updates"] = {"": [[100 * m["best_s"]] if m else [] for m in measured]}
        labels_of = {
            "selection_ratio": "selection ratio $\\gamma$",
            "layers": "layers K",
            "latent_dim": "latent entries P",
        }
        figures.draw_sweep(path, panels, ticks=names, label=labels_of[axes[0]])
    return True


def draw_learning(path: Path, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Validation PSNR of every cell as its budget is used up, where any seed of it is done; says whether drawn."""
    finished = {
        _name(next(iter(row["values"].values()))): [
            [psnr for _, psnr in outcome["learning"]] for outcome in row["seeds"] if outcome.get("learning")
        ]
        for row in rows
        if row["done"]
    }
    if not any(finished.values()):
        return False
    count = max(len(curve) for curves in finished.values() for curve in curves)
    by_part = {
        name: [[curve[i] for curve in curves if i < len(curve)] for i in range(count)]
        for name, curves in finished.items()
    }
    ticks = [f"{(i + 1) / count:.0%}" for i in range(count)]
    figures.draw_sweep(path, {"validation PSNR (dB)": by_part}, ticks=ticks, label="part of the updates")
    return True


def define_flags() -> None:
    """The command's flags; not at import, so that tests may import this beside other commands."""
    flags.DEFINE_enum("table", None, list(TABLES), "What to compare.", required=True)
    flags.DEFINE_enum(
        "preset", "cpu", ["paper", "cpu", "cpu_1d"], "Sizes and data: the paper's, or for two cores (1D: ECG)."
    )
    flags.DEFINE_string("workdir", None, "Folder for runs and table.", required=True)
    flags.DEFINE_string("data_dir", None, "Folder with the source's files.")
    flags.DEFINE_integer("seeds", 3, "Seeds 0, 1, ... of every cell.", lower_bound=1)
    flags.DEFINE_integer(
        "steps", None, "Meta-updates of every cell; by default the paper's or the config's.", lower_bound=1
    )
    flags.DEFINE_float(
        "seconds", None, "Instead: each cell makes the updates that it makes in this time.", lower_bound=1
    )
    flags.DEFINE_multi_string("axis", [], "Other values along an axis: NAME=V1,V2; may be repeated.")
    flags.DEFINE_list("set", [], "Overrides of every cell, GROUP.FIELD=VALUE.")
    flags.DEFINE_list("devices", [], "GPUs by number, a run on each at once; by default one run at a time.")
    flags.DEFINE_integer("shard", 0, "This job's number, from 0.", lower_bound=0)
    flags.DEFINE_integer("shards", 1, "Jobs that share the runs.", lower_bound=1)


def _axes_of(words: Sequence[str]) -> dict[str, list[Any]]:
    axes = {}
    for word in words:
        name, separator, text = word.partition("=")
        if not separator:
            raise ValueError(f"{word!r} is not NAME=V1,V2")
        axes[name] = [_literal(value.strip()) for value in text.split(",")]
    return axes


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def main(argv: list[str]) -> None:
    """Flags in, table out."""
    del argv
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True)
    logging.getLogger().setLevel(logging.WARNING)  # app.run lets every library's INFO through
    log.setLevel(logging.INFO)
    options = flags.FLAGS
    table = TABLES[options.table]
    if options.steps and options.seconds:
        raise app.UsageError("--steps and --seconds exclude each other; give one of them")
    if options.shard >= options.shards:
        raise app.UsageError(f"--shard must be 0 to {options.shards - 1} (shards - 1), got {options.shard}")
    try:
        grid = grid_of(table, options.preset, _axes_of(options.axis))
        # What is wrong for all cells, so without what makes one of them.
        bare = replace(table, cell=lambda values: (table.cell(values)[0], {}))
        make_cell(bare, grid[0], options.preset, options.set, options.data_dir)
    except (ValueError, SettingsError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    workdir = Path(options.workdir).absolute()
    steps = options.steps or (table.steps if options.preset == "paper" else None)
    try:
        with StopRequest() as stop:
            _run_grid(table, grid, workdir, steps, stop)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except Interrupted as interrupted:
        log.warning("%s", interrupted)
        _write(options.table, options.preset, grid, options.seeds, workdir)
        sys.exit(EXIT_INTERRUPTED)
    rows = _write(options.table, options.preset, grid, options.seeds, workdir)
    print((workdir / "table.md").read_text())
    own = [outcome["status"] for row in rows for outcome in row["seeds"]]
    sys.exit("failed" in own or (options.shards == 1 and "missing" in own))


def _run_grid(table: Table, grid: Sequence[Values], workdir: Path, steps: int | None, stop: StopRequest) -> None:
    """The cells of this job, all seeds of each, and the table anew after every run.

    Raises:
      RunError: cells were made with another number of steps.
      Interrupted: a stop was asked for.
    """
    options = flags.FLAGS
    ready: list[tuple[Cell, Path, tuple[str, ...]]] = []
    for values in grid[options.shard :: options.shards]:
        stop.check(f"what was finished is in {workdir}")
        place = workdir / folder_name(values)
        (place / "refused.json").unlink(missing_ok=True)
        try:
            cell = make_cell(table, values, options.preset, options.set, options.data_dir)
            measured = _measured(cell, place, next(iter(options.devices), None))
        except (ValueError, SettingsError, DataError) as error:
            measured = {"status": "failed", "error": str(error)}
        if "error" in measured:
            log.info("%s: %s: %s", place.name, measured["status"], measured["error"])
            write_json(place / "refused.json", {"status": measured["status"], "reason": measured["error"]})
            continue
        asked = steps or cell.settings.train.steps
        if options.seconds:  # what was measured first counts, so that all seeds have the same
            asked = measured.get("steps", max(1, int(options.seconds / measured["best_s"])))
        if measured.setdefault("steps", asked) != asked:
            raise RunError(f"{place} was made with {measured['steps']} steps, not {asked}; name another --workdir")
        write_json(place / "measured.json", measured)
        log.info("%s: %.3g s an update, %d updates", place.name, measured["best_s"], measured["steps"])
        ready.append((cell, place, budget(cell, measured["steps"])))

    devices: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    for device in options.devices or [None]:
        devices.put(device)

    def work(cell: Cell, place: Path, extra: tuple[str, ...], seed: int) -> str:
        device = devices.get()
        try:
            outcome = _run(cell, place, seed, extra, table, options.data_dir, device, stop)
        finally:
            devices.put(device)
        said = (
            f"{outcome['psnr']:.2f} dB" if outcome["status"] == "done" else f"{outcome['status']}: {outcome['reason']}"
        )
        return f"{place.name}, seed {seed}: {said}"

    with ThreadPoolExecutor(max(1, len(options.devices))) as pool:
        jobs = [
            pool.submit(work, cell, place, extra, seed)
            for seed, (cell, place, extra) in itertools.product(range(options.seeds), ready)
            if not _is_over(place / f"seed-{seed}.json")
        ]
        for job in as_completed(jobs):
            log.info("%s", job.result())
            _write(options.table, options.preset, grid, options.seeds, workdir)


def _is_over(outcome: Path) -> bool:
    """Whether there is nothing left to do; what failed is tried again, a collapse would come again."""
    return outcome.exists() and json.loads(outcome.read_text())["status"] in ("done", "collapsed")


def _write(name: str, preset: str, grid: Sequence[Values], seeds: int, workdir: Path) -> list[dict[str, Any]]:
    rows = read_rows(grid, seeds, workdir)
    write_json(workdir / "table.json", {"table": name, "preset": preset, "rows": rows})
    title = f"{name}, preset {preset}: mean ± standard deviation over seeds, test set"
    with atomic_path(workdir / "table.md") as partial:
        partial.write_text(as_markdown(rows, title, _PUBLISHED.get(name, {}) if preset == "paper" else {}))
    draw(workdir / "table.png", name, rows)
    if name in ("methods", "components"):
        draw_learning(workdir / "learning.png", rows)
    return rows


if __name__ == "__main__":
    define_flags()
    app.run(main)
