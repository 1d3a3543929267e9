"""The rivals solve the same systems: against textbook conjugate gradients and dense solves, token by token, float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from commissure.mesa.rivals import best_cg, best_cg_solve, literal_cg, literal_token_cg, token_cg


class Case(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    lamb: Tensor


def case(time: int, *, batch: int = 2, heads: int = 3, dim: int = 6, value_dim: int = 4, seed: int = 0) -> Case:
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    q, k = (normalize(normal(batch, time, heads, dim), dim=-1) for _ in range(2))
    g = -0.3 * normal(batch, time, heads).abs()
    beta = torch.sigmoid(normal(batch, time, heads))
    return Case(q, k, normal(batch, time, heads, value_dim), g, beta, 0.25 + normal(heads, dim).abs())


def systems(x: Case) -> tuple[Tensor, Tensor]:
    """H_t + Lambda and the sum of k v^T after every token, from the definition."""
    matrices, memories = [], []
    h_kk = torch.zeros(*x.q.shape[:1], *x.q.shape[2:], x.q.shape[3], dtype=torch.float64)
    h_kv = torch.zeros(*x.q.shape[:1], *x.q.shape[2:], x.v.shape[3], dtype=torch.float64)
    for t in range(x.q.shape[1]):
        gamma, written = x.g[:, t, :, None, None].exp(), (x.beta[:, t, :, None] * x.k[:, t])[..., None]
        h_kk = gamma * h_kk + written * x.k[:, t, :, None]
        h_kv = gamma * h_kv + written * x.v[:, t, :, None]
        matrices.append(h_kk + torch.diag_embed(x.lamb))
        memories.append(h_kv)
    return torch.stack(matrices, 1), torch.stack(memories, 1)


def dense(x: Case) -> Tensor:
    matrices, memories = systems(x)
    return (memories.mT @ torch.linalg.solve(matrices, x.q[..., None]))[..., 0]


def textbook(x: Case, steps: int, *, added: float = 0.0, from_diagonal: bool = False) -> Tensor:
    """Conjugate gradients from zero, or q over the diagonal, on every dense system; `added` to both denominators."""
    matrices, memories = systems(x)
    solution = from_diagonal * x.q[..., None] / matrices.diagonal(dim1=-2, dim2=-1)[..., None]
    residual = direction = x.q[..., None] - matrices @ solution
    squared = (residual**2).sum(-2, keepdim=True)
    for _ in range(steps):
        product = matrices @ direction
        length = squared / ((direction * product).sum(-2, keepdim=True) + added)
        solution, residual = solution + length * direction, residual - length * product
        before, squared = squared, (residual**2).sum(-2, keepdim=True)
        direction = residual + squared / (before + added) * direction
    return (memories.mT @ solution)[..., 0]


@pytest.mark.parametrize("time", [1, 5, 16, 37, 96])
def test_best_cg_is_conjugate_gradients(time: int) -> None:
    x = case(time)
    for steps in (1, 3):
        torch.testing.assert_close(best_cg(*x, steps=steps), textbook(x, steps), rtol=0, atol=1e-12)
    torch.testing.assert_close(best_cg(*x), dense(x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("tile", [(8, 8), (16, 64), (64, 4096)], ids=str)
def test_tiles_change_no_result(tile: tuple[int, int]) -> None:
    x = case(75)
    solved = best_cg_solve(x.q, x.k, x.g, x.beta, x.lamb, steps=2, tile=tile)
    torch.testing.assert_close(solved, best_cg_solve(x.q, x.k, x.g, x.beta, x.lamb, steps=2), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dim", [32, 33, 128, 130])
def test_every_head_dim_has_a_tile(dim: int) -> None:
    x = case(3, batch=1, heads=1, dim=dim)
    torch.testing.assert_close(best_cg(*x, steps=2), textbook(x, 2), rtol=0, atol=1e-12)


def test_total_forgetting_and_empty_queries() -> None:
    x = case(40)
    x.g[:, 20] = -torch.inf
    x.q[:, 7] = 0
    assert (best_cg(*x)[:, 7] == 0).all()
    torch.testing.assert_close(best_cg(*x), dense(x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("power", [-30, 30])
def test_solutions_scale_with_the_right_hand_side(power: int) -> None:
    x = Case(*(t.float() for t in case(40)))
    scale = 10.0**power
    solved, scaled = (best_cg_solve(s * x.q, x.k, x.g, x.beta, x.lamb) for s in (1.0, scale))
    assert (scaled / scale - solved).abs().max() <= 1e-5 * solved.abs().max()


def test_literal_cg_is_the_unrolled_loop_with_its_constant() -> None:
    x = case(32)
    for steps in (1, 4, 30):
        expected = textbook(x, steps, added=1e-5)
        torch.testing.assert_close(literal_cg(*x, steps=steps, chunk_size=16), expected, rtol=0, atol=1e-11)


def test_the_constant_stops_the_convergence() -> None:
    x = case(64)
    exact = dense(x)
    literal, best = (float((o - exact).abs().max()) for o in (literal_cg(*x, steps=60), best_cg(*x, steps=60)))
    assert best < 1e-10
    assert literal > 1e-6


@pytest.mark.parametrize(("layer", "limit"), [(best_cg, 1e-9), (literal_cg, 5e-2)], ids=["best", "literal"])
def test_gradients_are_those_of_the_exact_layer(layer: Callable[..., Tensor], limit: float) -> None:
    leaves = [t.requires_grad_() for t in case(64)]
    probe = torch.randn(2, 64, 3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = torch.autograd.grad((dense(Case(*leaves)) * probe).sum(), leaves)
    found = torch.autograd.grad((layer(*leaves) * probe).sum(), leaves)
    for name, a, b in zip(Case._fields, found, expected, strict=True):
        assert (a - b).abs().max() <= limit * b.abs().max(), name


@pytest.mark.parametrize(
    ("decode", "loop", "limit"),
    [(token_cg, {}, 1e-10), (literal_token_cg, {"added": 1e-5, "from_diagonal": True}, 1e-3)],
    ids=["best", "literal"],
)
def test_decoding_loops_are_the_next_token(
    decode: Callable[..., tuple[Tensor, Tensor, Tensor]], loop: dict[str, Any], limit: float
) -> None:
    x = case(9)
    matrices, memories = systems(x)
    before = (matrices[:, 7] - torch.diag_embed(x.lamb), memories[:, 7])
    token = [t[:, 8:] for t in x[:5]]
    o, h_kk, h_kv = decode(*token, x.lamb, *before)
    torch.testing.assert_close(o, dense(x)[:, 8:], rtol=0, atol=limit)
    torch.testing.assert_close(h_kk + torch.diag_embed(x.lamb), matrices[:, 8], rtol=0, atol=1e-14)
    torch.testing.assert_close(h_kv, memories[:, 8], rtol=0, atol=1e-14)
    for steps in (0, 2, 5):
        expected = textbook(x, steps, **loop)[:, 8:]
        torch.testing.assert_close(decode(*token, x.lamb, *before, steps=steps)[0], expected, rtol=0, atol=1e-12)
