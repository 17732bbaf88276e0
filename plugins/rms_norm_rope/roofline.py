"""What RMSNormRope could reach: rows for the table of its README."""

from __future__ import annotations

from collections.abc import Iterator

from deepstitch.plugins.common.roofline import Row, Work, table

__all__ = ["roofline", "rope_work", "rows_work"]

TOKENS = (1, 128, 512, 2048)
BYTES = {"float32": 4, "float16": 2}
# (name, heads, head_dim): the query and key heads of a layer
HEADS = (("30B-A3B query", 32, 128), ("30B-A3B key", 4, 128), ("vl-sm61 query", 32, 64))


def rows_work(tokens: int, hidden: int, stored: str, *, residual: bool) -> Work:
    """Mode "norm": x and y, with a residual also that and the sum; the weight once."""
    moved = tokens * hidden * BYTES[stored] * (4 if residual else 2) + 4 * hidden
    return Work(nbytes=float(moved), float_ops=float(tokens * hidden * (5 if residual else 4)))


def rope_work(tokens: int, heads: int, head_dim: int, stored: str) -> Work:
    """Mode "norm_rope": x, y and three positions a token; weight and frequencies once."""
    elements = tokens * heads * head_dim
    moved = 2 * elements * BYTES[stored] + 12 * tokens + 6 * head_dim
    return Work(nbytes=float(moved), float_ops=7.0 * elements)


def _rows() -> Iterator[Row]:
    for residual, what in ((True, "residual and norm of 2048"), (False, "norm of 2048")):
        for tokens in TOKENS:
            work = rows_work(tokens, 2048, "float32", residual=residual)
            yield Row(cells=(what, "float32", str(tokens)), work=work)
    for tokens in (1, 2048):
        work = rows_work(tokens, 2048, "float16", residual=True)
        yield Row(cells=("residual and norm of 2048", "float16", str(tokens)), work=work)
    for name, heads, head_dim in HEADS:
        for tokens in TOKENS:
            cells = (f"{name}, {heads} heads of {head_dim}", "float32", str(tokens))
            yield Row(cells=cells, work=rope_work(tokens, heads, head_dim, "float32"))


def roofline() -> str:
    """The table in Markdown."""
    return table(("what", "x and y", "tokens"), _rows())
