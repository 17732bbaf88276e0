"""An encode process that has the token and lies: another one serves its requests, or they end with one typed error."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from deepstitch.runtime.disaggregated.config import PoolConfig
from deepstitch.runtime.disaggregated.errors import DisaggregationError
from deepstitch.runtime.disaggregated.messages import Announcement, Item, Pong, TransferReady
from deepstitch.runtime.disaggregated.multimodal_embedding import EncodeServer
from deepstitch.runtime.disaggregated.multimodal_language import LanguageServer
from deepstitch.runtime.pipeline import Pipeline

from .pair import ask, conversation, encode_config, language_config, png, running, same
from .processes import QUICK

POOL = PoolConfig(block_tokens=4, blocks=32, deepstack_blocks=32, checksums=True)
SETTINGS: dict[str, Any] = {"pool": POOL, "deadlines": QUICK, "encoder_cache_bytes": 0}
OPTIONS = {"max_tokens": 8, "ignore_eos": True, "logprobs": 3}


@pytest.fixture(scope="module")
def files(pictures: Any) -> list[bytes]:
    return [png(each) for each in pictures]


@pytest.fixture(scope="module")
def answers(plain_bundle: Path, files: list[bytes]) -> list[Any]:
    pipeline = Pipeline.open(plain_bundle, threads=1)
    return [pipeline.generate(conversation("what is it?", 1), images=[file], **OPTIONS) for file in files]


class Liar(EncodeServer):
    """Says something else than it should."""

    lie: Callable[[Liar, Any], Any]

    async def reply_to(self, peer: str, message: Any) -> Any:
        return self.lie(self, await super().reply_to(peer, message))


def about(kind: type[Any], **changes: Any) -> Callable[[Liar, Any], Any]:
    """Fields of the messages of one kind are others; a function makes the new value from the message."""

    def lie(_: Liar, reply: Any) -> Any:
        if not isinstance(reply, kind):
            return reply
        return replace(reply, **{name: new(reply) if callable(new) else new for name, new in changes.items()})

    return lie


def in_the_pool(damage: Callable[[Liar, TransferReady], None]) -> Callable[[Liar, Any], Any]:
    """The blocks hold something else."""

    def lie(server: Liar, reply: Any) -> Any:
        if isinstance(reply, TransferReady):
            damage(server, reply)
        return reply

    return lie


def flip_a_bit(buffer: str, blocks: str = "blocks") -> Callable[[Liar, Any], Any]:
    def damage(server: Liar, ready: TransferReady) -> None:
        array = getattr(server.pool.buffers, buffer)
        array[getattr(ready, blocks)[-1], 0].view(np.uint8)[0] ^= 1

    return in_the_pool(damage)


def strange_ids(server: Liar, reply: Any) -> Any:
    """With checksums that fit."""
    if isinstance(reply, TransferReady):
        buffers = server.pool.buffers
        buffers.fill_ids[list(reply.blocks)] = -(2**31)
        return replace(reply, checksums=())
    return reply


BIG = (1 << 31) - 1  # the largest the schema lets through; more would end as a frame that is no message
ENOUGH = 4 * POOL.block_tokens * POOL.blocks
ITEM = Item(key="00" * 32, grid=(1, 4, 10))
LIES: dict[str, Callable[[Liar, Any], Any]] = {
    "a block out of range": about(TransferReady, blocks=lambda r: (*r.blocks[:-1], 10000)),
    "a DeepStack block out of range": about(TransferReady, deepstack_blocks=lambda r: (999,) * len(r.deepstack_blocks)),
    "blocks of somebody else": about(TransferReady, blocks=lambda r: tuple((b + 7) % 32 for b in r.blocks)),
    "too few blocks": about(TransferReady, blocks=lambda r: r.blocks[:-1]),
    "no blocks": about(TransferReady, blocks=()),
    "no DeepStack blocks": about(TransferReady, deepstack_blocks=()),
    "another beginning": about(TransferReady, start=1),
    "more tokens than any prompt has": about(TransferReady, count=BIG),
    "one token more than there are": about(
        TransferReady, count=lambda r: r.count + 1, blocks=lambda r: (*r.blocks, 31)
    ),
    "more tokens than there is room for, in as many blocks": about(
        TransferReady, count=ENOUGH, blocks=lambda r: tuple(range(32)) * 4, generations=lambda r: (2,) * 128
    ),
    "generations of before": about(TransferReady, generations=lambda r: tuple(g - 1 for g in r.generations)),
    "too few generations": about(TransferReady, generations=()),
    "a huge generation": about(TransferReady, generations=lambda r: (2**64 - 1,) * len(r.generations)),
    "a wrong checksum": about(TransferReady, checksums=lambda r: (*r.checksums[:-1], 1)),
    "too few checksums": about(TransferReady, checksums=lambda r: r.checksums[:2]),
    "another room": about(TransferReady, room="a" * 32),
    "a flipped bit in the embeddings": flip_a_bit("input_embeddings"),
    "a flipped bit in the ids": flip_a_bit("fill_ids"),
    "a flipped bit in the positions": flip_a_bit("mrope_positions"),
    "a flipped bit in DeepStack": flip_a_bit("deepstack_embeddings", "deepstack_blocks"),
    "the stamp of another transfer": in_the_pool(lambda s, r: s.pool.buffers.aux_datas[r.blocks[0]].fill(7)),
    "ids that are none": strange_ids,
    "a huge prompt": about(Announcement, total_tokens=BIG),
    "a prompt that is too long for the model": about(Announcement, total_tokens=100_000),
    "a huge DeepStack": about(Announcement, deepstack_rows=BIG),
    "one row more": about(Announcement, deepstack_rows=lambda a: a.deepstack_rows + 1),
    "one row less": about(Announcement, deepstack_rows=lambda a: a.deepstack_rows - 1),
    "no rows": about(Announcement, deepstack_rows=0),
    "one token less": about(Announcement, total_tokens=lambda a: a.total_tokens - 1),
    "no pictures": about(Announcement, items=()),
    "one picture more": about(Announcement, items=lambda a: (*a.items, ITEM)),
    "another grid": about(Announcement, items=(ITEM,)),
    "a huge grid": about(Announcement, items=(Item(key="00", grid=(BIG, BIG, BIG)),)),
    "a picture that is a clip": about(
        Announcement, items=lambda a: tuple(replace(each, timestamps=(0.5,)) for each in a.items)
    ),
    "another delta": about(Announcement, rope_delta=BIG),
    "another room's sizes": about(Announcement, room="a" * 32),
    "another attempt": about(TransferReady, attempt=9),
    "another kind of message": lambda _, reply: Pong(seq=0, waiting=0, clock=0.0),
}


@contextlib.asynccontextmanager
async def believers(
    bundle: Path, folder: Path, lie: Callable[[Liar, Any], Any], *, honest: bool
) -> AsyncIterator[tuple[Liar, LanguageServer]]:
    """A liar, first of the list, and maybe an honest encode process."""
    folders = [folder / name for name in ("liar", "honest")]
    for each in folders:
        each.mkdir()
    liar = Liar(encode_config(bundle, "shm", str(folders[0]), **SETTINGS))
    liar.lie = lie  # type: ignore[method-assign]
    async with contextlib.AsyncExitStack() as stack:
        servers = [await stack.enter_async_context(running(liar))]
        if honest:
            other = EncodeServer(encode_config(bundle, "shm", str(folders[1]), **SETTINGS))
            servers.append(await stack.enter_async_context(running(other)))
        config = language_config(bundle, *[each.address for each in servers], **SETTINGS)
        language = await stack.enter_async_context(running(LanguageServer(config)))
        yield liar, language
        deadline = time.monotonic() + 3.0
        while not all(each.idle for each in (*servers, language)):
            assert time.monotonic() < deadline, "blocks or rooms are left"
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("name", LIES)
def test_an_honest_encoder_takes_over(plain_bundle, files, answers, tmp_path, name):
    """Four requests at once: all are right, whoever was asked first."""

    async def run() -> list[Any]:
        async with believers(plain_bundle, tmp_path, LIES[name], honest=True) as (_, language):
            return list(await asyncio.gather(*[ask(language, "what is it?", [file]) for file in files]))

    assert [same(*both) for both in zip(asyncio.run(run()), answers, strict=True)] == [True] * len(files)


@pytest.mark.parametrize("name", LIES)
def test_alone_it_causes_one_typed_error(plain_bundle, files, answers, tmp_path, name):
    """And as soon as it stops lying, it is believed again."""

    async def run() -> Any:
        async with believers(plain_bundle, tmp_path, LIES[name], honest=False) as (liar, language):
            with pytest.raises(DisaggregationError) as caught:
                await ask(language, "what is it?", [files[0]])
            assert caught.value.code != "error"
            liar.lie = lambda _, reply: reply  # type: ignore[method-assign]
            return await ask(language, "what is it?", [files[1]])

    assert same(asyncio.run(run()), answers[1])
