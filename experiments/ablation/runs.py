"""Measurement of a cell, and its seeds as runs of the launcher; files keep the outcomes."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from experiments.ablation.grid import Cell, Table
from experiments.runtime.interruption import StopRequest
from experiments.runtime.run_directory import RunError, read_metrics, write_json
from experiments.tools import benchmark
from medfuncta_jax.settings import SettingsError

_ROOT = Path(__file__).parents[2]


def measure(cell: Cell, place: Path, device: str | None) -> dict[str, Any]:
    """Seconds and memory of an update, once for all seeds, in a separate process; `error` is the reason of a
    failure."""
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


def run_seed(
    cell: Cell, place: Path, seed: int, extra: Sequence[str], table: Table, data_dir: str | None, device: str | None,
    stop: StopRequest,
) -> dict[str, Any]:  # fmt: skip
    """Run one seed of one cell to its end; the outcome is kept beside the run.

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
                cwd=_ROOT, stdout=output, stderr=output, start_new_session=True,  # so that a Ctrl-C arrives once
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
            stop.check(f"what was finished is in {place}")  # the process ended because of the stop request
            outcome = {"status": "failed", "reason": _last_line(place / f"seed-{seed}.log", child.returncode)}
            if "collapsed to" in outcome["reason"] or "not finite" in outcome["reason"]:
                outcome["status"] = "collapsed"  # a result: it would collapse again
            write_json(place / f"seed-{seed}.json", outcome)
            return outcome
    outcome = _outcome(run, table)
    write_json(place / f"seed-{seed}.json", outcome)
    return outcome


def _last_line(file: Path, code: int) -> str:
    lines = file.read_text(errors="replace").replace("\r", "\n").strip().splitlines()
    return (lines[-1].removeprefix("error: ") if lines else "") or f"the launcher ended with code {code}"


def _outcome(run: Path, table: Table) -> dict[str, Any]:
    """The results of a finished run for the table."""
    evaluation = json.loads((run / "evaluation.json").read_text())
    metrics = {
        name: evaluation["test"][name] for name in ("mse", "psnr", "ssim", "lpips") if name in evaluation["test"]
    }
    learning = {
        record["step"]: record["val_psnr"] for record in read_metrics(run / "metrics.jsonl") if "val_psnr" in record
    }
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


def is_over(outcome: Path) -> bool:
    """Whether nothing is left to do: failed runs are tried again, collapsed runs would collapse again."""
    return outcome.exists() and json.loads(outcome.read_text())["status"] in ("done", "collapsed")
