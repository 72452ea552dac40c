"""The launcher: meta-training, latent extraction, evaluation and decoding of one config.

    python -m experiments.main --config=quickstart --workdir=runs/quickstart
    python -m experiments.main --config=configs/brain_mri.py --workdir=runs/brain --data_dir=DATA --config.seed=1
    python -m experiments.main --workdir=runs/brain --mode=apply --data_dir=NEW   (a run knows its config and data)

Exit codes: 0 done; 1 refused or failed, with one line that says why; 2 a flag is wrong; 75 stopped by Ctrl-C or
SIGTERM with everything saved: the same command resumes.
"""

from __future__ import annotations

import os
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a Ctrl-C during the imports below ends the process silently
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # waiting threads of LAPACK would take the cores from XLA

import contextlib
import dataclasses
import logging
import sys
import traceback
import typing
from collections.abc import Sequence
from pathlib import Path

try:
    from absl import flags
    from ml_collections import config_flags
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing.name} is not installed: pip install 'medfuncta_jax[train]'")

from experiments.runtime import arguments, config_files
from experiments.runtime.command import FULL_DISK
from experiments.runtime.interruption import EXIT_AT_ONCE, EXIT_INTERRUPTED, Interrupted, StopRequest
from experiments.stages import ALL, STAGES, function_of

MODES = (*STAGES, "all")

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, e.g. configs/quickstart.py.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run; an interrupted run in it goes on.")
_MODE = flags.DEFINE_enum("mode", "all", MODES, "Stage to run.")
_DATA_DIR = flags.DEFINE_string(
    "data_dir",
    None,
    "Folder with the source's files; of --mode=apply, the new file or folder. A run remembers its own.",
)
_OUT = flags.DEFINE_string("out", None, "Folder for the results of --mode=apply; else WORKDIR/applied/NAME.")
_DISTRIBUTED = flags.DEFINE_enum(
    "distributed", "auto", ["auto", "off"], "Whether the tasks of one Slurm step are one run, or each on its own."
)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of the first of several processes, without Slurm.")
_PROCESSES = flags.DEFINE_integer("processes", None, "How many processes make this run.", lower_bound=1)
_PROCESS = flags.DEFINE_integer("process", None, "Which of them this is, from 0.", lower_bound=0)

log = logging.getLogger("medfuncta")


def main(argv: Sequence[str]) -> int:
    """Run the launcher; returns the exit code."""
    _log_for_people()
    if arguments.wants_help(argv):
        print(f"{__doc__}\n{flags.FLAGS.module_help(flags.FLAGS.find_module_defining_flag('workdir'))}")
        return 0
    try:
        _parse(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        return _refuse(error, code=2)
    try:
        with StopRequest() as stop, contextlib.ExitStack() as resources:
            code = _run(stop, resources)
    except KeyboardInterrupt:
        code = _refuse("stopped at once; what was saved before is kept, run the same command again", code=EXIT_AT_ONCE)
    except Exception:  # a fault of this program
        traceback.print_exc()
        code = 1
    if code in (0, EXIT_INTERRUPTED):
        return code
    from experiments.runtime.processes import leave_after_error

    leave_after_error(code)


def _parse(argv: Sequence[str]) -> None:
    # The file without the module that reads a run's config.json.
    file = next((word.partition("=")[2] for word in argv if word.startswith("--config=")), "")
    file = file.partition(":")[2] if file.endswith(".json") else file
    argv = config_files.resolved(argv)
    try:
        rest = flags.FLAGS(list(argv))
    except (ImportError, NameError, OSError, SyntaxError) as error:  # raised by the config file
        raise flags.Error(f"--config={file} cannot be loaded: {error}") from error
    except flags.IllegalFlagValueError as error:
        if "Traceback" not in str(error):
            raise flags.Error(_in_words(str(error))) from error
        # Raised by the file's get_config, e.g. for an unknown variant; ml_collections adds the traceback as text.
        raise flags.Error(f"--config={file} cannot be loaded: {str(error).strip().splitlines()[-1]}") from error
    for name in ("config", "workdir"):
        if flags.FLAGS.get_flag_value(name, None) is None:
            raise flags.Error(f"--{name} is missing; e.g. --config=configs/quickstart.py --workdir=runs/quickstart")
    try:
        _CONFIG.value.to_dict()
    except OSError as error:  # a missing file is kept until the first use
        raise flags.Error(f"--config={file} cannot be loaded: {str(error).splitlines()[-1].strip()}") from error
    if len(rest) > 1:
        raise flags.Error(f"{rest[1]!r} is not a flag; overrides are written --config.train.steps=1000")


def _in_words(error: str) -> str:
    """absl's message about a value, with types in plain words."""
    for said, wanted in (
        ("invalid literal for int()", "a whole number"),
        ("could not convert string to float", "a number"),
        ("Non-boolean argument", "True or False"),
    ):
        if said in error:
            return f"{error.removeprefix('flag ').partition(': ')[0]} must be {wanted}"
    return error


def _run(stop: StopRequest, resources: contextlib.ExitStack) -> int:
    # Imports after the flags, so that a typo is reported at once: these imports take seconds.
    import jax

    from experiments.runtime import memory, processes
    from experiments.runtime.batch_size import settled
    from experiments.runtime.compilation import keep_compiled
    from experiments.runtime.lock import held
    from experiments.runtime.run import Run
    from experiments.runtime.run_directory import (
        RunDirectory,
        RunError,
        remembered_data_dir,
        stored_settings,
        with_labels_of,
    )
    from experiments.runtime.signal_record import held_apart
    from experiments.runtime.summary import summary
    from experiments.settings import RunSettings
    from medfuncta_jax.checkpoint import CheckpointError
    from medfuncta_jax.datasets import DataError, open_dataset
    from medfuncta_jax.datasets.dataset import cache_root
    from medfuncta_jax.latent_file import LatentStoreError
    from medfuncta_jax.methods import METHODS
    from medfuncta_jax.settings import SettingsError

    mode, workdir, out = str(_MODE.value), str(_WORKDIR.value), _OUT.value
    stages = {name: STAGES[name] for name in (ALL if mode == "all" else (mode,))}
    if _DATA_DIR.value and Path(_DATA_DIR.value).resolve() == Path(workdir).resolve():
        return _refuse("--workdir is the data directory; name a folder of its own, which may lie inside it", code=2)
    try:
        settings = RunSettings.from_dict(_CONFIG.value.to_dict())
        keep_compiled(cache_root(settings.data.cache_dir))
        processes.join(_DISTRIBUTED.value != "off", _COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
        if not processes.first():
            log.setLevel(logging.ERROR)
        if not any(stage.needs_data for stage in stages.values()):
            if processes.first():
                for name in stages:
                    function_of(name)(Run(RunDirectory(workdir, settings), stop, data_dir=_DATA_DIR.value, out=out))
            processes.wait_for_all(mode)
            return 0
        data_dir, stored = _DATA_DIR.value or remembered_data_dir(workdir), stored_settings(workdir, RunSettings)
        # The stages that need other labels join them; signals and latents are those of the run.
        data = with_labels_of(settings, stored or settings).data
        if processes.first():  # it prepares the data that the others read
            dataset = open_dataset(data, data_dir=data_dir)
        processes.wait_for_all("data")
        if not processes.first():
            dataset = open_dataset(data, data_dir=data_dir)
        METHODS[settings.train.method].check(settings, dataset.grid, dataset.channels, task=dataset.task)
        # An existing run has its splits.
        if stored is None and settings.train.steps and settings.train.batch_size > len(dataset.splits["train"]):
            raise SettingsError(
                f"train.batch_size = {settings.train.batch_size} is more than the {len(dataset.splits['train'])} "
                "training signals; give at most as many"
            )
        directory = RunDirectory(workdir, settings, writes=False)  # errors come before waiting
        if processes.first() and not all(stage.beside for stage in stages.values()):
            array = getattr(getattr(settings, mode, None), "shards", 1) > 1  # several jobs share the work of this stage
            resources.enter_context(held(directory.path, f"--mode={mode}", shared=array, stop=stop))
        directory = RunDirectory(workdir, settings, writes=processes.first())
        if processes.first():  # it writes the files that the others read
            dataset = held_apart(dataset, directory)
        directory.remember_data_dir(data_dir)
        processes.wait_for_all("workdir")
        if not processes.first():
            dataset = held_apart(dataset, directory)
        settings = directory.settings = settled(settings, dataset, directory)
        log.info(
            "%s: %s signals of %s x %d on %s, run in %s",
            dataset.name, " / ".join(f"{len(split)} {name}" for name, split in dataset.splits.items()),
            "x".join(map(str, dataset.grid)), dataset.channels, processes.devices(), directory.path,
        )  # fmt: skip
        for name, stage in stages.items():
            if stage.by_all or processes.first():
                signals = dataset
                if stage.by_labels and settings.data != data:
                    signals = held_apart(open_dataset(settings.data, data_dir=data_dir), directory)
                function_of(name)(Run(directory, stop, signals, data_dir, out))
            processes.wait_for_all(name)
        if processes.first():
            print(summary(dataset, directory))
        return 0
    except Interrupted as interrupted:
        log.warning("%s", interrupted)
        return EXIT_INTERRUPTED
    except processes.ProcessesError as error:
        return _refuse(error, code=2)
    except (SettingsError, DataError, RunError, CheckpointError, LatentStoreError) as error:
        return _refuse(error, code=1)
    except OSError as error:
        return _refuse(_os_error(error), code=1)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            return _refuse(f"out of memory; {memory.REMEDY}", code=1)
        if jax.process_count() == 1:
            raise
        return _refuse(
            f"process {jax.process_index()} of {jax.process_count()}: another process of this run is gone, or cannot "
            f"be reached ({str(error).splitlines()[0][:200]}); run the same command again, which goes on from the "
            "newest checkpoint",
            code=1,
        )


def _os_error(error: OSError) -> str:
    place = f": {error.filename}" if error.filename else ""
    if error.errno in FULL_DISK:
        return f"no space left on the device{place}; free some and run the same command again, which goes on"
    return f"{error.strerror or error}{place}"


def _refuse(error: object, *, code: int) -> int:
    text = str(error)
    if isinstance(error, (AttributeError, KeyError)) and error.args:
        # An unknown config field; the argument may be the repr of another error's text.
        text = f"unknown setting {error.args[0]}".replace("\\n", "\n").replace("\\'", "").replace("'", "")
        if "Did you mean" not in text:
            name = text.split()[-1].strip('"')
            text = f"{text}; {_known_beside(name)}"
    print(f"error: {'; '.join(line.strip() for line in text.splitlines() if line.strip())}", file=sys.stderr)
    return code


def _known_beside(name: str) -> str:
    """What a setting of no known name could have been: the settings of its group in the command."""
    from experiments.settings import RunSettings

    flags_of_it = [word.partition("=")[0] for word in sys.argv if word.partition("=")[0].endswith(f".{name}")]
    groups = flags_of_it[-1].split(".")[1:-1] if flags_of_it else []
    if groups == ["data"]:
        return "medfuncta_jax/datasets/README.md has the options of each data.source"
    kind: type = RunSettings
    for group in groups:
        inner = typing.get_type_hints(kind).get(group)
        if not (isinstance(inner, type) and dataclasses.is_dataclass(inner)):
            break
        kind = inner
    return f"known here: {', '.join(each.name for each in dataclasses.fields(kind))}"


def _log_for_people() -> None:
    # Orbax logs through absl and asyncio; every relevant error of Orbax is also raised as an exception.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    for name in ("medfuncta", "medfuncta_jax"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        logger.handlers = [handler]
        logger.propagate = False


if __name__ == "__main__":
    sys.argv[:] = arguments.arranged(sys.argv)  # in place: ml_collections looks for overrides there
    sys.exit(main(sys.argv))
