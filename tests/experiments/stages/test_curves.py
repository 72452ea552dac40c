"""Quality against what a fit is given: the baselines by themselves, and the whole stage through the launcher."""

import json
import shutil

import jax
import numpy as np
import pytest

import medfuncta_jax as mf
from experiments.settings import RunSettings
from experiments.stages import curves
from medfuncta_jax import metrics
from tests.experiments.conftest import run


def linear_signal(*shape):
    """A linear function of the coordinates, in [0, 1], and its negative as a second channel."""
    coords = mf.grid(shape)
    values = 0.5 + coords @ np.linspace(0.1, 0.2, len(shape))
    return np.stack([values, 1 - values], -1).reshape(*shape, 2)


@pytest.mark.parametrize("shape", [(30,), (12, 17)], ids=str)
def test_linear_interpolation_of_a_linear_signal_is_exact_in_the_hull(shape):
    signal, count = linear_signal(*shape), int(np.prod(shape))
    observed = np.random.default_rng(0).random(count) < 0.3
    corners = np.ravel_multi_index(np.array(np.meshgrid(*([0, n - 1] for n in shape))).reshape(len(shape), -1), shape)
    observed[corners] = True
    np.testing.assert_allclose(curves.interpolated(signal, observed), signal, atol=1e-12)


@pytest.mark.parametrize("shape", [(30,), (9, 8), (5, 6, 4)], ids=str)
@pytest.mark.parametrize("points", [1, 2, 3, 20])
def test_observed_points_keep_their_values_however_few(shape, points):
    signal = np.random.default_rng(0).random((*shape, 2))
    observed = np.zeros(np.prod(shape), bool)
    observed[:points] = True  # in images and volumes the first ones lie on a line
    image = curves.interpolated(signal, observed)
    assert image.shape == signal.shape
    assert (image >= signal.reshape(-1, 2)[observed].min() - 1e-9).all()
    assert (image <= signal.reshape(-1, 2)[observed].max() + 1e-9).all()
    np.testing.assert_allclose(image.reshape(-1, 2)[observed], signal.reshape(-1, 2)[observed], atol=1e-9)


def test_against_the_truth_all_methods_are_asked_at_the_same_places():
    """A field that is constant, and truths that are linear in the coordinates: both interpolations are exact."""
    field = mf.Field(mf.ModelSettings(layers=3, width=8, latent_dim=4, omega_first=10.0, omega_last=20.0), 2, 2)
    params = jax.tree.map(np.zeros_like, field.init(jax.random.key(0)))
    coarse, fine = (8, 10), (16, 40)
    steps = [2 / (n - 1) for n in coarse]
    places = [(np.arange(m) + 0.5) * n / m - 0.5 for n, m in zip(coarse, fine, strict=True)]
    axes = [place * step - 1 for place, step in zip(places, steps, strict=True)]
    truth = 0.5 + 0.1 * np.add.outer(axes[0], 2 * axes[1])
    truth = np.stack([truth, 1 - truth], -1)
    signal = 0.5 + 0.1 * (mf.grid(coarse) @ [1, 2]).reshape(coarse)
    signal = np.stack([signal, 1 - signal], -1)
    found = curves._against_truth(field, params, np.zeros((1, 4)), signal, truth)
    assert found["linear"]["psnr"] > 99
    assert found["cubic"]["psnr"] > 50  # the spline is bent at the mirrored ends
    inner = truth[1:-1, 2:-2]
    np.testing.assert_allclose(found["field"]["mse"], np.square(inner - 0.5).mean(), rtol=1e-6)
    assert found["agreement"]["psnr"] > 99


def test_the_stage_through_the_launcher(finished, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    few = {"curves__steps": "(20, 1)", "curves__fractions": "(1.0, 0.1)", "curves__scales": "(2, 9)"}
    done = run(workdir, mode="curves", curves__signals=7, **few)
    assert done.returncode == 0, done.stderr
    assert "no true signals at 9x the training resolution: size must be 8 to 256" in done.stderr
    (written,) = workdir.glob("variants/curves.*/curves.json")
    for name in ("steps", "fractions", "scales"):
        assert (written.parent / "figures" / f"curve_{name}.png").stat().st_size > 10_000
    found = json.loads(written.read_text())
    assert found["signals"] == len(found["ids"]) == 7
    assert found["absent"].keys() == {"9"}
    assert found["settings"]["curves"]["steps"] == [20, 1]

    stored = mf.load_latents(workdir)["test"]
    rows = [stored.ids.index(name) for name in found["ids"]]
    assert rows[0] == 0
    assert rows[-1] == len(stored.ids) - 1
    one, twenty = found["steps"]
    assert (one["steps"], twenty["steps"]) == (1, 20)
    np.testing.assert_allclose(twenty["field"]["psnr"], stored.psnr[rows].mean(), rtol=1e-4)
    assert one["field"]["psnr"] < twenty["field"]["psnr"]
    assert twenty["field"]["interval"] == metrics_of(stored.psnr[rows], twenty["field"]["interval"])

    some, every = found["fractions"]
    assert (some["points"], every["points"]) == (102, 1024)
    np.testing.assert_allclose(every["field"]["psnr"], twenty["field"]["psnr"], rtol=1e-4)
    assert "linear" not in every
    assert some["field"]["psnr"] < every["field"]["psnr"]

    (double,) = found["scales"]
    assert double["grid"] == [64, 64]
    assert double.keys() == {"scale", "grid", "agreement_psnr", "field", "linear", "cubic"}
    for method in ("field", "linear", "cubic"):
        low, high = double[method]["interval"]["ssim"]
        assert low <= double[method]["ssim"] <= high

    # A point that is kept is not measured again: after a stop the stage goes on behind it.
    points = written.with_name("curves.points.json")
    kept = json.loads(points.read_text())
    assert list(kept["rows"]) == ["steps 1", "steps 20", "fraction 0.1", "fraction 1", "scale 2", "scale 9"]
    kept["rows"]["steps 1"]["field"]["psnr"] = 77.0
    del kept["rows"]["fraction 1"]
    points.write_text(json.dumps(kept))
    done = run(workdir, mode="curves", curves__signals=7, **few)
    assert done.returncode == 0, done.stderr
    again = json.loads(written.read_text())
    assert again["steps"][0]["field"]["psnr"] == 77.0
    assert again["fractions"] == found["fractions"]


def metrics_of(psnr, interval):
    """The interval that the stored PSNR gives, to the last digits that a second fit can have."""
    own = metrics.summary({"psnr": psnr}, resamples=10_000, seed=0)["interval"]["psnr"]
    np.testing.assert_allclose(interval["psnr"], own, rtol=1e-3)
    return interval


def test_no_field_no_curves(tmp_path):
    done = run(tmp_path / "run", mode="curves")
    assert done.returncode == 1
    assert "train first" in done.stderr


@pytest.mark.parametrize(
    ("name", "value"), [("steps", (0,)), ("steps", ()), ("fractions", (1.5,)), ("scales", (1,)), ("signals", 0)]
)
def test_settings_out_of_range_are_named(name, value):
    with pytest.raises(mf.SettingsError, match=f"curves.{name} must be"):
        RunSettings.from_dict({"data": {"source": "any"}, "curves": {name: value}})
