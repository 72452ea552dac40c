"""A grid of runs of the launcher over several seeds, with an equal budget: the paper's comparisons as one command each.

    python -m experiments.ablation --table=methods --preset=cpu --workdir=runs/methods --data_dir=DIR --seconds=300
    python -m experiments.ablation --table=omega --preset=paper --workdir=DIR --data_dir=DIR --shard=3 --shards=25

Every cell is first measured alone (seconds and memory of an update). A cell that does not fit in memory is skipped, and
--seconds sets the steps of a cell to the number that takes this time. The seeds of a cell are then trained, fitted and
evaluated, in WORKDIR/CELL/seed-S. A cell that fails is listed, and the others continue. The same command resumes the
grid, also after Ctrl-C or SIGTERM (exit code 75); the shards of a job array share one WORKDIR. Writes table.json,
table.md, table.png, and, for methods, components, options and improvements,
learning.png.
"""

from __future__ import annotations

import ast
import itertools
import logging
import queue
import sys
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

from absl import app, flags

from experiments.ablation import results
from experiments.ablation.grid import TABLES, Cell, Table, Values, budget, folder_name, grid_of, make_cell
from experiments.ablation.runs import is_over, measure, run_seed
from experiments.runtime.interruption import EXIT_INTERRUPTED, Interrupted, StopRequest
from experiments.runtime.run_directory import RunError, write_json
from medfuncta_jax.datasets import DataError
from medfuncta_jax.settings import SettingsError

log = logging.getLogger("medfuncta")


def define_flags() -> None:
    """Define the command's flags, not at import, so that tests can import this module beside other commands."""
    flags.DEFINE_enum("table", None, list(TABLES), "What to compare.", required=True)
    flags.DEFINE_enum(
        "preset",
        "cpu",
        ["paper", "cpu", "cpu_1d", "cpu_3d"],
        "Sizes and data: the paper's, or for two cores (1D: ECG; 3D: a folder of NIfTI volumes, for improvements).",
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
    logging.getLogger().setLevel(logging.WARNING)  # app.run enables INFO logging of every library
    log.setLevel(logging.INFO)
    options = flags.FLAGS
    table = TABLES[options.table]
    if options.steps and options.seconds:
        raise app.UsageError("--steps and --seconds exclude each other; give one of them")
    if options.shard >= options.shards:
        raise app.UsageError(f"--shard must be 0 to {options.shards - 1} (shards - 1), got {options.shard}")
    try:
        grid = grid_of(table, options.preset, _axes_of(options.axis))
        # Errors of all cells are found without the overrides of single cells.
        bare = replace(table, cell=lambda values: (table.cell(values)[0], {}))
        make_cell(bare, grid[0], options.preset, options.set, options.data_dir)
    except (ValueError, SettingsError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    workdir = Path(options.workdir).absolute()
    steps = options.steps or (table.steps if options.preset == "paper" else None)
    try:
        with StopRequest() as stop, stop.held():  # until the started runs have ended
            _run_grid(table, grid, workdir, steps, stop)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except Interrupted as interrupted:
        log.warning("%s", interrupted)
        results.write(options.table, options.preset, grid, options.seeds, workdir)
        sys.exit(EXIT_INTERRUPTED)
    rows = results.write(options.table, options.preset, grid, options.seeds, workdir)
    print((workdir / "table.md").read_text())
    own = [outcome["status"] for row in rows for outcome in row["seeds"]]
    sys.exit("failed" in own or (options.shards == 1 and "missing" in own))


def _run_grid(table: Table, grid: Sequence[Values], workdir: Path, steps: int | None, stop: StopRequest) -> None:
    """Run all seeds of the cells of this job, and write the table after every run.

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
            measured = measure(cell, place, next(iter(options.devices), None))
        except (ValueError, SettingsError, DataError) as error:
            measured = {"status": "failed", "error": str(error)}
        if "error" in measured:
            log.info("%s: %s: %s", place.name, measured["status"], measured["error"])
            write_json(place / "refused.json", {"status": measured["status"], "reason": measured["error"]})
            continue
        asked = steps or cell.settings.train.steps
        if options.seconds:  # the first measurement counts, so that all seeds have the same steps
            asked = measured.get("steps", max(1, int(options.seconds / measured["best_s"])))
        if cell.settings.train.steps == 0:  # a start alone
            asked = 0
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
            outcome = run_seed(cell, place, seed, extra, table, options.data_dir, device, stop)
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
            if not is_over(place / f"seed-{seed}.json")
        ]
        waiting = set(jobs)
        while waiting:
            # The timeout is short because Python handles signals in this thread only when it runs.
            done, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
            for job in done:
                log.info("%s", job.result())
                results.write(options.table, options.preset, grid, options.seeds, workdir)


if __name__ == "__main__":
    define_flags()
    app.run(main)
