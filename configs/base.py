"""The base of every config: the defaults of `medfuncta_jax.settings`, and the paper's settings by dimension."""

import dataclasses
import math

from ml_collections import ConfigDict

from experiments.settings import RunSettings
from medfuncta_jax.datasets import source_options
from medfuncta_jax.settings import DataSettings


def get_config(source: str, **options) -> ConfigDict:
    """All settings at their defaults (the paper's 2D settings at 64x64), reading `source` with `options`.

    The source's other options are included at their defaults, so that a flag can override each of them.
    `model.products` stays "float32": after 2000 updates of the 2D field on six kinds of grey images at 64x64, on an
    H200, test PSNR was 24.55 dB, with "tensorfloat32" 24.29 and with "bfloat16" 24.46 (one seed;
    experiments/RESULTS.md has the command).
    """
    every = dataclasses.asdict(source_options(source)(**options))
    data = DataSettings(source, options=tuple(sorted(every.items())))
    return ConfigDict(RunSettings(data=data).to_dict())


def paper_1d(config: ConfigDict) -> ConfigDict:
    """Series of 187 samples (MedFuncta, MIDL 2026, table of hyperparameters)."""
    config.model.update(layers=8, width=64, latent_dim=64, omega_first=20.0, omega_last=200.0)
    config.inner.selection_ratio = 1.0
    config.train.batch_size = 64
    config.fit.batch_size = 512
    return config


def paper_2d(config: ConfigDict, size: int) -> ConfigDict:
    """Images of 64x64, 128x128 or 224x224 (the same table, and table 2 for the larger ones); 28x28 as 64x64."""
    if size == 128:
        config.model.update(latent_dim=8192, omega_first=30.0, omega_last=300.0)
        config.train.batch_size = 8
        config.fit.batch_size = 16
    elif size == 224:
        config.model.update(latent_dim=16384, omega_first=30.0, omega_last=300.0)
        config.inner.selection_ratio = 0.1
        config.train.batch_size = 4
        config.fit.batch_size = 4
    return config


def paper_3d(config: ConfigDict) -> ConfigDict:
    """Volumes of 32x32x32 (the same table)."""
    config.model.update(latent_dim=8192, omega_last=300.0)
    config.train.batch_size = 4
    config.train.eval_signals = 32
    config.fit.batch_size = 4
    return config


def cpu(
    config: ConfigDict,
    *,
    width: int,
    latent_dim: int,
    steps: int,
    batch_size: int,
    fit_steps: int = 100,
    inner_steps: int = 5,
    selection_ratio: float = 1.0,
) -> ConfigDict:
    """A recipe for two cores: one modulated layer, whose field is a sum of shared basis functions (see `siren.py`).

    The recipe takes every point of the update in every inner step, learned inner step sizes, and a learning rate for
    hundreds of times fewer steps. With `selection_ratio` below 1 an update sees a part of the points and is cheaper by
    that factor, which is useful for volumes, whose points far outnumber the latent. Further inner steps are nearly
    free, in training and more so at test time, because they need no sine. Few inner steps need modulations that start
    orthogonal. Clipping is tight: a rare signal on which the inner loop diverges would otherwise undo a thousand steps.
    """
    config.model.update(
        layers=3, width=width, latent_dim=latent_dim, omega_first=30.0, omega_last=30.0, modulation_init="orthogonal"
    )
    config.inner.update(
        steps=inner_steps,
        step_size=1.0,
        learned_step_size="per_latent",
        selection_ratio=1.0,
        shared_context=True,
        remat="none",
    )
    config.train.update(
        steps=steps, batch_size=batch_size, selection_ratio=selection_ratio, learning_rate=1e-4,
        step_size_learning_rate=1e-2, warmup_steps=100, weight_decay=0.0, clip_norm=0.1,
        eval_every=max(1, steps // 5), eval_signals=128,
    )  # fmt: skip
    config.fit.update(steps=fit_steps, batch_size=4 * batch_size)
    return config


def from_linear_start(config: ConfigDict, *, updates: int, augmentation: float, steps: int = 0) -> ConfigDict:
    """The recipe of `cpu` with a linear start (`medfuncta_jax/linear_code.py`) of so many updates.

    The start learns nearly all. Meta-updates gain a decibel or two where training signals are few, and else nothing,
    so that `steps` may be 0. They need tiny rates, and lose the start at larger ones. Two inner steps fit a signal in
    training, as latents are in the metric of Gauss-Newton steps; those of the exported field are smaller, so that a
    tenth of the points is enough for a fit.
    """
    config.inner.update(steps=2, fit_ratio=0.15)
    config.fit.steps = 40
    config.train.update(
        start="linear", start_updates=updates, steps=steps, augmentation=augmentation, optimizer="adamw",
        learning_rate=1e-7, step_size_learning_rate=1e-5, warmup_steps=20,
    )  # fmt: skip
    return config


def cpu_64(config: ConfigDict) -> ConfigDict:
    """The recipe of 64x64 images for two cores."""
    config = cpu(config, width=2048, latent_dim=512, steps=300, batch_size=16, selection_ratio=1 / 2)
    return from_linear_start(config, updates=300, augmentation=0.2)


def compared(variant: str, *more: str) -> ConfigDict:
    """Shared settings of the systems in the paper's table 5: ChestMNIST at 64x64, 12 signals, every point, Adam at one
    rate.

    The variants "cpu", PneumoniaMNIST at 28x28, and "cpu_1d", ECG, get their sizes from `compared_size`; `more` may
    name "cpu_3d", a folder of volumes at 32x32x32, of which an update sees a sixteenth of the voxels.
    """
    require_variant(variant, "cpu", "cpu_1d", *more)
    if variant == "cpu_1d":
        config = get_config("ecg", format="csv")
    elif variant == "cpu_3d":
        config = get_config("nifti_folder", pattern="**/*.nii*", grid=(32, 32, 32))
        config.train.selection_ratio = 1 / 16
    else:
        flag, size = ("pneumoniamnist", 28) if variant else ("chestmnist", 64)
        config = get_config("medmnist", flag=flag, size=size)
    config.inner.update(selection_ratio=1.0)
    config.train.update(batch_size=12, schedule="constant", weight_decay=0.0)
    return config


def compared_size(config: ConfigDict, variant: str) -> ConfigDict:
    """A compared system at full size for the variant "", or at a size for two cores, with the same reduction for all: a
    third of the layers, a quarter of the width, a third of the batch, an eighth of the latent (a 32nd for series, in
    the same number of places), the same growth of frequencies from layer to layer, and rates for a hundredth of the
    updates."""
    if variant == "":
        return config
    model, train = config.model, config.train
    layers = max(3, model.layers // 3)
    model.omega_last = model.omega_first + (model.omega_last - model.omega_first) * (layers - 1) / (model.layers - 1)
    model.update(layers=layers, width=model.width // 4, latent_dim=model.latent_dim // 8)
    if variant == "cpu_1d":
        model.update(
            latent_dim=model.latent_dim // 4, latent_grid=model.latent_grid and (math.prod(model.latent_grid),)
        )
    rate, wider = 100 * train.learning_rate, 10
    if variant == "cpu_1d":
        # Ten inner steps of ten times the size diverge from the first update on (10 dB; 31 dB unchanged); three steps
        # do not and need the larger size (COIN++ 28 and 31 dB after 500 updates); a rate of 3e-3 diverges too.
        rate, wider = min(rate, 3e-4), 10 if config.inner.steps < 10 else 1
    config.inner.update(step_size=wider * config.inner.step_size, remat="none")
    train.update(
        steps=2500, batch_size=train.batch_size // 3, learning_rate=rate, warmup_steps=100,
        eval_every=500, eval_signals=128,
    )  # fmt: skip
    config.fit.batch_size = 48
    return config


def require_variant(variant: str, *known: str) -> None:
    """Refuse a variant that is neither "" nor one of `known`."""
    if variant not in ("", *known):
        raise ValueError(f"no variant {variant!r}; known: {', '.join(known)}")


def medmnist(flag: str, variant: str) -> ConfigDict:
    """A 2D set of MedMNIST in the variants "64" (default), "28", "128", "224" and "cpu" (64x64, for two cores)."""
    if variant == "cpu":
        return cpu_64(get_config("medmnist", flag=flag, size=64))
    require_variant(variant, "28", "64", "128", "224", "cpu")
    size = int(variant or 64)
    return paper_2d(get_config("medmnist", flag=flag, size=size), size)


def volumes(config: ConfigDict, variant: str) -> ConfigDict:
    """The paper's 3D settings for the variant ""; a linear start for "cpu", with an eighth of the voxels in an update
    should updates follow (`--config.train.steps`)."""
    require_variant(variant, "cpu")
    config = paper_3d(config)
    if variant == "":
        return config
    config = cpu(config, width=2048, latent_dim=512, steps=1500, batch_size=16, selection_ratio=1 / 8)
    config.model.update(omega_first=15.0, omega_last=15.0)
    return from_linear_start(config, updates=300, augmentation=0.2)
