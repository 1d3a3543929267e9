"""The bench measures what it says: turns, ratios, errors, sizes where it loses; it asserts no time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import FrozenInstanceError
from itertools import count

import numpy as np
import pytest
import torch
from torch import Tensor

from commissure.mesa import bench
from commissure.mesa.bench import (
    CONTENDERS,
    FLOORS,
    OURS,
    RIVAL,
    Inputs,
    LayerRow,
    Range,
    bench_layer,
    break_even,
    draw,
)
from commissure.nn.mesa import mesa_attention


def test_contenders_take_turns_and_the_first_round_is_not_counted() -> None:
    calls: list[str] = []
    clock = map(float, count())
    contenders = (lambda: calls.append("a"), lambda: (calls.append("b"), next(clock)))
    spent = bench.alternate(contenders, repeats=3, clock=lambda: next(clock))
    assert "".join(calls) == "abababab"
    assert spent.tolist() == [[1.0] * 3, [2.0] * 3]


def test_a_gain_is_the_ratio_of_each_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    times = np.array([[4.0, 6.0, 9.0], [2.0, 1.0, 3.0]])
    monkeypatch.setattr(bench, "alternate", lambda *_, **__: times)
    rival, ours = bench_layer(batch=1, time=2, dim=4, heads=1, names=(OURS,))
    assert (rival.contender, ours.contender) == (RIVAL, OURS)
    assert rival.gain == Range(1.0, 1.0, 1.0)
    assert ours.gain == Range(2.0, 3.0, 6.0)
    assert ours.us_a_token == pytest.approx(2.0 * 1e6 / 2)
    with pytest.raises(FrozenInstanceError):
        ours.gain = rival.gain  # type: ignore[misc]


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "training"])
def test_every_contender_solves_the_problem_or_is_a_floor(backward: bool) -> None:
    rows = bench_layer(batch=2, time=128, dim=8, heads=4, gates="mixed", backward=backward, repeats=1)
    assert {row.contender for row in rows} == set(CONTENDERS)
    for row in rows:
        assert row.us_a_token > 0
        limit = {"CG to 1e-4": 1e-3, "literal CG-30": 1e-2}.get(row.contender, 1e-5)
        assert np.isnan(row.error) if row.contender in FLOORS else row.error < limit, row.contender


def test_a_wrong_contender_has_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = CONTENDERS[OURS]
    monkeypatch.setitem(CONTENDERS, OURS, lambda x: exact(x) * 1.01)
    _, ours = bench_layer(batch=1, time=128, dim=8, names=(OURS,), repeats=1)
    assert 5e-3 < ours.error < 2e-2


@pytest.mark.parametrize("time", [1, 64, 100])
def test_the_reference_of_the_tail_is_the_end_of_the_whole(time: int) -> None:
    inputs = draw(3, batch=2, time=time, dim=5, gates="mixed")
    whole = mesa_attention(*(x.double() for x in inputs), solver="sequential").output
    torch.testing.assert_close(bench.reference_tail(inputs), whole[:, -bench.TAIL :], rtol=0, atol=1e-12)


def test_inputs_are_reproducible_and_legal() -> None:
    for gates in ("benign", "mixed"):
        x, again = (draw(1, batch=2, time=400, dim=16, heads=6, gates=gates) for _ in range(2))  # type: ignore[arg-type]
        assert all(torch.equal(a, b) for a, b in zip(x, again, strict=True))
        torch.testing.assert_close(x.k.norm(dim=-1), torch.ones(2, 400, 6))
        assert (x.g < 0).all()
        assert ((x.beta > 0) & (x.beta < 1)).all()
        rates = x.g.exp().mean((0, 1))
        expected = (
            torch.tensor([0.9975, 0.989, 0.9525, 0.69, 0.9975, 0.989]) if gates == "mixed" else torch.tensor(0.99)
        )
        torch.testing.assert_close(rates, expected.expand(6), rtol=0, atol=5e-3)


def test_threads_are_given_back() -> None:
    before = torch.get_num_threads()
    seen: list[int] = []

    def contender(x: Inputs) -> Tensor:
        seen.append(torch.get_num_threads())
        return x.v

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CONTENDERS, OURS, contender)
        bench_layer(batch=1, time=8, dim=4, names=(OURS,), threads=2, repeats=1)
    assert set(seen) == {2}
    assert torch.get_num_threads() == before


def row(contender: str, us: float, **changes: object) -> LayerRow:
    fields = {"gates": "benign", "batch": 1, "time": 512, "dim": 64, "threads": 1, "backward": False} | changes
    return LayerRow(contender, us_a_token=us, gain=Range(1, 1, 1), error=0.0, **fields)  # type: ignore[arg-type]


def test_break_even_names_the_sizes_where_the_kernel_loses() -> None:
    rows = [
        *(row(OURS, 2.0), row(RIVAL, 8.0), row("gated linear attention", 0.5)),
        *(row(OURS, 9.0, dim=128), row("CG to 1e-4", 4.5, dim=128), row("hybrid", 3.0, dim=256)),
    ]
    (line,) = break_even(rows)
    assert line.startswith("CG to 1e-4 is 2.00x as fast as the Cholesky kernel: forward, benign gates")
    assert "dim 128" in line


def test_kernel_rate_is_operations_over_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "alternate", lambda *_, **__: np.array([[1e-3, 2e-3], [1e-2, 1e-2]]))
    found = bench.bench_kernel(dim=4, time=10)
    tokens, sgemm = 10 * 4, 40 * 2 * 256**3 / 1e-2
    assert found.gflops == pytest.approx(1e-9 * tokens * (64 / 3 + 48) * np.median([1e3, 0.5e3]))
    assert found.sgemm_gflops == pytest.approx(1e-9 * sgemm)
    assert found.share.high == pytest.approx(tokens * (64 / 3 + 48) / 1e-3 / sgemm)


def test_decoding_compares_the_layer_with_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs: list[Tensor] = []

    def alternate(contenders: tuple[Callable[[], tuple[Tensor, ...]], ...], **_: object) -> np.ndarray:
        outputs.extend(contender()[0] for contender in contenders)
        return np.array([[1e-6, 2e-6], [8e-6, 8e-6]] if len(contenders) == 2 else [[3e-5]])

    monkeypatch.setattr(bench, "alternate", alternate)
    found = bench.bench_decode(batch=2, heads=3, dim=16)
    ours, loop, literal = outputs
    torch.testing.assert_close(loop, ours, rtol=0, atol=1e-5)
    torch.testing.assert_close(literal, ours, rtol=0, atol=1e-3)
    assert found.gain == Range(4.0, 6.0, 8.0)
    assert (found.mesa_us, found.cg_us, found.literal_us) == pytest.approx((1.5, 8.0, 30.0))


def test_tables_print(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench, "_grid", lambda quick: [("benign", 1, 64, 8)])
    monkeypatch.setattr(bench, "TWO_THREADS", ((64, 8),))
    monkeypatch.setattr(bench, "alternate", lambda contenders, **_: np.ones((len(contenders), 2)))
    bench.print_tables(bench.bench_tables())
    out = capsys.readouterr().out
    for text in ("kernel beside sgemm(256)", "decoding one token", "forward and backward", "2 threads", "literal"):
        assert text in out
    assert "The Cholesky kernel loses at none of these sizes." in out.replace("\n", " ")
