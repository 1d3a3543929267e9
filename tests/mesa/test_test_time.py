"""Test-time compute: what is set, what it does to outputs, and that it is taken back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from commissure.core.errors import InputError
from commissure.core.rng import isolated, torch_generator
from commissure.mesa import MesaLayer, MesaNetConfig, build_stack, set_test_time_compute
from commissure.nn.stack import Stack


def small() -> Stack:
    with isolated(0, "model"):
        return build_stack(MesaNetConfig(vocab=13, dim=16, blocks=4, heads=2, head_dim=8, hybrid="hawk")).double()


def settings(model: nn.Module) -> list[tuple[str, int, float]]:
    layers = [module for module in model.modules() if isinstance(module, MesaLayer)]
    return [(layer.solver, layer.max_cg_steps, layer.cg_eps) for layer in layers]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"steps": 5}, ("cg", 5, 0.0)),
        ({"eps": 1e-3}, ("cg", 30, 1e-3)),
        ({"eps": 1e-3, "steps": 9}, ("cg", 9, 1e-3)),
        ({"steps": 0}, ("cg", 0, 0.0)),
    ],
)
def test_every_layer_inside_is_set_and_restored(options: dict[str, float], expected: tuple[str, int, float]) -> None:
    model = nn.Sequential(small())
    before = settings(model)
    with set_test_time_compute(model, **options):  # type: ignore[arg-type]
        assert settings(model) == [expected] * 2
    assert settings(model) == before


def test_a_call_without_with_stays_until_restored() -> None:
    model = small()
    before = settings(model)
    undo = set_test_time_compute(model, steps=3)
    assert settings(model) == [("cg", 3, 0.0)] * 2
    undo.restore()
    assert settings(model) == before


def test_blocks_nest() -> None:
    model = small()
    with set_test_time_compute(model, steps=7):
        with set_test_time_compute(model, eps=1e-2):
            assert settings(model) == [("cg", 7, 1e-2)] * 2
        assert settings(model) == [("cg", 7, 0.0)] * 2


def test_an_exception_restores_too() -> None:
    model = small()
    before = settings(model)
    with pytest.raises(RuntimeError, match="stop"), set_test_time_compute(model, steps=3):
        raise RuntimeError("stop")
    assert settings(model) == before


def test_more_compute_is_closer_to_the_exact_solution() -> None:
    model = small()
    tokens = torch.randint(13, (2, 40), generator=torch_generator(0, "tokens"))
    exact = model(tokens)[0].detach()

    def error(**options: float) -> float:
        with set_test_time_compute(model, **options):  # type: ignore[arg-type]
            return float((model(tokens)[0].detach() - exact).abs().max())

    errors = [error(steps=steps) for steps in (0, 2, 8)]
    assert errors[0] > errors[1] > errors[2]
    assert error(steps=8) < 1e-6  # as many steps as dimensions
    assert error(eps=1e-1) > error(eps=1e-3) > error(eps=1e-6)
    assert torch.equal(model(tokens)[0], exact)


@pytest.mark.parametrize(
    "options", [{}, {"eps": 0.0}, {"eps": 2.0}, {"eps": "a"}, {"steps": -1}, {"steps": 1.5}, {"steps": True}]
)
def test_bad_settings_change_nothing(options: dict[str, object]) -> None:
    model = small()
    before = settings(model)
    with pytest.raises(InputError, match=r"eps|steps"):
        set_test_time_compute(model, **options)  # type: ignore[arg-type]
    assert settings(model) == before


def test_a_model_without_mesa_layers_is_refused() -> None:
    with pytest.raises(InputError, match="at least one MesaLayer"):
        set_test_time_compute(nn.Linear(2, 2), steps=3)
