"""What a checkpoint's config.json says, as frozen dataclasses. Unknown keys are refused, never guessed over."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepstitch.errors import CheckpointError, ConfigError, UnsupportedError
from deepstitch.models.config_fields import check_types, only, require, rope_parameters, section, take_known

__all__ = ["SUPPORTED_MODEL_TYPES", "ModelConfig", "TextConfig", "VisionConfig"]

SUPPORTED_MODEL_TYPES = ("qwen3_vl_moe", "qwen3_vl", "qwen3_moe", "qwen3")


@dataclass(frozen=True, slots=True, kw_only=True)
class TextConfig:
    """The language decoder. Field names are the Hugging Face ones.

    Attributes:
        mrope_section: rotary pairs per axis (t, h, w), interleaved; ``(head_dim / 2, 0, 0)`` is the text-only
            rule.
        num_experts: 0 for a dense model.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]
    max_position_embeddings: int
    tie_word_embeddings: bool
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = True
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()

    def is_moe_layer(self, layer_index: int) -> bool:
        """Whether this layer routes to experts (HF: ``decoder_sparse_step`` and ``mlp_only_layers``)."""
        if self.num_experts == 0 or layer_index in self.mlp_only_layers:
            return False
        return (layer_index + 1) % self.decoder_sparse_step == 0

    @classmethod
    def from_dict(
        cls, raw: dict[str, Any], *, moe: bool, multimodal: bool, tie_word_embeddings: bool, where: str
    ) -> TextConfig:
        """Read a text section of config.json.

        Raises:
            ConfigError: a key is unknown, missing or contradicts another.
            UnsupportedError: a value asks for something the decoder does not do.
        """
        required = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps")
        moe_keys = ("num_experts_per_tok", "moe_intermediate_size")
        require(raw, required + (moe_keys if moe else ("intermediate_size",)), where)
        known = frozenset(cls.__dataclass_fields__) | {
            *(
                "rope_scaling",
                "rope_parameters",
                "hidden_act",
                "attention_bias",
                "use_sliding_window",
                "layer_types",
            ),
            "num_local_experts",
        }
        values = take_known(raw, known, where)
        check_types(cls, values, where)
        rope = rope_parameters(values, where)
        check_types(cls, rope, where)
        for key in ("rope_scaling", "rope_parameters", "rope_theta"):
            values.pop(key, None)
        only(values, "hidden_act", ("silu",), where)
        only(values, "attention_bias", (False, None), where)
        only(values, "use_sliding_window", (False, None), where)
        if any(kind != "full_attention" for kind in values.get("layer_types") or ()):
            raise UnsupportedError(f"{where}: layer_types has entries other than 'full_attention'")
        for key in ("hidden_act", "attention_bias", "use_sliding_window", "layer_types"):
            values.pop(key, None)
        local_experts = values.pop("num_local_experts", None)
        experts = values.get("num_experts") or local_experts or 0
        if bool(experts) != moe:
            raise ConfigError(f"{where}: num_experts is {experts}, which contradicts the model type")
        heads = values["num_attention_heads"]
        # transformers defaults, which differ by family
        head_dim = values.get("head_dim") or (values["hidden_size"] // heads if moe else 128)
        section = tuple(rope.get("mrope_section") or ((24, 20, 20) if multimodal else (head_dim // 2, 0, 0)))
        if len(section) != 3 or sum(section) != head_dim // 2:
            raise ConfigError(
                f"{where}: mrope_section {list(section)} must have three entries that sum to head_dim/2 = "
                f"{head_dim // 2}"
            )
        if multimodal and rope.get("mrope_interleaved") is False:
            raise UnsupportedError(f"{where}: mrope_interleaved is false; Qwen3-VL checkpoints interleave the axes")
        values |= {
            "num_experts": experts,
            "head_dim": head_dim,
            "num_key_value_heads": values.get("num_key_value_heads") or heads,
            "intermediate_size": values.get("intermediate_size") or 0,
            "mlp_only_layers": tuple(values.get("mlp_only_layers") or ()),
            "rope_theta": float(rope.get("rope_theta", 500000.0 if multimodal else 10000.0)),
            "mrope_section": section,
            "max_position_embeddings": values.get("max_position_embeddings") or 128000,
            "tie_word_embeddings": tie_word_embeddings,
        }
        if multimodal:
            values["norm_topk_prob"] = True  # Qwen3-VL-MoE always renormalises; its config has no such key
        elif moe:
            values.setdefault("norm_topk_prob", False)
        config = cls(**values)
        config._check(where)
        return config

    def _check(self, where: str) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"{where}: {self.num_attention_heads} attention heads are not a multiple of "
                f"{self.num_key_value_heads} key/value heads"
            )
        if self.num_experts and not 0 < self.num_experts_per_tok <= self.num_experts:
            raise ConfigError(
                f"{where}: num_experts_per_tok {self.num_experts_per_tok} must lie in 1..{self.num_experts} "
                "(num_experts)"
            )
        dense = any(not self.is_moe_layer(index) for index in range(self.num_hidden_layers))
        if dense and not self.intermediate_size:
            raise ConfigError(f"{where}: missing key intermediate_size; some layers have no experts")


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionConfig:
    """The vision encoder. Field names are the Hugging Face ones."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    in_channels: int
    patch_size: int
    spatial_merge_size: int
    temporal_patch_size: int
    out_hidden_size: int
    num_position_embeddings: int
    deepstack_visual_indexes: tuple[int, ...]
    rope_theta: float = 10000.0

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def patch_width(self) -> int:
        """Values in one flattened patch: channels * frames * height * width."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @classmethod
    def from_dict(cls, raw: dict[str, Any], *, where: str) -> VisionConfig:
        """Read the ``vision_config`` section of config.json.

        Raises:
            ConfigError: a key is unknown, missing or contradicts another.
            UnsupportedError: a value asks for something the encoder does not do.
        """
        require(raw, ("depth", "hidden_size", "intermediate_size", "num_heads", "out_hidden_size"), where)
        known = frozenset(cls.__dataclass_fields__) | {"hidden_act", "rope_parameters"}
        values = take_known(raw, known, where)
        only(values, "hidden_act", ("gelu_pytorch_tanh",), where)
        values.pop("hidden_act", None)
        rope = section(values, "rope_parameters", where)
        values.pop("rope_parameters", None)
        rope_type = rope.get("rope_type", "axial")
        if rope_type not in ("axial", "default"):
            raise UnsupportedError(f"{where}: rope type {rope_type!r} is not supported, only 'axial'")
        defaults = {
            "in_channels": 3,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": (8, 16, 24),
            "rope_theta": rope.get("rope_theta", 10000.0),
        }
        values = {**defaults, **values}
        check_types(cls, values, where)
        values["deepstack_visual_indexes"] = tuple(values["deepstack_visual_indexes"])
        config = cls(**values)
        config._check(where)
        return config

    def _check(self, where: str) -> None:
        if round(self.num_position_embeddings**0.5) ** 2 != self.num_position_embeddings:
            raise ConfigError(f"{where}: num_position_embeddings {self.num_position_embeddings} is not a square")
        taps = list(self.deepstack_visual_indexes)
        if not taps or taps != sorted(set(taps)) or taps[-1] >= self.depth:
            raise ConfigError(
                f"{where}: deepstack_visual_indexes {taps} must be distinct, ascending numbers of the "
                f"{self.depth} blocks, "
                "at least one"
            )
        if self.hidden_size % self.num_heads or self.head_dim % 4:
            raise ConfigError(
                f"{where}: hidden_size {self.hidden_size} / num_heads {self.num_heads} must be a multiple of 4"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A whole model: text side, optional vision side, and the token ids that join them."""

    model_type: str
    text: TextConfig
    vision: VisionConfig | None = None
    image_token_id: int | None = None
    video_token_id: int | None = None
    vision_start_token_id: int | None = None
    vision_end_token_id: int | None = None

    @property
    def num_deepstack(self) -> int:
        """Decoder layers that receive a DeepStack slice: ``len(deepstack_visual_indexes)``."""
        return len(self.vision.deepstack_visual_indexes) if self.vision else 0

    @classmethod
    def from_dict(cls, raw: dict[str, Any], *, where: str = "config.json") -> ModelConfig:
        """Read a parsed config.json.

        Raises:
            UnsupportedError: the model type or a value is not supported.
            ConfigError: a key is unknown, missing or contradictory.
        """
        model_type = raw.get("model_type")
        if model_type not in SUPPORTED_MODEL_TYPES:
            supported = ", ".join(SUPPORTED_MODEL_TYPES)
            raise UnsupportedError(f"{where}: model_type {model_type!r} is not supported; supported are {supported}")
        only(raw, "quantization_config", (None,), where)
        moe = "moe" in model_type
        tied = bool(raw.get("tie_word_embeddings", False))
        if "vl" not in model_type:
            text = TextConfig.from_dict(raw, moe=moe, multimodal=False, tie_word_embeddings=tied, where=where)
            return cls(model_type=model_type, text=text)
        ids = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        require(raw, ("text_config", "vision_config", *ids), where)
        values = take_known(raw, frozenset(("text_config", "vision_config", "quantization_config", *ids)), where)
        check_types(cls, values, where)
        text = TextConfig.from_dict(
            section(raw, "text_config", where),
            moe=moe,
            multimodal=True,
            tie_word_embeddings=tied,
            where=f"{where} text_config",
        )
        vision = VisionConfig.from_dict(section(raw, "vision_config", where), where=f"{where} vision_config")
        config = cls(model_type=model_type, text=text, vision=vision, **{key: values[key] for key in ids})
        if vision.out_hidden_size != text.hidden_size:
            raise ConfigError(
                f"{where}: vision out_hidden_size {vision.out_hidden_size} is not the text hidden_size "
                f"{text.hidden_size}"
            )
        if config.num_deepstack > text.num_hidden_layers:
            raise ConfigError(
                f"{where}: {config.num_deepstack} DeepStack taps need as many decoder layers, not "
                f"{text.num_hidden_layers}"
            )
        return config

    @classmethod
    def from_file(cls, path: str | Path) -> ModelConfig:
        """Read config.json from a file, or from the checkpoint folder that holds it.

        Raises:
            CheckpointError: the file is missing or is not JSON.
        """
        path = Path(path)
        path = path / "config.json" if path.is_dir() else path
        try:
            raw = json.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            raise CheckpointError(
                f"{path}: not found; a checkpoint is a folder with config.json and *.safetensors"
            ) from None
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise CheckpointError(f"{path}: not valid JSON ({error})") from None
        if not isinstance(raw, dict):
            raise CheckpointError(f"{path}: expected a JSON object")
        return cls.from_dict(raw, where=str(path))
