"""The training loop: its schedule, its early stop, its errors, and that it leaves the global state alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from commissure.core.errors import ConvergenceError, InputError
from commissure.nn.decay import exempt
from commissure.train import TrainConfig, TrainResult, train
from commissure.train.loop import learning_rate_factor


def fit(
    config: TrainConfig, *, seed: int = 0, dropout: float = 0.0, **options: object
) -> tuple[nn.Module, TrainResult]:
    """Least squares with one weight: y = 3 x."""
    module = nn.Sequential(nn.Dropout(dropout), nn.utils.skip_init(nn.Linear, 1, 1, bias=False))
    nn.init.zeros_(module[1].weight)

    def loss(x: Tensor) -> Tensor:
        return (module(x) - 3 * x).square().mean()

    def draw(step: int) -> Tensor:
        return torch.linspace(1, 2, 8)[:, None] + step / 1000

    return module, train(module, draw, loss=loss, config=config, seed=seed, **options)  # type: ignore[arg-type]


def test_one_cycle() -> None:
    config = TrainConfig(steps=1000, warmup=0.1, constant=0.2)
    factors = [learning_rate_factor(step, config) for step in range(config.steps)]
    assert factors[:100] == pytest.approx([(step + 1) / 101 for step in range(100)])
    assert set(factors[100:301]) == {1.0}
    assert factors[300:] == pytest.approx([0.5 * (1 + math.cos(math.pi * k / 700)) for k in range(700)])
    assert 0 < factors[-1] < 1e-5


def test_the_first_step_is_adamw_at_the_first_rate() -> None:
    """The first step of Adam is the learning rate times the sign of the gradient, whatever its size."""
    module = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(module.weight)
    weights = []
    config = TrainConfig(steps=10, lr=0.06, warmup=0.5, weight_decay=0.0)

    def progress(step: int, steps: int, loss: float) -> None:
        weights.append(module.weight.item())

    train(module, lambda s: None, loss=lambda b: -5 * module.weight.sum(), config=config, seed=0, progress=progress)
    assert weights[0] == pytest.approx(0.06 / 6, rel=1e-5)
    assert len(weights) == 10


def test_weight_decay_is_decoupled() -> None:
    module = nn.Linear(1, 1, bias=False)
    nn.init.ones_(module.weight)
    config = TrainConfig(steps=1, lr=0.1, warmup=0.0, weight_decay=0.5)
    train(module, lambda step: None, loss=lambda batch: 0 * module.weight.sum(), config=config, seed=0)
    assert module.weight.item() == pytest.approx(1 - 0.1 * 0.5)


def test_clipping_bounds_the_gradient() -> None:
    norms = []
    module = nn.Linear(1, 1, bias=False)

    def progress(step: int, steps: int, loss: float) -> None:
        norms.append(module.weight.grad.norm().item())

    config = TrainConfig(steps=2, clip=0.25)
    train(module, lambda s: None, loss=lambda b: 1e3 * module.weight.sum(), config=config, seed=0, progress=progress)
    assert norms == pytest.approx([0.25, 0.25], rel=1e-4)


def test_it_learns_and_repeats_itself_without_touching_the_global_generator() -> None:
    before = torch.random.get_rng_state()
    config = TrainConfig(steps=200, lr=0.1, weight_decay=0.0)
    module, _ = fit(config)
    assert module[1].weight.item() == pytest.approx(3, abs=1e-2)
    assert not module.training
    noisy = [fit(config, seed=seed, dropout=0.5)[1].losses for seed in (1, 1, 2)]
    assert noisy[0] == noisy[1] != noisy[2]
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_best_validation_is_kept_and_ends_the_run() -> None:
    scores = iter([1.0, 5.0, 4.0, 3.0, 2.0])
    weights = []

    def validate() -> float:
        weights.append(module.weight.item())
        assert not module.training
        return next(scores)

    module = nn.Linear(1, 1, bias=False)
    config = TrainConfig(steps=100, validate_every=10, patience=2)
    result = train(
        module, lambda s: None, loss=lambda b: module.weight.square().sum(), config=config, seed=0, validate=validate
    )
    assert result.scores == ((10, 1.0), (20, 5.0), (30, 4.0), (40, 3.0))
    assert (result.steps, result.best_step) == (40, 20)
    assert module.weight.item() == weights[1] != weights[-1]


def test_errors() -> None:
    with pytest.raises(InputError, match="requires a gradient"):
        train(nn.Identity(), lambda s: None, loss=lambda b: torch.zeros(()), config=TrainConfig(), seed=0)
    module = nn.Linear(1, 1)
    with pytest.raises(ConvergenceError, match="loss = nan at step 0: lower lr"):
        train(module, lambda s: None, loss=lambda b: module.bias.sum() * math.nan, config=TrainConfig(), seed=0)
    for bad in ({"steps": 0}, {"lr": 0.0}, {"warmup": 1.0}, {"clip": 0.0}, {"patience": 0}, {"epochs": 3}):
        with pytest.raises(InputError, match=f"TrainConfig.{next(iter(bad))}"):
            TrainConfig(**bad)


def test_the_cosine_ends_at_the_final_rate() -> None:
    config = TrainConfig(steps=100, warmup=0.0, final_lr=0.1)
    factors = [learning_rate_factor(step, config) for step in range(100)]
    assert factors == pytest.approx([0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * k / 100)) for k in range(100)])
    assert factors[-1] == pytest.approx(0.1, abs=1e-3)


def test_marked_parameters_do_not_decay() -> None:
    module = nn.ParameterDict({name: nn.Parameter(torch.ones(2, 2)) for name in ("plain", "marked")})
    exempt(module, ["marked"])
    config = TrainConfig(steps=1, lr=0.1, warmup=0.0, weight_decay=0.5)
    train(
        module, lambda step: None, loss=lambda batch: 0 * sum(p.sum() for p in module.values()), config=config, seed=0
    )
    assert {name: p.mean().item() for name, p in module.items()} == pytest.approx({"plain": 0.95, "marked": 1.0})


def test_the_last_weights_are_kept_where_asked() -> None:
    module = nn.Linear(1, 1, bias=False)
    seen = []

    def validate() -> float:
        seen.append(module.weight.item())
        return -len(seen)

    config = TrainConfig(steps=50, validate_every=5, patience=1, keep="last")
    result = train(
        module, lambda s: None, loss=lambda b: module.weight.square().sum(), config=config, seed=0, validate=validate
    )
    assert result.steps == 50
    assert module.weight.item() == seen[-1] != seen[0]
