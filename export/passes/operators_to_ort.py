"""RotaryEmbedding and Gelu to ONNX Runtime's own, in graphs of an opset that does not have them."""

from __future__ import annotations

import onnx_ir as ir

from deepstitch.export.functions import DOMAIN, VERSION, parse_functions

__all__ = ["OperatorsToOrt"]

# One table of all tokens, and the number of each token's row. Counting is adding up ones: a Range would take its end
# from a shape, which ONNX Runtime computes on the CPU.
_TABLES = """
RotaryTables (cos, sin) => (positions, cos_rows, sin_rows)
{
    by_row = Constant <value_ints = [-1, HALF]> ()
    cos_rows = Reshape (cos, by_row)
    sin_rows = Reshape (sin, by_row)
    first = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    column = Gather <axis = 1> (cos_rows, first)
    whole = Cast <to = 7> (column)
    nothing = Sub (whole, whole)
    ones = Add (nothing, one)
    number = CumSum <exclusive = 1> (ones, first)
    rows_and_tokens = Shape <start = 0, end = 2> (cos)
    positions = Reshape (number, rows_and_tokens)
}
"""


class OperatorsToOrt(ir.passes.InPlacePass):
    """Operators of opsets 20 and 23 become ``com.microsoft`` operators.

    1. ``RotaryEmbedding`` with one row of cosine and sine per token: the same over one table of all tokens, with the
       numbers of its rows as positions.
    2. ``Gelu``: ``FastGelu`` where it is approximated by tanh, else ``Gelu``.

    The table's body is a function; inlining it is another pass.

    Ensures: neither operator of the standard domain is left.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite ``model`` in place."""
        tables: dict[tuple[ir.Value | None, ir.Value | None], ir.Node] = {}
        nodes = [node for node in model.graph if node.domain == "" and node.op_type in ("RotaryEmbedding", "Gelu")]
        for node in nodes:
            if node.op_type == "Gelu":
                approximate = node.attributes.get_string("approximate", "none") == "tanh"
                replacement = ir.node("FastGelu" if approximate else "Gelu", node.inputs, domain="com.microsoft")
            else:
                x, cos, sin = node.inputs
                if (cos, sin) not in tables:
                    tables[cos, sin] = _tables(model, node, cos, sin)
                replacement = ir.node(
                    "RotaryEmbedding",
                    [x, *tables[cos, sin].outputs],
                    {"num_heads": node.attributes.get_int("num_heads")},
                    domain="com.microsoft",
                )
            replacement.metadata_props.update(node.metadata_props)
            ir.convenience.replace_nodes_and_values(
                model.graph, node, [node], [replacement], [node.outputs[0]], [replacement.outputs[0]]
            )
        if nodes:
            model.graph.opset_imports["com.microsoft"] = 1
        return ir.passes.PassResult(model, bool(nodes))

    def ensures(self, model: ir.Model) -> None:
        """Check that both operators are gone."""
        left = {
            node.op_type for node in model.graph if node.domain == "" and node.op_type in ("RotaryEmbedding", "Gelu")
        }
        if left:
            raise ir.passes.PostconditionError(f"not rewritten: {sorted(left)}")


def _tables(model: ir.Model, before: ir.Node, cos: ir.Value | None, sin: ir.Value | None) -> ir.Node:
    assert cos is not None and cos.shape is not None and before.attributes.get_int("interleaved", 0) == 0
    proto = parse_functions([_TABLES.replace("HALF", str(cos.shape[-1]))])["RotaryTables"]
    function = ir.serde.deserialize_function(proto)
    model.functions[function.identifier()] = function
    model.graph.opset_imports[DOMAIN] = VERSION
    tables = ir.node("RotaryTables", [cos, sin], domain=DOMAIN, num_outputs=3)
    model.graph.insert_before(before, tables)
    return tables
