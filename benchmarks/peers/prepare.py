"""Files each runtime reads, made once from the same checkpoint and kept in the work folder."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.checkpoints import shape_config, write_random_checkpoint
from benchmarks.peers.peers import Variant

__all__ = ["PreparationError", "Workshop"]

_MAX_PIXELS = 1 << 24  # of the published checkpoints
_BUNDLE_FLAGS: dict[str, tuple[str, ...]] = {
    "fp32": ("--weights", "fp32"),
    "fp16": ("--weights", "fp16"),
    "int8": ("--weights", "int8", "--block", "32"),
    "int4": ("--weights", "int4", "--block", "32"),
}
_GGUF_SOURCE = "text.gguf"


class PreparationError(RuntimeError):
    """A file could not be made; the message is what the tool said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workshop:
    """Makes files on demand.

    Attributes:
        work: folder for everything.
        pythons: interpreter per peer.
        export_flags: per variant of ours, flags in the place of the usual ones, or those of a variant of one's own.
        threads: for the quantizer.
        limit_seconds: for one tool.
    """

    work: Path
    pythons: dict[str, str]
    export_flags: dict[str, tuple[str, ...]]
    threads: int
    limit_seconds: float

    def checkpoint(self, shape: str) -> Path:
        """The random checkpoint, in bfloat16."""

        def write(folder: Path) -> None:
            config = shape_config(shape, vision=None if shape == "tiny" else "8x1024")
            write_random_checkpoint(config, folder, dtype="BF16", max_pixels=_MAX_PIXELS)

        return self._once(self.work / shape / "checkpoint", write)

    def files(self, peer: str, variant: Variant, shape: str) -> dict[str, str]:
        """What the child of a peer reads.

        Raises:
            PreparationError: a tool failed.
        """
        checkpoint = self.checkpoint(shape)
        files = {"checkpoint": str(checkpoint)}
        if peer in ("deepstitch", "openvino"):
            files["bundle"] = str(self._bundle(shape, variant.name))
        elif peer == "llama.cpp":
            files["text"] = str(self._gguf(shape, variant.name))
        elif peer == "onnxruntime-genai":
            files["model"] = str(self._genai(shape, variant.name))
        return files

    def _bundle(self, shape: str, weights: str) -> Path:
        flags = self.export_flags.get(weights) or _BUNDLE_FLAGS[weights]

        def export(folder: Path) -> None:
            source = str(self.checkpoint(shape))
            command = [sys.executable, "-m", "deepstitch.cli", "export", source, "-o", str(folder)]
            self._tool([*command, "--target", "ort-cpu", "--no-compare", *flags])

        digest = hashlib.sha256(" ".join(flags).encode()).hexdigest()[:8]
        name = f"{weights}-{digest}" if weights in self.export_flags else weights
        return self._once(self.work / shape / "bundles" / name, export)

    def _gguf(self, shape: str, kind: str) -> Path:
        python = self.pythons["llama.cpp"]

        def write(folder: Path) -> None:
            source = str(self.checkpoint(shape))
            self._tool([python, "-m", "benchmarks.peers.gguf_writer", source, str(folder)])

        def quantize(path: Path) -> None:
            source = str(folder / _GGUF_SOURCE)
            sizes = str(folder / f"{kind}.json")
            command = [python, "-m", "benchmarks.peers.quantize_gguf", source, str(path), kind]
            self._tool([*command, str(self.threads), sizes])

        folder = self._once(self.work / shape / "gguf", write)
        return self._once(folder / f"{kind}.gguf", quantize)

    def _genai(self, shape: str, kind: str) -> Path:
        def build(folder: Path) -> None:
            module = "onnxruntime_genai.models.builder"
            source = str(self.checkpoint(shape))
            cache = str(folder.with_name("genai-cache"))
            command = [self.pythons["onnxruntime-genai"], "-m", module, "-i", source, "-o", str(folder)]
            options = ("--extra_options", "int4_accuracy_level=4") if kind != "fp32" else ()
            self._tool([*command, "-p", kind, "-e", "cpu", "-c", cache, *options])

        return self._once(self.work / shape / "genai" / kind, build)

    def _once(self, path: Path, make: Callable[[Path], None]) -> Path:
        """Make ``path`` under another name, then move it into place; a failure is remembered for this run only."""
        if path.exists():
            return path
        partial = path.with_name(f".{path.name}")
        shutil.rmtree(partial, ignore_errors=True)
        partial.unlink(missing_ok=True)
        partial.parent.mkdir(parents=True, exist_ok=True)
        make(partial)
        partial.rename(path)
        return path

    def _tool(self, command: Sequence[str]) -> None:
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=self.limit_seconds, check=False, errors="replace"
            )
        except subprocess.TimeoutExpired:
            raise PreparationError(f"not ready after {self.limit_seconds:.0f} s: {' '.join(command[1:4])}") from None
        except OSError as error:
            raise PreparationError(str(error)) from None
        if done.returncode:
            lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
            raise PreparationError(" ".join(lines[-1:])[:400] or f"exit code {done.returncode}")
