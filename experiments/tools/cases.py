"""The cases of benchmarks: a config, the shape of its signals, and the work of one run."""

from __future__ import annotations

import ast
import importlib
import math
from dataclasses import dataclass

from experiments.settings import RunSettings
from medfuncta_jax.context import context_size
from medfuncta_jax.settings import Settings


@dataclass(frozen=True)
class Case:
    """A config, and the shape of its signals."""

    config: str
    grid: tuple[int, ...]
    channels: int = 1


CASES = {
    "ecg": Case("ecg", (187,)),
    "chest_xray": Case("chest_xray", (64, 64)),
    "chest_xray_128": Case("chest_xray:128", (128, 128)),
    "chest_xray_224": Case("chest_xray:224", (224, 224)),
    "pneumonia_xray": Case("pneumonia_xray", (64, 64)),
    "retinal_oct": Case("retinal_oct", (64, 64)),
    "fundus": Case("fundus", (64, 64), 3),
    "dermatoscope": Case("dermatoscope", (64, 64), 3),
    "dermatoscope_128": Case("dermatoscope:128", (128, 128), 3),
    "dermatoscope_224": Case("dermatoscope:224", (224, 224), 3),
    "colon_histopathology": Case("colon_histopathology", (64, 64), 3),
    "cell_microscopy": Case("cell_microscopy", (64, 64)),
    "brain_mri": Case("brain_mri", (32, 32, 32)),
    "ecg_cpu": Case("ecg:cpu", (187,)),
    "chest_xray_cpu": Case("chest_xray:cpu", (64, 64)),
    "brain_mri_cpu": Case("brain_mri:cpu", (32, 32, 32)),
    "lung_ct": Case("lung_ct", (32, 32, 32)),
    "functa": Case("baselines.functa", (64, 64)),
    "coinpp": Case("baselines.coinpp", (64, 64)),
    "coinpp_patched": Case("baselines.coinpp_patched", (64, 64)),
    "spatial_functa": Case("baselines.spatial_functa", (64, 64)),
}
SHORT = {"1d": "ecg", "2d": "chest_xray", "3d": "brain_mri"}


def settings_of(case: Case, overrides: list[str], batch: int | None) -> Settings:
    """The settings of a case's config, with `GROUP.FIELD=VALUE` overrides and the batch size.

    Raises:
      ValueError, SettingsError: an override that is not of that form, or that no setting takes.
    """
    name, _, variant = case.config.partition(":")
    values = importlib.import_module(f"configs.{name}").get_config(variant).to_dict()
    for override in overrides:
        place, separator, text = override.partition("=")
        group, dot, field = place.partition(".")
        if not (separator and dot) or group not in values:
            raise ValueError(f"{override!r} is not GROUP.FIELD=VALUE with a group of the config")
        try:
            values[group][field] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            values[group][field] = text  # a word
    if batch:
        values["train"]["batch_size"] = values["fit"]["batch_size"] = batch
    return RunSettings.from_dict(values)


def work(case: Case, settings: Settings, *, mode: str, batch: int) -> dict[str, float]:
    """The minimum work of one run, if nothing is computed twice.

    An inner step needs six products for each layer that the latent reaches: forward, the gradient in the layer's input,
    and for both of these, in the backward pass, the gradient in its input and in its weights. The outer loss needs
    three products, a step at test time two. Layers before the latent are computed once for points that signals or steps
    share. The count does not apply to a field with one modulated layer, whose steps have no sine or product of a
    layer's size.

    Returns:
      flops: operations of matrix products. sines: sines and cosines, one of each for an element of a layer and a step.
    """
    model, inner = settings.model, settings.inner
    points, width, modulated = math.prod(case.grid), model.width, model.layers - 2
    if mode == "train":
        seen = context_size(points, settings.train.selection_ratio)
        context = context_size(seen, inner.selection_ratio)
        at_once = settings.train.micro_batch or batch
        # Contexts that the signals in memory share take the features of all points from the outer loss.
        shared = 0 if context == seen or inner.shared_context or at_once == 1 else batch
        runs = [(inner.steps * context, 6, shared, inner.steps), (seen, 3, 1, 1)]
    else:
        runs = [(settings.fit.steps * points, 2, 0, settings.fit.steps)]
    flops = sines = 0
    for count, products, first, steps in runs:
        layers = (modulated - 1) * width**2 + width * case.channels
        flops += 2 * products * (count * batch * layers + steps * batch * modulated * model.latent_dim * width)
        flops += 2 * 3 * first * count * width * (width + len(case.grid))
        sines += 2 * count * (batch * modulated + first) * width
    return {"flops": float(flops), "sines": float(sines)}
