"""Golden files: inputs of a small case, and every quantity of the method that follows from them, in float64.

    python -m tests.reference.golden DIR             the files of tests/golden, each quantity computed anew
    python -m tests.reference.golden DIR --seed=1    the same cases with other inputs

A file has `config` (the case, JSON), its inputs `params/LAYER`, `signals` [B, N, D] and `context` [B, G, n], and

    coords [N, C], omega [K]
    inner_latents [B, G + 1, P], inner_losses [B, G]     of the inner loop on `context`
    meta_loss, meta_grad/LAYER                           exact second order
    first_order_grad/LAYER                               phi_G held constant
    fit_latents [B, P], fit_reconstructions [B, N, D]    `fit_steps` steps on every point
"""

import argparse
import itertools
import json
from pathlib import Path

import numpy as np

from tests.reference import method

FILES = Path(__file__).parents[1] / "golden"


def read(file):
    """The case of a golden file, and its arrays by name."""
    with np.load(file) as stored:
        arrays = {name: stored[name] for name in stored.files}
    return json.loads(str(arrays.pop("config"))), arrays


def inputs_of(arrays):
    """Those arrays of a golden file that the others follow from."""
    return {name: array for name, array in arrays.items() if name in ("signals", "context") or "params/" in name}


def draw(case, seed):
    """Inputs of a case: parameters of the method's initialisation, signals in [0, 1], contexts without replacement."""
    random = np.random.default_rng(seed)
    sizes = [len(case["shape"]), *[case["width"]] * (case["layers"] - 1), case["channels"]]
    omega, drawn = method.omega_schedule(case), {}

    def uniform(name, inputs, outputs, bound):
        drawn[f"params/{name}/kernel"] = random.uniform(-bound, bound, (inputs, outputs))
        drawn[f"params/{name}/bias"] = random.uniform(-bound, bound, outputs)

    for k, (inputs, outputs) in enumerate(itertools.pairwise(sizes), start=1):
        uniform(f"layer_{k}", inputs, outputs, 1 / inputs if k == 1 else np.sqrt(6 / inputs) / omega[k - 1])
    for k in range(2, case["layers"]):
        uniform(f"modulation_{k}", case["latent_dim"], case["width"], case["latent_dim"] ** -0.5)
    points, signals = int(np.prod(case["shape"])), case["signals"]
    drawn["signals"] = random.uniform(size=(signals, points, case["channels"]))
    order = np.argsort(random.uniform(size=(signals, case["inner_steps"], points)), axis=-1)
    drawn["context"] = order[..., : int(case["selection_ratio"] * points)]
    return drawn


def quantities(case, inputs):
    """Every array of the golden file of a case with these inputs."""
    params = {name.removeprefix("params/"): value for name, value in inputs.items() if name.startswith("params/")}
    x, signals, contexts = method.grid(case["shape"]), inputs["signals"], inputs["context"]
    paths = [method.descend(case, params, x, y, rows) for y, rows in zip(signals, contexts, strict=True)]
    latents, losses = (np.array(part) for part in zip(*paths, strict=True))
    everywhere = [np.arange(len(x))] * case["fit_steps"]
    fits = np.array([method.descend(case, params, x, y, everywhere)[0][-1] for y in signals])

    def outer_loss(params):
        ends = zip(latents[:, -1], signals, strict=True)
        return sum(method.loss_and_gradient(case, params, phi, x, y)[0] for phi, y in ends) / len(signals)

    second_order = method.gradient(lambda params: method.meta_loss(case, params, x, signals, contexts), params)
    first_order = method.gradient(outer_loss, params)
    return {
        **inputs,
        "coords": x,
        "omega": method.omega_schedule(case),
        "inner_latents": latents,
        "inner_losses": losses,
        "meta_loss": np.array(method.meta_loss(case, params, x, signals, contexts)),
        **{f"meta_grad/{name}": value for name, value in second_order.items()},
        **{f"first_order_grad/{name}": value for name, value in first_order.items()},
        "fit_latents": fits,
        "fit_reconstructions": np.array([method.forward(case, params, phi, x)[0] for phi in fits]),
    }


def main():
    """Write the files."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path)
    options.add_argument("--seed", type=int, help="draw the inputs anew")
    given = options.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(FILES.glob("*.npz")):
        case, arrays = read(file)
        inputs = inputs_of(arrays) if given.seed is None else draw(case, given.seed)
        np.savez_compressed(given.folder / file.name, config=json.dumps(case), **quantities(case, inputs))


if __name__ == "__main__":
    main()
