"""Random damage to a file's bytes, for tests that every file is either read or refused in one line."""

from hypothesis import strategies as st

# Bytes to set, by place and value, and where the file is cut, if it is.
DAMAGE = st.tuples(
    st.lists(
        st.tuples(st.integers(0, 1 << 20), st.sampled_from([0, 1, 127, 128, 255]) | st.integers(0, 255)), max_size=4
    ),
    st.none() | st.integers(0, 1 << 20),
)


def damaged(whole, damage, *, head=None):
    """`whole` with this damage, in its first `head` bytes."""
    edits, cut = damage
    content = bytearray(whole)
    for place, value in edits:
        content[place % min(head or len(content), len(content))] = value
    return bytes(content if cut is None else content[: cut % len(content)])


def assert_refusal(error, name):
    """One line that names the file."""
    assert len(str(error).splitlines()) == 1
    assert name in str(error)
