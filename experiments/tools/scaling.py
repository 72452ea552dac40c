"""Predicted weak scaling: computation and communication of an update at given rates. Nothing is timed.

    python -m experiments.tools.scaling --case=chest_xray_224 --batch=24 --devices=8,64 [--set=inner.steps=3]

The update of n B signals is compiled for n devices (virtual ones, so a laptop suffices), and the collective operations
in the program are counted. An operation on V bytes (all-reduce: the sum; all-gather: the gathered array;
reduce-scatter: the summed array) takes a ring of g devices

    all-reduce: 2 (g - 1)/g V / r        all-gather, reduce-scatter: (g - 1)/g V / r

seconds, with r the bytes a second that a device sends to the next one: within a node, or between nodes if the g devices
are on several nodes. The matrix products of B signals, F operations (`cases.work`), take a device F / f seconds, and

    efficiency = compute / (compute + communication),

without overlap of the two. The peak rate f makes this an underestimate; leaving out the latency of messages, sines, and
waiting for the slowest device makes it an overestimate.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import math
import re
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax.sharding import NamedSharding

from experiments.tools.cases import CASES, SHORT, Case, settings_of, work
from medfuncta_jax import meta_step, sharding
from medfuncta_jax.methods import METHODS
from medfuncta_jax.settings import Settings, SettingsError

_BYTES = {"f64": 8, "f32": 4, "bf16": 2, "f16": 2, "s64": 8, "u64": 8, "s32": 4, "u32": 4, "u8": 1, "s8": 1, "pred": 1}
_ARRAY = re.compile(rf"\b({'|'.join(_BYTES)})\[([\d,]*)\]")
_OPERATION = re.compile(
    r" = (?P<result>.*?) (?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)\("
)
_LISTED = re.compile(r"replica_groups=\{\{([\d,]+)\}")
_IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(
    r"replica_groups=mesh\[([^]]+)\](?:, device_ids=\((?:\[([\d,]+)\](?:T\(([\d,]+)\))?|([\d,]+))\))? \{([^}:]*)\}"
)
# Number of rounds through the ring: an all-reduce takes one round for the sum and one to distribute it.
_ROUNDS = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1}


@dataclass(frozen=True)
class Collective:
    """One collective operation of a program.

    Attributes:
      kind: "all-reduce", "all-gather" or "reduce-scatter".
      bytes: V, the size of the sum, of the gathered array, of the summed array.
      group: the numbers of the devices of the first group.
    """

    kind: str
    bytes: int
    group: tuple[int, ...]


@dataclass(frozen=True)
class Rates:
    """A hypothetical cluster.

    Attributes:
      flops_per_s: operations a second of a device.
      node_bytes_per_s, network_bytes_per_s: bytes a second from a device to another one of the same node, and of
        another node.
      node_devices: number of devices of a node.
    """

    flops_per_s: float
    node_bytes_per_s: float
    network_bytes_per_s: float
    node_devices: int


def collectives(program: str, devices: int) -> list[Collective]:
    """The collective operations in the text of a compiled program for `devices` devices.

    Raises:
      ValueError: one that is done more than once, in a loop, or of another kind: its bytes cannot be told; or by
        devices that cannot be told.
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
    """The first group of devices, in all forms that XLA writes."""
    if listed := _LISTED.search(line):
        return _numbers(listed[1])
    if iota := _IOTA.search(line):
        return tuple(_iota(iota[3], iota[4]).reshape(int(iota[1]), int(iota[2]))[0].tolist())
    if mesh := _MESH.search(line):
        axes, shape, order, ids, own = mesh.groups()
        lengths = {name: int(length) for name, length in (axis.split("=") for axis in axes.split(","))}
        numbers = np.asarray(_numbers(ids)) if ids else _iota(shape or str(math.prod(lengths.values())), order)
        # Devices of one group differ only in their places along the axes named last.
        numbers = numbers.reshape(tuple(lengths.values()))
        return tuple(numbers[tuple(slice(None) if name in own.split(",") else 0 for name in lengths)].ravel().tolist())
    if "replica_groups={}" in line or "replica_groups=" not in line:
        return tuple(range(devices))
    raise ValueError(f"groups of devices written in an unknown way: {line.strip()[:200]}")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(","))


def _iota(shape: str, order: str | None) -> np.ndarray:
    """0, 1, ... in an array of this shape, with axes permuted to this order."""
    numbers = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
    return numbers.transpose(_numbers(order)) if order else numbers


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
    """The prediction for an update of these operations and of `flops` a device; see the module's docstring."""
    compute, communication = flops / rates.flops_per_s, sum(seconds(one, rates) for one in operations)
    return {
        "flops": flops,
        "sent_bytes": sum(sent(one) for one in operations),
        "compute_s": compute,
        "communication_s": communication,
        "efficiency_on_paper": compute / (compute + communication),
    }


def predicted(case: Case, settings: Settings, *, devices: int, batch: int, rates: Rates) -> dict:
    """The prediction for `devices` devices of these rates in an update of `batch` signals each.

    Args:
      case, settings: from `CASES` and `settings_of`; `train.modulation_shards` counts.
      devices: number of devices, real or virtual; the program is only compiled for them.
      batch: signals a device.
      rates: see `Rates`.
    Returns:
      JSON-able: the result of `prediction`, and the bytes that a device holds between updates.
    """
    train = dataclasses.replace(settings.train, batch_size=batch * devices, micro_batch=0)
    settings = dataclasses.replace(settings, train=train)
    method = METHODS[train.method]
    field = method.check(settings, case.grid, case.channels)
    mesh = sharding.data_mesh(jax.devices()[:devices], modulation_shards=train.modulation_shards)
    state = jax.eval_shape(lambda key: method.init(field, settings, key, signals=batch * devices), jax.random.key(0))

    def placed(tree, specs):
        return jax.tree.map(
            lambda leaf, spec: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec)),
            tree,
            specs,
        )

    state = placed(state, sharding.layout(field, state, mesh))
    points = math.prod(case.grid)
    signals, rows, key = (
        placed(jax.ShapeDtypeStruct(shape, kind), spec)
        for shape, kind, spec in (
            ((train.batch_size, points, case.channels), jnp.float32, sharding.SIGNALS),
            ((train.batch_size,), jnp.int32, sharding.SIGNALS),
            ((), jax.random.key(0).dtype, sharding.WHOLE),
        )
    )
    update = functools.partial(method.update, meta_step.Training(field, settings, case.grid, mesh=mesh))
    program = jax.jit(update, donate_argnums=0).lower(state, signals, key, rows).compile()
    operations = collectives(program.as_text() or "", devices)
    flops = work(case, settings, mode="train", batch=batch)["flops"]
    return {
        "config": case.config,
        "devices": devices,
        "batch_a_device": batch,
        "latent_dim": settings.model.latent_dim,
        "modulation_shards": train.modulation_shards,
        "state_bytes_a_device": sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)
        ),
        **prediction(operations, flops, rates),
        "rates": dataclasses.asdict(rates),
    }


def as_markdown(rows: list[dict]) -> str:
    """The rows of `predicted` as a Markdown table."""
    lines = [
        "| devices | `modulation_shards` | state a device | sent an update | communication | compute | efficiency |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    lines += [
        f"| {row['devices']} | {row['modulation_shards']} | {row['state_bytes_a_device'] / 1e6:.3g} MB "
        f"| {row['sent_bytes'] / 1e6:.3g} MB | {1e3 * row['communication_s']:.3g} ms | {1e3 * row['compute_s']:.3g} ms "
        f"| {100 * row['efficiency_on_paper']:.1f} % |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def define_flags() -> None:
    """Define the command's flags, not at import, so that tests can import this module beside other commands."""
    flags.DEFINE_enum("case", "chest_xray_224", [*SHORT, *CASES], "Config and shape of the signals.")
    flags.DEFINE_integer("batch", 24, "Signals a device.", lower_bound=1)
    flags.DEFINE_list("devices", ["8", "64"], "Numbers of devices, in all.")
    flags.DEFINE_float("flops_per_s", 1.56e14, "Operations of a device: an A100's, TF32.", lower_bound=1.0)
    flags.DEFINE_float("node_bytes_per_s", 3e11, "From device to device: NVLink.", lower_bound=1.0)
    flags.DEFINE_float("network_bytes_per_s", 2.5e10, "The same between nodes: 200 Gbit/s.", lower_bound=1.0)
    flags.DEFINE_integer("node_devices", 8, "Devices of a node.", lower_bound=1)
    flags.DEFINE_list("set", [], "Overrides of the config, GROUP.FIELD=VALUE.")


def main(argv: list[str]) -> None:
    """Flags in; a JSON line for each number of devices, and a table."""
    del argv
    logging.getLogger().setLevel(logging.WARNING)  # app.run enables INFO logging of every library
    options = flags.FLAGS
    case = CASES[SHORT.get(options.case, options.case)]
    rates = Rates(
        options.flops_per_s, options.node_bytes_per_s, options.network_bytes_per_s, options.node_devices
    )  # fmt: skip
    jax.config.update("jax_platforms", "cpu")
    numbers = [int(number) for number in options.devices if number.isdecimal() and int(number)]
    if len(numbers) < max(1, len(options.devices)):
        raise app.UsageError(f"--devices={','.join(options.devices)} must be numbers of at least 1, e.g. 8,64")
    jax.config.update("jax_num_cpu_devices", max(numbers))
    jax.config.update("jax_disable_most_optimizations", True)  # the program is read, not run
    rows = []
    for devices in numbers:
        try:
            settings = settings_of(case, options.set, None)
            row = predicted(case, settings, devices=devices, batch=options.batch, rates=rates)
        except (SettingsError, ValueError) as error:
            raise app.UsageError(str(error)) from error
        print(json.dumps(row), flush=True)
        rows.append(row)
    print(as_markdown(rows))


if __name__ == "__main__":
    define_flags()
    app.run(main)
