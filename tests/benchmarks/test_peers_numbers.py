"""Medians, ratios, divergence, bytes per step: what the table of the peers is made of."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from benchmarks.peers.figures import select
from benchmarks.peers.quality import divergence
from benchmarks.peers.statistics_of import Sample, ratios, summary
from benchmarks.peers.traffic import cache_bytes, step_bytes


def sample(value: float, load: float = 0.0) -> Sample:
    return Sample(value=value, other_load=load, extra={"settings": {}, "value": value, "mark": value})


def test_disturbed_samples_are_left_out() -> None:
    found = summary([sample(1.0), sample(9.0, load=0.5), sample(3.0), sample(2.0)], noise_limit=0.04)
    assert (found["median"], found["min"], found["max"]) == (2.0, 1.0, 3.0)
    assert (found["rounds"], found["dropped"], found["noisy"]) == (3, 1, False)
    assert found["mark"] == 2.0, "what comes along belongs to the median"


def test_disturbed_samples_are_better_than_none() -> None:
    found = summary([sample(1.0, load=0.04), sample(3.0, load=0.5)], noise_limit=0.04)
    assert (found["median"], found["rounds"], found["noisy"]) == (2.0, 2, True)


def case(
    peer: str, variant: str, bits: int, *, always: bool = False, shape: str = "mid", **values: float
) -> dict[str, Any]:
    figures = {name: {"median": value} for name, value in values.items()}
    return {"shape": shape, "peer": peer, "variant": variant, "bits": bits, "always": always, "figures": figures}


def test_ratios_favour_us_above_one() -> None:
    rows = ratios(
        [
            case("deepstitch", "int4", 4, prefill_128=300.0, load=2.0, quality=1e-3),
            case("llama.cpp", "Q8_0", 8, prefill_128=900.0, load=0.1),
            case("llama.cpp", "Q4_0", 4, prefill_128=100.0, load=1.0),
            case("llama.cpp", "Q4_K_M", 4, prefill_128=200.0, load=4.0),
            case("llama.cpp", "Q4_0", 4, shape="slice", prefill_128=999.0),
            case("transformers", "fp32", 32, always=True, prefill_128=10.0, quality=1e-9),
            case("openvino", "fp32", 32, prefill_128=10.0),
        ]
    )
    assert [(row["variant"], row["peer"]) for row in rows] == [("int4", "llama.cpp"), ("int4", "transformers")]
    assert rows[0]["figures"] == {
        "prefill_128": {"ratio": 1.5, "against": "Q4_K_M"},
        "load": {"ratio": 0.5, "against": "Q4_0"},
    }
    assert rows[1]["figures"] == {"prefill_128": {"ratio": 30.0, "against": "fp32"}}


def test_divergence() -> None:
    reference = np.log(np.array([[0.5, 0.25, 0.25], [0.8, 0.1, 0.1]], np.float32))
    assert divergence(reference, reference + 3.0)["kl"] == pytest.approx(0.0, abs=1e-7)
    other = reference.copy()
    other[0] = np.log([0.25, 0.5, 0.25])
    found = divergence(reference, other)
    assert found["kl"] == pytest.approx(0.25 * np.log(2) / 2, rel=1e-5)
    assert found["top1"] == 0.5
    with pytest.raises(ValueError, match="reference"):
        divergence(reference, other[:1])


MOE = {"num_experts": 8, "num_experts_per_tok": 2}


def test_a_step_reads_the_chosen_experts_and_no_table() -> None:
    tensors = {
        "model.language_model.embed_tokens.weight": 1000,
        "lm_head.weight": 100,
        "model.language_model.layers.0.self_attn.q_proj.weight": 10,
        "model.language_model.layers.0.mlp.experts.gate_up_proj": 80,
        "model.visual.pos_embed.weight": 5000,
    }
    assert step_bytes(tensors, MOE, tied=False) == 100 + 10 + 20


def test_a_tied_table_is_read_as_the_head() -> None:
    assert step_bytes({"token_embd.weight": 1000, "blk.0.attn_q.weight": 10}, {}, tied=True) == 1010
    assert step_bytes({"token_embd.weight": 1000, "output.weight": 7}, {}, tied=True) == 7
    assert step_bytes({"token_embd.weight": 1000, "blk.0.ffn_up_exps.weight": 80}, MOE, tied=False) == 20


def test_cache_bytes() -> None:
    text = {"num_hidden_layers": 2, "num_key_value_heads": 3, "head_dim": 5}
    assert cache_bytes(text, 7, "f16") == 2 * 2 * 3 * 5 * 7 * 2
    assert cache_bytes(text, 7, "q8_0") < cache_bytes(text, 7, "f16")


def test_select() -> None:
    assert [figure.name for figure in select(["decode", "load"])] == ["decode_64", "decode_2048", "decode_8192", "load"]
    with pytest.raises(ValueError, match="prefil1"):
        select(["prefil1"])
