"""The config of a run, from the `config.json` in its directory, for stages after training.

--config=RUN/config.json, or --workdir=RUN alone
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from ml_collections import ConfigDict

from experiments.settings import RunSettings
from medfuncta_jax.datasets import source_options
from medfuncta_jax.settings import dataclass_from_dict


def get_config(path: str) -> ConfigDict:
    """All settings of a run; newer options of its source have their defaults.

    Raises:
      ValueError: no such file, a damaged one, or one of another version.
    """
    try:
        values = json.loads(Path(path).expanduser().read_text())
        settings = RunSettings.from_saved(values)
        options = dataclass_from_dict(source_options(settings.data.source), dict(settings.data.options), "data")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; name the directory of a run") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged; give the config that the run was started with") from error
    values = settings.to_dict()
    values["data"] |= dataclasses.asdict(options)
    return ConfigDict(values)
