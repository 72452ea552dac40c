"""Every example runs from its first cell to its picture."""

import runpy
import sys

import jax
import numpy as np
import pytest
from PIL import Image

NAME = "experiments.examples.latents_in_five_minutes"


@pytest.fixture
def optimised():
    """Programs compiled as a user's are: these run for long, the tests of the mathematics only once."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.mark.usefixtures("optimised")
def test_train_your_own(tmp_path, monkeypatch, capsys):
    name = "experiments.examples.train_your_own"
    np.save(tmp_path / "images.npy", runpy.run_module(name)["mri_slices"]()[..., 0])
    monkeypatch.setattr(sys, "argv", [name, str(tmp_path / "images.npy"), "--steps=60"])
    with jax.enable_x64(False):
        psnr = runpy.run_module(name)["main"]()
    assert f"8 images never seen: {psnr:.2f} dB" in capsys.readouterr().out
    assert psnr > 26  # the mean of the training images gives 23.5 dB


@pytest.mark.slow
@pytest.mark.usefixtures("optimised")
def test_latents_in_five_minutes(tmp_path, monkeypatch, capsys):
    """First with a training of its own, then on the run that it left, which it must not train again."""
    run = tmp_path / "run"
    monkeypatch.setattr(sys, "argv", [NAME, str(run), "--steps=2", "--seen=0.2"])
    cells = runpy.run_module(NAME)
    assert cells["enlarged"].shape == (2, 128, 128, 1)
    assert cells["observed"].shape == (2, round(0.2 * 1024), 1)
    assert (cells["partial"].losses[:, -1] < cells["partial"].losses[:, 0]).all()
    np.testing.assert_allclose(cells["between"][[0, -1]], cells["reconstructed"], atol=1e-5)
    picture = run / "figures" / "latents_in_five_minutes.png"
    with Image.open(picture) as image:
        assert image.size == (1600, 980)
        assert np.asarray(image.convert("L")).std() > 30  # pictures, not a blank page
    assert str(picture) in capsys.readouterr().out

    trained = (run / "field.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(sys, "argv", [NAME, str(run), f"--figure={tmp_path / 'again.png'}", "--steps=99"])
    again = runpy.run_module(NAME)
    assert (run / "field.safetensors").stat().st_mtime_ns == trained
    assert len(again["seen"]) == 102
    np.testing.assert_array_equal(again["reconstructed"], cells["reconstructed"])
    assert (tmp_path / "again.png").exists()
