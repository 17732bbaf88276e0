"""From a checkpoint folder to a bundle: trace, lower, stream the weights, write the manifest."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deepstitch.export.exporter import ExportConfig, export_checkpoint
    from deepstitch.export.quantize.work import QuantizationConfig

__all__ = ["ExportConfig", "QuantizationConfig", "export_checkpoint"]


def __getattr__(name: str) -> object:
    # torch and onnx are imported only when something is exported
    if name in __all__:
        from deepstitch.export import exporter

        return getattr(exporter, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
