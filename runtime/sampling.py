"""How the next token is chosen from logits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
import numpy.typing as npt

from deepstitch.errors import DeepstitchError, InputError, did_you_mean

__all__ = ["GenerationOptions", "Sampler", "log_probabilities"]

MAX_DRAFT = 64
MAX_NGRAM = 8
PREFILL_CHUNK = 512
_SHORT_LIST = 1024
_OPTIONAL = ("seed",)
_Check = tuple[str, type[Integral] | type[Real], Callable[[Any], bool], str]
_RANGES: tuple[_Check, ...] = (
    ("max_tokens", Integral, lambda value: value >= 1, "whole number, 1 or more"),
    ("temperature", Real, lambda value: value >= 0, "number, 0 or more (0 is greedy)"),
    ("top_k", Integral, lambda value: value >= 0, "whole number, 0 or more (0 is off)"),
    ("top_p", Real, lambda value: 0 < value <= 1, "number above 0 and at most 1 (1 is off)"),
    ("min_p", Real, lambda value: 0 <= value < 1, "number, at least 0 and below 1 (0 is off)"),
    ("repetition_penalty", Real, lambda value: value > 0, "number above 0 (1 is off)"),
    ("seed", Integral, lambda value: value >= 0, "whole number, 0 or more"),
    ("logprobs", Integral, lambda value: value >= 0, "whole number, 0 or more, or True"),
    ("prefill_chunk", Integral, lambda value: value >= 0, "whole number, 0 or more (0 takes all tokens at once)"),
    ("speculate", Integral, lambda value: 0 <= value <= MAX_DRAFT, f"whole number from 0 (off) to {MAX_DRAFT}"),
    ("speculate_ngram", Integral, lambda value: 1 <= value <= MAX_NGRAM, f"whole number from 1 to {MAX_NGRAM}"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationOptions:
    """Everything that decides how an answer is written.

    Attributes:
        max_tokens: most tokens to write.
        temperature: 0 takes the most probable token; higher values flatten the distribution.
        top_k: keep the k most probable tokens; 0 keeps all.
        top_p: keep the fewest, most probable tokens whose probabilities sum to at least this; 1 keeps all.
        min_p: drop tokens less probable than this fraction of the most probable one; 0 drops none.
        repetition_penalty: divide positive and multiply negative logits of tokens seen before; 1 is off.
        seed: makes sampling repeatable; each row of a batch draws the numbers a run of its own would draw.
        stop: strings that end the answer; neither they nor what follows is part of the text.
        logprobs: ``True`` reports the log probability of each chosen token, a number n also those of the n
            most probable ones. They are the model's own: before penalty, temperature and filters.
        prefill_chunk: at most this many prompt tokens per decoder call, which bounds the memory of a long prompt;
            0 takes all at once.
        speculate: most tokens to guess per decoder call from what prompt and answer said before; 0 is off. Text
            that repeats itself comes faster, and the answer is the same: no token is kept that would not have been
            chosen. Like chunks and batches, calls of several tokens round differently in the last bits, which can
            turn a near tie where kernels quantize activations (integer weights). Batches go without.
        speculate_ngram: look for an earlier place that ends in the same tokens, at most this many.
        ignore_eos: write until ``max_tokens``; for measurements.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: bool | int = False
    prefill_chunk: int = PREFILL_CHUNK
    speculate: int = 0
    speculate_ngram: int = 3
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        """Check every field; raises InputError."""
        for name, kind, valid, words in _RANGES:
            value: Any = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            if not isinstance(value, kind) or not math.isfinite(value) or not valid(value):
                raise InputError(f"{name}={value!r}: use a {words}")
        if isinstance(self.stop, str) or not all(isinstance(each, str) and each for each in self.stop):
            raise InputError(f"stop={self.stop!r}: use a list of strings that are not empty")

    @classmethod
    def from_keywords(cls, keywords: Mapping[str, Any]) -> GenerationOptions:
        """Build from keyword arguments; one stop string may come bare.

        Raises:
            InputError: unknown name or bad value.
        """
        known = [each.name for each in dataclasses.fields(cls)]
        for name in keywords:
            if name not in known:
                raise InputError(f"unknown option '{name}'{did_you_mean(name, known)}; there are {', '.join(known)}")
        values = dict(keywords)
        if "stop" in values:
            stop = values["stop"]
            values["stop"] = (stop,) if isinstance(stop, str) else tuple(stop or ())
        return cls(**values)

    @property
    def num_top_logprobs(self) -> int | None:
        """How many alternatives to report per token; ``None`` reports nothing."""
        if isinstance(self.logprobs, bool):
            return 0 if self.logprobs else None
        return self.logprobs


class Sampler:
    """Chooses the tokens of one row."""

    def __init__(self, options: GenerationOptions, prompt_ids: npt.NDArray[np.int64], vocab_size: int) -> None:
        self._options = options
        self._random = np.random.default_rng(options.seed)
        self._penalised = options.repetition_penalty != 1
        self._seen = np.zeros(vocab_size if self._penalised else 0, bool)
        if self._penalised:
            self._seen[prompt_ids] = True

    def __call__(self, logits: npt.NDArray[np.float32]) -> int:
        """Choose from ``(vocab,)`` logits and remember the choice.

        Raises:
            DeepstitchError: the logits are not numbers.
        """
        if self._penalised:
            logits = self._penalise(logits)
        token = int(logits.argmax())  # argmax gives the first NaN, if there is one
        if not math.isfinite(logits[token]):
            raise DeepstitchError(
                f"the decoder gave logit {logits[token]} for token {token}; check the weights of the bundle"
            )
        if self._options.temperature > 0:
            token = self._draw(logits)
        if self._penalised:
            self._seen[token] = True
        return token

    def _penalise(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        penalty = np.float32(self._options.repetition_penalty)
        logits = logits.copy()
        seen = logits[self._seen]
        logits[self._seen] = np.where(seen < 0, seen * penalty, seen / penalty)
        return logits

    def _draw(self, logits: npt.NDArray[np.float32]) -> int:
        """Temperature, then top-k, top-p and min-p, each on what the one before left; one random number."""
        options = self._options
        weights = logits.astype(np.float64) - logits.max()
        weights = np.exp(weights / options.temperature)
        ids = np.arange(len(weights))
        if 0 < options.top_k < len(weights):
            ids = np.argpartition(-weights, options.top_k - 1)[: options.top_k]
        if options.top_p < 1:
            ids = _nucleus(weights, ids, options.top_p)
        if options.min_p > 0:
            ids = ids[weights[ids] >= options.min_p * weights[ids].max()]
        cumulative = np.cumsum(weights[ids])
        place = np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right")
        return int(ids[min(int(place), len(ids) - 1)])


def _nucleus(weights: npt.NDArray[np.float64], ids: npt.NDArray[np.intp], top_p: float) -> npt.NDArray[np.intp]:
    """The fewest of ``ids``, heaviest first, that hold at least the share ``top_p`` of their weight."""
    needed = top_p * weights[ids].sum()
    # the nucleus is nearly always small: sort a short list first, everything only if that was not enough
    for size in (_SHORT_LIST, len(ids)):
        chosen = ids if size >= len(ids) else ids[np.argpartition(-weights[ids], size - 1)[:size]]
        chosen = chosen[np.argsort(-weights[chosen], kind="stable")]
        cumulative = np.cumsum(weights[chosen])
        if cumulative[-1] >= needed or len(chosen) == len(ids):
            break
    return chosen[: int(np.searchsorted(cumulative, needed)) + 1]


def log_probabilities(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Log-softmax of ``(vocab,)`` logits."""
    shifted = logits.astype(np.float64) - logits.max()
    return shifted - np.log(np.exp(shifted).sum())
