"""A meta-update or a fit of a benchmark's case in idiomatic PyTorch: autograd, float32, one batch.

The command is one side of `benchmark --vs=torch`: `python torch_program.py JSON` prepares the program of a case, and
runs it once for every input line. The module imports nothing of the package, so that its memory is measured alone.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

Settings = Mapping[str, Mapping[str, Any]]  # `Settings.to_dict()`


class ModulatedSiren(torch.nn.Module):
    """The field of `settings["model"]`: shift modulations of all sine layers but the first."""

    def __init__(self, model: Mapping[str, Any], coord_dims: int, channels: int):
        super().__init__()
        layers, width, latent_dim = model["layers"], model["width"], model["latent_dim"]
        self.omega = torch.linspace(model["omega_first"], model["omega_last"], layers, dtype=torch.float64).tolist()
        self.residual, self.offset = model["residual"], model["offset"]
        inputs = [coord_dims] + [width] * (layers - 1)
        outputs = [width] * (layers - 1) + [channels]
        self.layers = torch.nn.ModuleList(torch.nn.Linear(*sizes) for sizes in zip(inputs, outputs, strict=True))
        # The initialisation of torch.nn.Linear equals that of modulations: uniform, 1/sqrt(P).
        self.modulations = torch.nn.ModuleList(torch.nn.Linear(latent_dim, width) for _ in range(layers - 2))
        for number, (layer, omega) in enumerate(zip(self.layers, self.omega, strict=True)):
            bound = 1 / coord_dims if number == 0 else math.sqrt(6 / width) / omega
            for parameter in layer.parameters():
                torch.nn.init.uniform_(parameter, -bound, bound)

    def forward(self, latents: torch.Tensor, coords: torch.Tensor) -> torch.Tensor:
        """f [B, n, D] at coords [n, C] or [B, n, C] for latents [B, P]."""
        first, *hidden, last = self.layers
        h = torch.sin(self.omega[0] * first(coords))
        for omega, layer, modulation in zip(self.omega[1:-1], hidden, self.modulations, strict=True):
            s = torch.sin(omega * (layer(h) + modulation(latents).unsqueeze(1)))
            h = h + s if self.residual else s
        return last(h) + self.offset


def losses(field: ModulatedSiren, latents: torch.Tensor, coords: torch.Tensor, signals: torch.Tensor) -> torch.Tensor:
    """Mean squared errors [B] of signals [B, n, D]."""
    return torch.square(field(latents, coords) - signals).mean(dim=(1, 2))


def descend(
    field: ModulatedSiren,
    coords: torch.Tensor,
    signals: torch.Tensor,
    contexts: Iterable[torch.Tensor | None],
    *,
    step_size: float,
    second_order: bool,
) -> torch.Tensor:
    """Latents [B, P] after a step on each context: points [n] or [B, n], None for all."""
    latent_dim = field.modulations[0].in_features
    latents = torch.zeros(len(signals), latent_dim, dtype=signals.dtype, requires_grad=True)
    batch = torch.arange(len(signals)).unsqueeze(1)
    for rows in contexts:
        seen = signals if rows is None else signals[:, rows] if rows.ndim == 1 else signals[batch, rows]
        loss = losses(field, latents, coords if rows is None else coords[rows], seen).sum()
        (gradient,) = torch.autograd.grad(loss, latents, create_graph=second_order)
        latents = latents - step_size * gradient
        if not second_order:
            latents = latents.detach().requires_grad_()
    return latents


def meta_loss(
    field: ModulatedSiren,
    coords: torch.Tensor,
    signals: torch.Tensor,
    contexts: Iterable[torch.Tensor | None],
    *,
    step_size: float,
) -> torch.Tensor:
    """The outer loss on every point, a scalar with exact derivatives."""
    latents = descend(field, coords, signals, contexts, step_size=step_size, second_order=True)
    return losses(field, latents, coords, signals).mean()


def random_contexts(inner: Mapping[str, Any], *, points: int, signals: int) -> list[torch.Tensor | None]:
    """The points of every inner step, drawn without replacement."""
    if inner["selection_ratio"] == 1:
        return [None] * inner["steps"]
    size = int(inner["selection_ratio"] * points)
    if inner["shared_context"]:
        return [torch.randperm(points)[:size] for _ in range(inner["steps"])]
    return [torch.rand(signals, points).argsort(dim=1)[:, :size] for _ in range(inner["steps"])]


def prepare(grid: Sequence[int], channels: int, settings: Settings, *, mode: str, batch: int) -> Callable[[], None]:
    """A function that runs one meta-update ("train") or one fit ("fit") on random signals."""
    torch.manual_seed(0)
    field = ModulatedSiren(settings["model"], len(grid), channels)
    axes = [torch.linspace(-1, 1, size) for size in grid]
    coords = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, len(grid))
    signals = torch.rand(batch, len(coords), channels)
    inner, train, step_size = settings["inner"], settings["train"], settings["inner"]["step_size"]
    if mode == "fit":
        field.requires_grad_(False)
        everything = [None] * settings["fit"]["steps"]

        def fit() -> None:
            descend(field, coords, signals, everything, step_size=step_size, second_order=False)

        return fit
    optimizer = torch.optim.AdamW(
        field.parameters(), lr=train["learning_rate"], weight_decay=train["weight_decay"]
    )  # fmt: skip

    def update() -> None:
        contexts = random_contexts(inner, points=len(coords), signals=batch)
        optimizer.zero_grad()
        meta_loss(field, coords, signals, contexts, step_size=step_size).backward()
        if train["clip_norm"]:
            torch.nn.utils.clip_grad_norm_(field.parameters(), train["clip_norm"])
        optimizer.step()

    return update


def _serve(described: str) -> None:
    """Runs the program once for every input line; prints seconds, and peak GB of the host and the device."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    run = prepare(**json.loads(described))
    print(json.dumps("ready"), flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        run()
        seconds = time.perf_counter() - began
        print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 0]), flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1])
