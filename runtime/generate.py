"""The step loop: encode, prefill, then decode and sample until every row has finished."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from deepstitch.errors import InputError
from deepstitch.runtime.answer import Answer, Piece
from deepstitch.runtime.calls import Floats, RowTokens
from deepstitch.runtime.decode import DecoderState
from deepstitch.runtime.embedding import item_spans, merge
from deepstitch.runtime.engine import Engine
from deepstitch.runtime.kvcache import CachedTokens
from deepstitch.runtime.parts import ModelParts
from deepstitch.runtime.preprocess import Prompt, VisionBatch
from deepstitch.runtime.results import Result, Timings
from deepstitch.runtime.sampling import GenerationOptions
from deepstitch.runtime.speculative import Drafter

__all__ = ["Generation"]

# Answer tokens to make room for at once; longer answers double the cache. In place, room costs nothing until used;
# elsewhere the graph copies all of it in every step.
_FIRST_RESERVE, _FIRST_RESERVE_IN_PLACE = 256, 4096


class Generation:
    """A batch of answers being written; iterate to write them.

    Attributes:
        state: KV cache and lengths; outlives the generation where the caller passed it in.
        timings: seconds per stage so far.
    """

    def __init__(
        self,
        parts: ModelParts,
        prompts: Sequence[Prompt],
        options: GenerationOptions,
        *,
        state: DecoderState | None = None,
        start: int = 0,
        inputs: Sequence[RowTokens] | None = None,
    ) -> None:
        """Check the prompts against the context and make room for them.

        Args:
            parts: the model.
            prompts: one per row.
            options: shared by all rows.
            state: a cache that holds the first ``start`` tokens of the single prompt.
            start: see ``state``.
            inputs: what the prompts look like to the decoder, where another process has worked that out.

        Raises:
            InputError: a prompt is empty, or it and ``max_tokens`` exceed the context.
        """
        self._parts = parts
        self._options = options
        self._start = start
        self._inputs = inputs
        self.timings = Timings()
        self._engine_before = 0.0
        model = parts.engine.bundle.manifest.model
        for prompt in prompts:
            _check_context(len(prompt.input_ids), options.max_tokens, parts.engine)
        self._rows = [Answer(index, parts, prompt, options) for index, prompt in enumerate(prompts)]
        self._running = list(self._rows)
        self._rope_deltas = np.array([prompt.rope_delta for prompt in prompts], np.int64)
        longest = max(len(prompt.input_ids) for prompt in prompts)
        room = _FIRST_RESERVE_IN_PLACE if model.kv_cache_in_place else _FIRST_RESERVE
        capacity = longest + min(options.max_tokens, room)
        self._drafter = _drafter(parts, prompts, options)
        self.state = state or DecoderState(parts.engine, rows=len(prompts), capacity=capacity)
        self.state.truncate(0, start if state else 0)
        self.state.reserve(capacity)

    def __iter__(self) -> Iterator[Piece]:
        """Write until every row has finished."""
        return (piece for piece in self.turns() if piece is not None)

    def turns(self) -> Iterator[Piece | None]:
        """As iterating, with None between two chunks of the prompt: for who shares the decoder with others."""
        inputs = self._embed_prompts() if self._inputs is None else self._inputs
        self._inputs = None  # as large as the prompt; not needed once it is in the cache
        yield from self._prefill(inputs)
        del inputs
        while self._running:
            yield from self._step() if self._drafter is None else self._speculate(self._drafter)

    def interrupt(self) -> None:
        """End every unfinished row where it is."""
        for row in self._running:
            row.interrupt()
        self._running = []

    def result(self, row: int = 0) -> Result:
        """The answer of a finished row; ``load`` and ``preprocess`` seconds are the caller's to fill in."""
        result = self._rows[row].result(self.timings, cached_tokens=self._start)
        if self._drafter is None:
            return result
        return replace(result, drafted_tokens=self._drafter.drafted, accepted_tokens=self._drafter.accepted)

    def cached_tokens(self) -> CachedTokens:
        """What the cache holds for the single row: the prompt, and the answer as far as it was fed back."""
        row, count = self._rows[0], int(self.state.lengths[0])
        prompt = row.prompt
        written = np.array(row.token_ids, np.int64)
        positions = len(prompt.input_ids) + prompt.rope_delta + np.arange(len(written))
        return CachedTokens(
            input_ids=np.concatenate([prompt.input_ids, written])[:count],
            position_ids=np.concatenate([prompt.position_ids, np.tile(positions, (3, 1))], axis=1)[:, :count],
            item_starts=item_spans(prompt, self._parts.visual_ids)[0],
            item_keys=prompt.vision.content_keys if prompt.vision else (),
        )

    def _embed_prompts(self) -> list[RowTokens]:
        """Run the vision encoder for what is new, and put its rows among the token embeddings."""
        began = time.perf_counter()
        visual_ids = self._parts.visual_ids
        prompts = [row.prompt for row in self._rows]
        features = self._parts.encoder.features([_items_from(prompt, self._start, visual_ids) for prompt in prompts])
        model = self._parts.engine.bundle.manifest.model
        self.timings.encode = time.perf_counter() - began
        return [
            merge(
                self._parts.table,
                prompt,
                rows,
                visual_ids=visual_ids,
                deepstack_width=model.num_deepstack * model.hidden_size,
                start=self._start,
            )
            for prompt, rows in zip(prompts, features, strict=True)
        ]

    def _prefill(self, inputs: Sequence[RowTokens]) -> Iterator[Piece | None]:
        """Run the prompts and choose the first token of each answer."""
        began = time.perf_counter()
        chunks = self.state.prefill_by_chunks(inputs, chunk=self._options.prefill_chunk or None)
        while True:
            try:
                next(chunks)
            except StopIteration as end:
                logits: list[Floats] = end.value
                break
            self.timings.prefill += time.perf_counter() - began
            yield None
            if not self._running:  # ended from outside
                return
            began = time.perf_counter()
        pieces = self._accept([each[0] for each in logits])
        if self._drafter is not None:
            self._drafter.push(pieces[0].token_id)
        self._engine_before = self.state.engine_seconds
        self.timings.prefill += time.perf_counter() - began
        yield from pieces

    def _step(self) -> list[Piece]:
        """Feed the last token of every row and choose the next."""
        began = time.perf_counter()
        embeds = self._parts.table(np.array([row.token_ids[-1] for row in self._running]))
        logits = self.state.step(embeds, self.state.lengths + self._rope_deltas)
        running = self._running
        pieces = self._accept(logits)
        self._clock(running, began)
        return pieces

    def _speculate(self, drafter: Drafter) -> Iterator[Piece]:
        """Feed the last token and guesses of the next; choose tokens until one differs from its guess.

        A token is chosen when its piece is asked for, so an answer interrupted here is the same as without guesses.
        """
        began = time.perf_counter()
        (row,) = running = self._running
        fed = [row.token_ids[-1], *drafter.draft(row.remaining - 1)]
        place = int(self.state.lengths[0] + self._rope_deltas[0])
        spent = self.state.engine_seconds
        logits = self.state.propose(self._parts.table(np.array(fed)), np.arange(place, place + len(fed)))
        drafter.costs.observe(len(fed), self.state.engine_seconds - spent)
        for guess, values in zip([*fed[1:], None], logits, strict=True):
            (piece,) = self._accept([values])
            self.state.keep(1)
            drafter.push(piece.token_id)
            right = piece.token_id == guess
            drafter.accepted += right
            self._clock(running, began)
            yield piece
            if not right or not self._running:  # also when it was ended from outside
                return
            began = time.perf_counter()

    def _clock(self, rows: Sequence[Answer], began: float) -> None:
        """Count the time since ``began`` as decoding."""
        self.timings.decode += time.perf_counter() - began
        for row in rows:
            row.decode_seconds = self.timings.decode
            row.engine_seconds = self.state.engine_seconds - self._engine_before

    def _accept(self, logits: Sequence[Floats] | Floats) -> list[Piece]:
        running = self._running
        pieces = [row.accept(values) for row, values in zip(running, logits, strict=True)]
        if any(row.finish_reason for row in running):
            self._retire()
        return pieces

    def _retire(self) -> None:
        """Take finished rows out of the batch; the cache of the last ones stays, for a next turn."""
        if all(row.finish_reason for row in self._running):
            self._running = []
            return
        running = list(self._running)
        for slot in reversed(range(len(running))):
            if running[slot].finish_reason:
                self.state.drop(slot)  # the last row moves here, so it does in this list
                running[slot] = running[-1]
                running.pop()
        self._running = running
        self._rope_deltas = np.array([row.prompt.rope_delta for row in running], np.int64)


def _items_from(prompt: Prompt, start: int, visual_ids: Sequence[int]) -> VisionBatch | None:
    """The images and clips of a prompt that begin at or after token ``start``."""
    if prompt.vision is None or start == 0:
        return prompt.vision
    wanted = np.flatnonzero(item_spans(prompt, visual_ids)[0] >= start).tolist()
    return prompt.vision.take(wanted) if wanted else None


def _drafter(parts: ModelParts, prompts: Sequence[Prompt], options: GenerationOptions) -> Drafter | None:
    """Guesses for a single row; several rows share each call already, and most kernels take one guess at a time."""
    if options.speculate == 0 or len(prompts) > 1:
        return None
    most = parts.engine.limits.logits
    if most is not None and options.speculate >= most:
        raise InputError(
            f"speculate {options.speculate}: the engines give the logits of {most} tokens of a row in one call; use "
            "less, or build them again with a larger --logits"
        )
    return Drafter(
        prompts[0].input_ids.tolist(), longest=options.speculate, ngram=options.speculate_ngram, costs=parts.costs
    )


def _check_context(prompt_tokens: int, max_tokens: int, engine: Engine) -> None:
    limits = engine.limits
    limit = limits.context or engine.bundle.manifest.model.max_position_embeddings
    whose = "the model's context is" if limits.context is None else "the engines take"
    remedy = f", or {limits.remedy}" if limits.remedy else ""
    if prompt_tokens == 0:
        raise InputError("the prompt is empty; pass some text")
    if prompt_tokens >= limit:
        raise InputError(
            f"the prompt has {prompt_tokens} tokens, {whose} {limit}; "
            f"shorten the text, or pass fewer or smaller images{remedy}"
        )
    if prompt_tokens + max_tokens > limit:
        raise InputError(
            f"{prompt_tokens} prompt tokens and max_tokens {max_tokens} exceed what there is: {whose} "
            f"{limit}; use at most max_tokens {limit - prompt_tokens}{remedy}"
        )
