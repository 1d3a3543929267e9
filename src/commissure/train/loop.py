"""Gradient training of any module on batches drawn by step number.

The loop owns the optimizer, the schedule and the random state and nothing else: the caller says how to draw a batch
and what its loss is.  Schedule: one cycle (linear warm-up to `lr`, then cosine to ~0; Smith & Topin, arXiv
1708.07120) over a fixed number of steps, AdamW (arXiv 1711.05101).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn

from commissure.core.config import Config
from commissure.core.errors import ConvergenceError, InputError
from commissure.core.rng import isolated

__all__ = ["TrainConfig", "TrainResult", "train"]

Batch = TypeVar("Batch")


class TrainConfig(Config):
    """How to train: sizes in steps, no wall-clock anywhere."""

    steps: int = Field(default=450, ge=1)
    batch_size: int = Field(default=16, ge=1)
    lr: float = Field(default=2e-3, gt=0)
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = Field(default=1e-3, ge=0)
    warmup: float = Field(default=0.1, ge=0, lt=1, description="fraction of the steps with rising learning rate")
    constant: float = Field(default=0.0, ge=0, lt=1, description="fraction held at `lr` before the cosine")
    clip: float = Field(default=1.0, gt=0, description="largest gradient norm")
    validate_every: int = Field(default=25, ge=1)
    patience: int = Field(default=8, ge=1, description="validations without improvement before the early stop")


class TrainResult(NamedTuple):
    """What a training run did; `losses` has one entry a step, `scores` one (step, score) a validation."""

    steps: int
    losses: tuple[float, ...]
    scores: tuple[tuple[int, float], ...]
    best_step: int


def learning_rate_factor(step: int, config: TrainConfig) -> float:
    """Multiplier of `lr` at `step` (0-based): warm-up, plateau, cosine to zero."""
    warm = config.warmup * config.steps
    flat = warm + config.constant * config.steps
    if step < warm:
        return (step + 1) / (warm + 1)
    if step < flat:
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - flat) / max(1.0, config.steps - flat)))


def train(
    module: nn.Module,
    draw: Callable[[int], Batch],
    *,
    loss: Callable[[Batch], Tensor],
    config: TrainConfig,
    seed: int,
    validate: Callable[[], float] | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> TrainResult:
    """Train `module` in place and leave it in evaluation mode.

    `draw(step)` gives the batch of a step (deterministic in the step), `loss(batch)` a scalar.  With `validate` (higher
    is better) the weights of the best validation are kept and the run stops after `patience` validations without gain.
    `progress(step, steps, loss)` is called after each step.  A loss that is not finite raises `ConvergenceError`.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    if not parameters:
        raise InputError("module", type(module).__name__, "at least one parameter that requires a gradient")
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay)
    losses: list[float] = []
    scores: list[tuple[int, float]] = []
    best, best_step, best_weights = -math.inf, config.steps, None
    with isolated(seed, "train"):
        for step in range(config.steps):
            module.train()
            for group in optimizer.param_groups:
                group["lr"] = config.lr * learning_rate_factor(step, config)
            optimizer.zero_grad(set_to_none=True)
            value = loss(draw(step))
            value.backward()
            nn.utils.clip_grad_norm_(parameters, config.clip)
            optimizer.step()
            losses.append(float(value.detach()))
            if not math.isfinite(losses[-1]):
                raise ConvergenceError(f"loss = {losses[-1]} at step {step}: lower lr = {config.lr} or check the data")
            if progress is not None:
                progress(step + 1, config.steps, losses[-1])
            last = step + 1 == config.steps
            if validate is not None and ((step + 1) % config.validate_every == 0 or last):
                module.eval()
                score = validate()
                scores.append((step + 1, score))
                if score > best:
                    best, best_step = score, step + 1
                    best_weights = {name: t.detach().clone() for name, t in module.state_dict().items()}
                elif (step + 1 - best_step) >= config.patience * config.validate_every:
                    break
    if best_weights is not None:
        module.load_state_dict(best_weights)
    module.eval()
    return TrainResult(len(losses), tuple(losses), tuple(scores), best_step)
