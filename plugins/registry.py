"""The operators, by the name of their folder."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepstitch.errors import did_you_mean
from deepstitch.plugins.common.case import Array, Case, Refused
from deepstitch.plugins.common.schema import OpSchema, PluginError

__all__ = ["OPS", "PluginOp", "folder_of", "load"]

OPS: Mapping[str, str] = {
    "moe_experts": "MoEExperts",
    "sparse_attention": "SparseAttention",
    "quantized_linear": "QuantizedLinear",
    "rms_norm_rope": "RMSNormRope",
    "deepstack_add": "DeepStackAdd",
    "kv_cache_append": "KVCacheAppend",
}  # folder: op type


@dataclass(frozen=True, slots=True, kw_only=True)
class PluginOp:
    """Everything Python knows about one operator.

    Attributes:
        folder: its name.
        schema: declaration and definition.
        reference: numpy; ``reference(attributes, inputs)`` with resolved attributes.
        cases: calls with their tolerances.
        refused: calls that must be refused.
    """

    folder: str
    schema: OpSchema
    reference: Callable[[Mapping[str, Any], dict[str, Array]], dict[str, Array]]
    cases: tuple[Case, ...]
    refused: tuple[Refused, ...]


def load(folder: str) -> PluginOp:
    """Import an operator by the name of its folder.

    Raises:
        PluginError: there is none of this name.
    """
    if folder not in OPS:
        raise PluginError(f"there is no operator {folder}{did_you_mean(folder, OPS)}")
    package = f"{__package__}.{folder}"
    cases = importlib.import_module(f"{package}.cases")
    return PluginOp(
        folder=folder,
        schema=importlib.import_module(f"{package}.schema").SCHEMA,
        reference=importlib.import_module(f"{package}.reference").reference,
        cases=tuple(cases.CASES),
        refused=tuple(Refused(*each) for each in cases.REFUSED),
    )


def folder_of(op_type: str) -> Path:
    """Where the source of an operator lies.

    Raises:
        PluginError: there is none of this op type.
    """
    for folder, name in OPS.items():
        if name == op_type:
            return Path(__file__).resolve().parent / folder
    raise PluginError(f"there is no operator {op_type}{did_you_mean(op_type, OPS.values())}")
