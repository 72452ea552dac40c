"""Time and memory of one meta-update or one fit, at the settings of a config, on random signals of its shape.

    python -m experiments.tools.benchmark --case=2d --mode=train --batch=8 [--set=inner.remat=none,model.width=128]
    python -m experiments.tools.benchmark --case=1d,2d,3d --mode=fit --batch=1,2,4,8
    python -m experiments.tools.benchmark --case=1d --mode=input --data_dir=DIR
    python -m experiments.tools.benchmark --case=2d --batch=1 --vs=CHECKOUT
    python -m experiments.tools.benchmark --case=2d --batch=8 --vs=torch

The command prints one JSON line for each. Signals are split over all devices; JAX_NUM_CPU_DEVICES=2 makes two CPU
devices. Several cases (`--case=ecg,chest_xray,brain_mri`, or `--case=all`) or batches run one after the other in
separate processes, because the peak of resident memory is per process, and end in a table.

`--vs=CHECKOUT` runs the same program of another checkout and of this one in turns, each in a separate process, and
prints the ratios of time and memory, this over the other. Other load on a shared machine then affects both equally.
`--vs=torch` compares with the same update in PyTorch (torch_program.py; extra `peer`), on CPUs.

`--mode=input` times updates on the signals of the config as training reads them, and on one resident batch; the
difference is the device's waiting time.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import math
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from experiments.runtime.command import refuse
from experiments.runtime.memory import check_memory, return_freed
from experiments.runtime.run_directory import RunError
from experiments.tools import timed_program
from experiments.tools.cases import CASES, SHORT, Case, settings_of, work
from experiments.tools.timed_program import prepare
from medfuncta_jax import meta_step, sharding
from medfuncta_jax.basis import has_basis
from medfuncta_jax.context import context_size
from medfuncta_jax.datasets import DataError, batches, open_dataset
from medfuncta_jax.field import parameter_count
from medfuncta_jax.methods import METHODS
from medfuncta_jax.product import Products, product
from medfuncta_jax.settings import Settings, SettingsError
from medfuncta_jax.sine import cosine, sine

_TORCH = "torch"
# Settings of the method that torch_program.py does not read.
_NOT_IN_TORCH = {
    "model": ("latent_grid", "modulation_hidden", "modulate_first_layer", "modulate_scale"),
    "inner": ("learned_step_size", "gauss_newton_damping", "first_order"),
    "train": ("method", "optimizer", "selection_ratio", "latent_penalty", "latent_noise", "channel_loss"),
}

# `--mode=input`: approximate seconds of a round of updates, and number of batches read alone, more than are read ahead.
_ROUND_SECONDS, _BATCHES = 5.0, 64


_REPEATED = 16  # products, or sines, one after the other in one program
_FILLING = 2**15  # rows of a layer that fill a GPU


def machine_rates(rows: int, width: int, products: Products) -> dict[str, float]:
    """Rates of this machine on a layer of `rows` points: products (flop/s), and pairs of sine and cosine (elements/s).

    Many operations run one after the other in one program, which hides the latency of an accelerator. The better of two
    sizes counts, the case's own and one that fills the machine: the time of a small product is mostly its launch.
    """
    sizes = (rows, max(rows, _FILLING))
    rates = [_rates(size, width, products) for size in sorted(set(sizes))]
    return {name: max(rate[name] for rate in rates) for name in rates[0]}


def _rates(rows: int, width: int, products: Products) -> dict[str, float]:
    """The rates of `machine_rates` at one size."""
    x, kernel = (jax.random.normal(jax.random.key(i), shape) for i, shape in ((0, (rows, width)), (1, (width, width))))
    kernel /= width**0.5  # so that repeated products neither grow nor vanish

    def multiply(x, kernel):
        return jax.lax.fori_loop(0, _REPEATED, lambda _, x: product(x, kernel, products), x)

    def sines(x):
        for _ in range(_REPEATED):  # one kernel, so that reading and writing do not count
            x = sine(x) + cosine(x)
        return x

    def best(function, *arguments):
        run = jax.jit(function)
        seconds: list[float] = []
        jax.block_until_ready(run(*arguments))
        began = time.perf_counter()
        while len(seconds) < 5 or time.perf_counter() - began < 0.5:  # outlasts bursts of other load
            start = time.perf_counter()
            jax.block_until_ready(run(*arguments))
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    return {
        "flops_per_s": _REPEATED * 2 * rows * width**2 / best(multiply, x, kernel),
        "sines_per_s": _REPEATED * 2 * rows * width / best(sines, x),
    }


def rows_of(case: Case, settings: Settings, *, mode: str) -> int:
    """R, the points of a layer in one step: those of all signals on one device, or of a chunk."""
    points = math.prod(case.grid)
    batch = settings.train.micro_batch or settings.train.batch_size
    if mode == "train":
        points = context_size(context_size(points, settings.train.selection_ratio), settings.inner.selection_ratio)
    else:
        batch = settings.fit.batch_size
    return max(1, batch // jax.device_count()) * points


def measure(case: Case, settings: Settings, *, mode: str, repeats: int) -> dict:
    """Compile, run once, then time `repeats` runs, each to the end of its computation.

    Args:
      case, settings: from `CASES` and `settings_of`.
      mode: "train", one meta-update; or "fit", H steps on every point.
      repeats: runs that count; 0 counts the first run, which includes the warm-up, for programs of minutes.
    Returns:
      JSON-able; seconds, and CPU seconds, which depend less on others on a shared machine; bytes of temporaries in the
      compiled program, GB of resident memory, and of the accelerator's own memory; `floor_s` is the least time at the
      machine's measured rates of products and sines, and `floor_part` is `floor_s` divided by `best_s`; both are absent
      for methods other than "meta", one modulated layer, a latent grid, hidden modulation layers.
    Raises:
      RunError: the compiled update needs more memory than is free, and is not run; or the floor is above the time.
    """
    batch = settings.train.batch_size if mode == "train" else settings.fit.batch_size
    prepared = prepare(case, settings, mode=mode)
    temporaries = None
    if prepared.program is not None:
        temporaries = getattr(prepared.program.memory_analysis(), "temp_size_in_bytes", None)
        check_memory(prepared.program, "a meta-update")
    return_freed()
    seconds, processor = [], []
    for _ in range(repeats + 1):
        began, used = time.perf_counter(), time.process_time()
        value = prepared.run()
        seconds.append(time.perf_counter() - began)
        processor.append(time.process_time() - used)
    seconds, processor = seconds[1:] or seconds, processor[1:] or processor  # the first run warms up
    peak_device_gb = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / 1e9 or None
    floor: dict[str, float] = {}
    model = settings.model
    if settings.train.method == "meta" and not (
        has_basis(model) or model.latent_grid or model.modulation_hidden
    ):  # else not counted
        needed = work(case, settings, mode=mode, batch=batch)
        rates = machine_rates(rows_of(case, settings, mode=mode), model.width, model.products)
        floor_s = needed["flops"] / rates["flops_per_s"] + needed["sines"] / rates["sines_per_s"]
        floor = {**needed, **rates, "floor_s": floor_s, "floor_part": floor_s / min(seconds)}
        if floor_s > min(seconds):
            raise RunError(
                f"the floor, {floor_s:.3g} s, is above the time measured, {min(seconds):.3g} s: the machine was busier "
                "when its rates were measured; run it again on a quiet one"
            )
    return {
        "config": case.config,
        "mode": mode,
        "grid": list(case.grid),
        "channels": case.channels,
        "batch": batch,
        "latent_dim": settings.model.latent_dim,
        "parameters": parameter_count(prepared.field_params),
        "best_s": min(seconds),
        "median_s": statistics.median(seconds),
        "signals_per_s": batch / min(seconds),
        "best_cpu_s": min(processor),
        **floor,
        "compile_s": prepared.compile_s,
        "temp_bytes": temporaries,
        "peak_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "peak_device_gb": peak_device_gb,
        "finite": bool(math.isfinite(float(jnp.sum(value)))),
        "device": jax.devices()[0].device_kind,
        "devices": prepared.devices,
        "versions": {name: version(name) for name in ("jax", "jaxlib", "flax", "optax")},
    }


def measure_input(case: Case, settings: Settings, *, data_dir: str | None, repeats: int) -> dict:
    """Waiting time of updates for signals: rounds of updates on batches as training reads them, and on a resident
    batch.

    The two kinds of rounds take turns, and the least time of each counts, because a machine also has other load.

    Args:
      case, settings: from `CASES` and `settings_of`; only the config of the case counts, not its grid.
      data_dir: the folder of the signals of `settings.data`.
      repeats: rounds of each kind.
    Returns:
      JSON-able: `updates` a round; seconds of an update by kind; `idle`, the waiting part of an update on read batches
      (below 0 if waiting is less than the noise of the machine); `read_s`, the time to make a batch; and
      `idle_if_none_were_ahead`, the waiting part without reading ahead.
    Raises:
      DataError: no signals there.
    """
    dataset = open_dataset(settings.data, data_dir=data_dir)
    size, split = settings.train.batch_size, dataset.splits["train"]
    method = METHODS[settings.train.method]
    field = method.check(settings, dataset.grid, dataset.channels, task=dataset.task)
    mesh = sharding.data_mesh()
    state = method.init(field, settings, jax.random.key(0), signals=len(split))
    state = sharding.place(mesh, state, sharding.layout(field, state, mesh))
    training = meta_step.Training(field, settings, dataset.grid, mesh=mesh)
    update = jax.jit(functools.partial(method.update, training), donate_argnums=0)
    key, rows = sharding.replicate(mesh, jax.random.key(1)), np.arange(size, dtype=np.int32)

    def put(signals: np.ndarray):
        return sharding.split_batch(mesh, (signals.reshape(size, math.prod(dataset.grid), dataset.channels), rows))

    def round_of(batches: Iterator) -> float:
        """Run updates like the training loop, with one update in flight."""
        nonlocal state
        former, began = None, time.perf_counter()
        for signals, numbers in itertools.islice(batches, updates):
            state, metrics = update(state, signals, key, numbers)
            if former is not None:
                jax.block_until_ready(former)
            former = metrics["loss"]
        jax.block_until_ready(former)
        return (time.perf_counter() - began) / updates

    with batches(split, batch_size=size, seed=0) as stream:
        resident, updates = itertools.repeat(put(next(stream))), 1
        round_of(resident)  # compiles
        updates = max(2, math.ceil(_ROUND_SECONDS / round_of(resident)))
        read, there = [], []
        for _ in range(repeats):
            read.append(round_of(put(signals) for signals in stream))
            there.append(round_of(resident))
        began = time.perf_counter()
        for signals in itertools.islice(stream, _BATCHES):
            jax.block_until_ready(put(signals))
        read_s = (time.perf_counter() - began) / _BATCHES
    return {
        "config": case.config,
        "mode": "input",
        "grid": list(dataset.grid),
        "batch": size,
        "updates": updates,
        "read_update_s": min(read),
        "resident_update_s": min(there),
        "idle": 1 - min(there) / min(read),
        "read_s": read_s,
        "idle_if_none_were_ahead": read_s / (read_s + min(there)),
        "device": jax.devices()[0].device_kind,
    }


def compare(case: str, other: str, *, mode: str, batch: int, overrides: list[str], repeats: int) -> dict:
    """Times the program of this checkout and another one in turns.

    Args:
      case: a name in `CASES`.
      other: the root of another checkout that also knows the case and the overrides; or "torch".
      repeats: turns that count, at least 1, after one warm-up turn.
    Returns:
      JSON-able, this checkout over the other: `ratio`, the median over turns of the ratio of their seconds;
      `best_ratio`, the ratio of the least seconds; `host_ratio` and `device_ratio`, ratios of peak memory; and seconds
      and GB.
    Raises:
      RunError: a process ended.
    """
    here = Path(__file__).resolve().parents[2]
    script = Path(timed_program.__file__).resolve().relative_to(here)  # each checkout's own
    program = [str(here / script), str(here), case, mode, str(batch), ",".join(overrides)]
    if other == _TORCH:
        about, settings = CASES[case], settings_of(CASES[case], overrides, batch).to_dict()
        described = {"grid": about.grid, "channels": about.channels, "settings": settings, "mode": mode, "batch": batch}
        others, place = [str(Path(__file__).with_name("torch_program.py")), json.dumps(described)], here
    else:
        place = Path(other).resolve()
        others = [str(place / script), str(place), *program[2:]]
    turns = _in_turns([(program, here), (others, place)], repeats)
    seconds = np.array([[side[0] for side in turn] for turn in turns[1:]])
    (_, host, device), (_, other_host, other_device) = turns[-1]
    return {
        "case": case,
        "mode": mode,
        "batch": batch,
        "set": ",".join(overrides),
        "vs": other,
        "ratio": float(np.median(seconds[:, 0] / seconds[:, 1])),
        "best_ratio": float(seconds[:, 0].min() / seconds[:, 1].min()),
        "host_ratio": host / other_host,
        "device_ratio": device / other_device if other_device else None,
        "seconds": seconds[:, 0].tolist(),
        "other_seconds": seconds[:, 1].tolist(),
        "host_gb": host,
        "other_host_gb": other_host,
    }


def _in_turns(sides: list[tuple[list[str], Path]], repeats: int) -> list[list[list[float]]]:
    """Each side's results (seconds, GB of the host and of the device) of `repeats` turns, after one warm-up turn.

    A side is the arguments of Python and the directory to run in; the program runs once for every input line.
    """
    processes = [
        subprocess.Popen(
            [sys.executable, *words], cwd=place, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for words, place in sides
    ]  # fmt: skip

    def answer(process: subprocess.Popen[str], ask: str = "") -> list[float]:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(ask)
        process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            raise RunError(f"one of the programs ended with code {process.wait()}; its own message is above")
        return json.loads(line)

    try:
        for process in processes:
            answer(process)
        return [[answer(process, "run\n") for process in processes] for _ in range(repeats + 1)]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def written_in_torch(settings: Settings) -> None:
    """Refuses settings that torch_program.py would silently ignore, except those that trade time for memory.

    Raises:
      SettingsError: the first of them.
    """
    own, plain = settings.to_dict(), Settings(data=settings.data).to_dict()
    for group, names in _NOT_IN_TORCH.items():
        for name in names:
            if own[group][name] != plain[group][name]:
                raise SettingsError(
                    f"{group}.{name} = {own[group][name]!r} is not in the PyTorch program; --vs=torch needs "
                    f"{group}.{name}={plain[group][name]!r}"
                )


def as_markdown(rows: list[dict]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| config | grid | B | P | parameters | seconds | signals a second | peak memory |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in rows:
        if "error" in row:
            lines.append(f"| `{row['case']}` | {row['error']} | | | | | | |")
            continue
        shape = "x".join(map(str, row["grid"])) + (" RGB" if row["channels"] == 3 else "")
        lines.append(
            f"| `{row['config']}` | {shape} | {row['batch']} | {row['latent_dim']} | {row['parameters'] / 1e6:.1f}e6 "
            f"| {row['median_s']:.2f} | {row['signals_per_s']:.3g} | {row['peak_rss_gb']:.1f} GB |"
        )
    return "\n".join(lines) + "\n"


def define_flags() -> None:
    """Define the command's flags, not at import, so that tests can import this module beside other commands."""
    flags.DEFINE_list("case", None, f"{', '.join(SHORT)}, all, or some of {', '.join(CASES)}.", required=True)
    flags.DEFINE_enum(
        "mode", "train", ["train", "fit", "input"],
        "One meta-update, one fit of H steps, or updates with and without reading their signals.",
    )  # fmt: skip
    flags.DEFINE_list("batch", [], "Signals, of several runs if several; the config's own number by default.")
    flags.DEFINE_list("grid", [], "Other sizes of the signals than the case's, as many as it has axes.")
    flags.DEFINE_string("data_dir", None, "Where the signals are. (input)")
    flags.DEFINE_integer("repeats", 5, "Runs that count; 0: the first, which also warms up.", lower_bound=0)
    flags.DEFINE_string("vs", None, "Root of another checkout, or torch; its program runs in turns with this one.")
    flags.DEFINE_list("set", [], "Overrides of the config, GROUP.FIELD=VALUE.")


def main(argv: list[str]) -> None:
    """Flags in, JSON lines out."""
    del argv
    logging.getLogger().setLevel(logging.WARNING)  # app.run enables INFO logging of every library
    options = flags.FLAGS
    names = list(CASES) if options.case == ["all"] else [SHORT.get(name, name) for name in options.case]
    unknown = sorted(set(names) - set(CASES))
    if unknown:
        raise app.UsageError(f"--case: no case {unknown[0]!r}; known: {', '.join([*SHORT, *CASES])}")
    sizes = options.batch or [None]
    if any(not (batch is None or (batch.isdecimal() and int(batch))) for batch in sizes):
        raise app.UsageError(f"--batch={','.join(sizes)} must be numbers of at least 1")
    if options.mode == "input" and (options.grid or not options.repeats):
        raise app.UsageError("--mode=input reads signals as they are, and needs --repeats of at least 1")
    if options.vs is not None:
        if options.mode == "input" or options.grid or not options.repeats:
            raise app.UsageError("--vs needs --mode=train or fit, the cases' own grids and --repeats of at least 1")
        if options.vs == _TORCH and find_spec("torch") is None:
            raise app.UsageError("--vs=torch needs torch, which is not installed: pip install 'medfuncta_jax[peer]'")
        if options.vs != _TORCH and not (Path(options.vs) / "medfuncta_jax").is_dir():
            raise app.UsageError(
                f"--vs={options.vs} holds no medfuncta_jax; it must be the root of a checkout, or torch"
            )
        for name, size in itertools.product(names, sizes):
            try:
                settings = settings_of(CASES[name], options.set, size and int(size))
                if options.vs == _TORCH:
                    written_in_torch(settings)
                batch = settings.train.batch_size if options.mode == "train" else settings.fit.batch_size
                row = compare(
                    name, options.vs, mode=options.mode, batch=batch, overrides=options.set, repeats=options.repeats
                )  # fmt: skip
            except ValueError as error:
                raise app.UsageError(f"--set: {error}") from error
            except RunError as error:
                sys.exit(refuse(error, code=1))
            print(json.dumps(row), flush=True)
        return
    if len(names) == len(sizes) == 1:
        case = CASES[names[0]]
        if options.grid:
            if len(options.grid) != len(case.grid) or not all(size.isdecimal() and int(size) for size in options.grid):
                raise app.UsageError(f"--grid={','.join(options.grid)} must be {len(case.grid)} numbers of at least 1")
            case = replace(case, grid=tuple(map(int, options.grid)))
        try:
            settings = settings_of(case, options.set, sizes[0] and int(sizes[0]))
        except ValueError as error:
            raise app.UsageError(f"--set: {error}") from error
        try:
            if options.mode == "input":
                row = measure_input(case, settings, data_dir=options.data_dir, repeats=options.repeats)
            else:
                row = measure(case, settings, mode=options.mode, repeats=options.repeats)
        except (DataError, RunError, SettingsError) as error:
            sys.exit(refuse(error, code=1))
        print(json.dumps(row))
        return
    rows = []
    shared = [f"--mode={options.mode}", f"--repeats={options.repeats}", f"--set={','.join(options.set)}"]
    shared += [f"--data_dir={options.data_dir}"] if options.data_dir else []
    shared += [f"--grid={','.join(options.grid)}"] if options.grid else []
    for name, batch in itertools.product(names, sizes):
        words = [f"--case={name}", *shared, *([f"--batch={batch}"] if batch else [])]
        command = [sys.executable, "-m", "experiments.tools.benchmark", *words]
        ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        print(ended.stdout, end="", flush=True)
        failed = {"case": name, "error": f"ended with code {ended.returncode}"}
        rows.append(json.loads(ended.stdout) if ended.returncode == 0 else failed)
    if options.mode != "input":
        print(as_markdown(rows))
    sys.exit(any("error" in row for row in rows))


if __name__ == "__main__":
    define_flags()
    app.run(main)
