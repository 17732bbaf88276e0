"""The decoder graph over a KV cache: prefill of whole rows, steps of one token per row, and guesses to check.

Everything that depends on a kernel's limits is decided here: whether several rows may share one call, and how
a long prompt is cut into chunks.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence

import numpy as np

from deepstitch.errors import InputError
from deepstitch.runtime.bundle import DECODER
from deepstitch.runtime.calls import Floats, Ints, RowTokens, StepCall
from deepstitch.runtime.engine import Engine
from deepstitch.runtime.kvcache import KVCache, cache_tensors

__all__ = ["DecoderState", "RowTokens"]


class DecoderState:
    """A batch of sequences in flight: their KV cache and lengths.

    Attributes:
        lengths: ``(B,)`` int32, valid tokens in the cache per row.
        engine_seconds: time spent inside the engine so far.
    """

    def __init__(self, engine: Engine, *, rows: int = 1, capacity: int = 256) -> None:
        """Allocate the cache.

        Args:
            engine: where the decoder graph runs.
            rows: sequences.
            capacity: tokens per row to make room for; more are taken when needed.
        """
        manifest = engine.bundle.manifest
        self._graph = engine.decoder
        self._memory = engine.memory
        self._limits = engine.limits
        self._model = manifest.model
        self._cache = KVCache(
            cache_tensors(engine.bundle.graph(DECODER)),
            rows=rows,
            capacity=self._limits.context or min(capacity, manifest.model.max_position_embeddings),
            in_place=manifest.model.kv_cache_in_place,
            memory=self._memory,
            limit=self._limits.context,
        )
        self.lengths = np.zeros(rows, np.int32)
        self.engine_seconds = 0.0
        self._steps: dict[int, StepCall] = {}  # by width
        self._steps_version = self._cache.version

    @property
    def rows(self) -> int:
        """Sequences held."""
        return self._cache.rows

    @property
    def cache_bytes(self) -> int:
        """Bytes reserved for keys and values."""
        return self._cache.nbytes

    def reserve(self, capacity: int) -> None:
        """Make room for ``capacity`` tokens per row, so that the cache does not have to grow on the way."""
        if capacity > self._cache.capacity:
            self._steps.clear()  # they hold on to the memory the cache leaves
            self._cache.reserve(capacity, self.lengths)

    def truncate(self, row: int, length: int) -> None:
        """Forget the tokens of ``row`` from ``length`` on."""
        self.lengths[row] = min(length, int(self.lengths[row]))

    def drop(self, row: int) -> None:
        """Remove a finished row; the last row takes its number."""
        self._cache.drop(row, self.lengths)
        self.lengths[row] = self.lengths[-1]
        self.lengths = self.lengths[:-1].copy()

    def prefill(
        self,
        rows: Sequence[RowTokens],
        *,
        wanted: Sequence[Sequence[int] | Ints] | None = None,
        chunk: int | None = None,
    ) -> list[Floats]:
        """Append tokens to every row and return logits.

        Args:
            rows: what to append, one entry per row; at least one token each.
            wanted: per row, positions among its new tokens whose logits are wanted; ``None``: the last one.
            chunk: at most this many tokens of a row per call; ``None`` takes as many as the engine does.

        Returns:
            Per row ``(len(wanted), vocab)`` float32, owned by the caller.

        Raises:
            InputError: a row would outgrow the model's context.
        """
        turns = self.prefill_by_chunks(rows, wanted=wanted, chunk=chunk)
        while True:
            try:
                next(turns)
            except StopIteration as end:
                logits: list[Floats] = end.value
                return logits

    def prefill_by_chunks(
        self,
        rows: Sequence[RowTokens],
        *,
        wanted: Sequence[Sequence[int] | Ints] | None = None,
        chunk: int | None = None,
    ) -> Generator[None, None, list[Floats]]:
        """As :meth:`prefill`, pausing between two chunks, so that others can use the engine; returns the logits."""
        self._check_room(rows)
        asked = [np.asarray(each, np.int64) for each in wanted or [[len(row) - 1] for row in rows]]
        results = [np.empty((len(each), self._model.vocab_size), np.float32) for each in asked]
        longest = max(map(len, rows))
        size = min(chunk or longest, self._limits.chunk or longest)
        for start in range(0, longest, size):
            if start:
                yield
            widths = [min(max(len(row) - start, 0), size) for row in rows]
            for group in self._groups(widths):
                parts = [rows[row].part(start, start + widths[row]) for row in group]
                inside = [(asked[row] >= start) & (asked[row] < start + size) for row in group]
                picks = [asked[row][mask] - start for row, mask in zip(group, inside, strict=True)]
                logits = self._extend(group, parts, picks)
                for row, mask, values in zip(group, inside, logits, strict=True):
                    results[row][mask] = values
        return results

    def step(self, embeds: Floats, position_ids: Ints) -> Floats:
        """Append one text token to every row.

        Args:
            embeds: ``(B, H)`` float32.
            position_ids: ``(B,)`` int64; text has the same position on all three axes.

        Returns:
            ``(B, vocab)`` logits: a view that the next step overwrites.
        """
        call = self._step_call(1)
        call.write(embeds, position_ids)
        self.engine_seconds += call.run(self.lengths)
        self.lengths += 1
        return call.logits[:, 0]

    def propose(self, embeds: Floats, position_ids: Ints) -> Floats:
        """Try text tokens after those of the only row; :meth:`keep` makes the right ones part of it.

        Args:
            embeds: ``(n, H)`` float32.
            position_ids: ``(n,)`` int64.

        Returns:
            ``(n, vocab)`` logits, one row per token: a view that the next call overwrites.
        """
        call = self._step_call(len(embeds))
        call.write(embeds, position_ids)
        self.engine_seconds += call.run(self.lengths)
        return call.logits[0]

    def keep(self, count: int) -> None:
        """Append the next ``count`` of the tokens proposed last; what is not kept is overwritten later."""
        self.lengths += count

    def _step_call(self, width: int) -> StepCall:
        """The call that adds ``width`` tokens to every row; made once as long as the cache stays where it is."""
        self.reserve(max(self.lengths.tolist()) + width)  # faster than numpy's max for a handful of rows
        if self._steps_version != self._cache.version:
            self._steps.clear()  # they hold on to the memory of an earlier cache
            self._steps_version = self._cache.version
        if width not in self._steps:
            rows = range(self.rows)
            self._steps[width] = StepCall(
                self._graph,
                self._model,
                self._cache,
                rows,
                width=width,
                wanted=width,
                repeated=True,
                memory=self._memory,
            )
        return self._steps[width]

    def _check_room(self, rows: Sequence[RowTokens]) -> None:
        limit = self._limits.context or self._model.max_position_embeddings
        for row, (length, new) in enumerate(zip(self.lengths, rows, strict=True)):
            if length + len(new) > limit:
                raise InputError(
                    f"row {row}: {length} tokens in the cache and {len(new)} new ones exceed the context of "
                    f"{limit}; shorten the prompt" + (f", or {self._limits.remedy}" if self._limits.remedy else "")
                )

    def _groups(self, widths: Sequence[int]) -> Iterator[range]:
        """Ranges of rows that may share a call; rows with nothing to add are left out."""
        rows = len(widths)
        together = self._model.batched_continuation or not self.lengths.any() or max(widths) == 1
        if together and min(widths) > 0:
            yield range(rows)
        else:
            yield from (range(row, row + 1) for row, width in enumerate(widths) if width)

    def _extend(self, rows: range, parts: Sequence[RowTokens], picks: Sequence[Ints]) -> list[Floats]:
        """Append ``parts`` to ``rows``; returns the logits at the positions ``picks`` of each.

        One call, unless the engine does not give as many logits: then the same tokens again for the others.
        """
        width = max(map(len, parts))
        most = max(1, *map(len, picks))
        wanted = min(most, self._limits.logits or most)
        starts = self.lengths[rows.start : rows.stop]
        self.reserve(int(starts.max()) + width)
        call = StepCall(
            self._graph,
            self._model,
            self._cache,
            rows,
            width=width,
            wanted=wanted,
            visual=sum(len(part.deepstack) for part in parts),
            memory=self._memory,
        )
        call.fill(parts)
        logits: list[list[Floats]] = [[] for _ in picks]
        for first in range(0, most, wanted):
            some = [pick[first : first + wanted] for pick in picks]
            call.pick(some)
            self.engine_seconds += call.run(starts)
            for row, pick in enumerate(some):
                values = call.logits[row, : len(pick)]
                logits[row].append(values if wanted == most else values.copy())
        starts += call.query_lengths  # a view: this advances self.lengths
        return [each[0] if len(each) == 1 else np.concatenate(each) for each in logits]
