"""The card says what a store holds, and the code in it runs."""

import re

import numpy as np
import pytest

import medfuncta_jax as mf
from experiments.tools.latent_card import latent_card
from tests.latent_stores import made_up_dataset, split_arrays, write_field, write_store


def blocks(card):
    return re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)


def test_source_counts_labels_and_quality(tmp_path):
    write_store(tmp_path)
    card = latent_card(mf.load_latents(tmp_path))
    psnr, labels = split_arrays("train")["psnr"].astype(float), split_arrays("train")["labels"]
    for part in (
        "# Latents of noise", "| licence | CC BY 4.0 |", "| signals | 5 x 4 points, 1 channel(s)", "0" * 64,
        f"| train | 10 | {psnr.mean():.2f} dB | {psnr.std():.2f} | {psnr.min():.2f} |",
        f"| 0 | normal | {(labels == 0).sum()} | ", "binary-class, 2 classes",
    ):  # fmt: skip
        assert part in card
    assert card == latent_card(mf.load_latents(tmp_path))


@pytest.mark.parametrize("data", [{"source": "folder"}, {"licence": "not known"}, {"licence": "as its publisher says"}])
def test_a_licence_that_is_not_known(tmp_path, data):
    write_store(tmp_path, changes={"data": data})
    assert "| licence | unknown: see the source |" in latent_card(mf.load_latents(tmp_path))


def test_labels_of_every_kind(tmp_path):
    write_store(tmp_path / "none", changes={"classes": [], "task": "none"})
    assert "No labels" in latent_card(mf.load_latents(tmp_path / "none"))
    written = write_store(tmp_path / "several", tasks=2, changes={"task": "multi-label"})
    count = written["train"]["labels"][:, 1].sum()
    assert f"| 1 | other | {count} |" in latent_card(mf.load_latents(tmp_path / "several"))
    many = [f"class {k}" for k in range(100)]
    write_store(tmp_path / "many", changes={"classes": many})
    assert f"100 classes: {', '.join(many)}." in latent_card(mf.load_latents(tmp_path / "many"))


def test_the_code_in_it_runs(tmp_path, monkeypatch):
    settings = mf.Settings.from_dict(
        {"data": {"source": "made up"}, "model": {"layers": 3, "width": 8, "latent_dim": 6}}
    )
    write_store(tmp_path)
    write_field(tmp_path, settings, made_up_dataset((5, 4)))
    monkeypatch.chdir(tmp_path)
    with_package, alone = blocks(latent_card(mf.load_latents(tmp_path)))
    names = {}
    exec(with_package.replace('"DIR"', f'"{tmp_path}"'), names)
    assert names["images"].shape == (4, 20, 1)
    names = {}
    exec(alone, names)
    assert names["ids"] == split_arrays("train")["ids"][:4]
    np.testing.assert_array_equal(names["arrays"]["latents"], split_arrays("train")["latents"][:4])
