"""Looking inside Mesa heads: every number against its definition, computed densely."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from commissure.core.errors import InputError
from commissure.core.rng import isolated, torch_generator
from commissure.mesa import MesaLayer, MesaNetConfig, build_stack, inspect
from commissure.mesa.show import draw, open_model, show
from commissure.nn.stack import Stack

VOCAB = 13


def small(**changes: object) -> Stack:
    fields = {"vocab": VOCAB, "dim": 16, "blocks": 4, "heads": 2, "head_dim": 6, "hybrid": "hawk", **changes}
    with isolated(0, "model"):
        return build_stack(MesaNetConfig(**fields)).double()


def texts(batch: int = 3, time: int = 20) -> Tensor:
    return torch.randint(VOCAB, (batch, time), generator=torch_generator(0, "texts"))


def test_one_row_a_head_in_the_models_order() -> None:
    rows = inspect(nn.Sequential(small()), texts())
    assert [(row.layer, row.head) for row in rows] == [
        ("0.blocks.1.mixer", 0), ("0.blocks.1.mixer", 1), ("0.blocks.3.mixer", 0), ("0.blocks.3.mixer", 1),
    ]  # fmt: skip


def test_every_number_is_its_definition() -> None:
    layer = MesaLayer(8, heads=2, head_dim=5).double()
    with torch.no_grad():
        layer.a_proj.weight.mul_(3)
        layer.lambda_params.add_(torch.linspace(-2, 2, 10))
    x = torch.randn(3, 17, 8, generator=torch_generator(0, "x"), dtype=torch.float64)
    rows = inspect(layer, x, eps=1e-6)
    q, k, _, g, beta, lamb, _ = (part.detach() if isinstance(part, Tensor) else part for part in layer.project(x, None))
    for h, row in enumerate(rows):
        gamma = g[..., h].exp()
        assert row.gamma_mean == pytest.approx(float(gamma.mean()))
        assert row.gamma_quantiles == pytest.approx([float(gamma.quantile(level)) for level in (0.05, 0.5, 0.95)])
        assert row.beta_mean == pytest.approx(float(beta[..., h].mean()))
        assert (row.lambda_min, row.lambda_mean, row.lambda_max) == pytest.approx(
            (float(lamb[h].min()), float(lamb[h].mean()), float(lamb[h].max()))
        )
        assert row.positions == (1, 2, 4, 8, 16, 17)
        conditions, dof, steps = [], torch.zeros(17), []
        for b in range(3):
            h_kk = torch.zeros(5, 5, dtype=torch.float64)
            for t in range(17):
                h_kk = gamma[b, t] * h_kk + beta[b, t, h] * torch.outer(k[b, t, h], k[b, t, h])
                a = h_kk + lamb[h].diag()
                dof[t] += torch.linalg.solve(a, h_kk).trace() / 3
                steps.append(conjugate_gradient_steps(a, q[b, t, h], 1e-6))
            conditions.append(float(torch.linalg.cond(a)))
        assert row.condition_number == pytest.approx(sorted(conditions)[1])
        assert row.effective_dof == pytest.approx([float(dof[t - 1]) for t in row.positions], rel=1e-5)
        assert row.cg_steps == pytest.approx(sum(steps) / len(steps))


def conjugate_gradient_steps(a: Tensor, q: Tensor, eps: float) -> int:
    """Steps of the textbook iteration from q / diag(a) until the residual has fallen by `eps`."""
    x = q / a.diagonal()
    r = q - a @ x
    p, first = r, r.norm()
    for step in range(100):
        if r.norm() <= eps * first:
            return step
        alpha = (r @ r) / (p @ a @ p)
        x, after = x + alpha * p, r - alpha * (a @ p)
        p, r = after + (after @ after) / (r @ r) * p, after
    raise AssertionError("no convergence")


def test_remembering_costs_more() -> None:
    """Heads with gamma near 1 have larger condition numbers, more degrees of freedom and need more steps."""
    torch.manual_seed(0)
    layer = MesaLayer(8, heads=2, head_dim=8, forget_cap=None).double()
    with torch.no_grad():
        layer.a_proj.bias.copy_(torch.tensor([-1.0, 20.0]))
    x = torch.randn(2, 200, 8, generator=torch_generator(0, "x"), dtype=torch.float64)
    forgets, remembers = inspect(layer, x)
    assert remembers.gamma_mean > 0.999 > forgets.gamma_mean
    assert remembers.condition_number > 2 * forgets.condition_number
    assert remembers.effective_dof[-1] > 2 * forgets.effective_dof[-1]
    assert remembers.cg_steps > forgets.cg_steps
    assert list(remembers.effective_dof) == sorted(remembers.effective_dof)


def test_a_start_vector_counts_as_past() -> None:
    stack = Stack([lambda dim: MesaLayer(dim, heads=2, head_dim=4)], 8, vocab=VOCAB).double().requires_grad_(False)
    block = stack.blocks[0]
    both = torch.cat([stack.start[None, None], stack.embed(texts(1, 1))], 1)
    expected = [row.effective_dof[1] for row in inspect(block.mixer, block.norm(both))]
    assert [row.effective_dof[0] for row in inspect(stack, texts(1, 1))] == pytest.approx(expected)


def test_the_model_is_left_as_it_was() -> None:
    model = small(solver="cg", max_cg_steps=3)
    before = model(texts())[0]
    inspect(model, texts(), eps=1e-5)
    assert torch.equal(model(texts())[0], before)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_checkpoints_of_both_kinds_are_shown(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from commissure.mesa import MesaNetForCausalLM

    sizes = {"vocab": VOCAB, "dim": 16, "blocks": 2, "heads": 2, "head_dim": 6}
    model = MesaNetForCausalLM(MesaNetConfig(**sizes))
    model.save_pretrained(tmp_path / "folder")
    assert show(tmp_path / "folder", n_tokens=9) == show(model, n_tokens=9)
    named = Stack(["mesa", "gru"], 16, vocab=VOCAB, heads=2)
    named.save(tmp_path / "file.safetensors")
    rows = show(tmp_path / "file.safetensors", n_tokens=9, n_texts=2)
    assert rows == show(named, n_tokens=9, n_texts=2)
    assert rows != show(named, n_tokens=9, n_texts=2, seed=1)
    assert rows == show(named, torch.randint(VOCAB, (2, 9), generator=torch_generator(0, "show")))


def test_every_number_of_every_head_is_drawn() -> None:
    from matplotlib.figure import Figure

    figure = Figure()
    rows = inspect(small(), texts())
    draw(rows, figure)
    expected = {
        "1 - γ": [1 - row.gamma_quantiles[1] for row in rows],
        "β": [row.beta_mean for row in rows],
        "Λ\n(min, mean, max)": [row.lambda_mean for row in rows],
        "condition number": [row.condition_number for row in rows],
        "CG steps": [row.cg_steps for row in rows],
    }
    assert len(figure.axes) == len(expected)
    for axes, (name, values) in zip(figure.axes, expected.items(), strict=True):
        assert name in axes.get_ylabel()
        points = axes.lines[0]
        assert list(points.get_xdata()) == [0, 1, 2, 3]
        assert list(points.get_ydata()) == pytest.approx(values)
        low, high = axes.get_ylim()
        assert low <= min(values) <= max(values) <= high
    spans = [[tuple(end[1] for end in bar) for bar in figure.axes[i].collections[0].get_segments()] for i in (0, 2)]
    for row, forgotten, penalty in zip(rows, *spans, strict=True):
        assert forgotten == pytest.approx((1 - row.gamma_quantiles[2], 1 - row.gamma_quantiles[0]))
        assert penalty == pytest.approx((row.lambda_min, row.lambda_max))
    assert [text.get_text() for text in figure.axes[-1].get_xticklabels()] == ["block 1", "block 3"]


def test_many_layers_keep_their_names_apart() -> None:
    from matplotlib.figure import Figure

    row = inspect(small(), texts())[0]
    figure = Figure()
    draw([replace(row, layer=f"blocks.{i // 2}.mixer", head=i % 2) for i in range(48)], figure)
    names = [text.get_text() for text in figure.axes[-1].get_xticklabels()]
    assert names == [f"block {i}" for i in range(0, 24, 3)]


def test_bad_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least one MesaLayer"):
        inspect(Stack(["gru"], 8, vocab=VOCAB), texts())
    with pytest.raises(InputError, match="eps = 1"):
        inspect(small(), texts(), eps=1.0)
    with pytest.raises(InputError, match="tokens"):
        inspect(small(), texts(1, 0))
    with pytest.raises(InputError, match="no vocabulary"):
        show(MesaLayer(8))
    with pytest.raises(InputError, match=r"config\.json"):
        open_model(tmp_path)
    with pytest.raises(InputError, match="existing file"):
        open_model(tmp_path / "nothing")


def test_padding_is_not_counted() -> None:
    model, tokens = small(), texts(2)
    short = tokens.clone()
    short[:, 9:] = 0
    lengths = torch.tensor([9, 9])
    padded, cut = inspect(model, short, lengths=lengths), inspect(model, short[:, :9])
    for row, expected in zip(padded, cut, strict=True):
        assert row.positions == expected.positions
        for field in ("gamma_mean", "gamma_quantiles", "beta_mean", "condition_number", "cg_steps", "effective_dof"):
            assert getattr(row, field) == pytest.approx(getattr(expected, field)), field
    with pytest.raises(InputError, match="lengths"):
        inspect(model, short, lengths=torch.tensor([0, 9]))
