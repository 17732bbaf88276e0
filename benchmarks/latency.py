"""From a picture and a question to the answer: deepstitch against transformers, same weights, same run,
interleaved.

    python -m benchmarks.latency --shape sample --output benchmarks/results/latency_sample.json

Per runtime: load, time to first token (picture preprocessing, vision encoder, prefill) and decode tokens per
second, as median, minimum and maximum over ``--rounds``; ratios are transformers / deepstitch for times,
deepstitch / transformers for rates. Both run in fp32 with the same number of threads.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.checkpoints import shape_config, write_random_checkpoint
from benchmarks.common import spread, write_report
from deepstitch.models.sample.files import CHECKPOINT

QUESTION = "what color is the circle ?"


class Deepstitch:
    """Our pipeline on an exported bundle."""

    def __init__(self, checkpoint: Path, scratch: Path, threads: int) -> None:
        import deepstitch
        from deepstitch.export import ExportConfig, export_checkpoint

        bundle = scratch / "bundle"
        export_checkpoint(ExportConfig(checkpoint=checkpoint, output=bundle, target="ort-cpu", progress=False))
        start = time.perf_counter()
        self.pipeline = deepstitch.load(bundle, threads=threads, encoder_cache_bytes=0)
        self.load_seconds = time.perf_counter() - start

    def answer(self, image: Image.Image, tokens: int) -> tuple[float, list[int]]:
        """Seconds and token ids of one answer of exactly ``tokens`` tokens."""
        start = time.perf_counter()
        result = self.pipeline.generate(QUESTION, images=[image], max_tokens=tokens, ignore_eos=True)
        return time.perf_counter() - start, list(result.token_ids)


class Transformers:
    """Hugging Face transformers, its processor and ``generate``."""

    def __init__(self, checkpoint: Path, scratch: Path, threads: int) -> None:
        import torch
        from transformers import AutoTokenizer, Qwen3VLMoeForConditionalGeneration
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        torch.set_num_threads(threads)
        start = time.perf_counter()
        self.model = Qwen3VLMoeForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self.load_seconds = time.perf_counter() - start
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        self.image_processor = Qwen2VLImageProcessorPil.from_pretrained(checkpoint)

    def answer(self, image: Image.Image, tokens: int) -> tuple[float, list[int]]:
        """Seconds and token ids of one answer of exactly ``tokens`` tokens."""
        import torch

        start = time.perf_counter()
        content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
        chat = [{"role": "user", "content": content}]
        text = self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        pixels = self.image_processor(images=[image], return_tensors="pt")
        merged = int(pixels["image_grid_thw"].prod()) // 4
        ids = self.tokenizer(text.replace("<|image_pad|>", "<|image_pad|>" * merged), return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            output = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                mm_token_type_ids=(ids == self.model.config.image_token_id).int(),
                **pixels,
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
            )
        return time.perf_counter() - start, output[0, ids.shape[1] :].tolist()


def measure(checkpoint: Path, scratch: Path, side: int, tokens: int, rounds: int, threads: int) -> dict[str, Any]:
    """Interleave the runtimes; the first round warms up and is dropped."""
    runtimes = {kind.__name__.lower(): kind(checkpoint, scratch, threads) for kind in (Deepstitch, Transformers)}
    seconds: dict[str, dict[str, list[float]]] = {name: {"first_token": [], "decode_rate": []} for name in runtimes}
    generator = np.random.default_rng(0)
    equal = True
    for round_number in range(rounds + 1):
        image = Image.fromarray(generator.integers(0, 256, (side, side, 3), dtype=np.uint8))
        answers = {}
        for name, runtime in runtimes.items():
            first, _ = runtime.answer(image, 1)
            whole, answers[name] = runtime.answer(image, tokens)
            if round_number:
                seconds[name]["first_token"].append(first)
                seconds[name]["decode_rate"].append((tokens - 1) / (whole - first))
        equal &= answers["deepstitch"] == answers["transformers"]
    figures = {
        name: {
            "load_seconds": runtimes[name].load_seconds,
            "first_token_seconds": spread(values["first_token"]),
            "decode_tokens_per_second": spread(values["decode_rate"]),
        }
        for name, values in seconds.items()
    }
    ours, theirs = figures["deepstitch"], figures["transformers"]
    return {
        "image": f"{side}x{side}",
        "new_tokens": tokens,
        "rounds": rounds,
        "threads": threads,
        "same_tokens": equal,
        "runtimes": figures,
        "ratios": {
            "first_token": theirs["first_token_seconds"]["median"] / ours["first_token_seconds"]["median"],
            "decode": ours["decode_tokens_per_second"]["median"] / theirs["decode_tokens_per_second"]["median"],
            "load": theirs["load_seconds"] / ours["load_seconds"],
        },
    }


def main() -> None:
    """Parse arguments, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("sample", "mid"), default="sample")
    parser.add_argument("--side", type=int, default=256, help="picture side in pixels")
    parser.add_argument("--tokens", type=int, default=33)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, help="JSON report")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = CHECKPOINT
        if arguments.shape != "sample":
            checkpoint = Path(scratch, "checkpoint")
            write_random_checkpoint(shape_config(arguments.shape), checkpoint)
        result = measure(
            checkpoint, Path(scratch), arguments.side, arguments.tokens, arguments.rounds, arguments.threads
        )
    write_report("latency", {"shape": arguments.shape, **result}, arguments.output)


if __name__ == "__main__":
    main()
