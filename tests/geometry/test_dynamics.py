"""What moves an effective rank: the toy model, the attribution to eigenvalues, the ledger of blocks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from commissure.core.errors import DegenerateError, InputError
from commissure.core.moments import merge
from commissure.geometry.attribution import entropy_change, entropy_rate
from commissure.geometry.effective_rank import rankme
from commissure.geometry.ledger import block_ledger
from commissure.geometry.similarity import pair_moments
from commissure.geometry.spectra import Spectrum
from commissure.geometry.toy import ToySetting, _start, run_toy


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Toy model


@pytest.mark.parametrize("seed", range(5))
def test_the_clustered_start_falls_rises_and_falls(seed: int) -> None:
    found = run_toy(seed=seed)
    dip = int(found.rankme[:100].argmin())
    peak = dip + int(found.rankme[dip:].argmax())
    assert 10 <= dip <= 20
    assert found.rankme[dip] < found.rankme[0] - 0.02
    assert 140 <= peak <= 240
    assert found.rankme[peak] > 1.998
    assert found.rankme[-1] < found.rankme[peak] - 0.003
    assert (np.diff(found.loss) < 0).all()


def test_the_last_fall_passes() -> None:
    assert run_toy(n_steps=3000).rankme[-1] > 1.998


def test_most_other_starts_do_not_turn_down() -> None:
    falls = [_fall(run_toy(ToySetting(start="iid"), seed=seed).rankme) for seed in range(10)]
    assert sum(fall > 1e-3 for fall in falls) <= 3
    assert _fall(run_toy(ToySetting(dim=3)).rankme) < 1e-3
    assert _fall(run_toy(ToySetting(loss="squared")).rankme) < 1e-3


def _fall(ranks: np.ndarray) -> float:
    dip = int(ranks[:100].argmin())
    return float(ranks[dip:].max() - ranks[-1])


def test_a_flow_conserves_what_descent_changes_in_proportion_to_its_steps() -> None:
    coarse, fine = (run_toy(lr=lr, n_steps=round(3 / lr)).conserved[-1] for lr in (1e-2, 1e-3))
    assert coarse / fine == pytest.approx(10, abs=0.5)


@pytest.mark.parametrize("loss", ["cross_entropy", "squared"])
def test_one_step_is_autograds(loss) -> None:
    setting = ToySetting(start="iid", loss=loss)
    found = run_toy(setting, lr=0.1, n_steps=1)
    labels = np.repeat(np.arange(4), setting.counts)
    f, w = (torch.from_numpy(array).requires_grad_() for array in _start(setting, labels, 0))
    y = torch.nn.functional.one_hot(torch.from_numpy(labels), 4).double()
    z = f @ w
    total = torch.nn.functional.cross_entropy(z, y) if loss == "cross_entropy" else ((z - y) ** 2).sum(1).mean() / 2
    total.backward()
    assert f.grad is not None
    after = torch.linalg.svdvals(f.detach() - 0.1 * f.grad) ** 2
    np.testing.assert_allclose(found.eigenvalues[1], after.numpy(), rtol=1e-12)
    assert found.loss[0] == pytest.approx(float(total.detach()), rel=1e-12)


def test_bad_toys() -> None:
    for setting, message in (
        (ToySetting(counts=(2,)), "counts"),
        (ToySetting(counts=(2, 0)), "counts"),
        (ToySetting(dim=1), "dim"),
        (ToySetting(dim=0, start="iid"), "dim"),
        (ToySetting(loss="hinge"), "loss"),
        (ToySetting(start="zero"), "start"),
        (ToySetting(jitter=-1), "jitter"),
    ):
        with pytest.raises(InputError, match=message):
            run_toy(setting)
    for arguments in ({"lr": math.nan}, {"n_steps": 0}, {"n_steps": 1.5}):
        with pytest.raises(InputError, match=next(iter(arguments))):
            run_toy(**arguments)


# Attribution


def test_the_rate_is_the_derivative_of_the_entropy() -> None:
    rng = np.random.default_rng(0)
    values, growth, h = np.sort(rng.gamma(1.0, size=30))[::-1], rng.standard_normal(30), 1e-5

    def entropy(t: float) -> float:
        return math.log(rankme(Spectrum.of(values * np.exp(t * growth))))

    rate = entropy_rate(values, growth).sum()
    assert rate == pytest.approx((entropy(h) - entropy(-h)) / (2 * h), rel=1e-6)
    p = values / values.sum()
    assert rate == pytest.approx(-(p @ (growth * np.log(p)) - (p @ growth) * (p @ np.log(p))), rel=1e-12)


def test_parts_add_up_to_the_change() -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        a, b = (Spectrum.of(rng.gamma(0.5, size=20) + 1e-6) for _ in range(2))
        found = entropy_change(a, b)
        assert found.total == pytest.approx(math.log(rankme(b) / rankme(a)), abs=1e-9)
        assert found.parts.sum() == pytest.approx(found.total, abs=1e-12)
        assert found.bands == ((1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (17, 20))


def test_the_band_that_grew_is_named() -> None:
    """Only the largest eigenvalue grows: the entropy falls."""
    values = np.arange(1.0, 33.0) ** -1.0
    grown = values * np.r_[2.0, np.ones(31)]
    found = entropy_change(Spectrum.of(values), Spectrum.of(grown), bands=[(1, 1), (2, 32)])
    assert found.total < 0
    shrunk = entropy_change(Spectrum.of(values), Spectrum.of(values * np.r_[np.ones(16), np.full(16, 0.1)]))
    assert shrunk.parts[-1] == min(shrunk.parts)


def test_bad_changes() -> None:
    one, two = Spectrum.of(np.ones(3)), Spectrum.of(np.ones(4))
    with pytest.raises(InputError, match="after"):
        entropy_change(one, two)
    with pytest.raises(DegenerateError):
        entropy_change(one, Spectrum.of(np.array([1.0, 1.0, 0.0])))
    for band in ((0, 1), (2, 1), (1, 4), (1,), (1.0, 2)):
        with pytest.raises(InputError, match=r"bands\[0\]"):
            entropy_change(one, one, bands=[band])


# Ledger


def test_the_ledger_of_a_residual_net_telescopes() -> None:
    x = normal(500, 6) * torch.arange(1, 7)
    start, ledgers = x, []
    for k in range(4):
        update = torch.tanh(x @ normal(6, 6, seed=k + 1))
        ledgers.append(block_ledger(x, update))
        one = ledgers[-1]
        assert one.change == pytest.approx(one.overlap + one.block + one.interference, abs=1e-12)
        h = -one.weight * math.log(one.weight) - (1 - one.weight) * math.log(1 - one.weight)
        assert -1e-12 <= one.overlap <= h + 1e-12
        assert one.after == pytest.approx(math.log(rankme(x + update)), abs=1e-9)
        x = x + update
    total = sum(one.overlap + one.block + one.interference for one in ledgers)
    assert total == pytest.approx(math.log(rankme(x) / rankme(start)), abs=1e-9)


def test_subspaces_apart_and_the_same() -> None:
    a = normal(2000, 4)
    a = (a - a.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(a.T))).T  # white, to rounding
    x, update = torch.cat([a[:, :2], 0 * a[:, :2]], 1), torch.cat([0 * a[:, :2], a[:, 2:]], 1)
    apart = block_ledger(x, update)
    assert apart.overlap == pytest.approx(math.log(2), abs=1e-9)
    assert (apart.block, apart.interference) == (pytest.approx(0, abs=1e-9), pytest.approx(0, abs=1e-9))
    same = block_ledger(x, 2 * x)
    assert (same.overlap, same.block, same.interference) == (pytest.approx(0, abs=1e-9),) * 3


def test_a_ledger_from_moments() -> None:
    x, update = normal(100, 3), normal(100, 3, seed=1)
    joint = merge(pair_moments(x[:40], update[:40]), pair_moments(x[40:], update[40:]))
    np.testing.assert_allclose(block_ledger(joint), block_ledger(x, update), atol=1e-12)


def test_bad_ledgers() -> None:
    x = normal(9, 3)
    for call, message in (
        (lambda: block_ledger(x), "update"),
        (lambda: block_ledger(x, normal(9, 4)), "update"),
        (lambda: block_ledger(x, normal(8, 3)), "9 rows"),
        (lambda: block_ledger(pair_moments(x, x), x), "x"),
        (lambda: block_ledger(pair_moments(x, normal(9, 4))), "x"),
    ):
        with pytest.raises(InputError, match=message):
            call()
    for pair in ((x, torch.zeros_like(x)), (x, -x)):
        with pytest.raises(DegenerateError):
            block_ledger(*pair)
