"""The time that a compiled GPU program needs, from the program's text.

A kernel's time is the longer of moving its bytes and multiplying its factors, plus a launch:

    seconds = max(bytes / bandwidth, sum of flop / rate of their precision) + launch

The text is the scheduled HLO of `compiled.as_text()`, in which each instruction of the entry computation, and of the
bodies of its loops, is a kernel, a copy, or a name for memory.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from experiments.plan.targets import Target

LAUNCH_SECONDS = 1.5e-6  # an empty kernel in a command buffer

_BYTES = {
    "f64": 8, "s64": 8, "u64": 8, "c64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "s16": 2, "u16": 2,
    "s8": 1, "u8": 1, "pred": 1,
}  # fmt: skip
_ARRAY = re.compile(rf"\b({'|'.join(_BYTES)})\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
# Operations without work: names for memory, and the second halves of asynchronous pairs.
_FREE = {
    "parameter", "get-tuple-element", "tuple", "bitcast", "constant", "after-all", "partition-id", "replica-id",
    "async-done", "async-update", "fusion-done", "copy-done",
}  # fmt: skip
_PRECISIONS = {"highest": "float32", "high": "tensorfloat32", "default": "tensorfloat32"}


class Instruction(NamedTuple):
    """One line of a computation: its name, its type, its operation, and the rest of the line."""

    name: str
    kind: str
    operation: str
    rest: str

    @property
    def operands(self) -> list[str]:
        """Names of the operands."""
        return re.findall(r"%([\w.\-]+)", self.rest.split(")")[0])

    def called(self, key: str = "calls|to_apply|body") -> str | None:
        """The computation that the instruction calls."""
        found = re.search(rf"(?:{key})=%?([\w.\-]+)", self.rest)
        return found.group(1) if found else None


@dataclass
class Cost:
    """The total cost of all kernels of one kind, or of a program.

    Attributes:
      seconds, launches, moved (bytes).
      flop: operations of products, by the precision of their factors.
    """

    seconds: float = 0.0
    launches: int = 0
    moved: float = 0.0
    flop: dict[str, float] = field(default_factory=lambda: defaultdict(float))


class Program:
    """A compiled program as computations, each a list of instructions."""

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        current: list[Instruction] = []
        for line in text.splitlines():
            if line[:1].strip() and (opened := _COMPUTATION.match(line.rstrip())):
                current = self.computations[opened.group(2)] = []
                self.entry = opened.group(2) if opened.group(1) else self.entry
            elif found := _INSTRUCTION.match(line):
                current.append(Instruction(*found.groups()))

    def kernels(self) -> Iterator[tuple[str, int, float, dict[str, float]]]:
        """Label, number of runs, bytes and flop by precision of every kernel."""
        yield from self._kernels(self.entry, 1)

    def _kernels(self, name: str, times: int):
        body = self.computations.get(name, [])
        kinds = {one.name: one.kind for one in body}
        for one in body:
            if one.operation in _FREE:
                continue
            if one.operation == "while":
                trips = re.search(r'known_trip_count":\{"n":"(\d+)"', one.rest)
                yield from self._kernels(one.called("body") or "", times * int(trips.group(1) if trips else 1))
            elif one.operation in ("call", "conditional"):
                yield from self._kernels(one.called("to_apply|true_computation|branch_computations={") or "", times)
            elif one.operation.endswith("-start"):
                inner = self.computations.get(one.called() or "", [])
                if any(part.operation in ("fusion", "custom-call", "while") for part in inner):
                    yield from self._kernels(one.called() or "", times)
                else:  # a copy
                    given = [part.kind for part in inner if part.operation == "parameter"] or [one.kind]
                    yield "copy", times, self._moved(one.called(), "", []) or 2 * _size("".join(given)), {}
            else:
                given = [kinds.get(operand, "") for operand in one.operands]
                moved = self._moved(one.called("calls"), one.kind, given)
                yield re.sub(r"[._]\d+", "", one.name), times, moved, dict(self._flop(one, kinds))

    def _moved(self, called: str | None, kind: str, given: list[str]) -> float:
        """Bytes that a kernel reads and writes; slices and updates in place count only their part of an array."""
        body = self.computations.get(called or "", [])
        kinds = {one.name: one.kind for one in body}
        updated = sum(_size(kinds.get(one.operands[1], "")) for one in body if one.operation == "dynamic-update-slice")
        if updated:
            return 2 * updated + sum(size for size in map(_size, given) if size <= 4 * updated)
        sliced = sum(_size(one.kind) for one in body if one.operation == "dynamic-slice")
        if sliced:
            return _size(kind) + 2 * sliced
        if any(one.operation == "gather" for one in body):
            return 3 * _size(kind)
        return _size(kind) + sum(map(_size, given))

    def _flop(self, one: Instruction, kinds: dict[str, str]) -> dict[str, float]:
        """Operations of the products in a kernel, by precision."""
        found: dict[str, float] = defaultdict(float)
        gemm = one.operation == "custom-call" and "lhs_contracting_dimensions" in one.rest
        if one.operation == "dot" or gemm:
            left, out = (_ARRAY.search(kind) for kind in (kinds.get(one.operands[0], ""), one.kind))
            axes = re.search(r'lhs_contracting_dim\w+"?[=:][\[{]([\d,"]*)', one.rest)
            if left and out and axes:
                sizes = _sizes(left.group(2))
                contracted = math.prod(sizes[int(axis)] for axis in re.findall(r"\d+", axes.group(1)))
                found[_precision(one.rest, left.group(1))] += 2 * math.prod(_sizes(out.group(2))) * contracted
        elif called := one.called("calls"):
            body = self.computations.get(called, [])
            inside = {part.name: part.kind for part in body}
            for part in body:
                for precision, flop in self._flop(part, inside).items():
                    found[precision] += flop
        return found


def cost(text: str, target: Target) -> tuple[Cost, dict[str, Cost]]:
    """The cost of a compiled program on a target, in total and by kind of kernel."""
    total = Cost()
    by_label: dict[str, Cost] = defaultdict(Cost)
    for label, times, moved, flop in Program(text).kernels():
        multiplying = sum(operations / target.flops[precision] for precision, operations in flop.items())
        seconds = max(moved / target.reached_bandwidth, multiplying) + LAUNCH_SECONDS
        for one in (total, by_label[label]):
            one.seconds += times * seconds
            one.launches += times
            one.moved += times * moved
            for precision, operations in flop.items():
                one.flop[precision] += times * operations
    return total, dict(by_label)


def products_by_precision(text: str) -> dict[str, float]:
    """Operations of all products of a compiled program, by the precision of their factors."""
    found: dict[str, float] = defaultdict(float)
    for _, times, _, flop in Program(text).kernels():
        for precision, operations in flop.items():
            found[precision] += times * operations
    return dict(found)


def _sizes(text: str) -> list[int]:
    return [int(size) for size in text.split(",")] if text else []


def _size(kind: str) -> float:
    """Bytes of an array, or of a tuple of them."""
    return sum(_BYTES[dtype] * math.prod(_sizes(shape)) for dtype, shape in _ARRAY.findall(kind))


def _precision(rest: str, dtype: str) -> str:
    if dtype in ("bf16", "f16"):
        return "bfloat16"
    found = re.search(r'operand_precision"?[=:][\[{]"?(\w+)', rest)
    return _PRECISIONS[found.group(1).lower()] if found else "tensorfloat32"
