"""What each Mesa head of a model does with a text: how long it remembers, how ill-conditioned it is, what it costs.

    gamma_t, beta_t, Lambda        kappa = cond(H_T + Lambda)        dof_t = tr H_t (H_t + Lambda)^-1

Trained MesaNets have two kinds of heads: one or two a layer with gamma near 1, whose condition number and conjugate
gradient steps grow with the text, and the rest, which forget and stay cheap.  von Oswald et al., arXiv 2506.05233,
section 5, appendix O and figure 14.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from commissure.core.errors import InputError
from commissure.core.rng import torch_generator
from commissure.nn.mesa import MesaLayer, mesa_attention
from commissure.nn.padding import check_lengths, valid
from commissure.nn.stack import Stack

__all__ = ["MesaHead", "draw", "inspect", "open_model", "scored_lengths", "show"]

_MOST_NAMES = 8  # of layers below a figure, side by side


@dataclass(frozen=True)
class MesaHead:
    """One head; means and quantiles over tokens and texts, `condition_number` the median over texts at their end.

    `gamma_quantiles` are at 5, 50 and 95 %; `cg_steps` is the mean per token to the residual asked for;
    `effective_dof[i]`, at most head_dim, is the mean at the `positions[i]`-th token.
    """

    layer: str
    head: int
    gamma_mean: float
    gamma_quantiles: tuple[float, float, float]
    beta_mean: float
    lambda_min: float
    lambda_mean: float
    lambda_max: float
    condition_number: float
    cg_steps: float
    positions: tuple[int, ...]
    effective_dof: tuple[float, ...]


class Call(NamedTuple):
    """What a layer was called with."""

    x: Float[Tensor, "batch time dim"]
    state: Any


def inspect(
    model: nn.Module, tokens: Tensor, *, lengths: Int[Tensor, " batch"] | None = None, eps: float = 1e-4
) -> list[MesaHead]:
    """Run `model(tokens)` and look into every `MesaLayer` on the way: one row a head, layers in the model's order.

    `tokens` is whatever the model takes, `lengths` where each row's padding begins, which is not counted; `eps` the
    relative residual at which conjugate gradients stop.  Raises `InputError` for a model without Mesa layers and for an
    empty input.

    >>> layer = MesaLayer(8, heads=2, head_dim=4)
    >>> rows = inspect(layer, torch.ones(1, 5, 8))
    >>> [(row.head, row.lambda_mean, row.positions) for row in rows]
    [(0, 1.0, (1, 2, 4, 5)), (1, 1.0, (1, 2, 4, 5))]
    """
    if not 0 < eps < 1:
        raise InputError("eps", eps, "a number in (0, 1), relative to the first residual")
    if tokens.ndim < 2 or tokens.shape[0] < 1 or tokens.shape[1] < 1:
        raise InputError("tokens", tuple(tokens.shape), "shape (batch, time, ...), at least one token")
    if lengths is not None:
        check_lengths(lengths, *tokens.shape[:2])
        if not bool((lengths > 0).all()):
            raise InputError("lengths", int(lengths.min()), "lengths >= 1")
    with torch.no_grad():
        calls = _record(model, tokens)
        return [row for name, (layer, call) in calls.items() for row in _heads(name, layer, call, lengths, eps)]


def scored_lengths(mask: Bool[Tensor, "batch time"]) -> Int[Tensor, " batch"]:
    """Up to each row's last scored position; a row without one is taken whole.

    >>> scored_lengths(torch.tensor([[False, True, False], [False, False, False]])).tolist()
    [2, 3]
    """
    places = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    last = (mask * places).amax(1)
    return last.where(last > 0, mask.shape[1])


def show(
    source: str | Path | nn.Module,
    tokens: Int[Tensor, "batch time"] | None = None,
    *,
    eps: float = 1e-4,
    n_tokens: int = 256,
    n_texts: int = 4,
    seed: int = 0,
) -> list[MesaHead]:
    """`inspect` for a model or a checkpoint's path; without `tokens`, on texts drawn uniformly from the vocabulary."""
    model = source if isinstance(source, nn.Module) else open_model(source)
    if tokens is None:
        vocabs = [module.config.vocab for module in model.modules() if isinstance(module, Stack)]
        if not vocabs or vocabs[0] is None:
            raise InputError("tokens", None, "the model's input", "this model has no vocabulary to draw from")
        tokens = torch.randint(vocabs[0], (n_texts, n_tokens), generator=torch_generator(seed, "show"))
    return inspect(model, tokens, eps=eps)


def open_model(path: str | Path) -> nn.Module:
    """A file written by `Stack.save`, or a folder written by `save_pretrained` (needs the extra `hf`)."""
    if not Path(path).is_dir():
        return Stack.load(path)
    if not (Path(path) / "config.json").is_file():
        raise InputError("path", str(path), "a folder written by save_pretrained, with its config.json")
    from commissure.mesa.hf import MesaNetForCausalLM

    return MesaNetForCausalLM.from_pretrained(path).eval()


def draw(rows: list[MesaHead], figure: Any) -> None:
    """Five panels over all heads, layer after layer: gates, Lambda, condition number and conjugate gradient steps.

    `figure` is matplotlib's, empty, in whatever style the caller has set.  Points are means (gamma: medians; the
    condition number is one), bars the 5 to 95 % of the tokens for gamma and all dimensions for Lambda.  Forgetting is
    drawn as 1 - gamma, logarithmically, since what matters is how near 1 gamma is.
    """
    from matplotlib.ticker import LogFormatter

    x = list(range(len(rows)))
    first = [i for i in x if i == 0 or rows[i].layer != rows[i - 1].layer]
    forgotten = [[max(1 - quantile, 1e-6) for quantile in row.gamma_quantiles] for row in rows]
    panels: list[tuple[str, str, list[float], tuple[list[float], list[float]] | None]] = [
        ("forgetting\n1 - γ (per token)", "log", [f[1] for f in forgotten], _ends(forgotten)),
        ("writing β\n(mean)", "linear", [row.beta_mean for row in rows], None),
        (
            "penalty Λ\n(min, mean, max)",
            "log",
            [row.lambda_mean for row in rows],
            ([row.lambda_min for row in rows], [row.lambda_max for row in rows]),
        ),
        ("condition number\nof H + Λ", "log", [row.condition_number for row in rows], None),
        ("CG steps\n(mean per token)", "linear", [row.cg_steps for row in rows], None),
    ]
    all_axes = figure.subplots(len(panels), sharex=True)
    for axes, (label, scale, values, ends) in zip(all_axes, panels, strict=True):
        if ends is not None:
            axes.vlines(x, *ends, alpha=0.5)
        axes.plot(x, values, "o", markersize=4)
        axes.set(yscale=scale, ylabel=label, xlim=(-0.5, len(rows) - 0.5))
        if scale == "log":
            axes.yaxis.set_major_formatter(LogFormatter())
            axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))
        axes.margins(y=0.15)
        axes.grid(axis="y", alpha=0.3)
        for start in first[1:]:
            axes.axvline(start - 0.5, color="gray", linewidth=0.6)
    all_axes[1].set_ylim(-0.05, 1.05)
    all_axes[-1].set_ylim(bottom=0)
    centers = [(start + end - 1) / 2 for start, end in pairwise([*first, len(rows)])]
    thinned = slice(None, None, -(-len(first) // _MOST_NAMES))
    all_axes[-1].set_xticks(centers[thinned], [_short(rows[i].layer) for i in first][thinned])
    all_axes[-1].set_xlabel("heads, in their order within each layer")
    figure.align_ylabels()


def _ends(quantiles: list[list[float]]) -> tuple[list[float], list[float]]:
    return [q[-1] for q in quantiles], [q[0] for q in quantiles]


def _short(layer: str) -> str:
    """The number of the block, where a layer's name has one.

    >>> _short("model.stack.blocks.3.mixer"), _short("recall")
    ('block 3', 'recall')
    """
    numbers = [part for part in layer.split(".") if part.isdigit()]
    return f"block {numbers[-1]}" if numbers else layer


def _record(model: nn.Module, tokens: Tensor) -> dict[str, tuple[MesaLayer, Call]]:
    """The input of every Mesa layer while the model runs once."""
    calls: dict[str, tuple[MesaLayer, Call]] = {}

    def recorder(name: str) -> Any:
        def hook(layer: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
            assert isinstance(layer, MesaLayer)
            state = arguments[1] if len(arguments) > 1 else options.get("state")
            calls[name] = (layer, Call(arguments[0], state))

        return hook

    layers = {name: module for name, module in model.named_modules() if isinstance(module, MesaLayer)}
    if not layers:
        raise InputError("model", type(model).__name__, "a module with at least one MesaLayer inside")
    handles = [layer.register_forward_pre_hook(recorder(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        model(tokens)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _heads(
    name: str, layer: MesaLayer, call: Call, lengths: Int[Tensor, " batch"] | None, eps: float
) -> list[MesaHead]:
    """The rows of one layer; the solver's own settings do not matter here."""
    q, k, v, g, beta, lamb, _ = layer.project(call.x, call.state, lengths)
    memory = None if call.state is None else call.state.memory
    steps = 10 * q.shape[-1]  # rounding may need more than the D steps of exact arithmetic
    found = mesa_attention(
        q, k, v, g, beta, lamb, initial_state=memory, solver="cg", cg_eps=eps, max_cg_steps=steps, return_info=True
    )
    assert found.info is not None
    real = torch.ones(q.shape[:2], dtype=torch.bool) if lengths is None else valid(lengths, q.shape[1])
    real = real.to(q.device)
    gamma = g.double().exp()[real]
    levels = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64, device=g.device)
    quantiles = gamma.quantile(levels, dim=0)
    spectrum = torch.linalg.eigvalsh(found.state.h_kk.double() + lamb.double().diag_embed())
    conditions = (spectrum[..., -1] / spectrum[..., 0]).quantile(0.5, dim=0)
    positions = _positions(int(real.sum(1).max()))
    dof = [found.info.dof[real[:, position - 1], position - 1].double().mean(0) for position in positions]
    return [
        MesaHead(
            layer=name,
            head=head,
            gamma_mean=float(gamma[:, head].mean()),
            gamma_quantiles=(float(quantiles[0, head]), float(quantiles[1, head]), float(quantiles[2, head])),
            beta_mean=float(beta[..., head][real].double().mean()),
            lambda_min=float(lamb[head].min()),
            lambda_mean=float(lamb[head].double().mean()),
            lambda_max=float(lamb[head].max()),
            condition_number=float(conditions[head]),
            cg_steps=float(found.info.cg_steps[..., head][real].double().mean()),
            positions=positions,
            effective_dof=tuple(float(mean[head]) for mean in dof),
        )
        for head in range(q.shape[2])
    ]


def _positions(time: int) -> tuple[int, ...]:
    """1, 2, 4, ... and the last.

    >>> _positions(5)
    (1, 2, 4, 5)
    """
    powers = [1 << exponent for exponent in range(time.bit_length()) if 1 << exponent < time]
    return (*powers, time)
