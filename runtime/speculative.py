"""Prompt-lookup speculation: guess the next tokens from what the text said before, and let one decoder call check them.

A guess is the continuation of an earlier place that reads like the end of the text. The decoder takes the last token
and the guesses in one call; the guesses that equal what would have been written anyway are kept, so the answer is the
one without speculation. How many tokens are worth guessing is decided from what calls of each width cost, measured, and
from how often guesses of this kind came true, counted for every token whether it was guessed or not.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["Drafter", "StepCosts"]

_KEY_STEP = 1 << 24  # above any token id
_LONGEST_RUN = 8  # longer matches are as good as this one
_MEMORY = 0.95  # weight of an outcome after one more
_PRIOR_WEIGHT = 2.0  # outcomes the first estimate is worth
_COST_WEIGHT = 0.2  # of a new measurement
_OUTLIER = 3.0  # a call that took this many times as long was disturbed
_FIRST_SLOPE = 0.25  # cost of a further token, in calls of one token, before two widths have been measured
_REFRESH = 64  # calls of several tokens before the cost of one token is measured again


class StepCosts:
    """Seconds of a decoder call by the number of tokens it takes, learned while it runs."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}
        self._warm: set[int] = set()
        self._since_single = 0

    @property
    def single_is_due(self) -> bool:
        """The cost of a call of one token is unknown, or may have changed as the context grew."""
        return 1 not in self._warm or self._since_single >= _REFRESH

    def observe(self, width: int, seconds: float) -> None:
        """A call of ``width`` tokens took ``seconds``."""
        self._since_single = 0 if width == 1 else self._since_single + 1
        known = self._seconds.get(width)
        if known is None:
            self._seconds[width] = seconds
        elif width not in self._warm:  # the first call of a width also set up its memory
            self._warm.add(width)
            self._seconds[width] = seconds
        else:
            self._seconds[width] = known + _COST_WEIGHT * (min(seconds, _OUTLIER * known) - known)

    def estimate(self, width: int) -> float:
        """Seconds a call of ``width`` tokens will take: measured, or on the line through measured neighbours."""
        known = self._seconds
        if width in known:
            return known[width]
        below = max((each for each in known if each < width), default=None)
        above = min((each for each in known if each > width), default=None)
        if below is None:  # nothing to go by
            return 1.0 + _FIRST_SLOPE * (width - 1)
        first = min(known)
        if above is not None:
            slope = (known[above] - known[below]) / (above - below)
        elif below > first:
            slope = max(0.0, (known[below] - known[first]) / (below - first))
        else:
            slope = _FIRST_SLOPE * known[first] / first
        return known[below] + slope * (width - below)


class Drafter:
    """Guesses for one row.

    Attributes:
        drafted: tokens guessed so far.
        accepted: how many of them came true.
        costs: what decoder calls cost.
    """

    def __init__(self, prompt_ids: Sequence[int], *, longest: int, ngram: int, costs: StepCosts) -> None:
        """Index the prompt.

        Args:
            prompt_ids: its tokens.
            longest: most tokens to guess at once.
            ngram: an earlier place is looked for by at most this many last tokens, then by fewer.
            costs: what decoder calls cost; shared between rows of one engine.
        """
        self.drafted = 0
        self.accepted = 0
        self._longest = longest
        self.costs = costs
        self._ids: list[int] = []
        self._places: tuple[dict[int, int], ...] = tuple({} for _ in range(ngram))
        self._source = -1  # where the text may go on like, or -1
        self._run = 0  # how many tokens before it equal the last tokens
        self._hits = [0.0] * (_LONGEST_RUN + 1)  # by run
        self._trials = [0.0] * (_LONGEST_RUN + 1)
        for token in prompt_ids:
            self._append(int(token))

    def push(self, token: int) -> None:
        """The next token of the text; also settles whether the guess for it was right."""
        if self._source >= 0:
            run = min(self._run, _LONGEST_RUN)
            self._hits[run] = _MEMORY * self._hits[run] + (self._ids[self._source] == token)
            self._trials[run] = _MEMORY * self._trials[run] + 1
        self._append(token)

    def draft(self, limit: int) -> list[int]:
        """Tokens to try after the last one: as many, up to ``limit``, as promise the most tokens per second."""
        limit = min(limit, self._longest)
        if self._source < 0 or limit < 1 or self.costs.single_is_due:
            return []
        best, best_rate = 0, 1.0 / self.costs.estimate(1)
        expected = chance = 1.0
        for count in range(1, limit + 1):
            chance *= self._chance(self._run + count - 1)
            expected += chance
            rate = expected / self.costs.estimate(count + 1)
            if rate > best_rate:
                best, best_rate = count, rate
        self.drafted += best
        # a source closer than the draft is long is a loop: it goes on into the draft itself
        period = len(self._ids) - self._source
        return [self._ids[self._source + place % period] for place in range(best)]

    def _chance(self, run: int) -> float:
        """How probable it is that a guess is right when ``run`` tokens before it matched."""
        run = min(run, _LONGEST_RUN)
        prior = run**2 / (run**2 + 6)  # a single token repeats by chance, several in a row hardly do
        return (self._hits[run] + _PRIOR_WEIGHT * prior) / (self._trials[run] + _PRIOR_WEIGHT)

    def _append(self, token: int) -> None:
        """Add a token, follow the source or find another, and note where each n-gram was last followed."""
        ids = self._ids
        if self._source >= 0 and ids[self._source] == token:
            self._source, self._run = self._source + 1, self._run + 1
        else:
            self._source, self._run = -1, 0
        ids.append(token)
        key = 0
        for size, places in enumerate(self._places[: len(ids)], start=1):
            key = key * _KEY_STEP + ids[-size]
            found = places.get(key)
            if found is not None and size > self._run:
                self._source, self._run = found, size
            places[key] = len(ids)
