"""From token ids to decoder inputs: the embedding table beside the graph, with visual rows merged in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from deepstitch.blockwise import WeightFormat, dequantize, unpack_zero_points
from deepstitch.errors import BundleError, InputError
from deepstitch.runtime.bundle import Bundle
from deepstitch.runtime.calls import Floats, Ints, RowTokens
from deepstitch.runtime.encoder_cache import VisionFeatures
from deepstitch.runtime.engine.memory import DeviceArray, RowPieces, Tensor, to_host
from deepstitch.runtime.preprocess import Prompt
from deepstitch.tensorfile import DTYPE_BYTES, TensorEntry, TensorFile, to_float32

__all__ = ["EmbeddingTable", "PromptRows", "item_spans", "merge"]

_FLOATS = ("F32", "F16", "BF16")


class EmbeddingTable:
    """The token embedding ``[vocab, H]``, memory-mapped; only the rows asked for are read."""

    def __init__(self, rows: int, read: Callable[[Ints], Floats]) -> None:
        self._rows = rows
        self._read = read

    @classmethod
    def open(cls, bundle: Bundle) -> EmbeddingTable:
        """Find the table a bundle's manifest names.

        Raises:
            BundleError: the tensor does not have the shape or dtype of an embedding of this model.
        """
        place, model = bundle.manifest.embedding, bundle.manifest.model
        tensors = TensorFile.open(bundle.folder / place.file)
        entry = tensors[place.tensor]
        try:
            stored = WeightFormat.parse(place.stored) if place.stored else None
        except ValueError as error:
            raise BundleError(f"{bundle.folder}: manifest entry 'embedding': {error}; export again") from None
        expected = model.vocab_size * model.hidden_size * (stored.bits if stored else 8 * DTYPE_BYTES[entry.dtype]) // 8
        dtypes = ("U8",) if stored else _FLOATS
        if entry.dtype not in dtypes or entry.shape[0] != model.vocab_size or entry.nbytes != expected:
            raise BundleError(
                f"{entry.path}: embedding '{entry.name}' is {entry.dtype} {list(entry.shape)}, "
                f"expected [{model.vocab_size}, {model.hidden_size}] of {place.stored or ', '.join(dtypes)}; "
                "export the checkpoint again"
            )
        if stored is not None:
            return cls(model.vocab_size, _integer_rows(tensors, place.tensor, stored))
        table = _mapped(entry)
        return cls(model.vocab_size, lambda ids: to_float32(table[ids], entry.dtype))

    def __call__(self, ids: Ints) -> Floats:
        """Look up ``(n,)`` ids; returns fresh ``(n, H)`` float32."""
        return self._read(ids)

    def __len__(self) -> int:
        return self._rows


def _mapped(entry: TensorEntry) -> npt.NDArray[Any]:
    return np.asarray(entry.read())  # a plain view: indexing a numpy.memmap costs several times as much per call


def _integer_rows(tensors: TensorFile, name: str, stored: WeightFormat) -> Callable[[Ints], Floats]:
    """Reads rows of a table of integers."""
    scales = _mapped(tensors[f"{name}.scales"])
    values = _mapped(tensors[name]).reshape(*scales.shape, -1)
    zero_points = None
    if not stored.symmetric:
        zero_points = unpack_zero_points(_mapped(tensors[f"{name}.zero_points"]), scales.shape, stored.bits)

    def read(ids: Ints) -> Floats:
        return dequantize(values[ids], scales[ids], None if zero_points is None else zero_points[ids], stored)

    return read


class PromptRows:
    """Embeddings of a prompt, made for the range asked for: all of them are more than a long prompt's KV cache."""

    def __init__(self, table: EmbeddingTable, ids: Ints, places: Ints, visual: Sequence[Tensor]) -> None:
        """``visual`` are the rows of each image and clip; they lie at ``places``, in order.

        Those on a device stay there: a range is then in pieces, text on the host between visual rows on the device.
        """
        self._table = table
        self._ids = ids
        self._places = places
        self._visual = visual
        self._on_device = _on_device(visual)
        self._starts = np.cumsum([0, *map(len, visual)])

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, span: slice) -> Floats | RowPieces:
        start, stop, _ = span.indices(len(self))
        first, last = np.searchsorted(self._places, (start, stop)).tolist()
        if self._on_device:
            return RowPieces(list(self._pieces(start, stop, first, last)))
        embeds = self._table(self._ids[start:stop])
        for rows, begin in zip(self._visual, self._starts.tolist(), strict=False):
            low, high = max(first, begin), min(last, begin + len(rows))
            if low < high:
                embeds[self._places[low:high] - start] = to_host(rows[low - begin : high - begin])
        return embeds

    def _pieces(self, start: int, stop: int, first: int, last: int) -> Iterator[Tensor]:
        """Text and visual rows in turn, of tokens from ``start``; visual rows ``first`` to ``last`` are among them."""
        visual = RowPieces(self._visual)
        runs = np.flatnonzero(np.diff(self._places[first:last], prepend=-2) != 1) + first
        begin = start
        for low, high in zip(runs, [*runs, last][1:], strict=True):
            place = self._places[low]
            if begin < place:
                yield self._table(self._ids[begin:place])
            yield from visual[low:high].pieces
            begin = place + high - low
        if begin < stop:
            yield self._table(self._ids[begin:stop])


def merge(
    table: EmbeddingTable,
    prompt: Prompt,
    features: Sequence[VisionFeatures],
    *,
    visual_ids: Sequence[int],
    deepstack_width: int,
    start: int = 0,
) -> RowTokens:
    """Embed the tokens of a prompt from ``start`` on, visual rows in place of their placeholders.

    Args:
        table: the token embedding.
        prompt: one row.
        features: encoder outputs of the items whose tokens lie at or after ``start``, in prompt order.
        visual_ids: ids of the placeholder tokens.
        deepstack_width: ``num_deepstack * H``.
        start: tokens before it are in the KV cache already.

    Raises:
        InputError: ids outside the vocabulary, or placeholders and visual rows differ in number.
    """
    ids = prompt.input_ids[start:]
    if ids.size and not 0 <= ids.min() <= ids.max() < len(table):
        raise InputError(
            f"the prompt holds token id {ids.max()}, the model has {len(table)}; is its tokenizer another's?"
        )
    index = np.zeros(len(ids), np.int32)
    places = np.flatnonzero(np.isin(ids, visual_ids))
    given = sum(len(each.image_embeds) for each in features)
    if len(places) != given:
        raise InputError(
            f"the prompt holds {len(places)} visual tokens, its images and videos have {given}; "
            "pass one image or video per placeholder"
        )
    deepstack: Floats | RowPieces = np.zeros((0, deepstack_width), np.float32)
    if features and deepstack_width:
        parts = [each.deepstack_embeds for each in features]
        deepstack = RowPieces(parts) if _on_device(parts) else np.concatenate(list(map(to_host, parts)))
        index[places] = np.arange(1, given + 1, dtype=np.int32)
    return RowTokens(
        embeds=PromptRows(table, ids, places, [each.image_embeds for each in features]),
        position_ids=prompt.position_ids[:, start:],
        deepstack=deepstack,
        deepstack_index=index,
    )


def _on_device(tensors: Sequence[Tensor]) -> bool:
    return any(isinstance(each, DeviceArray) for each in tensors)


def item_spans(prompt: Prompt, visual_ids: Sequence[int]) -> tuple[Ints, Ints]:
    """First visual token of each image and clip, and one past its last; ``(N,)`` each."""
    if prompt.vision is None:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    places = np.flatnonzero(np.isin(prompt.input_ids, visual_ids))
    ends = np.cumsum(prompt.vision.tokens_per_item)
    return places[ends - prompt.vision.tokens_per_item], places[ends - 1] + 1
