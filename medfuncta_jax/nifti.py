"""Volumes to NIfTI files, so that a reconstruction overlays its scan in any viewer."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np

from medfuncta_jax.atomic import atomic_path


def write_volume(
    path: Path | str,
    values: np.ndarray,
    affine: np.ndarray,
    *,
    dtype: str = "float32",
    slope: float = 1.0,
    intercept: float = 0.0,
) -> None:
    """Write a NIfTI file, whole or not at all: a reconstruction with the affine of its example overlays the scan.

    The same values give the same bytes. The folder is made if absent.

    Args:
      path: ends in .nii or .nii.gz.
      values: [X, Y, Z], or [X, Y, Z, D] of several channels; stored samples where a slope is given.
      affine: [4, 4], of voxel indices to millimetres, RAS+.
      dtype: how the voxels are stored; whole numbers are rounded, and cut at the ends of the type's range.
      slope, intercept: written to the header; a reader applies them.
    Raises:
      ValueError: another suffix, `values` that are no volume, or an affine of another shape.
    """
    import nibabel

    path, values, affine = Path(path), np.asarray(values), np.asarray(affine, np.float64)
    if not path.name.endswith((".nii", ".nii.gz")):
        raise ValueError(f"{path}: a NIfTI file ends in .nii or .nii.gz")
    if values.ndim not in (3, 4) or affine.shape != (4, 4):
        raise ValueError(f"{path}: values [X, Y, Z] and affine [4, 4] are needed, got {values.shape}, {affine.shape}")
    if np.issubdtype(dtype, np.integer):
        limits = np.iinfo(dtype)
        values = np.clip(np.rint(values), limits.min, limits.max)
    image: Any = nibabel.Nifti1Image(values.astype(dtype), affine, dtype=np.dtype(dtype))
    image.header.set_xyzt_units("mm")
    if (slope, intercept) != (1.0, 0.0):
        image.header.set_slope_inter(slope, intercept)
    with atomic_path(path) as partial:
        if path.suffix == ".nii":
            partial.write_bytes(image.to_bytes())
        else:
            # Level 1 is nibabel's; more does not compress noise better. The gzip header has no name or time.
            with open(partial, "wb") as raw, gzip.GzipFile("", "wb", 1, raw, mtime=0) as file:
                image.to_stream(file)
