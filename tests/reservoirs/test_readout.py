"""RidgeReadout: scikit-learn's interface, module by module, selection of the penalty, ill-conditioned states."""

from __future__ import annotations

import pickle
import warnings

import numpy as np
import pytest

from commissure.core.errors import DegenerateError, InputError, NotFittedError
from commissure.core.lsq import ridge
from commissure.core.ridge_path import ridge_path
from commissure.reservoirs.io_map import IOMap
from commissure.reservoirs.moments import IllConditionedWarning
from commissure.reservoirs.readout import RidgeReadout

PENALTIES = np.logspace(-4, 3, 8).tolist()


def problem(seed: int, *, noise: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(60, 12)) + 0.5
    return x, x @ rng.normal(size=(12, 3)) + noise * rng.normal(size=(60, 3))


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("penalty", [1e-6, 1.0])
def test_one_penalty_is_sklearn_ridge(penalty: float, intercept: bool) -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y = problem(0)
    for targets, weight in ((y, None), (y[:, 0], None), (y, np.linspace(0.1, 1, 60))):
        ours = RidgeReadout(penalty, intercept=intercept).fit(x, targets, weight)
        theirs = linear_model.Ridge(alpha=penalty, fit_intercept=intercept).fit(x, targets, weight)
        assert np.shape(ours.coef_) == np.shape(theirs.coef_)
        assert np.max(np.abs(ours.coef_ - theirs.coef_)) <= 1e-8
        assert np.max(np.abs(ours.intercept_ - theirs.intercept_)) <= 1e-8
        assert np.max(np.abs(ours.predict(x) - theirs.predict(x))) <= 1e-8
        assert ours.score(x, targets) == pytest.approx(theirs.score(x, targets), abs=1e-10)
        assert ours.alpha_ == penalty


def test_several_penalties_are_sklearn_ridge_cv() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    chosen = set()
    for seed, noise in enumerate([0.01, 1.0, 30.0, 300.0]):
        x, y = problem(seed, noise=noise)
        ours = RidgeReadout(PENALTIES, select="loo").fit(x, y)
        theirs = linear_model.RidgeCV(PENALTIES, fit_intercept=False).fit(x, y)
        assert ours.alpha_ == theirs.alpha_
        assert np.max(np.abs(ours.coef_ - theirs.coef_)) <= 1e-8
        path = ridge_path(x, y, PENALTIES, intercept=False)
        assert RidgeReadout(PENALTIES, select="gcv").fit(x, y).alpha_ == PENALTIES[int(path.best("gcv"))]
        chosen.add(ours.alpha_)
    assert len(chosen) >= 3


def test_each_criterion_chooses_by_itself() -> None:
    """A few rows of large leverage: their own leverages tell leave-one-out what the mean one hides."""
    x, y = problem(9, noise=10.0)
    x[:3] *= 30
    path = ridge_path(x, y, PENALTIES, intercept=False, loo=True)
    loo, gcv = (PENALTIES[int(path.best(criterion))] for criterion in ("loo", "gcv"))
    assert loo != gcv
    assert RidgeReadout(PENALTIES, select="loo").fit(x, y).alpha_ == loo
    assert RidgeReadout(PENALTIES, select="gcv").fit(x, y).alpha_ == gcv


def test_modules_are_readouts_of_their_own() -> None:
    x, y = problem(1, noise=5.0)
    io = IOMap(inputs=([0],), outputs=([1, 2], [5, 3, 4, 9], [6]), targets=([0], [2, 1], [0, 1, 2]))
    readout = RidgeReadout(PENALTIES, io=io).fit(x, y)
    predicted = readout.predict(x)
    for o in range(3):
        alone = RidgeReadout(PENALTIES).fit(x[:, io.outputs[o]], y[:, io.targets[o]])
        assert (readout.coef_[o] == alone.coef_).all()
        assert readout.alpha_[o] == alone.alpha_
        assert (predicted[o] == alone.predict(x[:, io.outputs[o]])).all()
        assert readout.module_scores(x, y)[o] == alone.score(x[:, io.outputs[o]], y[:, io.targets[o]])
    assert len(set(readout.alpha_)) > 1
    assert readout.score(x, y) == pytest.approx(readout.module_scores(x, y).mean())
    shared = IOMap(inputs=([0],), outputs=([1, 2], [3]))
    assert RidgeReadout(io=shared).fit(x, y[:, 0]).predict(x)[1].shape == (60, 1)


def test_sklearn_clones_pickles_and_cross_validates() -> None:
    base, selection = pytest.importorskip("sklearn.base"), pytest.importorskip("sklearn.model_selection")
    x, y = problem(2)
    readout = RidgeReadout(PENALTIES, select="loo", intercept=True).fit(x, y)
    copy = base.clone(readout)
    assert copy.get_params() == readout.get_params()
    with pytest.raises(NotFittedError, match=r"call fit"):
        copy.predict(x)
    assert (pickle.loads(pickle.dumps(readout)).predict(x) == readout.predict(x)).all()
    scores = selection.cross_val_score(readout, x, y, cv=3)
    assert (scores > 0.5).all()
    search = selection.GridSearchCV(RidgeReadout(), {"penalties": [1e-3, 1e5]}, cv=3).fit(x, y)
    assert search.best_params_ == {"penalties": 1e-3}
    assert copy.set_params(select="gcv", penalties=2.0) is copy
    assert (copy.select, copy.penalties) == ("gcv", 2.0)


def test_a_penalty_lost_in_the_gram_warns_and_is_solved_all_the_same() -> None:
    rng = np.random.default_rng(0)
    u, v = np.linalg.qr(rng.normal(size=(60, 6)))[0], np.linalg.qr(rng.normal(size=(6, 6)))[0]
    x = u * np.logspace(3, -6, 6) @ v.T
    truth = rng.normal(size=(6, 2))
    with pytest.warns(IllConditionedWarning, match=r"penalty 1e-18 .* singular values"):
        readout = RidgeReadout(1e-18).fit(x, x @ truth)
    assert np.max(np.abs(readout.coef_.T - truth)) <= 1e-4
    with pytest.warns(IllConditionedWarning, match=r"penalty 1e-09 .* Gram matrix, 1e\+06"):  # 50 eps are 1.1e-8
        RidgeReadout(1e-9).fit(x, x @ truth)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RidgeReadout(1e-6).fit(x, x @ truth)


def test_nothing_given_is_changed() -> None:
    x, y = problem(3)
    before = x.copy(), y.copy()
    RidgeReadout(PENALTIES, intercept=True).fit(x, y)
    assert (x == before[0]).all()
    assert (y == before[1]).all()


def test_the_readout_is_the_ridge_of_the_core() -> None:
    x, y = problem(4)
    assert np.max(np.abs(RidgeReadout(0.3).fit(x, y).coef_.T - ridge(x, y, penalty=0.3, intercept=False)[0])) <= 1e-12


@pytest.mark.parametrize(
    ("options", "x", "y", "message"),
    [
        ({}, np.ones(3), np.ones(3), r"^x = \(3,\): expected shape \(samples, nodes\)"),
        ({}, np.ones((3, 2)), np.ones(4), r"^y = \(4,\)"),
        ({"penalties": []}, np.ones((3, 2)), np.ones(3), r"^penalties = \[\]"),
        ({"penalties": [1.0, -2.0]}, np.ones((3, 2)), np.ones(3), r"^penalties\[1\] = -2"),
        ({"penalties": None}, np.ones((3, 2)), np.ones(3), r"^penalties = None"),
        ({"select": ["gcv"]}, np.ones((3, 2)), np.ones(3), r"^select = \['gcv'\]"),
        ({"intercept": None}, np.ones((3, 2)), np.ones(3), r"^intercept = None"),
        ({"io": 3}, np.ones((3, 2)), np.ones(3), r"^io = 3"),
        ({}, [["a"]], np.ones(1), r"^x = "),
        ({}, np.ones((2, 1)), [1j, 2], r"^y = "),
        ({}, [[1.0], [1.0, 2.0]], np.ones(2), r"^x = 'list'"),
        ({"select": "aic"}, np.ones((3, 2)), np.ones(3), r"^select = 'aic'"),
        ({"io": IOMap(inputs=([0],), outputs=([2],))}, np.ones((3, 2)), np.ones(3), r"^x = \(3, 2\): .* 3 nodes"),
        (
            {"io": IOMap(inputs=([0],), outputs=([1],), targets=([1],))},
            np.ones((3, 2)),
            np.ones(3),
            r"^y = \(3,\): .* 2 outputs, as io\.targets\[0\]",
        ),
        ({"io": IOMap(inputs=([0],), outputs=([1],))}, np.ones((3, 2)), np.ones((3, 1, 1)), r"^y = \(3, 1, 1\)"),
        ({}, np.array([[1.0], [np.nan]]), np.ones(2), r"^x\[1, 0\] = nan"),
    ],
)
def test_bad_input(options: dict, x: np.ndarray, y: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        RidgeReadout(**options).fit(x, y)


def test_bad_use() -> None:
    x, y = problem(5)
    readout = RidgeReadout().fit(x, y)
    with pytest.raises(InputError, match=r"^x = \(60, 11\): expected shape \(samples, 12\)"):
        readout.predict(x[:, :11])
    modules = RidgeReadout(io=IOMap(inputs=([0],), outputs=([1, 2],))).fit(x, y)
    with pytest.raises(InputError, match=r"^x = \(60, 13\): expected shape \(samples, 12\)"):
        modules.predict(np.hstack([x, x[:, :1]]))
    with pytest.raises(InputError, match=r"^parameters = 'alpha': expected one of penalties"):
        readout.set_params(alpha=1.0)
    with pytest.raises(DegenerateError, match=r"constant"):
        readout.score(x, np.ones((60, 3)))
    with pytest.raises(InputError, match=r"^y = \(2, 3\)"):
        readout.score(x, y[:2])
