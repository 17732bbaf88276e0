"""What the kernels promise on sm_61; held against their code by deepstitch.plugins.build.static_checks.

Dynamic shared memory is the largest a launch asks for: decode at head_dim 128, the selection at 8192 key blocks (at
32768 keys in blocks of 64 it is 2560 bytes, and 10 blocks fit).
"""

from __future__ import annotations

from collections.abc import Mapping

from deepstitch.plugins.build.static_checks import Expect

__all__ = ["EXPECTED"]

EXPECTED: Mapping[str, Expect] = {
    "*_decode_*_r4": Expect(min_blocks_per_sm=4, dynamic_shared=20496, wide_loads=True),
    "*_decode_*_r8": Expect(min_blocks_per_sm=3, dynamic_shared=23584, wide_loads=True),
    "*_decode_*_r16": Expect(min_blocks_per_sm=2, dynamic_shared=29760, wide_loads=True),
    "*_prefill_*": Expect(min_blocks_per_sm=2, wide_loads=True),
    "*_pool_keys_float32": Expect(min_blocks_per_sm=8, wide_loads=True),
    "*_pool_keys_*": Expect(min_blocks_per_sm=8),  # 8 or 4 bytes a load, a warp's side by side
    "*_pool_queries": Expect(min_blocks_per_sm=10, wide_loads=True),
    "*_select": Expect(min_blocks_per_sm=2, dynamic_shared=40960, wide_loads=True),
    "*_merge": Expect(min_blocks_per_sm=9, wide_loads=True),
    "*_layout": Expect(min_blocks_per_sm=11, dynamic_shared=8192),
}
