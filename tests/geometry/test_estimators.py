"""Estimators: the functions' numbers, batches and all rows alike, and what scikit-learn does with them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch

from commissure.core.errors import DegenerateError, InputError, NotFittedError
from commissure.geometry.effective_rank import participation_ratio, rankme
from commissure.geometry.estimators import AlphaReQ, ParticipationRatio, RankMe, TwoNN
from commissure.geometry.neighbors import two_nn
from commissure.geometry.power_law import alpha_req
from commissure.geometry.spectra import FewSamplesWarning, spectrum

Rows = np.ndarray


def normal(n: int = 300, dim: int = 12) -> Rows:
    return np.random.default_rng(0).normal(size=(n, dim)) * np.arange(1, dim + 1) ** -0.4 + 3


CASES: list[tuple[RankMe | ParticipationRatio | AlphaReQ | TwoNN, str, Callable[[Rows], float]]] = [
    (RankMe(), "dimension_", rankme),
    (
        RankMe(weights="singular", center=False),
        "dimension_",
        lambda x: rankme(x, weights="singular", center=False),
    ),
    (ParticipationRatio(), "dimension_", participation_ratio),
    (ParticipationRatio(unbiased=True), "dimension_", lambda x: participation_ratio(x, unbiased=True)),
    (AlphaReQ(fit_range=(2, 9)), "alpha_", lambda x: alpha_req(x, fit_range=(2, 9)).alpha),
    (
        AlphaReQ(fit_range=(1, 12), weights="uniform", center=False),
        "alpha_",
        lambda x: alpha_req(x, fit_range=(1, 12), weights="uniform", center=False).alpha,
    ),
    (TwoNN(), "dimension_", two_nn),
    (TwoNN(discard=0.1), "dimension_", lambda x: two_nn(x, discard=0.1)),
]
STREAMS = CASES[:6]


@pytest.mark.parametrize(("estimator", "attribute", "function"), CASES)
def test_estimators_are_the_functions(estimator, attribute: str, function) -> None:
    x = normal()
    for rows in (x, torch.from_numpy(x), x.tolist()):
        assert estimator.fit(rows) is estimator
        assert getattr(estimator, attribute) == pytest.approx(function(x), rel=1e-12)
        assert estimator.n_features_in_ == 12
    estimator.fit(x[:100])
    assert getattr(estimator, attribute) == pytest.approx(function(x[:100]), rel=1e-12)


@pytest.mark.parametrize(("estimator", "attribute", "function"), STREAMS)
def test_batches_are_all_rows(estimator, attribute: str, function) -> None:
    x = normal()
    estimator.fit(x[200:])  # forgotten by the next fit
    estimator.fit(x[:150]).partial_fit(x[150:151]).partial_fit(x[151:])
    assert getattr(estimator, attribute) == pytest.approx(function(x), rel=1e-11)
    found = spectrum(x, center=estimator.center)
    np.testing.assert_allclose(estimator.spectrum_.values, found.values, rtol=1e-11)
    assert estimator.spectrum_.n_samples == 300


def test_a_first_batch_may_be_a_single_row() -> None:
    x = normal()
    estimator = RankMe().partial_fit(x[:1])
    with pytest.raises(DegenerateError):
        estimator.dimension_  # noqa: B018
    assert estimator.partial_fit(x[1:]).dimension_ == pytest.approx(rankme(x), rel=1e-11)


def test_arguments_changed_wait_for_the_next_fit() -> None:
    x = normal()
    estimator = RankMe().fit(x)
    assert estimator.set_params(weights="singular").dimension_ == pytest.approx(rankme(x), rel=1e-12)
    assert estimator.fit(x).dimension_ == pytest.approx(rankme(x, weights="singular"), rel=1e-12)


@pytest.mark.parametrize(("estimator", "attribute", "function"), CASES)
def test_what_scikit_learn_does(estimator, attribute: str, function) -> None:
    base = pytest.importorskip("sklearn.base")
    from sklearn.exceptions import NotFittedError as Theirs
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.utils.validation import check_is_fitted

    x = normal()
    copy = base.clone(estimator.fit(x))
    assert type(copy) is type(estimator)
    assert copy.get_params() == estimator.get_params()
    assert not hasattr(copy, attribute)
    with pytest.raises(Theirs):
        check_is_fitted(copy)
    pipeline = make_pipeline(StandardScaler(), copy).fit(x)
    check_is_fitted(pipeline[-1])
    scaled = (x - x.mean(0)) / x.std(0)
    assert getattr(pipeline[-1], attribute) == pytest.approx(function(scaled), rel=1e-9)
    assert repr(copy).startswith(f"{type(copy).__name__}(")


def test_scikit_learn_is_not_imported() -> None:
    code = (
        "import sys, commissure.geometry.estimators as e; e.RankMe().get_params(); assert 'sklearn' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_few_rows_are_told() -> None:
    with pytest.warns(FewSamplesWarning):
        RankMe().fit(normal(5))


@pytest.mark.parametrize("estimator", [RankMe(), ParticipationRatio(), AlphaReQ(), TwoNN()])
def test_nothing_before_a_fit(estimator) -> None:
    name = "alpha_" if isinstance(estimator, AlphaReQ) else "dimension_"
    with pytest.raises(NotFittedError, match="call fit"):
        getattr(estimator, name)
    assert not hasattr(estimator, name)
    assert not hasattr(estimator, "n_features_in_")


def test_bad_input() -> None:
    with pytest.raises(InputError, match="one of discard"):
        TwoNN().set_params(center=False)
    for x in ("rows", [[1.0], [2.0, 3.0]], [1.0, 2.0], np.ones((3, 2), int), [[np.nan, 1.0]], None):
        with pytest.raises(InputError, match="x"):
            RankMe().fit(x)
    with pytest.raises(InputError, match="x"):
        RankMe().fit(normal()).partial_fit(normal(dim=3))
    with pytest.raises(InputError, match="weights"):
        RankMe(weights="other").fit(normal())
    with pytest.raises(InputError, match="fit_range"):
        AlphaReQ().fit(normal())
