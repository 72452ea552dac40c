"""The console command `medfuncta`: the commands of a checkout, from any directory.

    medfuncta --config=configs/quickstart.py --workdir=RUN     as  python -m experiments.main --config=...
    medfuncta benchmark --case=ecg                             as  python -m experiments.tools.benchmark --case=ecg
    medfuncta plan --config=configs/ecg.py                     as  python -m experiments.plan --config=...

A wheel keeps `experiments` and `configs` in the folder `commands` of this package, so that they do not collide with
other modules of these common names. The command puts this folder first on the path.
"""

from __future__ import annotations

import os
import re
import runpy
import sys
from pathlib import Path


def main() -> None:
    """Run the command that the first argument names, by default the launcher; ends with its exit code."""
    folder = Path(__file__).parent / "commands"
    if not folder.is_dir():  # a checkout
        folder = Path(__file__).parents[1]
    sys.path.insert(0, str(folder))
    path = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(path)  # for processes that a command starts
    name = sys.argv.pop(1) if len(sys.argv) > 1 and re.fullmatch(r"[a-z]\w*(\.\w+)*", sys.argv[1]) else "main"
    modules = [name, f"tools.{name}"]
    places = [folder / "experiments" / module.replace(".", "/") for module in modules]
    there = [place.with_suffix(".py").is_file() or (place / "__main__.py").is_file() for place in places]
    if not any(there):
        sys.exit(f"error: medfuncta has no command {name!r}; without a name it is the launcher, see medfuncta --help")
    try:
        runpy.run_module(f"experiments.{modules[there.index(True)]}", run_name="__main__", alter_sys=True)
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error.name} is not installed: pip install 'medfuncta_jax[train]'")
