"""What the exact layer costs: its solvers, conjugate gradients, and the floors, in turns in one process.

One row is one contender at one size: microseconds a token and head, how many times less than the best CG-30 (the ratio
of each turn; smallest, median, largest over the turns), and the error of its outputs against float64.  Time is CPU time
of the thread with one thread, wall time with more.  The floors, softmax attention and gated linear attention, answer
another question and have no error.

    operations a token and head:   Cholesky, two substitutions, update of H    D^3 / 3 + 2 D^2 + D^2
                                   one CG step, chunk C                        2 D^2 + 4 C D
                                   gated linear attention, chunk C             4 D^2 + 4 C D

Gates: *benign*, gamma about .99, keys isotropic; *mixed*, heads with gamma about .9975, .989, .95 and .69, as heads of
trained models differ (arXiv 2506.05233, section 5), and keys whose i-th direction has variance 1/i.  Lambda = .25, the
published floor.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize, scaled_dot_product_attention

from commissure.core.rng import torch_generator
from commissure.mesa.rivals import best_cg, literal_cg, literal_token_cg, token_cg
from commissure.native.mesa import mesa_solve
from commissure.nn.linear_attention import gated_linear_attention
from commissure.nn.mesa import MesaState, Options, attend_mesa, mesa_attention
from commissure.nn.mesa_reference import mesa_attention_reference
from commissure.nn.mesa_solvers import CGOptions

__all__ = [
    "CONTENDERS",
    "FLOORS",
    "OURS",
    "RIVAL",
    "DecodeRow",
    "Inputs",
    "KernelRow",
    "LayerRow",
    "Range",
    "alternate",
    "bench_decode",
    "bench_kernel",
    "bench_layer",
    "bench_tables",
    "break_even",
    "draw",
    "operations",
    "print_tables",
]

Gates = Literal["benign", "mixed"]
OURS, RIVAL = "Cholesky kernel", "best CG-30"
TAIL = 64  # last tokens, where H is worst conditioned, that errors are measured on
TWO_THREADS = ((2048, 64), (2048, 128))  # (time, dim) also timed with two threads
_LOGITS = (6.0, 4.5, 3.0, 0.8)


class Inputs(NamedTuple):
    """What a layer is given; see `mesa_attention`."""

    q: Float[Tensor, "batch time heads dim"]
    k: Float[Tensor, "batch time heads dim"]
    v: Float[Tensor, "batch time heads dim"]
    g: Float[Tensor, "batch time heads"]
    beta: Float[Tensor, "batch time heads"]
    lamb: Float[Tensor, "heads dim"]


@dataclass(frozen=True)
class Range:
    """Smallest, median and largest over the turns."""

    low: float
    median: float
    high: float


@dataclass(frozen=True)
class LayerRow:
    """One contender at one size; `gain` is the best CG-30's time over its own."""

    contender: str
    gates: str
    batch: int
    time: int
    dim: int
    threads: int
    backward: bool
    us_a_token: float
    gain: Range
    error: float


@dataclass(frozen=True)
class DecodeRow:
    """One new token: microseconds of the layer, the best CG-30 loop and the literal one; all make output and states.

    `gain` is the best loop's time over the layer's.
    """

    batch: int
    heads: int
    dim: int
    mesa_us: float
    cg_us: float
    literal_us: float
    gain: Range


@dataclass(frozen=True)
class KernelRow:
    """The kernel's rate by the count of operations above, and its share of the rate of sgemm(256) in the same turns."""

    dim: int
    us_a_token: float
    gflops: float
    sgemm_gflops: float
    share: Range


CONTENDERS: dict[str, Callable[[Inputs], Tensor]] = {
    OURS: lambda x: mesa_attention(*x, solver="cholesky").output,
    "hybrid": lambda x: mesa_attention(*x, solver="block_rls").output,
    RIVAL: lambda x: best_cg(*x),
    "CG to 1e-4": lambda x: mesa_attention(*x, solver="cg", cg_eps=1e-4, max_cg_steps=200).output,
    "literal CG-30": lambda x: literal_cg(*x),
    "attention": lambda x: _attention(x.q, x.k, x.v),
    "gated linear attention": lambda x: gated_linear_attention(x.q, x.k, x.v, x.g, x.beta)[0],
}
FLOORS = ("attention", "gated linear attention")


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def operations(dim: int) -> float:
    """Floating-point operations a token and head of the Cholesky kernel.

    >>> operations(64)
    99669.33333333333
    """
    return dim**3 / 3 + 2 * dim**2 + dim**2


def draw(seed: int, *, batch: int, time: int, dim: int, heads: int = 4, gates: Gates = "benign") -> Inputs:
    """Random inputs, float32."""
    rng = torch_generator(seed, "bench", gates, batch, time, heads, dim)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng)

    spread = torch.arange(1.0, dim + 1) ** (-0.5 if gates == "mixed" else 0.0)
    q, k = (normalize(normal(batch, time, heads, dim) * spread, dim=-1) for _ in range(2))
    logits = torch.tensor(_LOGITS).repeat(heads // len(_LOGITS) + 1)[:heads] if gates == "mixed" else torch.tensor(4.6)
    g = torch.nn.functional.logsigmoid(logits + 0.1 * normal(batch, time, heads))
    beta = torch.sigmoid(1 + normal(batch, time, heads))
    return Inputs(q, k, normal(batch, time, heads, dim), g, beta, torch.full((heads, dim), 0.25))


def alternate(
    contenders: Sequence[Callable[[], object]],
    *,
    repeats: int,
    warmup: int = 1,
    clock: Callable[[], float] = time.thread_time,
) -> Float[np.ndarray, "contenders repeats"]:
    """Seconds of each contender, called in turn `repeats` times after `warmup` rounds that are not counted."""
    spent = np.empty((len(contenders), repeats))
    for turn in range(-warmup, repeats):
        for number, contender in enumerate(contenders):
            start = clock()
            contender()
            if turn >= 0:
                spent[number, turn] = clock() - start
    return spent


def spread(values: Float[np.ndarray, " turns"]) -> Range:
    """Range of a ratio over the turns."""
    return Range(float(values.min()), float(np.median(values)), float(values.max()))


def bench_layer(
    *,
    batch: int,
    time: int,
    dim: int,
    heads: int = 4,
    gates: Gates = "benign",
    backward: bool = False,
    names: Iterable[str] = CONTENDERS,
    threads: int = 1,
    repeats: int = 5,
    seed: int = 0,
) -> list[LayerRow]:
    """The contenders `names` (the best CG-30 always among them) on the same inputs."""
    inputs = draw(seed, batch=batch, time=time, dim=dim, heads=heads, gates=gates)
    chosen = {name: CONTENDERS[name] for name in dict.fromkeys((RIVAL, *names))}
    leaves = Inputs(*(x.clone().requires_grad_() for x in inputs))
    probe = torch.randn(inputs.v.shape, generator=torch_generator(seed, "probe"))

    def forward(contender: Callable[[Inputs], Tensor]) -> Tensor:
        with torch.inference_mode():
            return contender(inputs)

    def train(contender: Callable[[Inputs], Tensor]) -> None:
        for leaf in leaves:
            leaf.grad = None
        contender(leaves).backward(probe)

    run = train if backward else forward
    with _Threads(threads):
        exact = reference_tail(inputs)
        found = (forward(contender)[:, -TAIL:] for contender in chosen.values())  # the first round
        errors = [np.nan if n in FLOORS else relative(o, exact) for n, o in zip(chosen, found, strict=True)]
        spent = alternate(
            [lambda contender=contender: run(contender) for contender in chosen.values()],
            repeats=repeats,
            warmup=int(backward),
            clock=time_of(threads),
        )
    micro = 1e6 / (batch * time * heads)
    return [
        LayerRow(name, gates, batch, time, dim, threads, backward, micro * float(np.median(own)),
                 spread(spent[0] / own), float(error))
        for name, own, error in zip(chosen, spent, errors, strict=True)
    ]  # fmt: skip


def time_of(threads: int) -> Callable[[], float]:
    """The clock: CPU time of this thread, wall time where others help."""
    return time.thread_time if threads == 1 else time.perf_counter


class _Threads:
    """Use `threads` threads inside the block."""

    def __init__(self, threads: int) -> None:
        self.threads, self.before = threads, torch.get_num_threads()

    def __enter__(self) -> None:
        torch.set_num_threads(self.threads)

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self.before)


@torch.no_grad()
def reference_tail(inputs: Inputs, *, tail: int = TAIL) -> Float[Tensor, "batch tail heads dim"]:
    """The last outputs in float64: states by one weighted sum over everything before, then dense solves."""
    q, k, v, g, beta, lamb = (x.double() for x in inputs)
    start = max(0, q.shape[1] - tail)
    weight = beta[:, :start] * (g[:, :start].sum(1, keepdim=True) - g[:, :start].cumsum(1)).exp()
    state = MesaState(*(torch.einsum("bth,bthd,bthe->bhde", weight, k[:, :start], x[:, :start]) for x in (k, v)))
    q, k, v, g, beta = (x[:, start:] for x in (q, k, v, g, beta))
    return mesa_attention_reference(q, k, v, g, beta, lamb, initial_state=state).output


def relative(o: Tensor, exact: Tensor) -> float:
    """max |o - exact| / max |exact|."""
    return float((o.double() - exact).abs().max() / exact.abs().max())


@torch.no_grad()
def bench_decode(*, batch: int, heads: int, dim: int, repeats: int = 40, seed: int = 0) -> DecodeRow:
    """One token after 128 others: what a step of the layer runs, without checks, and loops of 30 CG steps."""
    prefix, token = (draw(s, batch=batch, time=n, dim=dim, heads=heads) for s, n in ((seed, 128), (seed + 1, 1)))
    state = mesa_attention(*prefix).state
    options = Options("cholesky", "cholesky", CGOptions())

    with _Threads(1):
        ours, loop = alternate(
            (lambda: attend_mesa(*token, state, options), lambda: token_cg(*token, *state)), repeats=repeats
        )
        # Not in turns with the others: what it allocates empties the caches for them.
        literal = alternate((lambda: literal_token_cg(*token, *state),), repeats=1 + repeats // 4)
    mesa_us, cg_us, literal_us = (1e6 * float(np.median(spent)) for spent in (ours, loop, literal))
    return DecodeRow(batch, heads, dim, mesa_us, cg_us, literal_us, spread(loop / ours))


@torch.no_grad()
def bench_kernel(*, dim: int, time: int = 2048, repeats: int = 5, seed: int = 0) -> KernelRow:
    """The kernel alone, one thread, beside products of 256 x 256 matrices."""
    q, k, _, g, beta, lamb = draw(seed, batch=1, time=time, dim=dim)
    first = torch.zeros(1, q.shape[2], dim, dim)
    a, b = (torch.randn(256, 256, generator=torch_generator(seed, "sgemm", i)) for i in range(2))
    out, products = torch.empty(256, 256), 40

    def sgemm() -> None:
        for _ in range(products):
            torch.mm(a, b, out=out)

    with _Threads(1):
        own, other = alternate((lambda: mesa_solve(q, k, g, beta, lamb, first), sgemm), repeats=repeats)
    tokens = time * q.shape[2]
    rate, best = 1e-9 * tokens * operations(dim) / own, 1e-9 * products * 2 * 256**3 / other
    micro = 1e6 * float(np.median(own)) / tokens
    return KernelRow(dim, micro, float(np.median(rate)), float(np.median(best)), spread(rate / best))


def bench_tables(*, quick: bool = True, repeats: int = 3) -> dict[str, list[Any]]:
    """All tables, by title; `quick` takes under a minute, otherwise every size of the grid is timed."""
    tables: dict[str, list[Any]] = {}
    tables["kernel beside sgemm(256)"] = [bench_kernel(dim=dim, repeats=repeats + 2) for dim in (32, 64, 128)]
    sizes = ((1, 8, 128), (1, 6, 64), (8, 8, 128))
    tables["decoding one token"] = [bench_decode(batch=b, heads=h, dim=d) for b, h, d in sizes]
    for backward in (False, True):
        for gates, batch, length, dim in _grid(quick):
            names = [n for n in CONTENDERS if n != "literal CG-30" or (batch * length <= 512 and dim <= 64)]
            size: Any = {"batch": batch, "time": length, "dim": dim, "gates": gates}
            rows = bench_layer(**size, names=names, backward=backward, repeats=repeats)
            tables[_title(rows[0])] = rows
    for length, dim in TWO_THREADS:
        exact = (OURS, "hybrid", RIVAL)
        rows = bench_layer(batch=1, time=length, dim=dim, names=exact, threads=2, repeats=repeats)
        tables[_title(rows[0])] = rows
    return tables


def _title(row: LayerRow) -> str:
    kind = "forward and backward" if row.backward else "forward"
    clock = "1 thread" if row.threads == 1 else f"{row.threads} threads, wall time"
    return f"{kind}, {row.gates} gates, batch {row.batch}, time {row.time}, dim {row.dim}, {clock}"


def _grid(quick: bool) -> list[tuple[Gates, int, int, int]]:
    if quick:
        return [("benign", 1, 512, 32), ("benign", 1, 512, 64), ("benign", 1, 512, 128), ("mixed", 1, 512, 64)]
    cases: list[tuple[Gates, int, int, int]] = []
    for gates in ("benign", "mixed"):
        cases += [(gates, b, t, d) for b in (1, 4) for t in (512, 2048, 4096) for d in (32, 64, 128)]
    return cases


def break_even(rows: Sequence[LayerRow]) -> list[str]:
    """The sizes where a contender that solves the same problem is faster than the Cholesky kernel, in words."""
    own = {_title(row): row.us_a_token for row in rows if row.contender == OURS}
    return [
        f"{row.contender} is {own[_title(row)] / row.us_a_token:.2f}x as fast as the {OURS}: {_title(row)}"
        for row in rows
        if row.contender not in FLOORS and row.us_a_token < own.get(_title(row), 0.0)
    ]


def print_tables(tables: dict[str, list[Any]]) -> None:
    """Print the tables to stdout, then the sizes where the kernel loses."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for title, rows in tables.items():
        names = [field.name for field in fields(rows[0])]
        if isinstance(rows[0], LayerRow):  # the title says the rest
            names = ["contender", "us_a_token", "gain", "error"]
        table = Table(*names, title=title, title_justify="left")
        for row in rows:
            table.add_row(*(_cell(getattr(row, name)) for name in names))
        console.print(table)
    layers = [row for rows in tables.values() for row in rows if isinstance(row, LayerRow)]
    for line in break_even(layers) or [f"The {OURS} loses at none of these sizes."]:
        console.print(line)


def _cell(value: Any) -> str:
    if isinstance(value, Range):
        low, median, high = astuple(value)
        return f"{median:.2f} ({low:.2f}-{high:.2f})"
    if isinstance(value, float):
        return "" if np.isnan(value) else f"{value:.3g}"
    return str(value)
