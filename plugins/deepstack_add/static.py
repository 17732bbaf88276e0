"""What the machine code of DeepStackAdd's kernels must show: see ``plugins/build/static_checks.py``."""

from __future__ import annotations

from deepstitch.plugins.build.static_checks import Expect

__all__ = ["EXPECTED"]

# Every thread of a multiprocessor is in use. Loads are 16 bytes wide, but there is no loop around them.
EXPECTED = {"deepstack_add_*": Expect(min_blocks_per_sm=16)}
