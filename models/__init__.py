"""PyTorch definitions of the supported models, and the reader of their checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deepstitch.models.config import SUPPORTED_MODEL_TYPES, ModelConfig, TextConfig, VisionConfig

if TYPE_CHECKING:
    from deepstitch.models.build import build_model, load_model

__all__ = [
    "SUPPORTED_MODEL_TYPES",
    "ModelConfig",
    "TextConfig",
    "VisionConfig",
    "build_model",
    "load_model",
]


def __getattr__(name: str) -> object:
    # torch is imported only when a model is asked for, so that `inspect` works on a machine without it
    if name in ("build_model", "load_model"):
        from deepstitch.models import build

        return getattr(build, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
