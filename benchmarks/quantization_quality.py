"""What integer weights cost the sample model: held-out accuracy, KL divergence and bytes, with a plot.

    python -m benchmarks.quantization_quality --output results.json --plot accuracy.png

Every variant is exported, and its bundle answers the same questions through the pipeline a user has. The divergence is
that of ``deepstitch compare --quality`` on held-out conversations.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

import deepstitch
from benchmarks.bundle_accuracy import score
from benchmarks.common import write_report
from deepstitch.export import ExportConfig, QuantizationConfig, export_checkpoint
from deepstitch.export.compare.quality import measure_quality
from deepstitch.models.sample.calibration import write_calibration
from deepstitch.models.sample.files import CHECKPOINT
from deepstitch.models.sample.generator import HELD_OUT, make_episode
from deepstitch.runtime.bundle import Bundle

# A little over 1,000 questions, kinds in the proportion of benchmarks/sample_accuracy.py.
EPISODES = {"one": 105, "several": 42, "album": 11, "album-long": 7, "text": 9, "recall": 14, "recall-long": 11}


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One way to store the model."""

    name: str
    weights: str
    vision: str = "fp32"
    calibrated: bool = False
    options: dict[str, Any] = field(default_factory=dict)


def _variants() -> list[Variant]:
    found = [
        Variant(name="fp32", weights="fp32"),
        Variant(name="int8", weights="int8"),
        Variant(name="int8 zero points", weights="int8", options={"symmetric": False}),
        Variant(name="int4 rtn", weights="int4", options={"method": "rtn"}),
        Variant(name="int4 search", weights="int4"),
        Variant(name="int4 gptq", weights="int4", calibrated=True),
        Variant(name="int4 gptq zero points", weights="int4", calibrated=True, options={"symmetric": False}),
        Variant(name="int4 gptq block 128", weights="int4", calibrated=True, options={"block": 128}),
        Variant(name="vision int8 alone", weights="fp32", vision="int8"),
        Variant(name="vision int4 alone", weights="fp32", vision="int4"),
        Variant(name="int4 gptq, vision int4", weights="int4", vision="int4", calibrated=True),
    ]
    budgets = ("5.5bits", "6bits", "6.5bits", "7.5bits")
    return found + [
        Variant(name=f"mixed {budget}", weights="mixed", calibrated=True, options={"budget": budget})
        for budget in budgets
    ]


def measure(variant: Variant, folder: Path, calibration: Path, held_out: Path, share: float) -> dict[str, Any]:
    """Export, ask every question, compare distributions."""
    options = variant.options | ({"calibration": calibration} if variant.calibrated else {})
    began = time.perf_counter()
    config = ExportConfig(
        checkpoint=CHECKPOINT,
        output=folder / variant.name.replace(" ", "-"),
        weights=variant.weights,
        vision_weights=variant.vision,
        quantization=QuantizationConfig(**options),
        progress=False,
    )
    bundle = Bundle.open(export_checkpoint(config))
    exported = time.perf_counter() - began
    quality = measure_quality(bundle, CHECKPOINT, held_out, progress=False)
    asked: Counter[str] = Counter()
    right: Counter[str] = Counter()
    pipeline = deepstitch.load(config.output)
    for kind, count in EPISODES.items():
        for index in tqdm(range(max(1, int(count * share))), desc=f"{variant.name}: {kind}", disable=None):
            score(pipeline, make_episode(HELD_OUT, kind, index), asked, right)
    quantization = bundle.manifest.quantization
    return {
        "name": variant.name,
        "questions": asked.total(),
        "accuracy": right.total() / asked.total(),
        "mean_kl": quality.mean_kl,
        "top1_agreement": quality.top1_agreement,
        "weight_bytes": bundle.manifest.files["weights.safetensors"].size,
        "bits_per_quantized_weight": quantization.bits_per_weight if quantization else None,
        "export_seconds": round(exported, 1),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The results in Markdown; losses are against the first row."""
    lines = [
        "| weights | MB | accuracy | loss (points) | KL divergence | same top token |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        loss = 100 * (rows[0]["accuracy"] - row["accuracy"])
        lines.append(
            f"| {row['name']} | {row['weight_bytes'] / 1e6:.2f} | {row['accuracy']:.2%} | {loss:+.2f} "
            f"| {row['mean_kl']:.2e} | {row['top1_agreement']:.2%} |"
        )
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Accuracy and divergence against bytes."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4))
    for axis, key, label in zip(
        axes, ("accuracy", "mean_kl"), ("held-out accuracy", "KL divergence (nats)"), strict=True
    ):
        for row in rows:
            if key == "mean_kl" and row["name"] == "fp32":
                continue
            axis.scatter(row["weight_bytes"] / 1e6, row[key], color="C1" if row["name"].startswith("mixed") else "C0")
            axis.annotate(row["name"], (row["weight_bytes"] / 1e6, row[key]), fontsize=6)
        axis.set_xlabel("weights (MB)")
        axis.set_ylabel(label)
    axes[1].set_yscale("log")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure all variants, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="names of variants; the first is the baseline")
    parser.add_argument("--share", type=float, default=1.0, help="share of the episodes to ask")
    parser.add_argument("--output", type=Path, help="JSON report")
    parser.add_argument("--plot", type=Path, help="PNG")
    given = parser.parse_args()
    chosen = [variant for variant in _variants() if not given.only or variant.name in given.only]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        calibration = write_calibration(folder / "calibration")
        held_out = write_calibration(folder / "held-out", split=HELD_OUT)
        rows = [measure(variant, folder, calibration, held_out, given.share) for variant in chosen]
    if given.plot is not None:
        plot(rows, given.plot)
    write_report("quantization_quality", {"variants": rows, "table": table(rows).splitlines()}, given.output)


if __name__ == "__main__":
    main()
