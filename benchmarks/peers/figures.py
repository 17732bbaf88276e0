"""What is measured: names of the figures, their sizes, and which parts of a model each needs."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FIGURES", "IMAGE_TEXT_TOKENS", "QUALITY_TOKENS", "Figure", "select"]

IMAGE_TEXT_TOKENS = 64
QUALITY_TOKENS = 256
DECODE_STEPS = 32
MEMORY_PROMPT = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One figure.

    Attributes:
        name: as in ``--figures`` and in the report.
        kind: which measurement: ``prefill``, ``decode``, ``image``, ``first_token``, ``load``, ``memory``, ``quality``.
        tokens: prompt length, or context that decoding starts from.
        size: width and height of the picture.
        unit: of the value.
        more_is_better: how ratios are formed.
        group: figures of one group are measured one after the other in the same process.
    """

    name: str
    kind: str
    unit: str
    group: str
    tokens: int = 0
    size: tuple[int, int] = (512, 512)
    more_is_better: bool = False


def _rates(kind: str, sizes: tuple[int, ...]) -> list[Figure]:
    return [
        Figure(name=f"{kind}_{n}", kind=kind, unit="tok/s", group="text", tokens=n, more_is_better=True) for n in sizes
    ]


def _images() -> list[Figure]:
    sizes = ((512, 512), (1024, 768))
    return [Figure(name=f"image_{w}x{h}", kind="image", unit="s", group="image", size=(w, h)) for w, h in sizes]


FIGURES: dict[str, Figure] = {
    figure.name: figure
    for figure in (
        *_rates("prefill", (128, 512, 2048)),
        *_rates("decode", (64, 2048, 8192)),
        *_images(),
        Figure(name="first_token", kind="first_token", unit="s", group="first_token", tokens=IMAGE_TEXT_TOKENS),
        Figure(name="load", kind="load", unit="s", group="load"),
        Figure(name="memory", kind="memory", unit="MiB", group="memory", tokens=MEMORY_PROMPT),
        Figure(name="quality", kind="quality", unit="nats", group="quality", tokens=QUALITY_TOKENS),
    )
}


def select(patterns: list[str] | None) -> list[Figure]:
    """Figures whose name starts with one of ``patterns``; None: all.

    Raises:
        ValueError: a pattern that fits none.
    """
    if patterns is None:
        return list(FIGURES.values())
    for pattern in patterns:
        if not any(name.startswith(pattern) for name in FIGURES):
            raise ValueError(f"no figure {pattern!r}; there are {', '.join(FIGURES)}")
    return [figure for name, figure in FIGURES.items() if name.startswith(tuple(patterns))]
