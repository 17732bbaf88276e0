"""TensorRT's engines behind the runtime, with stand-ins below: numbers, what moves where, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deepstitch.manifest import Manifest

from .conftest import Answers, Card, assert_same, build_engines
from .scenarios import answers, picture, sequences, two_at_a_time

pytest.importorskip("cuda.bindings", reason="the extra cuda is not installed")

Endless = Callable[[str], Path]


@dataclass(frozen=True)
class Trace:
    """What a process, or a part of one, did.

    Attributes:
        result: what came out.
        driver: calls of the driver, name first.
        tensorrt: calls of TensorRT, with their arguments.
    """

    result: Any
    driver: list[list[str]]
    tensorrt: list[tuple[str, dict[str, Any]]]

    @classmethod
    def read(cls, result: Any, driver: Path, tensorrt: Path) -> Trace:
        """From its logs."""
        calls = [tuple(json.loads(line)) for line in tensorrt.read_text().splitlines()]
        return cls(result, [line.split() for line in driver.read_text().splitlines()], calls)

    def count(self, name: str) -> int:
        """Calls of a function of the driver."""
        return sum(line[0] == name for line in self.driver)

    def sizes(self, name: str) -> list[int]:
        """Bytes that these calls moved or took."""
        return [int(line[1]) for line in self.driver if line[0] == name]

    def values(self, name: str, argument: str) -> list[Any]:
        """What a function of TensorRT was given."""
        return [arguments[argument] for each, arguments in self.tensorrt if each == name]


@pytest.fixture(scope="module")
def done(built: Path, card: Card, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trace]:
    """Scenarios by their names, run one after the other in one process."""
    folder = tmp_path_factory.mktemp("done")
    names = ("answers", "sequences", "repeats", "reopened", "two_at_a_time", "refusals")
    results = card.scenario("several", built, folder, *names)
    return {
        name: Trace.read(result, folder / f"{name}.cuda", folder / f"{name}.tensorrt")
        for name, result in results.items()
    }


@pytest.fixture(scope="module")
def expected(endless: Endless) -> Answers:
    """What ONNX Runtime answers on the CPU."""
    found = answers(str(endless("portable")), "ort")
    assert len({str([token for token, _ in each]) for each in found.values()}) > 4, "they say different things"
    return found


def test_answers_are_those_of_the_cpu(done: dict[str, Trace], expected: Answers) -> None:
    trace = done["answers"]
    assert_same(trace.result, expected)
    # five pictures in two calls, one more, and those seen before in none
    assert trace.values("kernel", "graph").count("vision_encoder") == 2 + 1


def test_the_cache_is_right_through_all_that_happens_to_rows(done: dict[str, Trace], endless: Endless) -> None:
    wanted, found = sequences(str(endless("portable")), "ort"), done["sequences"].result
    assert len(found) == len(wanted) == 13
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-3, atol=2e-3)


@pytest.fixture(scope="module")
def trace(built: Path, card: Card, tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """A question about a picture, nine tokens."""
    folder = tmp_path_factory.mktemp("trace")
    log, calls = folder / "cuda", folder / "tensorrt"
    finished = card.deepstitch(
        *("run", built, "--image", picture("count"), "--prompt", "How many squares are there?"),
        *("--max-tokens", "9", "--json"),
        FAKE_CUDA_LOG=str(log),
        FAKE_TENSORRT_LOG=str(calls),
    )
    assert finished.returncode == 0, finished.stderr
    return Trace.read(json.loads(finished.stdout), log, calls)


def test_pictures_never_come_back_to_the_host(built: Path, trace: Trace) -> None:
    model = Manifest.read(built).model
    assert set(trace.sizes("cuMemcpyDtoHAsync_v2")) == {4 * model.vocab_size}, "only logits do"
    # visual rows and their DeepStack rows go from one graph to the other within the card
    rows = trace.result["visual_tokens"] * model.hidden_size * 4
    assert {rows, model.num_deepstack * rows} <= set(trace.sizes("cuMemcpyDtoDAsync_v2"))
    assert len(set(trace.values("IExecutionContext.execute_async_v3", "stream_handle"))) == 1


def test_a_token_is_one_launch(trace: Trace) -> None:
    """From the second step on: the inputs up, the graph, the logits down, all recorded once."""
    steps = trace.result["generated_tokens"] - 1
    assert (steps, trace.count("cuGraphLaunch"), trace.count("cuStreamBeginCapture_v2")) == (8, 7, 1)
    # what is enqueued: vision, prefill, the first step, and the second while it is recorded
    assert trace.count("fake_cuda_enqueue") == trace.count("cuMemcpyDtoHAsync_v2") + 1 == 4
    kernels = Counter(trace.values("kernel", "graph"))
    assert kernels == {"vision_encoder": 1, "decoder": 1 + steps}


def test_keys_and_values_stay_where_they_are(trace: Trace) -> None:
    places: dict[str, set[int]] = {}
    for name, arguments in trace.tensorrt:
        if name == "IExecutionContext.set_tensor_address":
            places.setdefault(arguments["name"], set()).add(arguments["memory"])
    pasts = {name: each for name, each in places.items() if name.startswith("past_key_values.")}
    assert len(pasts) == 12
    for name, each in pasts.items():
        assert each == places[name.replace("past_key_values.", "present.")] and len(each) == 1, "in place, never moved"


def test_memory_is_the_pools(trace: Trace) -> None:
    """TensorRT's own allocations too; contexts share one block."""
    names = [name for name, _ in trace.tensorrt]
    assert names.index("Runtime.gpu_allocator=") < names.index("Runtime.deserialize_cuda_engine")
    assert "ICudaEngine.create_execution_context" not in names
    scratch = trace.values("IExecutionContext.device_memory=", "value")
    assert len(scratch) == 3 and len(set(scratch)) == 1


def test_a_recording_serves_the_next_answer(done: dict[str, Trace]) -> None:
    """And an answer that is over leaves its memory to the next."""
    trace = done["repeats"]
    assert len(trace.result) == 4 and len(set(trace.result)) == 1
    assert sum(trace.sizes("cuMemAlloc_v2")) == trace.result[0], "all memory is the pool's"
    assert (trace.count("cuStreamBeginCapture_v2"), trace.count("cuGraphLaunch")) == (1, 2 + 3 * 3)


def test_an_engine_that_is_gone_leaves_no_memory_taken(done: dict[str, Trace]) -> None:
    assert len(set(done["reopened"].result)) == 1


def test_caches_that_take_turns(done: dict[str, Trace], endless: Endless) -> None:
    """TensorRT's context changes between them: what was recorded before is not launched after that."""
    trace = done["two_at_a_time"]
    assert trace.result == two_at_a_time(str(endless("portable")), "ort") and len(set(trace.result)) > 2
    # three times one of them has three turns in a row, of which the second and the third are launches
    assert (trace.count("cuStreamBeginCapture_v2"), trace.count("cuGraphLaunch")) == (3, 6)


def test_refusals(done: dict[str, Trace]) -> None:
    """One line each, that says what is wrong and what to do."""
    said = done["refusals"].result
    again = "build the engines again with 'deepstitch build'"
    wanted = {
        "no engines": ("BundleError", "there are no engines yet", "deepstitch build"),
        "another card": ("BundleError", "none of the engines fit here", "the card here has sm_75", "deepstitch build"),
        "renamed": ("BundleError", "other: renamed since it was built"),
        "exported again": ("BundleError", "manifest.json is not the one they were built from", again),
        "truncated": ("BundleError", "decoder.plan: 1000 bytes, the manifest says", again),
        "changed": ("BundleError", "decoder.plan: its contents changed", again),
        "missing plan": ("BundleError", "decoder.plan: missing", again),
        "foreign": ("DeviceError", "TensorRT 8.6.1 does not open", "decoder.plan", "magicTag", "build them again"),
        "no library": ("BundleError", "libdeepstitch_plugins.so: missing", again),
        "another library": ("BundleError", "not the plugin library the engines were built with", again),
        "record": ("BundleError", "engine.json: not valid JSON"),
        "card's memory": ("DeviceError", "OutOfMemory", "stop other programs on the card or build engines for less"),
        "context": ("DeviceError", "makes no context for", "OutOfMemory"),
        "execute": ("DeviceError", "TensorRT 8.6.1 does not run decoder.onnx", "illegal memory access"),
        "prompt": ("InputError", "the engines take 256", "--max-context"),
        "answer": ("InputError", "max_tokens 300 exceed what there is: the engines take 256"),
        "patches": ("InputError", "vision_encoder: 216 patches are more than the 128", "smaller", "--image-patches"),
        "rows": ("InputError", "decoder: 3 rows are more than the 2 the engine was built for", "--batch"),
        "guesses": ("InputError", "speculate 2: the engines give the logits of 1 tokens", "--logits"),
        "logits": ("InputError", "3 tokens of a row whose logits are wanted are more than the 1", "--logits"),
        "packed": ("InputError", "--packed-cache"),
    }
    assert said.keys() == wanted.keys()
    for name, (kind, *parts) in wanted.items():
        assert said[name].startswith(f"{kind}: ") and "\n" not in said[name], said[name]
        for part in parts:
            assert part in said[name], said[name]


def test_the_command_line_says_it_in_one_line(built: Path, driver: Path, card: Card, endless: Endless) -> None:
    ask = ("run", built, "--prompt", "Hello")
    for where, arguments, text in (
        (Card(driver, "10.13.3.9"), ask, "none of the engines fit here; sm61-tensorrt8.6.1: they were built with"),
        (card, ("run", endless("portable"), "--engine", "tensorrt", "--prompt", "Hello"), "--target portable"),
    ):
        finished = where.deepstitch(*arguments)
        assert finished.returncode == 2 and finished.stdout == ""
        assert finished.stderr.startswith("deepstitch: error: ") and finished.stderr.count("\n") == 1
        assert text in finished.stderr


def test_no_tensorrt(built: Path, driver: Path) -> None:
    finished = Card(driver, None).run(["-c", "import importlib.util as u; print(u.find_spec('tensorrt'))"])
    if finished.stdout.strip() != "None":
        pytest.skip("this machine has TensorRT")
    finished = Card(driver, None).deepstitch("run", built, "--prompt", "Hello")
    assert finished.returncode == 2 and finished.stderr.count("\n") == 1
    assert "tensorrt is not installed" in finished.stderr and "tensorrt==8.6.1" in finished.stderr


@pytest.mark.parametrize(
    "version",
    [
        pytest.param("10.0.1", marks=pytest.mark.slow),
        pytest.param("10.13.3.9", marks=pytest.mark.slow),
        "11.1.0.106",
    ],
)
def test_later_versions(
    version: str, driver: Path, endless: Endless, plugin_library: Path, expected: Answers, tmp_path: Path
) -> None:
    """Target trt10: the same answers, memory given to contexts in the way of the version."""
    folder = Path(shutil.copytree(endless("trt10"), tmp_path / "bundle"))
    card, calls = Card(driver, version), tmp_path / "calls"
    variables = {"FAKE_CUDA_SM": "86", "FAKE_TENSORRT_LOG": str(calls)}
    build_engines(card, folder, plugin_library, FAKE_CUDA_SM="86")
    assert_same(card.scenario("answers", folder, **variables), expected)
    names = {json.loads(line)[0] for line in calls.read_text().splitlines()}
    sized = version != "10.0.1"
    assert ("IExecutionContext.set_device_memory" in names) == sized
    assert ("IExecutionContext.device_memory=" in names) != sized
