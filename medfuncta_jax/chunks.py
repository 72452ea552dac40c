"""How many points of a signal are evaluated at once."""

from __future__ import annotations

import jax

from medfuncta_jax.field import Field

# Default chunk size in activation elements (signals x points x width), in float32 4 MB and 64 MB: small enough for the
# caches of a CPU (in one piece, 32^3 points take 28 % longer, 8 images of 64^2 40 %), and large enough for all units of
# an accelerator.
_ELEMENTS, _ELEMENTS_ON_ACCELERATORS = 2**20, 2**24


def default_chunk(field: Field, batch: int, *, shared: bool, accelerator: bool) -> int:
    """Default chunk size: points of each of `batch` signals that are evaluated at once, the same for all or not."""
    elements = _ELEMENTS_ON_ACCELERATORS if accelerator else _ELEMENTS
    return max(1, elements // field.points.elements(max(1, batch), shared=shared))


def chunk_of(field: Field, points: int | None, batch: int, *, shared: bool) -> int:
    """The chunk size asked for, or the default of this machine."""
    return points or default_chunk(field, batch, shared=shared, accelerator=jax.default_backend() != "cpu")
