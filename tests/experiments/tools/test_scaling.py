"""Scaling on paper: bytes are those of the program, times those of a ring, and what cannot be told is refused."""

import json
import subprocess
import sys

import pytest

from experiments.tools.scaling import Collective, Rates, collectives, prediction, seconds
from tests.experiments.conftest import ROOT

PROGRAM = """
HloModule jit_update

%region (a: f32[], b: f32[]) -> f32[] {
  ROOT %add = f32[] add(%a, %b)
}

ENTRY %main (p: f32[4,3]) -> f32[4,3] {
  %ar = (f32[4,3]{1,0}, /*index=1*/bf16[5]{0}, f32[]) all-reduce(%a, %b, %c), replica_groups={{0,2,4,6},{1,3,5,7}}
  %ag = f32[8,3]{1,0} all-gather(%p), replica_groups=[4,2]<=[8], dimensions={0}
  %rs = f64[2]{0} reduce-scatter(%q), replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
  %other = f32[] all-reduce(%x), replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}, to_apply=%region
}
"""


def test_bytes_and_groups_are_those_of_the_program():
    assert collectives(PROGRAM, 8) == [
        Collective("all-reduce", 4 * 12 + 2 * 5 + 4, (0, 2, 4, 6)),
        Collective("all-gather", 4 * 24, (0, 1)),
        Collective("reduce-scatter", 4 * 16, (0, 2, 4, 6)),  # of what is summed
        Collective("all-reduce", 4, (0, 1)),  # of devices (0, 2, 4, 6, 1, 3, 5, 7) as a mesh of 2 x 4
    ]


@pytest.mark.parametrize(
    ("groups", "first"),
    [
        ("mesh['data'=4,'model'=2] {'model'}", (0, 1)),
        ("mesh['data'=4,'model'=2] {'data'}", (0, 2, 4, 6)),
        ("mesh['data'=4,'model'=2] {'data','model'}", tuple(range(8))),
        ("mesh['a'=2,'b'=1,'c'=4], device_ids=([4,2]T(1,0)) {'c'}", (0, 2, 4, 6)),
        ("mesh['a'=2,'b'=4], device_ids=(0,7,1,6,2,5,3,4) {'a'}", (0, 2)),
        ("{}", tuple(range(8))),
    ],
)
def test_groups_are_read_in_every_way_that_xla_writes_them(groups, first):
    line = f"  %x = f32[] all-reduce(%a), replica_groups={groups}, to_apply=%region"
    (found,) = collectives(f"ENTRY %main (p: f32[]) -> f32[] {{\n{line}\n}}\n", 8)
    assert found.group == first


@pytest.mark.parametrize("groups", ["rings[8]", "mesh['a'=8] {'a':(2)2}"])
def test_groups_that_cannot_be_read_are_refused(groups):
    line = f"  %x = f32[] all-reduce(%a), replica_groups={groups}"
    with pytest.raises(ValueError, match="groups of devices written in an unknown way: %x = f32"):
        collectives(f"ENTRY %main (p: f32[]) -> f32[] {{\n{line}\n}}\n", 8)


@pytest.mark.parametrize(
    "line",
    ["  %x = f32[] all-reduce(%a), replica_groups={{0,1}}", "  %x = f32[] all-to-all(%a), replica_groups={{0,1}}"],
)
def test_what_cannot_be_counted_is_refused(line):
    body = f"%body (p: f32[]) -> f32[] {{\n{line}\n}}\n"
    with pytest.raises(ValueError, match="in a loop, or of no known cost"):
        collectives(body + PROGRAM, 8)


def ring(values):
    """An all-reduce as a ring does it, on lists of chunks; returns the chunks that each device sends."""
    n, messages = len(values), [0] * len(values)
    for turn in range(2 * (n - 1)):
        sending = [(i, (i - turn) % n if turn < n - 1 else (i + 1 - (turn - n + 1)) % n) for i in range(n)]
        held = [values[i][chunk] for i, chunk in sending]
        for (i, chunk), value in zip(sending, held, strict=True):
            there = values[(i + 1) % n]
            there[chunk] = there[chunk] + value if turn < n - 1 else value
            messages[i] += 1
    return messages


@pytest.mark.parametrize("devices", [2, 3, 8])
def test_time_is_that_of_a_ring(devices):
    values = [[10 * i + chunk for chunk in range(devices)] for i in range(devices)]
    total = [sum(row[chunk] for row in values) for chunk in range(devices)]
    (messages,) = set(ring(values))
    assert values == [total] * devices
    chunk_bytes, rates = 600, Rates(1e12, node_bytes_per_s=50.0, network_bytes_per_s=10.0, node_devices=8)
    whole = Collective("all-reduce", chunk_bytes * devices, tuple(range(devices)))
    assert seconds(whole, rates) == pytest.approx(messages * chunk_bytes / 50.0)
    assert seconds(Collective(whole.kind, whole.bytes, tuple(range(7, 7 + devices))), rates) == pytest.approx(
        messages * chunk_bytes / 10.0
    )
    halves = [Collective(kind, whole.bytes, whole.group) for kind in ("reduce-scatter", "all-gather")]
    assert sum(seconds(one, rates) for one in halves) == pytest.approx(seconds(whole, rates))
    row = prediction([whole, *halves], 3e12, rates)
    assert row["efficiency_on_paper"] == pytest.approx(3 / (3 + 2 * seconds(whole, rates)))


def rows_of(*flags):
    words = [
        sys.executable,
        "-m",
        "experiments.tools.scaling",
        "--case=ecg",
        "--batch=2",
        "--set=model.layers=4,model.width=8",
    ]
    done = subprocess.run([*words, *flags], cwd=ROOT, capture_output=True, text=True, timeout=120)
    return done, [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.slow
def test_the_command_counts_the_gradient_once():
    # 1 -> 8 -> 8 -> 8 -> 1, and two modulations of 64 -> 8.
    whole, split = 16 + 2 * 72 + 9 + 2 * 8, 2 * 64 * 8
    done, rows = rows_of("--devices=2,4", "--node_devices=2")
    assert done.returncode == 0, done.stderr
    assert [row["devices"] for row in rows] == [2, 4]
    for row in rows:
        n = row["devices"]
        assert row["sent_bytes"] == pytest.approx(2 * (n - 1) / n * 4 * (whole + split + 1))  # and the loss
        assert row["state_bytes_a_device"] == pytest.approx(3 * 4 * (whole + split), abs=64)  # and some counts
        assert "| 4 | 1 |" in done.stdout
    done, (row,) = rows_of("--devices=4", "--set=train.modulation_shards=2,model.layers=4,model.width=8")
    assert row["state_bytes_a_device"] == pytest.approx(3 * 4 * (whole + split / 2), abs=64)
    # Gathered and summed over two, half of it summed over two more; the norms of the parts are some scalars.
    expected = 4 * (2 * 3 / 4 * (whole + 1) + 1 / 2 * split + 1 / 2 * split + split / 2)
    assert row["sent_bytes"] == pytest.approx(expected, abs=64)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--devices=8,x", "--devices=8,x must be numbers of at least 1"),
        ("--set=train.modulation_shards=16", "train.modulation_shards = 16 does not divide the 8 devices; try 8"),
    ],
)
def test_wrong_flags_are_named(flag, message):
    done, _ = rows_of("--devices=8", flag)
    assert done.returncode == 1
    assert message in done.stdout + done.stderr
