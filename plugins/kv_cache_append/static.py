"""What the machine code of KVCacheAppend's kernels must show: see ``plugins/build/static_checks.py``."""

from __future__ import annotations

from deepstitch.plugins.build.static_checks import Expect

__all__ = ["EXPECTED"]

# Every thread of a multiprocessor is in use. The copy has its four wide loads outside of any loop.
EXPECTED = {
    "kv_cache_append_copy": Expect(min_blocks_per_sm=8),
    "kv_cache_append_*_scalar": Expect(min_blocks_per_sm=16),
    "kv_cache_append_*": Expect(min_blocks_per_sm=16, wide_loads=True),
}
