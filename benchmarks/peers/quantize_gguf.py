"""Quantize a GGUF with llama.cpp's own quantizer, and list the bytes of each tensor in a JSON file beside it.

python -m benchmarks.peers.quantize_gguf IN OUT TYPE THREADS SIZES
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path

import gguf
import llama_cpp.llama_cpp as lib

FILE_TYPES = {"F32": 0, "BF16": 32, "Q8_0": 7, "Q4_0": 2, "Q4_K_M": 15}


def main() -> None:
    """Quantize one file."""
    source, target, kind, threads, sizes = sys.argv[1:]
    params = lib.llama_model_quantize_default_params()
    params.ftype = FILE_TYPES[kind]
    params.nthread = int(threads)
    code = lib.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params))
    if code:
        raise SystemExit(f"llama_model_quantize returned {code}")
    tensors = {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(target).tensors}
    Path(sizes).write_text(json.dumps(tensors), "utf-8")


if __name__ == "__main__":
    main()
