"""Blocks for whoever asks first: a pool's memory, its two allocators and the queue in front of them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from deepstitch.runtime.disaggregated.blocks import BlockAllocator
from deepstitch.runtime.disaggregated.buffers import BufferLayout, MultimodalDataBuffers
from deepstitch.runtime.disaggregated.config import PoolConfig
from deepstitch.runtime.disaggregated.errors import RequestTooLarge
from deepstitch.runtime.disaggregated.metrics import Metrics

__all__ = ["BlockPool", "Grant", "layout_for"]


class Grant(NamedTuple):
    """Blocks that belong to one owner.

    Attributes:
        tokens: blocks of token rows.
        deepstack: blocks of DeepStack rows.
    """

    tokens: tuple[int, ...]
    deepstack: tuple[int, ...]


def layout_for(config: PoolConfig, *, hidden_size: int, num_deepstack: int) -> BufferLayout:
    """The pool a configuration asks for."""
    deepstack = config.blocks if config.deepstack_blocks is None else config.deepstack_blocks
    return BufferLayout(
        hidden_size=hidden_size,
        num_deepstack=num_deepstack,
        block_tokens=config.block_tokens,
        num_blocks=config.blocks,
        num_deepstack_blocks=deepstack if num_deepstack else 0,
    )


class BlockPool:
    """A pool in the hands of one event loop.

    Requests are served in the order they came: a large one is not overtaken for ever by small ones. Both kinds of
    blocks are given together or not at all, so that two requests never hold one kind each and wait for the other.

    Attributes:
        buffers: the memory.
        tokens: allocator of token blocks.
        deepstack: allocator of DeepStack blocks.
    """

    def __init__(self, layout: BufferLayout, memory: npt.NDArray[np.uint8]) -> None:
        self.buffers = MultimodalDataBuffers(layout, memory)
        self.tokens = BlockAllocator(self.buffers.generations[: layout.num_blocks])
        self.deepstack = BlockAllocator(self.buffers.generations[layout.num_blocks :])
        self._queue: deque[tuple[asyncio.Future[Grant], Callable[[], Grant | None]]] = deque()

    @property
    def layout(self) -> BufferLayout:
        """Sizes."""
        return self.buffers.layout

    @property
    def idle(self) -> bool:
        """Nobody owns a block."""
        return self.tokens.free == self.tokens.total and self.deepstack.free == self.deepstack.total

    def report(self, metrics: Metrics) -> None:
        """Show free and all blocks."""
        for kind, allocator in (("tokens", self.tokens), ("deepstack", self.deepstack)):
            metrics.gauge("blocks_free", partial(getattr, allocator, "free"), kind=kind)
            metrics.gauge("blocks_total", partial(getattr, allocator, "total"), kind=kind)

    def check_fits(self, tokens: int, deepstack_rows: int, *, side: str) -> None:
        """Refuse what even an empty pool could not hold.

        Args:
            tokens: of one transfer.
            deepstack_rows: of the whole prompt.
            side: whose pool, for the message.

        Raises:
            RequestTooLarge: it does not fit.
        """
        for kind, rows, allocator in (
            ("token", tokens, self.tokens),
            ("DeepStack", deepstack_rows, self.deepstack),
        ):
            blocks = self.layout.blocks_for(rows)
            if blocks > allocator.total:
                flag = "--pool-blocks" if kind == "token" else "--deepstack-blocks"
                raise RequestTooLarge(
                    f"{rows} {kind} rows take {blocks} blocks of {self.layout.block_tokens}, the pool of the {side} "
                    f"process has {allocator.total}; start it with a larger {flag}, or pass smaller pictures"
                )

    async def acquire(self, owner: str, tokens: int, deepstack_rows: int) -> Grant:
        """Wait for blocks for that many rows; cancelling gives the place in the queue back."""
        wanted = self.layout.blocks_for(tokens), self.layout.blocks_for(deepstack_rows)
        future: asyncio.Future[Grant] = asyncio.get_running_loop().create_future()
        entry = (future, lambda: self._take(owner, *wanted))
        self._queue.append(entry)
        self._serve()
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                self.release(owner)  # granted in the moment of giving up
            elif entry in self._queue:
                self._queue.remove(entry)
            self._serve()
            raise

    def release(self, owner: str) -> None:
        """Take back everything ``owner`` has."""
        self.tokens.release(owner)
        self.deepstack.release(owner)
        self._serve()

    def generations_of(self, grant: Grant) -> tuple[int, ...]:
        """Of the blocks, DeepStack's last."""
        tokens = self.tokens.generations[list(grant.tokens)].tolist()
        return (*tokens, *self.deepstack.generations[list(grant.deepstack)].tolist())

    def _take(self, owner: str, tokens: int, deepstack: int) -> Grant | None:
        if tokens > self.tokens.free or deepstack > self.deepstack.free:
            return None
        return Grant(self.tokens.allocate(owner, tokens) or (), self.deepstack.allocate(owner, deepstack) or ())

    def _serve(self) -> None:
        while self._queue:
            future, take = self._queue[0]
            if not future.done():
                grant = take()
                if grant is None:
                    return
                future.set_result(grant)
            self._queue.popleft()
