"""The checkpoint's chat template, rendered in a sandbox: it is a program from someone else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.sandbox

from deepstitch.errors import BundleError, InputError
from deepstitch.runtime.preprocess.settings import read_json

__all__ = ["ChatTemplate"]

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class ChatTemplate:
    """Renders messages to the text the model was trained on."""

    def __init__(
        self, source: str, *, where: str = "chat template", variables: Mapping[str, Any] | None = None
    ) -> None:
        self._where, self._variables = where, dict(variables or {})
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise BundleError(
                f"{where}: line {error.lineno}: {error.message}; copy it again from the checkpoint"
            ) from None

    @classmethod
    def from_folder(cls, folder: str | Path) -> ChatTemplate | None:
        """Find the template: chat_template.jinja, chat_template.json, or the entry in tokenizer_config.json.

        Returns:
            None if the checkpoint has none, which is an error only when messages are rendered.

        Raises:
            BundleError: the template is not valid.
        """
        folder = Path(folder)
        config_path = folder / "tokenizer_config.json"
        config = read_json(config_path) or {}
        variables = {name: _spelling(config[name]) for name in _SPECIAL_TOKENS if config.get(name) is not None}
        path = folder / "chat_template.jinja"
        if path.is_file():
            return cls(path.read_text("utf-8"), where=str(path), variables=variables)
        for path, raw in ((folder / "chat_template.json", None), (config_path, config)):
            source = _named(((read_json(path) or {}) if raw is None else raw).get("chat_template"))
            if source is not None:
                return cls(source, where=str(path), variables=variables)
        return None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> str:
        """Render messages of plain data.

        Args:
            messages: as :func:`deepstitch.runtime.preprocess.messages.split_media` returns them.
            add_generation_prompt: end with the opening of the assistant's turn.
            tools: JSON schemas of functions the model may call.
            options: further variables of this template, such as ``enable_thinking``.

        Raises:
            InputError: the template refuses the messages, or cannot render them.
            BundleError: the template tries something the sandbox forbids.
        """
        variables = {
            **self._variables,
            **(options or {}),
            "messages": messages,
            "tools": tools,
            "documents": None,
        }
        try:
            return str(self._template.render(**variables, add_generation_prompt=add_generation_prompt))
        except jinja2.exceptions.SecurityError as error:
            raise BundleError(f"{self._where}: the template tries something forbidden: {error}") from None
        except Exception as error:  # a template is a program: any exception of Python can come out of it
            raise InputError(f"{self._where}: cannot render these messages: {error}") from None


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` marks the assistant's words for training; here it renders what it encloses."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 wants a plain class attribute)

    def parse(self, parser: Any) -> Any:
        """Return the enclosed statements."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without HTML escapes, unlike jinja2's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _spelling(token: Any) -> str:
    return str(token["content"]) if isinstance(token, dict) else str(token)


def _named(template: Any) -> str | None:
    """The template itself, or the one called "default" in a list of named ones."""
    if isinstance(template, list):
        named = {each.get("name"): each.get("template") for each in template if isinstance(each, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None
