"""What a run hands back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["FinishReason", "Result", "Timings", "TokenLogprob"]

FinishReason = Literal["stop", "length", "interrupted"]


@dataclass(slots=True, kw_only=True)
class Timings:
    """Seconds per stage. Rows of one batch share their stages; ``decode`` ends with the row's own last token.

    Attributes:
        load: opening the bundle and its graphs; once per pipeline.
        preprocess: images, chat template, tokenizer.
        encode: vision encoder, for what its cache did not hold.
        prefill: from embeddings to the logits of the first token.
        decode: all further tokens, sampling and detokenizing included.
        engine: the part of ``decode`` spent inside the engine.
    """

    load: float = 0.0
    preprocess: float = 0.0
    encode: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0
    engine: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """One token of the answer and how probable the model thought it.

    Attributes:
        token_id: the chosen token.
        text: its text by itself; a token may be a part of a character.
        logprob: natural logarithm of its probability.
        top: ``(token_id, text, logprob)`` of the most probable tokens, best first.
    """

    token_id: int
    text: str
    logprob: float
    top: tuple[tuple[int, str, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One answer.

    Attributes:
        text: without special tokens, cut before a stop string.
        token_ids: every token the model wrote, its end-of-sequence token and a cut-off stop string included.
        prompt_tokens: length of the prompt, visual tokens included.
        cached_tokens: how many of them were in the KV cache from an earlier turn.
        visual_tokens: how many of them stand for images and videos.
        finish_reason: ``stop`` (end of sequence or stop string), ``length`` (max_tokens) or ``interrupted``.
        timings: seconds per stage.
        drafted_tokens: guesses of speculative decoding that the decoder checked.
        accepted_tokens: how many of them were right.
        logprobs: one entry per token, where asked for.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    cached_tokens: int
    visual_tokens: int
    finish_reason: FinishReason
    timings: dict[str, float]
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    logprobs: tuple[TokenLogprob, ...] | None = field(default=None, repr=False)

    @property
    def generated_tokens(self) -> int:
        """Tokens the model wrote."""
        return len(self.token_ids)

    @property
    def prompt_tps(self) -> float:
        """Prompt tokens computed per second of prefill."""
        return _rate(self.prompt_tokens - self.cached_tokens, self.timings["prefill"])

    @property
    def generation_tps(self) -> float:
        """Tokens per second of decode; the first token belongs to the prefill."""
        return _rate(self.generated_tokens - 1, self.timings["decode"])

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON types."""
        values: dict[str, Any] = {
            "text": self.text,
            "token_ids": list(self.token_ids),
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "visual_tokens": self.visual_tokens,
            "generated_tokens": self.generated_tokens,
            "drafted_tokens": self.drafted_tokens,
            "accepted_tokens": self.accepted_tokens,
            "finish_reason": self.finish_reason,
            "timings": dict(self.timings),
            "prompt_tps": self.prompt_tps,
            "generation_tps": self.generation_tps,
        }
        if self.logprobs is not None:
            values["logprobs"] = [_logprob_dict(each) for each in self.logprobs]
        return values

    def __str__(self) -> str:
        return self.text


def _rate(count: int, seconds: float) -> float:
    return count / seconds if count > 0 and seconds > 0 else 0.0


def _logprob_dict(entry: TokenLogprob) -> dict[str, Any]:
    top = [{"token_id": token, "text": text, "logprob": value} for token, text, value in entry.top]
    return {"token_id": entry.token_id, "text": entry.text, "logprob": entry.logprob, "top": top}
