"""What every config starts from: the defaults of `medfuncta_jax.settings`, the paper's 2D settings."""

from ml_collections import ConfigDict

from medfuncta_jax.settings import DataSettings, Settings


def get_config(source: str = "nibabel_slices", **options) -> ConfigDict:
    """All settings at their defaults, reading `source` with its own `options`."""
    data = DataSettings(source, options=tuple(sorted(options.items())))
    return ConfigDict(Settings(data=data).to_dict())
