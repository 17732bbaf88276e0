"""A plan of the stand-in: what an engine has to know, and the ONNX graph it computes."""

from __future__ import annotations

import ctypes
import json
import os
import struct
from dataclasses import asdict, dataclass
from typing import Any

from ._api import VERSION

MAGIC = b"FAKETRT\0"


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """An input or output. ``shape`` has numbers and axis names; ``dtype`` is numpy's, as in the graph."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    is_input: bool


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What ``build_serialized_network`` writes and ``deserialize_cuda_engine`` reads."""

    version: str
    sm: int
    name: str
    tensors: tuple[Tensor, ...]
    profiles: tuple[dict[str, tuple[tuple[int, ...], ...]], ...]
    plugins: tuple[tuple[str, str, str], ...]
    num_layers: int
    weight_bytes: int
    device_memory: int
    onnx_path: str
    onnx: bytes

    def to_bytes(self) -> bytes:
        """Magic, length of the header, header, graph."""
        entries = {key: value for key, value in asdict(self).items() if key != "onnx"}
        header = json.dumps(entries | {"onnx_bytes": len(self.onnx)}).encode()
        return MAGIC + struct.pack("<I", len(header)) + header + self.onnx

    @classmethod
    def from_bytes(cls, data: bytes) -> Plan:
        """Read one.

        Raises:
            ValueError: it is something else, or not whole; with TensorRT's kind of words.
        """
        start = len(MAGIC) + 4
        if data[: len(MAGIC)] != MAGIC:
            raise ValueError("Error Code 1: Serialization (Serialization assertion magicTagRead == kMAGIC_TAG failed.)")
        if len(data) < start:
            raise ValueError("Error Code 1: Serialization (Serialization assertion sizeRead == static_cast failed.)")
        (length,) = struct.unpack_from("<I", data, len(MAGIC))
        try:
            entries: dict[str, Any] = json.loads(data[start : start + length])
        except ValueError:
            entries = {}
        graph = data[start + length :]
        if len(graph) != entries.pop("onnx_bytes", None):
            raise ValueError("Error Code 1: Serialization (Serialization assertion sizeRead == static_cast failed.)")
        tensors = tuple(Tensor(**{**each, "shape": tuple(each["shape"])}) for each in entries.pop("tensors"))
        profiles = tuple(
            {name: tuple(tuple(corner) for corner in corners) for name, corners in each.items()}
            for each in entries.pop("profiles")
        )
        plugins = tuple(tuple(each) for each in entries.pop("plugins"))
        return cls(tensors=tensors, profiles=profiles, plugins=plugins, onnx=graph, **entries)

    def problem(self) -> str | None:
        """Why this TensorRT on this card does not take it."""
        if self.version != VERSION:
            return (
                "Error Code 6: API Usage Error (The engine plan file is not compatible with this version of TensorRT, "
                f"expecting library version {VERSION} got {self.version}, please rebuild.)"
            )
        if self.sm != capability():
            here, there = (f"{sm // 10}.{sm % 10}" for sm in (capability(), self.sm))
            return (
                "Error Code 6: API Usage Error (The engine plan file is generated on an incompatible device, expecting "
                f"compute {here} got compute {there}, please rebuild.)"
            )
        return None


def capability() -> int:
    """Of the card: what ``FAKE_TENSORRT_SM`` says, else the driver in this process, else 61."""
    if "FAKE_TENSORRT_SM" in os.environ:
        return int(os.environ["FAKE_TENSORRT_SM"])
    try:
        driver = ctypes.CDLL("libcuda.so.1", mode=os.RTLD_NOLOAD | os.RTLD_NOW)
    except OSError:
        return 61
    found = []
    for number in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
        value = ctypes.c_int()
        if driver.cuDeviceGetAttribute(ctypes.byref(value), number, 0):
            return 61
        found.append(value.value)
    return found[0] * 10 + found[1]
