"""The tokenizer of the checkpoint, and text that appears while tokens still arrive."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tokenizers

from deepstitch.errors import BundleError, InputError

__all__ = ["DecodeStream", "Tokenizer"]

_REPLACEMENT = "\ufffd"
_KEPT_TOKENS = 4  # context a decoder may need to the left of a token; a UTF-8 character is at most 4 bytes


class Tokenizer:
    """``tokenizer.json`` of a checkpoint."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """Read ``tokenizer.json``.

        Raises:
            BundleError: there is none, or it is damaged.
        """
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise BundleError(f"{path}: not found; copy it from the checkpoint and export again")
        try:
            return cls(tokenizers.Tokenizer.from_file(str(path)))
        except Exception as error:  # the library raises bare Exception
            raise BundleError(f"{path}: not a tokenizer ({error}); copy it again from the checkpoint") from None

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str) -> npt.NDArray[np.int64]:
        """Ids of a text, ``[S]`` int64. Special tokens are recognised where the text spells them, none added.

        Raises:
            InputError: the text holds half a surrogate pair, which no encoding can express.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"the prompt is not valid Unicode text ({error.reason} at {error.start})") from None
        return np.array(self._backend.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of ids; bytes that are no UTF-8 become U+FFFD."""
        return str(self._backend.decode(list(map(int, ids)), skip_special_tokens=skip_special_tokens))

    def token_id(self, token: str) -> int | None:
        """Id of a token as the vocabulary spells it."""
        found = self._backend.token_to_id(token)
        return None if found is None else int(found)

    def token(self, token_id: int) -> str | None:
        """Spelling of an id in the vocabulary."""
        return self._backend.id_to_token(int(token_id))

    def decode_stream(self, *, skip_special_tokens: bool = True) -> DecodeStream:
        """A new incremental decoder."""
        return DecodeStream(self, skip_special_tokens=skip_special_tokens)


class DecodeStream:
    """Turns tokens into text as they come, never half a character.

    The pieces joined, with :meth:`flush` at the end, are exactly the text of all tokens decoded at once.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._ids: list[int] = []  # a window: everything before it has been emitted
        self._emitted = 0  # characters of the window's text already handed out

    def push(self, token_id: int) -> str:
        """Add a token; returns the text that is now certain, possibly none."""
        self._ids.append(int(token_id))
        text = self._text()
        # An unfinished character shows as one replacement character at the end; earlier ones are final.
        certain = text.removesuffix(_REPLACEMENT)
        piece = certain[self._emitted :]
        self._emitted = max(self._emitted, len(certain))
        if len(certain) == len(text) and len(self._ids) > 2 * _KEPT_TOKENS:
            del self._ids[:-_KEPT_TOKENS]
            self._emitted = len(self._text())
        return piece

    def flush(self) -> str:
        """The rest, at the end of the answer: a character that was never finished becomes U+FFFD."""
        piece = self._text()[self._emitted :]
        self._ids.clear()
        self._emitted = 0
        return piece

    def _text(self) -> str:
        return self._tokenizer.decode(self._ids, skip_special_tokens=self._skip)
