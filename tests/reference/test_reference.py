"""The golden files follow from their inputs by `method.py`, which is checked against itself where it can be."""

import shutil

import jax
import numpy as np
import pytest

import medfuncta_jax as mf
from tests.conftest import GOLDEN_CASES
from tests.reference import golden, method

RELATIVE = 1e-9


def assert_close(actual, expected):
    """Relative to the largest entry of the array, as tests/test_golden.py."""
    np.testing.assert_allclose(actual, expected, rtol=RELATIVE, atol=RELATIVE * np.abs(expected).max())


@pytest.mark.some(2)
@pytest.mark.parametrize("name", GOLDEN_CASES)
def test_a_golden_file_follows_from_its_inputs(name):
    case, stored = golden.read(golden.FILES / f"{name}.npz")
    found = golden.quantities(case, golden.inputs_of(stored))
    assert found.keys() == stored.keys()
    for key, value in stored.items():
        assert_close(found[key], value)


@pytest.mark.parametrize("name", GOLDEN_CASES)
def test_the_gradient_in_the_latent_is_that_of_the_loss(name):
    case, stored = golden.read(golden.FILES / f"{name}.npz")
    params = {key.removeprefix("params/"): value for key, value in stored.items() if key.startswith("params/")}
    phi, y = np.random.default_rng(0).normal(size=case["latent_dim"]), stored["signals"][0]
    loss, gradient = method.loss_and_gradient(case, params, phi, stored["coords"], y)
    stepped = phi + 1j * method.STEP * np.eye(len(phi))
    by_steps = [method.loss_and_gradient(case, params, one[None], stored["coords"], y)[0][0].imag for one in stepped]
    assert_close(np.array(by_steps) / method.STEP, gradient)
    assert loss == pytest.approx(np.square(method.forward(case, params, phi, stored["coords"])[0] - y).mean())


def test_a_case_with_other_inputs(tmp_path, monkeypatch):
    """The command on one case: a file of the same layout, whose inputs are new and which the package agrees with."""
    (tmp_path / "cases").mkdir()
    shutil.copy(golden.FILES / "ecg_1d.npz", tmp_path / "cases")
    monkeypatch.setattr(golden, "FILES", tmp_path / "cases")
    monkeypatch.setattr("sys.argv", ["golden", str(tmp_path / "new"), "--seed=1"])
    golden.main()
    (_, stored), (case, drawn) = (golden.read(tmp_path / folder / "ecg_1d.npz") for folder in ("cases", "new"))
    assert {name: (array.shape, array.dtype) for name, array in drawn.items()} == {
        name: (array.shape, array.dtype) for name, array in stored.items()
    }
    assert np.array_equal(np.sort(drawn["context"]), np.broadcast_to(np.arange(37), (2, 3, 37)))
    assert not np.allclose(drawn["signals"], stored["signals"])

    layers = {key.removeprefix("params/"): value for key, value in drawn.items() if key.startswith("params/")}
    field, params = mf.field_from_layers(case, layers)
    inner = mf.InnerLoop(step_size=case["inner_lr"])

    def meta_loss(params):
        return mf.meta_loss(field, params, drawn["signals"], drawn["context"], inner=inner, coords=drawn["coords"])

    loss, gradient = jax.jit(jax.value_and_grad(meta_loss))(params)
    assert_close(loss, drawn["meta_loss"])
    for name, value in mf.named_layers(gradient).items():
        assert_close(value, drawn[f"meta_grad/{name}"])
