"""Linear readouts of states at hand, with scikit-learn's interface: one for all nodes, or one for each module.

    y_t = c + x_t[nodes] b,     b = argmin sum_t w_t |y_t - c - x_t b|^2 + penalty |b|^2

The penalty is fixed, or the best of several by generalized cross-validation or exact leave-one-out.  For states that
are not kept see `evaluate`, which streams.  Solved by `commissure.core.ridge_path`; bioRxiv 2025.06.20.660760 fits one
readout a module, without an intercept.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from commissure.core.errors import DegenerateError, InputError, NotFittedError
from commissure.core.lsq import RidgeFit
from commissure.core.ridge_path import MOMENTS_RCOND, ridge_path
from commissure.reservoirs.inputs import listed, named, numbers, real
from commissure.reservoirs.io_map import IOMap
from commissure.reservoirs.moments import IllConditionedWarning

__all__ = ["RidgeReadout"]

Array = np.ndarray


class RidgeReadout:
    """Ridge regression from states (samples, nodes) to targets (samples,) or (samples, outputs).

    `penalties`: one, or several of which `select` ("gcv" or "loo") takes the best, for each readout by itself.  With
    `io`, one readout for each of `io.outputs`, on its nodes and its target columns; then `coef_`, `intercept_` and what
    `predict` returns are tuples, one element a readout.  `coef_` is (outputs, nodes read) or (nodes read,), `alpha_`
    the penalty, an array (readouts,) with `io`.

    A penalty below 50 eps of the largest eigenvalue of the Gram matrix warns (`IllConditionedWarning`): such a readout
    is solved from the singular values of the states, and lives on directions that no noisy system has.

    >>> x = np.array([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    >>> readout = RidgeReadout(penalties=[1e-9, 1.0]).fit(x, [1.0, 2.0, 3.0])
    >>> readout.coef_.round(6), readout.alpha_, round(readout.score(x, [1.0, 2.0, 3.0]), 6)
    (array([2., 1.]), 1e-09, 1.0)
    """

    _parameters = ("penalties", "select", "intercept", "io")

    coef_: Array | tuple[Array, ...]
    intercept_: Array | tuple[Array, ...]
    alpha_: float | Array

    def __init__(
        self,
        penalties: float | Sequence[float] = 1e-6,
        *,
        select: Literal["gcv", "loo"] = "gcv",
        intercept: bool = False,
        io: IOMap | None = None,
    ) -> None:
        self.penalties, self.select, self.intercept, self.io = penalties, select, intercept, io

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The arguments it was made with, by name."""
        return {name: getattr(self, name) for name in self._parameters}

    def set_params(self, **parameters: Any) -> RidgeReadout:
        """Change arguments; those already fitted stay as they are until `fit`."""
        for name, value in parameters.items():
            if name not in self._parameters:
                raise InputError("parameters", name, f"one of {', '.join(self._parameters)}")
            setattr(self, name, value)
        return self

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import RegressorTags, Tags, TargetTags

        return Tags("regressor", TargetTags(required=True, multi_output=True), regressor_tags=RegressorTags())

    def fit(self, x: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> RidgeReadout:
        """Fit every readout; x (samples, nodes), y (samples,) or (samples, outputs), `sample_weight` (samples,)."""
        states, targets = numbers("x", x), numbers("y", y)
        sample_weight = None if sample_weight is None else numbers("sample_weight", sample_weight)
        if states.ndim != 2:
            raise InputError("x", states.shape, "shape (samples, nodes)")
        if targets.ndim not in (1, 2) or len(targets) != len(states):
            raise InputError("y", targets.shape, f"shape ({len(states)},) or ({len(states)}, outputs)")
        given = [self.penalties] if np.isscalar(self.penalties) else listed("penalties", self.penalties)
        penalties = [real(f"penalties[{i}]", value, 0.0) for i, value in enumerate(given)]
        if not penalties:
            raise InputError("penalties", self.penalties, "at least one")
        named("select", self.select, ("gcv", "loo"))
        if not isinstance(self.intercept, bool | np.bool_):
            raise InputError("intercept", self.intercept, "True or False")
        if not isinstance(self.io, IOMap | None):
            raise InputError("io", self.io, "an IOMap, or None for one readout of all nodes")
        self.n_features_in_ = states.shape[1]
        chosen = [self._fitted(part, values, penalties, sample_weight) for part, values in self._parts(states, targets)]
        self._fits = [fit for _, fit in chosen]
        coefficients, intercepts = tuple(f.coefficients.T for f in self._fits), tuple(f.intercept for f in self._fits)
        if self.io is None:
            self.coef_, self.intercept_, self.alpha_ = coefficients[0], intercepts[0], chosen[0][0]
        else:
            self.coef_, self.intercept_, self.alpha_ = coefficients, intercepts, np.array([p for p, _ in chosen])
        return self

    def predict(self, x: ArrayLike) -> Float[Array, " samples *outputs"] | tuple[Float[Array, "samples outputs"], ...]:
        """Predictions at the rows of x (samples, nodes); with `io` a tuple, one array a readout."""
        states = self._states(x)
        if self.io is None:
            return self._fits[0].predict(states)
        return tuple(fit.predict(states[:, nodes]) for fit, nodes in zip(self._fits, self.io.outputs, strict=True))

    def score(self, x: ArrayLike, y: ArrayLike) -> float:
        """Mean R^2 over the outputs of a readout, then over readouts: `module_r2` of the published protocol."""
        return float(np.mean(self.module_scores(x, y)))

    def module_scores(self, x: ArrayLike, y: ArrayLike) -> Float[Array, " readouts"]:
        """Mean R^2 over the outputs of each readout; a constant output raises `DegenerateError`."""
        states, targets = self._states(x), numbers("y", y)
        if targets.ndim not in (1, 2) or len(targets) != len(states):
            raise InputError("y", targets.shape, f"shape ({len(states)},) or ({len(states)}, outputs)")
        parts = self._parts(states, targets)
        return np.array([_r2(fit.predict(x), y) for fit, (x, y) in zip(self._fits, parts, strict=True)])

    def _states(self, x: ArrayLike) -> Float[Array, "samples nodes"]:
        if not hasattr(self, "_fits"):
            raise NotFittedError("RidgeReadout is not fitted: call fit(x, y) first")
        states = numbers("x", x)
        if states.ndim != 2 or states.shape[1] != self.n_features_in_:
            raise InputError("x", states.shape, f"shape (samples, {self.n_features_in_})")
        return states

    def _parts(self, x: Array, y: Array) -> list[tuple[Array, Array]]:
        """States and targets of every readout."""
        if self.io is None:
            return [(x, y)]
        highest = max(int(nodes.max()) for nodes in self.io.outputs)
        if highest >= x.shape[1]:
            raise InputError("x", x.shape, f"at least {highest + 1} nodes, as io reads them")
        columns = y if y.ndim == 2 else y[:, None]
        targets = self.io.targets or (np.arange(columns.shape[1]),) * self.io.n_readouts
        for o, wanted in enumerate(targets):
            if wanted.max() >= columns.shape[1]:
                raise InputError("y", y.shape, f"at least {int(wanted.max()) + 1} outputs, as io.targets[{o}] has it")
        return [(x[:, nodes], columns[:, wanted]) for nodes, wanted in zip(self.io.outputs, targets, strict=True)]

    def _fitted(
        self, x: Array, y: Array, penalties: list[float], sample_weight: ArrayLike | None
    ) -> tuple[float, RidgeFit]:
        """The penalty chosen and the ridge there."""
        loo = self.select == "loo"
        path = ridge_path(x, y, penalties, sample_weight=sample_weight, intercept=self.intercept, loo=loo)
        least, squares = min(penalties), np.sum(x**2)  # the sum of the eigenvalues
        if least < MOMENTS_RCOND * squares and least < MOMENTS_RCOND * np.linalg.norm(x, 2) ** 2:
            warnings.warn(
                f"penalty {least:g} is below 50 eps of the largest eigenvalue of the states' Gram matrix, "
                f"{np.linalg.norm(x, 2) ** 2:.3g}: solved from singular values instead; pass a larger penalty",
                IllConditionedWarning,
                stacklevel=3,
            )
        index = int(path.best(self.select)) if len(penalties) > 1 else 0
        return penalties[index], path.fit(index)


def _r2(predicted: Array, y: Array) -> float:
    total = np.sum((y - y.mean(0)) ** 2, axis=0)
    if not np.all(total > 0):
        raise DegenerateError("a target is constant over the samples: R^2 is not defined")
    return float(np.mean(1 - np.sum((y - predicted) ** 2, axis=0) / total))
