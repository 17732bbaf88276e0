"""Pictures and clips that a language process has seen before: it needs no encode process for them."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec import structs

from deepstitch.runtime.disaggregated import reception
from deepstitch.runtime.disaggregated.errors import NoEncoder, ProtocolError
from deepstitch.runtime.disaggregated.messages import Announcement
from deepstitch.runtime.disaggregated.multimodal_language import LanguageServer
from deepstitch.runtime.pipeline import Pipeline
from deepstitch.runtime.results import Result

from .pair import QUICK, collect, pair, png, same

OPTIONS = {"max_tokens": 8, "ignore_eos": True, "logprobs": 3}


@pytest.fixture(scope="module")
def one_process(plain_bundle: Path) -> Pipeline:
    return Pipeline.open(plain_bundle, threads=1)


@pytest.fixture(scope="module")
def files(pictures: Any) -> list[bytes]:
    return [png(each) for each in pictures]


@pytest.fixture(scope="module")
def clips(pictures: Any, tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """Two of different lengths."""
    av = pytest.importorskip("av")
    made = []
    for steps in (8, 12):
        path = tmp_path_factory.mktemp("clip") / "clip.mp4"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("mpeg4", rate=4)
            stream.width, stream.height = 96, 64
            for step in range(steps):
                frame = np.roll(pictures[1], 5 * step, axis=1)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
        made.append(path.read_bytes())
    return made


def about(*kinds: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*({"type": kind} for kind in kinds), {"type": "text", "text": "what moves?"}]}]


async def ask(language: LanguageServer, kinds: tuple[str, ...], images: list[bytes], videos: list[bytes]) -> Result:
    return await collect(language.answer(about(*kinds), images, videos, OPTIONS))


CASES: dict[str, tuple[tuple[str, ...], int, int]] = {
    "a clip": (("video",), 0, 1),
    "two clips": (("video", "video"), 0, 2),
    "clips and pictures in turn": (("video", "image", "video", "image"), 2, 2),
}


@pytest.mark.parametrize("case", CASES)
def test_a_known_clip_needs_no_encode_process(plain_bundle, one_process, files, clips, case):
    kinds, pictures, videos = CASES[case]
    shown = files[:pictures], clips[:videos]

    async def run() -> list[Result]:
        async with pair(plain_bundle) as (encode, language):
            first = await ask(language, kinds, *shown)
            await encode.stop()
            return [first, await ask(language, kinds, *shown)]

    wanted = one_process.generate(about(*kinds), images=shown[0], videos=shown[1], **OPTIONS)
    assert [same(answer, wanted) for answer in asyncio.run(run())] == [True, True]


def test_what_is_not_known_is_not_recalled(plain_bundle, one_process, files, clips, monkeypatch):
    """Other content behind an equal beginning, and encoder outputs that were let go."""
    kinds = ("image", "video")
    monkeypatch.setattr(reception, "glimpse", len)
    size = max(map(len, files)) + 1
    alike = [each + bytes(size - len(each)) for each in files[:2]]  # a PNG may end in anything

    async def run() -> list[Result]:
        async with pair(plain_bundle, language={"deadlines": replace(QUICK, encoder=0.1)}) as (encode, language):
            answers = [await ask(language, kinds, [each], clips[:1]) for each in alike]
            await encode.stop()
            answers.append(await ask(language, kinds, [alike[1]], clips[:1]))
            language._parts.encoder.clear()
            with pytest.raises(NoEncoder):
                await ask(language, kinds, [alike[1]], clips[:1])
            return answers

    for answer, image in zip(asyncio.run(run()), [*alike, alike[1]], strict=True):
        assert same(answer, one_process.generate(about(*kinds), images=[image], videos=clips[:1], **OPTIONS))


def test_a_clip_has_as_many_times_as_steps(plain_bundle, clips):
    """Else the prompt that is recalled would be another one."""

    async def run() -> None:
        async with pair(plain_bundle) as (encode, language):
            room = encode.reply_to

            async def lying(peer: str, message: Any) -> Any:
                reply = await room(peer, message)
                if not isinstance(reply, Announcement):
                    return reply
                return structs.replace(reply, items=tuple(structs.replace(i, timestamps=(0.5,)) for i in reply.items))

            encode.reply_to = lying
            with pytest.raises(ProtocolError, match="something else than was asked for"):
                await ask(language, ("video",), [], clips[:1])
            encode.reply_to = room

    asyncio.run(run())
