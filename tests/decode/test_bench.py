"""The bench measures what it says: turns, sizes, ratios; it asserts no time."""

from __future__ import annotations

from collections import Counter
from itertools import count

import pytest

from commissure.cli import main
from commissure.decode import bench
from commissure.decode.bench import alternate, bench_drift, bench_encoder, contenders, print_tables, time_steps
from commissure.native import backend

needs_kernels = pytest.mark.skipif(backend() == "python", reason="built without the C++ kernels")


def test_contenders_take_turns_and_warm_rounds_are_not_counted() -> None:
    calls: list[str] = []
    spent = alternate((lambda: calls.append("a"), lambda: calls.append("b")), repeats=3, warmup=1)
    assert "".join(calls) == "abababab"
    assert [len(seconds) for seconds in spent] == [3, 3]


def test_the_encoder_row_counts_its_spikes() -> None:
    row = bench_encoder(dim=32, n_chunks=12, mean_spikes=8.0, n_units=10, repeats=2)
    assert row.n_spikes < row.padded_spikes
    assert row.padded_spikes % row.n_chunks == 0
    assert row.ratio == row.padded.median / row.ragged.median


@needs_kernels
def test_every_contender_is_timed_for_its_own_number_of_chunks(capsys: pytest.CaptureFixture[str]) -> None:
    counts = {"C++ engine": 8, "torch engine": 6, "padded eager": 4, "window decoder": 2}
    steps = time_steps(contenders(), n_spikes=20, n_chunks=counts, n_blocks=2)
    assert {name: len(timed.cpu) for name, timed in steps.items()} == counts
    assert all((timed.cpu > 0).all() and (timed.wall > 0).all() for timed in steps.values())
    assert (steps["C++ engine"].poll <= steps["C++ engine"].cpu).all()
    print_tables({"encoder": [bench_encoder(dim=32, n_chunks=4, mean_spikes=3.0, repeats=1)]})
    assert "encoder" in capsys.readouterr().out


@needs_kernels
def test_drift_compares_an_aged_and_a_new_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    steps, clock = Counter[int](), count()
    monkeypatch.setattr(bench.time, "thread_time", lambda: float(next(clock)))

    def step(stepper: object, times: object, units: object, chunk: int) -> float:
        steps[id(stepper)] += 1
        if steps[id(stepper)] > 1200:  # an aged stream that has become slower
            for _ in range(4):
                next(clock)
        return 0.0

    monkeypatch.setattr(bench._StreamStepper, "__call__", step)
    assert bench_drift(minutes=2) == 5.0
    assert sorted(steps.values()) == [1200, 2400]


@needs_kernels
@pytest.mark.soak
def test_the_command_prints_every_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["decode", "bench", "--repeats", "40"]) == 0
    out = capsys.readouterr().out
    for text in ("possm-ss gru", "possm-ss s4d", "possm-ss mamba", "training encoder", "window decoder"):
        assert text in out
