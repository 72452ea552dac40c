"""Uses of a latent: fit unseen slices, enlarge them, complete them from few points, interpolate between two.

    python -m experiments.examples.latents_in_five_minutes [RUN]

RUN is the directory of a finished run on grey images, such as runs/quickstart. Without a run there, a small field is
trained first, in about half a minute. The result is one figure. The cells (# %%) run one by one in VS Code, Spyder and,
by way of Jupytext, in Jupyter.
"""

# %% Parameters
import argparse
import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy.interpolate import griddata

import medfuncta_jax as mf
from configs import quickstart
from experiments.runtime.interruption import StopRequest
from experiments.runtime.run import Run
from experiments.runtime.run_directory import RunDirectory, remembered_data_dir
from experiments.settings import RunSettings
from experiments.stages.train import train
from medfuncta_jax import metrics
from medfuncta_jax.datasets import open_dataset

parser = argparse.ArgumentParser(description="Fit, enlarge, complete and interpolate with latents.")
parser.add_argument("run", nargs="?", default="runs/five_minutes", help="a run on grey images, trained if absent")
parser.add_argument("--data_dir", help="files of the run's data source, where it needs some")
parser.add_argument("--steps", type=int, default=600, help="meta-updates, where it is trained")
parser.add_argument("--seen", type=float, default=0.1, help="part of the points that the completion sees")
parser.add_argument("--figure", help="where the picture goes; RUN/figures/latents_in_five_minutes.png by default")
options, _ = parser.parse_known_args()  # a notebook adds its own arguments
run = Path(options.run)

# %% A trained field: loaded, or meta-trained on the MRI slices from nibabel
if not (run / "field.safetensors").exists():
    config = quickstart.get_config()
    config.train.update(steps=options.steps, eval_every=options.steps)
    settings = RunSettings.from_dict(config.to_dict())
    with StopRequest() as stop:
        train(Run(RunDirectory(run, settings), stop, open_dataset(settings.data, data_dir=None)))
settings = RunSettings.from_saved(json.loads((run / "config.json").read_text()))
dataset = open_dataset(settings.data, data_dir=options.data_dir or remembered_data_dir(run))
field, params = mf.load_field(run)

# %% One latent for each of two test slices, by a few steps of gradient descent from zero
test = dataset.splits["test"]
by_tissue = np.argsort(test.signals(slice(None)).mean((1, 2, 3)))
images = test.signals(by_tissue[[-1, len(test) // 2]])  # most tissue, and a middle slice, [2, H, W, 1] in [0, 1]
fit = mf.fit_latent(field, params, images, steps=settings.fit.steps, safeguard=True)


def decoded(latents, shape=dataset.grid):
    """Images [B, *shape, 1] of latents [B, P], clipped to [0, 1]."""
    values = mf.reconstruct(field, params, latents, mf.grid(shape))
    return np.clip(np.asarray(values), 0, 1).reshape(-1, *shape, 1)


reconstructed = decoded(fit.latents)
print(f"{images[0].size} pixels in {fit.latents.shape[1]} numbers: {metrics.psnr(reconstructed, images).mean():.1f} dB")

# %% The same latents on a grid four times as fine: a field has no fixed resolution, and only its smoothness determines
# values between the training pixels
enlarged = decoded(fit.latents, tuple(4 * n for n in dataset.grid))

# %% Latents from a tenth of the points: the field has learned the distribution of such images
points = mf.grid(dataset.grid)  # [N, 2] in [-1, 1]
seen = np.sort(np.random.default_rng(0).permutation(len(points))[: round(options.seen * len(points))])
observed = images.reshape(len(images), -1, 1)[:, seen]  # [2, n, 1]
partial = mf.fit_latent(field, params, observed, coords=points[seen], steps=settings.fit.steps, safeguard=True)
completed = decoded(partial.latents)
# The baseline without a field: linear interpolation between the points, the nearest point outside of them.
linear, nearest = (
    np.stack([griddata(points[seen], values[:, 0], points, method=method) for values in observed]).reshape(images.shape)
    for method in ("linear", "nearest")
)
interpolated = np.where(np.isnan(linear), nearest, linear).astype(np.float32)
print(
    f"from {len(seen)} points: {metrics.psnr(completed, images).mean():.1f} dB by the field, "
    f"{metrics.psnr(interpolated, images).mean():.1f} dB by linear interpolation"
)

# %% A straight line from one latent to the other
parts = np.linspace(0, 1, 6)
start, end = np.asarray(fit.latents)
between = decoded(np.stack([(1 - part) * start + part * end for part in parts]))

# %% All results in one figure
mask = np.full(len(points), np.nan)
mask[seen] = 1
points_shown = images * mask.reshape(*dataset.grid, 1)


def with_psnr(name, shown):
    return [f"{name}\n{value:.1f} dB" for value in np.asarray(metrics.psnr(shown, images))]


size, fine = ("×".join(map(str, shape)) for shape in (images.shape[1:3], enlarged.shape[1:3]))
columns = [
    (images, [f"test slice\n{size}"] * 2),
    (reconstructed, with_psnr(f"from {len(start)} numbers", reconstructed)),
    (enlarged, [f"same latent\n{fine}"] * 2),
    (points_shown, [f"{len(seen)} points\nof {len(points)}"] * 2),
    (completed, with_psnr("latent of these", completed)),
    (interpolated, with_psnr("linear in pixels", interpolated)),
]
figure = Figure(figsize=(8, 4.9), dpi=200, facecolor="white")
grid = figure.add_gridspec(3, 6, left=0.01, right=0.99, top=0.92, bottom=0.01, hspace=0.33, wspace=0.05)
for column, (pictures, titles) in enumerate(columns):
    for row in range(2):
        axes = figure.add_subplot(grid[row, column])
        axes.set_facecolor("#dce6f2")  # points that were not observed
        axes.set_title(titles[row], fontsize=8, color="#222222", pad=3)
        axes.imshow(pictures[row, ..., 0], cmap="gray", vmin=0, vmax=1)
for column, part in enumerate(parts):
    axes = figure.add_subplot(grid[2, column])
    axes.set_title(f"{1 - part:.1f} of the first", fontsize=8, color="#222222", pad=3)
    axes.imshow(between[column, ..., 0], cmap="gray", vmin=0, vmax=1)
for axes in figure.axes:
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
path = Path(options.figure or run / "figures" / "latents_in_five_minutes.png")
path.parent.mkdir(parents=True, exist_ok=True)
figure.savefig(path)
print(f"picture in {path}")
