"""``trt8``: what TensorRT 8.6's parser takes, with our plugins; for SM61 first, hence fp32 arithmetic throughout."""

from __future__ import annotations

from deepstitch.export.lower.tensorrt import tensorrt_target
from deepstitch.export.passes.declare_opset import Dialect

__all__ = ["TARGET"]

_DIALECT = Dialect(parser="TensorRT 8.6", opset=17, ir_version=8, has_int64=False, has_shape_parts=False)
TARGET = tensorrt_target("trt8", _DIALECT, half_arithmetic=False)
