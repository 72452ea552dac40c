"""Weak scaling on paper: what an update computes and what it sends, at stated rates. Nothing is timed.

The update of n B signals is compiled for n devices (made up, so a laptop will do), and the collective operations in
that program are counted. One on V bytes (all-reduce: of the sum; all-gather: of what is gathered; reduce-scatter: of
what is summed) takes a ring of g devices

    all-reduce: 2 (g - 1)/g V / r        all-gather, reduce-scatter: (g - 1)/g V / r

seconds, with r the bytes a second that a device sends to the next one: within a node, or between nodes if the g devices
are of several. The matrix products of B signals, F operations (`benchmark.work`), take a device F / f seconds, and

    efficiency = compute / (compute + communication),

as if nothing of the one were done during the other. At the peak rate f this is on the low side; the time that a message
takes however short it is, sines, and devices that wait for the slowest are left out, which is on the high side.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np

_BYTES = {"f64": 8, "f32": 4, "bf16": 2, "f16": 2, "s64": 8, "u64": 8, "s32": 4, "u32": 4, "u8": 1, "s8": 1, "pred": 1}
_ARRAY = re.compile(rf"\b({'|'.join(_BYTES)})\[([\d,]*)\]")
_OPERATION = re.compile(
    r" = (?P<result>.*?) (?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)\("
)
_LISTED = re.compile(r"replica_groups=\{\{([\d,]+)\}")
_IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
# Rings a value goes through: a sum goes round once to be made and once to be told.
_ROUNDS = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1}


@dataclass(frozen=True)
class Collective:
    """One collective operation of a program.

    Attributes:
      kind: "all-reduce", "all-gather" or "reduce-scatter".
      bytes: V, of the sum, of what is gathered, of what is summed.
      group: the devices, by number, of the first of the groups that do it.
    """

    kind: str
    bytes: int
    group: tuple[int, ...]


@dataclass(frozen=True)
class Rates:
    """A made-up cluster.

    Attributes:
      flops_per_s: of a device.
      node_bytes_per_s, network_bytes_per_s: that a device sends to another one of its node, and of another node.
      node_devices: devices of a node.
    """

    flops_per_s: float
    node_bytes_per_s: float
    network_bytes_per_s: float
    node_devices: int


def collectives(program: str, devices: int) -> list[Collective]:
    """The collective operations in the text of a compiled program for `devices` devices.

    Raises:
      ValueError: one that is done more than once, in a loop, or of another kind: its bytes cannot be told.
    """
    found, in_entry = [], False
    for line in program.splitlines():
        if line and not line[0].isspace():
            in_entry = line.startswith("ENTRY")
        match = _OPERATION.search(line)
        if match is None:
            continue
        kind = match["kind"]
        if not in_entry or kind not in _ROUNDS:
            raise ValueError(f"{kind} in a loop, or of no known cost: {line.strip()[:120]}")
        group = _group(line, devices)
        size = sum(
            _BYTES[array] * math.prod(int(n) for n in sizes.split(",") if n)
            for array, sizes in _ARRAY.findall(match["result"])
        )
        found.append(Collective(kind, size * (len(group) if kind == "reduce-scatter" else 1), group))
    return found


def _group(line: str, devices: int) -> tuple[int, ...]:
    listed, iota = _LISTED.search(line), _IOTA.search(line)
    if listed:
        return tuple(int(n) for n in listed[1].split(","))
    if iota:
        numbers = np.arange(devices).reshape([int(n) for n in iota[3].split(",")])
        if iota[4]:
            numbers = numbers.transpose([int(n) for n in iota[4].split(",")])
        return tuple(numbers.reshape(int(iota[1]), int(iota[2]))[0].tolist())
    return tuple(range(devices))  # written in another way: as if by all, which is never too little


def seconds(operation: Collective, rates: Rates) -> float:
    """Time of one collective operation."""
    nodes = {device // rates.node_devices for device in operation.group}
    rate = rates.network_bytes_per_s if len(nodes) > 1 else rates.node_bytes_per_s
    return sent(operation) / rate


def sent(operation: Collective) -> float:
    """Bytes that each device of the group sends."""
    count = len(operation.group)
    return _ROUNDS[operation.kind] * (count - 1) / count * operation.bytes


def prediction(operations: list[Collective], flops: float, rates: Rates) -> dict[str, float]:
    """What an update of these operations, and of `flops` a device, comes to; see the top of this file."""
    compute, communication = flops / rates.flops_per_s, sum(seconds(one, rates) for one in operations)
    return {
        "flops": flops,
        "sent_bytes": sum(sent(one) for one in operations),
        "compute_s": compute,
        "communication_s": communication,
        "efficiency_on_paper": compute / (compute + communication),
    }
