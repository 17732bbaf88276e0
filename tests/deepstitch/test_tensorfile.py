"""The safetensors reader against the safetensors package, and against damaged files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from deepstitch.errors import CheckpointError
from deepstitch.tensorfile import TensorFile, to_float32


def write(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def f32(shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize("kind", [np.float32, np.float16, ml_dtypes.bfloat16], ids=["F32", "F16", "BF16"])
def test_values_equal_what_was_saved(tmp_path: Path, kind: Any) -> None:
    rng = np.random.default_rng(0)
    saved = {name: rng.standard_normal((3, 5, 2)).astype(kind) for name in ("a", "b")}
    save_file(saved, tmp_path / "x.safetensors", {"made": "here"})
    file = TensorFile.open(tmp_path / "x.safetensors")
    assert set(file) == {"a", "b"} and file.metadata == {"made": "here"}
    for name, values in saved.items():
        entry = file[name]
        assert entry.shape == (3, 5, 2)
        np.testing.assert_array_equal(to_float32(entry.read(), entry.dtype), values.astype(np.float32))
        np.testing.assert_array_equal(to_float32(entry.read(1), entry.dtype), values[1].astype(np.float32))


def test_integers_and_empty_tensors(tmp_path: Path) -> None:
    saved = {"ids": np.arange(4, dtype=np.int64), "none": np.empty((0, 7), np.float32)}
    save_file(saved, tmp_path / "x.safetensors")
    file = TensorFile.open(tmp_path / "x.safetensors")
    np.testing.assert_array_equal(file["ids"].read(), saved["ids"])
    assert file["none"].read().shape == (0, 7)


def test_unknown_tensor_is_suggested(tmp_path: Path) -> None:
    save_file({"lm_head.weight": np.zeros(2, np.float32)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"did you mean 'lm_head\.weight'"):
        TensorFile.open(tmp_path / "x.safetensors")["lm_haed.weight"]


DAMAGED = {
    "empty": (b"", "not a complete safetensors file"),
    "lfs pointer": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    "cut in the header": ((100).to_bytes(8, "little") + b"{}", "not a complete"),
    "not json": ((3).to_bytes(8, "little") + b"{x}", "damaged safetensors header"),
    "not utf-8": ((2).to_bytes(8, "little") + b"\xff\xfe", "damaged safetensors header"),
    "a list": ((2).to_bytes(8, "little") + b"[]", "not an object"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files_are_refused(tmp_path: Path, case: str) -> None:
    content, message = DAMAGED[case]
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        TensorFile.open(path)


BAD_HEADERS = {
    "gap": ({"a": f32([1], 0, 4), "b": f32([1], 8, 12)}, 12, "overlaps another one or leaves a gap"),
    "overlap": ({"a": f32([2], 0, 8), "b": f32([1], 4, 8)}, 8, "overlaps another one or leaves a gap"),
    "truncated": ({"a": f32([4], 0, 16)}, 12, "truncated"),
    "trailing bytes": ({"a": f32([1], 0, 4)}, 9, "longer than its header says"),
    "shape and span disagree": ({"a": f32([3], 0, 4)}, 4, r"says F32 \[3\] but spans bytes 0\.\.4"),
    "negative size": ({"a": f32([-1, -1], 0, 4)}, 4, "but spans bytes"),
    "unknown dtype": ({"a": f32([1], 0, 4) | {"dtype": "F8_E4M3"}}, 4, "has dtype 'F8_E4M3'"),
    "entry without offsets": ({"a": {"dtype": "F32", "shape": [1]}}, 4, "at tensor 'a'"),
    "metadata is text": ({"__metadata__": "x"}, 0, "__metadata__ is not an object"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_contradicting_headers_are_refused(tmp_path: Path, case: str) -> None:
    header, num_bytes, message = BAD_HEADERS[case]
    with pytest.raises(CheckpointError, match=message):
        TensorFile.open(write(tmp_path / "x.safetensors", header, bytes(num_bytes)))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="file not found"):
        TensorFile.open(tmp_path / "x.safetensors")
