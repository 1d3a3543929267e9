"""Decision tasks of NeuroGym, and the classifier that reads them: one answer a step, judged where a decision is due.

    w_t = 1 in the trial's decision period, from `grace` steps after its start; 0 elsewhere
    B = argmin sum_t w_t c_t |Y_t - x_t B|^2 + penalty |B|^2,      Y 1 for the label's class and -1 for the others
    score = mean over the classes of the share of their decision steps that are answered right (balanced accuracy)

| symbol | name                                                                          |
|--------|-------------------------------------------------------------------------------|
| w      | `Trials.weights`                                                              |
| c      | class weight: decision steps of all classes, over classes times those of this |

The grace, 4 steps, lets states settle after the period begins (bioRxiv 2025.06.20.660760).  NeuroGym: Molano-Mazon et
al., "NeuroGym: an open resource for developing and sharing neuroscience tasks" (2022).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike

from commissure.core.errors import BackendMissing, DegenerateError, InputError
from commissure.core.lsq import RidgeFit, ridge
from commissure.reservoirs.inputs import numbers, real, whole
from commissure.reservoirs.tasks.data import Split, TaskData, split_generator

__all__ = ["DecisionReadout", "NeuroGym", "Trials", "fit_decisions"]


class Trials(NamedTuple):
    """Trials end to end: observations, the right action at each step, and which steps count."""

    inputs: Float[np.ndarray, "time channels"]
    labels: Int[np.ndarray, " time"]
    weights: Float[np.ndarray, " time"]


class DecisionReadout(NamedTuple):
    """A linear classifier of states; ties go to the lowest class."""

    fit: RidgeFit
    classes: Int[np.ndarray, " classes"]

    def predict(self, states: ArrayLike) -> Int[np.ndarray, " time"]:
        """The class of each row of `states` (time, nodes)."""
        x, n_nodes = numbers("states", states), len(self.fit.coefficients)
        if x.ndim != 2 or x.shape[1] != n_nodes:
            raise InputError("states", x.shape, f"shape (time, {n_nodes}), the nodes fitted")
        return self.classes[self.fit.predict(x).argmax(1)]

    def score(self, states: ArrayLike, labels: ArrayLike, weights: ArrayLike) -> float:
        """Balanced accuracy over the steps with a weight; chance is 1 / classes."""
        x, labels, weights = _steps(states, labels, weights)
        right = self.predict(x) == labels
        recalls = [weights[of] @ right[of] / weights[of].sum() for of in _members(labels, weights).values()]
        return float(np.mean(recalls))


def fit_decisions(states: ArrayLike, labels: ArrayLike, weights: ArrayLike, *, penalty: float = 1.0) -> DecisionReadout:
    """Ridge classifier of `labels` (time,) from `states` (time, nodes) at the steps with a weight (time,), balanced.

    >>> readout = fit_decisions([[0.0], [1.0], [9.0]], [1, 2, 1], [1.0, 1.0, 0.0])
    >>> readout.predict([[0.2], [0.8]]).tolist()
    [1, 2]
    """
    x, labels, weights = _steps(states, labels, weights)
    members = _members(labels, weights)
    if len(members) < 2:
        raise DegenerateError(f"fit_decisions: the weighted steps hold {len(members)} class; needs at least 2")
    balanced = weights.copy()
    for of in members.values():
        balanced[of] *= weights.sum() / (len(members) * weights[of].sum())
    classes, kept = np.array(list(members)), weights > 0
    codes = np.where(labels[kept, None] == classes, 1.0, -1.0)
    return DecisionReadout(
        ridge(x[kept], codes, penalty=real("penalty", penalty, 0), sample_weight=balanced[kept]), classes
    )


@dataclass(frozen=True, kw_only=True)
class NeuroGym:
    """`n_trials` trials of a NeuroGym environment, one after another.  Needs the extra `tasks`.

    `options` go to the environment.  `data` gives 1 and -1 for the right action as targets; `trials` the labels and
    weights that `fit_decisions` wants.  Note that HierarchicalReasoning of neurogym 2.3.1 calls a delay long from
    610 ms on, its second delay, and not from the median of all.
    """

    env: str = "HierarchicalReasoning-v0"
    n_trials: int = 200
    grace: int = 4
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.env, str):
            raise InputError("env", self.env, "an environment's name")
        whole("n_trials", self.n_trials, 1)
        whole("grace", self.grace, 0)
        if not isinstance(self.options, dict) or not all(isinstance(name, str) for name in self.options):
            raise InputError("options", self.options, "a dict of the environment's keyword arguments")
        object.__setattr__(self, "options", dict(self.options))

    @property
    def n_inputs(self) -> int:
        """Observed channels."""
        return int(self._environment().observation_space.shape[0])

    @property
    def n_outputs(self) -> int:
        """Actions."""
        return int(self._environment().action_space.n)

    def trials(self, seed: int, split: Split) -> Trials:
        """Trials of `seed`; `DegenerateError` where no decision period is longer than the grace."""
        env = self._environment()
        env.seed(int(split_generator(f"neurogym {self.env}", seed, split).integers(2**32)))
        if hasattr(env, "new_block"):  # the first block was drawn before the seed was set
            env.new_block()
        inputs, labels, weights = [], [], []
        for _ in range(self.n_trials):
            env.new_trial()
            right = np.asarray(env.gt, np.int64)
            due = np.zeros(len(right))
            if "decision" in env.start_ind:
                due[env.start_ind["decision"] + self.grace : env.end_ind["decision"]] = 1.0
            inputs.append(np.asarray(env.ob, np.float64))
            labels.append(right)
            weights.append(due)
        found = Trials(np.concatenate(inputs), np.concatenate(labels), np.concatenate(weights))
        if not found.weights.any():
            raise DegenerateError(
                f"{self.env}: no decision period longer than the grace of {self.grace} steps; "
                "lower the grace, or lengthen the period by options={'timing': {'decision': ...}}"
            )
        return found

    def data(self, seed: int, split: Split) -> TaskData:
        """Observations, and 1 for the right action, -1 for the others."""
        trials = self.trials(seed, split)
        codes = np.where(trials.labels[:, None] == np.arange(self.n_outputs), 1.0, -1.0)
        return TaskData(trials.inputs, codes, 0)

    def _environment(self) -> Any:
        try:
            import gymnasium
            import neurogym
        except ImportError as error:
            raise BackendMissing("neurogym", "tasks", "NeuroGym") from error
        try:
            with warnings.catch_warnings():  # its environments do not say how they could be drawn
                warnings.filterwarnings("ignore", ".*render_modes")
                env = neurogym.make(self.env, **self.options).unwrapped
        except gymnasium.error.Error as error:
            raise InputError("env", self.env, "an environment of neurogym.envs.registration.all_envs()") from error
        except (TypeError, ValueError, KeyError, AttributeError) as error:  # its constructor's
            raise InputError("options", self.options, f"keyword arguments of {self.env}", str(error)) from error
        shape = env.observation_space.shape
        if len(shape) != 1 or not hasattr(env.action_space, "n") or not hasattr(env, "new_trial"):
            raise InputError("env", self.env, "trials with a vector of observations and discrete actions")
        return env


def _steps(
    states: ArrayLike, labels: ArrayLike, weights: ArrayLike
) -> tuple[Float[np.ndarray, "time nodes"], Int[np.ndarray, " time"], Float[np.ndarray, " time"]]:
    x, classes, weight = numbers("states", states), numbers("labels", labels), numbers("weights", weights)
    if x.ndim != 2 or classes.shape != (len(x),) or weight.shape != (len(x),):
        shapes = (x.shape, classes.shape, weight.shape)
        raise InputError("states, labels, weights", shapes, "shapes (time, nodes), (time,) and (time,)")
    if (classes % 1).any():
        raise InputError("labels", classes[classes % 1 != 0][:3].tolist(), "integers")
    return x, classes.astype(np.int64), weight


def _members(labels: Int[np.ndarray, " time"], weights: Float[np.ndarray, " time"]) -> dict[int, np.ndarray]:
    """The weighted steps of each class."""
    if not weights.size or weights.min() < 0 or not weights.any():
        raise InputError("weights", weights.shape, "numbers >= 0, some of them above 0")
    return {int(c): np.flatnonzero((labels == c) & (weights > 0)) for c in np.unique(labels[weights > 0])}
