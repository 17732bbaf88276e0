"""Ownership of blocks: all or nothing, one owner each, and a generation that tells when a block changed hands."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from deepstitch.runtime.disaggregated.blocks import BlockAllocator


def allocator(total: int) -> BlockAllocator:
    return BlockAllocator(np.zeros(total, np.uint64))


def test_all_or_nothing():
    blocks = allocator(5)
    assert blocks.allocate("a", 6) is None
    assert (blocks.free, blocks.owners) == (5, {})
    assert len(blocks.allocate("a", 3)) == 3
    assert blocks.allocate("b", 3) is None
    assert (blocks.free, set(blocks.owners)) == (2, {"a"})
    assert not blocks.generations[sorted(set(range(5)) - set(blocks.owners["a"]))].any()


def test_nothing_is_granted_even_when_all_are_taken():
    blocks = allocator(1)
    blocks.allocate("a", 1)
    assert blocks.allocate("b", 0) == ()
    assert set(blocks.owners) == {"a"}


def test_release_may_come_twice_and_frees_once():
    blocks = allocator(4)
    blocks.allocate("a", 2)
    blocks.allocate("a", 1)
    assert blocks.release("a") == 3
    after = blocks.generations.copy()
    assert blocks.release("a") == blocks.release("nobody") == 0
    np.testing.assert_array_equal(blocks.generations, after)
    granted = blocks.allocate("b", 4)
    assert sorted(granted) == [0, 1, 2, 3], "a block that was freed twice would be granted twice"


def test_generations_are_odd_while_owned_and_never_come_again():
    memory = np.zeros(3, np.uint64)
    blocks = BlockAllocator(memory)
    seen: list[tuple[int, int]] = []
    for _ in range(5):
        granted = blocks.allocate("a", 2)
        assert (memory[list(granted)] % 2 == 1).all(), "in the memory that readers see"
        seen += [(block, int(memory[block])) for block in granted]
        blocks.release("a")
        assert (memory % 2 == 0).all()
    assert max(Counter(seen).values()) == 1


@pytest.mark.parametrize("seed", range(8))
def test_any_sequence_leaves_every_block_with_one_owner_or_none(seed):
    """Against a dictionary from block to owner."""
    order, total = random.Random(seed), 1 + seed * 5
    blocks, model = allocator(total), dict[int, str]()
    before = blocks.generations.copy()
    for _ in range(400):
        owner = f"owner {order.randrange(4)}"
        free = total - len(model)
        if order.random() < 0.6:
            count = order.randrange(total + 2)
            granted = blocks.allocate(owner, count)
            assert (granted is None) == (count > free)
            assert len(granted or ()) == len(set(granted or ())) == (count if count <= free else 0)
            assert not set(granted or ()) & set(model), "a block that has an owner"
            touched = set(granted or ())
            model |= dict.fromkeys(touched, owner)
        else:
            touched = {block for block, whose in model.items() if whose == owner}
            assert blocks.release(owner) == len(touched)
            model = {block: whose for block, whose in model.items() if whose != owner}
        assert blocks.free == total - len(model)
        assert {block: whose for whose, owned in blocks.owners.items() for block in owned} == model
        changed = np.flatnonzero(blocks.generations != before).tolist()
        assert set(changed) == touched and (blocks.generations[changed] - before[changed] == 1).all()
        assert set(np.flatnonzero(blocks.generations % 2).tolist()) == set(model)
        before = blocks.generations.copy()
