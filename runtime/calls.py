"""One call of the decoder graph: the tokens that go in, and the memory they and the logits lie in."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from deepstitch.manifest import ModelFacts
from deepstitch.runtime.engine import GraphRunner
from deepstitch.runtime.engine.memory import HOST, Memory, RowPieces, Tensor
from deepstitch.runtime.kvcache import KVCache

__all__ = ["Floats", "Ints", "RowTokens", "Rows", "StepCall"]

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


class Rows(Protocol):
    """``(n, H)`` float32 that need not exist before they are asked for; an array is one."""

    def __len__(self) -> int: ...

    def __getitem__(self, span: slice, /) -> Floats | RowPieces:
        """Rows of a range with step 1; in pieces where some lie on a device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowTokens:
    """New tokens of one row, ready for the decoder.

    Attributes:
        embeds: ``(n, H)`` float32, visual embeddings in place; a long prompt's are made as its parts are taken.
        position_ids: ``(3, n)`` int64, axes t, h, w.
        deepstack: ``(T, num_deepstack*H)`` float32, on the host or a device; ``T`` may be 0.
        deepstack_index: ``(n,)`` int32; 0 for text, ``r + 1`` for a token that adds row ``r``.
    """

    embeds: Rows
    position_ids: Ints
    deepstack: Floats | RowPieces
    deepstack_index: npt.NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.embeds)

    def part(self, start: int, stop: int) -> RowTokens:
        """Tokens ``start..stop-1`` with only the DeepStack rows they use."""
        index = self.deepstack_index[start:stop]
        used, compact = np.unique(np.append(index, 0), return_inverse=True)  # 0 first: the zero row
        return RowTokens(
            embeds=self.embeds[start:stop],
            position_ids=self.position_ids[:, start:stop],
            deepstack=self.deepstack[used[1:] - 1],
            deepstack_index=compact[:-1].astype(np.int32),
        )


class StepCall:
    """Input and logits memory for one call shape, bound to a range of cache rows; runs any number of times.

    Attributes:
        inputs_embeds: ``(B, width, H)`` float32, zero beyond a row's tokens; on the host in a call that is repeated,
            else where the graph runs.
        position_ids: ``(3, B, width)`` int64.
        query_lengths: ``(B,)`` int32, all ``width`` until :meth:`fill` says otherwise. Until then, where ``wanted``
            equals ``width``, the logits are those of every token in order, else those of the first.
        logits: ``(B, wanted, vocab)`` float32, overwritten by each run.
        version: the cache's version these bindings belong to.
    """

    def __init__(
        self,
        graph: GraphRunner,
        model: ModelFacts,
        cache: KVCache,
        rows: range,
        *,
        width: int,
        wanted: int,
        visual: int = 0,
        repeated: bool = False,
        memory: Memory = HOST,
    ) -> None:
        """Allocate and bind.

        Args:
            graph: the decoder.
            model: sizes.
            cache: the cache whose ``rows`` the call extends.
            rows: a range of cache rows.
            width: new tokens per row, padding included.
            wanted: logit rows per row.
            visual: DeepStack rows, without the zero row.
            repeated: :meth:`write` gives it text tokens before each run; else :meth:`fill` any tokens, once.
            memory: of the engine.
        """
        batch = len(rows)
        self._memory = memory
        self._cache = cache
        self._rows = rows
        self.version = cache.version
        embeds_shape = (batch, width, model.hidden_size)
        self.inputs_embeds: Tensor = (np.zeros if repeated else memory.zeros)(embeds_shape, np.float32)
        self.position_ids = np.zeros((3, batch, width), np.int64)
        self.query_lengths = np.full(batch, width, np.int32)
        self.logits = memory.staging((batch, wanted, model.vocab_size), np.float32)
        self._past_lengths = np.zeros(batch, np.int32)
        self._logit_index = np.zeros((batch, wanted), np.int64)
        if wanted == width:
            self._logit_index[:] = np.arange(width)
        self._deepstack_embeds = memory.zeros((1 + visual, model.num_deepstack * model.hidden_size), np.float32)
        self._deepstack_index = np.zeros((batch, width), np.int32)
        inputs = self._inputs(with_deepstack=model.num_deepstack > 0)
        self._runs = tuple(
            graph.bind({**inputs, **past}, {"logits": self.logits, **present}) for past, present in cache.bindings(rows)
        )

    def write(self, embeds: Floats, position_ids: Ints) -> None:
        """Write the text tokens of a call that is repeated.

        Args:
            embeds: ``B * width`` rows of ``H``.
            position_ids: ``B * width``; text has the same position on all three axes.
        """
        assert isinstance(self.inputs_embeds, np.ndarray)
        self.inputs_embeds[...] = embeds.reshape(self.inputs_embeds.shape)
        self.position_ids[...] = position_ids.reshape(self.position_ids.shape[1:])

    def fill(self, parts: Sequence[RowTokens]) -> None:
        """Write tokens, padding them on the right."""
        next_visual = 1
        for row, part in enumerate(parts):
            count, visual = len(part), len(part.deepstack)
            self.query_lengths[row] = count
            self._memory.write(self.inputs_embeds[row][:count], part.embeds[:])
            self.position_ids[:, row, :count] = part.position_ids
            self._memory.write(self._deepstack_embeds[next_visual : next_visual + visual], part.deepstack)
            index = part.deepstack_index
            self._deepstack_index[row, :count] = np.where(index > 0, index + next_visual - 1, 0)
            next_visual += visual

    def pick(self, wanted: Sequence[Ints]) -> None:
        """Write the positions whose logits are wanted, by row."""
        for row, positions in enumerate(wanted):
            self._logit_index[row, : len(positions)] = positions

    def run(self, past_lengths: npt.NDArray[np.int32]) -> float:
        """Run over rows that hold ``past_lengths`` tokens each; the caller advances its own lengths.

        Returns:
            Seconds inside the engine.
        """
        self._past_lengths[:] = past_lengths
        run = self._runs[self._cache.current]
        began = time.perf_counter()
        run()
        seconds = time.perf_counter() - began
        self._cache.commit(self._rows, self._past_lengths, self.inputs_embeds.shape[1])
        return seconds

    def _inputs(self, *, with_deepstack: bool) -> dict[str, Tensor]:
        inputs: dict[str, Tensor] = {
            "inputs_embeds": self.inputs_embeds,
            "position_ids": self.position_ids,
            "past_lengths": self._past_lengths,
            "query_lengths": self.query_lengths,
            "logit_index": self._logit_index,
        }
        if with_deepstack:
            inputs["deepstack_embeds"] = self._deepstack_embeds
            inputs["deepstack_index"] = self._deepstack_index
        return inputs
