"""``deepstitch run`` and ``deepstitch chat`` as a user meets them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

import deepstitch
from deepstitch.cli import cli


@pytest.fixture
def picture(tmp_path, pictures) -> Path:
    path = tmp_path / "picture.png"
    Image.fromarray(pictures[0]).save(path)
    return path


def invoke(*arguments, text: str | None = None):
    return CliRunner().invoke(cli, [str(each) for each in arguments], input=text, prog_name="deepstitch")


def test_run_streams_the_answer_and_reports_on_stderr(plain_bundle, picture):
    found = invoke("run", plain_bundle, "--image", picture, "--prompt", "what?", "--max-tokens", 6)
    expected = deepstitch.load(plain_bundle).generate("what?", images=[picture], max_tokens=6)
    assert found.exit_code == 0
    assert found.stdout == expected.text + "\n"
    assert found.stderr.count("\n") == 1
    for stage in ("load", "preprocess", "encode", "prefill", "decode"):
        assert f"{stage} " in found.stderr


def test_run_prints_one_json_object(plain_bundle, picture):
    options = [
        "--image",
        picture,
        "--image",
        picture,
        "--system",
        "be brief",
        "--logprobs",
        2,
        "--max-tokens",
        4,
    ]
    found = invoke("run", plain_bundle, "--prompt", "what?", "--json", *options)
    values = json.loads(found.stdout)
    messages = [
        {"role": "system", "content": "be brief"},
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "what?"}],
        },
    ]
    expected = deepstitch.load(plain_bundle).generate(messages, images=[picture, picture], max_tokens=4)
    assert values["token_ids"] == list(expected.token_ids)
    assert (values["text"], values["prompt_tokens"]) == (expected.text, expected.prompt_tokens)
    assert set(values["timings"]) == {"load", "preprocess", "encode", "prefill", "decode", "engine"}
    assert len(values["logprobs"][0]["top"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "x", "--temperature", -1], "temperature=-1.0: use a number, 0 or more"),
        (["--prompt", "x", "--top-p", 3], "top_p=3.0"),
        (["--prompt", "x", "--engine", "tpu"], "engine 'tpu' does not exist"),
        (["--prompt", "x", "--image", "missing.png"], "missing.png"),
        (["--prompt", "x", "--max-tokens", 100000], "context"),
    ],
)
def test_run_refuses_in_one_line(plain_bundle, arguments, message):
    found = invoke("run", plain_bundle, *arguments)
    assert found.exit_code == 2
    assert found.stdout == ""
    assert found.stderr.startswith("deepstitch: error: ") and found.stderr.count("\n") == 1
    assert message in found.stderr


def test_bad_options_are_refused_before_the_bundle_is_opened():
    found = invoke("run", "no-such-folder", "--prompt", "x", "--top-k", -1)
    assert "top_k=-1" in found.stderr


def test_chat(plain_bundle, picture):
    lines = [
        f"/image {picture}",
        "what?",
        "and?",
        "/image nothing.png",
        "/imag",
        "/clear",
        "what?",
        "/quit",
        "never",
    ]
    found = invoke("chat", plain_bundle, "--max-tokens", 5, text="\n".join(lines) + "\n")
    assert found.exit_code == 0
    chat = deepstitch.load(plain_bundle).chat(max_tokens=5)
    first = chat.send("what?", images=[picture]).text
    second = chat.send("and?").text
    chat.clear()
    third = chat.send("what?").text
    places = [found.stdout.find(answer) for answer in (first, second, third)]
    assert -1 not in places and places == sorted(places)
    assert "nothing.png" in found.stderr
    assert "did you mean '/image'" in found.stderr


def test_chat_ends_with_its_input(plain_bundle):
    assert invoke("chat", plain_bundle, text="").exit_code == 0


def test_guesses_are_counted(plain_bundle):
    options = ["--prompt", "again again again", "--max-tokens", 24]
    plain = json.loads(invoke("run", plain_bundle, *options, "--json").stdout)
    found = json.loads(invoke("run", plain_bundle, *options, "--speculate", 4, "--speculate-ngram", 2, "--json").stdout)
    assert found["token_ids"] == plain["token_ids"]
    assert (plain["drafted_tokens"], plain["accepted_tokens"]) == (0, 0)
    assert 0 <= found["accepted_tokens"] <= found["drafted_tokens"]
    refused = invoke("run", plain_bundle, "--prompt", "x", "--speculate", -1)
    assert refused.exit_code == 2 and "speculate=-1" in refused.stderr
