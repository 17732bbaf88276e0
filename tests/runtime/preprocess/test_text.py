"""Chat template and tokenizer: against Hugging Face's, in the sandbox, and one token at a time."""

from __future__ import annotations

import json
import random

import pytest

from deepstitch.errors import BundleError, DeepstitchError, InputError
from deepstitch.runtime.preprocess import Processor, Tokenizer
from deepstitch.runtime.preprocess.chat import ChatTemplate
from deepstitch.runtime.preprocess.messages import split_media

CONVERSATIONS = {
    "one turn": [{"role": "user", "content": "what colour?"}],
    "system and turns": [
        {"role": "system", "content": "answer shortly"},
        {"role": "user", "content": "Grüße 你好 🙂 <b>&amp;"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]},
    ],
    "images": [
        {
            "role": "user",
            "content": [
                {"type": "image"},
                {"type": "video"},
                {"type": "text", "text": "x"},
                {"type": "image"},
            ],
        },
    ],
}

# What such templates use: namespaces, loop controls, tojson, slices, string methods, generation marks.
RICH_TEMPLATE = """\
{%- if tools %}
    {{- '<tools>' }}
    {%- for tool in tools %}
        {{- tool | tojson }}
    {%- endfor %}
{%- endif %}
{%- set ns = namespace(last=-1, seen=[]) %}
{%- for message in messages[::-1] %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
    {%- if ns.last < 0 %}{% set ns.last = messages|length - 1 - loop.index0 %}{% break %}{% endif %}
{%- endfor %}
{% for message in messages %}
    {{- '<' + message.role.upper() + ('*' if loop.index0 == ns.last else '') + '>' }}
    {%- set words = message.content if message.content is string else '[]' %}
    {% generation %}{{ words.strip() | tojson }}{% endgeneration %}
{% endfor %}
{{ eos_token }}{{ flavour | default('plain') }}
{%- if add_generation_prompt %}<go>{% endif %}
"""


@pytest.fixture
def hf_tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("rich", [False, True])
@pytest.mark.parametrize("generate", [False, True])
def test_rendering_equals_hf(folder, hf_tokenizer, name, rich, generate):
    source = RICH_TEMPLATE if rich else (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(source)
    tools = [{"name": "f", "args": {"z": 1, "a": "é<"}}] if rich else None
    options = {"flavour": "hot"} if rich else {"add_vision_id": True}
    messages, _, _ = split_media(CONVERSATIONS[name], [], [])
    actual = ChatTemplate.from_folder(folder).render(
        messages, add_generation_prompt=generate, tools=tools, options=options
    )
    expected = hf_tokenizer.apply_chat_template(
        CONVERSATIONS[name],
        tools=tools,
        chat_template=source,
        add_generation_prompt=generate,
        tokenize=False,
        **options,
    )
    assert actual == expected


def test_prompt_ids_equal_hf(processor, hf_tokenizer):
    for name in ("one turn", "system and turns"):
        expected = hf_tokenizer.apply_chat_template(CONVERSATIONS[name], add_generation_prompt=True, return_dict=False)
        assert processor(CONVERSATIONS[name]).input_ids.tolist() == list(expected)


def test_places_a_template_can_be_in(folder):
    (folder / "chat_template.jinja").unlink()
    assert ChatTemplate.from_folder(folder) is None
    config = json.loads((folder / "tokenizer_config.json").read_text())
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "list {{ eos_token }}"}]
    eos = {"content": "<|im_end|>", "lstrip": False}
    for source, expected in (("text", "text"), (named, "list <|im_end|>")):
        written = {**config, "chat_template": source, "eos_token": eos}
        (folder / "tokenizer_config.json").write_text(json.dumps(written))
        assert ChatTemplate.from_folder(folder).render([]) == expected
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "json"}))
    assert ChatTemplate.from_folder(folder).render([]) == "json"
    (folder / "chat_template.jinja").write_text("jinja")
    assert ChatTemplate.from_folder(folder).render([]) == "jinja"


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("{% for m in messages %}", BundleError, "line 1"),
        ("{{ raise_exception('only one system turn') }}", InputError, "only one system turn"),
        ("{{ messages[9].role }}", InputError, "cannot render"),
        ("{{ 1 / 0 }}", InputError, "cannot render"),
        ("{{ ''.__class__.__mro__ }}", BundleError, "forbidden"),
        ("{{ messages.append(1) }}", BundleError, "forbidden"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", BundleError, "forbidden"),
        ("{% include 'x' %}", InputError, "cannot render"),
    ],
)
def test_templates_that_fail(folder, source, error, message):
    (folder / "chat_template.jinja").write_text(source)
    with pytest.raises(error, match=message) as caught:
        ChatTemplate.from_folder(folder).render([{"role": "user", "content": "x"}])
    assert "chat_template.jinja" in str(caught.value) and "\n" not in str(caught.value)


def test_no_template_is_an_error_only_for_messages(folder, model, vision):
    (folder / "chat_template.jinja").unlink()
    processor = Processor.from_folder(folder, model, vision)
    with pytest.raises(BundleError, match="no chat template"):
        processor("x")
    assert processor.from_text("red").text == "red"


def test_tokenizer_files_that_fail(folder):
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(BundleError, match=r"tokenizer\.json: not a tokenizer"):
        Tokenizer.from_folder(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(DeepstitchError, match="not found"):
        Tokenizer.from_folder(folder)


def test_tokenizer_equals_hf(processor, hf_tokenizer):
    for text in (
        "",
        "red square",
        " A1 b2\n\n",
        "<|im_start|>user\nx<|im_end|>",
        "naïve 你好 🙂🏽",
        "\t \r\n",
    ):
        ids = processor.tokenizer.encode(text)
        assert ids.tolist() == hf_tokenizer(text)["input_ids"]
        for skip in (False, True):
            decoded = processor.tokenizer.decode(ids, skip_special_tokens=skip)
            assert decoded == hf_tokenizer.decode(ids, skip_special_tokens=skip)
    with pytest.raises(InputError, match="not valid Unicode"):
        processor.tokenizer.encode("half \ud83d")


def stream(processor, ids, **options):
    decoder = processor.decode_stream(**options)
    return [decoder.push(token) for token in ids], decoder.flush()


def test_streaming_never_shows_half_a_character(processor):
    text = "a 你好 🙂🏽é x <|im_end|>Ω\ufffd 🇩🇪"
    for skip in (False, True):
        ids = processor.tokenizer.encode(text)
        pieces, rest = stream(processor, ids, skip_special_tokens=skip)
        assert "".join(pieces) + rest == processor.tokenizer.decode(ids, skip_special_tokens=skip)
        assert "".join(pieces).count("\ufffd") == 1 and rest == ""
    pieces, _ = stream(processor, processor.tokenizer.encode("🙂"))
    assert pieces == ["", "", "", "🙂"]


def test_streaming_any_tokens_equals_decoding_them_at_once(processor):
    generator = random.Random(0)
    bytes_only = [processor.tokenizer.token_id(chr(code)) for code in range(0xA1, 0x144)]
    bytes_only = [token for token in bytes_only if token is not None]
    for _ in range(200):
        pool = bytes_only if generator.random() < 0.5 else range(processor.tokenizer.vocab_size)
        ids = [generator.choice(pool) for _ in range(generator.randrange(40))]
        pieces, rest = stream(processor, ids)
        assert "".join(pieces) + rest == processor.tokenizer.decode(ids)


def test_an_unfinished_character_comes_with_flush(processor):
    ids = processor.tokenizer.encode("x🙂")[:-1]
    pieces, rest = stream(processor, ids)
    assert "".join(pieces) == "x" and rest == "\ufffd"
