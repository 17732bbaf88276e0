"""What KVCacheAppend could reach: rows for the table of its README."""

from __future__ import annotations

from collections.abc import Iterator

from deepstitch.plugins.common.roofline import Row, Work, table

__all__ = ["append_work", "roofline"]

LAYERS = (("30B-A3B", 4, 128), ("2B", 8, 128), ("vl-sm61", 8, 64))  # kv heads and their width
BYTES = {"float32": 4, "float16": 2, "int8": 1}


def append_work(heads: int, width: int, kv_format: str, tokens: int, copied: int = 0) -> Work:
    """Keys and values read and written; ``copied`` slots of the old cache read and written as well."""
    slot = heads * (width * BYTES[kv_format] + (4 if kv_format == "int8" else 0))
    return Work(nbytes=float(2 * (tokens * (4 * heads * width + slot) + 2 * copied * slot)))


def _rows() -> Iterator[Row]:
    for name, heads, width in LAYERS:
        for tokens in (1, 512, 2048):
            yield _row(name, heads, width, "float16", tokens, 0)
    name, heads, width = LAYERS[0]
    for kv_format in ("float32", "int8"):
        for tokens in (1, 2048):
            yield _row(name, heads, width, kv_format, tokens, 0)
    for capacity in (1024, 32768):
        yield _row(name, heads, width, "float16", 1, capacity)


def _row(name: str, heads: int, width: int, kv_format: str, tokens: int, copied: int) -> Row:
    cells = (name, kv_format, str(tokens), f"{copied} slots" if copied else "nothing")
    return Row(cells=cells, work=append_work(heads, width, kv_format, tokens, copied))


def roofline() -> str:
    """The table in Markdown."""
    return table(("layer", "cache", "new tokens", "copied"), _rows())
