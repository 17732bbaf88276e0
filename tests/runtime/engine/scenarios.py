"""What is run in a process that has the stand-ins: ``python scenarios.py NAME ARGUMENT…`` prints a function's result.

Nothing is imported before the libraries of the stand-ins can be found, and nothing of pytest.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from deepstitch.engine_manifest import ENGINE_MANIFEST, built_engines
from deepstitch.errors import DeepstitchError
from deepstitch.manifest import MANIFEST_NAME, file_sha256
from deepstitch.runtime.bundle import Bundle
from deepstitch.runtime.calls import RowTokens
from deepstitch.runtime.decode import DecoderState
from deepstitch.runtime.engine import Engine, open_engine
from deepstitch.runtime.pipeline import Pipeline
from deepstitch.runtime.results import Result

PICTURES = Path(__file__).resolve().parents[3] / "models" / "sample" / "pictures"


def picture(name: str) -> str:
    """One that ships."""
    return str(PICTURES / f"{name}.png")


@contextmanager
def environment(**changes: str) -> Iterator[None]:
    """Variables that the stand-ins read at every call."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def refusal(action: Callable[[], Any]) -> str:
    """The kind and the text of the error that an action ends with."""
    try:
        action()
    except DeepstitchError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was refused"


# --- the driver alone


def copies() -> dict[str, bool]:
    """Values go to the card, within it, and back."""
    from deepstitch.runtime.engine.cuda import Cuda
    from deepstitch.runtime.engine.device_memory import DeviceMemory
    from deepstitch.runtime.engine.memory import RowPieces, to_host

    memory = DeviceMemory(Cuda())
    values = np.arange(48, dtype=np.float32).reshape(6, 8)
    there = memory.zeros((6, 8), np.float32)
    zeros = not to_host(there).any()
    memory.write(there, values)
    rows = memory.zeros((5, 8), np.float32)
    memory.write(rows, RowPieces([values[:1], there[4:6], values[2:4]]))
    tokens = np.arange(2 * 3 * 5 * 4, dtype=np.float32).reshape(2, 3, 5, 4)
    small, large = memory.zeros((2, 3, 5, 4), np.float32), memory.zeros((3, 3, 9, 4), np.float32)
    memory.write(small, tokens)
    memory.copy_tokens(large[1:3], small, 1, 4)
    expected = np.zeros((3, 3, 9, 4), np.float32)
    expected[1:3, :, 1:4] = tokens[:, :, 1:4]
    tokens_right = bool((to_host(large) == expected).all())
    kept = there[2:4].copy()
    strided = memory.zeros((8, 6), np.float32)
    memory.write(strided, values.T)
    staged = memory.staging((6, 8), np.float32)
    staged[:] = values
    page_locked = memory.zeros((6, 8), np.float32)
    memory.write(page_locked, staged)
    staged[:] = 0  # what was written is that of the call
    memory.write(there, values + 1)
    in_use = memory.pool.in_use
    del small, large
    return {
        "zeros": zeros,
        "round trip": bool((to_host(there) == values + 1).all()),
        "pieces": bool((to_host(rows) == values[[0, 4, 5, 2, 3]]).all()),
        "tokens": tokens_right,
        "strided": bool((to_host(strided) == values.T).all()),
        "page-locked": bool((to_host(page_locked) == values).all()),
        "copies": bool((to_host(kept) == values[2:4]).all()),
        "given back": memory.pool.in_use < in_use,
        "narrow": refused(lambda: memory.write(there, values.astype(np.float64)), ValueError),
        "to host": refused(lambda: memory.write(values, there), TypeError),
    }


def refused(action: Callable[[], Any], kind: type[Exception]) -> bool:
    try:
        action()
    except kind:
        return True
    return False


def recording() -> dict[str, list[float]]:
    """Work is done in order and when it is waited for; recorded work is done when it is launched, as often as that."""
    from deepstitch.runtime.engine.cuda import Cuda
    from deepstitch.runtime.engine.device_memory import DeviceMemory

    cuda = Cuda()
    memory = DeviceMemory(cuda)
    host, there = memory.staging((4,), np.float32), memory.zeros((4,), np.float32)
    back = memory.staging((4,), np.float32)

    def there_and_back() -> None:
        cuda.upload(there.pointer, host.ctypes.data, host.nbytes)
        cuda.download(back.ctypes.data, there.pointer, back.nbytes)

    seen: dict[str, list[float]] = {}

    def look(name: str) -> None:
        seen[name] = back.tolist()

    host[:] = 1
    there_and_back()
    look("not waited for")
    cuda.synchronize()
    look("waited for")
    with cuda.recording() as graphs:
        there_and_back()
    cuda.synchronize()
    for value in (2, 3):
        host[:] = value
        look(f"before launch {value}")
        graphs[0].launch()
        cuda.synchronize()
    look("after")
    try:
        with cuda.recording():
            cuda.synchronize()
    except DeepstitchError as error:
        seen["refused"] = [float(error.code)]
    cuda.synchronize()  # the stream is as before
    return seen


def driver_errors() -> dict[str, str]:
    """What a user reads when the driver fails."""
    from deepstitch.runtime.engine.cuda import Cuda
    from deepstitch.runtime.engine.device_memory import DeviceMemory

    cuda = Cuda()
    said = {}
    with environment(FAKE_CUDA_FAIL="cuStreamSynchronize=700"):
        said["call"] = refusal(cuda.synchronize)
    with environment(FAKE_CUDA_MEMORY=str(3 << 20)):
        memory = DeviceMemory(cuda)
        kept = memory.empty((1 << 20,), np.uint8)
        said["memory"] = refusal(lambda: memory.empty((1 << 20,), np.float32))
        del kept
    for name, code in (("no card", 100), ("broken", 999)):
        with environment(FAKE_CUDA_FAIL=f"cuInit={code}"):
            said[name] = refusal(Cuda)
    return said


# --- engines


def answers(bundle: str, engine: str = "tensorrt") -> dict[str, list[tuple[int, float]]]:
    """Tokens and their log probabilities for several kinds of prompts, for comparison with another engine."""
    pipeline = Pipeline.open(bundle, engine=engine, threads=1)
    said: dict[str, list[tuple[int, float]]] = {}

    def keep(name: str, result: Result) -> None:
        said[name] = [(each.token_id, each.logprob) for each in result.logprobs or ()]

    def ask(name: str, question: str, *names: str, **options: Any) -> None:
        images = [picture(each) for each in names]
        keep(name, pipeline.generate(question, images=images, max_tokens=6, logprobs=True, **options))

    # in two calls of the vision encoder, because its engine takes 128 patches
    ask("five pictures", "Compare.", "relation", "position", "number", "shape", "color")
    ask("picture", "How many squares are there?", "count")
    ask("again", "What color is the cross?", "count")  # from the cache of the encoder
    ask("chunks", "What number is printed?", "number", prefill_chunk=7)
    ask("two pictures", "Compare.", "shape", "color")
    prompts, images = ["What shape is yellow?", "Hello"], [[picture("shape")], []]
    for row, result in enumerate(pipeline.generate_batch(prompts, images=images, max_tokens=6, logprobs=True)):
        keep(f"row {row}", result)
    chat = pipeline.chat(max_tokens=4, logprobs=True)
    keep("turn 0", chat.send("How many squares are there?", images=[picture("count")]))
    keep("turn 1", chat.send("And circles?"))
    return said


def repeats(bundle: str) -> list[int]:
    """The most memory there was after each of several answers to the same question."""
    pipeline = Pipeline.open(bundle, engine="tensorrt")
    memory: Any = pipeline.engine.memory
    peaks = []
    for question in ("Hello", "Hello", "Hello", "How many?"):
        pipeline.generate(question, max_tokens=4)
        peaks.append(memory.pool.peak)
    return peaks


def reopened(bundle: str) -> list[int]:
    """Free bytes of the card, before and after each of two pipelines that came and went."""
    from deepstitch.runtime.engine.cuda import Cuda

    gc.collect()  # those of other scenarios
    cuda = Cuda()
    free = [cuda.free_bytes()]
    for _ in range(2):
        Pipeline.open(bundle, engine="tensorrt").generate("Hello", max_tokens=2)
        gc.collect()
        free.append(cuda.free_bytes())
    return free


def two_at_a_time(bundle: str, engine: str = "tensorrt") -> list[int]:
    """The tokens with the largest logits, of two rows that take turns with caches of their own."""
    opened = open_engine(engine, Bundle.open(bundle), threads=1)
    random = np.random.default_rng(6)
    states = [DecoderState(opened, capacity=64), DecoderState(opened, capacity=64)]
    found = []
    for turn in (0, 0, 0, 1, 0, 1, 1, 1, 0, 0, 0, 1):
        state = states[turn]
        embeds = random.standard_normal((1, opened.bundle.manifest.model.hidden_size)).astype(np.float32)
        found.append(int(state.step(embeds, state.lengths.astype(np.int64)).argmax()))
    return found


def sequences(bundle: str, engine: str = "tensorrt") -> list[list[float]]:
    """Logits of rows that grow, are forgotten and dropped: the cache where it is."""
    opened = open_engine(engine, Bundle.open(bundle), threads=1)
    model = opened.bundle.manifest.model
    random = np.random.default_rng(5)
    state = DecoderState(opened, rows=2, capacity=64)
    found = []

    def row(count: int, visual: int = 0) -> RowTokens:
        index = np.zeros(count, np.int32)
        index[1 : 1 + visual] = np.arange(1, visual + 1)
        return RowTokens(
            embeds=random.standard_normal((count, model.hidden_size)).astype(np.float32),
            position_ids=np.tile(np.arange(count), (3, 1)),
            deepstack=random.standard_normal((visual, model.num_deepstack * model.hidden_size)).astype(np.float32),
            deepstack_index=index,
        )

    def steps(count: int) -> None:
        for _ in range(count):
            embeds = random.standard_normal((state.rows, model.hidden_size)).astype(np.float32)
            found.append(state.step(embeds, state.lengths.astype(np.int64)).copy())

    first, second = row(9, visual=5), row(4)
    found.extend(state.prefill([first, second], wanted=[range(9), [1, 3]], chunk=6))
    steps(4)
    state.truncate(0, 6)
    steps(1)
    state.drop(0)
    steps(3)
    found.extend(state.prefill([row(5, visual=2)], wanted=[[0, 4]]))
    steps(2)
    return [[float(f"{value:.4g}") for value in logits.reshape(-1)[::97]] for logits in found]


def refusals(bundle: str) -> dict[str, str]:
    """What is said about engines that are not whole, not for this card, or too small for what is asked."""
    with tempfile.TemporaryDirectory() as work:
        return _refusals(Path(bundle), work)


def _refusals(source: Path, work: str) -> dict[str, str]:
    (folder,) = built_engines(source)
    engines = Path(folder.name)
    said: dict[str, str] = {}

    def open_copy(change: Callable[[Path], Any] = lambda copy: None, **variables: str) -> Engine:
        copy = Path(work) / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(source, copy)
        change(copy)
        with environment(**variables):
            return open_engine(None, Bundle.open(copy, verify="size"))

    def damage(name: str, change: Callable[[Path], Any], **variables: str) -> None:
        said[name] = refusal(lambda: open_copy(change, **variables))

    def foreign(copy: Path) -> None:
        """A plan of something else, of which the record is right."""
        path = copy / "engines" / engines / ENGINE_MANIFEST
        plan = path.with_name("decoder.plan")
        plan.write_bytes(b"something else" * 100)
        record = json.loads(path.read_text())
        record["graphs"]["decoder"] |= {"size": plan.stat().st_size, "sha256": file_sha256(plan)}
        path.write_text(json.dumps(record))

    def in_engines(name: str) -> Callable[[Path], Path]:
        return lambda copy: copy / "engines" / engines / name

    plan, library, record = map(in_engines, ("decoder.plan", "libdeepstitch_plugins.so", ENGINE_MANIFEST))
    damage("no engines", lambda copy: shutil.rmtree(copy / "engines"))
    damage("another card", lambda copy: None, FAKE_CUDA_SM="75")
    damage("renamed", lambda copy: plan(copy).parent.rename(copy / "engines" / "other"))
    damage("exported again", lambda copy: append(copy / MANIFEST_NAME, b"\n"))
    damage("truncated", lambda copy: os.truncate(plan(copy), 1000))
    damage("changed", lambda copy: overwrite(plan(copy)))
    damage("missing plan", lambda copy: plan(copy).unlink())
    damage("foreign", foreign)
    damage("no library", lambda copy: library(copy).unlink())
    damage("another library", lambda copy: append(library(copy), b"x"))
    damage("record", lambda copy: append(record(copy), b"x"))
    damage("card's memory", lambda copy: None, FAKE_CUDA_MEMORY=str(1 << 20))
    damage("context", lambda copy: None, FAKE_TENSORRT_FAIL="context-memory")
    with environment(FAKE_TENSORRT_FAIL="execute"):
        said["execute"] = refusal(lambda: Pipeline.open(source).generate("Hello", max_tokens=2))
    said |= too_large(Pipeline.open(source))
    return said


def too_large(pipeline: Pipeline) -> dict[str, str]:
    """Calls that no profile takes."""
    small = picture("count")
    image = np.zeros((256, 384, 3), np.uint8)
    state = DecoderState(pipeline.engine, rows=1)
    rows = DecoderState(pipeline.engine, rows=3)
    embeds = np.zeros((3, pipeline.manifest.model.hidden_size), np.float32)
    return {
        "prompt": refusal(lambda: pipeline.generate("Hello " * 300, images=[small], max_tokens=1)),
        "answer": refusal(lambda: pipeline.generate("Hello", max_tokens=300)),
        "patches": refusal(lambda: pipeline.generate("Hello", images=[image], max_tokens=1)),
        "rows": refusal(lambda: rows.step(embeds, np.zeros(3, np.int64))),
        "guesses": refusal(lambda: pipeline.generate("Hello", max_tokens=4, speculate=2)),
        "logits": refusal(lambda: state.propose(embeds, np.arange(3))),
        "packed": refusal(lambda: open_engine("tensorrt", pipeline.engine.bundle, packed_cache=True)),
    }


def append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


def overwrite(path: Path) -> None:
    """The last byte."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def several(bundle: str, work: str, *names: str) -> dict[str, Any]:
    """Results of several of these functions, and what they logged in files ``NAME.cuda`` and ``NAME.tensorrt``.

    Starting a process and opening engines costs more than most of them.
    """
    results: dict[str, Any] = {}
    for name in names:
        logs = {"FAKE_CUDA_LOG": f"{work}/{name}.cuda", "FAKE_TENSORRT_LOG": f"{work}/{name}.tensorrt"}
        with environment(**logs):
            try:
                results[name] = globals()[name](bundle)
            except Exception:
                results[name] = traceback.format_exc()
    return results


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
