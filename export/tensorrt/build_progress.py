"""How far the builder is: its own phases where it tells them (TensorRT 10), else that it is still at it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm.auto import tqdm

__all__ = ["Progress", "progress_of"]


class Progress:
    """A bar for one engine.

    Attributes:
        interrupted: Ctrl-C came; a builder that asks is told to stop.
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
    """A bar for the engine of a graph.

    Raises:
        KeyboardInterrupt: Ctrl-C came meanwhile.
    """
    with tqdm(desc=f"build {name}", unit="step", disable=None if shown else True, leave=False) as bar:
        progress = Progress(bar)
        with _ctrl_c_noted(progress):
            yield progress
        if progress.interrupted:
            raise KeyboardInterrupt


@contextmanager
def _ctrl_c_noted(progress: Progress) -> Iterator[None]:
    """Keep Ctrl-C in mind instead of raising it where TensorRT calls Python: its bindings drop what is raised there.

    A second Ctrl-C ends the process at once; what that leaves behind, the next build removes.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield  # somebody else takes care of it
        return

    def note(*_: object) -> None:
        progress.interrupted = True
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _monitor(module: Any, progress: Progress) -> Any:
    """What TensorRT calls, and is stopped by."""

    class Monitor(module.IProgressMonitor):
        def __init__(self) -> None:
            module.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            progress.begin(phase_name, num_steps)

        def phase_finish(self, phase_name: str) -> None:
            del phase_name

        def step_complete(self, phase_name: str, step: int) -> bool:
            progress.step()
            return not progress.interrupted

    return Monitor()
