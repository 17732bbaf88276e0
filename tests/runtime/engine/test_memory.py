"""Arrays on a device and on the host: rows and pieces of them, the pool, and prompts whose pictures lie on a device."""

from __future__ import annotations

import math
from bisect import bisect_left

import numpy as np
import pytest

from deepstitch.runtime.calls import RowTokens
from deepstitch.runtime.embedding import EmbeddingTable, PromptRows
from deepstitch.runtime.engine import device_memory
from deepstitch.runtime.engine.cuda import OutOfDeviceMemory
from deepstitch.runtime.engine.device_memory import Pool
from deepstitch.runtime.engine.memory import HOST, DeviceArray, RowPieces, to_host
from deepstitch.runtime.kvcache import CacheTensor, KVCache

MIB = 1 << 20


class Device:
    """A device whose memory is one numpy array; addresses are places in it."""

    def __init__(self) -> None:
        self.bytes = np.zeros(1 << 16, np.uint8)
        self.used = 256

    def place(self, values: np.ndarray) -> DeviceArray:
        pointer, self.used = self.used, self.used + values.nbytes
        self.bytes[pointer : self.used] = values.reshape(-1).view(np.uint8)
        return DeviceArray(pointer, values.shape, values.dtype, memory=self, owner=None)

    def duplicate(self, array: DeviceArray) -> DeviceArray:
        return self.place(self.download(array))

    def download(self, array: DeviceArray) -> np.ndarray:
        values = self.bytes[array.pointer : array.pointer + array.nbytes].view(array.dtype).reshape(array.shape)
        return values.copy()


def numbers(*shape: int, start: int = 0) -> np.ndarray:
    return np.arange(start, start + math.prod(shape), dtype=np.float32).reshape(shape)


def test_rows_of_a_device_array() -> None:
    values = numbers(5, 3, 2)
    array = Device().place(values)
    assert (len(array), array.nbytes, array.shape) == (5, values.nbytes, (5, 3, 2))
    for index in (slice(None), slice(1, 4), slice(3, 99), slice(4, 2), slice(-2, None)):
        np.testing.assert_array_equal(to_host(array[index]), values[index])
    np.testing.assert_array_equal(to_host(array[-1]), values[-1])
    np.testing.assert_array_equal(to_host(array[2][1:]), values[2, 1:])
    assert array[1:4][1].owner is array.owner and array[1:4].pointer == array.pointer + 6 * 4
    with pytest.raises(IndexError):
        array[5]
    with pytest.raises(ValueError, match="step of 2"):
        array[::2]


def test_a_copy_is_one() -> None:
    device = Device()
    array = device.place(numbers(4, 2))
    copy = array[1:3].copy()
    device.bytes[array.pointer : array.pointer + array.nbytes] = 0
    np.testing.assert_array_equal(to_host(copy), numbers(4, 2)[1:3])


def test_pieces_by_range_and_by_number() -> None:
    device = Device()
    values = numbers(9, 4)
    pieces = RowPieces([device.place(values[:3]), values[3:4], values[4:4], device.place(values[4:])])
    assert len(pieces) == 9 and len(pieces.pieces) == 3
    for index in (slice(0, 9), slice(2, 5), slice(3, 3), slice(7, 20)):
        found = pieces[index]
        assert len(found) == len(values[index])
        assert not len(found) or np.array_equal(to_host(found), values[index])
    numbered = pieces[np.array([0, 1, 2, 5, 6, 8])]
    np.testing.assert_array_equal(to_host(numbered), values[[0, 1, 2, 5, 6, 8]])
    assert [len(each) for each in numbered.pieces] == [3, 2, 1], "what follows each other stays together"
    assert len(pieces[np.zeros(0, np.int64)]) == 0


class System:
    """Addresses that count up, of a limited memory."""

    def __init__(self, total: int) -> None:
        self.left, self.sizes = total, {}

    def allocate(self, nbytes: int) -> int:
        if nbytes > self.left:
            raise OutOfDeviceMemory(f"no {nbytes} bytes")
        self.left -= nbytes
        pointer = 4096 * (len(self.sizes) + 1)
        self.sizes[pointer] = nbytes
        return pointer

    def release(self, pointer: int) -> None:
        self.left += self.sizes[pointer]


def test_a_pool_hands_out_what_was_given_back() -> None:
    system = System(100 * MIB)
    pool = Pool(system.allocate, system.release)
    first, other = pool.take(10 * MIB), pool.take(100)
    assert (pool.in_use, pool.reserved) == (10 * MIB + 512, 10 * MIB + 512)
    assert pool.holds(first + 5, 10 * MIB - 5) and not pool.holds(first + 5, 10 * MIB)
    pool.give(first)
    assert pool.take(9 * MIB) == first, "a little smaller"
    pool.give(first)
    assert pool.take(2 * MIB) != first, "much smaller: the large block is kept for large requests"
    pool.give(other)
    assert pool.take(0) == other
    assert pool.in_use == 2 * MIB + 512 and pool.peak == pool.reserved == 12 * MIB + 512


def test_a_pool_gives_back_before_it_gives_up() -> None:
    system = System(16 * MIB)
    pool = Pool(system.allocate, system.release)
    small = [pool.take(4 * MIB) for _ in range(3)]
    for pointer in small:
        pool.give(pointer)
    pool.take(14 * MIB)
    assert pool.reserved == 14 * MIB and system.left == 2 * MIB
    with pytest.raises(OutOfDeviceMemory):
        pool.take(4 * MIB)


def test_a_pool_that_is_gone_leaves_nothing() -> None:
    system = System(16 * MIB)
    pool = Pool(system.allocate, system.release)
    pool.give(pool.take(4 * MIB))
    assert system.left == 12 * MIB
    del pool
    assert system.left == 16 * MIB


def test_a_block_may_come_back_in_the_midst_of_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """From a thread of TensorRT's, or because the garbage collector runs just then."""
    system = System(100 * MIB)
    pool = Pool(system.allocate, system.release)
    large, small = pool.take(4 * MIB), pool.take(512)
    pool.give(large)

    def interrupted(free: list[tuple[int, int]], wanted: tuple[int, int]) -> int:
        place = bisect_left(free, wanted)
        pool.give(small)
        return place

    monkeypatch.setattr(device_memory, "bisect_left", interrupted)
    assert pool.take(4 * MIB) == large
    assert pool.in_use == 4 * MIB


def rows_of(visual: list) -> PromptRows:
    """Ten tokens, of which 2 to 4 and 6 to 8 are those of two pictures; the second has a break, as a clip has."""
    table = EmbeddingTable(100, lambda ids: np.repeat(ids[:, None], 4, axis=1).astype(np.float32))
    return PromptRows(table, np.arange(10, 20), np.array([2, 3, 4, 6, 8]), visual)


@pytest.mark.parametrize("span", [(0, 10), (0, 2), (2, 5), (3, 7), (5, 6), (4, 9), (9, 10)])
def test_a_prompt_with_pictures_on_a_device(span: tuple[int, int]) -> None:
    pictures = [numbers(3, 4, start=1000), numbers(2, 4, start=2000)]
    device = Device()
    expected = rows_of(pictures)[slice(*span)]
    found = rows_of([device.place(each) for each in pictures])[slice(*span)]
    assert isinstance(expected, np.ndarray) and isinstance(found, RowPieces)
    np.testing.assert_array_equal(to_host(found), expected)
    for piece in found.pieces:  # nothing of a picture came to the host
        assert isinstance(piece, DeviceArray) == bool((to_host(piece) >= 1000).all())


def test_parts_take_the_deepstack_rows_they_use() -> None:
    rows = numbers(5, 6)
    device = Device()
    tokens = RowTokens(
        embeds=numbers(10, 4),
        position_ids=np.zeros((3, 10), np.int64),
        deepstack=RowPieces([device.place(rows[:3]), device.place(rows[3:])]),
        deepstack_index=np.array([0, 0, 1, 2, 3, 0, 4, 0, 5, 0], np.int32),
    )
    part = tokens.part(3, 9)
    np.testing.assert_array_equal(to_host(part.deepstack), rows[1:])
    np.testing.assert_array_equal(part.deepstack_index, [1, 2, 0, 3, 0, 4])
    assert len(tokens.part(0, 2).deepstack) == 0


def test_the_host_does_not_take_what_lies_on_a_device() -> None:
    there = Device().place(numbers(2, 3))
    with pytest.raises(TypeError, match="without a device"):
        HOST.write(numbers(2, 3), there)
    with pytest.raises(TypeError, match="without a device"):
        HOST.copy_tokens(numbers(1, 1, 2, 2), Device().place(numbers(1, 1, 2, 2)), 0, 1)


def test_a_cache_with_a_limit_is_not_larger() -> None:
    tensor = CacheTensor(past="past_key_values.0.key", present="present.0.key", heads=2, width=4, dtype="float32")
    cache = KVCache([tensor], rows=1, capacity=100, in_place=True, limit=100)
    assert cache.capacity == 100
    small = KVCache([tensor], rows=1, capacity=10, in_place=True, limit=100)
    assert small.capacity == 64
    small.reserve(65, np.array([64], np.int32))
    assert small.capacity == 100
