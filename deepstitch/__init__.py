"""deepstitch: Qwen3-VL and Qwen3-VL-MoE as ONNX graphs with DeepStack as explicit inputs.

``deepstitch.load(bundle_dir)`` opens an exported bundle and returns a
:class:`deepstitch.runtime.pipeline.Pipeline`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepstitch.errors import DeepstitchError

if TYPE_CHECKING:
    from deepstitch.runtime.pipeline import Pipeline

__all__ = ["DeepstitchError", "__version__", "load"]

__version__ = "0.1.0"

# onnxruntime reports its use to its maker and keeps a database in the user's home unless this stands before its first
# import, wherever that is. Whoever wants it sets the variable to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def load(bundle: str | Path, **options: Any) -> Pipeline:
    """Open an exported bundle folder for generation.

    Args:
        bundle: folder that holds ``manifest.json``.
        **options: passed on to :meth:`deepstitch.runtime.pipeline.Pipeline.open` (engine, threads, …).

    Raises:
        DeepstitchError: the folder is not an intact bundle.
    """
    from deepstitch.runtime.pipeline import Pipeline

    return Pipeline.open(bundle, **options)
