"""Replace shape arithmetic in front of a Reshape by one constant."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common

__all__ = ["ConstantReshapes"]


class ConstantReshapes(ir.passes.InPlacePass):
    """Reshape targets become constants wherever ONNX can say them with 0 (copy) and one -1 (infer).

    1. An output axis of known size is written as that size.
    2. An output axis equal to the input axis at the same place is written as 0.
    3. At most one other axis is written as -1; with two the Reshape is left alone.

    Ensures: no Shape node is left that fed a rewritten Reshape alone.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite ``model`` in place."""
        modified = False
        for node in model.graph:
            target = _constant_target(node) if node.op_type == "Reshape" and node.domain == "" else None
            if target is None:
                continue
            name = "shape_" + "_".join(str(size).replace("-", "m") for size in target)
            if name not in model.graph.initializers:
                tensor = ir.tensor(list(target), dtype=ir.DataType.INT64, name=name)
                model.graph.register_initializer(
                    ir.Value(
                        name=name, shape=ir.Shape([len(target)]), type=ir.TensorType(tensor.dtype), const_value=tensor
                    )
                )
            node.replace_input_with(1, model.graph.initializers[name])
            node.attributes.pop("allowzero", None)  # 0 means copy
            modified = True
        common.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified)


def _constant_target(node: ir.Node) -> tuple[int, ...] | None:
    before, after = node.inputs[0], node.outputs[0]
    if before is None or before.shape is None or after.shape is None:
        return None
    target: list[int] = []
    for axis, size in enumerate(after.shape):
        if isinstance(size, int):
            target.append(size)
        elif axis < len(before.shape) and before.shape[axis] == size:
            target.append(0)
        else:
            target.append(-1)
    return tuple(target) if target.count(-1) <= 1 and 0 not in list(after.shape) else None
