"""Builds the sample model's tokenizer and the small text files of its checkpoint folder.

Byte-level BPE in the manner of Qwen: any input has an encoding and decodes to itself. Every word of the
sample world is one token, with and without a space before it; digits and printed letters stay single
characters.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from deepstitch.models.sample.words import vocabulary

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

# Splits text into an optional leading space plus letters, single digits, punctuation runs, and line ends.
_SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

_PUNCTUATION = (" +", " =")

CHAT_TEMPLATE = """\
{%- set images = namespace(count=0) -%}
{%- set videos = namespace(count=0) -%}
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + '\\n' -}}
    {%- if message['content'] is string -%}
        {{- message['content'] -}}
    {%- else -%}
        {%- for part in message['content'] -%}
            {%- if part['type'] == 'image' or 'image' in part or 'image_url' in part -%}
                {%- set images.count = images.count + 1 -%}
                {%- if add_vision_id is defined and add_vision_id -%}
                    {{- 'Picture ' ~ images.count ~ ': ' -}}
                {%- endif -%}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
            {%- elif part['type'] == 'video' or 'video' in part -%}
                {%- set videos.count = videos.count + 1 -%}
                {%- if add_vision_id is defined and add_vision_id -%}
                    {{- 'Video ' ~ videos.count ~ ': ' -}}
                {%- endif -%}
                {{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
            {%- elif 'text' in part -%}
                {{- part['text'] -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


@lru_cache(maxsize=1)
def build_tokenizer() -> Tokenizer:
    """Builds the tokenizer; the same on every run."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=8192,
        min_frequency=1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    words = [word for word in vocabulary() if len(word) > 1 and word.isalpha()]
    corpus = [*words, *(f" {word}" for word in words), *_PUNCTUATION]
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def special_id(token: str) -> int:
    """Returns the id of one of `SPECIAL_TOKENS`."""
    return int(build_tokenizer().encode(token).ids[0])


def write_text_files(folder: Path) -> None:
    """Writes everything of the checkpoint but `config.json` and the weights into `folder`."""
    build_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    end, pad = special_id("<|im_end|>"), special_id("<|endoftext|>")
    image = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "merge_size": 2,
        "patch_size": 16,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": 64 * 64, "longest_edge": 256 * 256},
        "temporal_patch_size": 2,
    }
    files: dict[str, dict[str, Any]] = {
        "tokenizer_config.json": {
            "add_bos_token": False,
            "add_prefix_space": False,
            "bos_token": None,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "model_max_length": 32768,
            "pad_token": "<|endoftext|>",
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": None,
        },
        "generation_config.json": {
            "do_sample": False,
            "eos_token_id": [end, pad],
            "pad_token_id": pad,
        },
        "preprocessor_config.json": {
            **image,
            "image_processor_type": "Qwen2VLImageProcessorFast",
            "processor_class": "Qwen3VLProcessor",
        },
        "video_preprocessor_config.json": {
            **image,
            "do_sample_frames": True,
            "fps": 2,
            "max_frames": 64,
            "min_frames": 2,
            "processor_class": "Qwen3VLProcessor",
            "size": {"shortest_edge": 2 * 64 * 64, "longest_edge": 64 * 256 * 256},
            "video_processor_type": "Qwen3VLVideoProcessor",
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def model_config() -> dict[str, Any]:
    """Returns `config.json` of the sample model, in the form transformers 5 writes."""
    tokenizer = build_tokenizer()
    text = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "decoder_sparse_step": 1,
        "dtype": "bfloat16",
        "eos_token_id": special_id("<|im_end|>"),
        "head_dim": 32,
        "hidden_act": "silu",
        "hidden_size": 128,
        "initializer_range": 0.02,
        "intermediate_size": 256,
        "max_position_embeddings": 32768,
        "mlp_only_layers": [],
        "model_type": "qwen3_vl_moe_text",
        "moe_intermediate_size": 96,
        "num_attention_heads": 4,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 6,
        "num_key_value_heads": 2,
        "pad_token_id": special_id("<|endoftext|>"),
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [6, 5, 5],
            "rope_theta": 100000.0,
            "rope_type": "default",
        },
        "use_cache": True,
        "vocab_size": tokenizer.get_vocab_size(),
    }
    vision = {
        "deepstack_visual_indexes": [1, 3, 4],
        "depth": 6,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 96,
        "in_channels": 3,
        "initializer_range": 0.02,
        "intermediate_size": 192,
        "model_type": "qwen3_vl_moe_vision",
        "num_heads": 3,
        "num_position_embeddings": 64,
        "out_hidden_size": 128,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    return {
        "architectures": ["Qwen3VLMoeForConditionalGeneration"],
        "dtype": "bfloat16",
        "image_token_id": special_id("<|image_pad|>"),
        "model_type": "qwen3_vl_moe",
        "text_config": text,
        "tie_word_embeddings": True,
        "video_token_id": special_id("<|video_pad|>"),
        "vision_config": vision,
        "vision_end_token_id": special_id("<|vision_end|>"),
        "vision_start_token_id": special_id("<|vision_start|>"),
    }
