"""What the machine code of RMSNormRope's kernels must show: see ``plugins/build/static_checks.py``."""

from __future__ import annotations

from deepstitch.plugins.build.static_checks import Expect

__all__ = ["EXPECTED"]

# A row of 2048 floats in shared memory leaves room for half of the threads; a head's angles are reduced in double
# precision, a few instructions for each pair of a token. The rope kernels load 16 bytes at a time too, but outside of
# loops.
EXPECTED = {
    "rms_norm_rope_norm_*_scalar": Expect(min_blocks_per_sm=4, dynamic_shared=8192),
    "rms_norm_rope_norm_*": Expect(min_blocks_per_sm=4, dynamic_shared=8192, wide_loads=True),
    "rms_norm_rope_rope_*": Expect(min_blocks_per_sm=8, double=True),
}
