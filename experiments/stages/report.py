"""One self-contained page about a run, `report.html`, with inline figures and no external files."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import figures
from experiments.runtime.progress import log
from experiments.runtime.run import Run
from experiments.runtime.run_directory import RunDirectory, RunError, flat
from medfuncta_jax.atomic import atomic_path
from medfuncta_jax.batched import decode_latents
from medfuncta_jax.checkpoint import load_field
from medfuncta_jax.datasets import Dataset
from medfuncta_jax.latent_store import LatentSplit, load_latents
from medfuncta_jax.settings import Settings

REPORT_FILE = "report.html"
# Number of best and of worst reconstructions shown.
_EXTREMES = 4

_METRICS = (
    ("psnr", "PSNR, dB", "{:.2f}"),
    ("mse", "MSE", "{:.3e}"),
    ("ssim", "SSIM", "{:.4f}"),
    ("lpips", "LPIPS", "{:.4f}"),
)
_SCORES = (
    ("accuracy", "accuracy"),
    ("macro_f1", "macro F1"),
    ("balanced_accuracy", "balanced accuracy"),
    ("auroc", "AUROC"),
)
_CURVES = (
    ("curve_steps.png", "Quality against test-time steps. The dotted line is the run's own number of steps."),
    ("curve_fractions.png", "Quality against the part of the points that the fit sees; all points are compared."),
    ("curve_scales.png", "Quality at finer grids than that of training, against the source's own signals there."),
)

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2126; --soft: #5b6570; --page: #ffffff; --card: #f4f6f8; --rule: #d8dde2;
  --accent: #00639c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7eaed; --soft: #a4adb6; --page: #15181b; --card: #20252a;
  --rule: #394149; --accent: #6cb8ec; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1000px; margin: 0 auto; padding: 24px 16px 64px; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 40px 0 12px; padding-top: 12px; border-top: 1px solid var(--rule); }
p { margin: 0 0 12px; } .soft, figcaption { color: var(--soft); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 20px 0; }
.tile { background: var(--card); border-radius: 8px; padding: 12px 14px; }
.tile b { display: block; font-size: 1.5rem; font-weight: 600; color: var(--accent); }
.tile span { display: block; font-size: .85rem; color: var(--soft); }
figure { margin: 0 0 20px; } figure img { display: block; width: 100%; height: auto; background: #fff;
  border-radius: 8px; border: 1px solid var(--rule); }
figcaption { font-size: .9rem; margin-top: 6px; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 260px), 1fr)); gap: 16px; }
.wide { overflow-x: auto; margin-bottom: 16px; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; min-width: 100%; }
th, td { text-align: right; padding: 5px 10px; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th { white-space: normal; vertical-align: bottom; color: var(--soft); font-weight: 600; }
th:first-child, td:first-child { text-align: left; white-space: normal; padding-left: 0; }
.settings td { text-align: left; white-space: normal; overflow-wrap: anywhere; } .settings td:first-child {
  white-space: nowrap; color: var(--soft); }
details { background: var(--card); border-radius: 8px; padding: 8px 14px; margin-bottom: 8px; }
summary { cursor: pointer; } code { font-size: .9em; overflow-wrap: anywhere; }
"""


def report(run: Run) -> Path:
    """Write `report.html` from the results of the run's stages, and return its path.

    The page names missing results (curves, classification) with their commands.

    Raises:
      RunError: nothing was evaluated yet.
      CheckpointError, LatentStoreError: no field or latents.
    """
    settings, dataset, directory = run.settings, run.dataset, run.directory
    if not directory.evaluation_file.exists():
        raise RunError(f"{directory.path} has no evaluation.json to report on; run --mode=evaluate first")
    evaluation = json.loads(directory.evaluation_file.read_text())
    latents = load_latents(directory.latents, splits=("train", "test"), field=directory.path)
    _draw_map(dataset, latents["train"], latents["test"], directory)
    run.stop.check("the report starts over")
    _draw_extremes(dataset, latents["test"], directory)
    run.stop.check("the report starts over")
    evaluated, drawn = (directory.results(stage) / "figures" for stage in ("evaluate", "report"))
    sections = [
        _head(settings, dataset, evaluation),
        _section("Figures of the test and validation split", _metrics_table(evaluation)),
        _section("Best and worst reconstructions", _reconstructions(directory)),
        _section("Training", _figure(evaluated / "learning_curve.png", _learning_caption(directory))),
        _section("Quality against steps, observed points and resolution", _curves(directory)),
        _section("Latent space", _figure(drawn / "latent_map.png", _map_caption(dataset))),
        _section("Compression", _compression(directory)),
        _section("Classification", _classification(directory)),
        _section("Numbers", _regression(directory)),
        _section("Inverse problems", _inverse(directory)),
        _section("New signals", _generation(directory)),
        _section("Segmentation", _segmentation(directory)),
        _section("Settings", _settings(settings)),
        _section("Where it comes from", _provenance(settings, dataset, latents["test"], directory)),
    ]
    title = f"{dataset.about.get('title', dataset.name)}: one latent of {settings.model.latent_dim} numbers a signal"
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(sections)
        + "\n</main>\n</body>\n</html>\n"
    )
    path = directory.results("report") / REPORT_FILE
    with atomic_path(path) as partial:
        partial.write_text(page, encoding="utf-8")
    log.info("report in %s", path)
    return path


def _by_class(dataset: Dataset) -> bool:
    return dataset.task not in ("none", "multi-label")


def _draw_map(dataset: Dataset, train: LatentSplit, test: LatentSplit, run: RunDirectory) -> None:
    figures.draw_latent_map(
        run.results("report") / "figures" / "latent_map.png", np.asarray(train.latents), np.asarray(test.latents),
        labels=np.asarray(test.labels) if _by_class(dataset) else None,
        classes=dataset.classes, psnr=np.asarray(test.psnr),
    )  # fmt: skip


def _draw_extremes(dataset: Dataset, stored: LatentSplit, run: RunDirectory) -> None:
    field, params = load_field(run.path)
    order = np.argsort(np.asarray(stored.psnr))
    count = min(_EXTREMES, len(order))
    for name, chosen in (("worst", order[:count]), ("best", order[::-1][:count])):
        signals = dataset.splits["test"].signals(chosen)
        images = decode_latents(field, params, stored.latents, dataset.grid, rows=chosen)
        affines = stored.affines
        figures.draw_reconstructions(
            run.results("report") / "figures" / f"{name}.png", signals, np.clip(images, 0, 1),
            titles=[stored.ids[i] for i in chosen], psnr=[float(stored.psnr[i]) for i in chosen],
            oriented=affines is not None,
            spacing=None if affines is None else np.linalg.norm(affines[chosen[0], :3, :3], axis=0),
        )  # fmt: skip


def _head(settings: Settings, dataset: Dataset, evaluation: Mapping[str, Any]) -> str:
    test = evaluation["test"]
    shape = " x ".join(map(str, dataset.grid)) + {1: "", 3: " RGB"}.get(
        dataset.channels, f" x {dataset.channels} channels"
    )
    values = int(np.prod(dataset.grid)) * dataset.channels
    tiles = []
    for name, title, form in _METRICS:
        if name in test:
            low, high = test["interval"][name]
            tiles.append((form.format(test[name]), f"{title}, test mean ({form.format(low)} to {form.format(high)})"))
    tiles.append(
        (f"{values / settings.model.latent_dim:.1f}x", f"fewer numbers: {values} to {settings.model.latent_dim}")
    )
    body = "".join(f'<div class="tile"><b>{escape(big)}</b><span>{escape(small)}</span></div>' for big, small in tiles)
    counts = ", ".join(f"{len(split)} {name}" for name, split in dataset.splits.items())
    name = str(dataset.about.get("title", dataset.name))
    return (
        f"<h1>{escape(name[:1].upper() + name[1:])}</h1>\n"
        f'<p class="soft">{counts} signals of {shape}, each one latent of {settings.model.latent_dim} numbers that '
        f"modulates a shared SIREN of {settings.model.layers} layers of {settings.model.width}.</p>\n"
        f'<div class="tiles">{body}</div>'
    )


def _section(title: str, body: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>"


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    head = f"<thead><tr>{head}</tr></thead>" if headings else ""
    return f'<div class="wide"><table class="{kind}">{head}<tbody>{body}</tbody></table></div>'


def _figure(path: Path, caption: str) -> str:
    if not path.exists():
        return ""
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{escape(caption)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _metrics_table(evaluation: Mapping[str, Any]) -> str:
    rows = []
    for split in (name for name in ("test", "val") if name in evaluation):
        values = evaluation[split]
        for name, title, form in _METRICS:
            if name in values:
                low, high = values["interval"][name]
                interval = f"{form.format(low)} to {form.format(high)}"
                cells = [form.format(values[name]), interval, form.format(values["std"][name])]
                rows.append([f"{split}, {values['signals']} signals", title, *cells])
    notes = evaluation.get("protocol", {})
    said = "; ".join(f"{name}: {note}" for name, note in notes.items() if isinstance(note, str))
    return (
        _table(["split", "figure", "mean", "95 % interval of the mean", "standard deviation"], rows)
        + f'<p class="soft">{escape(said)}.</p>'
    )


def _reconstructions(run: RunDirectory) -> str:
    return _figure(
        run.results("report") / "figures" / "best.png",
        "The test signals with the highest PSNR: input, reconstruction, difference.",
    ) + _figure(run.results("report") / "figures" / "worst.png", "The test signals with the lowest PSNR.")


def _learning_caption(run: RunDirectory) -> str:
    seconds = ", ".join(f"{stage} {spent:.0f} s" for stage, spent in run.seconds().items())
    return f"Training and validation PSNR against meta-updates. Time: {seconds}."


def _curves(run: RunDirectory) -> str:
    there = [_figure(run.results("curves") / "figures" / name, caption) for name, caption in _CURVES]
    return f'<div class="pair">{"".join(there)}</div>' if any(there) else _not_run("curves")


def _map_caption(dataset: Dataset) -> str:
    colour = "by class" if _by_class(dataset) else "by PSNR"
    return f"Test latents on the first two principal axes of the training latents, coloured {colour}."


def _classification(run: RunDirectory) -> str:
    path = run.results("classify") / "classification.json"
    if not path.exists():
        return _not_run("classify")
    result = json.loads(path.read_text())
    scores = [(name, title) for name, title in _SCORES if any(row.get(name) for row in result["rows"])]
    rows = [
        [
            f"{row['classifier']} on {row['features']}",
            f"{row['parameters']:,}" if row["parameters"] else "none",
            *(_mean_and_spread(row.get(name)) for name, _ in scores),
        ]
        for row in result["rows"]
    ]
    body = _table(["classifier", "parameters", *(title for _, title in scores)], rows)
    return body + _figure(
        path.parent / "figures" / "confusion.png", "Confusion matrices of the test split, true classes in rows."
    )


def _compression(run: RunDirectory) -> str:
    folder = run.results("compress")
    body = _figure(folder / "figures" / "rate_distortion.png", "Quality against the bits that a signal takes.")
    return body or _not_run("compress")


def _regression(run: RunDirectory) -> str:
    files = sorted({run.results("report"), run.path, *run.path.glob("variants/*")})
    results = [json.loads((folder / "regression.json").read_text()) for folder in files
               if (folder / "regression.json").exists()]  # fmt: skip
    body = ""
    for result in results:
        rows = [
            [row["model"], row["features"], *(_mean_and_spread(row[name]) for name in ("r2", "mean_absolute_error"))]
            for row in result["rows"]
        ]
        body += f"<p>{escape(result['column'])} of {escape(result['table'])}, test split.</p>"
        body += _table(["model", "features", "R2", "mean absolute error"], rows)
    return body or _not_run("regress")


def _inverse(run: RunDirectory) -> str:
    path = run.results("inverse") / "inverse.json"
    if not path.exists():
        return _not_run("inverse")
    result, rows, pictures = json.loads(path.read_text()), [], ""
    for name, problem in result["problems"].items():
        for method, of in problem["methods"].items():
            intervals = [f"{form.format(of[what])} ({' to '.join(form.format(end) for end in of['interval'][what])})"
                         for what, form in (("psnr", "{:.2f}"), ("ssim", "{:.3f}"))]  # fmt: skip
            rows.append([problem["title"], method, *intervals])
        gain, (low, high) = problem["difference"]["psnr"], problem["difference"]["interval"]["psnr"]
        caption = f"{problem['title']}; field less {problem['beside']}: {gain:+.2f} dB ({low:+.2f} to {high:+.2f})."
        pictures += _figure(path.parent / "figures" / f"inverse_{name}.png", caption)
    note = f"{result['signals']} test signals; means with their 95 % intervals. {_said(result['conventions'])}"
    table = _table(["problem", "method", "PSNR, dB", "SSIM"], rows)
    return f'{table}<p class="soft">{escape(note)}</p>{pictures}'


def _generation(run: RunDirectory) -> str:
    path = run.results("generate") / "generation.json"
    if not path.exists():
        return _not_run("generate")
    result = json.loads(path.read_text())
    names = ("density", "coverage", "frechet", "nearest")
    rows = [[kind, *(f"{of[name]:.3f}" for name in names)] for kind, of in result["scores"].items()]
    note = f"{result['judged']} samples of each kind, {result['test_signals']} test signals. "
    table = _table(["samples", "density", "coverage", "Frechet distance", "nearest training signal"], rows)
    return (
        f'{table}<p class="soft">{escape(note + _said(result["conventions"]))}</p>'
        + _figure(path.parent / "figures" / "generated.png", "Samples, and below each its nearest training signal.")
        + _figure(path.parent / "figures" / "interpolations.png", "From one sample to another.")
    )


def _segmentation(run: RunDirectory) -> str:
    folders = sorted({run.results("segment"), run.path, *run.path.glob("variants/*")})
    body = ""
    for folder in (one for one in folders if (one / "segmentation.json").exists()):
        result, rows = json.loads((folder / "segmentation.json").read_text()), []
        for method, of in result["methods"].items():
            tables = {f"{float(part):.0%} of the points": table for part, table in of["observed"].items()}
            if "finer" in of:
                tables["x".join(map(str, of["finer"]["grid"]))] = of["finer"]
            for seen, table in tables.items():
                for structure in (*result["structures"], "mean"):
                    cells = [
                        "undefined" if value is None else
                        f"{value['mean']:.3f} ({value['interval'][0]:.3f} to {value['interval'][1]:.3f})"
                        for value in (table[structure]["dice"], table[structure]["hd95"])
                    ]  # fmt: skip
                    rows.append([method, seen, structure, *cells])
        note = f"{result['signals']['test']} test signals; means with their 95 % intervals. "
        headings = ["method", "seen", "structure", "Dice", f"95 % Hausdorff distance, {result['unit']}"]
        body += _table(headings, rows) + f'<p class="soft">{escape(note + _said(result["conventions"]))}</p>'
        body += _figure(folder / "figures" / "segmentation.png", "Test signals, their masks and those of each method.")
    return body or _not_run("segment")


def _said(conventions: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {text}" for name, text in conventions.items()) + "."


def _mean_and_spread(value: Mapping[str, float | None] | None) -> str:
    if value is None or value["mean"] is None:
        return "undefined"
    return f"{value['mean']:.3f}" + ("" if value["spread"] is None else f" ± {value['spread']:.3f}")


def _not_run(mode: str) -> str:
    return f'<p class="soft">Not run; <code>--mode={mode}</code> makes it.</p>'


def _settings(settings: Settings) -> str:
    parts = []
    values = settings.to_dict()
    for group, members in values.items():
        rows = list(flat(members)) if isinstance(members, dict) else [("", members)]
        cells = [[name or group, "none" if value in ("", (), None) else str(value)] for name, value in rows]
        parts.append(f"<details><summary>{escape(group)}</summary>{_table([], cells, 'settings')}</details>")
    return "".join(parts)


def _provenance(settings: Settings, dataset: Dataset, stored: LatentSplit, run: RunDirectory) -> str:
    device = jax.devices()[0]
    model = settings.model
    searched = ", found by short trainings (omega.json)" if run.omega_file.exists() else ""
    rows = [
        ["source", settings.data.source],
        ["frequencies", f"{model.omega_first:g} to {model.omega_last:g}{searched}"],
        *(
            [name, value if isinstance(value, str) else json.dumps(value)]
            for name, value in dataset.about.items()
            if name != "source" and isinstance(value, (str, int, float, bool))
        ),
        ["field SHA-256", stored.about["field_sha256"]],
        ["report made on", f"{device.device_kind}, {os.cpu_count()} CPU cores"],
        ["versions", ", ".join(f"{name} {version(name)}" for name in ("jax", "flax", "optax"))],
        ["run", run.path.name],
    ]
    return _table([], rows, "settings")
