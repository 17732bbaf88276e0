"""One child process: start it, bound its time, and see what else ran on the machine meanwhile."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

__all__ = ["ChildRun", "run_child"]

_ROOT = Path(__file__).resolve().parents[2]
_LAST_LINES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildRun:
    """What came back.

    Attributes:
        result: what the child wrote, ``{"runs": […]}``; empty runs if it wrote nothing.
        error: why it did not finish, or None.
        other_load: share of all cores that anything but the child used meanwhile.
        seconds: wall time.
    """

    result: dict[str, Any]
    error: str | None
    other_load: float
    seconds: float


def run_child(python: str, module: str, request: dict[str, Any], *, limit_seconds: float) -> ChildRun:
    """Run ``benchmarks.peers.children.<module>`` on a request, in a process group of its own."""
    with tempfile.TemporaryDirectory(prefix="peers-") as folder:
        target, log = Path(folder, "result.json"), Path(folder, "log.txt")
        Path(folder, "request.json").write_text(json.dumps({**request, "result": str(target)}), "utf-8")
        command = [python, "-m", f"benchmarks.peers.children.{module}", str(Path(folder, "request.json"))]
        before, start = _busy_seconds(), time.perf_counter()
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=_ROOT,
                env=_environment(request["threads"], Path(request["scratch"])),
                start_new_session=True,
            )
            try:
                status, own = _wait(process, limit_seconds)
            finally:
                if process.returncode is None:  # interrupted: no child is left behind
                    os.killpg(process.pid, signal.SIGKILL)
        seconds = time.perf_counter() - start
        other = max(0.0, _busy_seconds() - before - own) / (seconds * (os.cpu_count() or 1))
        result = json.loads(target.read_text("utf-8")) if target.exists() else {"runs": []}
        error = result.get("error") or _failure(status, limit_seconds, log)
        return ChildRun(result=result, error=error, other_load=other, seconds=seconds)


def _wait(process: subprocess.Popen[bytes], limit_seconds: float) -> tuple[int | None, float]:
    """Exit status (None: killed at the limit) and the processor seconds of the child and its children."""
    deadline = time.monotonic() + limit_seconds
    expired = False
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            return (None if expired else process.returncode), usage.ru_utime + usage.ru_stime
        if time.monotonic() > deadline and not expired:
            expired = True
            os.killpg(process.pid, signal.SIGKILL)
        time.sleep(0.05)


def _busy_seconds() -> float:
    """Processor seconds that all processes, and the host's other guests, have used since boot."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0) - _counted_twice(times))


def _counted_twice(times: Any) -> float:
    return float(getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0))


def _environment(threads: int, scratch: Path) -> dict[str, str]:
    variables = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
    path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
    variables |= {"TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor")}  # what one round compiled, the next one loads
    return {**os.environ, **variables, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}


def _failure(status: int | None, limit_seconds: float, log: Path) -> str | None:
    if status == 0:
        return None
    if status is None:
        return f"no end within {limit_seconds:.0f} s"
    lines = [line.strip() for line in log.read_text("utf-8", errors="replace").splitlines() if line.strip(". ")]
    reason = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit code {status}"
    return f"{reason}: {' | '.join(lines[-_LAST_LINES:])[-400:]}"
