"""The metrics as scikit-learn's estimators: for its pipelines, and for rows that come in batches.

    RankMe().fit(x).dimension_
    for batch in batches:
        estimator.partial_fit(batch)                   # the same as fit of all of them

| estimator            | attribute    | function              |
|----------------------|--------------|-----------------------|
| `RankMe`             | `dimension_` | `rankme`              |
| `ParticipationRatio` | `dimension_` | `participation_ratio` |
| `AlphaReQ`           | `alpha_`     | `alpha_req`           |
| `TwoNN`              | `dimension_` | `two_nn`              |

All have `n_features_in_`; the first three have `spectrum_` and keep dim^2 numbers, no row.  TwoNN needs all rows at
once.  scikit-learn itself is not imported.  Interface: Buitinck et al., arXiv 1309.0238.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from typing import Any, Literal, TypeVar

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike
from torch import Tensor

from commissure.core.errors import InputError, NotFittedError
from commissure.core.moments import Moments, measure, update
from commissure.geometry.effective_rank import Weights, participation_ratio, rankme
from commissure.geometry.neighbors import two_nn
from commissure.geometry.power_law import FitRange, alpha_req
from commissure.geometry.spectra import Spectrum, rows_of, spectrum

__all__ = ["AlphaReQ", "ParticipationRatio", "RankMe", "TwoNN"]

Samples = Float[Tensor, "samples dim"] | ArrayLike
# Not typing.Self, which the run-time check of signatures cannot read.
Own = TypeVar("Own", bound="_Estimator")
OwnSpectral = TypeVar("OwnSpectral", bound="_OfSpectrum")


class _NotFitted(NotFittedError, AttributeError):
    """An AttributeError too, so that `hasattr` is an answer."""


class _Estimator:
    """What scikit-learn asks of an estimator whose arguments are its attributes."""

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The arguments it was made with, by name."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def set_params(self: Own, **parameters: Any) -> Own:
        """Change arguments; what is fitted already stays as it is until the next fit."""
        known = self.get_params()
        for name, value in parameters.items():
            if name not in known:
                raise InputError("parameters", name, f"one of {', '.join(known)}")
            setattr(self, name, value)
        return self

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import Tags, TargetTags

        return Tags(None, TargetTags(required=False))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.get_params().items())})"


class _OfSpectrum(_Estimator, ABC):
    """A function of the spectrum, `_metric`; subclasses have an argument `center`."""

    center: bool
    _moments: Moments | None = None
    _fitted: tuple[Spectrum, float] | None = None

    def fit(self: OwnSpectral, x: Samples, y: None = None) -> OwnSpectral:
        """From these rows (samples, dim) alone; `y` is ignored, as in any pipeline."""
        self._moments = None
        self.partial_fit(x)._fit()
        return self

    def partial_fit(self: OwnSpectral, x: Samples, y: None = None) -> OwnSpectral:
        """From these rows and all before them; the metric itself is computed when asked for."""
        rows = _rows(x)
        self._moments = measure(rows) if self._moments is None else update(self._moments, rows)
        self.n_features_in_ = rows.shape[1]
        self._fitted = None
        return self

    @property
    def spectrum_(self) -> Spectrum:
        """Of all rows seen."""
        return self._fit()[0]

    def _fit(self) -> tuple[Spectrum, float]:
        if self._moments is None:
            raise _NotFitted(f"{type(self).__name__} is not fitted: call fit(x) or partial_fit(x) first")
        if self._fitted is None:
            found = spectrum(self._moments, center=self.center)
            self._fitted = found, self._metric(found)
        return self._fitted

    @abstractmethod
    def _metric(self, found: Spectrum) -> float:
        """Of the spectrum of all rows."""


class RankMe(_OfSpectrum):
    """exp of the entropy of the spectrum: `rankme`.

    >>> RankMe().fit([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]).dimension_
    2.0
    """

    def __init__(self, *, weights: Weights = "eigenvalue", center: bool = True) -> None:
        self.weights, self.center = weights, center

    @property
    def dimension_(self) -> float:
        return self._fit()[1]

    def _metric(self, found: Spectrum) -> float:
        return rankme(found, weights=self.weights, center=self.center)


class ParticipationRatio(_OfSpectrum):
    """(sum lambda)^2 / sum lambda^2: `participation_ratio`.

    >>> estimator = ParticipationRatio()
    >>> for batch in ([[1.0, 0.0], [-1.0, 0.0]], [[0.0, 1.0], [0.0, -1.0]]):
    ...     _ = estimator.partial_fit(batch)
    >>> estimator.dimension_
    2.0
    """

    def __init__(self, *, center: bool = True, unbiased: bool = False) -> None:
        self.center, self.unbiased = center, unbiased

    @property
    def dimension_(self) -> float:
        return self._fit()[1]

    def _metric(self, found: Spectrum) -> float:
        return participation_ratio(found, center=self.center, unbiased=self.unbiased)


class AlphaReQ(_OfSpectrum):
    """The decay of the spectrum as a power of the rank: `alpha_req`.

    >>> rows = np.diag(np.arange(1.0, 9.0) ** -0.5)
    >>> round(AlphaReQ(fit_range=(1, 8), center=False).fit(rows).alpha_, 6)
    1.0
    """

    def __init__(
        self,
        *,
        fit_range: FitRange = (11, 100),
        weights: Literal["1/rank", "uniform"] = "1/rank",
        center: bool = True,
    ) -> None:
        self.fit_range, self.weights, self.center = fit_range, weights, center

    @property
    def alpha_(self) -> float:
        return self._fit()[1]

    def _metric(self, found: Spectrum) -> float:
        return alpha_req(found, fit_range=self.fit_range, weights=self.weights, center=self.center).alpha


class TwoNN(_Estimator):
    """Intrinsic dimension from the distances to two neighbors: `two_nn`.

    >>> line = np.random.default_rng(0).uniform(size=(500, 1)) * np.ones(3)
    >>> 0.8 < TwoNN().fit(line).dimension_ < 1.2
    True
    """

    _dimension: float | None = None

    def __init__(self, *, discard: float | None = None) -> None:
        self.discard = discard

    def fit(self, x: Samples, y: None = None) -> TwoNN:
        """From rows (samples, dim); `y` is ignored, as in any pipeline."""
        rows = _rows(x)
        self._dimension = two_nn(rows, discard=self.discard)
        self.n_features_in_ = rows.shape[1]
        return self

    @property
    def dimension_(self) -> float:
        if self._dimension is None:
            raise _NotFitted("TwoNN is not fitted: call fit(x) first")
        return self._dimension


def _rows(x: Samples) -> Float[Tensor, "samples dim"]:
    """Tensors and arrays keep their precision; lists and tables become float64."""
    if isinstance(x, Tensor | np.ndarray):
        return rows_of(x)
    try:
        return rows_of(np.asarray(x, np.float64))
    except (TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError("x", type(x).__name__, "numbers of shape (samples, dim)") from None
