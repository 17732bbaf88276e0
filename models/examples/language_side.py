"""The language side of a disaggregated pair: ``Qwen3MoeForCausalLMWithDeepStack`` takes DeepStack as input.

    python -m deepstitch.models.examples.language_side

The encode side holds the vision encoder and sends two tensors; the language side holds no vision weights.
Here both run in one process.
"""

from __future__ import annotations

import json

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from deepstitch.models import load_model
from deepstitch.models.examples.vision_language import PICTURES, prepare
from deepstitch.models.sample.files import CHECKPOINT
from deepstitch.models.vl import Qwen3VLMoeForConditionalGeneration
from deepstitch.runtime.preprocess.positions import mrope_position_ids

__all__ = ["main"]


def encode(ids: list[int], vision: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The encode side.

    Returns:
        Prompt embeddings ``[1, S, H]`` and DeepStack ``[1, S, taps * H]``, zero where the prompt is text.
    """
    model = load_model(CHECKPOINT)
    assert isinstance(model, Qwen3VLMoeForConditionalGeneration)
    return model.merge(torch.tensor([ids]), *model.get_image_feature(vision))


def main() -> tuple[str, str]:
    """Ask the sample model about its first example picture, in two halves.

    Returns:
        The question and the answer.
    """
    example = json.loads((PICTURES / "questions.json").read_text("utf-8"))[0]
    ids, vision, grid = prepare(example["image"], example["question"])
    model = load_model(CHECKPOINT, language_only=True)
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    assert model.config.image_token_id is not None  # the sample sees
    answer: list[int] = []
    with torch.no_grad():
        embeds, deepstack = encode(ids, vision)
        while not answer or answer[-1] != tokenizer.token_to_id("<|im_end|>"):
            positions, _ = mrope_position_ids(
                np.array([ids + answer]), [grid], visual_token_ids=[model.config.image_token_id], merge_size=2
            )
            hidden = model.language_model(embeds, torch.from_numpy(positions), input_deepstack_embeds=deepstack)
            answer.append(int(model.lm_head(hidden[0, -1]).argmax()))
            embeds = torch.cat([embeds, model.embed_tokens(torch.tensor([answer[-1:]]))], dim=1)
            deepstack = torch.nn.functional.pad(deepstack, (0, 0, 0, 1))  # a text token adds zeros
    return example["question"], tokenizer.decode(answer)


if __name__ == "__main__":
    print(*main())
