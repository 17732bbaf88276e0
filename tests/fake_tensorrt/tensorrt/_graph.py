"""The ONNX graph behind a network or an engine: its tensors, its sizes, and what it computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from ._plan import Tensor

PLUGINS = "deepstitch.plugins"
_FOLDER = "session.model_external_initializers_file_folder_path"


def dtype_name(number: int) -> str:
    """numpy's name of ONNX's type."""
    return onnx.helper.tensor_dtype_to_np_dtype(number).name


class Graph:
    """A model whose weights stay in their files.

    Args:
        data: the ONNX file.
        path: where it lay; the weights are looked for beside it.
    """

    def __init__(self, data: bytes, path: str) -> None:
        self.data, self.path = data, Path(path)
        self.model = onnx.load_model_from_string(data)

    @cached_property
    def tensors(self) -> tuple[Tensor, ...]:
        """Inputs, then outputs."""
        graph = self.model.graph
        constants = {each.name for each in graph.initializer}
        inputs = [_tensor(each, True) for each in graph.input if each.name not in constants]
        return (*inputs, *(_tensor(each, False) for each in graph.output))

    @cached_property
    def weight_bytes(self) -> int:
        """Of all constants."""
        return sum(
            int(np.prod(each.dims, dtype=np.int64)) * onnx.helper.tensor_dtype_to_np_dtype(each.data_type).itemsize
            for each in self.model.graph.initializer
        )

    @property
    def plugins(self) -> tuple[tuple[str, str, str], ...]:
        """Name, version and namespace of the creators it needs."""
        found = {}
        for node in self.model.graph.node:
            if node.domain == PLUGINS:
                given = {each.name: each.s.decode() for each in node.attribute if each.name.startswith("plugin_")}
                address = (node.op_type, given.get("plugin_version", "1"), given.get("plugin_namespace", ""))
                found[address] = None
        return tuple(found)

    @cached_property
    def types(self) -> dict[str, str]:
        """numpy's names of the types of all tensors that inference finds."""
        from deepstitch.export.compare.definition_engine import with_definitions

        model = with_definitions(onnx.load_model_from_string(self.data))
        inferred = onnx.shape_inference.infer_shapes(model).graph
        values = (*inferred.input, *inferred.value_info, *inferred.output)
        return {each.name: dtype_name(each.type.tensor_type.elem_type) for each in values}

    def output_shapes(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
        """By the names of the axes; a size that no input has is followed through the graph.

        Args:
            shapes: of all inputs.
        """
        axes = {
            axis: size
            for tensor in self.tensors
            if tensor.is_input
            for axis, size in zip(tensor.shape, shapes[tensor.name], strict=True)
            if isinstance(axis, str)
        }
        outputs = [each for each in self.tensors if not each.is_input]
        if all(isinstance(axis, int) or axis in axes for each in outputs for axis in each.shape):
            return {each.name: tuple(axes.get(axis, axis) for axis in each.shape) for each in outputs}
        from deepstitch.export.tensorrt.plugin_nodes import Typed

        types = {each.name: each.dtype for each in self.tensors}
        given = {name: Typed(types[name], tuple(shape)) for name, shape in shapes.items()}
        found = self._propagation.run(given).by_name
        return {each.name: tuple(found[each.name].shape) for each in outputs}

    @cached_property
    def _propagation(self) -> Any:
        from deepstitch.export.tensorrt.shapes import Propagation

        return Propagation(onnx.load_model_from_string(self.data))

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Compute with ONNX Runtime, every plugin by the function that defines it."""
        names = [each.name for each in self.tensors if not each.is_input]
        return dict(zip(names, self._session.run(names, dict(inputs)), strict=True))

    @cached_property
    def _session(self) -> Any:
        import onnxruntime

        from deepstitch.export.compare.definition_engine import with_definitions

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        options.add_session_config_entry(_FOLDER, str(self.path.resolve().parent))
        model = with_definitions(onnx.load_model_from_string(self.data))
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _tensor(value: onnx.ValueInfoProto, is_input: bool) -> Tensor:
    kind = value.type.tensor_type
    shape = tuple(
        each.dim_value if each.HasField("dim_value") else each.dim_param or f"{value.name}.{place}"
        for place, each in enumerate(kind.shape.dim)
    )
    return Tensor(name=value.name, dtype=dtype_name(kind.elem_type), shape=shape, is_input=is_input)
