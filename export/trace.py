"""From a config to the canonical graphs: standard ONNX plus a few ``deepstitch`` operators, traced without
any weights.

The models are built under ``FakeTensorMode``: parameters have shapes and no data, so tracing a 235B model
takes megabytes. Weights are bound afterwards, from the checkpoint, by parameter name.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from deepstitch.export.contract import decoder_contract, vision_contract
from deepstitch.export.functions import OPSET, attach_functions
from deepstitch.manifest import TensorSpec
from deepstitch.models.build import AnyModel, build_model
from deepstitch.models.config import ModelConfig
from deepstitch.models.ops import CompactDeepStack
from deepstitch.models.text import KVCache
from deepstitch.models.vl import Qwen3VLMoeForConditionalGeneration

__all__ = ["INV_FREQ", "trace_decoder", "trace_vision_encoder"]

INV_FREQ = "rotary_inv_freq"  # the one constant that is not a checkpoint tensor
_TORCH_OPSET = 23  # the newest torch's own translation knows; every op it emits means the same in OPSET
_EXAMPLE_SIZES = {"P": 32, "N+1": 3, "B": 2, "S": 5, "R": 7, "L": 3, "C": 11}


class _DecoderGraph(nn.Module):
    """The decoder with the inputs and outputs of the contract."""

    def __init__(self, model: AnyModel) -> None:
        super().__init__()
        self.source = model
        self.rotary_inv_freq = nn.Buffer(torch.empty(model.config.text.head_dim // 2))

    def forward(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        names = [spec.name for spec in decoder_contract(self.source.config)[0]]
        given = dict(zip(names, arguments, strict=True))
        layers = range(self.source.config.text.num_hidden_layers)
        cache = KVCache(
            [given[f"past_key_values.{i}.key"] for i in layers],
            [given[f"past_key_values.{i}.value"] for i in layers],
            given["past_lengths"],
            given["query_lengths"],
        )
        deepstack = None
        if self.source.config.num_deepstack:
            deepstack = CompactDeepStack(given["deepstack_embeds"], given["deepstack_index"])
        hidden = self.source.language_model(
            given["inputs_embeds"],
            given["position_ids"],
            input_deepstack_embeds=deepstack,
            cache=cache,
            inv_freq=self.rotary_inv_freq,
            final_rows=given["logit_index"],
        )
        present = [part for pair in zip(cache.keys, cache.values, strict=True) for part in pair]
        return self.source.lm_head(hidden), *present


class _VisionGraph(nn.Module):
    """The vision encoder with the inputs and outputs of the contract."""

    def __init__(self, model: AnyModel) -> None:
        super().__init__()
        self.source = model

    def forward(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        assert isinstance(self.source, Qwen3VLMoeForConditionalGeneration)
        return self.source.visual(*arguments)


def trace_decoder(config: ModelConfig) -> ir.Model:
    """The canonical ``decoder`` graph; initializers are named like checkpoint parameters and hold no data."""
    model = _trace(_DecoderGraph, config, *decoder_contract(config))
    exponents = np.arange(0, config.text.head_dim, 2, dtype=np.float32) / np.float32(config.text.head_dim)
    inv_freq = (1.0 / np.float32(config.text.rope_theta) ** exponents).astype(np.float32)
    model.graph.initializers[INV_FREQ].const_value = ir.tensor(inv_freq, name=INV_FREQ)
    return model


def trace_vision_encoder(config: ModelConfig) -> ir.Model:
    """The canonical ``vision_encoder`` graph."""
    assert config.vision is not None
    return _trace(_VisionGraph, config, *vision_contract(config.vision))


def _trace(
    wrapper: Any, config: ModelConfig, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]
) -> ir.Model:
    axes = {name: torch.export.Dim(_dim_name(name)) for spec in inputs for name in spec.shape if isinstance(name, str)}
    if "P" in axes:  # whole merge blocks only, so that the merged length is a whole number
        assert config.vision is not None
        axes["P"] = config.vision.spatial_merge_size**2 * torch.export.Dim("T")
    dynamic = tuple({i: axes[n] for i, n in enumerate(spec.shape) if isinstance(n, str)} for spec in inputs)
    with FakeTensorMode(), _quiet_torch():
        examples = tuple(_example(spec) for spec in inputs)
        program = torch.onnx.export(
            wrapper(build_model(config).eval()),
            examples,
            dynamic_shapes=(dynamic,),
            dynamo=True,
            opset_version=_TORCH_OPSET,
            optimize=False,  # its passes read weights, and there are none
            verbose=False,
            input_names=[spec.name for spec in inputs],
            output_names=[spec.name for spec in outputs],
        )
    assert program is not None
    return _tidy(program.model, inputs, outputs)


def _dim_name(axis: str) -> str:
    return {"N+1": "N_plus_1"}.get(axis, axis)


def _example(spec: TensorSpec) -> Tensor:
    shape = [_EXAMPLE_SIZES[size] if isinstance(size, str) else size for size in spec.shape]
    return torch.zeros(shape, dtype=getattr(torch, spec.dtype))


@contextlib.contextmanager
def _quiet_torch() -> Iterator[None]:
    """torch's exporter logs and warns about its own internals; none of it concerns the user."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _tidy(model: ir.Model, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> ir.Model:
    graph = model.graph
    for specs, values in ((inputs, graph.inputs), (outputs, graph.outputs)):
        for spec, value in zip(specs, values, strict=True):
            value.name = spec.name
            value.shape = ir.Shape(spec.shape)
    for name, value in list(graph.initializers.items()):
        value.const_value = None  # a fake tensor
        value.metadata_props.clear()
        if name.startswith("source."):
            value.name = name.removeprefix("source.")
    for node in graph.all_nodes():
        scope = node.metadata_props.get("pkg.torch.onnx.name_scopes")
        node.metadata_props.clear()
        if scope:
            node.metadata_props["scope"] = scope
    graph.opset_imports[""] = OPSET
    model.ir_version = 11
    model.producer_name, model.producer_version = "deepstitch", None
    model.metadata_props.clear()
    graph.metadata_props.clear()
    attach_functions(model)
    return model
