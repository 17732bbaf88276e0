"""Reading one section of config.json: known keys, types, and the two spellings of the rotary parameters."""

from __future__ import annotations

import dataclasses
from typing import Any

from deepstitch.errors import ConfigError, UnsupportedError, did_you_mean, list_names

__all__ = ["check_types", "only", "require", "rope_parameters", "section", "take_known"]

# Keys that do not change what the forward pass computes: training, bookkeeping and generation defaults.
_INERT_KEYS = frozenset(
    """
    _name_or_path add_cross_attention architectures attention_dropout auto_map bad_words_ids
    begin_suppress_tokens bos_token_id chunk_size_feed_forward cross_attention_hidden_size
    decoder_start_token_id diversity_penalty do_sample dtype early_stopping encoder_no_repeat_ngram_size
    eos_token_id exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
    id2label initializer_range is_decoder is_encoder_decoder label2id length_penalty max_length
    max_window_layers min_length model_type no_repeat_ngram_size num_beam_groups num_beams num_return_sequences
    output_attentions output_hidden_states output_router_logits output_scores pad_token_id prefix problem_type
    pruned_heads remove_invalid_values repetition_penalty return_dict return_dict_in_generate
    router_aux_loss_coef sep_token_id sliding_window suppress_tokens task_specific_params temperature
    tf_legacy_loss tie_encoder_decoder tie_word_embeddings tokenizer_class top_k top_p torch_dtype torchscript
    transformers_version typical_p use_bfloat16 use_cache
    """.split()  # noqa: SIM905 - a list of seventy literals would be seventy lines
)


def take_known(raw: dict[str, Any], known: frozenset[str], where: str) -> dict[str, Any]:
    """Return the known keys of a config section; refuse keys that are neither known nor inert."""
    unknown = set(raw) - known - _INERT_KEYS
    if unknown:
        name = sorted(unknown)[0]
        raise ConfigError(
            f"{where}: unknown key {list_names(unknown)}{did_you_mean(name, known)}; deepstitch does not know what it "
            "changes in the model. Remove it if it has no effect on the forward pass"
        )
    return {key: value for key, value in raw.items() if key in known and value is not None}


def check_types(kind: type[Any], values: dict[str, Any], where: str) -> None:
    """Refuse values of another type than the dataclass says; sizes are positive, or 0 where 0 is the default."""
    for field in dataclasses.fields(kind):
        if field.name not in values:
            continue
        value, annotation = values[field.name], str(field.type)
        if annotation.startswith("int"):
            valid, expected = (
                type(value) is int and value >= int(field.default != 0),
                "a positive whole number",
            )
        elif annotation == "float":
            valid, expected = type(value) in (int, float) and value > 0, "a positive number"
        elif annotation == "bool":
            valid, expected = type(value) is bool, "true or false"
        elif annotation.startswith("tuple"):
            valid = isinstance(value, list | tuple) and all(type(entry) is int and entry >= 0 for entry in value)
            expected = "a list of whole numbers"
        else:
            continue
        if not valid:
            raise ConfigError(f"{where}: {field.name} is {value!r}, expected {expected}")


def section(raw: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    """Return a nested object, empty where it is absent; refuse anything else."""
    section = raw.get(key) or {}
    if not isinstance(section, dict):
        raise ConfigError(f"{where}: {key} is {section!r}, expected an object")
    return section


def require(raw: dict[str, Any], keys: tuple[str, ...], where: str) -> None:
    """Refuse a section that lacks a key."""
    missing = [key for key in keys if raw.get(key) is None]
    if missing:
        raise ConfigError(
            f"{where}: missing key {list_names(missing)}; is this the config.json the model was saved with?"
        )


def only(raw: dict[str, Any], key: str, allowed: tuple[Any, ...], where: str) -> None:
    """Refuse a value other than the ones the models implement."""
    if key in raw and raw[key] not in allowed:
        expected = " or ".join(repr(value) for value in allowed)
        raise UnsupportedError(f"{where}: {key} is {raw[key]!r}, only {expected} is supported")


def rope_parameters(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """Read both spellings: ``rope_parameters`` (transformers 5) and ``rope_theta`` + ``rope_scaling``."""
    rope = dict(section(raw, "rope_scaling", where))
    if raw.get("rope_theta") is not None:
        rope.setdefault("rope_theta", raw["rope_theta"])
    rope.update(section(raw, "rope_parameters", where))
    rope_type = rope.pop("rope_type", rope.pop("type", "default"))
    rope.pop("type", None)
    # Qwen2-VL wrote the type "mrope" for what is now "default" plus mrope_section.
    if rope_type not in ("default", "mrope"):
        raise UnsupportedError(f"{where}: rope type {rope_type!r} is not supported, only 'default'")
    unknown = set(rope) - {"rope_theta", "mrope_section", "mrope_interleaved"}
    if unknown:
        raise UnsupportedError(f"{where}: rope key {list_names(unknown)} is not supported")
    return rope
