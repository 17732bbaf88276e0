"""A chaos report complains of what took too long."""

from __future__ import annotations

import pytest

pytest.importorskip("msgspec")


def test_medians_are_held_against_their_targets():
    from benchmarks.chaos import TARGETS, too_slow

    good = {name: {"median": target * 0.9, "max": target * 9, "count": 3} for name, target in TARGETS.items()}
    assert too_slow(good) == []
    assert too_slow({}) == []
    for name, target in TARGETS.items():
        (complaint,) = too_slow({**good, name: {"median": target * 1.1, "max": target * 2, "count": 3}})
        assert complaint.startswith(f"{name}: ") and f"the target is {target:g} s" in complaint
