"""Trains a small model in float64 and writes what came out: `python run.py STRATEGY OUTPUT [CHECKPOINT [STOP]]`.

Run by test_parallel.py under torchrun, and by test_checkpoint.py as a process that is killed.  At step STOP a single
process waits for ever; several keep the checkpoint as CHECKPOINT.stopped, and go on from it with a new model.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from commissure.core.rng import isolated, torch_generator
from commissure.nn.decay import exempt
from commissure.train import Checkpoint, Processes, TrainConfig, TrainResult, joined, train
from commissure.train.parallel import whole

CONFIG = TrainConfig(steps=30, batch_size=6, lr=1e-2, weight_decay=0.1, final_lr=0.1, validate_every=10, keep="last")


class Layers(nn.Module):
    """A few residual layers, parameters that do not decay (biases and the scale), and dropout where asked for."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(5, 5), nn.Dropout(dropout), nn.Tanh()) for _ in range(3))
        self.scale = nn.Parameter(torch.ones(5))
        exempt(self, [name for name, _ in self.named_parameters() if name == "scale" or name.endswith("bias")])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x * self.scale


def model(dropout: float = 0.0) -> Layers:
    with isolated(0, "model"):
        return Layers(dropout).double()


def run(
    module: Layers, processes: Processes, *, checkpoint: Checkpoint | None = None, stop: int | None = None
) -> TrainResult:
    """Fit a random map; one row counts double, so that the shares of two processes weigh differently."""
    wrapped = processes.wrap(module)
    target = torch.linspace(-1, 1, 25, dtype=torch.float64).view(5, 5)
    weight = torch.tensor([2.0, *[1.0] * (CONFIG.batch_size - 1)], dtype=torch.float64)[:, None]

    def draw(step: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(CONFIG.batch_size, 5, generator=torch_generator(1, step), dtype=torch.float64)
        rows = processes.rows(CONFIG.batch_size)
        return x[rows], weight[rows]

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        x, weighted = batch
        return (weighted * (wrapped(x) - x @ target).square()).sum() * processes.size / weight.sum()

    def validate() -> float:
        with torch.no_grad():
            return -float(module(torch.ones(1, 5, dtype=torch.float64)).sum())

    def progress(step: int, steps: int, value: float) -> None:
        if step == stop and processes.size > 1:
            raise KeyboardInterrupt
        if step == stop:
            print("waiting", flush=True)
            signal.pause()

    return train(
        wrapped, draw, loss=loss, config=CONFIG, seed=0, validate=validate, progress=progress,
        checkpoint=checkpoint, processes=processes,
    )  # fmt: skip


def results(module: nn.Module, result: TrainResult) -> dict[str, Tensor]:
    """Everything to compare."""
    weights = {name: whole(t).clone() for name, t in module.state_dict().items()}
    scores = torch.tensor(result.scores, dtype=torch.float64)
    return weights | {"losses": torch.tensor(result.losses, dtype=torch.float64), "scores": scores}


if __name__ == "__main__":
    strategy, output, *rest = sys.argv[1:]
    checkpoint = Checkpoint(Path(rest[0]), every=7) if rest else None
    stop = int(rest[1]) if len(rest) > 1 else None
    dropout = 0.3 if output.endswith("dropout") else 0.0
    with joined(strategy) as processes:  # type: ignore[arg-type]
        if stop is not None:
            with contextlib.suppress(KeyboardInterrupt):
                run(model(dropout), processes, checkpoint=checkpoint, stop=stop)
            if processes.rank == 0:
                shutil.copy(rest[0], rest[0] + ".stopped")
            processes.barrier()
        module = model(dropout)
        found = results(module, run(module, processes, checkpoint=checkpoint))
        if processes.rank == 0:
            save_file(found, output)
