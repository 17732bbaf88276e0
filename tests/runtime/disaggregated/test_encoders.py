"""The list of encode processes: who waits for one is woken."""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path

import numpy as np

from deepstitch.runtime.bundle import Bundle
from deepstitch.runtime.disaggregated.encoders import Encoders
from deepstitch.runtime.disaggregated.identity import model_identity
from deepstitch.runtime.disaggregated.metrics import Metrics
from deepstitch.runtime.disaggregated.multimodal_embedding import EncodeServer
from deepstitch.runtime.disaggregated.multimodal_language import LanguageServer
from deepstitch.runtime.embedding import EmbeddingTable

from .pair import ask, encode_config, language_config, png, running


def test_a_change_in_the_moment_of_waiting_is_seen(plain_bundle: Path) -> None:
    """A request once waited for ten seconds for an encode process that had just come."""
    bundle = Bundle.open(plain_bundle)
    identity = model_identity(bundle, EmbeddingTable.open(bundle))

    async def run() -> float:
        encoders = Encoders(language_config(plain_bundle), identity, np.zeros(1, np.uint8), Metrics())
        began = time.monotonic()
        waiting = asyncio.create_task(encoders.wait_for_change(2.0))
        asyncio.get_running_loop().call_soon(encoders._tell)  # after the first step of the task, before the next
        await waiting
        return time.monotonic() - began

    assert asyncio.run(run()) < 1.0


def test_the_same_picture_goes_to_the_same_encode_process(plain_bundle: Path, pictures: list[np.ndarray]) -> None:
    """Each picture is encoded once, and both have work (all sixteen go to one of the two once in 32,768 times)."""
    files = [png(np.roll(pictures[0], shift, axis=1)) for shift in range(16)]

    async def run() -> list[int]:
        with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
            left, right = (EncodeServer(encode_config(plain_bundle, "shm", folder)) for folder in (one, other))
            async with running(left), running(right):
                config = language_config(plain_bundle, left.address, right.address, encoder_cache_bytes=0)
                async with running(LanguageServer(config)) as language:
                    for file in [*files, *files]:
                        await ask(language, "what is it?", [file])
                return [server.encoded for server in (left, right)]

    encoded = asyncio.run(run())
    assert sum(encoded) == len(files) and min(encoded) > 0
