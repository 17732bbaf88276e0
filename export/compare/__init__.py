"""Does a bundle compute what the model computes? Every case of the matrix, stage by stage.

Reading order: ``cases`` (the matrix), ``inputs`` (made up from it), ``references`` and ``candidate`` (the two
sides), ``metrics`` and ``tolerance`` (the verdict), ``comparison`` (all together), then ``report``, ``html``
and ``polygraphy_script``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deepstitch.export.compare.cases import CASES
    from deepstitch.export.compare.comparison import compare_bundle
    from deepstitch.export.compare.memory import check_memory
    from deepstitch.export.compare.report import Comparison
    from deepstitch.export.compare.tolerance import Tolerance

_HOMES = {
    "CASES": "cases",
    "Comparison": "report",
    "Tolerance": "tolerance",
    "check_memory": "memory",
    "compare_bundle": "comparison",
}
__all__ = ["CASES", "Comparison", "Tolerance", "check_memory", "compare_bundle"]


def __getattr__(name: str) -> object:
    # the parts import torch and onnxruntime; nobody pays for them who does not compare
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
