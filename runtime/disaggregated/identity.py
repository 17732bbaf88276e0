"""Whether two bundles belong to the same model, and the proof that two processes share a token."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

import msgspec
import numpy as np

from deepstitch.manifest import Manifest
from deepstitch.runtime.bundle import Bundle
from deepstitch.runtime.disaggregated.messages import ModelIdentity
from deepstitch.runtime.embedding import EmbeddingTable

__all__ = ["differences", "model_identity", "proof"]

_SAMPLED_ROWS = 256
_HINTS = {
    "checkpoint": "the bundles were exported from different checkpoints",
    "embedding": "the token embeddings are stored differently; export both bundles with the same --weights and --block",
    "tokenizer": "tokenizer.json is another one",
    "chat_template": "the chat template is another one; export both bundles from the same checkpoint",
    "preprocessing": "pictures are prepared in another way; export both bundles from the same checkpoint",
    "merge_size": "0 is a bundle that reads text only; export it with vision",
}
_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")
_PICTURE_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


def model_identity(bundle: Bundle, table: EmbeddingTable) -> ModelIdentity:
    """What the other side must have too."""
    manifest, model = bundle.manifest, bundle.manifest.model
    rows = np.unique(np.linspace(0, model.vocab_size - 1, _SAMPLED_ROWS).astype(np.int64))
    tokenizer = manifest.files.get("tokenizer.json")
    return ModelIdentity(
        model_type=model.model_type,
        checkpoint=manifest.checkpoint_fingerprint or "",
        embedding=hashlib.sha256(table(rows).tobytes()).hexdigest(),
        tokenizer=tokenizer.sha256 if tokenizer else "",
        chat_template=_digest(manifest, _TEMPLATE_FILES),
        preprocessing=_digest(manifest, _PICTURE_FILES),
        merge_size=manifest.vision.spatial_merge_size if manifest.vision else 0,
        hidden_size=model.hidden_size,
        num_deepstack=model.num_deepstack,
        vocab_size=model.vocab_size,
        image_token_id=model.image_token_id,
        video_token_id=model.video_token_id,
    )


def _digest(manifest: Manifest, names: Sequence[str]) -> str:
    """Of those of the files that the bundle has."""
    found = [[name, manifest.files[name].sha256] for name in names if name in manifest.files]
    return hashlib.sha256(msgspec.json.encode(found)).hexdigest()


def differences(encode: ModelIdentity, language: ModelIdentity) -> str:
    """What is not the same, in words; empty where all is."""
    found = []
    for name in ModelIdentity.__struct_fields__:
        left, right = getattr(encode, name), getattr(language, name)
        if left == right or (name == "checkpoint" and not (left and right)):
            continue
        shown = f"{_short(left)} on the encode side, {_short(right)} on the language side"
        found.append(f"{name}: {shown}" + (f" ({_HINTS[name]})" if name in _HINTS else ""))
    return "; ".join(found)


def proof(token: str, side: str, *nonces: str) -> str:
    """What only a holder of the token can say about both nonces; ``side`` keeps one's proof from being the other's."""
    text = msgspec.json.encode([side, *nonces])
    return hmac.new(token.encode(), text, hashlib.sha256).hexdigest()


def _short(value: object) -> str:
    text = str(value)
    return f"{text[:12]}…" if len(text) > 32 else text
