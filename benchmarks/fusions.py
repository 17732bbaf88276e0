"""What each lowering pass of ``ort-cpu`` brings, and what the fusions that were left out would cost.

    python -m benchmarks.fusions --threads 2 --output benchmarks/results/fusions.json

Two graphs at a time on the same random weights and inputs, called in turns; median milliseconds per call of each.
``passes`` lowers four layers with the attention of 30B-A3B (32/4 heads) and a small MLP, or four blocks of a vision
encoder of width 1024, with a pass and without it. ``operators`` puts a fused operator beside the nodes it would
replace. ``--cpu-time`` counts the processor time of a single thread instead of time passed: for a machine that is busy
with other work.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from benchmarks.checkpoints import shape_config
from benchmarks.common import spread, write_report
from benchmarks.operator_pairs import operator_pairs
from deepstitch.export.contract import vision_contract
from deepstitch.export.facts import vision_facts
from deepstitch.export.functions import parse_functions, segment_attention
from deepstitch.export.lower import ort_cpu
from deepstitch.export.passes.cached_attention_to_ort import CachedAttentionToOrt
from deepstitch.export.passes.constant_reshapes import ConstantReshapes
from deepstitch.export.passes.inline_functions import InlineFunctions
from deepstitch.export.passes.scatter_deepstack import ScatterDeepStack
from deepstitch.export.passes.split_sequences import SplitSequences
from deepstitch.export.trace import trace_decoder, trace_vision_encoder
from deepstitch.models import ModelConfig
from deepstitch.runtime.preprocess.vision_inputs import vision_inputs

Feeds = dict[str, np.ndarray]
Pair = tuple[bytes, bytes, Feeds]  # without, with, inputs


def bench_config() -> ModelConfig:
    """Attention and width of 30B-A3B, everything else small."""
    raw = shape_config("dense", vision="8x1024")
    raw["tie_word_embeddings"] = False
    raw["text_config"] |= {
        "num_hidden_layers": 4,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "intermediate_size": 1024,
        "vocab_size": 1024,
    }
    raw["vision_config"] |= {"depth": 4, "deepstack_visual_indexes": [0, 1, 2]}
    return ModelConfig.from_dict(raw)


def lowered(traced: ir.Model, *, without: str | None = None) -> bytes:
    """The graph after the passes of ``ort-cpu`` that concern no weights, one of them left out; random weights."""
    model = traced.clone()
    kernel = "com.microsoft.MultiHeadAttention <num_heads: int = @num_heads, scale: float = @scale>"
    one_by_one = segment_attention(kernel)
    segments = one_by_one if without == "one batch of equal segments" else ort_cpu._SEGMENT_ATTENTION
    passes = {
        "ConstantReshapes": ConstantReshapes(),
        "SplitSequences": SplitSequences(),
        "ScatterDeepStack": ScatterDeepStack(),
        "CachedAttentionToOrt": CachedAttentionToOrt(grouped=without != "grouped form of CachedAttentionToOrt"),
        "InlineFunctions": InlineFunctions(parse_functions((segments,), com_microsoft=1)),
    }
    for name, each in passes.items():
        if name != without:
            each(model)
    generator = np.random.default_rng(0)
    for name, value in model.graph.initializers.items():
        if value.const_value is None:
            shape = [int(size) for size in value.shape or ()]
            values = generator.standard_normal(shape, dtype=np.float32) * np.float32(0.02 if len(shape) > 1 else 1)
            value.const_value = ir.tensor(values, name=name)
    return ir.serde.serialize_model(model).SerializeToString()


def decoder_feeds(config: ModelConfig, *, past: int, new: int, visual: int = 0) -> Feeds:
    """One row of ``new`` tokens after ``past``, the first ``visual`` of them visual tokens."""
    text, generator = config.text, np.random.default_rng(0)
    embeds = generator.standard_normal((1 + visual, config.num_deepstack * text.hidden_size), dtype=np.float32)
    embeds[0] = 0
    index = np.zeros((1, new), np.int32)
    index[0, :visual] = np.arange(1, 1 + visual)
    cache = (1, text.num_key_value_heads, past + new, text.head_dim)
    return {
        "inputs_embeds": generator.standard_normal((1, new, text.hidden_size), dtype=np.float32),
        "position_ids": np.tile(np.arange(past, past + new), (3, 1, 1)),
        "deepstack_embeds": embeds,
        "deepstack_index": index,
        "past_lengths": np.array([past], np.int32),
        "query_lengths": np.array([new], np.int32),
        "logit_index": np.array([[new - 1]]),
        **{
            f"past_key_values.{layer}.{part}": generator.standard_normal(cache, dtype=np.float32)
            for layer in range(text.num_hidden_layers)
            for part in ("key", "value")
        },
    }


def vision_feeds(config: ModelConfig, grids: list[tuple[int, int, int]]) -> Feeds:
    """Random patches of some images."""
    facts = vision_facts(config)
    assert facts is not None and config.vision is not None
    width = int(vision_contract(config.vision)[0][0].shape[1])
    patches = sum(steps * height * columns for steps, height, columns in grids)
    pixels = np.random.default_rng(0).standard_normal((patches, width), dtype=np.float32)
    return {"pixel_values": pixels, **vision_inputs(grids, facts)._asdict()}


def pass_pairs() -> Iterator[tuple[str, Pair]]:
    """Every pass in the calls it is meant for."""
    config = bench_config()
    decoder, vision = trace_decoder(config), trace_vision_encoder(config)
    full = lowered(decoder)
    for name, past, new, visual in (
        ("CachedAttentionToOrt", 2048, 1, 0),
        ("CachedAttentionToOrt", 0, 512, 0),
        ("grouped form of CachedAttentionToOrt", 256, 1, 0),
        ("grouped form of CachedAttentionToOrt", 2048, 1, 0),
        ("grouped form of CachedAttentionToOrt", 8192, 1, 0),
        ("ScatterDeepStack", 64, 1, 0),
        ("ScatterDeepStack", 0, 512, 0),
        ("ScatterDeepStack", 0, 512, 256),
    ):
        feeds = decoder_feeds(config, past=past, new=new, visual=visual)
        yield f"{name}: past {past}, new {new}, visual {visual}", (lowered(decoder, without=name), full, feeds)
    full = lowered(vision)
    for name, grids in (
        ("ConstantReshapes", [(1, 32, 32)]),
        ("SplitSequences", [(1, 32, 32)]),
        ("one batch of equal segments", [(1, 32, 32)]),
        ("one batch of equal segments", [(16, 8, 8)]),
    ):
        yield f"{name}: grids {grids}", (lowered(vision, without=name), full, vision_feeds(config, grids))


def runner(model: bytes, feeds: Feeds, threads: int) -> Callable[[], None]:
    """A call of a graph; a cache is bound in place."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    binding, kept = session.io_binding(), {name: array.copy() for name, array in feeds.items()}
    for name, array in kept.items():
        binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
    for output in session.get_outputs():
        past = kept.get(output.name.replace("present", "past_key_values"))
        if past is None:
            binding.bind_output(output.name, "cpu")
        else:
            binding.bind_output(output.name, "cpu", 0, past.dtype.type, past.shape, past.ctypes.data)

    def call(_keep_alive: Mapping[str, np.ndarray] = kept) -> None:
        session.run_with_iobinding(binding)

    return call


def measure(pair: Pair, threads: int, rounds: int, clock: Callable[[], float]) -> dict[str, Any]:
    """Milliseconds per call of both graphs."""
    *models, feeds = pair
    calls = [runner(model, feeds, threads) for model in models]
    taken: list[list[float]] = [[], []]
    for turn in range(rounds + 1):
        for call, times in zip(calls, taken, strict=True):
            start = clock()
            call()
            if turn:
                times.append(1e3 * (clock() - start))
    without, with_it = (spread(times) for times in taken)
    return {"without_ms": without, "with_ms": with_it, "speed_up": without["median"] / with_it["median"]}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--cpu-time", action="store_true", help="processor time of one thread")
    parser.add_argument("--only", choices=("passes", "operators"))
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    threads = 1 if arguments.cpu_time else arguments.threads
    clock = time.thread_time if arguments.cpu_time else time.perf_counter
    kinds = {"passes": pass_pairs, "operators": operator_pairs}
    report = {
        kind: {name: measure(pair, threads, arguments.rounds, clock) for name, pair in pairs()}
        for kind, pairs in kinds.items()
        if arguments.only in (None, kind)
    }
    write_report("fusions", {"threads": threads, "cpu_time": arguments.cpu_time, **report}, arguments.output)


if __name__ == "__main__":
    main()
