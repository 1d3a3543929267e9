"""Readout moments and factors: against the rows, any blocks, any merge, scores from moments alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from commissure.core.errors import DegenerateError, InputError
from commissure.core.ridge_path import ridge_path
from commissure.reservoirs.moments import ReadoutFactor, ReadoutMoments, joint_columns

KINDS = [ReadoutMoments, ReadoutFactor]
SIZES = {"n_features": 4, "n_outputs": 2}


def batch(seed: int, time: int, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """States (*shape, 4, time) with a mean, and targets (*shape, 2, time)."""
    rng = np.random.default_rng(seed)
    x, noise = rng.normal(size=(*shape, 4, time)) + 0.7, rng.normal(size=(*shape, 2, time))
    return torch.from_numpy(x), torch.from_numpy(noise + x[..., :2, :])


def product(held: ReadoutMoments | ReadoutFactor) -> np.ndarray:
    if isinstance(held, ReadoutMoments):
        return held.products()
    return held.triangle.numpy().swapaxes(-1, -2) @ held.triangle.numpy()


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=25)
@given(cuts=st.lists(st.integers(1, 20), min_size=1, max_size=5), seed=st.integers(0, 100))
def test_blocks_of_any_length_and_their_merge_are_one_product(kind: type, cuts: list[int], seed: int) -> None:
    x, y = batch(seed, sum(cuts), 3, 2)
    z = np.concatenate([np.ones((3, 2, 1, sum(cuts))), x, y], -2)
    expected = z @ z.swapaxes(-1, -2)
    streamed, parts = kind.empty((3, 2), **SIZES), []
    for a, b in zip(x.split(cuts, -1), y.split(cuts, -1), strict=True):
        streamed = streamed.update(joint_columns(a, b))
        parts.append(kind.empty((3, 2), **SIZES).update(joint_columns(a, b)))
    merged = parts[-1]
    for part in parts[-2::-1]:
        merged = merged.merge(part)
    for held in (streamed, merged):
        assert held.n_samples == sum(cuts)
        assert np.max(np.abs(product(held) - expected)) <= 1e-12 * np.max(np.abs(expected))


@pytest.mark.parametrize("kind", KINDS)
def test_training_and_test_errors_need_no_rows(kind: type) -> None:
    (x, y), (u, v) = batch(0, 50, 3), batch(1, 40, 3)
    train = kind.empty((3,), **SIZES).update(joint_columns(x, y))
    test = kind.empty((3,), **SIZES).update(joint_columns(u, v))
    path = train.path([1e-3, 1.0, 100.0])
    for i in range(3):
        rows = ridge_path(x[i].T.numpy(), y[i].T.numpy(), [1e-3, 1.0, 100.0], intercept=False)
        assert np.max(np.abs(path.coefficients[:, i] - rows.coefficients)) <= 1e-10
        assert np.max(np.abs(path.gcv[:, i] - rows.gcv)) <= 1e-10
    for k in range(3):
        scores = test.score(path.coefficients[k])
        for i in range(3):
            predicted, target = u[i].T.numpy() @ path.coefficients[k, i], v[i].T.numpy()
            errors = ((target - predicted) ** 2).sum(0) / ((target - target.mean(0)) ** 2).sum(0)
            r = [np.corrcoef(predicted[:, j], target[:, j])[0, 1] for j in range(2)]
            assert np.max(np.abs(scores.r2[i] - (1 - errors))) <= 1e-10
            assert np.max(np.abs(scores.squared_correlation[i] - np.square(r))) <= 1e-10


def test_scikit_learn_scores_the_same() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    x, y = batch(2, 60)
    moments = ReadoutMoments.empty((), **SIZES).update(joint_columns(x, y))
    coefficients = np.random.default_rng(0).normal(size=(4, 2))
    expected = metrics.r2_score(y.T.numpy(), x.T.numpy() @ coefficients, multioutput="raw_values")
    assert np.max(np.abs(moments.score(coefficients).r2 - expected)) <= 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_float32_states_are_summed_in_float64(kind: type) -> None:
    x, y = batch(3, 1000, 2)
    held = kind.empty((2,), **SIZES).update(joint_columns(x.float(), y))
    z = np.concatenate([np.ones((2, 1, 1000)), x.float().double(), y], -2)
    expected = z @ z.swapaxes(-1, -2)
    assert np.max(np.abs(product(held) - expected)) <= 1e-12 * np.max(np.abs(expected))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("features", "time"), [(4, 300), (50, 256), (7, 5)])
def test_one_of_a_batch_is_the_same_alone_to_the_last_bit(kind: type, features: int, time: int) -> None:
    rng = np.random.default_rng(0)
    z = torch.from_numpy(rng.normal(size=(6, 5, 1 + features + 3, time)))
    together = kind.empty((6, 5), n_features=features, n_outputs=3).update(z).update(z * 2)
    for i, j in ((0, 0), (5, 4), (2, 3)):
        one = z[i : i + 1, j : j + 1]
        alone = kind.empty((1, 1), n_features=features, n_outputs=3).update(one).update(one * 2)
        assert (alone[0][0, 0] == together[0][i, j]).all()
    assert (together.select(np.array([3, 1]))[0] == together[0][[3, 1]]).all()


def test_a_factor_keeps_digits_that_products_lose() -> None:
    rng = np.random.default_rng(0)
    u, v = np.linalg.qr(rng.normal(size=(90, 4)))[0], np.linalg.qr(rng.normal(size=(4, 4)))[0]
    x = u * np.logspace(0, -9, 4) @ v.T
    truth = rng.normal(size=(4, 2))
    columns = joint_columns(torch.from_numpy(x.T.copy()), torch.from_numpy((x @ truth).T.copy()))
    factor, moments = (kind.empty((), **SIZES).update(columns) for kind in (ReadoutFactor, ReadoutMoments))
    path = factor.path([1e-26])
    assert np.max(np.abs(path.coefficients[0] - truth)) <= 1e-5
    assert (factor.score(path.coefficients[0]).r2 > 1 - 1e-12).all()
    with pytest.raises(DegenerateError, match=r"below"):
        moments.path([1e-26])


def test_sub_precision_is_fifty_eps_of_the_largest_eigenvalue() -> None:
    x, y = batch(4, 80, 5)
    moments = ReadoutMoments.empty((5,), **SIZES).update(joint_columns(x, y))
    largest = np.array([np.linalg.norm(each.numpy(), 2) ** 2 for each in x])
    limit = 50 * np.finfo(np.float64).eps * np.sort(largest)[2]
    assert moments.is_sub_precision(limit).tolist() == (limit < 50 * np.finfo(np.float64).eps * largest).tolist()
    assert not moments.is_sub_precision(1e-6).any()
    assert moments.is_sub_precision(0.0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_constant_targets_and_silent_states(kind: type) -> None:
    x, y = batch(5, 30)
    with pytest.raises(DegenerateError, match=r"target 1 is constant"):
        kind.empty((), **SIZES).update(joint_columns(x, torch.stack([y[0], torch.full((30,), 2.0)]))).score(
            np.zeros((4, 2))
        )
    silent = kind.empty((), **SIZES).update(joint_columns(torch.zeros(4, 30), y))
    scores = silent.score(silent.path([1.0]).coefficients[0])
    assert (scores.squared_correlation == 0).all()
    assert (scores.r2 <= 0).all()


def test_updates_leave_what_they_are_given_alone() -> None:
    x, y = batch(6, 30)
    columns = joint_columns(x, y)
    before = columns.clone()
    for kind in KINDS:
        empty = kind.empty((), **SIZES)
        empty.update(columns)
        assert (empty[0] == 0).all()
    assert (columns == before).all()


def test_bad_input() -> None:
    x, y = batch(7, 30)
    with pytest.raises(InputError, match=r"^y = \(2, 29\)"):
        joint_columns(x, y[:, :29])
    moments, factor = (kind.empty((), **SIZES) for kind in KINDS)
    with pytest.raises(InputError, match=r"^columns = .*float64, shape \(7, 'time'\)"):
        moments.update(joint_columns(x, y).float())
    with pytest.raises(InputError, match=r"^columns = "):
        factor.update(joint_columns(x[:3], y))
    for held, kind in ((moments, ReadoutMoments), (factor, ReadoutFactor)):
        with pytest.raises(InputError, match=r"^other = "):
            held.merge(kind.empty((), n_features=3, n_outputs=3))
    with pytest.raises(InputError, match=r"^n_outputs = 0"):
        ReadoutMoments.empty((), n_features=1, n_outputs=0)
