"""What the kernels promise on sm_61; held against their code by deepstitch.plugins.build.static_checks."""

from __future__ import annotations

from collections.abc import Mapping

from deepstitch.plugins.build.static_checks import Expect

__all__ = ["EXPECTED"]

EXPECTED: Mapping[str, Expect] = {
    "*_decode_int?_1": Expect(min_blocks_per_sm=3, dp4a=True, wide_loads=True),
    "*_decode_int?_8": Expect(min_blocks_per_sm=2, dp4a=True, wide_loads=True),
    "*_decode_float??_1": Expect(min_blocks_per_sm=3, wide_loads=True),
    "*_decode_float??_8": Expect(min_blocks_per_sm=2, wide_loads=True),
    "*_prefill_int?_32": Expect(min_blocks_per_sm=4, dp4a=True, wide_loads=True),
    "*_prefill_int?_64": Expect(min_blocks_per_sm=3, dp4a=True, wide_loads=True),
    "*_prefill_float??_32": Expect(min_blocks_per_sm=5, wide_loads=True),
    "*_prefill_float??_64": Expect(min_blocks_per_sm=4, wide_loads=True),
    "moe_experts_combine": Expect(min_blocks_per_sm=4, wide_loads=True),
    "moe_experts_plan": Expect(min_blocks_per_sm=6),
    "moe_experts_route": Expect(min_blocks_per_sm=6),
    "moe_experts_*": Expect(min_blocks_per_sm=8),
}
