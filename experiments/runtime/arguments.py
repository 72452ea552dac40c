"""The launcher's command-line words, in the order and form that absl and ml_collections need.

Flags may have any order and the form `--name=value` or `--name value`. If a setting is given twice, the last value
counts. A directory that holds a run provides the config.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

_FLAG = re.compile(r"--?[A-Za-z][\w.]*(\[\d+\])?(=.*)?", re.DOTALL)
_HELP = ("-h", "--help", "-help", "-?")


def wants_help(argv: Sequence[str]) -> bool:
    """Whether the command asks for help."""
    return any(word in _HELP for word in argv[1:])


def arranged(argv: Sequence[str]) -> list[str]:
    """The words of a command: its name, words other than settings, the config, and each setting once.

    If no config is named, the one in the run's directory is taken; `stored_config` reads a `config.json`.
    """
    command, *words = argv
    given: dict[str, str] = {}  # by the name of the flag, the last word
    others: list[str] = []
    while words:
        word = words.pop(0)
        if not _FLAG.fullmatch(word):
            others.append(word)
            continue
        if "=" not in word and words and not _FLAG.fullmatch(words[0]):
            word = f"{word}={words.pop(0)}"
        name, _, value = word.lstrip("-").partition("=")
        given.pop(name, None)
        given[name] = f"--{name}={value}" if "=" in word else word
    workdir = given.get("workdir", "").partition("=")[2]
    if "config" not in given and workdir and (stored := Path(workdir).expanduser() / "config.json").is_file():
        given["config"] = f"--config={stored}"
    config = given.get("config", "").partition("=")[2]
    if config.endswith(".json"):
        given["config"] = f"--config={Path(__file__).with_name('stored_config.py')}:{config}"
    settings = [word for name, word in given.items() if name.startswith("config.")]
    plain = [word for name, word in given.items() if not name.startswith("config.") and name != "config"]
    return [command, *plain, *([given["config"]] if config else []), *settings, *others]
