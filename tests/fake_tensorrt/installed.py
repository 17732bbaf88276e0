"""The stand-in as ``import tensorrt`` of this process, for the time of a test; and for child processes."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
VERSIONS = ("8.6.1", "10.0.1", "10.13.3.9", "11.1.0.106")


@contextmanager
def installed(version: str = "8.6.1", **settings: str) -> Iterator[Any]:
    """The module, freshly imported.

    Args:
        version: see :data:`VERSIONS`.
        settings: further ``FAKE_TENSORRT_…`` variables by the end of their names, as ``sm="75"``.
    """
    variables = variables_of(version, **settings)
    before = {name: os.environ.get(name) for name in variables}
    hidden = {name: sys.modules.pop(name) for name in _modules()}
    os.environ.update(variables)
    sys.path.insert(0, str(FOLDER))
    try:
        yield importlib.import_module("tensorrt")
    finally:
        sys.path.remove(str(FOLDER))
        for name in _modules():
            del sys.modules[name]
        sys.modules.update(hidden)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def variables_of(version: str, **settings: str) -> dict[str, str]:
    """Environment variables that make the stand-in that version; a child needs :data:`FOLDER` in PYTHONPATH too."""
    named = {f"FAKE_TENSORRT_{name.upper()}": value for name, value in settings.items()}
    return {"FAKE_TENSORRT_VERSION": version, **named}


def _modules() -> list[str]:
    return [name for name in sys.modules if name == "tensorrt" or name.startswith("tensorrt.")]
