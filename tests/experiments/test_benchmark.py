"""The benchmark measures what a config says, and refuses what no config says."""

import json

import pytest

from experiments import benchmark
from medfuncta_jax.settings import SettingsError

SMALL = ["model.layers=3", "model.width=8", "model.latent_dim=4", "inner.steps=2", "fit.steps=2"]


@pytest.mark.parametrize("mode", ["train", "fit"])
def test_a_row_is_json_and_states_what_ran(mode):
    case = benchmark.CASES["ecg"]
    row = benchmark.measure(case, benchmark.settings_of(case, SMALL, 2), mode=mode, repeats=2)
    assert json.loads(json.dumps(row)) == row
    assert (row["batch"], row["grid"], row["latent_dim"], row["finite"]) == (2, [187], 4, True)
    # 1 -> 8 -> 8 -> 1 and a modulation of 4 -> 8.
    assert row["parameters"] == (8 + 8) + (64 + 8) + (8 + 1) + (32 + 8)
    assert 0 < row["best_s"] <= row["median_s"]
    table = benchmark.as_markdown({"ecg": row, "fundus": {"error": "ended with code 1"}})
    assert "| `ecg` | 187 | 2 | 4 |" in table
    assert "| `fundus` | ended with code 1 |" in table


def test_every_dataset_of_the_paper_has_a_case():
    assert {case.config.partition(":")[0] for case in benchmark.CASES.values()} == {
        "ecg", "chest_xray", "pneumonia_xray", "retinal_oct", "fundus", "dermatoscope", "colon_histopathology",
        "cell_microscopy", "brain_mri", "lung_ct",
    }  # fmt: skip
    assert set(benchmark.SHORT.values()) <= set(benchmark.CASES)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("remat=none", "is not GROUP.FIELD=VALUE"),
        ("outer.steps=1", "is not GROUP.FIELD=VALUE"),
        ("inner.remat=all", "inner.remat must be one of"),
        ("inner.stpes=3", "did you mean inner.steps"),
    ],
)
def test_a_wrong_override_is_named(override, message):
    with pytest.raises((ValueError, SettingsError), match=message):
        benchmark.settings_of(benchmark.CASES["ecg"], [override], None)
