"""Data-parallel training in a few single-threaded processes that share the weights in memory.

On a CPU the layers of so small a model are too short for threads: waking them costs more than they save. One
process per core, each with its own micro-batches and one thread, keeps the cores busy.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn


class Team:
    """What the processes share: gradients, counters, and a barrier.

    Args:
        parameters: Parameters whose storage is moved to shared memory; every process then sees every update.
        size: Number of processes, the calling one included.
        num_counters: Length of the per-process counter vector.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], size: int, num_counters: int) -> None:
        self.size = size
        self.parameters = list(parameters)
        for parameter in self.parameters:
            parameter.data.share_memory_()
        total = sum(parameter.numel() for parameter in self.parameters)
        self.gradients = torch.zeros(size, total).share_memory_()
        self.counters = torch.zeros(size, num_counters, dtype=torch.float64).share_memory_()
        self._context = multiprocessing.get_context("fork")
        self._barrier = self._context.Barrier(size)
        self._processes: list[Any] = []

    def start(self, work: Callable[[int], None]) -> None:
        """Starts the other processes; each runs `work(rank)` with its rank from 1."""
        for rank in range(1, self.size):
            process = self._context.Process(target=work, args=(rank,), daemon=True)
            process.start()
            self._processes.append(process)

    def stop(self) -> None:
        """Ends the other processes."""
        for process in self._processes:
            process.terminate()

    def wait(self) -> None:
        """Waits until every process is here."""
        self._barrier.wait(timeout=300)

    def sum_counters(self, rank: int, values: Sequence[float]) -> torch.Tensor:
        """Returns the sum over all processes of their `values`."""
        self.counters[rank] = torch.tensor(values, dtype=torch.float64)
        self.wait()
        return self.counters.sum(0)

    def reduce_gradients(self, rank: int) -> None:
        """Replaces every parameter's gradient by the sum over all processes."""
        gradients = [parameter.grad for parameter in self.parameters]
        flat = [
            (torch.zeros_like(parameter) if grad is None else grad).flatten()
            for parameter, grad in zip(self.parameters, gradients, strict=True)
        ]
        torch.cat(flat, out=self.gradients[rank])
        self.wait()
        total, start = self.gradients.sum(0), 0
        for parameter in self.parameters:
            parameter.grad = total[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()
