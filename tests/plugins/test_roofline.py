"""The figures in the operators' READMEs are those the script prints."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from benchmarks.plugins_roofline import main, shown_in, text_of
from deepstitch.plugins.common.roofline import (
    CARDS,
    EXPERTS,
    INT4,
    LINEARS,
    TABLES,
    Experts,
    Work,
    linear_work,
    moe_work,
)


@pytest.mark.parametrize("folder", TABLES)
def test_readmes_show_what_the_script_prints(folder: str) -> None:
    remedy = "run python benchmarks/plugins_roofline.py --write"
    assert shown_in(folder) == text_of(folder), remedy


def test_the_script_prints_every_table() -> None:
    printed = CliRunner().invoke(main, ["--json"])
    assert printed.exit_code == 0
    assert json.loads(printed.output)["tables"].keys() == TABLES.keys()


def test_cards_are_what_their_maker_says() -> None:
    p40, ti, mx = CARDS
    assert [round(card.bytes_per_second / 1e9) for card in CARDS] == [346, 484, 56]
    assert [round(card.float_per_second / 1e12, 2) for card in (p40, ti)] == [11.76, 11.34]
    assert [round(card.integer_per_second / 1e12, 1) for card in (p40, ti)] == [47.0, 45.4]
    assert round(mx.float_per_second / 1e12, 2) == 1.88


def test_bounds() -> None:
    """By hand: one token, and as many as there are bytes to hide behind."""
    work = linear_work(LINEARS[0], 1, INT4)
    assert work.nbytes == 2048 * 12288 * 4.5 / 8 + 4 * (2048 + 12288)
    assert work.integer_ops == 2 * 2048 * 12288
    assert work.seconds(CARDS[0]) == (work.nbytes / 345.6e9, "memory")
    assert Work(nbytes=1, float_ops=1e12).seconds(CARDS[0])[1] == "arithmetic"


def test_experts_touched() -> None:
    layer = EXPERTS[0]
    assert layer.touched(1) == pytest.approx(layer.top_k)
    assert layer.touched(10_000) == pytest.approx(layer.experts)
    dense = Experts(name="", layers=1, experts=1, top_k=1, hidden=32, intermediate=32)
    assert moe_work(dense, 3, INT4).nbytes == 3 * 32 * 32 * 4.5 / 8 + 3 * 4 * 65
