"""The compared systems: their size is the published one, and each is what its own authors write."""

import importlib
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from scipy.interpolate import RegularGridInterpolator

import medfuncta_jax as mf
from experiments.settings import RunSettings
from medfuncta_jax.baselines.patches import PatchField

CONFIGS = Path(__file__).parents[2] / "configs" / "baselines"


def configured(name, variant=""):
    config = importlib.import_module(f"configs.baselines.{name}").get_config(variant)
    return RunSettings.from_dict(config.to_dict())


@pytest.mark.parametrize(
    ("name", "exact", "published"),
    [
        # Functa's 15 layers shift 13 (not the first sine layer); the others shift every sine layer.
        ("functa", 17_054_721, 17.1),
        ("coinpp", 11_545_089, 11.5),
        ("coinpp_patched", 4_467_201, 4.5),
        ("spatial_functa", 2_103_553, 2.1),
        ("medfuncta", 7_675_393, 7.7),
    ],
)
def test_parameter_counts_are_those_of_table_5(name, exact, published):
    field = mf.Field(configured(name).model, coord_dims=2, channels=1)
    count = sum(math.prod(shape) for shape in field.layer_shapes().values())
    assert count == exact
    assert round(count / 1e6, 1) == published
    assert field.model.latent_dim == 2048


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("[!_]*.py")))
def test_both_sizes_are_settings_and_say_what_they_take(name):
    module = importlib.import_module(f"configs.baselines.{name}")
    for part in ("Command:", "Hardware:", "Result:"):
        assert part in module.__doc__
    paper, cpu = configured(name), configured(name, "cpu")
    assert (paper.data.source, dict(cpu.data.options)["size"]) == ("medmnist", 28)
    if name != "one_layer":
        assert (cpu.model.layers, cpu.model.width) == (max(3, paper.model.layers // 3), paper.model.width // 4)
    assert cpu.model.latent_dim == 256
    assert cpu.model.latent_grid == paper.model.latent_grid
    with pytest.raises(ValueError, match="no variant 'gpu'; known: cpu"):
        module.get_config("gpu")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # K, L, w, G, H, inner rate, outer rate
        ("functa", (15, 512, 30.0, 3, 3, 1e-2, 3e-6)),
        ("coinpp", (10, 512, 50.0, 3, 10, 1e-2, 3e-6)),
        ("coinpp_patched", (10, 512, 50.0, 3, 10, 1e-2, 3e-6)),
        ("spatial_functa", (12, 256, 20.0, 3, 3, 1e-2, 3e-5)),
    ],
)
def test_published_settings(name, expected):
    settings = configured(name)
    model, inner, train = settings.model, settings.inner, settings.train
    got = (model.layers, model.width, model.omega_first, inner.steps, settings.fit.steps, inner.step_size)
    assert (*got, train.learning_rate) == expected
    assert (model.omega_last, inner.selection_ratio, train.weight_decay) == (model.omega_first, 1.0, 0.0)


def small(coord_dims, kind=mf.Field, **changes):
    sizes = {"layers": 5, "width": 12, "latent_dim": 8, "omega_first": 30.0, "omega_last": 30.0, "residual": False}
    field = kind(mf.ModelSettings(**{**sizes, **changes}), coord_dims, channels=2)
    params = jax.tree.map(np.asarray, field.init(jax.random.key(0), np.float64))
    rng = np.random.default_rng(coord_dims)
    return field, params, rng.normal(size=(3, 8)), rng.uniform(-1, 1, (9, coord_dims))


def test_functa_is_a_siren_whose_biases_are_one_linear_map_of_the_latent():
    """Dupont et al. 2022, equations 1 to 3: sin(w0 (W h + b + s)), and all s from one matrix."""
    field, params, latents, coords = small(2)
    to_shifts = np.concatenate([params[f"modulation_{k}"]["kernel"] for k in (2, 3, 4)], axis=1)  # [P, 3 L]
    biases = np.concatenate([params[f"modulation_{k}"]["bias"] for k in (2, 3, 4)])
    values = field.apply(params, latents, coords)
    for i, latent in enumerate(latents):
        shifts = np.split(latent @ to_shifts + biases, 3)
        for j, x in enumerate(coords):
            h = np.sin(30 * (params["layer_1"]["kernel"].T @ x + params["layer_1"]["bias"]))
            for k, shift in zip((2, 3, 4), shifts, strict=True):
                h = np.sin(30 * (params[f"layer_{k}"]["kernel"].T @ h + params[f"layer_{k}"]["bias"] + shift))
            value = params["layer_5"]["kernel"].T @ h + params["layer_5"]["bias"] + 0.5
            np.testing.assert_allclose(values[i, j], value, atol=1e-12)


def test_hidden_layers_between_latent_and_modulations():
    """Dupont et al. 2022, appendix: an MLP with ReLU gives the modulations, here scales and shifts."""
    field, params, latents, coords = small(2, modulation_hidden=(7, 6), modulate_scale=True, modulate_first_layer=True)
    assert field.latent_layers() == ("hidden_1",)
    assert params["modulation_3"]["kernel"].shape == (6, 12)

    def linear(name, x):
        return x @ params[name]["kernel"] + params[name]["bias"]

    for i, latent in enumerate(latents):
        code = np.maximum(linear("hidden_2", np.maximum(linear("hidden_1", latent), 0)), 0)
        h = coords
        for k in range(1, 5):
            h = np.sin(30 * (linear(f"scale_{k}", code) * linear(f"layer_{k}", h) + linear(f"modulation_{k}", code)))
        np.testing.assert_allclose(field.apply(params, latents, coords)[i], linear("layer_5", h) + 0.5, atol=1e-12)


def siren_of(params, shifts, x):
    """A SIREN at one point, every sine layer shifted by `shifts[k]`."""
    h = x
    for k in range(1, 5):
        h = np.sin(30 * (h @ params[f"layer_{k}"]["kernel"] + params[f"layer_{k}"]["bias"] + shifts[k]))
    return h @ params["layer_5"]["kernel"] + params["layer_5"]["bias"] + 0.5


GRIDS = [(4,), (2, 2), (4, 1), (1, 2, 2), (2, 2, 2)]


@pytest.mark.some(3)
@pytest.mark.parametrize("latent_grid", GRIDS)
@pytest.mark.parametrize("how", ["linear", "nearest"])
def test_spatial_functa_interpolates_the_latent_at_each_point(latent_grid, how):
    """Bauer et al. 2023, with SciPy's interpolation; ours interpolates what the maps make of the latent."""
    axes = len(latent_grid)
    field, params, latents, coords = small(
        axes, latent_grid=latent_grid, latent_interpolation=how, modulate_first_layer=True
    )
    features = 8 // math.prod(latent_grid)
    values = field.apply(params, latents, coords)
    for i, latent in enumerate(latents):
        vectors = latent.reshape(*latent_grid, features)
        # SciPy wants two places an axis: one place is the same value everywhere.
        for axis, count in enumerate(latent_grid):
            vectors = np.repeat(vectors, 2, axis) if count == 1 else vectors
        places = []
        for count in vectors.shape[:-1]:
            centres = np.linspace(-1 + 1 / count, 1 - 1 / count, count)
            places.append(np.linspace(-1, 1, count) if how == "linear" else centres)
        at = RegularGridInterpolator(places, vectors, method=how, bounds_error=False, fill_value=None)
        for j, x in enumerate(coords):
            code = at(x)[0]
            shifts = {
                k: code @ params[f"modulation_{k}"]["kernel"] + params[f"modulation_{k}"]["bias"] for k in range(1, 5)
            }
            np.testing.assert_allclose(values[i, j], siren_of(params, shifts, x), atol=1e-11)


@pytest.mark.some(2)
@pytest.mark.parametrize("latent_grid", GRIDS)
def test_patches_are_fields_by_themselves(latent_grid):
    """COIN++ on patches: cell by cell the field of one latent, in coordinates of the cell."""
    field, params, latents, coords = small(
        len(latent_grid), PatchField, latent_grid=latent_grid, latent_interpolation="nearest", modulate_first_layer=True
    )
    assert field.patch.model.latent_dim == 8 // math.prod(latent_grid)
    values = field.apply(params, latents, coords)
    each = latents.reshape(3, *latent_grid, -1)
    for j, x in enumerate(coords):
        cell = tuple(int((x[axis] + 1) / 2 * count) for axis, count in enumerate(latent_grid))
        low = np.array([2 * c / count - 1 for c, count in zip(cell, latent_grid, strict=True)])
        within = 2 * (x - low) / (2 / np.array(latent_grid)) - 1
        alone = field.patch.apply(params, each[(slice(None), *cell)], within[None])
        np.testing.assert_allclose(values[:, j], alone[:, 0], atol=1e-11)


HOW = [(mf.Field, "linear"), (mf.Field, "nearest"), (PatchField, "nearest")]


@pytest.mark.parametrize(("kind", "how"), HOW)
def test_a_field_with_a_latent_grid_is_saved_and_read_back(kind, how, tmp_path):
    field, params, latents, coords = small(
        2, kind, latent_grid=(2, 2), latent_interpolation=how, modulation_hidden=(5,)
    )
    mf.save_field(tmp_path / "field.safetensors", field, params, {})
    again, same = mf.load_field(tmp_path)
    assert again == field
    np.testing.assert_array_equal(again.apply(same, latents, coords), field.apply(params, latents, coords))


def test_edges_belong_to_the_outermost_cells():
    """Both ends of [-1, 1], and what rounding puts just beyond them."""
    for kind, how in HOW:
        field, params, latents, _ = small(1, kind, latent_grid=(4,), latent_interpolation=how)
        inside, beyond = (field.apply(params, latents, np.array([[-x], [x]])) for x in (1.0, 1 + 1e-12))
        np.testing.assert_allclose(beyond, inside, atol=1e-8)
