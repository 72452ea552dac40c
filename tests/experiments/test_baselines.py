"""A field with a latent grid through the whole launcher, and what is refused before anything is written."""

import json

import numpy as np
import pytest

import medfuncta_jax as mf
from tests.experiments.conftest import run

FEW = {"train__steps": 20, "train__eval_every": 10, "fit__steps": 5}


def test_a_field_of_patches_is_trained_extracted_and_evaluated_like_any_other(tmp_path):
    done = run(
        tmp_path, **FEW, model__latent_grid="(2,2)", model__latent_interpolation="nearest", train__method="patches"
    )
    assert done.returncode == 0, done.stderr
    field, params = mf.load_field(tmp_path)
    test = mf.load_latents(tmp_path, field=tmp_path)["test"]
    assert test.latents.shape == (32, 16)
    psnr = json.loads((tmp_path / "evaluation.json").read_text())["test"]["psnr"]
    assert psnr == pytest.approx(test.psnr.mean(), abs=1e-3)
    coarse, fine = (
        np.asarray(mf.reconstruct(field, params, test.latents[:2], mf.grid((n, n)))).reshape(2, n, n) for n in (32, 63)
    )
    np.testing.assert_allclose(fine[:, ::2, ::2], coarse, atol=1e-4)


def test_an_auto_decoder_is_trained_and_saved_with_its_latents(tmp_path):
    overrides = {"train__method": "autodecoder", "inner__learned_step_size": "none", "model__latent_grid": "(2,1)"}
    for _ in range(2):  # the second restores it and finds nothing left to do
        done = run(tmp_path, **FEW, mode="train", **overrides)
        assert done.returncode == 0, done.stderr
        assert "best validation PSNR" in done.stdout


def test_a_grid_of_other_dimensions_is_one_line_and_leaves_nothing(tmp_path):
    done = run(tmp_path / "run", model__latent_grid="(2,2,2)", model__latent_dim=16)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: model.latent_grid must have 2 entries")
    assert not (tmp_path / "run").exists()
