"""Do the graph files have the inputs and outputs the manifest declares? Read without loading weights."""

from __future__ import annotations

from collections.abc import Iterable

import onnx

from deepstitch.manifest import TensorSpec
from deepstitch.runtime.bundle import Bundle

__all__ = ["check_contract"]


def check_contract(bundle: Bundle) -> None:
    """Check every graph of a bundle.

    Raises:
        BundleError: a tensor is missing, unexpected, or of another dtype or shape.
    """
    for name in bundle.manifest.graphs:
        graph = onnx.load(bundle.graph_path(name), load_external_data=False).graph
        stored = {initializer.name for initializer in graph.initializer}
        inputs = [value for value in graph.input if value.name not in stored]
        bundle.check_graph(name, _specs(inputs), _specs(graph.output))


def _specs(values: Iterable[onnx.ValueInfoProto]) -> list[TensorSpec]:
    return [
        TensorSpec(
            name=value.name,
            dtype=onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name,
            shape=tuple(
                dim.dim_value if dim.HasField("dim_value") else dim.dim_param
                for dim in value.type.tensor_type.shape.dim
            ),
        )
        for value in values
    ]
