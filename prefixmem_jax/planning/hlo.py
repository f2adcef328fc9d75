"""What a compiled program moves: its collectives and its memory traffic, loops included.

XLA's own cost analysis counts the body of a loop once, and a train step spends its time in loops
over layers. This reads the text of the optimised program instead. A loop whose condition is not a
constant bound counts as not run: here those are the further exchanges of an unevenly spread batch
(`memory.table`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2}
_BYTES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "token": 0}
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
# Instructions that are other instructions: where these are.
_INNER = {"fusion": "calls", "call-start": "to_apply"}
# Instructions that move nothing themselves.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "iota", "after-all"),
    *("while", "call", "conditional", "copy-done", "slice-done", "async-done", "async-update"),
    "call-done",
    *("partition-id", "replica-id", "custom-call"),
    *(f"{kind}-done" for kind in _COLLECTIVES),
}


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    text: str

    def called(self, attribute: str) -> str | None:
        found = re.search(rf"\b{attribute}=%?([\w.-]+)", self.text)
        return found and found[1]


@dataclass(frozen=True)
class Collective:
    """One collective of the program.

    Attributes:
      kind: such as `all-to-all`.
      bytes: what a device sends for it in one run of the program.
      size: bytes of its result on a device, in one execution.
      count: executions in one run of the program.
      devices: how many devices exchange with each other.
      scope: the traced function's name stack (`jax.named_scope`).
      overlapped: whether the device computes meanwhile.
    """

    kind: str
    bytes: int
    size: int
    count: int
    devices: int
    scope: str
    overlapped: bool


@dataclass
class Program:
    """The computations of an optimised program, by name."""

    computations: dict[str, dict[str, Instruction]] = field(default_factory=dict)
    entry: str = ""

    @classmethod
    def parse(cls, text: str) -> Program:
        """Reads `compiled.as_text()`."""
        program, current = cls(), None
        for line in text.splitlines():
            if line.endswith("{") and not line.startswith((" ", "HloModule")):
                name = line.removeprefix("ENTRY ").split()[0].lstrip("%")
                current = program.computations.setdefault(name, {})
                if line.startswith("ENTRY"):
                    program.entry = name
            elif line == "}":
                current = None
            elif current is not None and " = " in line:
                instruction = _instruction(line)
                current[instruction.name] = instruction
        return program

    def executed(self) -> Iterator[tuple[str, int]]:
        """Computations that run as sequences of instructions, and how often."""
        yield from self._executed(self.entry, 1)

    def _executed(self, name: str, count: int) -> Iterator[tuple[str, int]]:
        yield name, count
        for instruction in self.computations[name].values():
            if instruction.opcode == "while":
                trips = self._trip_count(instruction)
                if trips:
                    yield from self._executed(instruction.called("body"), count * trips)
            elif instruction.opcode in ("call", "async-start"):
                called = instruction.called("to_apply") or instruction.called("calls")
                if called:
                    yield from self._executed(called, count)

    def _trip_count(self, loop: Instruction) -> int:
        known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.text)
        if known:
            return int(known[1])
        condition = self.computations[loop.called("condition")]
        for instruction in condition.values():
            if instruction.opcode == "compare" and "direction=LT" in instruction.text:
                bound = condition.get(instruction.operands[1])
                value = bound and re.search(r"constant\((\d+)\)", bound.text)
                if value:
                    return int(value[1])
        return 0

    def collectives(self) -> list[Collective]:
        """Every collective between two or more devices that runs, largest first."""
        collectives, seen = [], set()
        for name, count in self.executed():
            for where, instruction in self._with_fused((name,)):
                kind = instruction.opcode.removesuffix("-start")
                if kind not in _COLLECTIVES:
                    continue
                # The TPU compiler cuts one asynchronous collective into a chain of fusions.
                chain = re.search(r'chain_id="(\d+)"', instruction.text)
                channel = re.search(r"channel_id=(\d+)", instruction.text)
                overlapped = (
                    bool(chain)
                    or instruction.opcode.endswith("-start")
                    or self._is_beside_other_work(where)
                )
                if chain and channel:
                    if (chain[1], channel[1]) in seen:
                        continue
                    seen.add((chain[1], channel[1]))
                devices = _group_size(instruction.text)
                if devices == 1:
                    continue
                share = _sent_share(kind, devices)
                if where[-1].startswith("all-reduce-scatter"):  # how TPUs write some of these
                    kind, share = "reduce-scatter", share / 2
                # The compiler joins small collectives into one with many operands.
                sizes = _collective_sizes(instruction, kind)
                if len(sizes) == len(instruction.operands):
                    pieces = zip(sizes, instruction.operands, strict=True)
                else:  # one result
                    pieces = [(sum(sizes), instruction.operands[0])]
                for size, operand in pieces:
                    sent = int(count * size * share)
                    scope = self._scope(where, instruction, operand, len(sizes) > 1)
                    collectives.append(
                        Collective(kind, sent, size, count, devices, scope, overlapped)
                    )
        return sorted(collectives, key=lambda c: -c.bytes)

    def _with_fused(self, where: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Instruction]]:
        """Instructions of a computation, of its fusions, and of what sparse cores do for it.

        Args:
          where: the computation's name, after those of the fusions and computations around it.
        """
        for instruction in self.computations[where[-1]].values():
            yield where, instruction
            inner = _INNER.get(instruction.opcode)
            if inner is not None:
                yield from self._with_fused((*where, instruction.name, instruction.called(inner)))

    def _is_beside_other_work(self, where: tuple[str, ...]) -> bool:
        """Whether sparse cores run a computation, whose start the others do not wait at."""
        around = zip(where[::2], where[1::2], strict=False)
        return any(self.computations[home][name].opcode == "call-start" for home, name in around)

    def _scope(
        self, where: tuple[str, ...], instruction: Instruction, operand: str, joined: bool
    ) -> str:
        """The collective's name stack, or where it has none of its own, its operand's."""
        home = self.computations[where[-1]]
        queue = [operand] if joined else [instruction.name, operand]
        for name in queue:  # grows: producers, nearest first
            if len(queue) > 100:
                break
            scope = re.search(r'op_name="([^"]*)"', home[name].text)
            if scope:
                return scope[1]
            queue += [producer for producer in home[name].operands if producer in home]
        if len(where) > 1:  # in a fusion: look where its operands come from
            fusion = self.computations[where[-3]][where[-2]]
            return self._scope(where[:-2], fusion, fusion.operands[0], joined)
        return ""

    def cycles(self) -> Iterator[tuple[str, int]]:
        """The compiler's estimate for every instruction that it has one for: scope and cycles.

        It has none for collectives and for kernels.
        """
        for name, count in self.executed():
            for instruction in self.computations[name].values():
                estimate = re.search(r'estimated_cycles":"(\d+)"', instruction.text)
                if estimate:
                    scope = re.search(r'op_name="([^"]*)"', instruction.text)
                    yield scope[1] if scope else "", count * int(estimate[1])

    def memory_bytes(self) -> int:
        """Bytes that one run reads from and writes to main memory, on one device.

        Operands and results of every instruction that are not in on-chip memory; of gathers,
        scatters and slices only the part that they touch.
        """
        return sum(
            count * self._traffic(self.computations[name], instruction)
            for name, count in self.executed()
            for instruction in self.computations[name].values()
        )

    def _traffic(self, computation: dict[str, Instruction], instruction: Instruction) -> int:
        opcode, operands = instruction.opcode, instruction.operands
        if opcode in _FREE:
            return 0
        if opcode == "async-start":
            return 0  # its computation is counted
        if opcode in ("copy-start", "slice-start"):  # (destination, source, ...)
            return sum(_sizes(instruction.type)[:2]) if opcode == "copy-start" else 0
        sizes = [_size(computation[name].type) if name in computation else 0 for name in operands]
        result = _size(instruction.type)
        if opcode == "fusion":
            fused = self.computations[instruction.called("calls")]
            return self._fusion_traffic(fused, sizes, result)
        if opcode in ("dynamic-slice", "gather", "slice"):
            return 2 * result
        if opcode == "dynamic-update-slice":
            return 2 * sizes[1]
        if opcode == "scatter":
            return 2 * sizes[2]
        return sum(sizes) + result

    def _fusion_traffic(self, fused: dict[str, Instruction], sizes: list[int], result: int) -> int:
        total = 0
        users: dict[str, list[Instruction]] = {}
        for instruction in fused.values():
            for name in instruction.operands:
                users.setdefault(name, []).append(instruction)
        updated = set()  # parameters that are written in place
        for instruction in fused.values():
            if instruction.opcode in ("dynamic-update-slice", "scatter"):
                target = fused.get(instruction.operands[0])
                while target is not None and target.opcode == "bitcast":
                    target = fused.get(target.operands[0])
                if target is not None and target.opcode == "parameter":
                    updated.add(target.name)
                    update = instruction.operands[1 if "slice" in instruction.opcode else 2]
                    total += 2 * _size(fused[update].type)
                    result -= _size(target.type)
        for parameter in fused.values():
            if parameter.opcode != "parameter" or parameter.name in updated:
                continue
            size = sizes[int(re.search(r"parameter\((\d+)\)", parameter.text)[1])]
            read = users.get(parameter.name, [])
            if read and all(
                user.opcode in ("dynamic-slice", "gather", "slice")
                and user.operands[0] == parameter.name
                for user in read
            ):
                size = min(size, sum(_size(user.type) for user in read))
            total += size
        return total + max(result, 0)


def _instruction(line: str) -> Instruction:
    name, rest = line.strip().removeprefix("ROOT ").split(" = ", 1)
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    start = len(opcode)
    inside = rest[start + 1 : _closing(rest, start)]
    operands = tuple(re.findall(r"%([\w.-]+)", inside))
    return Instruction(name.lstrip("%"), kind, opcode, operands, line)


def _closing(text: str, start: int) -> int:
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    return len(text)


def _sizes(kind: str) -> list[int]:
    """Bytes of every array of a type that is in main memory (S(1) and up are on the chip)."""
    sizes = []
    for dtype, dims, layout in _ARRAY.findall(kind):
        if dtype not in _BYTES:
            raise ValueError(f"how many bytes has {dtype}, in {kind}?")
        size = math.prod(int(n) for n in dims.split(",") if n) * _BYTES[dtype]
        sizes.append(0 if "S(" in layout else size)
    return sizes


def _size(kind: str) -> int:
    return sum(_sizes(kind))


def _collective_sizes(instruction: Instruction, kind: str) -> list[int]:
    """Bytes of each result, wherever it is kept."""
    sizes = _sizes(re.sub(r"S\(\d+\)", "", instruction.type))
    if instruction.opcode == "all-reduce-start" or not instruction.opcode.endswith("-start"):
        return sizes
    return sizes[len(instruction.operands) :][: len(instruction.operands)]  # (operands, results)


def _sent_share(kind: str, devices: int) -> float:
    """Bytes that a device sends, as a multiple of its result's (ring algorithms)."""
    if kind == "collective-permute":
        return 1.0
    others = (devices - 1) / devices
    return {"all-reduce": 2 * others, "reduce-scatter": devices - 1.0}.get(kind, others)


def _group_size(text: str) -> int:
    """Devices in one replica group, in any of the notations of the text."""
    if "source_target_pairs" in text:
        return 2
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", text)
    if listed:
        return len(listed[1].split(","))
    numbered = re.search(r"replica_groups=\[\d+,(\d+)\]", text)
    if numbered:
        return int(numbered[1])
    meshed = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", text)
    if meshed:
        sizes = dict(re.findall(r"('[\w.]+')=(\d+)", meshed[1]))
        return math.prod(int(sizes[axis]) for axis in meshed[2].split(","))
    raise ValueError(f"no replica groups in: {text[:200]}")
