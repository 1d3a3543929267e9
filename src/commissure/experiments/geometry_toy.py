"""Claim `geometry.toy`: the smallest model with three phases, and the controls that show what they hang on.

    three phases: RankMe falls by .01, then rises by .01, then falls by .001 before the run of 300 steps ends
    the controls are held to less: to no fall of .001 at any time, once a rank has begun to rise, recovered or not

| run          | what is changed                                                          |
|--------------|---------------------------------------------------------------------------|
| clustered    | nothing: frequent classes are told apart at the start, rare ones coincide  |
| uniform      | all four classes have two samples                                           |
| iid          | a start of normal numbers                                                    |
| squared      | squared loss in place of cross-entropy                                        |
| wide         | three components, as many as four classes need: no bottleneck                  |
| uniform iid  | four equal classes from normal numbers                                          |
| long         | 3000 steps: whether the last fall stays (end alone)                              |

The start is what the published figure's markers show; its text gives none.  arXiv 2509.23024, section 5 and figure 5.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float64

from commissure.experiments.claims import Budget, Context, Outcome
from commissure.experiments.rows import interval_row, share_row
from commissure.geometry.toy import ToySetting, run_toy
from commissure.report.style import COLORS, figure, to_svg

__all__ = ["run"]

RUNS = {
    "clustered": (ToySetting(), 300),
    "uniform": (ToySetting(counts=(2, 2, 2, 2)), 300),
    "iid": (ToySetting(start="iid"), 300),
    "squared": (ToySetting(loss="squared"), 300),
    "wide": (ToySetting(dim=3), 300),
    "uniform iid": (ToySetting(counts=(2, 2, 2, 2), start="iid"), 300),
    "long": (ToySetting(), 3000),
}
_LABELS = {
    "clustered": "skewed classes, clustered start",
    "uniform": "uniform classes, clustered start",
    "iid": "skewed classes, iid start",
    "squared": "squared loss",
    "wide": "no bottleneck",
    "uniform iid": "uniform classes, iid start",
    "long": "3000 steps",
}
_MOVES, _FALLS = 0.01, 0.001  # of RankMe
_SEEDS: dict[Budget, int] = {"smoke": 1, "quick": 5, "full": 20}

Curves = dict[str, Float64[np.ndarray, "seeds steps"]]


def run(ctx: Context) -> Outcome:
    """RankMe of every run and seed; the share of seeds with three phases is judged."""
    n_seeds = _SEEDS[ctx.budget]
    curves: Curves = {}
    for k, (name, (setting, n_steps)) in enumerate(RUNS.items()):
        curves[name] = np.stack([run_toy(setting, n_steps=n_steps, seed=seed).rankme for seed in range(n_seeds)])
        ctx.progress((k + 1) / len(RUNS), name)
    told = curves["clustered"]
    rows = [share_row("clustered", f"share of seeds with three phases: {_LABELS['clustered']}", three_phases(told))]
    rows += [
        share_row(name, f"share of seeds whose rank falls after it rose: {_LABELS[name]}", falls(ranks))
        for name, ranks in curves.items()
        if name not in ("clustered", "long")
    ]
    rows.append(share_row("long", "share of seeds with three phases after 3000 steps", three_phases(curves["long"])))
    dips, peaks = told.min(1), np.array([one[one.argmin() :].max() for one in told])
    for key, label, values, quoted in (
        ("start", "RankMe at the start", told[:, 0], "1.91"),
        ("dip", "at its first minimum", dips, "1.88"),
        ("peak", "at its maximum after it", peaks, "1.99"),
        ("end", "at step 300", told[:, -1], "1.981"),
    ):
        rows.append(interval_row(key, label, values, note=f"published about {quoted}, read from a figure"))
    return Outcome(tuple(rows), ctx.judge(rows, n_seeds), _figure(curves), n_seeds, data="none: a model of 6 samples")


def three_phases(ranks: Float64[np.ndarray, "seeds steps"]) -> Bool[np.ndarray, " seeds"]:
    """Whether each curve falls, rises and falls again.

    >>> three_phases(np.array([[1.9, 1.8, 2.0, 1.99], [1.9, 1.8, 1.9, 2.0]])).tolist()
    [True, False]
    """
    found = []
    for one in ranks:
        dip = int(one[: one.argmax() + 1].argmin()) if one.argmax() > 0 else int(one.argmin())
        found.append(one[0] - one[dip] >= _MOVES and one[dip:].max() - one[dip] >= _MOVES)
    return np.array(found) & np.array([one[one.argmin() :].max() - one[-1] >= _FALLS for one in ranks])


def falls(ranks: Float64[np.ndarray, "seeds steps"]) -> Bool[np.ndarray, " seeds"]:
    """Whether each curve ever falls below what it had risen to since its first minimum, also if it recovers.

    >>> falls(np.array([[1.9, 1.8, 2.0, 1.99], [1.9, 1.8, 1.9, 2.0], [1.8, 2.0, 1.9, 2.1]])).tolist()
    [True, False, True]
    """
    return np.array([_drop(one) >= _FALLS for one in ranks])


def _drop(one: Float64[np.ndarray, " steps"]) -> float:
    """Largest fall below the running maximum, from the first minimum on."""
    turns = np.flatnonzero(np.diff(one) > 0)
    rest = one[turns[0] :] if len(turns) else one[-1:]
    return float((np.maximum.accumulate(rest) - rest).max())


def _figure(curves: Curves) -> str:
    with figure(8.0, 3.4) as (fig, ax):
        ax.remove()
        left, right = fig.subplots(1, 2)  # axes of their own: the last fall is of .007
        for panel, names in ((left, ("clustered", "uniform", "squared")), (right, ("iid", "wide"))):
            for name in names:
                for seed, ranks in enumerate(curves[name][:5]):
                    label = _LABELS[name] if seed == 0 else None
                    panel.plot(ranks, color=COLORS[f"toy {name}"], alpha=0.7, linewidth=1.2, label=label)
            panel.set_xlabel("step")
            panel.legend(loc="lower right", fontsize=9)
        left.set_ylabel("RankMe of the features")
        return to_svg(fig, label="RankMe of the toy model's features by step, with its controls")
