"""Text only: :class:`Qwen3MoeForCausalLM` has no vision encoder and no DeepStack.

    python -m deepstitch.models.examples.text_only

A Qwen3 or Qwen3-MoE checkpoint loads with ``load_model(folder)`` alone. The sample model that ships is a
Qwen3-VL-MoE, so this example takes its language side: without DeepStack that is exactly a Qwen3-MoE, with the
same parameter names.
"""

from __future__ import annotations

import dataclasses

import torch
from tokenizers import Tokenizer

from deepstitch.models import build_model, load_model
from deepstitch.models.sample.files import CHECKPOINT

__all__ = ["main"]

QUESTION = "What is the opposite of hot?"


def main() -> str:
    """Ask the sample model a question without a picture.

    Returns:
        The answer.
    """
    language_side = load_model(CHECKPOINT, language_only=True)
    config = dataclasses.replace(language_side.config, model_type="qwen3_moe", vision=None)
    model = build_model(config).eval()  # Qwen3MoeForCausalLM
    model.load_state_dict(language_side.state_dict())

    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    prompt = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer.encode(prompt).ids
    answer: list[int] = []
    with torch.no_grad():
        while not answer or answer[-1] != tokenizer.token_to_id("<|im_end|>"):
            input_ids = torch.tensor([ids + answer])
            position_ids = torch.arange(input_ids.shape[1]).expand(3, 1, -1)  # three equal rows: text
            answer.append(int(model(input_ids, position_ids)[0, -1].argmax()))
    return tokenizer.decode(answer)


if __name__ == "__main__":
    print(f"{QUESTION} {main()}")
