"""One answer being written: its tokens, its text, and whether it has ended."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from deepstitch.runtime.calls import Floats
from deepstitch.runtime.parts import ModelParts
from deepstitch.runtime.preprocess import Prompt
from deepstitch.runtime.results import FinishReason, Result, Timings, TokenLogprob
from deepstitch.runtime.sampling import GenerationOptions, Sampler, log_probabilities
from deepstitch.runtime.stop_strings import StopStrings

__all__ = ["Answer", "Piece"]


@dataclass(frozen=True, slots=True)
class Piece:
    """What one token added to one row; ``text`` may be empty."""

    row: int
    token_id: int
    text: str


class Answer:
    """One row of a batch.

    Attributes:
        prompt: what it answers.
        token_ids: chosen so far.
        finish_reason: ``None`` while it runs.
        decode_seconds: time spent on its tokens after the first.
        engine_seconds: the part of it spent inside the engine.
    """

    def __init__(self, row: int, parts: ModelParts, prompt: Prompt, options: GenerationOptions) -> None:
        model = parts.engine.bundle.manifest.model
        self.prompt = prompt
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.decode_seconds = 0.0
        self.engine_seconds = 0.0
        self._row = row
        self._options = options
        self._eos = () if options.ignore_eos else model.eos_token_ids
        self._sampler = Sampler(options, prompt.input_ids, model.vocab_size)
        self._tokenizer = parts.processor.tokenizer
        self._decoder = parts.processor.decode_stream()
        self._stop = StopStrings(options.stop)
        self._texts: list[str] = []
        self._logprobs: list[TokenLogprob] = []

    @property
    def remaining(self) -> int:
        """Tokens it may still have."""
        return self._options.max_tokens - len(self.token_ids)

    def accept(self, logits: Floats) -> Piece:
        """Choose a token from ``(vocab,)`` logits and decide whether it was the last."""
        token = self._sampler(logits)
        self.token_ids.append(token)
        if self._options.num_top_logprobs is not None:
            self._logprobs.append(self._report(token, logits, self._options.num_top_logprobs))
        text = ""
        if token in self._eos:
            self.finish_reason = "stop"
        else:
            text = self._stop.push(self._decoder.push(token))
            if self._stop.matched:
                self.finish_reason = "stop"
            elif len(self.token_ids) >= self._options.max_tokens:
                self.finish_reason = "length"
        if self.finish_reason:
            text += self._held_back()
        self._texts.append(text)
        return Piece(self._row, token, text)

    def interrupt(self) -> None:
        """End here; text held back for a stop string that did not come is part of the answer."""
        self.finish_reason = "interrupted"
        self._texts.append(self._held_back())

    def result(self, timings: Timings, *, cached_tokens: int) -> Result:
        """The finished answer."""
        vision = self.prompt.vision
        return Result(
            text="".join(self._texts),
            token_ids=tuple(self.token_ids),
            prompt_tokens=len(self.prompt.input_ids),
            cached_tokens=cached_tokens,
            visual_tokens=int(vision.tokens_per_item.sum()) if vision else 0,
            finish_reason=self.finish_reason or "interrupted",
            timings=asdict(replace(timings, decode=self.decode_seconds, engine=self.engine_seconds)),
            logprobs=None if self._options.num_top_logprobs is None else tuple(self._logprobs),
        )

    def _held_back(self) -> str:
        """What decoder and stop strings still hold."""
        if self._stop.matched:
            return ""
        return self._stop.push(self._decoder.flush()) + self._stop.flush()

    def _report(self, token: int, logits: Floats, count: int) -> TokenLogprob:
        values = log_probabilities(logits)
        best = (-values).argsort(kind="stable")[:count].tolist() if count else []
        return TokenLogprob(
            token_id=token,
            text=self._text_of(token),
            logprob=float(values[token]),
            top=tuple((each, self._text_of(each), float(values[each])) for each in best),
        )

    def _text_of(self, token: int) -> str:
        return self._tokenizer.decode([token], skip_special_tokens=False)
