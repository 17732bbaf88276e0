"""``trt10``: what the parsers of TensorRT 10.0 to 11 take, with our plugins, for networks that are strongly typed.

Each tensor has the type that the graph gives it, and TensorRT chooses no other. So precision is in the graph: fp16
weights are multiplied in fp16 and summed in fp32, on the tensor cores of compute capability 7.5 and newer, and integers
by the plugins.
"""

from __future__ import annotations

from deepstitch.export.lower.tensorrt import tensorrt_target
from deepstitch.export.passes.declare_opset import Dialect

__all__ = ["TARGET"]

_DIALECT = Dialect(parser="TensorRT 10.0", opset=20, ir_version=9, has_int64=True, has_shape_parts=True)
TARGET = tensorrt_target("trt10", _DIALECT, half_arithmetic=True)
