"""RMSNormalization to ONNX Runtime's fused operators, in graphs of an opset that does not have it."""

from __future__ import annotations

import onnx_ir as ir

from deepstitch.export.functions import DOMAIN, VERSION, parse_functions
from deepstitch.export.passes.norms_to_plugin import sum_of_equals

__all__ = ["NormsToOrt"]

_SUM_OUTPUT = 3  # of SkipSimplifiedLayerNormalization: what was normed

# In this form and no other ONNX Runtime sees one operator, SimplifiedLayerNormalization.
_NORM = """
RMSNormEPSILON (x, weight) => (output)
{
    two = Constant <value_float = 2.0> ()
    epsilon = Constant <value_float = EPSILON> ()
    square = Pow (x, two)
    mean = ReduceMean <axes = [-1], keepdims = 1> (square)
    above_zero = Add (mean, epsilon)
    root = Sqrt (above_zero)
    normed = Div (x, root)
    output = Mul (normed, weight)
}
"""


class NormsToOrt(ir.passes.InPlacePass):
    """RMSNormalization becomes ``com.microsoft.SkipSimplifiedLayerNormalization`` or a function.

    1. Where it norms a sum of two tensors of one shape, the fused operator adds them and gives both sum and norm; it
       stands where the Add stood. Of two norms of one sum, the first takes it.
    2. Elsewhere it is written out, as ONNX Runtime recognizes it. (Its name for the fused operator is not one that
       ONNX's checker lets pass.)

    The bodies are functions; inlining them is another pass.

    Ensures: no RMSNormalization is left.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite ``model`` in place."""
        norms = [node for node in model.graph if node.op_type == "RMSNormalization" and node.domain == ""]
        bodies: dict[str, str] = {}
        for node in norms:
            epsilon = node.attributes.get_float("epsilon", 1e-5)
            add = sum_of_equals(node.inputs[0])
            if add is not None:
                _fuse(model.graph, add, node, epsilon)
            else:
                text = f"{epsilon:.9g}"
                name = "RMSNorm" + "".join(each if each.isalnum() else "_" for each in text)
                bodies[name] = _NORM.replace("RMSNormEPSILON", name).replace("EPSILON", _literal(text))
                node.domain, node.op_type, node.version = DOMAIN, name, None
                node.attributes.clear()
        for proto in parse_functions(bodies.values()).values():
            function = ir.serde.deserialize_function(proto)
            model.functions[function.identifier()] = function
        if bodies:
            model.graph.opset_imports[DOMAIN] = VERSION
        return ir.passes.PassResult(model, bool(norms))

    def ensures(self, model: ir.Model) -> None:
        """Check that every RMSNormalization was replaced."""
        if any(node.op_type == "RMSNormalization" for node in model.graph):
            raise ir.passes.PostconditionError("a RMSNormalization node is left")


def _literal(text: str) -> str:
    """A number that ONNX's textual syntax takes for a float."""
    return text if "." in text or "e" in text else f"{text}.0"


def _fuse(graph: ir.Graph, add: ir.Node, norm: ir.Node, epsilon: float) -> None:
    fused = ir.node(
        "SkipSimplifiedLayerNormalization",
        [*add.inputs, norm.inputs[1]],
        {"epsilon": epsilon},
        domain="com.microsoft",
        num_outputs=_SUM_OUTPUT + 1,
    )
    fused.metadata_props.update(norm.metadata_props)
    for unused in fused.outputs[1:_SUM_OUTPUT]:
        unused.name = ""
    graph.opset_imports["com.microsoft"] = 1
    ir.convenience.replace_nodes_and_values(
        graph,
        add,
        [norm, add],
        [fused],
        [norm.outputs[0], add.outputs[0]],
        [fused.outputs[0], fused.outputs[_SUM_OUTPUT]],
    )
