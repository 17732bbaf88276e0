"""Peak memory of the vision encoder against the number of pictures in one call.

    python -m benchmarks.vision_memory BUNDLE --output benchmarks/results/vision_memory.json

Each row is a process of its own: pictures of one size (packed as one batch) or of two sizes (one after the other), in
one call of the encoder. Reported is the peak of resident memory above what the loaded graph had, per picture; memory
linear in the number of pictures means that the figure does not grow. The scores of one head over all patches at once,
which a mask over the packed sequence would need, are given for comparison.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.common import write_report
from benchmarks.long_prompt import resident

SIZES = {"equal": ((512, 512),), "mixed": ((512, 512), (512, 384))}


def child(bundle: Path, sizes: str, count: int, threads: int) -> dict[str, Any]:
    """Encode once, report."""
    import numpy as np

    import deepstitch

    pipeline = deepstitch.load(bundle, threads=threads)
    rng = np.random.default_rng(0)
    shapes = [SIZES[sizes][each % len(SIZES[sizes])] for each in range(count)]
    pictures = [rng.integers(0, 256, (*shape, 3), np.uint8) for shape in shapes]
    content = [*[{"type": "image"}] * count, {"type": "text", "text": "?"}]
    prompt = pipeline.parts.processor([{"role": "user", "content": content}], images=pictures)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far, that of loading, is forgotten (proc(5))
    before = resident()["rss"]
    features = pipeline.parts.encoder.features([prompt.vision])[0]
    patches = int(prompt.vision.cu_seqlens[-1])
    return {
        "rows": sum(len(each.image_embeds) for each in features),
        "patches": patches,
        "bytes": resident()["peak_rss"] - before,
        "scores_of_one_head_bytes": 4 * patches**2,
    }


def measure(bundle: Path, counts: list[int], threads: int) -> list[dict[str, Any]]:
    """One process per row."""
    rows = []
    for sizes in SIZES:
        for count in counts:
            arguments = [str(bundle), "--child", sizes, str(count), "--threads", str(threads)]
            command = [sys.executable, "-m", "benchmarks.vision_memory", *arguments]
            found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
            rows.append({"sizes": sizes, "pictures": count, **found, "bytes_per_picture": found["bytes"] / count})
    return rows


def main() -> None:
    """Parse arguments, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="an exported bundle")
    parser.add_argument("--counts", nargs="+", type=int, default=[1, 2, 4, 8, 16])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--child", nargs=2, metavar=("SIZES", "COUNT"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        sizes, count = given.child
        json.dump(child(given.bundle, sizes, int(count), given.threads), sys.stdout)
        return
    write_report("vision_memory", {"rows": measure(given.bundle, given.counts, given.threads)}, given.output)


if __name__ == "__main__":
    main()
