"""Checkpoints of a training run: weights, optimizer, step, random state, losses; resuming is bit-identical.

One safetensors file, replaced in one step, so that a process killed at any moment leaves the last whole checkpoint.
Every tensor is stored whole under its parameter's name, however many processes held it:

    model.NAME  best.NAME  exp_avg.NAME  exp_avg_sq.NAME  step.NAME  rng.cpu  rng.cuda  losses  scores
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from commissure.core.errors import InputError
from commissure.core.files import check_target, read_tensors, replacing
from commissure.train.parallel import Processes, distribute_like, whole

__all__ = ["Checkpoint", "Run", "check_checkpoint", "read_checkpoint", "write_checkpoint"]

_FORMAT = "commissure.train.Checkpoint"


class Checkpoint(NamedTuple):
    """Where and how often (steps) a run is saved; `key` says what the configuration does not: data, model."""

    path: Path
    every: int = 100
    key: str = ""


@dataclass
class Run:
    """A training run so far."""

    best_step: int
    losses: list[float] = field(default_factory=list)
    scores: list[tuple[int, float]] = field(default_factory=list)
    best: float = -math.inf
    best_weights: dict[str, Tensor] | None = None


def check_checkpoint(checkpoint: Checkpoint) -> None:
    """`InputError` before the work that would be lost."""
    check_target(checkpoint.path, "checkpoint")
    if checkpoint.every < 1:
        raise InputError("checkpoint.every", checkpoint.every, "a number of steps >= 1")


def write_checkpoint(
    checkpoint: Checkpoint,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    run: Run,
    *,
    key: str,
    processes: Processes,
) -> None:
    """Write the run's state; `key` names what it was trained with.  Every process calls it, the first one writes."""
    from safetensors.torch import save_file

    tensors = {f"model.{name}": whole(t) for name, t in module.state_dict().items()}
    tensors |= {f"best.{name}": whole(t) for name, t in (run.best_weights or {}).items()}
    for name, parameter in module.named_parameters():
        tensors |= {f"{part}.{name}": whole(t) for part, t in optimizer.state.get(parameter, {}).items()}
    tensors["rng.cpu"] = torch.get_rng_state()
    if _on_cuda(module):
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    tensors["losses"] = torch.tensor(run.losses, dtype=torch.float64)
    tensors["scores"] = torch.tensor(run.scores, dtype=torch.float64).reshape(-1, 2)
    metadata = {"format": _FORMAT, "key": key, "best": json.dumps([run.best, run.best_step])}
    if processes.rank == 0:
        with replacing(checkpoint.path) as partial:
            save_file({name: t.clone().contiguous() for name, t in tensors.items()}, partial, metadata=metadata)
    processes.barrier()


def read_checkpoint(checkpoint: Checkpoint, module: nn.Module, optimizer: torch.optim.Optimizer, *, key: str) -> Run:
    """Put module, optimizer and torch's generator into the state saved; `InputError` where it is another run's."""
    metadata, tensors = read_tensors(checkpoint.path, "checkpoint")
    if metadata.get("format") != _FORMAT:
        raise InputError("checkpoint", str(checkpoint.path), f"a file of format {_FORMAT!r}", "name another file")
    if metadata.get("key") != key:
        allowed = "a checkpoint of the same configuration and seed"
        raise InputError("checkpoint", str(checkpoint.path), allowed, "remove it, or name another file")
    _check_parts(tensors, {"rng.cpu", "losses", "scores", *(["rng.cuda"] if _on_cuda(module) else [])})
    _load(module, _part(tensors, "model"), checkpoint.path)
    for name, parameter in module.named_parameters():
        state = {
            part: tensors[f"{part}.{name}"] for part in ("step", "exp_avg", "exp_avg_sq") if f"{part}.{name}" in tensors
        }
        if state:
            optimizer.state[parameter] = {  # the count of steps is a number on the CPU
                part: t if part == "step" else distribute_like(t, parameter) for part, t in state.items()
            }
    torch.set_rng_state(tensors["rng.cpu"])
    if _on_cuda(module):
        torch.cuda.set_rng_state(tensors["rng.cuda"])
    best, best_step = json.loads(metadata["best"])
    current, weights = module.state_dict(), _part(tensors, "best")
    return Run(
        best_step=best_step,
        losses=tensors["losses"].tolist(),
        scores=[(int(step), score) for step, score in tensors["scores"].tolist()],
        best=best,
        best_weights={name: distribute_like(t, current[name]) for name, t in weights.items()} or None,
    )


def _check_parts(tensors: Mapping[str, Tensor], needed: set[str]) -> None:
    """The parts a run goes on from are there, and its weights and moments are finite."""
    for name in sorted(needed - tensors.keys()):
        raise InputError(f"checkpoint[{name!r}]", "missing", "a tensor of this name", "remove the damaged file")
    for name, t in tensors.items():
        if name not in ("losses", "scores") and not bool(t.isfinite().all()):
            raise InputError(f"checkpoint[{name!r}]", "not finite", "finite numbers", "remove the damaged file")


def _part(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{part}."): t for name, t in tensors.items() if name.startswith(f"{part}.")}


def _load(module: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    current = module.state_dict()
    shapes = {name: tuple(t.shape) for name, t in current.items()}
    if {name: tuple(t.shape) for name, t in weights.items()} != shapes:
        raise InputError("checkpoint", str(path), f"the weights of this {type(module).__name__}", "name another file")
    module.load_state_dict({name: distribute_like(t, current[name]) for name, t in weights.items()})


def _on_cuda(module: nn.Module) -> bool:
    return next(module.parameters()).device.type == "cuda"
