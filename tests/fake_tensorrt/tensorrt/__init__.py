"""A stand-in for NVIDIA's ``tensorrt``, for machines without a GPU: put this package's parent on ``sys.path``.

It has of each version exactly the classes, members, arguments and enum members that deepstitch uses and that version
has (``api.json``); everything else raises as it would there. The builder's plans hold the ONNX graph, and engines
really compute it, with ONNX Runtime and the functions that define the plugins, at the addresses they are given. If a
stand-in libcuda with ``fake_cuda_enqueue`` is in the process, they do so in the order of its streams.

``FAKE_TENSORRT_VERSION`` is 8.6.1 (the default), 10.0.1, 10.13.3.9 or 11.1.0.106, or the beginning of one.
``FAKE_TENSORRT_SM`` is the card's compute capability. ``FAKE_TENSORRT_FAIL`` makes steps fail, with commas between:
driver, parse, shape-tensor:NAME, profile, build, build-memory, deserialize-memory, context-memory, execute. Every call
is in ``calls``, and a line of JSON in the file ``FAKE_TENSORRT_LOG``.

What it does not show: anything about speed, memory or numbers of the real kernels, and whether TensorRT's builder finds
an implementation for every node.
"""

from __future__ import annotations

from typing import Any

from . import _base, _build, _network, _run  # noqa: F401  # they fill the table of classes
from ._api import VERSION, calls, classes
from ._base import IHostMemory
from ._enums import NUMPY_NAMES, DataType
from ._plugins import get_plugin_registry, init_libnvinfer_plugins

__version__ = VERSION

globals().update(classes)
_NAMES = {
    "float32": "FLOAT",
    "float16": "HALF",
    "int8": "INT8",
    "int32": "INT32",
    "int64": "INT64",
    "bool": "BOOL",
    "uint8": "UINT8",
}
globals().update({name: DataType[member] for name, member in _NAMES.items() if member in DataType.__members__})


def nptype(trt_type: DataType) -> Any:
    """numpy's type.

    Raises:
        TypeError: it has none.
    """
    import numpy as np

    if trt_type.name not in NUMPY_NAMES:
        raise TypeError("Could not resolve TensorRT datatype to an equivalent numpy datatype.")
    return np.dtype(NUMPY_NAMES[trt_type.name]).type


def volume(iterable: Any) -> int:
    """The product of sizes."""
    found = 1
    for each in iterable:
        found *= each
    return found


__all__ = ["IHostMemory", "calls", "get_plugin_registry", "init_libnvinfer_plugins", "nptype", "volume", *classes]
