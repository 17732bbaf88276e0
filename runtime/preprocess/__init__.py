"""Preprocessing without torch: pictures, clips and messages to the inputs of the graphs.

Reading order: ``processor`` (the whole path); ``messages``, ``chat``, ``tokenizer`` (text); ``images``,
``resize``, ``video``, ``patches``, ``items`` (pixels); ``vision_inputs``, ``positions`` (grids).
"""

from __future__ import annotations

from deepstitch.runtime.preprocess.batch import Prompt, VisionBatch
from deepstitch.runtime.preprocess.images import load_image
from deepstitch.runtime.preprocess.items import KnownItem
from deepstitch.runtime.preprocess.positions import MRopeState, mrope_position_ids
from deepstitch.runtime.preprocess.processor import Processor
from deepstitch.runtime.preprocess.tokenizer import DecodeStream, Tokenizer
from deepstitch.runtime.preprocess.video import Clip
from deepstitch.runtime.preprocess.vision_inputs import VisionInputs, vision_inputs

__all__ = [
    "Clip",
    "DecodeStream",
    "KnownItem",
    "MRopeState",
    "Processor",
    "Prompt",
    "Tokenizer",
    "VisionBatch",
    "VisionInputs",
    "load_image",
    "mrope_position_ids",
    "vision_inputs",
]
