"""Hugging Face transformers as the reference: its own preprocessing, positions and model, in float32."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import numpy as np

from deepstitch.errors import ComparisonFailed, MissingDependency, UnsupportedError
from deepstitch.export.compare.inputs import CaseInputs, Pixels, RowInputs
from deepstitch.export.compare.stages import Floats, Stages, gather, vision_stages
from deepstitch.manifest import ModelFacts

__all__ = ["TransformersReference"]

_CLASSES = {
    "qwen3_vl_moe": "Qwen3VLMoeForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_IMAGE, _VIDEO = 1, 2  # transformers' token types


class TransformersReference:
    """One row at a time, without a cache; what the model really sees is read by hooks."""

    def __init__(self, checkpoint: Path, model: ModelFacts) -> None:
        """Load the model and the image processor.

        Raises:
            MissingDependency: transformers is not installed.
            UnsupportedError: the installed version does not have this model.
        """
        try:
            import torch
            import transformers
        except ImportError:
            raise MissingDependency("transformers", "compare", "--against transformers") from None
        loader = getattr(transformers, _CLASSES.get(model.model_type, ""), None)
        if loader is None:
            raise UnsupportedError(
                f"transformers {transformers.__version__} has no class for '{model.model_type}'; install transformers 5"
            )
        with _quiet(transformers):
            self._model = loader.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="sdpa").eval()
            has_vision = model.image_token_id is not None
            load_processor = transformers.AutoImageProcessor.from_pretrained
            self._images = load_processor(checkpoint, backend="pil") if has_vision else None
        self._ids = model
        self._seen: dict[str, Any] = {}
        if has_vision:
            self._model.model.visual.register_forward_hook(self._keep_vision)
            self._model.model.language_model.register_forward_pre_hook(self._keep_embeddings, with_kwargs=True)
        else:
            self._model.model.embed_tokens.register_forward_hook(lambda _, __, out: self._seen.update(embeddings=out))

    def run(self, inputs: CaseInputs) -> Stages:
        """All stages of one case.

        Raises:
            ComparisonFailed: transformers refuses what our preprocessing made.
        """
        import torch

        embeddings, prefill, decode, vision = [], [], [], []
        for row in inputs.rows:
            self._seen.clear()
            ids = torch.from_numpy(np.concatenate([row.prompt, row.decode_ids]))[None]
            try:
                with torch.inference_mode():
                    output = self._model(input_ids=ids, use_cache=False, **self._visual_inputs(row, ids))
            except ValueError as error:
                raise ComparisonFailed(f"case {inputs.case.name}: transformers refuses the inputs ({error})") from None
            logits, prompt = output.logits[0].numpy(), len(row.prompt)
            embeddings.append(self._seen["embeddings"][0, :prompt].numpy())
            prefill.append(logits[:prompt])
            decode.append(logits[prompt:])
            if "vision" in self._seen:
                vision.append(self._seen["vision"])
        stages = gather(embeddings, prefill, decode)
        if vision:
            stages = vision_stages(*(np.concatenate(parts) for parts in zip(*vision, strict=True))) | stages
        return stages

    def _visual_inputs(self, row: RowInputs, ids: Any) -> dict[str, Any]:
        """Pixels and grids of a row made by transformers; a row holds pictures or clips, not both."""
        import torch

        types = (ids == self._ids.image_token_id) * _IMAGE + (ids == self._ids.video_token_id) * _VIDEO
        if not row.pixels:
            return {}
        assert self._images is not None  # rows with pixels come from models with vision
        pictures = [each for each in row.pixels if each.ndim == 3]
        if pictures:
            made = self._images(pictures, return_tensors="pt")
            visual = {"pixel_values": made["pixel_values"], "image_grid_thw": made["image_grid_thw"]}
        else:
            patches, grids = zip(*(self._clip(each) for each in row.pixels), strict=True)
            visual = {
                "pixel_values_videos": torch.from_numpy(np.concatenate(patches)),
                "video_grid_thw": torch.tensor(grids),
            }
        return {**visual, "mm_token_type_ids": types.int()}

    def _clip(self, frames: Pixels) -> tuple[Floats, tuple[int, int, int]]:
        """Patches and grid of a clip ``(frames, H, W, 3)``.

        transformers cuts clips with torchvision, which deepstitch does not ask for; its image processor cuts
        pictures the same way and repeats them along time, so frame ``j`` of a time step is what stands at
        place ``j`` of its patches.
        """
        assert self._images is not None
        step = self._images.temporal_patch_size
        made = self._images(list(frames), do_resize=False, return_tensors="np")
        _, height, width = (int(size) for size in made["image_grid_thw"][0])
        # (time step, frame of the step, patch, channel, place in time, pixels)
        cut = made["pixel_values"].reshape(len(frames) // step, step, height * width, 3, step, -1)
        patches = np.stack([cut[:, place, :, :, place] for place in range(step)], axis=3)
        return patches.reshape(len(frames) // step * height * width, -1), (len(frames) // step, height, width)

    def _keep_vision(self, module: Any, arguments: Any, output: Any) -> None:
        deepstack = np.concatenate([each.numpy() for each in output.deepstack_features], axis=-1)
        self._seen["vision"] = (output.pooler_output.numpy(), deepstack)

    def _keep_embeddings(self, module: Any, arguments: Any, keywords: dict[str, Any]) -> None:
        self._seen["embeddings"] = keywords["inputs_embeds"]


@contextlib.contextmanager
def _quiet(transformers: Any) -> Any:
    """Loading reports progress and conversions of its own; stdout may be meant for JSON."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
