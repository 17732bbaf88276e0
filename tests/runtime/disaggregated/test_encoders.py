"""The list of encode processes: who waits for one is woken."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import numpy as np

from deepstitch.runtime.bundle import Bundle
from deepstitch.runtime.disaggregated.encoders import Encoders
from deepstitch.runtime.disaggregated.identity import model_identity
from deepstitch.runtime.disaggregated.metrics import Metrics
from deepstitch.runtime.embedding import EmbeddingTable

from .pair import language_config


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
