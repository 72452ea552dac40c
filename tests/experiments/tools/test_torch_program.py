"""The PyTorch program that times are compared with is the method, and a comparison with it is a row."""

import json

import numpy as np
import pytest

from experiments.tools import benchmark
from medfuncta_jax.settings import SettingsError
from tests.experiments.command_line import run_module

RELATIVE = 1e-9
SMALL = ["model.layers=4", "model.width=8", "model.latent_dim=4", "inner.steps=2", "fit.steps=2"]


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="torch is not installed: pip install 'medfuncta_jax[peer]'")


@pytest.fixture(scope="module")
def built(torch, golden):
    """The module with the parameters of a golden file, in float64."""
    from experiments.tools.torch_program import ModulatedSiren

    case, layers = golden.case, golden.layers("params")
    field = ModulatedSiren(case, len(case["shape"]), case["channels"]).double()
    with torch.no_grad():
        for name, parameter in own_names(field).items():
            parameter.copy_(torch.from_numpy(layers[name].T))
    return field


def own_names(field):
    """The module's parameters by the names of a golden file; kernels are the transposes of weights."""
    named = {f"layer_{k}": layer for k, layer in enumerate(field.layers, start=1)}
    named |= {f"modulation_{k}": layer for k, layer in enumerate(field.modulations, start=2)}
    kinds = {"kernel": "weight", "bias": "bias"}
    return {f"{name}/{kind}": getattr(layer, own) for name, layer in named.items() for kind, own in kinds.items()}


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=RELATIVE, atol=RELATIVE * np.abs(expected).max())


def test_its_meta_gradient_is_that_of_the_golden_files(torch, golden, built):
    from experiments.tools.torch_program import meta_loss

    coords, signals, context = (torch.from_numpy(golden[name]) for name in ("coords", "signals", "context"))
    parameters = own_names(built)
    loss = meta_loss(built, coords, signals, context.transpose(0, 1), step_size=golden.case["inner_lr"])
    assert_close(loss.item(), golden["meta_loss"])
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    for name, gradient in zip(parameters, gradients, strict=True):
        assert_close(gradient.numpy().T, golden.layers("meta_grad")[name])


def test_its_fit_is_that_of_the_golden_files(torch, golden, built):
    from experiments.tools.torch_program import descend

    coords, signals = torch.from_numpy(golden["coords"]), torch.from_numpy(golden["signals"])
    steps = [None] * golden.case["fit_steps"]
    latents = descend(built, coords, signals, steps, step_size=golden.case["inner_lr"], second_order=False)
    assert_close(latents.detach().numpy(), golden["fit_latents"])
    assert_close(built(latents, coords).detach().numpy(), golden["fit_reconstructions"])


@pytest.mark.parametrize("shared", [False, True])
def test_its_contexts_are_those_of_the_settings(torch, shared):
    from experiments.tools.torch_program import random_contexts

    inner = {"selection_ratio": 0.25, "steps": 3, "shared_context": shared}
    contexts = random_contexts(inner, points=30, signals=2)
    assert [tuple(rows.shape) for rows in contexts] == [(7,) if shared else (2, 7)] * 3
    assert all(len(set(row.tolist())) == 7 for rows in contexts for row in rows.reshape(-1, 7))
    assert random_contexts(inner | {"selection_ratio": 1.0}, points=30, signals=2) == [None] * 3


@pytest.mark.parametrize("mode", ["train", "fit"])
def test_a_comparison_is_a_row(torch, mode):
    words = ["--case=1d", f"--mode={mode}", "--batch=2", "--repeats=2", f"--set={','.join(SMALL)}", "--vs=torch"]
    ended = run_module("experiments.tools.benchmark", *words)
    assert ended.returncode == 0, ended.stderr
    row = json.loads(ended.stdout)
    assert (row["vs"], row["mode"], len(row["other_seconds"])) == ("torch", mode, 2)
    assert row["ratio"] == pytest.approx(np.median(np.divide(row["seconds"], row["other_seconds"])))
    assert row["host_ratio"] == pytest.approx(row["host_gb"] / row["other_host_gb"])


def test_settings_that_it_would_do_without_are_refused():
    case = benchmark.CASES["ecg"]
    benchmark.written_in_torch(benchmark.settings_of(case, [*SMALL, "inner.remat=none", "train.micro_batch=1"], 2))
    with pytest.raises(SettingsError, match=r"model.modulate_scale = True is not in the PyTorch program"):
        benchmark.written_in_torch(benchmark.settings_of(case, ["model.modulate_scale=True"], 2))
    with pytest.raises(SettingsError, match=r"--vs=torch needs inner.learned_step_size='none'"):
        benchmark.written_in_torch(benchmark.settings_of(benchmark.CASES["ecg_cpu"], [], 2))
