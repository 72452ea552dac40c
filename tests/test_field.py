import jax
import jax.numpy as jnp
import numpy as np
import pytest

import medfuncta_jax as mf
from medfuncta_jax.siren import omega_schedule


def small_field(coord_dims=2, channels=1, **changes):
    settings = {"layers": 4, "width": 16, "latent_dim": 6, "omega_first": 10.0, "omega_last": 30.0, **changes}
    return mf.Field(mf.ModelSettings(**settings), coord_dims, channels)


def by_hand(field, params, latents, coords):
    """Equation 1 written out in numpy, one signal at a time."""
    model, omega = field.model, omega_schedule(field.model)

    def linear(name, x):
        return x @ np.asarray(params[name]["kernel"]) + np.asarray(params[name]["bias"])

    values = []
    for phi in latents:
        h = coords
        for k in range(1, model.layers):
            pre = linear(f"layer_{k}", h)
            if k > 1 or model.modulate_first_layer:
                if model.modulate_scale:
                    pre = linear(f"scale_{k}", phi) * pre
                pre = pre + linear(f"modulation_{k}", phi)
            s = np.sin(omega[k - 1] * pre)
            h = h + s if model.residual and k > 1 else s
        values.append(linear(f"layer_{model.layers}", h) + model.offset)
    return np.stack(values)


@pytest.mark.some(6)
@pytest.mark.parametrize("layers", [3, 4])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("modulate_first_layer", [True, False])
@pytest.mark.parametrize("modulate_scale", [True, False])
def test_every_variant_is_equation_1(layers, residual, modulate_first_layer, modulate_scale):
    field = small_field(
        channels=2, layers=layers, residual=residual, offset=0.25,
        modulate_first_layer=modulate_first_layer, modulate_scale=modulate_scale,
    )  # fmt: skip
    params = field.init(jax.random.key(0), jnp.float64)
    rng = np.random.default_rng(0)
    latents, coords = rng.normal(size=(3, 6)), rng.uniform(-1, 1, (7, 2))
    expected = by_hand(field, params, latents, coords)
    np.testing.assert_allclose(field.apply(params, latents, coords), expected, atol=1e-12)
    each = jnp.broadcast_to(coords, (3, 7, 2))
    np.testing.assert_allclose(field.apply(params, latents, each), expected, atol=1e-12)


def test_two_layers_with_the_first_modulated_only():
    """One modulated layer that reads the coordinates themselves: the closed form without a residual."""
    field = small_field(layers=3, modulate_first_layer=True)
    assert field.latent_layers() == ("modulation_1", "modulation_2")


@pytest.mark.some(2)
@pytest.mark.parametrize(
    "changes",
    [
        {"layers": 3},
        {"layers": 5, "modulate_scale": True},
        {"layers": 4, "modulate_first_layer": True, "modulation_hidden": (7,)},
        {"layers": 4, "latent_dim": 12, "latent_grid": (2, 2)},
    ],
)
def test_a_field_is_its_two_halves(changes):
    model = mf.ModelSettings(**{"width": 10, "latent_dim": 6, **changes})
    field = mf.Field(model, 2, 1)
    params, latents = (
        field.init(jax.random.key(0), jnp.float64),
        np.random.default_rng(0).normal(size=(3, model.latent_dim)),
    )
    point_params, readers = field.split(params)
    features = field.points.features(point_params, mf.grid((4, 5))[None])
    from_latents = field.apply(params, latents, mf.grid((4, 5)))
    from_modulations = field.points.values(point_params, field.modulations(readers, latents), features)
    np.testing.assert_allclose(from_modulations, from_latents, rtol=1e-13)
    assert np.ptp(from_latents, axis=0).max() > 0


def test_the_papers_parameter_count():
    field = mf.Field(mf.ModelSettings(layers=15, width=256, latent_dim=2048), coord_dims=2, channels=1)
    assert mf.parameter_count(jax.eval_shape(field.init, jax.random.key(0))) == 7_675_393


def test_initialisation_bounds():
    field = small_field(width=256, layers=5, latent_dim=64)
    params = mf.named_layers(field.init(jax.random.key(1)))
    omega = omega_schedule(field.model)
    bounds = {"layer_1": 1 / 2, **{f"layer_{k}": np.sqrt(6 / 256) / omega[k - 1] for k in range(2, 6)}}
    bounds |= {f"modulation_{k}": 1 / 8 for k in range(2, 5)}
    assert len(params) == 2 * len(bounds)
    for name, array in params.items():
        bound = bounds[name.split("/")[0]]
        assert np.abs(array).max() <= bound
        if array.size > 100:
            assert np.abs(array).max() > 0.95 * bound
            assert abs(float(array.std()) - bound / np.sqrt(3)) < 0.05 * bound


@pytest.mark.some(1)
@pytest.mark.parametrize("latent_dim", [8, 24, 64])
def test_orthogonal_modulations_have_equal_singular_values_and_the_norm_of_uniform_ones(latent_dim):
    kernels = [
        mf.named_layers(
            small_field(width=24, latent_dim=latent_dim, modulation_init=kind).init(jax.random.key(1), jnp.float64)
        )["modulation_2/kernel"]
        for kind in ("orthogonal", "uniform")
    ]
    singular = np.linalg.svd(kernels[0], compute_uv=False)
    np.testing.assert_allclose(singular, singular[0], rtol=1e-5)
    assert np.linalg.norm(kernels[0]) == pytest.approx(np.sqrt(24 / 3), rel=1e-5)
    assert np.linalg.norm(kernels[1]) == pytest.approx(np.sqrt(24 / 3), rel=0.1)


@pytest.mark.some(2)
@pytest.mark.parametrize(("coord_dims", "channels"), [(1, 1), (2, 3), (3, 1), (4, 2)])
def test_any_dimension_and_channels(coord_dims, channels):
    field = small_field(coord_dims, channels)
    values = field.apply(field.init(jax.random.key(0)), jnp.zeros((2, 6)), jnp.zeros((5, coord_dims)))
    assert values.shape == (2, 5, channels)


def test_layers_round_trip():
    field = small_field(modulate_scale=True, modulate_first_layer=True)
    params = field.init(jax.random.key(3))
    settings = {**vars(field.model), "inner_lr": 1, "shape": [3]}
    again, same = mf.field_from_layers(settings, mf.named_layers(params))
    assert again == field
    jax.tree.map(np.testing.assert_array_equal, params, same)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda arrays: arrays.pop("modulation_2/bias"), "'modulation_2/bias' of shape .16,. is missing"),
        (lambda arrays: arrays.pop("layer_1/kernel"), "'layer_1/kernel' is missing"),
        (lambda arrays: arrays.pop("layer_4/kernel"), "'layer_4/kernel' is missing"),
        (lambda arrays: arrays.update({"layer_9/kernel": np.ones(2)}), "'layer_9/kernel' has no place"),
        (lambda arrays: arrays.update({"layer_2/kernel": np.ones((16, 4))}), r"'layer_2/kernel' has shape \(16, 4\)"),
        (lambda arrays: arrays.update({"layer_1/kernel": np.ones(16)}), "'layer_1/kernel' has shape"),
    ],
)
def test_wrong_arrays_are_named(change, message):
    field = small_field()
    arrays = dict(mf.named_layers(field.init(jax.random.key(0))))
    change(arrays)
    with pytest.raises(ValueError, match=message):
        mf.field_from_layers(vars(field.model), arrays)


def test_missing_setting_is_named():
    with pytest.raises(mf.SettingsError, match="'latent_dim' is missing"):
        mf.field_from_layers({"layers": 3, "width": 4}, {})


def test_omega_and_learning_rate():
    """Appendix E: layers with W_m w_m = W_n w_n stay equal in output when tau_n / tau_m = (w_m / w_n)^2."""
    rng = np.random.default_rng(0)
    x, target = rng.uniform(-1, 1, (50, 3)), rng.uniform(-1, 1, (50, 8))
    omegas, rate_m = (20.0, 55.0), 1e-4
    rates = (rate_m, rate_m * (omegas[0] / omegas[1]) ** 2)
    weights, bias = rng.normal(size=(3, 8)), rng.normal(size=8)
    layers = [(weights / omega, bias / omega) for omega in omegas]

    def output(layer, omega):
        return jnp.sin(omega * (x @ layer[0] + layer[1]))

    losses = []
    for _ in range(200):
        for i, (omega, rate) in enumerate(zip(omegas, rates, strict=True)):
            loss, gradient = jax.value_and_grad(
                lambda layer, omega=omega: ((output(layer, omega) - target) ** 2).mean()
            )(layers[i])
            layers[i] = jax.tree.map(lambda w, slope, rate=rate: w - rate * slope, layers[i], gradient)
        losses.append(float(loss))
        np.testing.assert_allclose(output(layers[0], omegas[0]), output(layers[1], omegas[1]), atol=1e-11)
    assert losses[-1] < 0.9 * losses[0]
    # The relation is needed: with equal rates the two part.
    equal = [(weights / omega, bias / omega) for omega in omegas]
    for i, omega in enumerate(omegas):
        gradient = jax.grad(lambda layer, omega=omega: ((output(layer, omega) - target) ** 2).mean())(equal[i])
        equal[i] = jax.tree.map(lambda w, slope: w - rate_m * slope, equal[i], gradient)
    assert np.abs(output(equal[0], omegas[0]) - output(equal[1], omegas[1])).max() > 1e-4
