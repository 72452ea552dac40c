"""Reading of PyTorch's files as data: state dicts, checkpoints with one, and pickled networks without their classes.

No code in a file is ever run: the unpickler builds plain values and tensors only, and takes a stand-in for every class
that a network names. Files of `torch.save` are read in any floating precision; files before PyTorch 1.6 only as state
dicts. Other files are recognised by their first bytes.
"""

from __future__ import annotations

import contextlib
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from medfuncta_jax.datasets.contents import contents

# The entry that identifies the release's networks in a checkpoint.
FIRST = "layers.0.linear.weight"

# The pickled number at the start of files before PyTorch 1.6, and of no other pickles.
_OLD_FORM = bytes.fromhex("6cfc9c46f9206aa85019")


class ReleaseError(ValueError):
    """A file is not what the release writes, or does not say enough; the one-line message names it and the remedy."""


def read_weights(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """A state dict, alone or in a checkpoint beside other entries, or a pickled network without its classes.

    Returns:
      arrays: float32, by name, from any floating precision.
      attributes: plain attributes of a pickled network, by dotted name; empty for a state dict.
    Raises:
      ReleaseError: none of these, several networks, or PyTorch is absent.
    """
    content = load(path, with_stand_ins=True)
    networks = dict(_networks(content, ""))
    if len(networks) > 1:
        raise ReleaseError(f"{path} holds several networks ({', '.join(networks)}); save the one to import by itself")
    tensors, attributes = next(iter(networks.values()), None) or _parts_of(content)
    arrays = {}
    for key, tensor in tensors.items():
        if not getattr(tensor, "is_floating_point", bool)():
            raise ReleaseError(f"{path}: {key!r} is no array of floats; expected a state dict or a pickled network")
        arrays[str(key)] = as_array(tensor)
    return arrays, attributes


def as_array(value: Any) -> np.ndarray:
    """A tensor or a list of numbers as an array; float32 from any floating precision, which numpy need not know."""
    if not hasattr(value, "is_floating_point"):
        return np.asarray(value)
    value = value.detach()
    return (value.float() if value.is_floating_point() else value).numpy()


def load(path: Path, *, with_stand_ins: bool = False) -> Any:
    """The content of a file of `torch.save`, by the unpickler that builds plain values and tensors only.

    Args:
      path: the file.
      with_stand_ins: whether named classes are replaced; else they are refused.
    Raises:
      ReleaseError: no such file, something else, damaged, a class that is not replaced, or PyTorch is absent.
    """
    torch = _torch()
    if not path.is_file():
        raise ReleaseError(f"{path}: no such file")
    stand_ins: dict[str, type] = {}
    if with_stand_ins and zipfile.is_zipfile(path):
        with contextlib.suppress(Exception):  # a damaged file: loading gives a better message
            names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            stand_ins = {name: type(name, (_StandIn,), {}) for name in names}
    while True:  # a file of the old form names its classes one by one
        try:
            named = [(stand_in, name) for name, stand_in in stand_ins.items()]
            with torch.serialization.safe_globals(named), warnings.catch_warnings(action="ignore"):
                return torch.load(path, map_location="cpu", weights_only=True)
        except PermissionError:
            raise
        except Exception as error:  # damaged files raise many types of errors
            found = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
            if not with_stand_ins or not found or found[1] in stand_ins:
                raise _refusal(path, error, found[1] if found else "") from error
            stand_ins[found[1]] = type(found[1], (_StandIn,), {})


def _refusal(path: Path, error: Exception, name: str) -> ReleaseError:
    if isinstance(error, MemoryError):
        return ReleaseError(f"{path} does not fit into memory; read it on a larger machine")
    if name:
        return ReleaseError(
            f"{path} is no file of the release (it names {name}, which is not run); save its state dict instead"
        )
    what, reason = contents(path), ""
    with open(path, "rb") as file:
        old = _OLD_FORM in file.read(64)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        if any("/code/" in entry for entry in names):
            reason = "TorchScript; save its state dict instead"
        elif not any(entry.endswith("data.pkl") for entry in names):
            reason = "another archive; name a file of torch.save"
    elif old and "persistent_load" in str(error):  # torch's name for the addition of such a file to a class
        reason = "a whole network in the form before PyTorch 1.6; load it there and save its state dict"
    elif what == "a Python pickle" and not old:
        reason = "a plain pickle; write it anew with torch.save"
    elif what not in ("", "a ZIP archive", "a Python pickle"):
        reason = f"{what}; download it again or name another"
    if reason:
        return ReleaseError(f"{path} is no file of the release but {reason}")
    return ReleaseError(f"{path} is no file of the release, or cut off or damaged; download it again")


class _StandIn:
    """Replaces a class or function that a pickle names: keeps the attributes, does nothing."""

    def __init__(self, *_: Any):
        pass


def _networks(content: Any, name: str) -> Iterator[tuple[str, tuple[dict[str, Any], dict[str, Any]]]]:
    """Tensors and attributes of the networks in a checkpoint, by their place in it."""
    if not isinstance(content, (Mapping, _StandIn)):
        return
    parts = _parts_of(content)
    if any(str(key).endswith(FIRST) for key in parts[0]):
        yield name or "the file itself", parts
    elif isinstance(content, Mapping):
        for key, value in content.items():
            yield from _networks(value, f"{name}.{key}" if name else str(key))


def _parts_of(module: Any, prefix: str = "") -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensors and plain attributes of a state dict, or of a PyTorch module and its children, by dotted name."""
    if isinstance(module, Mapping):
        return dict(module), {}
    content = vars(module) if isinstance(module, _StandIn) else {}
    tensors = {**content.get("_parameters", {}), **content.get("_buffers", {})}
    tensors = {prefix + name: tensor for name, tensor in tensors.items() if tensor is not None}
    attributes = {prefix + name: value for name, value in content.items() if isinstance(value, (bool, int, float))}
    for name, child in content.get("_modules", {}).items():
        for mine, its in zip((tensors, attributes), _parts_of(child, f"{prefix}{name}."), strict=True):
            mine.update(its)
    return tensors, attributes


def _torch() -> ModuleType:
    try:
        import torch
    except ImportError as error:
        raise ReleaseError("reading PyTorch's files takes PyTorch: pip install 'torch>=2.6' (CPU is enough)") from error
    if not hasattr(torch.serialization, "get_unsafe_globals_in_checkpoint"):
        raise ReleaseError(f"PyTorch {torch.__version__} is too old: pip install 'torch>=2.6' (CPU is enough)")
    return torch
