"""The benchmark: its rivals are right, its rows complete; no time is asserted."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from commissure.reservoirs import bench
from commissure.reservoirs.rivals import dense_states, loop_exponents, loop_states, module_scores, sparse_states

RIVALS = ("loop", "dense", "sparse")


@pytest.mark.parametrize("single", [False, True])
def test_rows_of_states(single: bool) -> None:
    rows = bench.bench_states(40, 0.1, rows=3, single=single, repeats=2, steps=5)
    assert tuple(row.rival for row in rows) == RIVALS
    for row in rows:
        assert (row.part, row.nodes, row.density, row.rows) == ("states", 40, 0.1, 3)
        assert row.dtype == ("float32" if single else "float64")
        assert 0 < row.gain.low <= row.gain.median <= row.gain.high
        assert row.ours > 0
        assert row.difference < 1e-12


def test_rows_of_the_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "EXPONENT_STEPS", 1)
    rows = bench.bench_sweep(length=150, repeats=1)
    assert [(row.part, row.dtype) for row in rows] == [
        (part, dtype) for dtype in ("float64", "float32") for part in ("sweep", "sweep + exponent")
    ]
    assert all(row.rows == 10 for row in rows)
    assert [row.rival for row in rows] == ["loop", "loop, QR of 1 steps x 1250"] * 2
    assert all(row.difference < 1e-5 for row in rows)
    assert rows[1].gain.median > rows[0].gain.median


@pytest.mark.skipif(not bench._STATUS.exists(), reason="peak memory is read from Linux's /proc")
def test_memory_is_that_of_the_run_alone() -> None:
    """The loop adds states, 50 MB; ours would add 170 if it kept them.  Peaks inherited from here would hide both."""
    held = np.ones(100_000_000)  # 800 MB, more than the child ever takes
    row = bench.bench_memory(length=6000)
    assert held[0] == 1
    assert (row.part, row.rival, row.dtype) == ("memory", "loop", "float64")
    loop = row.gain.low * max(row.ours, 1.0)
    assert row.ours < loop
    assert 40 < loop < 120


def test_every_size_and_precision_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(
        bench, "bench_states", lambda *size, rows, single, repeats: seen.append((*size, rows, single)) or ()
    )
    monkeypatch.setattr(bench, "bench_sweep", lambda *, repeats: ("sweep",))
    monkeypatch.setattr(bench, "bench_memory", lambda: "memory")
    assert bench.bench() == ("sweep",)
    assert seen == [(400, 0.1, rows, single) for rows in (1, 16, 64) for single in (False, True)]
    seen.clear()
    assert bench.bench(full=True) == ("sweep", "memory")
    assert {size[:2] for size in seen} == {(n, d) for n in (400, 1000, 5000) for d in (0.01, 0.03, 0.1)}
    assert len(seen) == 54


def test_gains_are_ratios_turn_by_turn() -> None:
    (one, two) = bench.gains(np.array([[1.0, 2.0, 1.0], [2.0, 2.0, 3.0], [1.0, 1.0, 1.0]]))
    assert (one.low, one.median, one.high) == (1.0, 2.0, 3.0)
    assert (two.low, two.median, two.high) == (0.5, 1.0, 1.0)


def test_contenders_take_turns() -> None:
    calls: list[str] = []
    spent = bench.alternate([lambda: calls.append("a"), lambda: calls.append("b")], repeats=2)
    assert "".join(calls) == "ababab"
    assert spent.shape == (2, 2)


def test_networks_have_the_edges_and_the_radius() -> None:
    weights = bench.random_network(60, 0.05)
    assert weights.nnz == 180
    assert np.abs(np.linalg.eigvals(weights.toarray())).max() == pytest.approx(0.9, rel=1e-8)


def test_rivals_agree_with_a_step_by_hand() -> None:
    rng = np.random.default_rng(0)
    w, w_in, x = rng.normal(size=(5, 5)), rng.normal(size=(2, 5)), rng.normal(size=(3, 4, 2))
    expected = np.zeros((3, 4, 5))
    for row in range(3):
        state = np.zeros(5)
        for t in range(4):
            state = expected[row, t] = np.tanh([w[:, j] @ state + w_in[:, j] @ x[row, t] for j in range(5)])
    tensors = [torch.from_numpy(array) for array in (w, x, w_in)]
    np.testing.assert_allclose(loop_states(w, x, w_in), expected, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(dense_states(*tensors), expected, rtol=1e-12, atol=1e-14)
    by_target = bench._torch_csr(bench.csr_array(w.T))
    np.testing.assert_allclose(sparse_states(by_target, *tensors[1:]), expected, rtol=1e-12, atol=1e-14)


def test_the_loop_measures_all_exponents() -> None:
    w = np.random.default_rng(1).normal(size=(4, 4))
    exponents = loop_exponents(w, np.zeros((400, 4)))
    assert exponents.sum() == pytest.approx(np.log(abs(np.linalg.det(w))), rel=1e-9)
    assert exponents[0] == pytest.approx(np.log(np.abs(np.linalg.eigvals(w)).max()), abs=0.01)


def test_the_ridge_of_each_module_is_scored_alone() -> None:
    rng = np.random.default_rng(2)
    x, test = rng.normal(size=(50, 4)), rng.normal(size=(40, 4))
    y = x[:, :2] @ np.array([[1.0], [2.0]])
    scores = module_scores(
        (x, y), (test, test[:, :2] @ [[1.0], [2.0]]), modules=[np.arange(2), np.arange(2, 4)], penalty=1e-9
    )
    assert scores[0] == pytest.approx(1.0, abs=1e-9)
    assert scores[1] < 0.5
