"""MoEExperts to operators that have CUDA kernels of fp32 on every card."""

from __future__ import annotations

import onnx_ir as ir

from deepstitch.export.functions import DOMAIN, parse_functions
from deepstitch.export.quantize.stored import QuantizedWeight
from deepstitch.export.weights import WeightPlan

__all__ = ["MoEToCuda"]

# A weight of zero may stand for "not chosen": it would add zero.
_EXPERTS = """
LoopedExperts <top_k, norm_topk_prob> (x, router_logits, MATRICES, one_token, shape) => (output)
{
    first = Constant <value_ints = [0]> ()
    second = Constant <value_ints = [1]> ()
    last_axis = Constant <value_ints = [-1]> ()
    nothing = Constant <value_float = 0.0> ()
    tokens_shape = Constant <value_ints = [-1, HIDDEN]> ()
    logits_shape = Constant <value_ints = [-1, EXPERTS]> ()
    tokens = Reshape (x, tokens_shape)
    logits = Reshape (router_logits, logits_shape)
    top_k = Constant <value_ints = [TOP_K]> ()
    WEIGHTS
    MIXED
    output = Reshape (mixed, shape)
}
"""

# By norm_topk_prob; the softmax of the chosen is what their probabilities are among each other.
_WEIGHTS = (
    """
    probabilities = Softmax <axis = -1> (logits)
    weights, chosen = TopK <axis = -1> (probabilities, top_k)
""",
    """
    top, chosen = TopK <axis = -1> (logits, top_k)
    weights = Softmax <axis = -1> (top)
""",
)

# The chosen matrices of one token, side by side.
_BATCHED = """
    mixed = If (one_token) <
        then_branch = together () => (float[n, h] mixed_together)
        {
            chosen_1d = Reshape (chosen, last_axis)
            gate_up_matrices = Gather <axis = 0> (gate_up_proj, chosen_1d)
            HALF:tokens_read = Cast <to = 10> (tokens)
            gate_up_read = MatMul (tokens_READ, gate_up_matrices)
            HALF:gate_up_wide = Cast <to = 1> (gate_up_read)
            gate_1, up_1 = Split <axis = -1> (gate_up_WIDE)
            silu_1 = com.microsoft.QuickGelu <alpha = 1.0> (gate_1)
            activated_1 = Mul (silu_1, up_1)
            HALF:activated_1_read = Cast <to = 10> (activated_1)
            down_matrices = Gather <axis = 0> (down_proj, chosen_1d)
            results_read = MatMul (activated_1_READ, down_matrices)
            HALF:results_wide = Cast <to = 1> (results_read)
            results = Squeeze (results_WIDE, second)
            mixed_together = MatMul (weights, results)
        },
        else_branch = apart () => (float[n, h] mixed_apart)
        {
            LOOP
        }
    >
"""
_FLOAT_EXPERT = """
                gate_up_matrix = Gather <axis = 0> (gate_up_proj, expert)
                HALF:routed_read = Cast <to = 10> (routed)
                gate_up_read = MatMul (routed_READ, gate_up_matrix)
                HALF:gate_up_wide = Cast <to = 1> (gate_up_read)
                gate, up = Split <axis = -1> (gate_up_WIDE)
                silu = com.microsoft.QuickGelu <alpha = 1.0> (gate)
                activated = Mul (silu, up)
                HALF:activated_read = Cast <to = 10> (activated)
                down_matrix = Gather <axis = 0> (down_proj, expert)
                result_read = MatMul (activated_READ, down_matrix)
                HALF:result_wide = Cast <to = 1> (result_read)
"""
_INTEGER_EXPERT = """
                gate_up_matrix = Gather <axis = 0> (gate_up_proj, expert)
                gate_up_steps = Gather <axis = 0> (gate_up_scales, expert)
                GATE_UP_ZEROS
                gate_up = com.microsoft.MatMulNBits <K = HIDDEN, N = BOTH, bits = BITS, block_size = GATE_UP_BLOCK>
                    (routed, gate_up_matrix, gate_up_steps GATE_UP_MIDDLE)
                gate, up = Split <axis = -1> (gate_up)
                silu = com.microsoft.QuickGelu <alpha = 1.0> (gate)
                activated = Mul (silu, up)
                down_matrix = Gather <axis = 0> (down_proj, expert)
                down_steps = Gather <axis = 0> (down_scales, expert)
                DOWN_ZEROS
                result_WIDE = com.microsoft.MatMulNBits <K = INNER, N = HIDDEN, bits = BITS, block_size = DOWN_BLOCK>
                    (activated, down_matrix, down_steps DOWN_MIDDLE)
"""

# Each expert that any token chose sees those tokens. An expert's matrix is copied out of the stack before it is read.
_LOOP = """
            no_weights = Mul (logits, nothing)
            by_expert = ScatterElements <axis = 1> (no_weights, chosen, weights)
            largest = ReduceMax <axes = [0], keepdims = 0> (by_expert)
            wanted = NonZero (largest)
            active = Reshape (wanted, last_axis)
            num_active = Size (active)
            keep_going = Constant <value = bool {1}> ()
            none_yet = Mul (tokens, nothing)
            OUTPUT = Loop (num_active, keep_going, none_yet) <body = one_expert
                (int64 turn, bool condition, float[n, h] mixed_in) => (bool condition_out, float[n, h] mixed_out)
            {
                condition_out = Identity (condition)
                expert = Gather <axis = 0> (active, turn)
                token_weight = Gather <axis = 1> (by_expert, expert)
                found = NonZero (token_weight)
                rows = Transpose <perm = [1, 0]> (found)
                routed = GatherND (tokens, rows)
                EXPERT
                row_weight = Gather <axis = 0> (token_weight, rows)
                weighted = Mul (result_WIDE, row_weight)
                mixed_out = ScatterND <reduction = "add"> (mixed_in, rows, weighted)
            }>
"""


class MoEToCuda(ir.passes.InPlacePass):
    """``deepstitch.MoEExperts`` becomes a loop over the experts that were chosen.

    ONNX Runtime's own MoE operator knows no card below compute capability 7.0, and QMoE no fp32.

    1. Each turn takes the tokens of one expert, multiplies, and adds to the rows of its tokens. The tokens of an expert
       are found on the GPU; their number goes to the CPU, which makes the loop wait.
    2. A single token takes its chosen matrices together, without a loop.
    3. fp16 weights are multiplied in fp16, between casts.
    4. Integer weights are MatMulNBits'; they have the loop only, because it takes one matrix.

    The body is a function; inlining it is another pass.

    Ensures: no MoEExperts node is left.
    """

    def __init__(self, plan: WeightPlan) -> None:
        super().__init__()
        self.plan = plan

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite ``model`` in place."""
        nodes = [node for node in model.graph if (node.domain, node.op_type) == (DOMAIN, "MoEExperts")]
        if not nodes:
            return ir.passes.PassResult(model, False)
        shared = _shared_inputs(model.graph, nodes[0])
        texts: dict[str, str] = {}
        for node in nodes:
            text, matrices = self._expert(model.graph, node)
            name = next((known for known, other in texts.items() if other == text), f"LoopedExperts{len(texts)}")
            texts[name] = text
            node.op_type = name
            inputs = [*node.inputs[:2], *matrices, *shared]
            node.resize_inputs(len(inputs))
            for index, value in enumerate(inputs):
                node.replace_input_with(index, value)
        bodies = [text.replace("LoopedExperts", name, 1) for name, text in texts.items()]
        for proto in parse_functions(bodies, com_microsoft=1).values():
            function = ir.serde.deserialize_function(proto)
            model.functions[function.identifier()] = function
        model.graph.opset_imports["com.microsoft"] = 1
        return ir.passes.PassResult(model, True)

    def ensures(self, model: ir.Model) -> None:
        """Check that every MoEExperts node was replaced."""
        if any(node.op_type == "MoEExperts" for node in model.graph):
            raise ir.passes.PostconditionError("a MoEExperts node is left")

    def _expert(self, graph: ir.Graph, node: ir.Node) -> tuple[str, list[ir.Value]]:
        """The function of a node, and the matrices it reads."""
        _, _, gate_up, down = node.inputs
        assert gate_up is not None and down is not None and gate_up.shape is not None
        experts, hidden, both = gate_up.shape.numpy()
        integers = self._integers(gate_up), self._integers(down)
        if integers[0] is not None and integers[1] is not None:
            text, matrices = self._integer_text(graph, integers[0], integers[1])
        else:
            half = self.plan.dtype(gate_up) == "F16"
            text = _EXPERTS.replace("MIXED", _BATCHED.replace("LOOP", _LOOP.replace("EXPERT\n", f"{_FLOAT_EXPERT}\n")))
            text = text.replace("OUTPUT", "mixed_apart").replace("MATRICES", "gate_up_proj, down_proj")
            text = _with_casts(text) if half else _without_casts(text)
            matrices = [_as_stored(graph, each, node) if half else each for each in (gate_up, down)]
        text = text.replace("WEIGHTS", _WEIGHTS[node.attributes.get_int("norm_topk_prob")])
        top_k = node.attributes.get_int("top_k")
        sizes = {"HIDDEN": hidden, "EXPERTS": experts, "BOTH": both, "INNER": both // 2, "TOP_K": top_k}
        for name, value in sizes.items():
            text = text.replace(name, str(value))
        return text, matrices

    def _integers(self, value: ir.Value) -> QuantizedWeight | None:
        """The integers behind ``Transpose(DequantizeLinear(W))``."""
        transpose = value.producer()
        dequantized = transpose.inputs[0] if transpose is not None and transpose.op_type == "Transpose" else None
        dequantize = dequantized.producer() if dequantized is not None else None
        if dequantize is None or dequantize.op_type != "DequantizeLinear":
            return None
        return self.plan.quantized(dequantize.inputs[0])

    def _integer_text(
        self, graph: ir.Graph, gate_up: QuantizedWeight, down: QuantizedWeight
    ) -> tuple[str, list[ir.Value]]:
        expert, names, matrices = _INTEGER_EXPERT, list[str](), list[ir.Value]()
        for name, weight in (("gate_up", gate_up), ("down", down)):
            values = self.plan.add_quantized(weight, "nbits", graph)
            names += [f"{name}_proj", f"{name}_scales", f"{name}_zeros"][: len(values)]
            matrices += values
            zeros = f"{name}_points = Gather <axis = 0> ({name}_zeros, expert)" if len(values) > 2 else ""
            expert = expert.replace(f"{name.upper()}_ZEROS", zeros)
            expert = expert.replace(f"{name.upper()}_MIDDLE", f", {name}_points" if zeros else "")
            expert = expert.replace(f"{name.upper()}_BLOCK", str(weight.stored.block))
        expert = expert.replace("BITS", str(gate_up.stored.bits))
        text = _EXPERTS.replace("MIXED", _LOOP.replace("EXPERT\n", f"{expert}\n").replace("OUTPUT", "mixed"))
        return _without_casts(text).replace("MATRICES", ", ".join(names)), matrices


def _shared_inputs(graph: ir.Graph, first: ir.Node) -> tuple[ir.Value, ir.Value]:
    """Whether the call adds one token to one row, computed on the GPU where its inputs are; and the tokens' shape."""
    position_ids = next(value for value in graph.inputs if value.name == "position_ids")
    zero, one = (ir.node("Constant", [], {"value_int": number}) for number in (0, 1))
    axes = ir.node("Constant", [], {"value_ints": [0, 1]})
    temporal = ir.node("Gather", [position_ids, zero.outputs[0]], {"axis": 0})
    nothing = ir.node("Sub", [temporal.outputs[0], temporal.outputs[0]])
    ones = ir.node("Add", [nothing.outputs[0], one.outputs[0]])
    count = ir.node("ReduceSum", [ones.outputs[0], axes.outputs[0]], {"keepdims": 0})
    single = ir.node("Equal", [count.outputs[0], one.outputs[0]])
    shape = ir.node("Shape", [first.inputs[0]])
    graph.insert_before(first, (zero, one, axes, temporal, nothing, ones, count, single, shape))
    return single.outputs[0], shape.outputs[0]


def _as_stored(graph: ir.Graph, value: ir.Value, before: ir.Node) -> ir.Value:
    """A weight as fp16; see :class:`deepstitch.export.passes.linear_to_half.LinearToHalf`."""
    cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT16})
    graph.insert_before(before, cast)
    return cast.outputs[0]


def _with_casts(text: str) -> str:
    return text.replace("HALF:", "").replace("_READ", "_read").replace("_WIDE", "_wide")


def _without_casts(text: str) -> str:
    lines = [line for line in text.splitlines() if not line.strip().startswith("HALF:")]
    text = "\n".join(lines)
    for name in ("gate_up", "results", "result"):
        text = text.replace(f"{name}_WIDE", f"{name}_read")
    return text.replace("_READ", "")
