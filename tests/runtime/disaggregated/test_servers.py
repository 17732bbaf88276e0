"""Both processes together: the answers of one process, whatever way the rows took; and nothing left behind."""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from deepstitch.errors import InputError
from deepstitch.models.sample.tokenizer import special_id
from deepstitch.runtime.bundle import Bundle
from deepstitch.runtime.disaggregated import channel
from deepstitch.runtime.disaggregated.channel import receive
from deepstitch.runtime.disaggregated.config import Address, PoolConfig
from deepstitch.runtime.disaggregated.errors import (
    HandshakeRefused,
    NoEncoder,
    PeerBusy,
    RequestRefused,
    RequestTooLarge,
)
from deepstitch.runtime.disaggregated.identity import differences, model_identity
from deepstitch.runtime.disaggregated.messages import Challenge, Hello, ModelIdentity
from deepstitch.runtime.disaggregated.multimodal_embedding import EncodeServer
from deepstitch.runtime.disaggregated.multimodal_language import LanguageServer
from deepstitch.runtime.disaggregated.pool import BlockPool
from deepstitch.runtime.embedding import EmbeddingTable
from deepstitch.runtime.pipeline import Pipeline

from ..tiny_bundle import write_tiny_bundle
from .pair import QUICK, ask, collect, conversation, encode_config, language_config, pair, png, running, same, soon

SEVERAL = "pictures of several sizes"
# As the matrix of ``deepstitch compare``: text, pictures, turns, small chunks, many steps; video and batch have tests
# of their own.
CASES: dict[str, tuple[str, list[int], dict[str, int]]] = {
    "text": ("left or right?", [], {}),
    "one picture": ("what is it?", [0], {}),
    SEVERAL: ("count the red ones, please, and say where they are", [0, 1, 2, 3], {}),
    "the same picture twice": ("what is the difference?", [1, 1], {}),
    "chunked prefill": ("left of the circle " * 40, [3], {"prefill_chunk": 5}),
    "32 steps": ("and where?", [2], {"max_tokens": 32}),
}


@pytest.fixture(scope="module")
def one_process(plain_bundle) -> Pipeline:
    return Pipeline.open(plain_bundle, threads=1)


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A socket file's path takes 108 bytes at most; pytest's folders are longer."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def files(pictures) -> list[bytes]:
    return [png(each) for each in pictures]


def expected(one_process: Pipeline, case: str, files: list[bytes]):
    text, shown, options = CASES[case]
    options = {"max_tokens": 8, "ignore_eos": True, "logprobs": 3, **options}
    return one_process.generate(conversation(text, len(shown)), images=[files[i] for i in shown], **options)


def shuffle(pool: BlockPool, seed: int) -> None:
    """Give every block to an owner of its own and take them back in another order."""
    order = random.Random(seed)
    for allocator in (pool.tokens, pool.deepstack):
        owners = [str(number) for number in range(allocator.total)]
        for owner in owners:
            allocator.allocate(owner, 1)
        order.shuffle(owners)
        for owner in owners:
            allocator.release(owner)


def counted(server, name: str, **labels: str) -> float:
    inside = ",".join(f'{key}="{value}"' for key, value in labels.items())
    start = f"deepstitch_{name}{{{inside}}} " if inside else f"deepstitch_{name} "
    lines = [line for line in server.metrics.text().decode().splitlines() if line.startswith(start)]
    return float(lines[0].split()[-1]) if lines else 0.0


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("case", CASES)
def test_answers_are_those_of_one_process(plain_bundle, one_process, files, case, transport):
    async def run():
        text, shown, options = CASES[case]
        async with pair(plain_bundle, transport=transport) as (_, language):
            return await ask(language, text, [files[i] for i in shown], **options)

    assert same(asyncio.run(run()), expected(one_process, case, files))


@pytest.mark.parametrize("block_tokens", [1, 7, 16, 128, 16384])
@pytest.mark.parametrize("resumes", [0, 1, 2, 5])
def test_resumed_transfers_in_unordered_blocks(plain_bundle, one_process, files, block_tokens, resumes):
    wanted = expected(one_process, SEVERAL, files)
    text, shown, _ = CASES[SEVERAL]
    total, rows = wanted.prompt_tokens, wanted.visual_tokens
    needed = -(-total // block_tokens)
    enough, parts = needed + 2, resumes + 1
    first = next((each for each in range(1, needed + 1) if -(-needed // each) == parts), 0)
    if not first:
        pytest.skip(f"{needed} blocks cannot come in {parts} parts")
    near = PoolConfig(block_tokens=block_tokens, blocks=enough, deepstack_blocks=rows, first_blocks=first)
    far = PoolConfig(block_tokens=5, blocks=total, deepstack_blocks=rows)  # the two sides cut blocks differently

    async def run():
        async with pair(plain_bundle, encode={"pool": far}, language={"pool": near}) as (encode, language):
            shuffle(encode.pool, 1)
            shuffle(language.pool, 2)
            answer = await ask(language, text, [files[i] for i in shown])
            assert counted(language, "transfers_total", kind="resumed") == parts - 1
            layout = encode.pool.layout
            row = sum(layout.row_bytes(name) for name in ("input_embeddings", "fill_ids", "mrope_positions"))
            assert await soon(lambda: encode.idle)
            resumed = counted(encode, "transfer_bytes_total", kind="resumed")
            received_first = min(total, first * block_tokens)
            assert resumed == (total - received_first) * row + (parts - 1) * layout.row_bytes("aux_datas")
            return answer

    assert same(asyncio.run(run()), wanted)


def test_turns_of_a_conversation(plain_bundle, one_process, files):
    """The second turn brings the first turn's picture again, which is known by then, and one more."""
    first = conversation("what is it?", 1)
    both = [*first, {"role": "assistant", "content": "a circle"}, *conversation("and now?", 1)]
    options = {"max_tokens": 8, "ignore_eos": True, "logprobs": 3}

    async def run():
        async with pair(plain_bundle) as (encode, language):
            answers = [await collect(language.answer(first, files[:1], (), options))]
            for shown in (files[:2], files[:2]):
                answers.append(await collect(language.answer(both, shown, (), options)))
            assert encode.encoded == 2
            return answers

    answers = asyncio.run(run())
    assert same(answers[0], one_process.generate(first, images=files[:1], **options))
    alone = one_process.generate(both, images=files[:2], **options)
    assert same(answers[1], alone)
    assert same(answers[2], alone)


def test_a_picture_is_encoded_once(plain_bundle, one_process, files):
    """Eight requests at once, then one more when there is no encode process any more."""

    async def run():
        async with pair(plain_bundle) as (encode, language):
            answers = await asyncio.gather(*[ask(language, "what is it?", [files[0]]) for _ in range(8)])
            assert encode.encoded == 1
            await encode.stop()
            return [*answers, await ask(language, "what is it?", [files[0]])]

    wanted = expected(one_process, "one picture", files)
    assert all(same(answer, wanted) for answer in asyncio.run(run()))


def test_text_needs_no_encoder(plain_bundle, one_process, files):
    nobody = Address.parse("unix:/nonexistent/encode.sock")

    async def run():
        async with running(LanguageServer(language_config(plain_bundle, nobody))) as language:
            began = time.monotonic()
            answer = await ask(language, "left or right?")
            quick = time.monotonic() - began
            with pytest.raises(NoEncoder, match="nonexistent"):
                await ask(language, "what is it?", [files[0]])
            assert language.idle
            return answer, quick

    answer, quick = asyncio.run(run())
    assert quick < QUICK.encoder / 2
    assert same(answer, one_process.generate("left or right?", max_tokens=8, ignore_eos=True, logprobs=3))


def test_pictures_are_encoded_here_where_no_encoder_answers(plain_bundle, one_process, files):
    async def run():
        config = language_config(plain_bundle, Address.parse("unix:/nonexistent/e.sock"), local_encoder=True)
        async with running(LanguageServer(config)) as language:
            answer = await ask(language, "what is it?", [files[0]])
            assert counted(language, "local_encodes_total") == 1
            return answer

    assert same(asyncio.run(run()), expected(one_process, "one picture", files))


def test_more_requests_than_the_pool_holds(plain_bundle, one_process, files):
    """Two hundred at once through pools for a few."""
    pool = PoolConfig(block_tokens=16, blocks=16, deepstack_blocks=4)

    async def run():
        options = {"pool": pool, "encoder_cache_bytes": 0}
        async with pair(plain_bundle, encode=options, language=options) as (_, language):
            wanted = [index % 4 for index in range(200)]
            return wanted, await asyncio.gather(
                *[ask(language, "what is it?", [files[index]], max_tokens=2) for index in wanted]
            )

    wanted, answers = asyncio.run(run())
    alone = [
        one_process.generate(conversation("what is it?", 1), images=[file], max_tokens=2, ignore_eos=True, logprobs=3)
        for file in files
    ]
    assert all(same(answer, alone[index]) for index, answer in zip(wanted, answers, strict=True))


def test_as_many_requests_as_are_admitted(plain_bundle, files):
    async def run():
        async with pair(plain_bundle, language={"max_requests": 2}) as (_, language):
            outcomes = await asyncio.gather(
                *[ask(language, "what is it?", [files[0]]) for _ in range(4)], return_exceptions=True
            )
            return [type(each) for each in outcomes]

    assert asyncio.run(run()).count(PeerBusy) == 2


def test_a_busy_encoder_is_asked_again(plain_bundle, one_process, files):
    async def run():
        async with pair(plain_bundle, encode={"max_requests": 1}) as (_, language):
            answers = await asyncio.gather(*[ask(language, "what is it?", [files[i % 4]]) for i in range(6)])
            assert counted(language, "attempts_total", outcome="busy") > 0
            return answers

    options = {"max_tokens": 8, "ignore_eos": True, "logprobs": 3}
    for number, answer in enumerate(asyncio.run(run())):
        shown = [files[number % 4]]
        assert same(answer, one_process.generate(conversation("what is it?", 1), images=shown, **options))


def test_what_never_fits_is_refused(plain_bundle, files):
    async def run(**side):
        async with pair(plain_bundle, **side) as (_, language):
            with pytest.raises(RequestTooLarge, match="--deepstack-blocks"):
                await ask(language, "what is it?", [files[3]])
            return await ask(language, "left?")

    small = {"pool": PoolConfig(block_tokens=4, blocks=64, deepstack_blocks=1)}
    asyncio.run(run(encode=small))
    asyncio.run(run(language=small))


def test_unusable_pictures_are_refused(plain_bundle, files):
    async def run():
        async with pair(plain_bundle) as (_, language):
            with pytest.raises(RequestRefused, match="image 1"):
                await ask(language, "what is it?", [files[0][:100]])

    asyncio.run(run())


def test_an_encoder_that_comes_back_is_found(plain_bundle, one_process, files):
    async def run():
        with tempfile.TemporaryDirectory() as folder:
            first = EncodeServer(encode_config(plain_bundle, "shm", folder))
            await first.start()
            async with running(LanguageServer(language_config(plain_bundle, first.address))) as language:
                await first.stop()
                request = asyncio.create_task(ask(language, "what is it?", [files[0]]))
                await asyncio.sleep(0.5)
                assert not request.done()
                async with running(EncodeServer(encode_config(plain_bundle, "shm", folder))):
                    return await request

    assert same(asyncio.run(run()), expected(one_process, "one picture", files))


def test_encoders_of_a_registry_come_and_go(plain_bundle, short_path, files):
    async def run():
        registry = short_path / "encoders"
        registry.write_text("# none yet\n", "utf-8")
        config = language_config(plain_bundle, registry=registry)
        async with running(LanguageServer(config)) as language:
            request = asyncio.create_task(ask(language, "what is it?", [files[0]]))
            async with running(EncodeServer(encode_config(plain_bundle, "shm", str(short_path)))) as encode:
                registry.write_text(f"{encode.address}\n", "utf-8")
                await request
                registry.write_text("", "utf-8")
                await asyncio.sleep(1.0)
                with pytest.raises(NoEncoder):
                    await ask(language, "and this?", [files[1]])

    asyncio.run(run())


def test_requests_spread_over_encoders(plain_bundle, short_path, pictures):
    many = [png(np.roll(pictures[0], step, axis=0)) for step in range(8)]

    async def run():
        folders = [short_path / name for name in "ab"]
        for folder in folders:
            folder.mkdir()
        servers = [EncodeServer(encode_config(plain_bundle, "shm", str(folder))) for folder in folders]
        async with running(servers[0]), running(servers[1]):
            config = language_config(plain_bundle, *[server.address for server in servers])
            async with running(LanguageServer(config)) as language:
                await asyncio.gather(*[ask(language, "what is it?", [each]) for each in many])
        return [server.encoded for server in servers]

    assert min(asyncio.run(run())) >= 2


def test_a_client_that_goes_away_leaves_nothing(plain_bundle, files):
    async def run():
        async with pair(plain_bundle) as (encode, language):
            for pause in (0.0, 0.002, 0.005, 0.01, 0.02, 0.05):
                request = asyncio.create_task(ask(language, "what is it?", [files[0]], max_tokens=200))
                await asyncio.sleep(pause)
                request.cancel()
                await asyncio.gather(request, return_exceptions=True)
            await asyncio.sleep(0.2)
            assert language.idle
            assert encode.idle

    asyncio.run(run())


def test_sides_that_do_not_fit(plain_bundle, tmp_path_factory):
    async def refused(text: str, **options):
        bundle = options.pop("bundle", plain_bundle)
        with tempfile.TemporaryDirectory() as folder:
            async with running(EncodeServer(encode_config(plain_bundle, "shm", folder))) as encode:
                with pytest.raises(HandshakeRefused, match=text):
                    await LanguageServer(language_config(bundle, encode.address, **options)).start()

    asyncio.run(refused("token is missing or another", token=""))
    asyncio.run(refused("token is missing or another", token="open sesam"))
    other = write_tiny_bundle(tmp_path_factory.mktemp("other") / "bundle", image_token_id=special_id("<|vision_end|>"))
    asyncio.run(refused(r"do not fit: image_token_id: \d+ on the encode side, \d+ on the language", bundle=other))


@pytest.mark.parametrize(("told", "language", "encode"), [(Challenge, 2, 3), (Hello, 3, 2)])
def test_sides_of_different_versions(plain_bundle, short_path, monkeypatch, told, language, encode):
    """Whichever is the first to notice, the difference is named."""

    async def newer(reader, limit):
        message = await receive(reader, limit)
        return msgspec.structs.replace(message, version=3) if isinstance(message, told) else message

    monkeypatch.setattr(channel, "receive", newer)
    monkeypatch.setattr(channel, "PROTOCOL_VERSION", 2)
    named = f"encode.sock: protocol version {language} on the language side, {encode} on the encode side"

    async def run() -> None:
        async with running(EncodeServer(encode_config(plain_bundle, "shm", str(short_path)))) as server:
            with pytest.raises(HandshakeRefused, match=named):
                await LanguageServer(language_config(plain_bundle, server.address)).start()

    asyncio.run(run())


def test_an_address_that_cannot_be_had(plain_bundle, short_path):
    def refused(text: str, listen: str) -> None:
        config = replace(encode_config(plain_bundle, "tcp", "", token="t"), listen=Address.parse(listen))
        if listen.startswith("unix"):
            config = replace(config, transport="shm")
        with pytest.raises(InputError, match=text):
            asyncio.run(EncodeServer(config).start())

    async def taken() -> None:
        async with running(EncodeServer(encode_config(plain_bundle, "tcp", ""))) as encode:
            with pytest.raises(InputError, match=r"cannot listen at .*in use"):
                await EncodeServer(replace(encode.config, listen=encode.address)).start()
        async with running(EncodeServer(encode_config(plain_bundle, "shm", str(short_path)))) as encode:
            with pytest.raises(InputError, match="another process listens there"):
                await EncodeServer(encode.config).start()

    asyncio.run(taken())
    precious = short_path / "precious.txt"
    precious.write_text("do not lose me", "utf-8")
    refused("the file there is no socket", f"unix:{precious}")
    assert precious.read_text("utf-8") == "do not lose me"
    refused("No such file", f"unix:{short_path}/nowhere/e.sock")


def test_every_difference_of_the_bundles_is_named(plain_bundle):
    bundle = Bundle.open(plain_bundle)
    identity = model_identity(bundle, EmbeddingTable.open(bundle))
    assert differences(identity, identity) == ""
    for name in ModelIdentity.__struct_fields__:
        other = msgspec.structs.replace(identity, **{name: "aa" if isinstance(getattr(identity, name), str) else 77})
        found = differences(msgspec.structs.replace(identity, checkpoint="bb"), msgspec.structs.replace(other))
        assert found.startswith(f"{name}: ") and ";" not in found.partition("(")[0]
    exported_before = msgspec.structs.replace(identity, checkpoint="")
    assert differences(msgspec.structs.replace(identity, checkpoint="bb"), exported_before) == ""
