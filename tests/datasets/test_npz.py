"""Reading .npz item by item, and refusing damaged or hostile ones."""

import io
import zipfile

import numpy as np
import pytest

from medfuncta_jax.datasets import DataError
from medfuncta_jax.datasets.npz import npz_arrays


def _save(path, **arrays):
    np.savez_compressed(path, **arrays)
    return path


def test_items_equal_numpy(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (7, 5, 3), np.uint8)
    arrays = npz_arrays(_save(tmp_path / "a.npz", images=images, none=images[:0]))
    np.testing.assert_array_equal(arrays["images"].read(), images)
    np.testing.assert_array_equal(np.stack(list(arrays["images"].items())), images)
    assert arrays["none"].read().shape == (0, 5, 3)


@pytest.mark.parametrize("kept", [0, 10, 100, 0.3, 0.6, 0.99])
def test_truncated_file(tmp_path, kept):
    path = _save(tmp_path / "a.npz", images=np.random.default_rng(0).integers(0, 256, (50, 8, 8), np.uint8))
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    with pytest.raises(DataError, match=r"a\.npz: truncated or corrupt \.npz file"):
        npz_arrays(path)


def test_damage_inside_an_array_is_found_by_the_end(tmp_path):
    path = _save(tmp_path / "a.npz", images=np.random.default_rng(0).integers(0, 256, (50, 64, 64), np.uint8))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(bytes(data))
    with pytest.raises(DataError, match=r"a\.npz \(images\): truncated or corrupt"):
        npz_arrays(path)["images"].read()


def test_array_cut_short_inside_a_whole_archive(tmp_path):
    stored = io.BytesIO()
    np.save(stored, np.zeros((50, 8, 8), np.uint8))
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("images.npy", stored.getvalue()[:-100])
    with pytest.raises(DataError, match=r"the header of images, .* does not agree with its size"):
        npz_arrays(tmp_path / "a.npz")


def test_objects_are_never_unpickled(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, images=np.array([{"a": 1}], dtype=object))
    with pytest.raises(DataError, match="Python objects"):
        npz_arrays(path)


def test_huge_claim_in_a_header(tmp_path):
    stored = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        stored, {"descr": "|u1", "fortran_order": False, "shape": (10**9, 10**6, 10**6)}
    )
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("images.npy", stored.getvalue())
    with pytest.raises(DataError, match="does not agree with its size"):
        npz_arrays(tmp_path / "a.npz")


def test_missing_file_and_text_file(tmp_path):
    with pytest.raises(DataError, match=r"a\.npz: no such file"):
        npz_arrays(tmp_path / "a.npz")
    (tmp_path / "a.npz").write_text("hello")
    with pytest.raises(DataError, match="truncated or corrupt"):
        npz_arrays(tmp_path / "a.npz")
