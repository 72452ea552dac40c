"""The words of a command: any order, the last of a setting, a run's own config."""

import pytest

from experiments.runtime.arguments import arranged, wants_help


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--config.a=1", "--workdir=w", "--config=c.py"], ["--workdir=w", "--config=c.py", "--config.a=1"]),
        (["--config", "c.py", "--workdir", "w", "--config.a", "1"], ["--workdir=w", "--config=c.py", "--config.a=1"]),
        (["-config=c.py", "--config.a=(1,)", "--config.b=2", "--config.a=(2, 3)"],
         ["--config=c.py", "--config.b=2", "--config.a=(2, 3)"]),
        (["--process", "-1", "word", "--mode=all", "--mode=train"], ["--process=-1", "--mode=train", "word"]),
    ],
)  # fmt: skip
def test_order(words, expected):
    assert arranged(["main.py", *words]) == ["main.py", *expected]


def test_a_run_brings_its_config(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    workdir = f"--workdir={tmp_path}"
    (found,) = (word for word in arranged(["m", workdir]) if word.startswith("--config="))
    assert found.endswith(f"stored_config.py:{tmp_path / 'config.json'}")
    assert arranged(["m", f"--config={tmp_path / 'config.json'}"])[1] == found
    assert arranged(["m", workdir, "--config=c.py"]) == ["m", workdir, "--config=c.py"]
    assert arranged(["m", "--workdir=/no/such"]) == ["m", "--workdir=/no/such"]


def test_help():
    assert wants_help(["m", "--mode=train", "-h"])
    assert not wants_help(["m", "--mode=train"])
