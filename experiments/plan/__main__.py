"""Predict the needs of a run on a GPU that is not here: memory, seconds an update, the largest batch, hours.

    python -m experiments.plan --config=configs/chest_xray.py --target=h100
    python -m experiments.plan --config=configs/brain_mri.py --target=a100 --config.train.batch_size=8

The programs of the run are compiled for that GPU, which needs JAX's CUDA plugin (extra `plan`) and no GPU, and the
bytes and products of their kernels are summed (see `roofline`). Nothing is run, and no data is read: `--grid` and
`--channels` give the shape of the signals if the config does not determine it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # a local GPU may be in use

import jax
from absl import app, flags
from ml_collections import config_flags

from experiments.plan import programs
from experiments.plan.programs import USABLE
from experiments.plan.targets import TARGETS, Target
from experiments.runtime.command import refuse
from experiments.runtime.run_directory import RunError
from experiments.settings import RunSettings
from medfuncta_jax.datasets import source_options
from medfuncta_jax.datasets.medmnist_sets import SETS
from medfuncta_jax.field import Field, parameter_count
from medfuncta_jax.methods import METHODS
from medfuncta_jax.settings import Settings, SettingsError

REMATS = ("steps", "layers", "none")


def define_flags() -> None:
    """Define the command's flags, not at import, so that tests can import this module beside other commands."""
    config_flags.DEFINE_config_file("config", None, "Config file, e.g. configs/chest_xray.py.")
    flags.DEFINE_enum("target", "h100", list(TARGETS), "The GPU.")
    flags.DEFINE_list("grid", [], "Points along each axis of a signal, where the config does not tell.")
    flags.DEFINE_integer("channels", 0, "Channels of a signal; 0: as the config tells, else 1.", lower_bound=0)


def shape_of(settings: Settings) -> tuple[tuple[int, ...], int]:
    """Grid and channels of the signals of a config.

    Raises:
      RunError: they depend on the files.
    """
    source, options = settings.data.source, dict(settings.data.options)
    if source == "medmnist":
        known = SETS.get(options["flag"])
        axes = 3 if options["flag"].endswith("3d") else 2
        return (options["size"],) * axes, options["channels"] or (known.channels if known else 1)
    if source == "ecg":
        records = source_options(source)(**options)
        return ((records.length,), records.channels) if records.format == "leads" else ((187,), 1)
    if source == "series_folder":
        return (options["length"],), max(1, len(options["columns"]))
    if source == "nifti_folder":
        return tuple(options["grid"]), 1
    if "size" in options:
        axes = 3 if source in ("brats", "lung_ct") else 2
        size = options["size"]
        return (size,) * axes if isinstance(size, int) else tuple(size), options.get("channels") or 1
    raise RunError(f"the shape of data.source={source!r} depends on its files; give --grid, and --channels if not 1")


def plan(target: Target, field: Field, settings: Settings, shape: tuple[int, ...]) -> Iterator[str]:
    """The plan, line by line after each compilation."""
    memory, train = USABLE * target.memory_bytes, settings.train
    at_once = train.micro_batch or train.batch_size
    yield f"{target.name}: {memory / 1e9:.0f} of {target.memory_bytes / 1e9:.0f} GB are JAX's; predicted, not measured"
    yield (
        f"signals of {'x'.join(map(str, shape))} x {field.channels}, batches of {train.batch_size}"
        + (f" in parts of {at_once}" if at_once < train.batch_size else "")
        + f", model.products={settings.model.products}\n"
    )
    yield f"{'a meta-update':<34}{'GB':>8}{'seconds':>10}{'hours of the run':>18}{'most signals at once':>22}"
    for remat in REMATS if train.method == "meta" else [settings.inner.remat]:
        inner = replace(settings.inner, remat=remat)  # type: ignore[arg-type]
        found = programs.update(target, field, replace(settings, inner=inner), shape)
        # Temporaries grow with the number of signals; scaling all of them leaves a margin.
        most = int((memory - found.resident) // (found.temporary / at_once))
        mark = " (this config)" if remat == settings.inner.remat else ""
        yield (
            f"{'inner.remat=' + remat + mark:<34}{found.bytes / 1e9:>8.1f}{found.seconds:>10.4f}"
            f"{train.steps * found.seconds / 3600:>18.1f}{max(0, most):>22}"
            + ("  does not fit" if found.bytes > memory else "")
        )
    fit = programs.fit(target, field, settings, shape)
    yield (
        f"\na fit of {settings.fit.batch_size} signals, {settings.fit.steps} steps: {fit.bytes / 1e9:.1f} GB, "
        f"{fit.seconds:.3f} s, {settings.fit.batch_size / fit.seconds:.0f} signals a second"
        + ("; does not fit" if fit.bytes > memory else "")
    )
    yield "Batches of more signals are trained in parts: train.micro_batch, a divisor of train.batch_size."


def main(argv: Sequence[str]) -> None:
    """Flags in, a plan out."""
    del argv
    options = flags.FLAGS
    if options.config is None:
        raise app.UsageError("--config is missing; e.g. --config=configs/chest_xray.py")
    try:
        settings = RunSettings.from_dict(options.config.to_dict())
        if options.grid:
            if not all(size.isdecimal() and int(size) for size in options.grid):
                raise app.UsageError(f"--grid={','.join(options.grid)} must be numbers of at least 1")
            shape, channels = tuple(map(int, options.grid)), options.channels or 1
        else:
            shape, channels = shape_of(settings)
            channels = options.channels or channels
        field = METHODS[settings.train.method].check(settings, shape, channels)
        size = parameter_count(jax.eval_shape(field.init, jax.random.key(0)))
        print(f"{size / 1e6:.1f}e6 parameters; compiling for {options.target}, half a minute a line", flush=True)
        for line in plan(TARGETS[options.target], field, settings, shape):
            print(line, flush=True)
    except (RunError, SettingsError) as error:
        sys.exit(refuse(error, code=1))


if __name__ == "__main__":
    define_flags()
    app.run(main)
