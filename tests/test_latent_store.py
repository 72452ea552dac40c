import numpy as np
import pytest

import medfuncta_jax as mf
from medfuncta_jax.latent_store import LatentStoreError, read_split, write_split


@pytest.mark.parametrize("affines", [None, np.stack([np.diag([2.0, 2, 2, 1])] * 3)])
def test_round_trip(tmp_path, affines):
    split = mf.LatentSplit(
        latents=np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32),
        labels=np.array([0, 2, -1]),
        ids=("a", "b/c", "ü"),
        psnr=np.array([30.0, 31, 32], np.float32),
        affines=affines,
        about={"grid": [4, 4], "classes": ["x"]},
    )
    write_split(tmp_path / "latents" / "test.npz", split)
    for place in (tmp_path, tmp_path / "latents"):
        again = mf.load_latents(place)["test"]
        for name in ("latents", "labels", "psnr"):
            np.testing.assert_array_equal(getattr(again, name), getattr(split, name))
        assert (again.ids, again.about) == (split.ids, split.about)
        assert (again.affines is None) == (affines is None)


def test_nothing_there(tmp_path):
    with pytest.raises(LatentStoreError, match="no latents in"):
        mf.load_latents(tmp_path)
    with pytest.raises(LatentStoreError, match=r"no latents at .*extract them first"):
        read_split(tmp_path / "train.npz")


def test_damaged(tmp_path):
    (tmp_path / "train.npz").write_bytes(b"PK\x03\x04 not an archive")
    with pytest.raises(LatentStoreError, match=r"train.npz is damaged"):
        mf.load_latents(tmp_path)
