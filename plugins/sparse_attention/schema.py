"""What SparseAttention takes and gives. The mathematics is in README.md, the ONNX definition in function.py.

Which keys a query sees, in this order; what no query of a tile sees is never read:

1. mode causal: key j of its batch row iff ``j <= past_lengths[b] + s``, where s counts the new tokens; rows ``s >=
   query_lengths[b]`` are zero. mode segment: the keys of its own segment, on both sides; a token of no segment gives
   zeros. Positions and blocks are counted from the beginning of the batch row or segment.
2. pattern window: of these, j with ``position - window < j`` (segment: ``|position - j| < window``) or ``j < sink``.
3. patterns layout and dynamic: of these, the keys of the blocks kept for the query's block. Key block n holds the
   positions ``n * block_size …``. Query block n of mode causal holds the **new tokens** ``s = n * block_size …`` of
   this call, wherever they lie in the cache: in decode it is the new token alone. In mode segment query and key
   blocks are the same. All query heads of a kv head share the blocks kept.

   * layout: a block is kept iff its number is not 0, and nothing else is kept: a row may see no key and be zero.
   * dynamic: candidates are the key blocks up to the one that holds the query block's last position (segment: all of
     the segment). Kept are the first block, the blocks that hold positions of the query block (in causal mode two if
     the past ends within a block), and of the others those of highest score, ``top_n`` in all; the blocks always kept
     count, and are kept even where they are more than ``top_n``. Of equal scores the lower block wins. The score is
     the mean query of the query block (over its valid tokens and the heads of the kv head) times the mean key of the
     key block (over the keys that exist), or with gate = 1 the number in ``gate_scores``; NaN is the lowest. With
     has_pooled_keys = 1 the mean keys are the input ``pooled_keys``, which whoever fills the cache keeps; rows of
     blocks that are no candidates or always kept may hold anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from deepstitch.plugins.common.schema import Attribute, OpSchema, TensorSpec

if TYPE_CHECKING:
    import onnx

__all__ = ["HEAD_DIMS", "KV_FORMATS", "PATTERNS", "SCHEMA"]

HEAD_DIMS = (64, 72, 80, 96, 128)
KV_FORMATS = ("float32", "float16", "int8")
PATTERNS = ("dense", "window", "layout", "dynamic")
_FLOAT, _INT = ("float32",), ("int32",)


def _causal_inputs(kv_format: str) -> list[TensorSpec]:
    specs = [TensorSpec(name="query", dtypes=_FLOAT, shape="[B, S, num_heads*D]")]
    specs += [
        TensorSpec(name=name, dtypes=(kv_format,), shape="[B, kv_num_heads, C, D]")
        for name in ("key_cache", "value_cache")
    ]
    if kv_format == "int8":
        specs += [
            TensorSpec(name=name, dtypes=_FLOAT, shape="[B, kv_num_heads, C]")
            for name in ("key_scales", "value_scales")
        ]
    return specs + [TensorSpec(name=name, dtypes=_INT, shape="[B]") for name in ("past_lengths", "query_lengths")]


def _segment_inputs() -> list[TensorSpec]:
    return [
        TensorSpec(name="query", dtypes=_FLOAT, shape="[P, num_heads*D]"),
        TensorSpec(name="key", dtypes=_FLOAT, shape="[P, kv_num_heads*D]"),
        TensorSpec(name="value", dtypes=_FLOAT, shape="[P, kv_num_heads*D]"),
        TensorSpec(name="cu_seqlens", dtypes=_INT, shape="[N + 1]"),
    ]


def _inputs(attributes: Mapping[str, Any]) -> tuple[TensorSpec, ...]:
    causal = attributes["mode"] == "causal"
    specs = _causal_inputs(attributes["kv_format"]) if causal else _segment_inputs()
    blocks = f"[{'B' if causal else 'N'} or 1, kv_num_heads or 1, query blocks, key blocks]"
    if attributes["pattern"] == "layout":
        specs.append(TensorSpec(name="layout", dtypes=_INT, shape=blocks))
    if attributes["gate"]:
        specs.append(TensorSpec(name="gate_scores", dtypes=_FLOAT, shape=blocks))
    if attributes["has_pooled_keys"]:
        specs.append(TensorSpec(name="pooled_keys", dtypes=_FLOAT, shape="[B, kv_num_heads, key blocks, D]"))
    return tuple(specs)


def _outputs(attributes: Mapping[str, Any]) -> tuple[TensorSpec, ...]:
    del attributes
    return (TensorSpec(name="output", dtypes=_FLOAT, shape="as query"),)


def _function(attributes: Mapping[str, Any]) -> onnx.FunctionProto:
    from deepstitch.plugins.sparse_attention.function import definition

    return definition(attributes, [spec.name for spec in _inputs(attributes)])


SCHEMA = OpSchema(
    name="SparseAttention",
    attributes=(
        Attribute(name="num_heads", kind="int", required=True, doc="query heads, a multiple of kv_num_heads"),
        Attribute(name="kv_num_heads", kind="int", required=True, doc="key and value heads"),
        Attribute(name="head_dim", kind="int", required=True, doc="D: 64, 72, 80, 96 or 128"),
        Attribute(name="scale", kind="float", required=True, doc="of the scores, usually 1 / sqrt(D)"),
        Attribute(name="mode", kind="string", default="causal", choices=("causal", "segment")),
        Attribute(name="kv_format", kind="string", default="float32", choices=KV_FORMATS, doc="segment: float32"),
        Attribute(name="pattern", kind="string", default="dense", choices=PATTERNS),
        Attribute(name="window", kind="int", default=0, doc="window: keys up to the query's own that it sees"),
        Attribute(name="sink", kind="int", default=0, doc="window: first keys that every query sees"),
        Attribute(name="block_size", kind="int", default=0, choices=(0, 64, 128), doc="layout and dynamic"),
        Attribute(name="top_n", kind="int", default=0, doc="dynamic: key blocks kept per query block"),
        Attribute(name="gate", kind="int", default=0, choices=(0, 1), doc="dynamic: scores are an input"),
        Attribute(
            name="has_pooled_keys", kind="int", default=0, choices=(0, 1), doc="dynamic, causal: mean keys are an input"
        ),
    ),
    inputs=_inputs,
    outputs=_outputs,
    function=_function,
)
