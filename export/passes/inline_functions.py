"""Replace ``deepstitch`` operators by the bodies of their functions."""

from __future__ import annotations

from collections.abc import Mapping

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common

from deepstitch.export.functions import DOMAIN, OPSET

__all__ = ["InlineFunctions"]


class InlineFunctions(ir.passes.InPlacePass):
    """Inline every function, a target's own body instead of the definition where it has one.

    1. Bodies in ``overrides`` replace the definitions; their opset imports join the graph's.
    2. All functions are inlined.
    3. What several layers compute alike is computed once; constants become initializers.

    Ensures: no node of the ``deepstitch`` domain is left.
    """

    def __init__(self, overrides: Mapping[str, onnx.FunctionProto] | None = None) -> None:
        super().__init__()
        self.overrides = dict(overrides or {})

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite ``model`` in place."""
        for proto in self.overrides.values():
            function = ir.serde.deserialize_function(proto)
            if function.identifier() in model.functions:
                model.functions[function.identifier()] = function
        modified = bool(model.functions)
        common.InlinePass()(model)
        model.functions.clear()  # the inliner keeps those that another pass has replaced every use of
        common.RemoveUnusedNodesPass()(model)
        common.CommonSubexpressionEliminationPass()(model)
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        model.graph.opset_imports.pop(DOMAIN, None)
        model.graph.opset_imports[""] = OPSET
        return ir.passes.PassResult(model, modified)

    def ensures(self, model: ir.Model) -> None:
        """Check that no operator of ours is left."""
        left = {node.op_type for node in model.graph.all_nodes() if node.domain == DOMAIN}
        if left:
            raise ir.passes.PostconditionError(f"not inlined: {sorted(left)}")
