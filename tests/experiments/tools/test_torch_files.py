"""PyTorch's files of any precision, form and place, and one line for what is something else; nothing in them is run."""

import pickle
import sys
import warnings
import zipfile

import numpy as np
import pytest

import medfuncta_jax as mf
from medfuncta_jax.checkpoint import load_field_and_about
from tests.experiments.release_files import LATENT, one_line, run, wrapped


def test_half_precision_weights_are_widened(torch, network, tmp_path):
    net = network(2).half()
    torch.save(net.state_dict(), tmp_path / "best.model")
    assert (
        run(f"--weights={tmp_path / 'best.model'}", f"--out={tmp_path}", "--omega_first=10", "--omega_increment=5") == 0
    )
    _, params = mf.load_field(tmp_path)
    np.testing.assert_array_equal(
        params["layer_2"]["kernel"], net.layers[1].linear.weight.detach().numpy().T.astype(np.float32)
    )


class Command:
    """What a malicious file holds: unpickling it as usual would make a file."""

    def __init__(self, function, argument):
        self.content = function, (argument,)

    def __reduce__(self):
        return self.content


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda torch, path: None, "no such file"),
        (lambda torch, path: path.write_text("hello\n" * 9), "is no file of the release"),
        (lambda torch, path: path.write_bytes(b""), "is no file of the release"),
        (lambda torch, path: path.write_bytes(b"PK" + bytes(99)), "is no file of the release"),
        (lambda torch, path: torch.save({"epoch": 3}, path), "'epoch' is no array of floats"),
        (lambda torch, path: torch.save({"a": torch.zeros(3)}, path), "0 networks in it"),
        (lambda torch, path: torch.save(torch.zeros(3), path), "0 networks in it"),
        (lambda torch, path: torch.save(torch.nn.Linear(2, 3), path), "it holds weight, bias"),
        (lambda torch, path: torch.save(Command(exec, f"open({str(path) + '.run'!r}, 'w')"), path), "0 networks in it"),
        (lambda torch, path: torch.save(Command(__import__("os").system, f"touch {path}.run"), path),
         "it names posix.system, which is not run"),
    ],
)  # fmt: skip
def test_weights_that_are_not_are_one_line_and_nothing_is_run(torch, tmp_path, capsys, write, message):
    path = tmp_path / "model.pt"
    write(torch, path)
    error = one_line(capsys, 1, f"--weights={path}", f"--out={tmp_path / 'out'}", "--omega_first=10",
                     "--omega_increment=5")  # fmt: skip
    assert str(path) in error
    assert message in error
    assert not (tmp_path / "model.pt.run").exists()
    assert not (tmp_path / "out").exists()


def test_a_grid_that_contradicts_the_file(torch, network, tmp_path, capsys):
    net = network(2)
    torch.save(wrapped(torch, net, (4, 3)), tmp_path / "best.model")
    words = [f"--weights={tmp_path / 'best.model'}", f"--out={tmp_path}", "--omega_first=10", "--omega_increment=5"]
    assert "its grid is 4x3, --grid says 8x8" in one_line(capsys, 1, *words, "--grid=8x8")
    torch.save(net.state_dict(), tmp_path / "best.model")
    assert "--grid 8x8x8 has 3 axes" in one_line(capsys, 1, *words, "--grid=8x8x8")


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("place", ["", "state_dict", "model.weights"])
def test_state_dicts_of_any_precision_form_and_place(torch, network, tmp_path, capsys, kind, old, place):
    net = network(2).to(getattr(torch, kind))
    content = wrapped(torch, net, (28, 24))
    content["grid"] = content["grid"].to(getattr(torch, kind))
    for key in reversed(place.split(".") if place else []):
        content = {key: content, "epoch": 3, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}}
    torch.save(content, tmp_path / "best.model", _use_new_zipfile_serialization=not old)
    assert run(f"--weights={tmp_path / 'best.model'}", f"--out={tmp_path}", "--omega_first=10",
               "--omega_increment=5") == 0  # fmt: skip
    _, params, about = load_field_and_about(tmp_path)
    assert about["grid"] == [28, 24]
    kept = net.layers[1].linear.weight.detach().float().numpy()
    np.testing.assert_array_equal(params["layer_2"]["kernel"], kept.T)


def test_a_grid_whose_points_merge_in_half_precision_is_asked_for(torch, network, tmp_path, capsys):
    content = {key: value.bfloat16() for key, value in wrapped(torch, network(1), (900,)).items()}
    torch.save(content, tmp_path / "best.model")
    words = (f"--weights={tmp_path / 'best.model'}", f"--out={tmp_path}", "--omega_first=10", "--omega_increment=5")
    assert run(*words) == 0
    assert "grid unknown" in capsys.readouterr().out
    assert run(*words, "--grid=900") == 0
    assert load_field_and_about(tmp_path)[2]["grid"] == [900]


def test_a_network_in_a_checkpoint(torch, network, monkeypatch, tmp_path, capsys):
    torch.save({"model": network(2), "epoch": 1}, tmp_path / "last.ckpt")
    monkeypatch.delitem(sys.modules, "models.inrs")
    assert run(f"--weights={tmp_path / 'last.ckpt'}", f"--out={tmp_path}") == 0
    assert "4 layers of 12" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float64"])
def test_latents_of_any_precision_that_still_have_slopes(torch, tmp_path, kind):
    folder = tmp_path / "nf" / "test"
    folder.mkdir(parents=True)
    for i in range(3):
        latent = torch.full((LATENT,), i / 4, dtype=getattr(torch, kind)).requires_grad_()
        torch.save({"modulations": latent, "label": torch.tensor([i])}, folder / f"datapoint_{i}.pt")
    assert run(f"--latents={tmp_path / 'nf'}", f"--out={tmp_path / 'out'}") == 0
    (split,) = mf.load_latents(tmp_path / "out").values()
    np.testing.assert_array_equal(split.latents[:][:, 0], [0, 0.25, 0.5])


def _save_old(torch, net, path):
    with warnings.catch_warnings(action="ignore"):  # that it finds no source of the network
        torch.save(net, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda torch, net, path: torch.save({"a": net.state_dict(), "b": net.state_dict()}, path),
         "holds several networks (a, b); save the one to import by itself"),
        (_save_old, "but a whole network in the form before PyTorch 1.6; load it there and save its state dict"),
        (lambda torch, net, path: path.write_bytes(pickle.dumps({"a": np.zeros(3)})),
         "but a plain pickle; write it anew with torch.save"),
        (lambda torch, net, path: zipfile.ZipFile(path, "w").close(), "but another archive; name a file of torch.save"),
        (lambda torch, net, path: path.write_text("<html>404</html>"), "but an HTML page; download it again"),
        (lambda torch, net, path: path.write_text("version https://git-lfs\n"), "but a Git LFS pointer; download it"),
    ],
)  # fmt: skip
def test_what_is_no_state_dict_is_told_apart(torch, network, tmp_path, capsys, write, message):
    path = tmp_path / "best.model"
    write(torch, network(2), path)
    error = one_line(capsys, 1, f"--weights={path}", f"--out={tmp_path / 'out'}", "--omega_first=10",
                     "--omega_increment=5")  # fmt: skip
    assert f"{path} " in error
    assert message in error
