import pytest

from medfuncta_jax.atomic import atomic_path


def test_replaces_as_a_whole_and_keeps_the_old_on_failure(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    with atomic_path(path) as partial:
        partial.write_text("one")
        assert not path.exists()
        assert partial.suffix == ".txt"

    def fail_half_way():
        with atomic_path(path) as partial:
            partial.write_text("half of tw")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert path.read_text() == "one"
    assert [file.name for file in path.parent.iterdir()] == ["file.txt"]
