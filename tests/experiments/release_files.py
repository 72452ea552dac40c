"""Files as the authors' program writes them, by PyTorch, and the command that imports them."""

import sys
import types

import numpy as np
import pytest
from absl import flags

import medfuncta_jax as mf
from experiments.tools import import_release

LATENT, WIDTH, LAYERS = 5, 12, 4


def run(*words):
    options = flags.FlagValues()
    import_release.define_flags(options)
    return import_release.main(["import_release", *map(str, words)], options)


def one_line(capsys, code, *words):
    assert run(*words) == code
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="PyTorch is not installed; only reading the authors' files needs it")


@pytest.fixture
def network(torch, monkeypatch):
    """A maker of networks of the release's structure, as PyTorch modules of classes that only live in this test."""

    class Layer(torch.nn.Module):
        def __init__(self, inputs, outputs, omega, *, modulated, last=False):
            super().__init__()
            self.w0, self.last = omega, last
            self.linear = torch.nn.Linear(inputs, outputs)
            for parameter in self.linear.parameters():
                torch.nn.init.uniform_(parameter, -((6 / inputs) ** 0.5) / omega, (6 / inputs) ** 0.5 / omega)
            self.modulate_shift_layer = torch.nn.Linear(LATENT, outputs) if modulated else None

        def forward(self, x, latents):
            x = self.linear(x)
            if self.last:
                return x
            shift = 0 if self.modulate_shift_layer is None else self.modulate_shift_layer(latents)[:, None]
            return torch.sin(self.w0 * (x + shift))

    class Network(torch.nn.Module):
        def __init__(self, dims, *, first=True):
            super().__init__()
            self.layers = torch.nn.ModuleList(
                Layer(WIDTH if k else dims, WIDTH, 10.0 + 5 * k, modulated=first or k > 0) for k in range(LAYERS - 1)
            )
            self.last_layer = Layer(WIDTH, 2, 10.0 + 5 * (LAYERS - 1), modulated=True, last=True)
            self.enable_skip_connections = True
            self.modulations = torch.zeros(LATENT, requires_grad=True) * 1.0  # as in the release: not a leaf

        def forward(self, coords, latents):
            h = self.layers[0](coords, latents)
            for layer in self.layers[1:]:
                h = h + layer(h, latents)
            return self.last_layer(h, latents) + 0.5

    module = types.ModuleType("models.inrs")
    for made in (Layer, Network):
        made.__module__, made.__qualname__ = "models.inrs", made.__name__
        setattr(module, made.__name__, made)
    monkeypatch.setitem(sys.modules, "models", types.ModuleType("models"))
    monkeypatch.setitem(sys.modules, "models.inrs", module)

    def make(dims, **variant):
        torch.manual_seed(0)
        return Network(dims, **variant)

    return make


def wrapped(torch, net, shape):
    """The state dict that the release saves: of a wrapper that holds the network and the grid."""
    return {
        "grid": torch.from_numpy(mf.grid(shape).astype(np.float32)),
        **{f"model.{key}": value for key, value in net.state_dict().items()},
    }
