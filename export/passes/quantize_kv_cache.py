"""Give the decoder's KV cache a smaller dtype."""

from __future__ import annotations

import re

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from deepstitch.export.functions import DOMAIN
from deepstitch.export.kv_functions import CacheKind
from deepstitch.export.quantize.kv_scales import KVScales

__all__ = ["QuantizeKVCache"]

_CACHE = re.compile(r"(past_key_values|present)\.(\d+)\.(key|value)")


class QuantizeKVCache(ir.passes.InPlacePass):
    """CachedAttention becomes the operator over that kind of cache; the graph's cache inputs and outputs follow.

    1. Cache tensors take the kind's dtype and width.
    2. Scales become initializers ``past_key_values.{i}.{part}.scale``, ``[1, Hkv, 1, D]`` float32.
    3. The operator's definition is attached; which kernel runs it is up to the target.

    Ensures: no CachedAttention node is left, unless the kind is fp32, which changes nothing.
    """

    def __init__(self, kind: CacheKind, scales: KVScales | None = None) -> None:
        """Take what the cache becomes.

        Args:
            kind: the dtype.
            scales: of every layer; needed where the kind has scales.
        """
        super().__init__()
        self.kind = kind
        self.scales = scales
        assert (kind.largest is None) == (scales is None)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite ``model`` in place."""
        nodes = [node for node in model.graph if (node.domain, node.op_type) == (DOMAIN, "CachedAttention")]
        if self.kind.name == "fp32":
            return ir.passes.PassResult(model, False)
        for value in (*model.graph.inputs, *model.graph.outputs):
            if _CACHE.fullmatch(value.name or ""):
                self._retype(value)
        for node in nodes:
            self._replace(node, model.graph)
        if nodes:
            function = ir.serde.deserialize_function(self.kind.definition())
            model.functions[function.identifier()] = function
        return ir.passes.PassResult(model, bool(nodes))

    def _retype(self, value: ir.Value) -> None:
        assert value.shape is not None
        *outer, head_dim = value.shape
        assert isinstance(head_dim, int)
        value.type = ir.TensorType(ir.DataType.from_numpy(np.dtype(self.kind.dtype)))
        value.shape = ir.Shape([*outer, self.kind.width(head_dim)])

    def _replace(self, node: ir.Node, graph: ir.Graph) -> None:
        node.op_type = self.kind.operator
        if self.scales is None:
            return
        past = node.inputs[3]
        found = _CACHE.fullmatch(past.name or "") if past is not None else None
        assert found is not None, "the cache of a layer is a graph input"
        layer = int(found[2])
        count = len(node.inputs)
        node.resize_inputs(count + 2)
        for index, part in enumerate(("key", "value"), start=count):
            name = f"past_key_values.{layer}.{part}.scale"
            node.replace_input_with(index, _initializer(name, self.scales.scale(layer, part), graph))

    def ensures(self, model: ir.Model) -> None:
        """Check that no node reads a cache of another kind."""
        if self.kind.name != "fp32" and any(node.op_type == "CachedAttention" for node in model.graph):
            raise ir.passes.PostconditionError("a CachedAttention node is left")


def _initializer(name: str, array: npt.NDArray[np.float32], graph: ir.Graph) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value
