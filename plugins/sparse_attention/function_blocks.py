"""The part of SparseAttention's definition that keeps key blocks: patterns layout and dynamic.

From ``in_reach`` to ``visible``, both bool ``[B, kv_num_heads or 1, 1, queries, keys]``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["block_nodes"]

# kept [B or 1, kv heads or 1, query blocks, key blocks] to [.., 1, S, C]
_CAUSAL_BLOCKS = """
    query_block_of = Div (step, block)
    key_block_of = Div (slot, block)
    kept_rows = Gather <axis = 2> (kept, query_block_of)
    kept_keys = Gather <axis = 3> (kept_rows, key_block_of)
    kept_5d = Unsqueeze (kept_keys, axis_2)
    visible = And (in_reach, kept_5d)
"""

_CAUSAL_LAYOUT = """
    kept = Cast <to = 9> (layout)
"""

_CAUSAL_COUNTS = """
    one_block = Sub (block, one)
    query_blocks_up = Add (tokens, one_block)
    query_blocks = Div (query_blocks_up, block)
    key_blocks_up = Add (capacity, one_block)
    key_blocks = Div (key_blocks_up, block)
    query_block = Range (zero, query_blocks, one)
    key_block = Range (zero, key_blocks, one)
"""

# Means by products with 0/1 matrices: which token lies in which block.
_CAUSAL_MEAN_KEY = """
    filled = Add (past_column, new_column)
    slot_row = Unsqueeze (slot, axis_0)
    exists_2d = Less (slot_row, filled)
    exists = Unsqueeze (exists_2d, axes_1_3)
    key_there = Where (exists, key4, nothing)
    key_block_of_slot = Div (slot, block)
    key_block_column = Unsqueeze (key_block, axis_1)
    in_key_block = Equal (key_block_column, key_block_of_slot)
    exists_row = Unsqueeze (exists_2d, axis_1)
    key_member_3d = And (in_key_block, exists_row)
    key_member_bool = Unsqueeze (key_member_3d, axis_1)
    key_member = Cast <to = 1> (key_member_bool)
    key_sums = MatMul (key_member, key_there)
    key_count_or_0 = ReduceSum <keepdims = 1> (key_member, axis_3)
    key_count = Max (key_count_or_0, one_float)
    mean_key = Div (key_sums, key_count)
"""

_CAUSAL_GIVEN_MEAN_KEY = """
    mean_key = Identity (pooled_keys)
"""

_CAUSAL_POOLED = """
    query_sum_heads = ReduceSum <keepdims = 0> (query5, axis_2)
    is_query_4d = Unsqueeze (is_query, axis_1)
    query_there = Where (is_query_4d, query_sum_heads, nothing)
    query_block_of_step = Div (step, block)
    query_block_column = Unsqueeze (query_block, axis_1)
    in_query_block = Equal (query_block_column, query_block_of_step)
    is_query_row = Unsqueeze (is_query_rows, axis_1)
    query_member_3d = And (in_query_block, is_query_row)
    query_member_bool = Unsqueeze (query_member_3d, axis_1)
    query_member = Cast <to = 1> (query_member_bool)
    query_sums = MatMul (query_member, query_there)
    query_count_or_0 = ReduceSum <keepdims = 1> (query_member, axis_3)
    query_count_some = Max (query_count_or_0, one_float)
    group_size = Constant <value_float = GROUP.0> ()
    query_count = Mul (query_count_some, group_size)
    mean_query = Div (query_sums, query_count)
    mean_key_columns = Transpose <perm = [0, 1, 3, 2]> (mean_key)
    block_scores = MatMul (mean_query, mean_key_columns)
"""

_CAUSAL_GATE = """
    batch_1d = Shape <start = 0, end = 1> (query)
    kv_heads_1d = Constant <value_ints = [KV_HEADS]> ()
    query_blocks_1d = Unsqueeze (query_blocks, axis_0)
    key_blocks_1d = Unsqueeze (key_blocks, axis_0)
    gate_shape = Concat <axis = 0> (batch_1d, kv_heads_1d, query_blocks_1d, key_blocks_1d)
    gate_is_nan = IsNaN (gate_scores)
    gate_numbers = Where (gate_is_nan, lowest, gate_scores)
    block_scores = Expand (gate_numbers, gate_shape)
"""

_CAUSAL_DYNAMIC = """
    block_begin = Mul (query_block, block)
    after_begin = Sub (new_column, block_begin)
    after_begin_some = Max (after_begin, zero)
    queries_in_block = Min (after_begin_some, block)
    first_position = Add (past_column, block_begin)
    after_last_position = Add (first_position, queries_in_block)
    last_position = Sub (after_last_position, one)
    first_diagonal_2d = Div (first_position, block)
    last_diagonal_2d = Div (last_position, block)
    has_queries_2d = Greater (queries_in_block, zero)
    first_diagonal = Unsqueeze (first_diagonal_2d, axes_1_3)
    last_diagonal = Unsqueeze (last_diagonal_2d, axes_1_3)
    has_queries = Unsqueeze (has_queries_2d, axes_1_3)
    not_later = LessOrEqual (key_block, last_diagonal)
    is_candidate = And (not_later, has_queries)
    is_diagonal = GreaterOrEqual (key_block, first_diagonal)
    is_first = Equal (key_block, zero)
    is_special = Or (is_diagonal, is_first)
    always = And (is_candidate, is_special)
    block_index = Identity (key_block)
    num_blocks_1d = Unsqueeze (key_blocks, axis_0)
"""

# The first top_n by score; TopK gives the lower index first where scores are equal.
_TOP = """
    candidate_scores = Where (is_candidate, block_scores, below_all)
    ranked = Where (always, highest, candidate_scores)
    top_count = Min (top_n_1d, num_blocks_1d)
    top_scores, top_index = TopK <axis = 3> (ranked, top_count)
    top_column = Unsqueeze (top_index, axis_4)
    is_top_each = Equal (top_column, block_index)
    is_top_float = Cast <to = 1> (is_top_each)
    times_top = ReduceSum <keepdims = 0> (is_top_float, axis_3)
    is_top = Greater (times_top, nothing)
    is_chosen = Or (is_top, always)
    kept = And (is_candidate, is_chosen)
"""

# A block of segment tokens is known by its first token: first_of [P].
_SEGMENT_BLOCKS = """
    local_block = Div (local, block)
    block_begin = Mul (local_block, block)
    first_of = Add (begin, block_begin)
"""

# TENSOR [N or 1, kv heads or 1, query blocks, key blocks] for every pair of tokens: [1, kv heads or 1, P, P]
_SEGMENT_GIVEN = """
    given_shape = Shape (TENSOR)
    given_last = Sub (given_shape, one)
    last_row = Gather (given_last, zero)
    axis_two = Constant <value_int = 2> ()
    axis_three = Constant <value_int = 3> ()
    last_query_block = Gather (given_last, axis_two)
    last_key_block = Gather (given_last, axis_three)
    segment_or_less = Sub (started, one)
    segment_or_0 = Max (segment_or_less, zero)
    segment = Min (segment_or_0, last_row)
    query_block = Min (local_block, last_query_block)
    key_block = Min (local_block, last_key_block)
    segment_column = Unsqueeze (segment, axis_1)
    query_block_column = Unsqueeze (query_block, axis_1)
    pairs = Concat <axis = 0> (tokens_1d, tokens_1d)
    segment_pairs = Expand (segment_column, pairs)
    query_pairs = Expand (query_block_column, pairs)
    key_pairs = Expand (key_block, pairs)
    segment_last = Unsqueeze (segment_pairs, axis_2)
    query_last = Unsqueeze (query_pairs, axis_2)
    key_last = Unsqueeze (key_pairs, axis_2)
    places = Concat <axis = 2> (segment_last, query_last, key_last)
    by_place = Transpose <perm = [0, 2, 3, 1]> (TENSOR)
    picked = GatherND (by_place, places)
    picked_heads = Transpose <perm = [2, 0, 1]> (picked)
    given = Unsqueeze (picked_heads, axis_0)
    query_is_there = LessOrEqual (local_block, last_query_block)
    key_is_there = LessOrEqual (local_block, last_key_block)
    query_is_there_column = Unsqueeze (query_is_there, axis_1)
    is_given = And (query_is_there_column, key_is_there)
"""

_SEGMENT_LAYOUT = """
    is_set = Cast <to = 9> (given)
    kept_pairs = And (is_set, is_given)
    kept_5d = Unsqueeze (kept_pairs, axis_2)
    visible = And (in_reach, kept_5d)
"""

# scores_heads [1, kv heads or 1, P, P]: of the blocks that two tokens lie in
_SEGMENT_POOLED = """
    first_column = Unsqueeze (first_of, axis_1)
    same_block = Equal (first_column, first_of)
    member = Cast <to = 1> (same_block)
    block_count = ReduceSum <keepdims = 1> (member, axis_1)
    query_mean_heads = ReduceMean <keepdims = 0> (query5, axis_2)
    query_sums = MatMul (member, query_mean_heads)
    key_sums = MatMul (member, key4)
    mean_query = Div (query_sums, block_count)
    mean_key = Div (key_sums, block_count)
    mean_key_columns = Transpose <perm = [0, 1, 3, 2]> (mean_key)
    block_scores = MatMul (mean_query, mean_key_columns)
"""

_SEGMENT_GATE = """
    kv_heads_1d = Constant <value_ints = [KV_HEADS]> ()
    gate_is_nan = IsNaN (given)
    gate_numbers = Where (gate_is_nan, lowest, given)
    gate_there = Where (is_given, gate_numbers, lowest)
    gate_shape = Concat <axis = 0> (axis_1, kv_heads_1d, tokens_1d, tokens_1d)
    block_scores = Expand (gate_there, gate_shape)
"""

# Of the tokens of a block, the first stands for it.
_SEGMENT_DYNAMIC = """
    stands = Equal (first_of, slot)
    is_candidate = And (own_segment, stands)
    own_first = Unsqueeze (first_of, axis_1)
    is_diagonal = Equal (own_first, first_of)
    is_first = Equal (local, zero)
    is_special = Or (is_diagonal, is_first)
    always = And (is_candidate, is_special)
    block_index = Identity (slot)
    num_blocks_1d = Identity (tokens_1d)
"""

_SEGMENT_SPREAD = """
    kept_pairs = Gather <axis = 3> (kept, first_of)
    kept_5d = Unsqueeze (kept_pairs, axis_2)
    visible = And (in_reach, kept_5d)
"""


def block_nodes(attributes: Mapping[str, Any]) -> str:
    """The nodes for these attributes (resolved)."""
    causal, layout, gate = attributes["mode"] == "causal", attributes["pattern"] == "layout", attributes["gate"]
    if causal and layout:
        return _CAUSAL_LAYOUT + _CAUSAL_BLOCKS
    if causal:
        mean_key = _CAUSAL_GIVEN_MEAN_KEY if attributes["has_pooled_keys"] else _CAUSAL_MEAN_KEY
        scores = _CAUSAL_GATE if gate else mean_key + _CAUSAL_POOLED
        return _CAUSAL_COUNTS + scores + _CAUSAL_DYNAMIC + _TOP + _CAUSAL_BLOCKS
    if layout:
        return _SEGMENT_BLOCKS + _SEGMENT_GIVEN.replace("TENSOR", "layout") + _SEGMENT_LAYOUT
    given = _SEGMENT_GIVEN.replace("TENSOR", "gate_scores") + _SEGMENT_GATE
    return _SEGMENT_BLOCKS + (given if gate else _SEGMENT_POOLED) + _SEGMENT_DYNAMIC + _TOP + _SEGMENT_SPREAD
