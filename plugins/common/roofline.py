"""What the operators could reach on cards of compute capability 6.1, from published figures alone.

An operator takes at least the time its bytes need at the memory's rate, and at least the time its arithmetic needs at
the cores' rate. Nothing here was measured: these are bounds from below on time, for judging a measurement by.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from deepstitch.plugins.registry import OPS

__all__ = [
    "CARDS",
    "EXPERTS",
    "INT4",
    "LINEARS",
    "TABLES",
    "Card",
    "Experts",
    "Format",
    "Linear",
    "Row",
    "Work",
    "cards_table",
    "linear_work",
    "moe_work",
    "table",
]

_PLUGINS = Path(__file__).resolve().parent.parent
DECODE = (1, 2, 4, 8)
PREFILL = (128, 512, 2048)


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """A card as its maker describes it.

    Attributes:
        name: in tables.
        cores: fp32 lanes; each finishes one multiply-add, or one dp4a (four of them), per clock.
        megahertz: boost clock.
        bus_bits: of the memory.
        gigabits: per second and pin.
        gigabytes: of memory.
    """

    name: str
    cores: int
    megahertz: int
    bus_bits: int
    gigabits: float
    gigabytes: int

    @property
    def bytes_per_second(self) -> float:
        """Of the memory, at most."""
        return self.bus_bits / 8 * self.gigabits * 1e9

    @property
    def float_per_second(self) -> float:
        """fp32 operations, at most; a multiply-add is two."""
        return 2.0 * self.cores * self.megahertz * 1e6

    @property
    def integer_per_second(self) -> float:
        """int8 operations of dp4a, at most."""
        return 4 * self.float_per_second


CARDS = (
    Card(name="Tesla P40", cores=3840, megahertz=1531, bus_bits=384, gigabits=7.2, gigabytes=24),
    Card(name="GTX 1080 Ti", cores=3584, megahertz=1582, bus_bits=352, gigabits=11.0, gigabytes=11),
    # A laptop's cooling decides how much of its 1468 MHz an MX350 holds.
    Card(name="MX350", cores=640, megahertz=1468, bus_bits=64, gigabits=7.0, gigabytes=2),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What one call cannot do without.

    Attributes:
        nbytes: inputs that are needed and outputs, each moved once; no workspace.
        float_ops: in fp32.
        integer_ops: in dp4a.
    """

    nbytes: float
    float_ops: float = 0.0
    integer_ops: float = 0.0

    def seconds(self, card: Card) -> tuple[float, str]:
        """The bound, and what sets it: ``memory`` or ``arithmetic``."""
        memory = self.nbytes / card.bytes_per_second
        arithmetic = self.float_ops / card.float_per_second + self.integer_ops / card.integer_per_second
        return max((memory, "memory"), (arithmetic, "arithmetic"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """How a matrix is stored: ``block`` numbers of ``bits`` share a float16 scale, or 0."""

    name: str
    bits: int
    block: int = 0

    @property
    def bytes_per_weight(self) -> float:
        """With the share of the scale."""
        return self.bits / 8 + (2 / self.block if self.block else 0)

    def work(self, nbytes: float, multiply_adds: float) -> Work:
        """Two operations for each multiply-add, in dp4a where numbers are integers."""
        if self.block:
            return Work(nbytes=nbytes, integer_ops=2 * multiply_adds)
        return Work(nbytes=nbytes, float_ops=2 * multiply_adds)


INT4 = Format(name="int4, blocks of 32", bits=4, block=32)
FORMATS = (
    INT4,
    Format(name="int4, blocks of 128", bits=4, block=128),
    Format(name="int8, blocks of 32", bits=8, block=32),
    Format(name="float16", bits=16),
    Format(name="float32", bits=32),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """The experts of one decoder layer."""

    name: str
    layers: int
    experts: int
    top_k: int
    hidden: int
    intermediate: int

    @property
    def weights(self) -> int:
        """Of one gated expert."""
        return 3 * self.hidden * self.intermediate

    def touched(self, tokens: int) -> float:
        """Experts at least one of the tokens goes to, on average, if each chooses evenly and for itself."""
        return self.experts * (1 - (1 - self.top_k / self.experts) ** tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """One matrix ``[outputs, inputs]``."""

    name: str
    inputs: int
    outputs: int


EXPERTS = (
    Experts(name="30B-A3B", layers=48, experts=128, top_k=8, hidden=2048, intermediate=768),
    Experts(name="vl-sm61", layers=32, experts=4, top_k=2, hidden=2048, intermediate=1408),
)
LINEARS = (
    Linear(name="2B gate and up", inputs=2048, outputs=2 * 6144),
    Linear(name="2B down", inputs=6144, outputs=2048),
    Linear(name="30B-A3B q, k, v", inputs=2048, outputs=(32 + 2 * 4) * 128),
    Linear(name="vl-sm61 q, k, v", inputs=2048, outputs=(32 + 2 * 8) * 64),
)


def moe_work(shape: Experts, tokens: int, stored: Format) -> Work:
    """MoEExperts: the touched experts' weights once, x, router logits and y."""
    weights = shape.touched(tokens) * shape.weights * stored.bytes_per_weight
    moved = 4.0 * tokens * (2 * shape.hidden + shape.experts)
    return stored.work(weights + moved, float(tokens * shape.top_k * shape.weights))


def linear_work(shape: Linear, tokens: int, stored: Format) -> Work:
    """QuantizedLinear: the matrix once, x and y; no bias or residual."""
    size = shape.inputs * shape.outputs
    moved = 4.0 * tokens * (shape.inputs + shape.outputs)
    return stored.work(size * stored.bytes_per_weight + moved, float(tokens * size))


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of a table: the values of its leading columns, and the work."""

    cells: tuple[str, ...]
    work: Work


def table(columns: tuple[str, ...], rows: Iterator[Row]) -> str:
    """Markdown: leading columns, bytes, operations, and the least time on each card with what sets it."""
    heads = (*columns, "MB", "Gop", *(f"{card.name} (µs)" for card in CARDS))
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(columns) + "---:|" * (2 + len(CARDS))]
    for row in rows:
        ops = row.work.float_ops + row.work.integer_ops
        cells = [*row.cells, f"{row.work.nbytes / 1e6:.2f}", f"{ops / 1e9:.3f}"]
        for card in CARDS:
            seconds, bound = row.work.seconds(card)
            cells.append(f"{seconds * 1e6:.{0 if seconds >= 1e-5 else 1}f} {bound[0]}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def cards_table() -> str:
    """Markdown: the figures the other tables stand on."""
    lines = [
        "| card | cores | MHz | memory | GB/s | fp32 TFLOP/s | dp4a TOP/s |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for card in CARDS:
        rates = (card.bytes_per_second / 1e9, card.float_per_second / 1e12, card.integer_per_second / 1e12)
        shown = f"{rates[0]:.0f} | {rates[1]:.2f} | {rates[2]:.1f}"
        lines.append(f"| {card.name} | {card.cores} | {card.megahertz} | {card.gigabytes} GB | {shown} |")
    return "\n".join(lines)


def _moe_rows() -> Iterator[Row]:
    for shape in EXPERTS:
        for tokens in (*DECODE, *PREFILL):
            cells = (shape.name, INT4.name, str(tokens), f"{shape.touched(tokens):.1f} of {shape.experts}")
            yield Row(cells=cells, work=moe_work(shape, tokens, INT4))
        for stored in FORMATS[1:]:
            cells = (shape.name, stored.name, "1", f"{shape.touched(1):.1f} of {shape.experts}")
            yield Row(cells=cells, work=moe_work(shape, 1, stored))


def _linear_rows() -> Iterator[Row]:
    for shape in LINEARS:
        for tokens in (*DECODE, *PREFILL):
            yield Row(cells=(shape.name, INT4.name, str(tokens)), work=linear_work(shape, tokens, INT4))
    for stored in FORMATS[1:]:
        for tokens in (1, 512):
            cells = (LINEARS[0].name, stored.name, str(tokens))
            yield Row(cells=cells, work=linear_work(LINEARS[0], tokens, stored))


def _moe_table() -> str:
    weights = [
        f"{shape.name}: {shape.layers * shape.experts * shape.weights * INT4.bytes_per_weight / 1e9:.2f} GB"
        for shape in EXPERTS
    ]
    rows = table(("shape", "weights", "tokens", "experts read"), _moe_rows())
    return f"{rows}\n\nAll experts of all layers, {INT4.name}: {', '.join(weights)}."


def _own(folder: str) -> Callable[[], str]:
    """The table that an operator's own ``roofline.py`` makes."""

    def made() -> str:
        return str(importlib.import_module(f"deepstitch.plugins.{folder}.roofline").roofline())

    return made


TABLES: Mapping[str, Callable[[], str]] = {
    "moe_experts": _moe_table,
    "quantized_linear": lambda: table(("matrix", "weights", "tokens"), _linear_rows()),
    **{folder: _own(folder) for folder in OPS if (_PLUGINS / folder / "roofline.py").is_file()},
}  # folder of the operator: its table
