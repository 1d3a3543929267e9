"""Contract 6, the claim: a statement of a paper, a gate written before the run, and the module that measures it.

`CLAIMS` is the table; every published number of this library comes from it.  A claim's module has
`run(ctx: Context) -> Outcome`; it takes its sizes from `ctx.budget`, reports through `ctx.progress` and judges its rows
with `ctx.judge`, which never passes on too few seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from commissure.core.errors import InputError
from commissure.report.results import Bound, Budget, Row, Verdict

__all__ = ["CLAIMS", "FLOOR", "Bound", "Budget", "Claim", "Context", "Cost", "Outcome", "Row", "Verdict"]


@dataclass(frozen=True)
class Cost:
    """CPU seconds a claim takes at each budget; 0 where it is not run at that budget."""

    smoke: float
    quick: float
    full: float

    def at(self, budget: Budget) -> float:
        return {"smoke": self.smoke, "quick": self.quick, "full": self.full}[budget]


@dataclass(frozen=True)
class Claim:
    """One line of the table; `quoted` is the paper's number as text, `exclusive` claims are timed alone.

    >>> Claim("toy.sum", "arithmetic", "1 + 1 = 2", "2", (Bound("sum", at_most=2),), Cost(1, 1, 1), "toy").min_seeds
    3
    """

    id: str
    paper: str
    statement: str
    quoted: str
    gate: tuple[Bound, ...]
    cost: Cost
    module: str
    min_seeds: int = 3
    exclusive: bool = False

    def __post_init__(self) -> None:
        if not self.gate:
            raise InputError(f"{self.id}.gate", self.gate, "at least one Bound, fixed before the run")
        if self.min_seeds < 1:
            raise InputError(f"{self.id}.min_seeds", self.min_seeds, "an integer >= 1")

    def judge(self, rows: Sequence[Row], n_seeds: int) -> Verdict:
        """PASS when every bound of the gate is met, else MISS; NOT CLAIMED below `min_seeds`.

        A row the gate needs and, from `min_seeds` on, the end of an interval it needs must be there: `InputError`.
        """
        found = {row.key: row for row in rows}
        missing = [bound.key for bound in self.gate if bound.key not in found]
        if missing:
            raise InputError(f"{self.id}.rows", sorted(found), f"rows for the keys of its gate, {missing} are missing")
        if n_seeds < self.min_seeds:
            return "NOT CLAIMED"
        for bound in self.gate:
            if bound.of(found[bound.key]) is None:
                raise InputError(f"{bound.key}.{bound.side}", None, "a number, the gate is on this end of the interval")
        return "PASS" if all(bound.is_met(found[bound.key]) for bound in self.gate) else "MISS"


@dataclass(frozen=True)
class Outcome:
    """What a claim's module returns; `figure` is inline SVG, `data` says what was measured on."""

    rows: tuple[Row, ...]
    verdict: Verdict
    figure: str | None = None
    n_seeds: int = 0
    note: str = ""
    data: str = ""

    def __post_init__(self) -> None:
        keys = [row.key for row in self.rows]
        if len(set(keys)) < len(keys):
            raise InputError("rows", keys, "rows with different keys")


def _silent(fraction: float, text: str) -> None:
    """Progress for nobody."""


@dataclass(frozen=True)
class Context:
    """What a claim's module is given: how much to spend, its own claim, and whom to tell how far it is."""

    budget: Budget
    claim: Claim
    progress: Callable[[float, str], None] = field(default=_silent)

    def judge(self, rows: Sequence[Row], n_seeds: int) -> Verdict:
        """The claim's verdict on these rows; see `Claim.judge`."""
        return self.claim.judge(rows, n_seeds)


_POSSM = "POSSM (arXiv 2506.05320)"
_MESA = "MesaNet (arXiv 2506.05233)"
_METAHMM = "MetaHMM (arXiv 2506.16288)"
_GEOMETRY = "Representation geometry of language models (arXiv 2509.23024)"
_RESERVOIRS = "Hierarchical modular reservoirs (bioRxiv 2025.06.20.660760)"

FLOOR = {1: 1.70, 2: 0.97, 5: 0.39, 10: 0.18, 20: 0.075, 50: 0.025, 200: 0.005}  # nats, measured by a prototype

CLAIMS: tuple[Claim, ...] = (
    Claim(
        id="bridges.least_squares",
        paper="this library",
        statement="Ridge regression, a Gaussian process with a linear kernel, recursive least squares and a static "
        "Kalman filter give one answer, and sum s/(s+lambda) is the trace of the hat matrix.",
        quoted="exact identities",
        gate=(Bound("worst", at_most=1e-10),),
        cost=Cost(smoke=2, quick=5, full=20),
        module="commissure.experiments.bridges_least_squares",
    ),
    Claim(
        id="decode.latency",
        paper=_POSSM,
        statement="A chunk of spikes is decoded by the C++ engine in a small fraction of the time that eager torch or "
        "re-running a window takes, and stays as fast after ten minutes.",
        quoted="2.44 ms/chunk on an EPYC 7502 CPU",
        gate=(
            Bound("eager_over_cpp", at_least=12),
            Bound("window_over_cpp", at_least=200),
            Bound("p99_cpu_ms", at_most=0.5),
            Bound("drift", at_most=1.2),
        ),
        cost=Cost(smoke=5, quick=20, full=120),
        module="commissure.experiments.decode_latency",
        exclusive=True,
    ),
    Claim(
        id="decode.accuracy",
        paper=_POSSM,
        statement="On three real recordings of reaching monkeys, POSSM decodes hand velocity better than a tuned "
        "Wiener filter and no worse than a well-regularized binned GRU.",
        quoted="R² .9549 (center-out, C-CO16; other data)",
        gate=(Bound("direct_minus_wiener", at_least=0.06), Bound("direct_minus_gru", at_least=-0.01)),
        cost=Cost(smoke=8, quick=100, full=1200),
        module="commissure.experiments.decode_accuracy",
        min_seeds=5,
    ),
    Claim(
        id="decode.timing",
        paper=_POSSM,
        statement="Where fine timing carries information, POSSM on spike times decodes better than a GRU on bins "
        "of any width.",
        quoted="true spike times > bins (ablation, sign only)",
        gate=(Bound("fine_direct_minus_gru", at_least=0), Bound("timing_direct_minus_gru", at_least=0)),
        cost=Cost(smoke=0, quick=0, full=900),
        module="commissure.experiments.decode_timing",
    ),
    Claim(
        id="decode.stream",
        paper=_POSSM,
        statement="Decoding spike by spike equals decoding the whole recording, and no chunk is lost when the computer "
        "stalls for 200 ms.",
        quoted="evaluated offline only",
        gate=(Bound("max_error", at_most=1e-5), Bound("lost_chunks", at_most=0)),
        cost=Cost(smoke=4, quick=7, full=40),
        module="commissure.experiments.decode_stream",
    ),
    Claim(
        id="mesa.in_context",
        paper=_MESA,
        statement="Without any training, the Mesa layer learns a linear map in context with a far smaller error at "
        "fresh queries than one gradient step a token (DeltaNet) or a sum of outer products (linear attention).",
        quoted="optimal at every token, by construction",
        gate=(
            Bound("delta_isotropic", at_least=20, side="low"),
            Bound("linear_isotropic", at_least=50, side="low"),
            Bound("delta_power_law", at_least=10, side="low"),
        ),
        cost=Cost(smoke=1, quick=3, full=12),
        module="commissure.experiments.mesa_in_context",
        min_seeds=5,
    ),
    Claim(
        id="mesa.recall",
        paper=_MESA,
        statement="Shown once, as many pairs as the key has dimensions are all recalled, and twice as many still far "
        "better than by DeltaNet or gated linear attention at their best settings.",
        quoted="best recurrent layer on recall (trained models)",
        gate=(
            Bound("mesa_32", at_least=0.999),
            Bound("mesa_64", at_least=0.95),
            Bound("lead_64", at_least=0.1, side="low"),
        ),
        cost=Cost(smoke=2, quick=8, full=25),
        module="commissure.experiments.mesa_recall",
        min_seeds=5,
    ),
    Claim(
        id="mesa.compute_curve",
        paper=_MESA,
        statement="More conjugate-gradient steps bring the exact answer nearer, late tokens need more of them, and a "
        "relative stop at 1e-4 spends them where they are needed.",
        quoted="1e-4 as good as 30 steps with about 9 on average",
        gate=(
            Bound("largest_ratio", at_most=1),
            Bound("late_over_early", at_least=1, side="low"),
            Bound("eps_excess", at_most=0.01),
            Bound("eps_steps", at_most=15),
        ),
        cost=Cost(smoke=1, quick=6, full=50),
        module="commissure.experiments.mesa_compute_curve",
        min_seeds=5,
    ),
    Claim(
        id="mesa.mqar",
        paper=_MESA,
        statement="Trained alike, a Mesa model answers multi-query associative recall better than gated linear "
        "attention and Gated DeltaNet, with as many pairs as its keys have dimensions and with more.",
        quoted="as good as attention (figure only)",
        gate=(
            Bound("mesa_16", at_least=0.98),
            Bound("over_gated_linear_16", at_least=0.02, side="low"),
            Bound("over_gated_deltanet_16", at_least=0.02, side="low"),
            Bound("over_gated_linear_24", at_least=0.02, side="low"),
            Bound("over_gated_deltanet_24", at_least=0.02, side="low"),
        ),
        cost=Cost(smoke=0, quick=0, full=1000),
        module="commissure.experiments.mesa_mqar",
    ),
    Claim(
        id="mesa.lds",
        paper=_MESA,
        statement="One Mesa layer learns to identify a linear dynamical system in context, with a smaller error than "
        "Gated DeltaNet and gated linear attention.",
        quoted="not in the paper (the first mesa layer's task)",
        gate=(
            Bound("gated_deltanet_mean", at_least=1.2, side="low"),
            Bound("gated_deltanet_late", at_least=2, side="low"),
            Bound("gated_linear_late", at_least=5, side="low"),
        ),
        cost=Cost(smoke=0, quick=0, full=300),
        module="commissure.experiments.mesa_lds",
    ),
    Claim(
        id="mesa.speed",
        paper=_MESA,
        statement="On one CPU thread the exact layer, solved to rounding at every token, is several times faster than "
        "the best batched 30 steps of conjugate gradients, and 20 times when decoding.",
        quoted="30 steps of conjugate gradients (on a GPU)",
        gate=(
            Bound("forward_64", at_least=6, side="low"),
            Bound("forward_128", at_least=2.5, side="low"),
            Bound("training_64", at_least=5, side="low"),
            Bound("hybrid_mixed", at_least=2, side="low"),
            Bound("error", at_most=1e-5),
            Bound("decode", at_least=20, side="low"),
            Bound("of_sgemm_64", at_least=0.55, side="low"),
            Bound("of_sgemm_128", at_least=0.45, side="low"),
        ),
        cost=Cost(smoke=5, quick=22, full=280),
        module="commissure.experiments.mesa_speed",
        min_seeds=5,
        exclusive=True,
    ),
    Claim(
        id="metahmm.oracle",
        paper=_METAHMM,
        statement="The Bayes optimum over 12,288 tasks, exact at every token, takes one CPU thread less than a "
        "five-hundredth of the time of the published design.",
        quoted="300 sequences of 200 tokens in 145 s (on the authors' cluster)",
        gate=(
            Bound("brute_f64", at_most=1e-12),
            Bound("brute_f32", at_most=1e-6),
            Bound("dense_f32", at_most=1e-6),
            Bound("chain_rule", at_most=1e-10),
            Bound("scan", at_least=500, side="low"),
            Bound("peer", at_least=30, side="low"),
            Bound("dense", at_least=10, side="low"),
            Bound("seconds", at_most=20),
            Bound("seconds_pruned", at_most=6),
        ),
        cost=Cost(smoke=8, quick=30, full=80),
        module="commissure.experiments.metahmm_oracle",
        exclusive=True,
    ),
    Claim(
        id="metahmm.floor",
        paper=_METAHMM,
        statement="Sampling tasks from the exact posterior, with exact predictions given a task, is unbiased, and its "
        "divergence from the optimum falls as the closed form says: with K samples by c / K.",
        quoted="1.8, 1.5, 1.42 nats at the peak for K = 1, 5, 50 (learned sampler and predictor)",
        gate=(
            *(Bound(f"small_{k}", at_least=0.85 * v, at_most=1.15 * v) for k, v in FLOOR.items()),
            Bound("exponent", at_least=-1.1, at_most=-0.9),
            Bound("over_closed_form", at_least=0.85, at_most=1.15),
            Bound("bias_z", at_least=0.9, at_most=1.1),
        ),
        cost=Cost(smoke=5, quick=40, full=130),
        module="commissure.experiments.metahmm_floor",
    ),
    Claim(
        id="metahmm.bump",
        paper=_METAHMM,
        statement="A trained predictor is farthest from the Bayes optimum neither at the first tokens nor at the last: "
        "on the tasks it was trained on, its divergence peaks between the 5th and the 20th token.",
        quoted="peak at t = 8 to 13 at every size; 4.7 times the end's for the smallest (held-out tasks)",
        gate=(
            Bound("train_earliest_peak", at_least=5),
            Bound("train_latest_peak", at_most=20),
            Bound("train_over_end", at_least=1.3),
        ),
        cost=Cost(smoke=0, quick=0, full=1100),
        module="commissure.experiments.metahmm_bump",
    ),
    Claim(
        id="metahmm.monte_carlo",
        paper=_METAHMM,
        statement="Sampling tasks from a learned posterior, weighed by the likelihood of a narrow predictor told "
        "the task, comes nearer to the Bayes optimum than a predictor widened to the same cost of a token.",
        quoted="median Div .67 to .28 (1.1M parameters, K = 50; the cost is not matched)",
        gate=(
            Bound("rival_train_all", at_least=1, side="low"),
            Bound("rival_train_amb", at_least=1, side="low"),
            Bound("rival_held_out_all", at_least=1, side="low"),
            Bound("rival_held_out_amb", at_least=1, side="low"),
        ),
        cost=Cost(smoke=0, quick=0, full=1800),
        module="commissure.experiments.metahmm_monte_carlo",
    ),
    Claim(
        id="reservoirs.hierarchy",
        paper=_RESERVOIRS,
        statement="The more levels of modules in modules a random network has, at one number of edges, the more of its "
        "input's past its modules remember, at every spectral radius from .6 to 1.4, most at .8; with four times the "
        "input gain up to radius 1.",
        quoted="hierarchical > modular > random (sign only)",
        gate=(
            Bound("inferred_l3_over_l1", at_least=0.95),
            Bound("inferred_l3_over_l2", at_least=0.6),
            Bound("inferred_peak", at_least=0.8, at_most=0.8),
            Bound("gain1_l3_over_l1", at_least=0.95),
        ),
        cost=Cost(smoke=8, quick=26, full=85),
        module="commissure.experiments.reservoirs_hierarchy",
        min_seeds=8,
    ),
    Claim(
        id="reservoirs.noise",
        paper=_RESERVOIRS,
        statement="Read without noise, hierarchical networks remember more than flat modular, random and rewired ones "
        "at every spectral radius; with noise of 1e-3 or 8-bit states still at .8 and 1; with noise of 1e-2 only at 1, "
        "and above they lose to random networks; under noise flat modules remember less than a random network.",
        quoted="no noise in the paper",
        gate=(
            Bound("clean_l3_over_l1", at_least=0.95),
            Bound("clean_l3_over_random", at_least=0.95),
            Bound("clean_l3_over_rewired", at_least=0.95),
            Bound("fine_l3_over_random", at_least=0.9),
            Bound("bits_l3_over_random", at_least=0.8),
            Bound("coarse_l3_over_random_10", at_least=0.75),
            Bound("coarse_l3_over_random_above", at_most=0.2),
            Bound("noisy_l1_over_random", at_most=0.4),
        ),
        cost=Cost(smoke=0, quick=0, full=95),
        module="commissure.experiments.reservoirs_noise",
        min_seeds=12,
    ),
    Claim(
        id="reservoirs.connectome",
        paper=_RESERVOIRS,
        statement="Rewired within its hierarchy of modules, a human connectome remembers more than rewired within its "
        "modules alone, and that more than with only its degrees kept, at every spectral radius; as it is, it beats "
        "the modular rewiring from radius 1 on.",
        quoted="hierarchical modularity adds memory (sign only)",
        gate=(
            Bound("hierarchical_over_modular", at_least=0.75),
            Bound("modular_over_degree", at_least=0.95),
            Bound("empirical_over_modular_10", at_least=0.8),
            Bound("empirical_over_modular_12", at_least=0.9),
        ),
        cost=Cost(smoke=0, quick=0, full=200),
        module="commissure.experiments.reservoirs_connectome",
        min_seeds=6,
    ),
    Claim(
        id="reservoirs.timescales",
        paper=_RESERVOIRS,
        statement="Regions of a human connectome that forget slowly as reservoir units are those with slow "
        "magnetoencephalograms, more so than after any rewiring; and levels of modules spread the timescales of units.",
        quoted="Spearman .444; p .0099 against modular, .129 against hierarchical rewiring",
        gate=(
            Bound("empirical", at_least=0.35),
            Bound("over_hierarchical", at_least=0, side="low"),
            Bound("over_modular", at_least=0, side="low"),
            Bound("over_degree", at_least=0, side="low"),
            Bound("spread_l3_over_l1", at_least=0.9),
        ),
        cost=Cost(smoke=12, quick=28, full=45),
        module="commissure.experiments.reservoirs_timescales",
        min_seeds=6,
    ),
    Claim(
        id="geometry.toy",
        paper=_GEOMETRY,
        statement="Features trained through a bottleneck on skewed classes fall, rise and fall again in effective rank "
        "from the published start; with uniform classes they never fall again, and from an iid start most do not.",
        quoted="one run: 1.91, 1.88, 1.99, 1.981 (read from a figure)",
        gate=(
            Bound("clustered", at_least=0.9),
            Bound("uniform", at_most=0.1),
            Bound("iid", at_most=0.5),
        ),
        cost=Cost(smoke=0.6, quick=3, full=7),
        module="commissure.experiments.geometry_toy",
    ),
    Claim(
        id="geometry.collapse_expand",
        paper=_GEOMETRY,
        statement="A language model of .36 M parameters collapses to few directions within 100 steps and expands again "
        "while its probabilities come to agree with those of the longest contexts of its corpus.",
        quoted="collapse and expansion of OLMo-2 and Pythia, 1 B to 12 B",
        gate=(
            Bound("collapse", at_least=8),
            Bound("expansion", at_least=4),
            Bound("alignment", at_least=0),
        ),
        cost=Cost(smoke=0, quick=0, full=500),
        module="commissure.experiments.geometry_collapse_expand",
    ),
    Claim(
        id="geometry.three_phases",
        paper=_GEOMETRY,
        statement="A language model of 36,112 parameters shows three phases: collapse, expansion and a small late "
        "compression with rising alpha (a few percent, not the published factor of 2 to 4).",
        quoted="late fall by a factor of 2 to 4",
        gate=(
            Bound("early", at_most=0.25),
            Bound("expansion", at_least=3.5),
            Bound("late", at_most=0.97),
            Bound("alpha_rise", at_least=0),
        ),
        cost=Cost(smoke=0, quick=0, full=400),
        module="commissure.experiments.geometry_three_phases",
    ),
    Claim(
        id="geometry.bias",
        paper=_GEOMETRY,
        statement="With twice as many rows as components a plug-in RankMe is 10 % low or more where eigenvalues decay "
        "as i^-.75; extrapolated from halves it is right within 2 %, and the unbiased participation ratio within 1 %.",
        quoted="plug-in values, no errors",
        gate=(
            Bound("corrected", at_most=0.02),
            Bound("plug_in", at_most=-0.1),
            Bound("unbiased", at_most=0.01),
            Bound("held", at_least=0.85),
        ),
        cost=Cost(smoke=0, quick=0, full=200),
        module="commissure.experiments.geometry_bias",
    ),
    Claim(
        id="geometry.phases_olmo",
        paper=_GEOMETRY,
        statement="The phases drawn by hand into the published curve of OLMo-2-7B, and its late rise, come out of an "
        "exact segmentation of 22 points read from the figure, and again with 3 % more noise.",
        quoted="boundaries at 2.5e9 and 6e10 tokens",
        gate=(
            Bound("phases", at_least=4, at_most=4),
            Bound("first", at_least=0.65, at_most=2.5),
            Bound("second", at_least=45, at_most=60),
            Bound("third", at_least=1500, at_most=2000),
            Bound("noise_3", at_least=0.95),
        ),
        cost=Cost(smoke=1, quick=2, full=3),
        module="commissure.experiments.geometry_phases_olmo",
    ),
    Claim(
        id="geometry.real_model",
        paper=_GEOMETRY,
        statement="All layers of MiniLM under four poolings, 24 covariances, come out of its own forward passes at 12 "
        "% of their time at most, outputs unchanged, and agree with stored activations.",
        quoted="one layer, stored activations",
        gate=(
            Bound("overhead", at_most=0.12),
            Bound("agreement", at_most=1e-5),
            Bound("outputs", at_most=0),
        ),
        cost=Cost(smoke=0, quick=0, full=120),
        module="commissure.experiments.geometry_real_model",
        exclusive=True,
    ),
    Claim(
        id="geometry.speed",
        paper=_GEOMETRY,
        statement="RankMe and alpha of 20,000 rows of 2,048 components take an eighth of the time (float32; float64: "
        "less than a quarter) and a sixth of the memory of two decompositions; 1,000 checkpoints segment in a second.",
        quoted="a full decomposition for each metric",
        gate=(
            Bound("seconds_float32", at_least=8),
            Bound("seconds_float64", at_least=4.5),
            Bound("memory_float32", at_least=6),
            Bound("memory_float64", at_least=6),
            Bound("difference", at_most=1e-5),
            Bound("phases", at_most=1),
        ),
        cost=Cost(smoke=0, quick=0, full=600),
        module="commissure.experiments.geometry_speed",
        exclusive=True,
    ),
)
