"""Train a field on your own images, with your own loop and any optax optimizer, and fit unseen images.

    python -m experiments.examples.train_your_own [IMAGES.npy] [--steps=600]

IMAGES.npy holds images [n, H, W] or [n, H, W, channels] in [0, 1]; without it, MRI slices from nibabel are used.
"""

import argparse
from importlib.resources import as_file, files

import jax
import nibabel
import numpy as np
import optax

import medfuncta_jax as mf


def mri_slices() -> np.ndarray:
    """48 axial brain slices, float32 [48, 32, 24, 1] in [0, 1]."""
    with as_file(files("nibabel") / "tests/data/example4d.nii.gz") as path:
        volume = np.asarray(nibabel.nifti1.load(path).dataobj, np.float32)  # [128, 96, 24, 2]
    slices = np.moveaxis(volume.reshape(32, 4, 24, 4, 48).mean((1, 3)), -1, 0)
    return (slices / slices.max())[..., None]


def main() -> float:
    """Returns the mean PSNR in dB of unseen images."""
    parser = argparse.ArgumentParser(description="Train a field on images of your own.")
    parser.add_argument("images", nargs="?", help="an .npy file of images in [0, 1]")
    parser.add_argument("--steps", type=int, default=600, help="meta-updates")
    options = parser.parse_args()
    images = mri_slices() if options.images is None else np.load(options.images)
    images = images if images.ndim == 4 else images[..., None]
    images = np.random.default_rng(0).permutation(images)
    held_out = max(1, len(images) // 6)
    train, test = images[held_out:], images[:held_out]

    model = mf.ModelSettings(layers=3, width=128, latent_dim=256, omega_first=15.0, omega_last=30.0)
    field = mf.Field(model, coord_dims=2, channels=images.shape[-1])
    inner = mf.InnerLoop(steps=5, step_size=0.3, selection_ratio=1.0)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(2e-3, options.steps))
    )
    params, key, rng = field.init(jax.random.key(0)), jax.random.key(1), np.random.default_rng(2)
    state, train_step = optimizer.init(params), jax.jit(mf.make_train_step(field, inner, optimizer))
    for step in range(options.steps):
        batch = train[rng.integers(len(train), size=8)]
        params, state, metrics = train_step(params, state, batch, jax.random.fold_in(key, step))

    params = mf.rescale_latent(field, params, inner.step_size)  # for the default step size
    fit = mf.fit_latent(field, params, test, steps=20)
    values = mf.reconstruct(field, params, fit.latents, mf.grid(images.shape[1:3])).reshape(test.shape)
    psnr = float(mf.metrics.psnr(values.clip(0, 1), test).mean())
    print(f"training loss {metrics['loss']:.5f}, {len(test)} images never seen: {psnr:.2f} dB")
    return psnr


if __name__ == "__main__":
    main()
