"""The authors' files as ours: the same values, the same latents, and one line for what cannot be read.

Names, shapes and errors are tested on arrays; files need PyTorch, and are skipped where it is not installed.
"""

import sys

import jax
import numpy as np
import pytest

import medfuncta_jax as mf
from experiments.tools.import_release import ReleaseError, field_of
from medfuncta_jax.checkpoint import load_field_and_about
from tests.experiments.release_files import LATENT, LAYERS, WIDTH, one_line, run, wrapped

OMEGA = {"omega_first": 10.0, "omega_increment": 5.0}


def release_arrays(*, prefix="model.", dims=2, channels=1, first=True, shift=True, scale=False, grid=()):
    """A state dict of the release, its last layer with the modulations that its network never reads."""
    rng = np.random.default_rng(0)
    arrays = {"grid": mf.grid(grid).astype(np.float32)} if grid else {}
    for k in range(LAYERS):
        place = prefix + (f"layers.{k}" if k < LAYERS - 1 else "last_layer")
        inputs, outputs = dims if k == 0 else WIDTH, channels if k == LAYERS - 1 else WIDTH
        parts = {"linear": inputs}
        if first or k > 0:
            parts |= {"modulate_shift_layer": LATENT} if shift else {}
            parts |= {"modulate_scale_layer": LATENT} if scale else {}
        for part, size in parts.items():
            arrays[f"{place}.{part}.weight"] = rng.uniform(-0.2, 0.2, (outputs, size)).astype(np.float32)
            arrays[f"{place}.{part}.bias"] = rng.uniform(-0.2, 0.2, outputs).astype(np.float32)
    return arrays


def double(params):
    return jax.tree.map(lambda leaf: leaf.astype(np.float64), params)


def release_values(arrays, latents, coords, *, prefix="model.", residual=True):
    """What the release computes, written out: x -> sin(w (scale * (W x + b) + shift)), +0.5 at the end."""

    def linear(name, x):
        return x @ arrays[f"{name}.weight"].T.astype(np.float64) + arrays[f"{name}.bias"]

    values = []
    for latent in latents:
        h = coords
        for k in range(LAYERS - 1):
            place = f"{prefix}layers.{k}"
            pre = linear(f"{place}.linear", h)
            if f"{place}.modulate_scale_layer.weight" in arrays:
                pre = pre * linear(f"{place}.modulate_scale_layer", latent)
            if f"{place}.modulate_shift_layer.weight" in arrays:
                pre = pre + linear(f"{place}.modulate_shift_layer", latent)
            s = np.sin((10 + 5 * k) * pre)
            h = h + s if residual and k > 0 else s
        values.append(linear(f"{prefix}last_layer.linear", h) + 0.5)
    return np.stack(values)


@pytest.mark.some(5)
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("variant", [{}, {"first": False}, {"scale": True}, {"first": False, "scale": True}])
def test_a_field_from_the_release_has_its_values(dims, variant):
    arrays = release_arrays(dims=dims, channels=2, grid=(4, 3, 2)[:dims], **variant)
    field, params, grid = field_of(arrays, {}, **OMEGA)
    assert grid == (4, 3, 2)[:dims]
    assert (field.coord_dims, field.channels) == (dims, 2)
    assert field.model == mf.ModelSettings(
        layers=4, width=12, latent_dim=5, omega_first=10.0, omega_last=25.0, residual=True, offset=0.5,
        modulate_first_layer=variant.get("first", True), modulate_scale=variant.get("scale", False),
    )  # fmt: skip
    rng = np.random.default_rng(1)
    latents, coords = rng.normal(size=(3, LATENT)), rng.uniform(-1, 1, (6, dims))
    values = mf.reconstruct(field, double(params), latents, coords)
    np.testing.assert_allclose(values, release_values(arrays, latents, coords), atol=1e-12)


def test_any_prefix_types_and_a_network_without_residual_connections():
    arrays = release_arrays(prefix="module.net.model.")
    latents, coords = np.ones((1, LATENT)), np.zeros((1, 2)) + 0.3
    expected = release_values(arrays, latents, coords, prefix="module.net.model.", residual=False)
    arrays |= {key: array.astype(np.float64) for key, array in arrays.items() if "bias" in key}
    field, params, grid = field_of(arrays, {}, residual=False, **OMEGA)
    assert grid is None
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    np.testing.assert_allclose(mf.reconstruct(field, double(params), latents, coords), expected, atol=1e-12)


def test_what_a_pickled_network_says_of_itself_is_used():
    attributes = {f"model.layers.{k}.w0": 10.0 + 5 * k for k in range(3)} | {"model.last_layer.w0": 25.0}
    field, _, _ = field_of(release_arrays(), attributes | {"model.enable_skip_connections": False})
    assert (field.model.omega_first, field.model.omega_last, field.model.residual) == (10.0, 25.0, False)
    assert field_of(release_arrays(), attributes, **OMEGA)[0].model.residual
    with pytest.raises(ReleaseError, match="its frequencies are 10 to 25, the flags say 20 to 35"):
        field_of(release_arrays(), attributes, omega_first=20.0, omega_increment=5.0)
    with pytest.raises(ReleaseError, match="do not rise by one increment"):
        field_of(release_arrays(), attributes | {"model.layers.1.w0": 16.0})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "a state dict does not hold its frequencies: give --omega_first and --omega_increment"),
        ({"model.layers.1.linear.bias": None}, "missing keys: model.layers.1.linear.bias"),
        ({"model.layers.1.linear.weight": None, "model.layers.2.modulate_shift_layer.bias": None},
         r"missing keys: model.layers.1.linear.weight, model.layers.2.modulate_shift_layer.bias$"),
        ({"model.last_layer.linear.bias": None}, "missing keys: model.last_layer.linear.bias"),
        ({"model.layers.0.modulate_shift_layer.weight": None}, "unknown keys: model.layers.0.modulate_shift"),
        ({"model.layers.7.linear.bias": np.zeros(12)}, r"missing keys: model.layers.3.linear.bias, .* and 15 more"),
        ({"model.layers.1.norm.weight": np.ones(12)}, "unknown keys: model.layers.1.norm.weight"),
        ({"head.weight": np.ones(12), "head.bias": np.ones(12)}, "unknown keys: head.weight, head.bias"),
        ({"model.layers.0.linear.weight": None}, "0 networks in it: one key must end in layers.0.linear.weight"),
        ({"ema.layers.0.linear.weight": np.zeros((12, 2))}, "2 networks in it"),
        ({"model.layers.0.linear.weight": np.zeros(12)}, r"linear.weight has shape \(12,\), expected \[out, in"),
        ({"model.layers.1.linear.weight": np.zeros((12, 9))}, r"shape \(12, 9\), its neighbours ask for \(12, 12\)"),
        ({"model.layers.2.modulate_shift_layer.weight": np.zeros((12, 6))}, r"its neighbours ask for \(12, 5\)"),
        ({"model.layers.2.linear.bias": np.full(12, np.nan)}, "layers.2.linear.bias holds values that are not finite"),
        ({"grid": np.zeros((12, 2))}, r"grid \(12, 2\) is no grid from -1 to 1"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(change, message):
    arrays = {key: value for key, value in {**release_arrays(), **change}.items() if value is not None}
    with pytest.raises(ReleaseError, match=message):
        field_of(arrays, {}, **(OMEGA if change else {}))


def test_a_network_without_latents_or_with_one_hidden_layer():
    with pytest.raises(
        ReleaseError, match=r"no latent enters it: model.layers.1.modulate_shift_layer.weight is missing"
    ):
        field_of(release_arrays(shift=False), {}, **OMEGA)
    short = {key: array for key, array in release_arrays().items() if "layers.1" not in key and "layers.2" not in key}
    with pytest.raises(ValueError, match="layers must be at least 3"):
        field_of(short, {}, **OMEGA)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--weights=a"], "--out and --weights or --latents are missing"),
        (["--out=b"], "--out and --weights or --latents are missing"),
        (["--weights=a", "--out=b", "--omega_first=10"], "--omega_first and --omega_increment belong together"),
        (["--weights=a", "--out=b", "--grid=64,64"], "--grid=64,64 is not of the form 64x64"),
        (["--weights=a", "--out=b", "--step_size=0"], "step_size"),
        (["--weights=a", "--out=b", "--omega=3"], "Unknown command line flag 'omega'"),
        (["--weights=a", "--out=b", "c"], "'c' is not a flag"),
    ],
)
def test_faults_of_flags_are_one_line(capsys, words, message):
    assert message in one_line(capsys, 2, *words)


def test_without_pytorch_it_says_what_to_install(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    error = one_line(capsys, 1, "--weights=best.model", f"--out={tmp_path}")
    assert "pip install 'torch>=2.6'" in error


def test_a_run_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    assert "holds a run of its own" in one_line(capsys, 1, "--weights=best.model", f"--out={tmp_path}")


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("kind", ["state dict", "network"])
def test_a_file_has_the_values_of_the_network_in_it(torch, network, monkeypatch, tmp_path, capsys, dims, first, kind):
    net = network(dims, first=first)
    shape = (5, 4, 3)[:dims]
    path, out = tmp_path / "weights", tmp_path / "out"
    torch.save(net if kind == "network" else wrapped(torch, net, shape), path)
    monkeypatch.delitem(sys.modules, "models.inrs")  # the classes are not there when the file is read
    flags_of_kind = {
        "network": [f"--grid={'x'.join(map(str, shape))}"],
        "state dict": ["--omega_first=10", "--omega_increment=5"],
    }
    assert run(f"--weights={path}", f"--out={out}", *flags_of_kind[kind]) == 0
    said = capsys.readouterr().out
    assert f"4 layers of 12, latent of 5, {dims} coordinate(s), 2 channel(s), omega 10 to 25" in said
    field, params, about = load_field_and_about(out)
    assert about["grid"] == list(shape)
    assert about["imported_from"]["file"] == "weights"
    rng = np.random.default_rng(0)
    latents, coords = rng.normal(size=(3, LATENT)), rng.uniform(-1, 1, (7, dims))
    with torch.no_grad():
        expected = net.double()(torch.from_numpy(np.tile(coords, (3, 1, 1))), torch.from_numpy(latents)).numpy()
    np.testing.assert_allclose(mf.reconstruct(field, double(params), latents, coords), expected, atol=1e-12)


def test_an_imported_field_fits_the_latents_that_the_release_fits(torch, network, tmp_path):
    """Its inner loop with its own step size against ours with the default one."""
    net, step_size = network(2), 4e-2
    torch.save(wrapped(torch, net, (6, 5)), tmp_path / "best.model")
    assert run(f"--weights={tmp_path / 'best.model'}", f"--out={tmp_path}", "--omega_first=10", "--omega_increment=5",
               f"--step_size={step_size}") == 0  # fmt: skip
    net, signals = net.double(), np.random.default_rng(0).uniform(size=(3, 6, 5, 2))
    coords = torch.from_numpy(np.tile(mf.grid((6, 5)), (3, 1, 1)))
    targets, losses = torch.from_numpy(signals.reshape(3, 30, 2)), []
    latents = torch.zeros(3, LATENT, dtype=torch.float64)
    for _ in range(8):
        latents.requires_grad_()
        each = (net(coords, latents) - targets).square().mean((1, 2))
        (slopes,) = torch.autograd.grad(each.sum(), latents)
        latents = (latents - step_size * slopes).detach()
        losses.append(each.detach().numpy())
    field, params = mf.load_field(tmp_path)
    fit = mf.fit_latent(field, double(params), signals, steps=8)
    np.testing.assert_allclose(fit.losses, np.stack(losses, 1), rtol=1e-6)
    np.testing.assert_allclose(fit.latents * 2, latents.numpy(), rtol=1e-5)  # sqrt(4e-2 / 1e-2)
    assert (fit.losses[:, -1] < fit.losses[:, 0]).all()


def save_datapoints(torch, folder, count, *, label=lambda i: [i % 3], latent_dim=LATENT):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        datapoint = {"modulations": torch.full((latent_dim,), float(i)), "label": torch.tensor(label(i))}
        torch.save(datapoint, folder / f"datapoint_{i}.pt")


def test_mednf_becomes_a_store_in_the_order_of_its_numbers(torch, network, tmp_path):
    source, out = tmp_path / "PneumoniaNF", tmp_path / "out"
    for name, count in (("train", 12), ("val", 2), ("test", 3)):
        save_datapoints(torch, source / name, count)
    torch.save(network(2), source / "model.pt")
    assert run(f"--weights={source / 'model.pt'}", f"--latents={source}", f"--out={out}", "--step_size=4e-2") == 0
    store = mf.load_latents(out)
    assert {name: len(split.latents) for name, split in store.items()} == {"train": 12, "val": 2, "test": 3}
    train = store["train"]
    np.testing.assert_array_equal(train.latents[:][:, 0], np.arange(12) / 2)  # in the scale of the field
    np.testing.assert_array_equal(train.labels, np.arange(12) % 3)
    assert train.ids[10] == "train/datapoint_10"
    assert np.isnan(train.psnr).all()
    assert train.about["splits"] == {"train": 12, "val": 2, "test": 3}
    assert len(train.about["field_sha256"]) == 64


@pytest.mark.parametrize(
    ("label", "shape"), [(lambda i: [i % 2, 1, 0], (4, 3)), (lambda i: i, (4,)), (lambda i: [float(i)], (4,))]
)
def test_labels_of_one_or_many_tasks(torch, tmp_path, label, shape):
    save_datapoints(torch, tmp_path / "nf" / "test", 4, label=label)
    assert run(f"--latents={tmp_path / 'nf'}", f"--out={tmp_path / 'out'}") == 0
    (split,) = mf.load_latents(tmp_path / "out").values()
    assert split.labels.shape == shape
    np.testing.assert_array_equal(split.labels.reshape(4, -1), [np.atleast_1d(label(i)) for i in range(4)])
    assert split.about["field_sha256"] is None


def _cut(torch, folder):
    path = folder / "datapoint_2.pt"
    path.write_bytes(path.read_bytes()[:300])


def _replaced(**content):
    def damage(torch, folder):
        made = {"modulations": torch.zeros(LATENT), "label": torch.tensor([0])} | {
            key: value(torch) for key, value in content.items()
        }
        torch.save({key: value for key, value in made.items() if value is not None}, folder / "datapoint_2.pt")

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda torch, folder: (folder / "datapoint_7.pt").unlink(), "datapoint_7.pt is missing, among 11 others"),
        (lambda torch, folder: (folder / "datapoint_2.pt").write_text("hello\n" * 9), "datapoint_2.pt is no file"),
        (_cut, "datapoint_2.pt is no file of the release, or cut off or damaged"),
        (_replaced(label=lambda torch: None), "datapoint_2.pt has no 'label'"),
        (_replaced(modulations=lambda torch: None), "datapoint_2.pt has no 'modulations'"),
        (_replaced(modulations=lambda torch: torch.zeros(6)), "datapoint_2.pt: its latent has shape (6,), expected 5"),
        (_replaced(modulations=lambda torch: torch.full((5,), np.nan)), "datapoint_2.pt: its latent is not finite"),
        (_replaced(label=lambda torch: torch.tensor([0, 1])), "datapoint_2.pt: label [0, 1] is not 1 whole number"),
        (_replaced(label=lambda torch: torch.tensor(0.5)), "datapoint_2.pt: label [0.5] is not 1 whole number"),
        (lambda torch, folder: torch.save(torch.zeros(5), folder / "datapoint_2.pt"), "has no 'modulations'"),
    ],
)  # fmt: skip
def test_a_datapoint_that_cannot_be_used_is_named(torch, tmp_path, capsys, damage, message):
    save_datapoints(torch, tmp_path / "nf" / "train", 12)
    damage(torch, tmp_path / "nf" / "train")
    assert message in one_line(capsys, 1, f"--latents={tmp_path / 'nf'}", f"--out={tmp_path / 'out'}")
    assert not list((tmp_path / "out").glob("latents/*"))


def test_latents_of_another_length_than_the_fields_are_refused(torch, network, tmp_path, capsys):
    torch.save(network(2), tmp_path / "model.pt")
    save_datapoints(torch, tmp_path / "nf" / "train", 2, latent_dim=4)
    words = (f"--weights={tmp_path / 'model.pt'}", f"--latents={tmp_path / 'nf'}", f"--out={tmp_path / 'out'}")
    assert "datapoint_0.pt: its latent has shape (4,), expected 5" in one_line(capsys, 1, *words)


def test_folders_without_datapoints(torch, tmp_path, capsys):
    words = (f"--latents={tmp_path}", f"--out={tmp_path / 'out'}")
    assert "holds none of train/, val/ and test/" in one_line(capsys, 1, *words)
    (tmp_path / "train").mkdir()
    assert "train holds no datapoint_0.pt" in one_line(capsys, 1, *words)
