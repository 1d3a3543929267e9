"""Gradient training of any module on batches drawn by step number.

The loop owns the optimizer, the schedule and the random state and nothing else: the caller says how to draw a batch
and what its loss is.  Schedule: one cycle (linear warm-up to `lr`, then cosine to `final_lr` of it; Smith & Topin,
arXiv 1708.07120) over a fixed number of steps, AdamW (arXiv 1711.05101).  With a `Checkpoint` a killed run goes on
where it was, bit for bit; with `Processes` several processes train one model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn

from commissure.core.config import Config
from commissure.core.errors import ConvergenceError, InputError
from commissure.core.rng import isolated
from commissure.nn.decay import exempted
from commissure.train.checkpoint import Checkpoint, Run, check_checkpoint, read_checkpoint, write_checkpoint
from commissure.train.parallel import Processes

__all__ = ["TrainConfig", "TrainResult", "train"]

Batch = TypeVar("Batch")


class TrainConfig(Config):
    """How to train: sizes in steps, no wall-clock anywhere."""

    steps: int = Field(default=450, ge=1)
    batch_size: int = Field(default=16, ge=1)
    lr: float = Field(default=2e-3, gt=0)
    final_lr: float = Field(default=0.0, ge=0, le=1, description="where the cosine ends, as a fraction of `lr`")
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = Field(default=1e-3, ge=0)
    warmup: float = Field(default=0.1, ge=0, lt=1, description="fraction of the steps with rising learning rate")
    constant: float = Field(default=0.0, ge=0, lt=1, description="fraction held at `lr` before the cosine")
    clip: float = Field(default=1.0, gt=0, description="largest gradient norm")
    validate_every: int = Field(default=25, ge=1)
    patience: int = Field(default=8, ge=1, description="validations without improvement before the early stop")
    keep: Literal["best", "last"] = Field(default="best", description="weights kept; 'last' never stops early")


class TrainResult(NamedTuple):
    """What a training run did; `losses` has one entry a step, `scores` one (step, score) a validation."""

    steps: int
    losses: tuple[float, ...]
    scores: tuple[tuple[int, float], ...]
    best_step: int


def learning_rate_factor(step: int, config: TrainConfig) -> float:
    """Multiplier of `lr` at `step` (0-based): warm-up, plateau, cosine to `final_lr`."""
    warm = config.warmup * config.steps
    flat = warm + config.constant * config.steps
    if step < warm:
        return (step + 1) / (warm + 1)
    if step < flat:
        return 1.0
    cosine = 0.5 * (1 + math.cos(math.pi * (step - flat) / max(1.0, config.steps - flat)))
    return config.final_lr + (1 - config.final_lr) * cosine


def train(
    module: nn.Module,
    draw: Callable[[int], Batch],
    *,
    loss: Callable[[Batch], Tensor],
    config: TrainConfig,
    seed: int,
    validate: Callable[[], float] | None = None,
    progress: Callable[[int, int, float], None] | None = None,
    checkpoint: Checkpoint | None = None,
    processes: Processes | None = None,
) -> TrainResult:
    """Train `module` in place and leave it in evaluation mode.

    `draw(step)` gives the batch of a step (deterministic in the step), `loss(batch)` a scalar.  With `validate` (higher
    is better) the weights of the best validation are kept and the run stops after `patience` validations without gain,
    unless `config.keep` is "last".  `progress(step, steps, loss)` is called after each step.  A loss that is not finite
    raises `ConvergenceError`.

    Parameters marked by `nn.decay.exempt` do not decay.  `checkpoint`: written as the run goes on, and read first where
    the file exists.  `processes`: `module` is what `processes.wrap` gave, `draw` gives this process's share, and `loss`
    the number whose mean over the processes is the loss of the whole batch.
    """
    processes = Processes() if processes is None else processes
    plain = processes.unwrap(module)
    if checkpoint is not None:
        check_checkpoint(checkpoint)
    optimizer = _optimizer(plain, config)
    run = Run(best_step=config.steps)
    with isolated(seed, "train"):
        if checkpoint is not None and checkpoint.path.exists():
            run = read_checkpoint(checkpoint, plain, optimizer, key=_key(config, seed, checkpoint))
        for step in range(len(run.losses), config.steps):
            if _is_stalled(run, config):
                break
            rate = config.lr * learning_rate_factor(step, config)
            run.losses.append(processes.mean(_update(module, optimizer, loss, draw(step), lr=rate, clip=config.clip)))
            if not math.isfinite(run.losses[-1]):
                message = f"loss = {run.losses[-1]} at step {step}: lower lr = {config.lr} or check the data"
                raise ConvergenceError(message)
            if progress is not None:
                progress(step + 1, config.steps, run.losses[-1])
            last = step + 1 == config.steps
            if validate is not None and ((step + 1) % config.validate_every == 0 or last):
                module.eval()
                _score(run, step + 1, validate(), plain, config)
            if checkpoint is not None and ((step + 1) % checkpoint.every == 0 or last):
                write_checkpoint(
                    checkpoint, plain, optimizer, run, key=_key(config, seed, checkpoint), processes=processes
                )
    if run.best_weights is not None:
        plain.load_state_dict(run.best_weights)
    module.eval()
    return TrainResult(len(run.losses), tuple(run.losses), tuple(run.scores), run.best_step)


def _optimizer(module: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over the parameters that train; a second group, where there is one, does not decay."""
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    if not named:
        raise InputError("module", type(module).__name__, "at least one parameter that requires a gradient")
    kept = exempted(module)
    groups = [{"params": [p for name, p in named if name not in kept], "weight_decay": config.weight_decay}]
    groups.append({"params": [p for name, p in named if name in kept], "weight_decay": 0.0})
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=config.lr, betas=config.betas)


def _update(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Callable[[Batch], Tensor],
    batch: Batch,
    *,
    lr: float,
    clip: float,
) -> Tensor:
    """One step of the optimizer; gives the loss before it."""
    module.train()
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad(set_to_none=True)
    value = loss(batch)
    value.backward()
    nn.utils.clip_grad_norm_([p for p in module.parameters() if p.requires_grad], clip)
    optimizer.step()
    return value.detach()


def _score(run: Run, step: int, score: float, module: nn.Module, config: TrainConfig) -> None:
    """Record a validation, and the weights where it is the best so far."""
    run.scores.append((step, score))
    if config.keep == "best" and score > run.best:
        run.best, run.best_step = score, step
        run.best_weights = {name: t.detach().clone() for name, t in module.state_dict().items()}


def _is_stalled(run: Run, config: TrainConfig) -> bool:
    """Whether the last validation closed `patience` of them without gain; never where the last weights are kept."""
    if not run.scores:
        return False
    return run.scores[-1][0] - run.best_step >= config.patience * config.validate_every


def _key(config: TrainConfig, seed: int, checkpoint: Checkpoint) -> str:
    """What a checkpoint must have been written with to be taken up again."""
    return f"{config.digest()} {seed} {checkpoint.key}"
