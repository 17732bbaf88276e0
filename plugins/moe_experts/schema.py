"""What MoEExperts takes and gives, and the ONNX function that defines it."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from deepstitch.plugins.common.schema import Attribute, OpSchema, TensorSpec
from deepstitch.plugins.quantized_linear.schema import BLOCKS, FORMATS, INTEGER_FORMATS, matrix_inputs

if TYPE_CHECKING:
    import onnx

__all__ = ["ACTIVATIONS", "GATED", "SCHEMA", "activation_of"]

ACTIVATIONS = ("SwiGLU", "GeGLU", "ReLU2", "SiLU")  # the number of each is its place
GATED = (0, 1)  # the activations that multiply with a second projection

# The experts are ranked by logit, which softmax keeps in order: equal logits, and only those, tie.
_BODY = """
MoEExperts <top_k, norm_topk_prob, weight_format, block_size, num_experts, intermediate_size, activations, gated>
    (INPUTS) => (y)
{
    zero = Constant <value_float = 0.0> ()
    expert_axis = Constant <value_ints = [1]> ()
    kinds = Constant <value_ints = [KINDS]> ()
    tokens = Flatten <axis = -1> (x)
    logits = Flatten <axis = -1> (router_logits)
    probabilities = Softmax <axis = -1> (logits)
    top_k_1d = Constant <value_ints = [TOP_K]> ()
    top_logits, chosen = TopK <axis = -1> (logits, top_k_1d)
    top = GatherElements <axis = -1> (probabilities, chosen)
    WEIGHTS
    active = Unique <sorted = 1> (chosen)
    num_active = Size (active)
    tokens_shape = Shape (tokens)
    nothing = ConstantOfShape <value = float[1] {0.0}> (tokens_shape)
    keep_going = Constant <value = bool {1}> ()
    mixed = Loop (num_active, keep_going, nothing) <body = one_expert
        (int64 turn, bool condition, float[n, h] mixed_in) => (bool condition_out, float[n, h] mixed_out)
    {
        condition_out = Identity (condition)
        expert = Gather (active, turn)
        hit = Equal (chosen, expert)
        hit_weights = Where (hit, weights, zero)
        weight_of_token = ReduceSum <keepdims = 0> (hit_weights, expert_axis)
        hit_float = Cast <to = 1> (hit)
        hits_of_token = ReduceSum <keepdims = 0> (hit_float, expert_axis)
        rows_as_columns = NonZero (hits_of_token)
        rows = Transpose <perm = [1, 0]> (rows_as_columns)
        routed = GatherND (tokens, rows)
        EXPERT
        row_weights = Gather (weight_of_token, rows)
        weighted = Mul (result, row_weights)
        mixed_out = ScatterND <reduction = "add"> (mixed_in, rows, weighted)
    }>
    shape = Shape (x)
    y = Reshape <allowzero = 1> (mixed, shape)
}
"""

_NORMALIZED = """
    sum = ReduceSum <keepdims = 1> (top, expert_axis)
    weights = Div (top, sum)
"""

_SILU = """
        sigmoid = Sigmoid (gate)
        silu = Mul (gate, sigmoid)
"""
_ACTIVATED = (
    "activated_0 = Mul (silu, up)",
    'gelu = Gelu <approximate = "none"> (gate)\n        activated_1 = Mul (gelu, up)',
    "relu = Relu (gate)\n        activated_2 = Mul (relu, relu)",
    "activated_3 = Identity (silu)",
)


def activation_of(attributes: Mapping[str, Any]) -> tuple[int, ...]:
    """The activation's number for each expert."""
    listed = tuple(attributes["activations"])
    return listed * attributes["num_experts"] if len(listed) == 1 else listed


def _inputs(attributes: Mapping[str, Any]) -> tuple[TensorSpec, ...]:
    return (
        TensorSpec(name="x", dtypes=("float32",), shape="[..., H]"),
        TensorSpec(name="router_logits", dtypes=("float32",), shape="[..., E]"),
        *matrix_inputs("gate_up", attributes, "E, 2*I" if attributes["gated"] else "E, I", "H"),
        *matrix_inputs("down", attributes, "E, H", "I"),
    )


def _outputs(attributes: Mapping[str, Any]) -> tuple[TensorSpec, ...]:
    del attributes
    return (TensorSpec(name="y", dtypes=("float32",), shape="[..., H]"),)


def _activation_nodes(kinds: tuple[int, ...], gated: bool) -> str:
    """Nodes from ``projected [n, G*I]`` to ``activated [n, I]``; where experts differ, each kind and then a choice."""
    used = sorted(set(kinds))
    split = "gate, up = Split <axis = -1, num_outputs = 2> (projected)" if gated else "gate = Identity (projected)"
    nodes = [split, _SILU, *(_ACTIVATED[kind] for kind in used), f"chosen_{used[0]} = Identity (activated_{used[0]})"]
    if len(used) > 1:
        nodes.append("kind = Gather (kinds, expert)")
    for before, kind in pairwise(used):
        nodes += [
            f"number_{kind} = Constant <value_int = {kind}> ()",
            f"is_{kind} = Equal (kind, number_{kind})",
            f"chosen_{kind} = Where (is_{kind}, activated_{kind}, chosen_{before})",
        ]
    nodes.append(f"activated = Identity (chosen_{used[-1]})")
    return "\n        ".join(nodes)


def _expert_nodes(attributes: Mapping[str, Any]) -> str:
    """Nodes from ``routed [n, H]`` to ``result [n, H]`` of the expert of this turn."""
    from deepstitch.plugins.common.linear_function import linear_nodes

    def linear(matrix: str, x: str, output: str) -> str:
        integer = attributes["weight_format"] in INTEGER_FORMATS
        nodes = f"{matrix}_matrix = Gather ({matrix}, expert)\n"
        nodes += f"        {matrix}_matrix_scales = Gather ({matrix}_scales, expert)\n" if integer else ""
        return nodes + linear_nodes(
            f"{matrix}_linear",
            x=x,
            weight=f"{matrix}_matrix",
            scales=f"{matrix}_matrix_scales",
            output=output,
            weight_format=attributes["weight_format"],
            block_size=attributes["block_size"],
        )

    activation = _activation_nodes(activation_of(attributes), bool(attributes["gated"]))
    return "\n        ".join(
        [linear("gate_up", "routed", "projected"), activation, linear("down", "activated", "result")]
    )


def _function(attributes: Mapping[str, Any]) -> onnx.FunctionProto:
    from deepstitch.plugins.common.linear_function import parse_function

    parts = {
        "INPUTS": ", ".join(spec.name for spec in _inputs(attributes)),
        "KINDS": ", ".join(str(kind) for kind in activation_of(attributes)),
        "TOP_K": str(attributes["top_k"]),
        "WEIGHTS": _NORMALIZED if attributes["norm_topk_prob"] else "weights = Identity (top)",
        "EXPERT": _expert_nodes(attributes),
    }
    text = _BODY
    for placeholder, value in parts.items():
        text = text.replace(placeholder, value)
    return parse_function(text)


SCHEMA = OpSchema(
    name="MoEExperts",
    attributes=(
        Attribute(name="top_k", kind="int", required=True, doc="experts of a token, 1 to 16"),
        Attribute(name="norm_topk_prob", kind="int", required=True, choices=(0, 1), doc="a token's weights sum to 1"),
        Attribute(name="weight_format", kind="string", required=True, choices=FORMATS, doc="of gate_up and down"),
        Attribute(name="block_size", kind="int", default=0, choices=BLOCKS, doc="integer formats: weights to a scale"),
        Attribute(name="num_experts", kind="int", required=True, doc="E, 1 to 256"),
        Attribute(name="intermediate_size", kind="int", required=True, doc="I"),
        Attribute(name="activations", kind="ints", default=[0], doc="one for all experts, or one for each"),
        Attribute(name="gated", kind="int", default=1, choices=(0, 1), doc="gate_up holds up rows too: G = 2"),
    ),
    inputs=_inputs,
    outputs=_outputs,
    function=_function,
)
