"""The bytes and operations SparseAttention cannot do without, and its table for ``benchmarks/plugins_roofline.py``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from deepstitch.plugins.common.roofline import Row, Work, table

__all__ = ["LAYERS", "Layer", "attention_work", "roofline"]

BLOCK = 64
_BYTES = {"float32": 4, "float16": 2, "int8": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """The attention of one decoder layer."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int

    def token_bytes(self, stored: str) -> int:
        """Key and value of one token in the cache, with their scales."""
        each = self.head_dim * _BYTES[stored] + (4 if stored == "int8" else 0)
        return 2 * self.kv_heads * each


LAYERS = (
    Layer(name="30B-A3B", heads=32, kv_heads=4, head_dim=128),
    Layer(name="2B", heads=16, kv_heads=8, head_dim=128),
    Layer(name="vl-sm61", heads=32, kv_heads=8, head_dim=64),
)


def attention_work(layer: Layer, *, tokens: int, context: int, stored: str, part: float, pooled: bool = False) -> Work:
    """One batch row: keys and values that are visited, each moved once; queries and output.

    Args:
        layer: heads.
        tokens: new ones.
        context: keys in all, the new tokens' among them.
        stored: format of the cache.
        part: of the key blocks, for every query block.
        pooled: the mean keys are made from the cache in this call: every key is read once more.
    """
    # the keys of many query blocks together are all keys, as soon as their parts differ
    read = context * (part if tokens <= BLOCK else 1.0)
    nbytes = read * layer.token_bytes(stored) + 8.0 * tokens * layer.heads * layer.head_dim
    if pooled:
        nbytes += context * layer.token_bytes(stored) / 2
    pairs = part * (tokens * (context - tokens) + tokens * (tokens + 1) / 2)
    return Work(nbytes=nbytes, float_ops=4.0 * layer.heads * layer.head_dim * pairs)


def _rows() -> Iterator[Row]:
    def row(layer: Layer, tokens: int, context: int, stored: str, part: float, *, pooled: bool = False) -> Row:
        blocks = "all" if part == 1 else f"{part:.0%}{', means made' if pooled else ''}"
        work = attention_work(layer, tokens=tokens, context=context, stored=stored, part=part, pooled=pooled)
        return Row(cells=(layer.name, stored, str(tokens), str(context), blocks), work=work)

    for layer in LAYERS:
        for context in (1024, 8192, 32768):
            yield row(layer, 1, context, "float16", 1.0)
    first = LAYERS[0]
    for stored in ("float32", "int8"):
        yield row(first, 1, 32768, stored, 1.0)
    for part in (0.25, 0.1):
        yield row(first, 1, 32768, "float16", part)
    yield row(first, 1, 32768, "float16", 0.1, pooled=True)
    for context in (2048, 8192, 32768):
        yield row(first, 2048, context, "float16", 1.0)
    for part in (0.25, 0.1):
        yield row(first, 2048, 32768, "float16", part, pooled=True)


def roofline() -> str:
    """The table, in Markdown."""
    return table(("layer", "cache", "new tokens", "context", "blocks"), _rows())
