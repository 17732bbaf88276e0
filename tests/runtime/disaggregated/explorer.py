"""Breadth-first search of everything a model can do, and what may not happen on the way.

A model is a start state, its steps, and two questions about a state. States are hashable values. A step is ``fair``
if it happens by itself sooner or later; the others are faults. The search visits all states there is a way to, and asks

* that no state breaks an invariant, faults included;
* that a state without fair steps is an end: nothing is stuck;
* that fair steps form no cycle: nothing goes round in circles.

The last two together: from every state, whatever went wrong before, and in whatever order things happen then, an end
comes once there are no more faults. No fairness between the steps has to be assumed for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import NamedTuple, TypeVar

State = TypeVar("State", bound=Hashable)


class Step(NamedTuple):
    """One thing that may happen.

    Attributes:
        label: what, in words.
        state: after it.
        fair: it happens by itself; else it is a fault.
    """

    label: str
    state: Hashable
    fair: bool


class Broken(Exception):
    """Raised by a model in the middle of a step that must not be possible; its text names the rule."""


class Violation(NamedTuple):
    """A rule that was broken, and one of the shortest ways to get there."""

    rule: str
    trace: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join([f"{self.rule}, after {len(self.trace)} steps:", *(f"  {each}" for each in self.trace)])


class Explored(NamedTuple):
    """What was seen.

    Attributes:
        states: different ones.
        steps: from one to another, faults included.
        ends: states that are an end.
        violation: the first one found, in order of distance from the start; the search ends there.
    """

    states: int
    steps: int
    ends: int
    violation: Violation | None


class Search:
    """All states by number, in the order they were found."""

    def __init__(self, start: Hashable) -> None:
        self.numbers: dict[Hashable, int] = {start: 0}
        self.states: list[Hashable] = [start]
        self.came: list[tuple[int, str]] = [(-1, "")]
        self.fair: list[list[int]] = []
        self.steps = self.ends = 0

    def visit(self, step: Step, origin: int) -> int:
        """The number of a state, a new one for a new state."""
        number = self.numbers.setdefault(step.state, len(self.states))
        if number == len(self.states):
            self.states.append(step.state)
            self.came.append((origin, step.label))
        return number

    def trace(self, number: int) -> tuple[str, ...]:
        """The steps to a state."""
        labels = []
        while number:
            number, label = self.came[number]
            labels.append(label)
        return tuple(reversed(labels))

    def result(self, rule: str | None = None, number: int = 0, more: Sequence[str] = ()) -> Explored:
        """What was seen so far."""
        violation = Violation(rule, (*self.trace(number), *more)) if rule else None
        return Explored(len(self.states), self.steps, self.ends, violation)


def explore(
    start: State,
    successors: Callable[[State], Iterable[Step]],
    *,
    broken: Callable[[State], str | None],
    is_end: Callable[[State], bool],
    limit: int = 2_000_000,
) -> Explored:
    """Search from ``start``.

    Args:
        start: the first state.
        successors: steps from a state; may raise :class:`Broken`.
        broken: the invariant that a state breaks, None where it breaks none.
        is_end: whether it is good that nothing happens any more.
        limit: states after which to stop.

    Raises:
        RuntimeError: there are more than ``limit`` states.
    """
    search = Search(start)
    number = 0
    while number < len(search.states):
        state: State = search.states[number]  # type: ignore[assignment]
        if rule := broken(state):
            return search.result(rule, number)
        fair = []
        try:
            for step in successors(state):
                search.steps += 1
                target = search.visit(step, number)
                if step.fair:
                    fair.append(target)
        except Broken as error:
            return search.result(str(error), number)
        if is_end(state):
            search.ends += 1
        elif not fair:
            return search.result("stuck: nothing can happen any more, and it is not an end", number)
        search.fair.append(fair)
        number += 1
        if number > limit:
            raise RuntimeError(f"more than {limit} states")
    circle = first_on_cycle(search.fair)
    if circle is not None:
        return search.result("in circles: the same comes again without a fault", circle)
    return search.result()


def first_on_cycle(edges: Sequence[Sequence[int]]) -> int | None:
    """The lowest number on a cycle, or on a way between two cycles; None where there is none."""
    incoming, outgoing = [0] * len(edges), [len(targets) for targets in edges]
    sources: list[list[int]] = [[] for _ in edges]
    for number, targets in enumerate(edges):
        for target in targets:
            incoming[target] += 1
            sources[target].append(number)
    # Taking away what nothing leads to, and what leads nowhere, leaves the cycles and the ways between them.
    alive = [True] * len(edges)
    for counts, follow in ((incoming, edges), (outgoing, sources)):
        ready = deque(number for number, count in enumerate(counts) if not count and alive[number])
        while ready:
            number = ready.popleft()
            alive[number] = False
            for other in follow[number]:
                counts[other] -= 1
                if not counts[other] and alive[other]:
                    ready.append(other)
    return next((number for number, left in enumerate(alive) if left), None)
