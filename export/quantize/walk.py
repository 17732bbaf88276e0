"""Calibration prompts on their way through the model, one layer in memory at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from torch import Tensor, nn

from deepstitch.blockwise import WeightFormat, dequantize, unpack_zero_points
from deepstitch.export.quantize.rounding import Quantized
from deepstitch.models.build import build_model
from deepstitch.models.checkpoint import WeightSource
from deepstitch.models.config import ModelConfig
from deepstitch.models.vl import Qwen3VLMoeForConditionalGeneration
from deepstitch.runtime.preprocess import Prompt

__all__ = ["ExpertStack", "LayerWalk", "QuantizedStack", "StackedExperts"]


class ExpertStack:
    """One weight of all experts, read from the checkpoint expert by expert: ``stack[e]`` is ``[K, N]``."""

    def __init__(self, source: WeightSource) -> None:
        self._source = source

    def __len__(self) -> int:
        return self._source.shape[0]

    def __getitem__(self, expert: int) -> Tensor:
        return torch.from_numpy(self._source.read_float32(expert, expert + 1)[0])


class QuantizedStack:
    """One weight of all experts as the quantized model has it, indexed like :class:`ExpertStack`.

    Experts are packed one by one as they come, in any order and from any thread.

    Attributes:
        arrays: packed, by suffix of the parameter's name: values ``""``, ``".scales"`` and, if the format has them,
            ``".zero_points"``.
    """

    def __init__(self, stored: WeightFormat, shape: tuple[int, ...]) -> None:
        """Make room.

        Args:
            stored: the format.
            shape: ``[E, N, K]``.
        """
        self._stored = stored
        self.arrays: dict[str, npt.NDArray[Any]] = {
            "": np.empty(stored.values_shape(shape), np.uint8),
            ".scales": np.empty(stored.scales_shape(shape), np.float32),
        }
        if not stored.symmetric:
            self.arrays[".zero_points"] = np.empty(stored.zero_points_shape(shape), np.uint8)

    def put(self, expert: int, result: Quantized) -> None:
        """Pack one expert ``[N, K]``."""
        for suffix, array in result.arrays().items():
            self.arrays[suffix][expert] = array

    def __len__(self) -> int:
        return len(self.arrays[".scales"])

    def __getitem__(self, expert: int) -> Tensor:
        scales = self.arrays[".scales"][expert]
        zero_points = None
        if not self._stored.symmetric:
            zero_points = unpack_zero_points(self.arrays[".zero_points"][expert], scales.shape, self._stored.bits)
        return torch.from_numpy(dequantize(self.arrays[""][expert], scales, zero_points, self._stored)).T


Stack = ExpertStack | QuantizedStack


class StackedExperts(nn.Module):
    """Stands in for :class:`deepstitch.models.moe.Experts`; its weights are indexed and never whole."""

    def __init__(self, gate_up_proj: Stack, down_proj: Stack) -> None:
        super().__init__()
        self.gate_up_proj = gate_up_proj
        self.down_proj = down_proj


class _Reached(Exception):
    """The module whose input was wanted has been called."""


class LayerWalk:
    """Hidden states of every prompt in front of one decoder layer.

    Attributes:
        hidden: per prompt ``[1, S, H]``.
    """

    def __init__(self, config: ModelConfig, sources: Mapping[str, WeightSource], prompts: Sequence[Prompt]) -> None:
        """Nothing is read yet; :meth:`start` or :meth:`load` comes first."""
        self.hidden: list[Tensor] = []
        self._config = config
        self._sources = sources
        self._prompts = prompts
        with torch.device("meta"):
            self._model = build_model(config).eval()
        self._prefix = "model.language_model." if config.vision is not None else "model."
        with torch.no_grad():
            positions = [torch.from_numpy(prompt.position_ids)[:, None] for prompt in prompts]
            decoder = self._model.language_model
            self._cos_sin = [decoder.rotary(each) for each in positions]
        self._deepstack: list[Tensor | None] = [None] * len(prompts)

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return self._config.text.num_hidden_layers

    def token_ids(self) -> list[npt.NDArray[np.int64]]:
        """Ids of the text tokens of every prompt."""
        visual_ids = self._visual_ids()
        return [prompt.input_ids[~np.isin(prompt.input_ids, visual_ids)] for prompt in self._prompts]

    @property
    def embedding(self) -> str:
        """Parameter name of the token embedding."""
        return f"{self._prefix}embed_tokens.weight"

    def _visual_ids(self) -> list[int]:
        ids = (self._config.image_token_id, self._config.video_token_id)
        return [each for each in ids if each is not None]

    def layer_prefix(self, index: int) -> str:
        """Parameter names of a layer begin with this."""
        return f"{self._prefix}layers.{index}."

    def start(self) -> None:
        """Embed the prompts, with the visual rows in place."""
        table = self._sources[self.embedding]
        ids = np.unique(np.concatenate([prompt.input_ids for prompt in self._prompts]))
        rows = np.concatenate([table.read_float32(int(i), int(i) + 1) for i in ids])
        self.hidden = [torch.from_numpy(rows[np.searchsorted(ids, prompt.input_ids)])[None] for prompt in self._prompts]
        self._encode_images()

    def _encode_images(self) -> None:
        model = self._model
        if not isinstance(model, Qwen3VLMoeForConditionalGeneration):
            return
        visual_ids = self._visual_ids()
        with self._filled(model.visual, "model.visual."), torch.no_grad():
            for row, prompt in enumerate(self._prompts):
                if prompt.vision is None:
                    continue
                inputs = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in _arrays(prompt)}
                embeds, deepstack = model.visual(**inputs)
                mask = torch.from_numpy(np.isin(prompt.input_ids, visual_ids))[None, :, None]
                self.hidden[row] = self.hidden[row].masked_scatter(mask, embeds)
                dense = torch.zeros(*self.hidden[row].shape[:2], deepstack.shape[-1])
                self._deepstack[row] = dense.masked_scatter(mask, deepstack)

    @contextlib.contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """A decoder layer with its weights, the experts indexed from the checkpoint; gone afterwards."""
        layer = self._model.language_model.layers[index]
        prefix = self.layer_prefix(index)
        if self._config.text.is_moe_layer(index):
            names = (f"{prefix}mlp.experts.gate_up_proj", f"{prefix}mlp.experts.down_proj")
            moe: Any = layer.mlp
            moe.experts = StackedExperts(*(ExpertStack(self._sources[name]) for name in names))
        with self._filled(layer, prefix):
            yield layer

    def inputs_of(self, module: nn.Module, layer: nn.Module) -> list[Tensor]:
        """Run every prompt through ``layer`` as far as ``module``; what reaches it, per prompt."""
        caught: list[Tensor] = []

        def catch(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            caught.append(arguments[0])
            raise _Reached

        handle = module.register_forward_pre_hook(catch)
        try:
            for row in range(len(self.hidden)):
                with contextlib.suppress(_Reached):
                    self._run(layer, row)
        finally:
            handle.remove()
        return caught

    def outputs(self, layer: nn.Module, cache: Any = None) -> list[Tensor]:
        """What ``layer`` makes of the hidden states, per prompt; it attends through ``cache`` where there is one."""
        return [self._run(layer, row, cache) for row in range(len(self.hidden))]

    def advance(self, index: int, outputs: Sequence[Tensor]) -> None:
        """Go on to the layer after ``index``, adding its DeepStack rows."""
        hook = self._model.language_model._process_layer_output
        self.hidden = [hook(index, out, rows) for out, rows in zip(outputs, self._deepstack, strict=True)]

    def final_hidden(self) -> list[Tensor]:
        """Hidden states after the last norm: the inputs of ``lm_head``."""
        norm = self._model.language_model.norm
        with self._filled(norm, f"{self._prefix}norm."), torch.no_grad():
            return [norm(hidden) for hidden in self.hidden]

    def save(self, path: Path) -> None:
        """Write the state, for an interrupted walk to go on from."""
        tensors = {f"hidden.{row}": hidden.contiguous() for row, hidden in enumerate(self.hidden)}
        tensors |= {f"deepstack.{row}": rows for row, rows in enumerate(self._deepstack) if rows is not None}
        safetensors.torch.save_file(tensors, path)

    def load(self, path: Path) -> None:
        """Read the state back."""
        tensors = safetensors.torch.load_file(path)
        self.hidden = [tensors[f"hidden.{row}"] for row in range(len(self._prompts))]
        self._deepstack = [tensors.get(f"deepstack.{row}") for row in range(len(self._prompts))]

    def _run(self, layer: nn.Module, row: int, cache: Any = None) -> Tensor:
        with torch.no_grad():
            output: Tensor = layer(self.hidden[row], self._cos_sin[row], None, cache)
        return output

    @contextlib.contextmanager
    def _filled(self, module: nn.Module, prefix: str) -> Iterator[None]:
        """Give a module its checkpoint weights for a while."""
        module.to_empty(device="cpu")
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.copy_(torch.from_numpy(self._sources[prefix + name].read_float32()))
        try:
            yield
        finally:
            module.to("meta")


def _arrays(prompt: Prompt) -> list[tuple[str, npt.NDArray[Any]]]:
    assert prompt.vision is not None
    return list(prompt.vision.graph_inputs().items())
