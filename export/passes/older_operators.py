"""Operators that a parser does not know yet, in those of opset 17."""

from __future__ import annotations

import onnx_ir as ir

from deepstitch.export.functions import DOMAIN, VERSION, parse_functions

__all__ = ["OlderOperators"]

_FIRST_OPSET = {"RotaryEmbedding": 23, "Gelu": 20}

_ROTARY = """
RotaryEmbeddingNUMBER (x, cos, sin) => (output)
{
    by_head = Constant <value_ints = [0, 0, HEADS, HEAD_DIM]> ()
    halves = Constant <value_ints = [HALF, HALF]> ()
    merged = Constant <value_ints = [0, 0, WIDTH]> ()
    head_axis = Constant <value_ints = [2]> ()
    heads = Reshape (x, by_head)
    low, high = Split <axis = -1> (heads, halves)
    cos_apart = Unsqueeze (cos, head_axis)
    sin_apart = Unsqueeze (sin, head_axis)
    low_cos = Mul (low, cos_apart)
    high_sin = Mul (high, sin_apart)
    high_cos = Mul (high, cos_apart)
    low_sin = Mul (low, sin_apart)
    turned_low = Sub (low_cos, high_sin)
    turned_high = Add (high_cos, low_sin)
    turned = Concat <axis = -1> (turned_low, turned_high)
    output = Reshape (turned, merged)
}
"""

# 0.79788 is sqrt(2 / pi)
_GELU_TANH = """
GeluTanh (x) => (output)
{
    half = Constant <value_float = 0.5> ()
    one = Constant <value_float = 1.0> ()
    cubic = Constant <value_float = 0.044715> ()
    factor = Constant <value_float = 0.7978845608028654> ()
    square = Mul (x, x)
    cube = Mul (square, x)
    small = Mul (cube, cubic)
    inner = Add (x, small)
    scaled = Mul (inner, factor)
    tanh = Tanh (scaled)
    gate = Add (tanh, one)
    halved = Mul (x, half)
    output = Mul (halved, gate)
}
"""

# 0.70710 is 1 / sqrt(2)
_GELU_ERF = """
GeluErf (x) => (output)
{
    half = Constant <value_float = 0.5> ()
    one = Constant <value_float = 1.0> ()
    factor = Constant <value_float = 0.7071067811865476> ()
    scaled = Mul (x, factor)
    erf = Erf (scaled)
    gate = Add (erf, one)
    halved = Mul (x, half)
    output = Mul (halved, gate)
}
"""


class OlderOperators(ir.passes.InPlacePass):
    """RotaryEmbedding and Gelu become functions over operators of opset 17, where they are newer than the parser's.

    1. RotaryEmbedding with one row of cosine and sine per token, halves rotated: split, four products, joined.
    2. Gelu by Tanh or Erf, as its attribute says.

    The bodies are functions; inlining them is another pass.

    Ensures: none of the two is left that came later.
    """

    def __init__(self, opset: int) -> None:
        """Take the parser's opset."""
        super().__init__()
        self.newer = tuple(name for name, first in _FIRST_OPSET.items() if first > opset)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite ``model`` in place."""
        bodies: dict[str, str] = {}
        for node in model.graph:
            if node.domain == "" and node.op_type in self.newer:
                text = _rotary(node) if node.op_type == "RotaryEmbedding" else _gelu(node)
                name = text.split("(")[0].strip()
                bodies[name] = text
                node.domain, node.op_type, node.version = DOMAIN, name, None
                node.attributes.clear()
        for proto in parse_functions(bodies.values()).values():
            function = ir.serde.deserialize_function(proto)
            model.functions[function.identifier()] = function
        if bodies:
            model.graph.opset_imports[DOMAIN] = VERSION
        return ir.passes.PassResult(model, bool(bodies))

    def ensures(self, model: ir.Model) -> None:
        """Check that they are gone."""
        left = {node.op_type for node in model.graph if node.op_type in self.newer}
        if left:
            raise ir.passes.PostconditionError(f"not rewritten: {sorted(left)}")


def _gelu(node: ir.Node) -> str:
    return _GELU_TANH if node.attributes.get_string("approximate", "none") == "tanh" else _GELU_ERF


def _rotary(node: ir.Node) -> str:
    x = node.inputs[0]
    assert x is not None and x.shape is not None and node.attributes.get_int("interleaved", 0) == 0
    width, heads = x.shape[-1], node.attributes.get_int("num_heads")
    assert isinstance(width, int)
    text = _ROTARY.replace("NUMBER", f"{heads}x{width // heads}")
    values = {"HEADS": heads, "HEAD_DIM": width // heads, "HALF": width // heads // 2, "WIDTH": width}
    for name, value in values.items():
        text = text.replace(name, str(value))
    return text
