"""The cost of an optimised HLO program per chip: FLOPs, bytes and collectives, with each run of a loop counted.

XLA's own `cost_analysis()` counts the body of a loop once, however often it runs; for a model with twelve scanned
layers it gives a twelfth. This module counts the text of the compiled program by XLA's rules (`HloCostAnalysis`): every
instruction reads its operands and writes its result, and a fusion is one instruction; a slice reads only the part that
it takes, and an update in place or a scatter reads and writes only the part that it changes; a Pallas kernel for TPUs
costs what its `CostEstimate` says. A custom call of another kind reads its operands and writes its results, and
:mod:`benchmarks.hlo_products` tells the FLOPs of the libraries' calls; calls whose FLOPs it cannot tell are named in
`Cost.not_counted`. With `loops=False` each body is counted once, as XLA does, and a test compares both counts. One rule
differs: for a slice that is fetched ahead of its use (`slice-start`) XLA adds twice the whole array; this module adds
the slice, read and written.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Iterator

from benchmarks import hlo_products

ELEMENT_BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "s64": 8, "u64": 8,
    "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "f8e4m3fn": 1, "f8e5m2": 1, "c64": 8, "c128": 16, "token": 0, "opaque": 0,
}  # fmt: skip

FREE = {  # opcodes without cost
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
    "opt-barrier", "optimization-barrier", "domain", "add-dependency", "copy-done", "send", "send-done", "recv-done",
    "recv", "slice-done", "all-reduce-done", "all-gather-done", "collective-permute-done", "async-done", "async-update",
    "reduce-scatter-done", "all-to-all-done",
}  # fmt: skip
ELEMENTWISE = {  # opcodes with one operation per element of the result
    "add", "subtract", "multiply", "divide", "maximum", "minimum", "negate", "abs", "power", "remainder", "compare",
    "select", "and", "or", "xor", "not", "clamp", "round-nearest-afz", "round-nearest-even", "floor", "ceil", "sign",
    "shift-left", "shift-right-logical", "shift-right-arithmetic",
}  # fmt: skip
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all", "collective-broadcast")

_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^{}]*)\})?")
_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"^ ([a-z][\w\-]*)\(")


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a shape: its type and sides, and whether the program keeps it in the chip's scratch memory."""

    dtype: str
    sides: tuple[int, ...]
    on_chip: bool = False

    @property
    def elements(self) -> int:
        """The number of elements."""
        return math.prod(self.sides)

    @property
    def bytes(self) -> float:
        """The size in bytes.

        Raises:
          ValueError: the size of an element is not known.
        """
        if self.dtype not in ELEMENT_BYTES:
            raise ValueError(f"the size of the type {self.dtype} is not known: add it to ELEMENT_BYTES")
        return self.elements * ELEMENT_BYTES[self.dtype]


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction, a line of the text."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]  # the result; several arrays for a tuple
    operands: tuple[str, ...]
    rest: str  # the attributes
    root: bool
    literal: str = ""

    def called(self, attribute: str) -> str:
        """The name of the computation that an attribute holds.

        Raises:
          ValueError: the instruction has no such attribute.
        """
        found = re.search(attribute + r"=%?([\w.\-]+)", self.rest)
        if found is None:
            raise ValueError(f"{self.opcode} {self.name} has no {attribute}")
        return found.group(1)

    @property
    def call(self) -> str:
        """What a custom call calls: its target, and for a kernel of Pallas also its name."""
        named = re.search(r' name = "(\w+)"', self.rest) or re.search(r"/([\w.\-]+)/pallas_call$", self.origin)
        return hlo_products.call_target(self.rest) + (f" {named.group(1)}" if named else "")

    @property
    def origin(self) -> str:
        """The operation of the traced program from which the instruction comes."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found.group(1) if found else ""


@dataclasses.dataclass(frozen=True)
class Line:
    """The cost of one instruction in all its runs."""

    instruction: Instruction
    computation: str
    runs: int
    flops: float
    bytes: float
    hbm_bytes: float  # bytes without those in the chip's scratch memory


@dataclasses.dataclass(frozen=True)
class Cost:
    """A program's cost per chip."""

    flops: float
    bytes: float
    hbm_bytes: float
    collective_bytes: dict[str, float]  # kind -> bytes of each chip's operands
    collectives: dict[str, int]  # kind -> number of operations
    not_counted: dict[str, int]  # custom calls whose FLOPs are unknown and count as 0 -> number of runs
    lines: list[Line]


def _balanced(text: str, start: int) -> int:
    """The index after the parenthesis that closes the parenthesis at `start`.

    >>> _balanced("f(a(b)c)d", 1)
    8
    """
    depth = 0
    for i in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i + 1
    raise ValueError(f"unbalanced parentheses: {text[start : start + 80]}")


def _arrays(text: str) -> tuple[Array, ...]:
    return tuple(
        Array(dtype, tuple(int(s) for s in sides.split(",") if s), "S(1)" in (layout or ""))
        for dtype, sides, layout in _ARRAY.findall(text)
    )


def _instruction(line: str) -> Instruction | None:
    match = _INSTRUCTION.match(line)
    if match is None:
        return None
    root, name, text = match.groups()
    end = _balanced(text, 0) if text.startswith("(") else text.index(" ")
    opcode = _OPCODE.match(text[end:])
    if opcode is None:
        return None
    start = end + opcode.end() - 1
    stop = _balanced(text, start)
    inside = text[start + 1 : stop - 1]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(name, opcode.group(1), _arrays(text[:end]), operands, text[stop:], bool(root), inside)


def _window(i: Instruction) -> list[int]:
    """The sides of the window of an instruction; none if it has no window."""
    found = re.search(r"window=\{size=([\dx]+)", i.rest)
    return [int(side) for side in found.group(1).split("x")] if found else []


class Program:
    """The computations of an HLO text.

    Raises:
      ValueError: the text is not an HLO module.
    """

    def __init__(self, text: str) -> None:
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        current: dict[str, Instruction] | None = None
        for line in text.splitlines():
            if header := _HEADER.match(line):
                current = self.computations.setdefault(header.group(1), {})
                if line.startswith("ENTRY"):
                    self.entry = header.group(1)
            elif current is not None and (instruction := _instruction(line)):
                current[instruction.name] = instruction
        if not self.entry:
            raise ValueError("the text has no ENTRY computation: not an HLO module")

    def root(self, computation: str) -> Instruction:
        """The instruction whose value a computation returns."""
        return next(i for i in self.computations[computation].values() if i.root)

    def trips(self, loop: Instruction) -> int:
        """The number of runs of a while loop: its known count, or the constant in its condition (it counts from 0).

        Raises:
          ValueError: the condition is not a comparison with a constant.
        """
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
            return int(known.group(1))
        condition = self.computations[loop.called("condition")]
        compared = self.root(loop.called("condition"))
        if compared.opcode == "fusion":
            condition = {**condition, **self.computations[compared.called("calls")]}
        limits = [int(i.literal) for i in condition.values() if i.opcode == "constant" and i.literal.isdigit()]
        if len(limits) != 1:
            raise ValueError(f"cannot tell how often {loop.name} runs: its condition has the constants {limits}")
        return limits[0]

    def cost(self, loops: bool = True) -> Cost:
        """The cost of the program; `loops=False` counts the body of a loop once, as XLA does."""
        lines = list(self._walk(self.entry, 1, loops))
        sent: Counter[str] = Counter()
        number: Counter[str] = Counter()
        for line in lines:
            kind = line.instruction.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                computation = self.computations[line.computation]
                sent[kind] += line.runs * sum(
                    a.bytes for operand in line.instruction.operands for a in computation[operand].arrays
                )
                number[kind] += line.runs
        # Collectives in fusions. A reduce-scatter is an all-reduce whose result is cut up. XLA also hides collectives
        # behind products: each of several fusions then holds a piece of the collective, on one channel.
        hidden: dict[str, tuple[str, float, int]] = {}
        for line in lines:
            if line.instruction.opcode != "fusion":
                continue
            name = line.instruction.called("calls")
            inner = self.computations[name]
            for i in inner.values():
                if i.opcode in COLLECTIVES and (channel := re.search(r"channel_id=(\d+)", i.rest)):
                    size = sum(inner[o].arrays[0].bytes for o in i.operands)
                    if name.startswith("all-reduce-scatter"):
                        hidden[line.instruction.name] = "reduce-scatter", size, line.runs
                    else:
                        hidden[channel.group(1)] = i.opcode, size, line.runs
        for kind, size, runs in hidden.values():
            sent[kind] += runs * size
            number[kind] += runs
        unknown: Counter[str] = Counter()
        for line in lines:
            for call in self._unknown_calls(line.instruction, self.computations[line.computation]):
                unknown[call] += line.runs
        total = functools.partial(math.fsum)
        return Cost(
            total(line.flops for line in lines),
            total(line.bytes for line in lines),
            total(line.hbm_bytes for line in lines),
            dict(sent),
            dict(number),
            dict(unknown),
            lines,
        )

    def _walk(self, name: str, runs: int, loops: bool) -> Iterator[Line]:
        computation = self.computations[name]
        for i in computation.values():
            if i.opcode == "while":
                times = runs * (self.trips(i) if loops else 1)
                yield from self._walk(i.called("body"), times, loops)
            elif i.opcode == "call":
                yield from self._walk(i.called("to_apply"), runs, loops)
            elif i.opcode == "async-start":
                yield from self._walk(i.called("calls"), runs, loops)
            elif i.opcode == "conditional":  # the branch with the most bytes counts
                names = re.findall(r"%([\w.\-]+)", i.rest[i.rest.index("_computation") :].split("metadata")[0])
                branches = [list(self._walk(b, runs, loops)) for b in names if b in self.computations]
                yield from max(branches, key=lambda lines: sum(line.bytes for line in lines))
            elif i.opcode not in FREE:
                moved, on_hbm = self._bytes(i, computation)
                yield Line(i, name, runs, runs * self._flops(i, computation), runs * moved, runs * on_hbm)

    def _bytes(self, i: Instruction, computation: dict[str, Instruction]) -> tuple[float, float]:
        """The bytes that an instruction reads and writes, and how many of them are in HBM."""
        reads = [(computation[o].arrays, o) for o in i.operands]
        results = i.arrays
        if i.opcode == "custom-call":
            target = hlo_products.call_target(i.rest)
            estimate = hlo_products.kernel_numbers(i.rest).get("bytes_accessed")
            if target in hlo_products.FREE_CALLS:
                return 0.0, 0.0
            if estimate is not None:
                return estimate, estimate
            if hlo_products.has_workspace(target) and len(results) > 1:
                results = results[:-1]
        if i.opcode == "fusion":
            parts = self._fusion(i, computation)
        elif i.opcode in ("dynamic-slice", "slice", "gather"):
            parts = [(i.arrays[0], i.arrays[0].bytes), (computation[i.operands[0]].arrays[0], i.arrays[0].bytes)]
            parts += [(a, a.bytes) for arrays, _ in reads[1:] for a in arrays]
        elif i.opcode == "dynamic-update-slice":
            update = computation[i.operands[1]].arrays[0]
            parts = [(i.arrays[0], update.bytes), (update, update.bytes)]
        elif i.opcode == "scatter":  # operands, indices, updates
            number = len(i.arrays)
            parts = [(a, a.bytes) for arrays, _ in reads[number:] for a in arrays]
            updates = [arrays[0].bytes for arrays, _ in reads[number + 1 :]]
            parts += [(a, 2 * moved) for a, moved in zip(i.arrays, updates, strict=True)]  # read and written
        elif i.opcode in ("copy-start", "slice-start"):  # result: destination and source, in either order
            source, moved = computation[i.operands[0]].arrays[0], min(a.bytes for a in i.arrays[:2])
            target = next((a for a in i.arrays[:2] if a.on_chip != source.on_chip), source)
            parts = [(source, moved), (target, moved)]
        elif i.opcode.endswith("-start"):
            operands = [a for arrays, _ in reads for a in arrays]
            results = i.arrays[len(operands) :] or i.arrays
            parts = [(a, a.bytes) for a in (*operands, *results) if a.sides]
        else:
            parts = [(a, a.bytes) for a in results]
            parts += [(a, a.bytes) for arrays, _ in reads for a in arrays]
        return sum(b for _, b in parts), sum(b for a, b in parts if not a.on_chip)

    def _fusion(self, i: Instruction, computation: dict[str, Instruction]) -> list[tuple[Array, float]]:
        """(array, bytes read or written) for each operand and result of a fusion."""
        inner = self.computations[i.called("calls")]
        users: dict[str, list[Instruction]] = {}
        for instruction in inner.values():
            for operand in instruction.operands:
                users.setdefault(operand, []).append(instruction)

        def moved(name: str, whole: float) -> float:
            """The bytes that the fusion reads of a value: those of slices, or all."""
            total = 0.0
            for user in users.get(name, []):
                position = user.operands.index(name)
                if user.opcode in ("dynamic-slice", "slice", "gather") and position == 0:
                    total += user.arrays[0].bytes
                elif user.opcode == "dynamic-update-slice" and position == 0:
                    pass  # changed in place
                elif user.opcode == "scatter" and position < len(user.arrays):  # what is changed is read
                    total += inner[user.operands[len(user.arrays) + 1 + position]].arrays[0].bytes
                elif user.opcode == "bitcast":
                    total += moved(user.name, whole)
                elif user.root and user.opcode == "tuple":
                    pass  # returned as it is
                elif user.opcode == "fusion":
                    total += (
                        moved(user.name, whole) if self._rearranges(user) else self._fusion(user, inner)[position][1]
                    )
                else:
                    return whole
            return min(total, whole)

        parameters = {int(p.literal): p for p in inner.values() if p.opcode == "parameter"}
        parts = []
        for index, operand in enumerate(i.operands):
            array = computation[operand].arrays[0]
            parts.append((array, moved(parameters[index].name, sum(a.bytes for a in computation[operand].arrays))))

        def written(name: str) -> float:
            """The bytes that the fusion writes of a result: those of an update in place, or all."""
            value = inner[name]
            if value.opcode == "bitcast":
                return written(value.operands[0])
            if value.opcode == "dynamic-update-slice":
                return inner[value.operands[1]].arrays[0].bytes
            if value.opcode == "scatter":
                return sum(inner[o].arrays[0].bytes for o in value.operands[len(value.arrays) + 1 :])
            if value.opcode == "parameter" or value.opcode in COLLECTIVES:  # not written, or counted in Program.cost
                return 0.0
            return sum(a.bytes for a in value.arrays)

        root = self.root(i.called("calls"))
        results = root.operands if root.opcode == "tuple" else (root.name,)
        return parts + [(array, written(name)) for array, name in zip(i.arrays, results, strict=False)]

    def _rearranges(self, fusion: Instruction) -> bool:
        """Whether a fusion only changes the layout of its operand, so that a slice of its result slices the operand."""
        opcodes = {i.opcode for i in self.computations[fusion.called("calls")].values()}
        return opcodes <= {"parameter", "copy", "bitcast"}

    def _flops(self, i: Instruction, computation: dict[str, Instruction]) -> float:
        if i.opcode == "fusion":
            inner = self.computations[i.called("calls")]
            return sum(self._flops(j, inner) for j in inner.values())
        if i.opcode == "custom-call":
            return self._call_flops(i, computation) or 0.0
        if i.opcode in ELEMENTWISE:
            return i.arrays[0].elements
        if i.opcode == "reduce-window":  # as XLA: one operation less than the window has places
            return i.arrays[0].elements * (math.prod(_window(i)) - 1)
        if i.opcode in ("reduce", "all-reduce"):
            return sum(a.elements for o in i.operands[:1] for a in computation[o].arrays)
        if i.opcode == "dot":
            contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.rest)
            lhs = computation[i.operands[0]].arrays[0].sides
            return hlo_products.product_flops(lhs, i.arrays[0].sides, contracted.group(1) if contracted else "")
        if i.opcode == "convolution":
            lhs, rhs = (computation[o].arrays[0] for o in i.operands[:2])
            return hlo_products.convolution_flops(lhs.sides, rhs.sides, i.arrays[0].sides, i.rest)
        return 0.0

    def _unknown_calls(self, i: Instruction, computation: dict[str, Instruction]) -> Iterator[str]:
        """The custom calls of an instruction, also those in a fusion, whose FLOPs nothing tells."""
        if i.opcode == "fusion":
            inner = self.computations[i.called("calls")]
            for j in inner.values():
                yield from self._unknown_calls(j, inner)
        elif self._call_flops(i, computation) is None:
            yield i.call

    def _call_flops(self, i: Instruction, computation: dict[str, Instruction]) -> float | None:
        """FLOPs of a custom call; None if nothing tells them. Other instructions have 0 here."""
        target = hlo_products.call_target(i.rest) if i.opcode == "custom-call" else ""
        if not target or target in hlo_products.FREE_CALLS:
            return 0.0
        estimate = hlo_products.kernel_numbers(i.rest).get("flops")
        if estimate is not None:
            return estimate
        operands = [computation[o].arrays[0].sides for o in i.operands]
        return hlo_products.call_flops(target, operands, [a.sides for a in i.arrays], i.rest)
