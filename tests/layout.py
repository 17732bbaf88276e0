"""Where the modules of the package lie in the repository, for the tests that read the source."""

from __future__ import annotations

from pathlib import Path

MAPPED = ("export", "models", "plugins", "runtime")  # top-level folders that install as deepstitch.<folder>
FOLDERS = ("deepstitch", *MAPPED)


def sources(repository: Path, *folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((repository / folder).rglob("*.py"))]


def module_name(repository: Path, path: Path) -> str:
    parts = list(path.relative_to(repository).with_suffix("").parts)
    if parts[0] in MAPPED:
        parts.insert(0, "deepstitch")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
