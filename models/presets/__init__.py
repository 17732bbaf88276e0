"""Configurations that are not published checkpoints."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

from deepstitch.errors import ConfigError, did_you_mean

__all__ = ["PRESETS", "preset_config"]

PRESETS = ("vl-sm61",)


def preset_config(name: str) -> dict[str, Any]:
    """Return the config.json of a preset as a dict.

    Raises:
        ConfigError: there is no such preset.
    """
    if name not in PRESETS:
        raise ConfigError(f"no preset {name!r}{did_you_mean(name, PRESETS)}; presets are {', '.join(PRESETS)}")
    return json.loads((resources.files(__package__) / f"{name}.json").read_text("utf-8"))
