"""From a picture and a question to the answer: deepstitch against transformers, same weights, same run, interleaved.

    python -m benchmarks.latency --shape sample --output benchmarks/results/latency_sample.json

Each runtime lives in a process of its own, so that the idle threads of one do not slow the other, and answers when its
turn comes. Per runtime: load, time to first token (picture preprocessing, vision encoder, prefill) and decode tokens
per second, as median, minimum and maximum over ``--rounds``; ratios above 1 are in favour of deepstitch. Both run in
fp32 with the same number of threads; ``same_tokens`` says whether all answers were equal.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from benchmarks.checkpoints import shape_config, write_random_checkpoint
from benchmarks.common import spread, write_report
from deepstitch.models.sample.files import CHECKPOINT

QUESTION = "What color is the circle?"


class Runtime(Protocol):
    """What is measured."""

    load_seconds: float

    def answer(self, image: Image.Image, tokens: int) -> tuple[float, list[int]]:
        """Seconds and token ids of one answer of exactly ``tokens`` tokens."""


class Deepstitch:
    """Our pipeline on an exported bundle."""

    def __init__(self, bundle: Path, threads: int) -> None:
        import deepstitch

        start = time.perf_counter()
        self.pipeline = deepstitch.load(bundle, threads=threads, encoder_cache_bytes=0)
        self.load_seconds = time.perf_counter() - start

    def answer(self, image: Image.Image, tokens: int) -> tuple[float, list[int]]:
        """See :class:`Runtime`."""
        start = time.perf_counter()
        result = self.pipeline.generate(QUESTION, images=[image], max_tokens=tokens, ignore_eos=True)
        return time.perf_counter() - start, list(result.token_ids)


class Transformers:
    """Hugging Face transformers: its tokenizer, image processor and ``generate``."""

    def __init__(self, checkpoint: Path, threads: int) -> None:
        import torch
        from transformers import AutoTokenizer, Qwen3VLMoeForConditionalGeneration
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        torch.set_num_threads(threads)
        start = time.perf_counter()
        self.model = Qwen3VLMoeForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self.load_seconds = time.perf_counter() - start
        self.model.generation_config.eos_token_id = None  # answers of a fixed length
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        self.image_processor = Qwen2VLImageProcessorPil.from_pretrained(checkpoint)

    def answer(self, image: Image.Image, tokens: int) -> tuple[float, list[int]]:
        """See :class:`Runtime`."""
        import torch

        start = time.perf_counter()
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
        text = self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        pixels = self.image_processor(images=[image], return_tensors="pt")
        merged = int(pixels["image_grid_thw"].prod()) // 4
        text = text.replace("<|image_pad|>", "<|image_pad|>" * merged)
        ids = self.tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            output = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                mm_token_type_ids=(ids == self.model.config.image_token_id).int(),
                **pixels,
                max_new_tokens=tokens,
                do_sample=False,
            )
        return time.perf_counter() - start, output[0, ids.shape[1] :].tolist()


RUNTIMES = {"deepstitch": Deepstitch, "transformers": Transformers}


def serve(name: str, folder: Path, threads: int) -> None:
    """Child process: answer ``[seed, side, tokens]`` lines until stdin ends."""
    runtime: Runtime = RUNTIMES[name](folder, threads)
    sys.stdout.write(json.dumps(runtime.load_seconds) + "\n")
    sys.stdout.flush()
    for line in sys.stdin:
        seed, side, tokens = json.loads(line)
        pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
        sys.stdout.write(json.dumps(runtime.answer(Image.fromarray(pixels), tokens)) + "\n")
        sys.stdout.flush()


class Worker:
    """A runtime in its own process."""

    def __init__(self, name: str, folder: Path, threads: int) -> None:
        command = [sys.executable, "-m", "benchmarks.latency", "--serve", name, str(folder), "--threads", str(threads)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.load_seconds: float = self._receive()

    def _receive(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def answer(self, seed: int, side: int, tokens: int) -> tuple[float, list[int]]:
        """Seconds and token ids of one answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([seed, side, tokens]) + "\n")
        self.process.stdin.flush()
        seconds, ids = self._receive()
        return seconds, ids


def measure(folders: dict[str, Path], side: int, tokens: int, rounds: int, threads: int) -> dict[str, Any]:
    """Interleave the runtimes; the first two rounds warm up and are dropped."""
    workers = {name: Worker(name, folder, threads) for name, folder in folders.items()}
    figures: dict[str, dict[str, list[float]]] = {name: {"first": [], "rate": []} for name in workers}
    equal = True
    for seed in range(rounds + 2):
        answers = {}
        for name, worker in workers.items():
            first, _ = worker.answer(seed, side, 1)
            whole, answers[name] = worker.answer(seed, side, tokens)
            if seed >= 2:
                figures[name]["first"].append(first)
                figures[name]["rate"].append((tokens - 1) / max(whole - first, 1e-9))
        equal &= len({tuple(ids) for ids in answers.values()}) == 1
    for worker in workers.values():
        worker.process.communicate()
    runtimes = {
        name: {
            "load_seconds": workers[name].load_seconds,
            "first_token_seconds": spread(values["first"]),
            "decode_tokens_per_second": spread(values["rate"]),
        }
        for name, values in figures.items()
    }
    return {"same_tokens": equal, "runtimes": runtimes, "ratios": _ratios(runtimes)}


def _ratios(runtimes: dict[str, Any]) -> dict[str, float]:
    ours, theirs = runtimes["deepstitch"], runtimes["transformers"]
    return {
        "first_token": theirs["first_token_seconds"]["median"] / ours["first_token_seconds"]["median"],
        "decode": ours["decode_tokens_per_second"]["median"] / theirs["decode_tokens_per_second"]["median"],
        "load": theirs["load_seconds"] / ours["load_seconds"],
    }


def _export(checkpoint: Path, bundle: Path) -> Path:
    from deepstitch.export import ExportConfig, export_checkpoint

    return export_checkpoint(ExportConfig(checkpoint=checkpoint, output=bundle, target="ort-cpu", progress=False))


def main() -> None:
    """Parse arguments, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("sample", "mid"), default="sample")
    parser.add_argument("--side", type=int, default=256, help="picture side in pixels")
    parser.add_argument("--tokens", type=int, default=33)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, help="JSON report")
    parser.add_argument("--serve", nargs=2, metavar=("RUNTIME", "DIR"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(given.serve[0], Path(given.serve[1]), given.threads)
        return
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = CHECKPOINT
        if given.shape != "sample":
            checkpoint = Path(scratch, "checkpoint")
            write_random_checkpoint(shape_config(given.shape), checkpoint)
        folders = {"deepstitch": _export(checkpoint, Path(scratch, "bundle")), "transformers": checkpoint}
        result = measure(folders, given.side, given.tokens, given.rounds, given.threads)
    settings = {"image": f"{given.side}x{given.side}", "new_tokens": given.tokens, "rounds": given.rounds}
    write_report("latency", {"shape": given.shape, **settings, "threads": given.threads, **result}, given.output)


if __name__ == "__main__":
    main()
