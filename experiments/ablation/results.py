"""Results from the files of finished runs: rows, Markdown, figures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import figures
from experiments.ablation.grid import Values, folder_name
from experiments.runtime.run_directory import write_json
from medfuncta_jax.atomic import atomic_path

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

_RANKED = ("methods", "components", "options", "improvements")  # tables with one axis of names
_TITLES = {
    "functa": "Functa", "coinpp": "COIN++", "spatial_functa": "Spatial Functa", "coinpp_patched": "COIN++, patches",
    "first_order_maml": "first-order MAML", "autodecoder": "auto-decoder", "medfuncta": "MedFuncta",
    "baseline": "constant omega", "omega_schedule": "+ omega schedule", "cosine": "+ cosine", "all": "+ all",
    "reduced_context": "+ reduced context", "none": "MedFuncta", "gradient_context": "context by gradients",
    "contrastive": "contrastive loss", "codebook": "codebook", "no_residual": "no residual connections",
    "pyramid": "pyramid of widths", "deep": "MedFuncta", "deep_muon": "+ Muon",
    "deep_step_sizes": "+ learned step sizes", "one_layer_muon": "one layer + Muon",
    "one_layer_gauss_newton": "one layer + Gauss-Newton", "one_layer_both": "one layer + both",
    "one_layer_wide": "one layer, twice as wide", "one_layer_linear": "one layer, linear start",
    "one_layer_augmentation": "one layer + augmentation", "one_layer_off_grid": "one layer + points off the grid",
}  # fmt: skip


def read_rows(grid: Sequence[Values], seeds: int, workdir: Path) -> list[dict[str, Any]]:
    """A row for each cell, from the files in its folder: values, measurements, and each seed's outcome."""
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
    """Memory of one update: the temporaries of the compiled program."""
    return (measured.get("temp_bytes") or 0) / 1e9


def _name(value: Any) -> str:
    return _TITLES.get(str(value), str(value).replace("_", " "))


def draw(path: Path, table: str, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Draw the table's figure if any seed is done; returns whether it was drawn."""

    def of(row: Mapping[str, Any], name: str) -> list[Any]:
        return [outcome[name] for outcome in row["seeds"] if outcome["status"] == "done"]

    if not any(row["done"] for row in rows):
        return False
    axes = list(rows[0]["values"])
    names = [_name(row["values"][axes[0]]) for row in rows]
    if table in _RANKED:
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
    """Draw the validation PSNR of every cell over its budget if any seed is done; returns whether it was drawn."""
    finished = {
        _name(next(iter(row["values"].values()))): [
            [psnr for _, psnr in outcome["learning"]]
            for outcome in row["seeds"]
            if len(outcome.get("learning", ())) > 1
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


def write(name: str, preset: str, grid: Sequence[Values], seeds: int, workdir: Path) -> list[dict[str, Any]]:
    rows = read_rows(grid, seeds, workdir)
    write_json(workdir / "table.json", {"table": name, "preset": preset, "rows": rows})
    title = f"{name}, preset {preset}: mean ± standard deviation over seeds, test set"
    with atomic_path(workdir / "table.md") as partial:
        partial.write_text(as_markdown(rows, title, _PUBLISHED.get(name, {}) if preset == "paper" else {}))
    draw(workdir / "table.png", name, rows)
    if name in _RANKED:
        draw_learning(workdir / "learning.png", rows)
    return rows
