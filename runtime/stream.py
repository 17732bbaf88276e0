"""An answer that can be read while it is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from deepstitch.runtime.answer import Piece
from deepstitch.runtime.generate import Generation
from deepstitch.runtime.results import Result

__all__ = ["TextStream"]


class TextStream(Iterator[str]):
    """Iterate for pieces of text; joined, they are the text of :attr:`result`."""

    def __init__(self, generation: Generation, finish: Callable[[Result], Result]) -> None:
        """Wrap a generation of one row; ``finish`` completes its result when the answer has ended."""
        self._generation = generation
        self._pieces: Iterator[Piece | None] = generation.turns()
        self._finish = finish
        self._result: Result | None = None

    def __next__(self) -> str:
        """The next piece that is not empty."""
        for piece in self._pieces:
            if piece is not None and piece.text:
                return piece.text
        self._end()
        raise StopIteration

    def turns(self) -> Iterator[str]:
        """The text of every token as it is chosen, often empty, and nothing between two chunks of the prompt.

        For who needs a say between two calls of the decoder.
        """
        for piece in self._pieces:
            yield piece.text if piece is not None else ""
        self._end()

    @property
    def result(self) -> Result:
        """The whole answer; what is not written yet is written now."""
        for _ in self:
            pass
        return self._end()

    def stop(self) -> Result:
        """End the answer here and return what there is; nothing happens if it has ended already."""
        if self._result is None:
            self._generation.interrupt()
        return self._end()

    def _end(self) -> Result:
        if self._result is None:
            self._result = self._finish(self._generation.result())
        return self._result
