"""The config of a command: a file, a shipped config by name, or either with the data of another source.

    --config=quickstart                                         configs/quickstart.py, from any directory
    --config=methods/mine.py:cpu                                a file of the user's own
    --config=chest_xray:128 --config.data.source=image_folder   its settings, with the options of that source

This file is itself a config, of the last kind: `config_files.py:SOURCE:CONFIG`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from medfuncta_jax.datasets import SOURCES, source_options
from medfuncta_jax.settings import SettingsError

SHIPPED = Path(__file__).parents[2] / "configs"


def resolved(argv: Sequence[str]) -> list[str]:
    """The words of a command, with the config replaced by a file.

    Raises:
      ValueError: no file and no shipped config of that name.
    """
    words = list(argv)
    source = ""
    for word in words:
        name, _, value = word.lstrip("-").partition("=")
        source = value if name == "config.data.source" else source
    for i, word in enumerate(words):
        dashes, name, value = word.partition("config=")
        at = i
        if word.lstrip("-") == "config" and i + 1 < len(words):
            at, dashes, name, value = i + 1, "-", "", words[i + 1]
        if dashes in ("-", "--"):
            file = found(value)
            if source in SOURCES:
                file = f"{__file__}:{source}:{file}"
            words[at] = file if at > i else f"{dashes}{name}{file}"
    return words


def found(config: str) -> str:
    """FILE or FILE:VARIANT of a config given by file or by name.

    Raises:
      ValueError: neither a file nor the name of a shipped config.
    """
    file, colon, variant = config.partition(":")
    by_name = file.removesuffix(".py").removeprefix("configs/")
    places = [Path(file).expanduser(), SHIPPED / f"{by_name}.py", SHIPPED / "baselines" / f"{by_name}.py"]
    for place in places:
        if place.is_file():
            return f"{place}{colon}{variant}"
    if "/" in file or file.endswith(".py"):
        return config  # a later error names the path if the file is absent
    names = sorted(path.stem for path in SHIPPED.rglob("*.py") if path.stem not in ("__init__", "base"))
    raise ValueError(
        f"--config={config}: no such file, and no shipped config of that name, which are {', '.join(names)}"
    )


def get_config(text: str) -> ConfigDict:
    """SOURCE:CONFIG: a config with the options of another source, at their defaults except options of both sources."""
    source, _, config = text.partition(":")
    file, _, variant = config.partition(":")
    spec = importlib.util.spec_from_file_location("config_of_another_source", file)
    if spec is None or spec.loader is None:
        raise ValueError(f"{file} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    values: ConfigDict = module.get_config(*([variant] if variant else []))
    if values.data.source == source:
        return values
    former = values.data.to_dict()
    kind = source_options(source)
    defaults = {one.name: "" if one.default is dataclasses.MISSING else one.default for one in dataclasses.fields(kind)}
    shared = {name: former[name] for name in defaults if name in former}
    try:
        kind(**(defaults | shared))
    except SettingsError:  # a size that the other source lacks
        shared = {}
    with values.unlocked():
        values.data = ConfigDict({"source": source, "cache_dir": former["cache_dir"]} | defaults | shared)
    return values
