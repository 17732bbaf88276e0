"""How far the builder is: its own phases where it tells them (TensorRT 10), else that it is still at it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm.auto import tqdm

__all__ = ["Progress", "progress_of"]


class Progress:
    """A bar for one engine.

    Attributes:
        interrupted: Ctrl-C came while the builder was at work; it was told to stop.
    """

    def __init__(self, bar: Any) -> None:
        self._bar = bar
        self._lock = threading.Lock()  # the builder calls from several threads
        self.interrupted = False

    def begin(self, phase: str, steps: int) -> None:
        """A phase with so many steps begins."""
        with self._lock:
            self._bar.total = (self._bar.total or 0) + steps
            self._bar.set_postfix_str(phase, refresh=True)

    def step(self) -> None:
        """A step of any phase is done."""
        with self._lock:
            self._bar.update()

    def attach(self, module: Any, config: Any) -> None:
        """Follow the builder that gets this configuration, if its version lets one."""
        if hasattr(module, "IProgressMonitor"):
            config.progress_monitor = _monitor(module, self)


@contextmanager
def progress_of(name: str, *, shown: bool) -> Iterator[Progress]:
    """A bar for the engine of a graph."""
    with tqdm(desc=f"build {name}", unit="step", disable=None if shown else True, leave=False) as bar:
        yield Progress(bar)


def _monitor(module: Any, progress: Progress) -> Any:
    """What TensorRT calls. An exception must not leave it, Ctrl-C included: that is kept, and the builder stopped."""

    class Monitor(module.IProgressMonitor):
        def __init__(self) -> None:
            module.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            try:
                progress.begin(phase_name, num_steps)
            except KeyboardInterrupt:
                progress.interrupted = True

        def phase_finish(self, phase_name: str) -> None:
            del phase_name

        def step_complete(self, phase_name: str, step: int) -> bool:
            try:
                progress.step()
            except KeyboardInterrupt:
                progress.interrupted = True
            return not progress.interrupted

    return Monitor()
