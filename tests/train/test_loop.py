"""The training loop: its schedule in closed form, clipping, AdamW's own arguments, and when it stops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from commissure.core.errors import InputError
from commissure.train import TrainConfig, train
from commissure.train.loop import learning_rate_factor


def test_schedule_in_closed_form() -> None:
    config = TrainConfig(steps=100, warmup=0.1, constant=0.4)
    factors = [learning_rate_factor(step, config) for step in range(100)]
    assert factors[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    assert factors[10:50] == [1.0] * 40
    assert factors[50:] == pytest.approx([0.5 * (1 + math.cos(math.pi * step / 50)) for step in range(50)])
    assert factors[-1] < 1e-3


def _line() -> nn.Linear:
    module = nn.Linear(1, 1, bias=False)
    nn.init.constant_(module.weight, 1.0)
    return module


def test_equals_adamw_written_out() -> None:
    config = TrainConfig(steps=6, lr=0.1, betas=(0.7, 0.8), weight_decay=0.3, warmup=0.5, clip=5.0)
    module = _line()
    train(module, lambda step: float(step + 1), loss=lambda scale: scale * module.weight.square().sum(), config=config,
          seed=0)  # fmt: skip
    weight, first, second = 1.0, 0.0, 0.0
    for step in range(6):
        gradient = 2 * (step + 1) * weight
        gradient *= min(1.0, 5.0 / (abs(gradient) + 1e-6))
        rate = 0.1 * learning_rate_factor(step, config)
        first, second = 0.7 * first + 0.3 * gradient, 0.8 * second + 0.2 * gradient**2
        weight *= 1 - rate * 0.3
        weight -= rate * (first / (1 - 0.7 ** (step + 1))) / (math.sqrt(second / (1 - 0.8 ** (step + 1))) + 1e-8)
    assert float(module.weight.detach()) == pytest.approx(weight, rel=1e-5)


def test_stops_after_patience_validations_without_gain_and_keeps_the_best() -> None:
    scores, weights, module = iter([0.1, 0.5, 0.4, 0.5, 0.9]), [], _line()

    def validate() -> float:
        assert not module.training
        weights.append(float(module.weight.detach()))
        return next(scores)

    config = TrainConfig(steps=50, validate_every=3, patience=2, lr=0.01)
    result = train(module, lambda step: None, loss=lambda _: module.weight.sum(), config=config, seed=0,
                   validate=validate)  # fmt: skip
    assert result.scores == ((3, 0.1), (6, 0.5), (9, 0.4), (12, 0.5))
    assert (result.steps, result.best_step) == (12, 6)
    assert float(module.weight.detach()) == weights[1]
    assert not module.training


def test_without_trainable_parameters_there_is_nothing_to_do() -> None:
    module = _line().requires_grad_(False)

    def loss(_: None) -> Tensor:
        return torch.zeros(())

    with pytest.raises(InputError, match="requires a gradient"):
        train(module, lambda step: None, loss=loss, config=TrainConfig(), seed=0)
