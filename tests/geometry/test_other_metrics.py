"""Metrics that need more than one covariance: pairs, views, neighbors, sequences; and rows that come in batches."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from commissure.core.errors import DegenerateError, InputError
from commissure.core.moments import merge
from commissure.geometry.accumulator import CovarianceAccumulator
from commissure.geometry.discriminant import discriminant_spectrum, lidar
from commissure.geometry.effective_rank import rankme
from commissure.geometry.neighbors import two_nn
from commissure.geometry.sequences import curvature, prompt_entropy
from commissure.geometry.similarity import linear_cka, pair_moments, principal_angles
from commissure.geometry.spectra import spectrum


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Pairs


def test_cka_is_that_of_the_gram_matrices() -> None:
    x, y = normal(40, 5), normal(40, 7, seed=1) + normal(40, 1, seed=2)
    h = np.eye(40) - 1 / 40
    k, l = (h @ (z @ z.T).numpy() @ h for z in (x, y))
    expected = (k * l).sum() / math.sqrt((k * k).sum() * (l * l).sum())
    assert linear_cka(x, y) == pytest.approx(expected, rel=1e-12)
    blocks = [pair_moments(x[:15], y[:15]), pair_moments(x[15:], y[15:])]
    assert linear_cka(merge(*blocks), dim=5) == pytest.approx(expected, rel=1e-12)
    turn = torch.linalg.qr(normal(7, 7, seed=3)).Q
    assert linear_cka(x, 5 * y @ turn + 1) == pytest.approx(expected, rel=1e-12)
    assert abs(linear_cka(x, y * torch.arange(1, 8)) - expected) > 1e-3


@pytest.mark.parametrize("angle", [0.0, 1e-9, 1e-4, 0.3, math.pi / 4, 1.2, math.pi / 2])
def test_an_angle_between_planes_is_found(angle: float) -> None:
    """Planes that share one axis and meet at `angle` in the other."""
    x = torch.diag(torch.tensor([3.0, 2.0, 0.0], dtype=torch.float64))
    y = x.clone()
    y[1] = torch.tensor([0.0, 2 * math.cos(angle), 2 * math.sin(angle)])
    both = [torch.cat([z, -z]) for z in (x, y)]
    np.testing.assert_allclose(principal_angles(*both, k=2), [0.0, angle], atol=1e-12)


def test_principal_angles_are_scipys() -> None:
    from scipy.linalg import subspace_angles

    x, y = normal(60, 6) * torch.arange(1, 7), normal(60, 6, seed=1) * torch.arange(6, 0, -1)
    u, v = (np.linalg.svd((z - z.mean(0)).numpy())[2][:3].T for z in (x, y))
    np.testing.assert_allclose(principal_angles(x, y, k=3), np.sort(subspace_angles(u, v)), atol=1e-12)


def test_bad_pairs() -> None:
    x = normal(10, 3)
    for call, message in (
        (lambda: linear_cka(x, normal(9, 3)), "10 rows"),
        (lambda: linear_cka(x), "y"),
        (lambda: linear_cka(pair_moments(x, x)), "dim"),
        (lambda: linear_cka(pair_moments(x, x), dim=6), "dim"),
        (lambda: principal_angles(x, normal(10, 4), k=1), "3 components"),
        (lambda: principal_angles(x, x, k=4), "k"),
    ):
        with pytest.raises(InputError, match=message):
            call()
    with pytest.raises(DegenerateError, match="variance"):
        linear_cka(x, torch.ones(10, 2, dtype=torch.float64))


# Views


def views(n: int = 400, q: int = 12) -> torch.Tensor:
    """Four directions tell inputs apart, with unequal strengths; views differ in all eight, also unequally."""
    strengths = torch.tensor([3.0, 2.0, 1.0, 1.0, 0, 0, 0, 0], dtype=torch.float64)
    apart = torch.linspace(0.2, 1.0, 8, dtype=torch.float64)
    return normal(n, 1, 8) * strengths + normal(n, q, 8, seed=1) * apart


def test_lidar_is_the_rank_of_generalized_eigenvalues() -> None:
    x = views()
    means = x.mean(1)
    between = np.cov(means.numpy(), rowvar=False)
    within = sum(np.cov(one.numpy(), rowvar=False) for one in x) / len(x) + 1e-6 * np.eye(8)
    values = np.linalg.eigvals(np.linalg.solve(within, between)).real
    np.testing.assert_allclose(discriminant_spectrum(x), np.sort(values)[::-1], rtol=1e-9)
    p = values / values.sum()
    assert lidar(x) == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-9)


def test_lidar_of_a_known_mixture() -> None:
    """Population values: eigenvalues strength^2 / spread^2 + 1 / views, in each direction."""
    strengths, apart = np.array([3.0, 2, 1, 1, 0, 0, 0, 0]), np.linspace(0.2, 1.0, 8)
    values = (strengths / apart) ** 2 + 1 / 12
    p = values / values.sum()
    assert lidar(views(4000)) == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=0.02)


def test_lidar_is_not_that_of_the_squared_spectrum() -> None:
    """What a public program computes instead: the matrix itself taken as rows of data."""
    x = views()
    means, apart = x.mean(1), (x - x.mean(1, keepdim=True)).reshape(-1, 8)
    within = apart.T @ apart / len(x) + 1e-6 * torch.eye(8)
    root = torch.linalg.inv(torch.linalg.cholesky(within))
    matrix = root @ ((means - means.mean(0)).T @ (means - means.mean(0))) @ root.T
    assert abs(rankme(matrix, compat="reptrix") - lidar(x)) > 0.1


def test_lidar_ignores_invertible_maps() -> None:
    x, a = views(), normal(8, 8, seed=5)
    assert lidar(x @ a, delta=0.0) == pytest.approx(lidar(x, delta=0.0), rel=1e-8)


def test_bad_views() -> None:
    for bad in (normal(4, 3), normal(1, 3, 2), normal(3, 1, 2), None):
        with pytest.raises(InputError, match="views"):
            lidar(bad)
    with pytest.raises(InputError, match="delta"):
        lidar(views(4), delta=-1.0)
    with pytest.raises(DegenerateError, match="singular"):
        lidar(normal(3, 2, 8), delta=0.0)


# Neighbors


@pytest.mark.parametrize("dim", [1, 2, 5])
@pytest.mark.parametrize("discard", [None, 0.1])
def test_a_torus_has_its_dimension(dim: int, discard: float | None) -> None:
    """Uniform on a product of circles: curved, no border, `dim` angles in 2 dim + 3 coordinates."""
    angles = 2 * math.pi * torch.rand(3000, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    circles = torch.cat([angles.cos(), angles.sin(), torch.zeros(3000, 3)], 1)
    turn = torch.linalg.qr(normal(2 * dim + 3, 2 * dim + 3)).Q
    assert two_nn(circles @ turn, discard=discard) == pytest.approx(dim, rel=0.08)


def test_two_nn_by_hand() -> None:
    x = torch.tensor([[0.0], [1.0], [3.0], [3.0]], dtype=torch.float64)
    ratios = [3 / 1, 2 / 1, 3 / 2]
    assert two_nn(x) == pytest.approx(2 / sum(math.log(r) for r in ratios), rel=1e-12)


def test_bad_neighbors() -> None:
    with pytest.raises(DegenerateError, match="2 different rows"):
        two_nn(torch.tensor([[0.0], [1.0], [1.0]]))
    with pytest.raises(DegenerateError, match="lattice"):
        two_nn(torch.eye(4))
    with pytest.raises(InputError, match="discard"):
        two_nn(normal(9, 2), discard=1.0)


# Sequences


def test_prompt_entropy_is_the_mean_over_sequences() -> None:
    states = normal(3, 9, 4)
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[1, 5:] = False
    states[1, 5:] = math.nan
    expected = []
    for i, n in enumerate((9, 5, 9)):
        x = states[i, :n].numpy()
        p = np.linalg.eigvalsh(x @ x.T / np.trace(x @ x.T))
        p = p[p > 1e-12]
        expected.append(-(p * np.log(p)).sum())
    assert prompt_entropy(states, mask=mask) == pytest.approx(np.mean(expected), rel=1e-9)


def test_curvature_of_polygons_and_lines() -> None:
    n = 12
    angles = 2 * math.pi * torch.arange(n + 1, dtype=torch.float64) / n
    polygon = torch.stack([angles.cos(), angles.sin()], 1)[None]
    assert curvature(polygon) == pytest.approx(2 * math.pi / n, rel=1e-12)
    line = torch.arange(5.0)[None, :, None] * torch.ones(3)
    assert curvature(line) == pytest.approx(0, abs=1e-12)
    back = torch.tensor([[[0.0], [1.0], [0.0], [0.0], [0.0]]])
    assert curvature(back) == pytest.approx(math.pi, rel=1e-12)


def test_bad_sequences() -> None:
    for metric in (prompt_entropy, curvature):
        with pytest.raises(InputError, match="states"):
            metric(normal(3, 2))
        with pytest.raises(InputError, match="mask"):
            metric(normal(1, 3, 2), mask=torch.ones(1, 3))
        with pytest.raises(DegenerateError):
            metric(normal(1, 3, 2), mask=torch.zeros(1, 3, dtype=torch.bool))


# Batches


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 5), st.sampled_from(["raw", "unit"]))
def test_batches_are_their_rows(lengths: list[int], n_folds: int, frame) -> None:
    rows = normal(sum(lengths) + 1, 4) + 100
    acc = CovarianceAccumulator(4, n_folds=n_folds, frame=frame)
    for part in rows.split([*lengths, 1]):
        acc.update(part[:, None])
    assert acc.n_samples == len(rows)
    sizes = [len(range(k, len(rows), n_folds)) for k in range(n_folds)]
    assert [fold.n_samples for fold in acc.folds] == sizes
    np.testing.assert_allclose(acc.spectrum().values, spectrum(rows, frame=frame).values[:4], rtol=1e-9, atol=1e-14)


def test_accumulators_merge_and_forget() -> None:
    rows = normal(50, 3)
    parts = [CovarianceAccumulator(3) for _ in range(3)]
    for part, chunk in zip(parts, rows.split([20, 7, 23]), strict=True):
        part.update(chunk)
    parts[0].merge(*parts[1:])
    np.testing.assert_allclose(parts[0].spectrum().values, spectrum(rows).values, rtol=1e-12)
    assert parts[1].n_samples == 7
    parts[0].reset()
    assert parts[0].n_samples == 0
    with pytest.raises(DegenerateError):
        parts[0].spectrum()


def test_masked_rows_may_hold_anything() -> None:
    x = normal(4, 5, 3)
    mask = torch.ones(4, 5, dtype=torch.bool)
    mask[2, 3:], x[2, 3:] = False, math.nan
    acc = CovarianceAccumulator(3, n_folds=16)
    acc.update(x, mask=mask)
    np.testing.assert_allclose(acc.spectrum().values, spectrum(x[mask]).values, rtol=1e-12)
    found = acc.estimate(rankme, correction="half")
    assert found.value == pytest.approx(rankme(x[mask]), rel=1e-12)
    assert found.corrected is not None


def test_bad_batches() -> None:
    for arguments in ({"n_folds": 0}, {"n_folds": True}, {"frame": "sign"}):
        with pytest.raises(InputError, match=next(iter(arguments))):
            CovarianceAccumulator(3, **arguments)
    acc = CovarianceAccumulator(3)
    for bad in (normal(2, 4), None, torch.tensor(1.0)):
        with pytest.raises(InputError, match="x"):
            acc.update(bad)
    with pytest.raises(InputError, match="mask"):
        acc.update(normal(2, 3), mask=torch.ones(2))
    with pytest.raises(InputError, match=r"others\[0\]"):
        acc.merge(CovarianceAccumulator(3, n_folds=4))
