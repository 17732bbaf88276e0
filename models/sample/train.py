"""Trains the sample model from scratch on a CPU.

    python -m deepstitch.models.sample.train --minutes 75 --out DIR

The run is measured in minutes, not steps: learning rate and curriculum follow the elapsed fraction. A run
that was stopped continues from `DIR/state.pt`. `DIR/checkpoint` is the Hugging Face folder.
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from deepstitch.models.sample import fast_ops
from deepstitch.models.sample.drawing import NUM_COLOR_LABELS, NUM_FORM_LABELS
from deepstitch.models.sample.files import new_model, save_state, write_checkpoint
from deepstitch.models.sample.forward import gates, run
from deepstitch.models.sample.optimizer import build_optimizers
from deepstitch.models.sample.packing import Batch
from deepstitch.models.sample.schedule import MemoryPlan, batch_bytes, training_step
from deepstitch.models.sample.team import Team
from deepstitch.models.vl import Qwen3VLMoeForConditionalGeneration

ROUTER_LOSS = 0.01
MIDDLE_LAYER = 3
# In this share of micro-batches the image embeddings stand at wrong tokens and only the DeepStack rows tell
# the truth; otherwise the model would learn to do without them.
SHUFFLED_SHARE = 0.5
MUON_RATE, ADAM_RATE = 3e-3, 1.5e-3


class Router:
    """Collects router logits and turns them into the load-balancing loss of the Switch Transformer."""

    def __init__(self, model: Qwen3VLMoeForConditionalGeneration) -> None:
        self.top_k = model.config.text.num_experts_per_tok
        self.logits: list[Tensor] = []
        for gate in gates(model):
            gate.register_forward_hook(self._collect)

    def _collect(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.logits.append(output.flatten(0, -2))

    def loss(self) -> Tensor:
        """Returns the mean over layers; 1 when every expert receives the same share."""
        losses = []
        for logits in self.logits:
            probabilities = logits.softmax(-1)
            chosen = torch.zeros_like(logits).scatter_(1, logits.detach().topk(self.top_k, dim=-1).indices, 1.0)
            share = chosen.mean(0) / self.top_k
            losses.append((share * probabilities.mean(0)).sum() * logits.shape[-1])
        self.logits = []
        return torch.stack(losses).mean()


class PatchProbe(nn.Module):
    """A throwaway head on the image embeddings that names what each 16-pixel patch shows, and where it is.

    It carries gradients into the vision tower before the decoder has learned to look.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.forms = nn.Linear(width, 4 * NUM_FORM_LABELS)
        self.colors = nn.Linear(width, 4 * NUM_COLOR_LABELS)
        self.places = nn.Linear(width, 2)
        self.mentions = nn.Linear(width, 2)

    def loss(self, embeds: Tensor, batch: Batch) -> Tensor:
        """Returns cross-entropy over forms and colours plus squared error of places; `embeds` (T, H)."""
        places = torch.cat([_token_places(group.pixels.shape) for group in batch.vision])
        total = F.mse_loss(self.places(embeds), places)
        for head, name in ((self.forms, "forms"), (self.colors, "colors")):
            labels = torch.cat([torch.from_numpy(getattr(group, name)) for group in batch.vision]).flatten()
            logits = head(embeds).view(len(labels), -1)
            losses = F.cross_entropy(logits, labels, reduction="none")
            shown = labels > 0  # background is common and easy
            total = total + losses[shown].mean() + 0.3 * losses[~shown].mean()
        return total

    def mention_loss(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Returns the squared error of where a named shape is, read at its name in the question.

        Args:
            hidden: (B, S, H), from the middle of the decoder.
            batch: What was run.
        """
        named = hidden.flatten(0, 1)[torch.from_numpy(batch.mention_rows)]
        predicted = self.mentions(F.layer_norm(named, named.shape[-1:]))
        return F.mse_loss(predicted, torch.from_numpy(batch.mention_places))


def _token_places(shape: tuple[int, ...]) -> Tensor:
    """Returns the centre of every image token in its picture, from -1 to 1, (n * tokens, 2) as y, x."""
    count, height, width, _ = shape
    y, x = ((torch.arange(side // 32) + 0.5) * 64 / side - 1 for side in (height, width))
    return torch.cartesian_prod(y, x).repeat(count, 1)


def initialize(model: Qwen3VLMoeForConditionalGeneration) -> None:
    """Draws initial weights; what is added to a residual stream starts at half scale."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2:
                if name.endswith("bias"):
                    parameter.zero_()
                continue
            residual = any(part in name for part in ("o_proj", "down_proj", "attn.proj", "mlp.linear_fc2"))
            std = 0.02 if "patch_embed" in name else 0.03 if residual else 0.06
            parameter.normal_(std=std)


class Checkpointing:
    """Recomputes layers in the backward pass while `active`: a third more work, a fifth of the memory."""

    def __init__(self, model: Qwen3VLMoeForConditionalGeneration) -> None:
        self.active = False
        for layer in [*model.language_model.layers, *model.visual.blocks]:
            layer.forward = self._wrap(layer.forward)

    def _wrap(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any) -> Any:
            return checkpoint(forward, *args, use_reentrant=False) if self.active else forward(*args)

        return wrapped


def keep_memory() -> None:
    """Asks glibc to keep freed memory: returning large blocks to the system costs a page fault per 4 kB."""
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return
    trim_threshold, mmap_threshold = -1, -3
    libc.mallopt(trim_threshold, 2_000_000_000)
    libc.mallopt(mmap_threshold, 32 * 1024 * 1024)  # glibc refuses more


def learning_rate(progress: float) -> float:
    """Returns the factor on the learning rates: constant, then linear decay over the last 32 %."""
    return min(1.0, max(0.01, (1.0 - progress) / 0.32))


def probe_weight(progress: float) -> float:
    """Returns the weight of the throwaway head's loss: gone at half of the run."""
    return 0.3 * max(0.0, 1.0 - progress / 0.5)


def mention_weight(progress: float) -> float:
    """Returns the weight of the loss on named shapes, which fades towards the end of the run."""
    return 2.0 * (1.0 - progress)


class Trainer:
    """One training run and everything its state file holds."""

    def __init__(self, out: Path, seconds: float, plan: MemoryPlan, processes: int, always_checkpoint: bool) -> None:
        self.out, self.seconds, self.plan, self.always_checkpoint = out, seconds, plan, always_checkpoint
        torch.manual_seed(0)
        torch.set_num_threads(1)
        self.model = new_model().train()
        initialize(self.model)
        self.probe = PatchProbe(self.model.config.text.hidden_size)
        self.team = Team([*self.model.parameters(), *self.probe.parameters()], processes, num_counters=2)
        self.middle: list[Tensor] = []
        self.model.language_model.layers[MIDDLE_LAYER].register_forward_hook(
            lambda module, inputs, output: self.middle.append(output)
        )
        self.router, self.checkpointing = Router(self.model), Checkpointing(self.model)
        self.step, self.pictures, self.questions = 0, 0, 0
        self.clock = torch.zeros(1, dtype=torch.float64).share_memory_()  # elapsed seconds, written by rank 0
        self.recent: dict[str, float] = defaultdict(lambda: float("nan"))  # smoothed exact match per task

    @property
    def progress(self) -> float:
        """Elapsed fraction of the run."""
        return self.clock.item() / self.seconds

    def resume(self, path: Path) -> None:
        """Continues a stopped run. Momenta are not kept: they come back within a few steps."""
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.probe.load_state_dict(state["probe"], strict=False)
        self.step, elapsed, self.pictures, self.questions = state["counters"]
        self.clock.fill_(elapsed)
        self.recent.update(state["recent"])

    def save(self) -> None:
        """Writes the resumable state and the checkpoint folder."""
        state = {
            "model": self.model.state_dict(),
            "probe": self.probe.state_dict(),
            "counters": (self.step, self.clock.item(), self.pictures, self.questions),
            "recent": dict(self.recent),
        }
        save_state(state, self.out / "state.pt")
        write_checkpoint(self.model, self.out / "checkpoint")

    def train_step(self, rank: int, optimizers: list[torch.optim.Optimizer], warmup: float) -> float:
        """Accumulates gradients over micro-batches, applies one update, returns the process's answer loss."""
        progress = self.progress
        batches = training_step(self.plan, progress, self.step, rank)
        rows = [sum(len(group.rows) for group in batch.vision) for batch in batches]
        own = sum(len(batch.targets) for batch in batches)
        targets, all_rows = self.team.sum_counters(rank, (own, sum(rows))).tolist()
        total = 0.0
        for batch, count in zip(batches, rows, strict=True):
            self.checkpointing.active = self.always_checkpoint or batch_bytes(batch) > 1.5 * self.plan.limit_bytes
            output = run(self.model, batch, shuffle=torch.rand(1).item() < SHUFFLED_SHARE)
            wanted = torch.from_numpy(batch.targets)
            answer = F.cross_entropy(output.logits, wanted, reduction="sum") / targets
            loss = answer + ROUTER_LOSS * self.router.loss() / len(batches) / self.team.size
            weight = probe_weight(progress) * count / max(1.0, all_rows)
            if output.image_embeds is not None and weight > 0:
                loss = loss + weight * self.probe.loss(output.image_embeds, batch)
            middle = self.middle.pop()
            if len(batch.mention_rows):
                share = mention_weight(progress) / len(batches) / self.team.size
                loss = loss + share * self.probe.mention_loss(middle, batch)
            loss.backward()
            self.router.logits = []  # recomputed layers collect again
            total += answer.item() * targets / own
            self._score(batch, output.logits.argmax(-1) == wanted)
        self.team.reduce_gradients(rank)
        nn.utils.clip_grad_norm_(self.team.parameters, 2.0)
        for optimizer, base in zip(optimizers, (MUON_RATE, ADAM_RATE), strict=False):
            for group in optimizer.param_groups:
                group["lr"] = base * learning_rate(progress) * warmup
            optimizer.step()
        for parameter in self.team.parameters:
            parameter.grad = None
        self.step += 1
        self.team.wait()
        return total

    def _score(self, batch: Batch, correct: Tensor) -> None:
        per_question = torch.ones(len(batch.tasks), dtype=torch.bool)
        per_question[torch.from_numpy(batch.questions)[~correct]] = False
        groups: dict[str, list[bool]] = defaultdict(list)
        for task, right in zip(batch.tasks, per_question.tolist(), strict=True):
            groups[task].append(right)
        for task, rights in groups.items():
            weight = min(0.5, len(rights) / 300)
            value, old = sum(rights) / len(rights), self.recent[task]
            self.recent[task] = value if old != old else (1 - weight) * old + weight * value
        self.questions += self.team.size * len(batch.tasks)
        self.pictures += self.team.size * sum(len(group.pixels) for group in batch.vision)

    def work(self, rank: int, after_step: Callable[[float], None] = lambda loss: None) -> None:
        """Trains as one of the processes until the time is used up."""
        optimizers = build_optimizers(self.model, self.probe, rank, self.team.size)
        steps = 0
        while self.progress < 1.0:
            loss = self.train_step(rank, optimizers, warmup=min(1.0, (steps + 1) / 30))
            steps += 1
            after_step(loss)
            self.team.wait()  # rank 0 has moved the clock

    def run(self, save_every: float) -> None:
        """Trains in all processes, saving every `save_every` seconds."""
        bar = tqdm(total=round(self.seconds), initial=round(self.clock.item()), unit="s", mininterval=10)
        last, saved, logged, loss = time.monotonic(), self.clock.item(), self.clock.item(), float("nan")

        def after_step(value: float) -> None:
            nonlocal last, saved, logged, loss
            loss = value if loss != loss else 0.97 * loss + 0.03 * value
            now = time.monotonic()
            self.clock += now - last
            last, elapsed = now, self.clock.item()
            rate = f"{self.pictures / elapsed:.0f} pictures/s"
            bar.set_postfix(step=self.step, loss=f"{loss:.3f}", rate=rate, refresh=False)
            bar.update(round(elapsed) - bar.n)
            if elapsed - logged > 60:
                logged = elapsed
                bar.write(self.report(loss), file=sys.stderr)
            if elapsed - saved > save_every:
                saved = elapsed
                self.save()

        self.team.start(self.work)
        try:
            self.work(0, after_step)
        finally:
            self.team.stop()
            bar.close()
        self.save()

    def report(self, loss: float) -> str:
        """Returns one line with the smoothed training accuracy per task."""
        tasks = " ".join(f"{task.replace(' ', '-')}={value:.2f}" for task, value in sorted(self.recent.items()))
        counts = f"pictures {self.pictures} questions {self.questions}"
        return f"{self.clock.item():.0f}s step {self.step} loss {loss:.3f} {counts} {tasks}"


@click.command(help=__doc__)
@click.option("--minutes", default=75.0, show_default=True, help="Training time, over all resumed parts.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for state.pt and checkpoint/.")
@click.option("--processes", default=2, show_default=True, help="Single-threaded processes; one per core.")
@click.option("--memory-mb", default=160, show_default=True, help="Activation memory a process's micro-batch may keep.")
@click.option("--checkpoint-layers/--checkpoint-long-only", default=False, show_default=True,
              help="Recompute every batch's layers, or only those of batches over the limit.")  # fmt: skip
@click.option("--save-every", default=180.0, show_default=True, help="Seconds between saved states.")
def main(minutes: float, out: Path, processes: int, memory_mb: int, checkpoint_layers: bool, save_every: float) -> None:
    """Runs the command line."""
    keep_memory()
    out.mkdir(parents=True, exist_ok=True)
    plan = MemoryPlan(limit_bytes=memory_mb * 1_000_000, step_bytes=memory_mb * 1_500_000)
    trainer = Trainer(out, minutes * 60, plan, processes, checkpoint_layers)
    if (out / "state.pt").exists():
        trainer.resume(out / "state.pt")
    with fast_ops.enabled():
        trainer.run(save_every)


if __name__ == "__main__":
    main()
