"""The decoder of a language process: requests take turns, one token each, or one chunk of a prompt."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass, field

from deepstitch.runtime.disaggregated.errors import PeerLost
from deepstitch.runtime.results import Result
from deepstitch.runtime.stream import TextStream

__all__ = ["DecoderLoop", "Job"]

Event = str | Result | BaseException


@dataclass(slots=True, kw_only=True, eq=False)
class Job:
    """One answer to be written.

    Attributes:
        begin: makes the stream, in the decoder's thread: this allocates the KV cache.
        tell: takes pieces, then the result or an error; called in the decoder's thread.
        cancelled: nobody waits for it any more.
    """

    begin: Callable[[], TextStream]
    tell: Callable[[Event], None]
    cancelled: threading.Event = field(default_factory=threading.Event)


class DecoderLoop:
    """A thread that owns the decoder.

    Attributes:
        steps: turns taken so far; while this grows, the decoder works.
    """

    def __init__(self, max_running: int) -> None:
        """``max_running`` requests hold a KV cache at a time."""
        self.steps = 0
        self._max_running = max_running
        self._waiting: set[Job] = set()
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="decoder", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Requests that have not begun."""
        return len(self._waiting)

    async def run(self, begin: Callable[[], TextStream]) -> AsyncGenerator[str | Result, None]:
        """Pieces of text, then the result. Closing the iterator ends the answer where it is."""
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event] = asyncio.Queue()

        def tell(event: Event) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        job = Job(begin=begin, tell=tell)
        self._waiting.add(job)
        self._jobs.put(job)
        try:
            while True:
                event = await events.get()
                if isinstance(event, BaseException):
                    raise event
                yield event
                if isinstance(event, Result):
                    return
        finally:
            job.cancelled.set()
            self._waiting.discard(job)

    async def close(self) -> None:
        """End the thread; what runs is cut off."""
        self._closing.set()
        self._jobs.put(None)  # in case it waits for work
        await asyncio.get_running_loop().run_in_executor(None, self._thread.join)

    def _run(self) -> None:
        running: list[tuple[Job, Iterator[None]]] = []
        while not self._closing.is_set():
            while len(running) < self._max_running and (not running or not self._jobs.empty()):
                job = self._jobs.get()
                if job is None:
                    break
                self._waiting.discard(job)
                running.append((job, _steps(job)))
            running = [(job, steps) for job, steps in running if self._step(steps)]
        self._end([job for job, _ in running])

    def _step(self, steps: Iterator[None]) -> bool:
        """Whether there is more to come."""
        more = next(steps, _DONE) is not _DONE
        self.steps += more
        return more

    def _end(self, running: list[Job]) -> None:
        """Tell everybody who still waits."""
        while not self._jobs.empty():
            if (job := self._jobs.get()) is not None:
                running.append(job)
        for job in running:
            job.tell(PeerLost("the language process is being stopped"))


_DONE = object()


def _steps(job: Job) -> Iterator[None]:
    """Write an answer, a chunk of the prompt or a token per step; never raises."""
    if job.cancelled.is_set():
        return
    try:
        stream = job.begin()
        for text in stream.turns():
            if job.cancelled.is_set():
                return
            if text:
                job.tell(text)
            yield
        job.tell(stream.result)
    except BaseException as error:  # the thread serves others
        job.tell(error)
