"""Vision and language in one process: :class:`Qwen3VLMoeForConditionalGeneration`.

python -m deepstitch.models.examples.vision_language
"""

from __future__ import annotations

import json

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

from deepstitch.models import load_model
from deepstitch.models.sample.files import CHECKPOINT
from deepstitch.models.sample.packing import patchify, vision_geometry
from deepstitch.runtime.preprocess.positions import mrope_position_ids

__all__ = ["main", "prepare"]

PICTURES = CHECKPOINT.parent / "pictures"


def prepare(picture: str, question: str) -> tuple[list[int], dict[str, Tensor], tuple[int, int, int]]:
    """Turn a picture of the sample and a question into what the model takes.

    Returns:
        Token ids with one placeholder per visual token, the vision encoder's arguments, and the grid of
        patches ``(time, height, width)``.
    """
    pixels = np.asarray(Image.open(PICTURES / picture).convert("RGB"))
    height, width, _ = pixels.shape
    indices, weights, cos, sin = vision_geometry(height, width)
    vision = {
        "pixel_values": patchify(pixels[None]),
        "position_indices": indices,
        "position_weights": weights,
        "rotary_cos": cos,
        "rotary_sin": sin,
        "cu_seqlens": np.array([0, indices.shape[1]], np.int32),
    }
    placeholders = "<|image_pad|>" * (indices.shape[1] // 4)
    asked = f"<|vision_start|>{placeholders}<|vision_end|>{question}"
    prompt = f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n"
    ids = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json")).encode(prompt).ids
    return (
        ids,
        {name: torch.from_numpy(array) for name, array in vision.items()},
        (1, height // 16, width // 16),
    )


def main() -> tuple[str, str]:
    """Ask the sample model about its first example picture.

    Returns:
        The question and the answer.
    """
    example = json.loads((PICTURES / "questions.json").read_text("utf-8"))[0]
    ids, vision, grid = prepare(example["image"], example["question"])
    model = load_model(CHECKPOINT)
    assert model.config.image_token_id is not None  # the sample sees
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    answer: list[int] = []
    with torch.no_grad():
        while not answer or answer[-1] != tokenizer.token_to_id("<|im_end|>"):
            input_ids = np.array([ids + answer])
            positions, _ = mrope_position_ids(
                input_ids, [grid], visual_token_ids=[model.config.image_token_id], merge_size=2
            )
            logits = model(torch.from_numpy(input_ids), torch.from_numpy(positions), vision)
            answer.append(int(logits[0, -1].argmax()))
    return example["question"], tokenizer.decode(answer)


if __name__ == "__main__":
    print(*main())
