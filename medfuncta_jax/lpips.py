"""LPIPS of images by AlexNet (Zhang et al. 2018, version 0.1), as pure functions of its weights.

Features of five convolution stages are scaled to unit length at each pixel; the squared differences are weighted by
one head a stage, averaged over pixels and summed over stages. The weights are not part of this package: they are read
from a .npz file, see `load_weights`.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from medfuncta_jax.product import FULL

Array = jax.Array | np.ndarray

# Kernel size, stride, padding, input and output channels of the five stages; the second and third are max-pooled first.
_STAGES = ((11, 4, 2, 3, 64), (5, 1, 2, 64, 192), (3, 1, 1, 192, 384), (3, 1, 1, 384, 256), (3, 1, 1, 256, 256))
_POOLED = (1, 2)
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of the colour channels in [-1, 1], of ImageNet
_EPSILON = 1e-10

SMALLEST_SIDE = 31  # with fewer pixels nothing is left after the second pooling

WEIGHT_SHAPES: dict[str, tuple[int, ...]] = {
    name: shape
    for k, (size, _, _, inputs, outputs) in enumerate(_STAGES, start=1)
    for name, shape in (
        (f"conv_{k}/kernel", (size, size, inputs, outputs)),
        (f"conv_{k}/bias", (outputs,)),
        (f"head_{k}", (outputs,)),
    )
}


def checked_weights(arrays: Mapping[str, Array], source: str) -> dict[str, np.ndarray]:
    """The arrays of `WEIGHT_SHAPES`, as float32.

    Args:
      arrays: names to arrays; others are ignored.
      source: origin of the arrays, a file's name, for messages.
    Raises:
      ValueError: an array is missing, misshapen, or not finite; the message names the source and the array.
    """
    for name, shape in WEIGHT_SHAPES.items():
        if name not in arrays:
            raise ValueError(
                f"{source}: array {name} of shape {shape} is missing, so it holds no weights of LPIPS(alex)"
            )
        if tuple(arrays[name].shape) != shape:
            raise ValueError(f"{source}: array {name} has shape {tuple(arrays[name].shape)}, LPIPS(alex) needs {shape}")
        if arrays[name].dtype.kind != "f" or not np.isfinite(arrays[name]).all():
            raise ValueError(f"{source}: array {name} holds values that are no finite floating numbers")
    return {name: np.asarray(arrays[name], np.float32) for name in WEIGHT_SHAPES}


def load_weights(path: Path | str) -> dict[str, np.ndarray]:
    """Weights from a .npz file of the arrays in `WEIGHT_SHAPES` (kernels [rows, columns, in, out]).

    Raises:
      ValueError: no such file, a damaged one, or arrays that do not fit; the message names the file and the array.
    """
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files if name in WEIGHT_SHAPES}
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; it should hold the weights of LPIPS(alex)") from None
    except (OSError, EOFError, ValueError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not a readable .npz file of weights of LPIPS(alex); replace it") from error
    return checked_weights(arrays, str(path))


def compared_size(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns at which images of `shape` [rows, columns] are compared: doubled until AlexNet can see them."""
    factor = 1
    while factor * min(shape) < SMALLEST_SIDE:
        factor *= 2
    return factor * shape[0], factor * shape[1]


def lpips(weights: Mapping[str, Array], a: Array, b: Array) -> jax.Array:
    """Learned perceptual distance of images.

    Grey images are repeated to three channels. Images with a side below `SMALLEST_SIDE` are upsampled, bilinearly
    between pixel centres, to `compared_size`.

    Args:
      weights: the arrays of `WEIGHT_SHAPES`.
      a, b: floating, [B, H, W, D] of one shape, D = 1 or 3, in [0, 1]; nothing is clipped. The order does not matter.
    Returns:
      [B], 0 where a equals b, and >= 0 for heads >= 0; in the wider of the two dtypes and at least float32.
    Raises:
      ValueError: shapes differ or are no images of one or three channels, or integer arrays.
    """
    if a.shape != b.shape or a.ndim != 4 or a.shape[-1] not in (1, 3) or 0 in a.shape[1:]:
        raise ValueError(f"LPIPS needs images [B, H, W, 1 or 3] of one shape, got {tuple(a.shape)}, {tuple(b.shape)}")
    for array in (a, b):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"LPIPS needs floating images in [0, 1], got {array.dtype}")
    dtype = jnp.result_type(a.dtype, b.dtype, jnp.float32)
    return _lpips(
        {name: jnp.asarray(weights[name], dtype) for name in WEIGHT_SHAPES}, *(jnp.asarray(x, dtype) for x in (a, b))
    )


@jax.jit
def _lpips(weights: dict[str, jax.Array], a: jax.Array, b: jax.Array) -> jax.Array:
    total = jnp.zeros(a.shape[0], a.dtype)
    for k, (one, other) in enumerate(zip(_features(weights, a), _features(weights, b), strict=True), start=1):
        difference = jnp.square(_unit_length(one) - _unit_length(other))
        total += (difference * weights[f"head_{k}"]).sum(-1).mean((1, 2))
    return total


def _features(weights: dict[str, jax.Array], images: jax.Array) -> list[jax.Array]:
    """Activations of the stages, [B, h, w, channels] each, of images [B, H, W, 1 or 3] in [0, 1]."""
    batch, rows, columns, _ = images.shape
    images = jnp.broadcast_to(images, (batch, rows, columns, 3))
    if compared_size((rows, columns)) != (rows, columns):
        images = jax.image.resize(images, (batch, *compared_size((rows, columns)), 3), "bilinear")
    values = (2 * images - 1 - jnp.asarray(_SHIFT, images.dtype)) / jnp.asarray(_SCALE, images.dtype)
    features = []
    for k, (_, stride, padding, _, _) in enumerate(_STAGES):
        if k in _POOLED:
            values = jax.lax.reduce_window(values, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "VALID")
        values = jax.lax.conv_general_dilated(
            values, weights[f"conv_{k + 1}/kernel"], (stride, stride), [(padding, padding)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=FULL,
        )  # fmt: skip
        values = jax.nn.relu(values + weights[f"conv_{k + 1}/bias"])
        features.append(values)
    return features


def _unit_length(features: jax.Array) -> jax.Array:
    return features / (jnp.sqrt(jnp.square(features).sum(-1, keepdims=True)) + _EPSILON)
