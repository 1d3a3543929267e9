"""What decoding costs: the streaming engines chunk by chunk, and the training encoder against the padded layout.

Latency: a step is push + poll + idle of one chunk, in CPU seconds of this thread; contenders take turns in blocks of
chunks in one process, so that a change of the machine's speed hits all of them.  The rivals of the C++ engine are the
same model in eager torch (our engine, and the layout of the public code) and a POYO-style decoder that re-runs its last
second at every chunk.  Sizes where a rival wins are printed like the others.

Source of the published figures: arXiv 2506.05320 (2.44 ms a chunk on a CPU).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float

from commissure.core.rng import generator, isolated
from commissure.decode.encoder import SpikeEncoder, SpikeTokens, encode_padded_reference
from commissure.decode.possm import POSSM
from commissure.decode.recording import SpikeRecording
from commissure.decode.streaming import StreamingDecoder
from commissure.decode.window import WindowDecoder

__all__ = [
    "EncoderTiming",
    "LatencyRow",
    "Steps",
    "Timing",
    "alternate",
    "bench_drift",
    "bench_encoder",
    "bench_latency",
    "bench_tables",
    "contenders",
    "print_tables",
    "time_steps",
]

N_UNITS = 300


class Timing(NamedTuple):
    """CPU seconds a call: median, smallest and largest over the repeats."""

    median: float
    low: float
    high: float


class EncoderTiming(NamedTuple):
    """One row of the training table: sizes, both layouts, and how many times less CPU the ragged one takes."""

    dim: int
    n_chunks: int
    n_spikes: int
    padded_spikes: int
    ragged: Timing
    padded: Timing
    ratio: float


def alternate(contenders: Sequence[Callable[[], object]], *, repeats: int, warmup: int = 2) -> list[list[float]]:
    """CPU seconds of each contender, called in turn `repeats` times after `warmup` rounds."""
    spent: list[list[float]] = [[] for _ in contenders]
    for i in range(warmup + repeats):
        for seconds, contender in zip(spent, contenders, strict=True):
            start = time.thread_time()
            contender()
            if i >= warmup:
                seconds.append(time.thread_time() - start)
    return spent


def summary(seconds: Sequence[float]) -> Timing:
    """Median and range."""
    return Timing(float(np.median(seconds)), min(seconds), max(seconds))


def bench_encoder(
    *, dim: int, n_chunks: int = 320, mean_spikes: float = 42.0, n_units: int = 300, repeats: int = 10, seed: int = 0
) -> EncoderTiming:
    """Forward and backward of the softmax encoder over `n_chunks` chunks, ragged against padded.

    Spike counts are negative binomial (Fano factor about 10, as population counts are), so padding to the fullest
    chunk costs about three times the spikes.
    """
    rng = generator(seed, "bench", dim)
    counts = rng.negative_binomial(mean_spikes / 9, 0.1, n_chunks)
    n = int(counts.sum())
    tokens = SpikeTokens(
        torch.from_numpy(rng.integers(0, n_units, n)),
        torch.from_numpy(rng.uniform(-0.025, 0.025, n)),
        torch.from_numpy(np.repeat(np.arange(n_chunks), counts)),
        n_chunks,
    )
    with isolated(seed, "bench"):
        encoder = SpikeEncoder(
            dim, chunk_s=0.05, kind="softmax", null_token="empty", t_min=1e-4, t_max=10.0, dropout=0.0
        )
        embedding = torch.randn(n_units, dim, requires_grad=True)
        probe = torch.randn(n_chunks, dim)

    def run(encode: Callable[..., torch.Tensor]) -> None:
        encoder.zero_grad(set_to_none=True)
        embedding.grad = None
        (encode(tokens, embedding) * probe).sum().backward()

    contenders = (lambda: run(encoder), lambda: run(lambda *x: encode_padded_reference(encoder, *x)))
    ragged, padded = (summary(s) for s in alternate(contenders, repeats=repeats))
    return EncoderTiming(dim, n_chunks, n, n_chunks * int(counts.max()), ragged, padded, padded.median / ragged.median)


class Steps(NamedTuple):
    """Timed chunks of one contender, seconds each: CPU of the whole step and of its parts, and the step's wall time."""

    cpu: Float[np.ndarray, " chunks"]
    poll: Float[np.ndarray, " chunks"]
    wall: Float[np.ndarray, " chunks"]


class LatencyRow(NamedTuple):
    """One contender at one spike count: CPU microseconds a chunk, and its median over the C++ engine's."""

    contender: str
    n_spikes: int
    median_us: float
    low_us: float
    p99_us: float
    over_cpp: float


def untrained(*, backbone: str = "gru", n_units: int = N_UNITS, seed: int = 0) -> POSSM:
    """A `possm-ss` with untrained weights that knows one session, "bench"."""
    model = POSSM.from_preset("possm-ss", backbone=backbone, seed=seed)
    ids = tuple(f"unit-{i}" for i in range(n_units))
    once = np.ones((1, n_units), np.int64)
    blank = SpikeRecording.from_counts(once, 0.05, behavior=np.zeros((1, 2)), unit_ids=ids, session="bench")
    model.add_session(blank)
    return model.eval()


def contenders(*, backbone: str = "gru", seed: int = 0) -> dict[str, Callable[[np.ndarray, np.ndarray, int], Any]]:
    """Steps to time: each takes (times in the stream, units, chunk) and does one chunk."""
    model = untrained(backbone=backbone, seed=seed)
    steppers: dict[str, Any] = {}
    for name, engine in (("C++ engine", "c++"), ("torch engine", "torch")):
        steppers[name] = _StreamStepper(StreamingDecoder(model, session="bench", engine=engine))  # type: ignore[arg-type]
    steppers["padded eager"] = _PaddedStepper(model)
    steppers["window decoder"] = _WindowStepper(seed)
    return steppers


class _StreamStepper:
    """push + poll, then idle."""

    def __init__(self, decoder: StreamingDecoder) -> None:
        self.decoder = decoder
        decoder.reset(0.0)

    def __call__(self, times: np.ndarray, units: np.ndarray, chunk: int) -> float:
        decoder = self.decoder
        decoder.push(times, units)
        begin = time.thread_time()
        assert decoder.poll((chunk + 1) * decoder.chunk_s) is not None
        poll = time.thread_time() - begin
        decoder.idle()
        return poll


class _PaddedStepper:
    """The public code's layout in eager torch with the state kept: every spike its own key and value."""

    def __init__(self, model: POSSM) -> None:
        self.model, self.state = model, model.init_state(1)
        self.offsets = torch.arange(5, dtype=torch.float64) * 0.01 - 0.05

    @torch.inference_mode()
    def __call__(self, times: np.ndarray, units: np.ndarray, chunk: int) -> float:
        model = self.model
        offset = torch.from_numpy(times - (chunk + 0.5) * 0.05)
        tokens = SpikeTokens(torch.from_numpy(units), offset, torch.zeros(len(units), dtype=torch.long), 1)
        latent = encode_padded_reference(model.encoder, tokens, model.unit_embedding)
        hidden, backbone = model.backbone.step(latent, self.state.backbone)
        context = torch.cat((self.state.history, hidden.unsqueeze(1)), 1)
        row = torch.zeros(5, dtype=torch.long)
        model.readout(
            context, model.session_embedding, row=row, chunk=row, offset=self.offsets, n_before=self.state.n_chunks
        )
        self.state = self.state._replace(backbone=backbone, history=context[:, 1:], n_chunks=self.state.n_chunks + 1)
        return float("nan")


class _WindowStepper:
    """POYO's way: the last second of spikes, again at every chunk."""

    def __init__(self, seed: int) -> None:
        self.decoder = WindowDecoder(N_UNITS, seed=seed)
        self.state = self.decoder.init_state()

    def __call__(self, times: np.ndarray, units: np.ndarray, chunk: int) -> float:
        end = (chunk + 1) * 0.05
        _, self.state = self.decoder.step(times, units, self.state, end=end, at=end - 0.05 + 0.01 * np.arange(5))
        return float("nan")


def time_steps(
    steppers: dict[str, Any], *, n_spikes: int, n_chunks: dict[str, int], n_blocks: int, seed: int = 0
) -> dict[str, Steps]:
    """Time `n_chunks[name]` chunks of each contender at `n_spikes` a chunk, in `n_blocks` turns after 25 unmeasured."""
    warm = 25  # the window decoder's second is full after 20
    streams = {name: _Spikes(n_spikes, seed) for name in steppers}
    spent: dict[str, list[tuple[float, float, float]]] = {name: [] for name in steppers}
    for block in range(n_blocks + 1):
        for name, stepper in steppers.items():
            count = warm if block == 0 else n_chunks[name] // n_blocks
            for _ in range(count):
                times, units, chunk = streams[name].draw()
                wall, begin = time.perf_counter(), time.thread_time()
                poll = stepper(times, units, chunk)
                cpu, wall = time.thread_time() - begin, time.perf_counter() - wall
                if block:
                    spent[name].append((cpu, poll, wall))
    return {name: Steps(*np.array(rows).T) for name, rows in spent.items()}


def bench_drift(*, minutes: int, seed: int = 0) -> float:
    """Median step of a C++ stream in its last minute over that of a new stream in its first, 200 spikes a chunk.

    Both minutes are timed in turns of 50 chunks, so that only the age of the stream differs, not the machine's mood.
    """
    minute, turn = round(60 / 0.05), 50
    model = untrained(seed=seed)
    aged, fresh = (_StreamStepper(StreamingDecoder(model, session="bench", engine="c++")) for _ in range(2))
    streams = {aged: _Spikes(200, seed), fresh: _Spikes(200, seed)}
    for _ in range((minutes - 1) * minute):
        aged(*streams[aged].draw())
    spent: dict[_StreamStepper, list[float]] = {aged: [], fresh: []}
    for _ in range(minute // turn):
        for stepper, spikes in streams.items():
            for _ in range(turn):
                drawn = spikes.draw()
                begin = time.thread_time()
                stepper(*drawn)
                spent[stepper].append(time.thread_time() - begin)
    return float(np.median(spent[aged]) / np.median(spent[fresh]))


class _Spikes:
    """Spikes of one chunk after the other, `n` a chunk, from a pool so that drawing costs the timer nothing."""

    def __init__(self, n: int, seed: int) -> None:
        rng = generator(seed, "spikes", n)
        self.pool = [(np.sort(rng.uniform(0, 0.05, n)), rng.integers(0, N_UNITS, n)) for _ in range(64)]
        self.chunk = -1

    def draw(self) -> tuple[np.ndarray, np.ndarray, int]:
        self.chunk += 1
        offsets, units = self.pool[self.chunk % len(self.pool)]
        return self.chunk * 0.05 + offsets, units, self.chunk


def bench_latency(
    *, backbone: str = "gru", repeats: int = 400, spikes: Sequence[int] = (50, 200, 1000)
) -> list[LatencyRow]:
    """The latency table of one backbone."""
    rows = []
    for n_spikes in spikes:
        steppers = contenders(backbone=backbone)
        counts = {name: max(20, repeats // (20 if name == "window decoder" else 1)) for name in steppers}
        steps = time_steps(steppers, n_spikes=n_spikes, n_chunks=counts, n_blocks=5)
        cpp = float(np.median(steps["C++ engine"].cpu))
        for name, timed in steps.items():
            median = float(np.median(timed.cpu))
            p99 = float(np.percentile(timed.cpu, 99))
            rows.append(LatencyRow(name, n_spikes, 1e6 * median, 1e6 * float(timed.cpu.min()), 1e6 * p99, median / cpp))
    return rows


def bench_tables(*, repeats: int) -> dict[str, list[Any]]:
    """All tables, by title; one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        tables: dict[str, list[Any]] = {
            f"latency, possm-ss {backbone}": list(bench_latency(backbone=backbone, repeats=repeats))
            for backbone in ("gru", "s4d", "mamba")
        }
        sizes = ((64, 320, 42.0), (256, 320, 42.0), (64, 320, 150.0), (64, 320, 5.0), (64, 16, 5.0))
        tables["training encoder, ragged against padded"] = [
            bench_encoder(dim=dim, n_chunks=n, mean_spikes=mean) for dim, n, mean in sizes
        ]
    finally:
        torch.set_num_threads(threads)
    return tables


def print_tables(tables: dict[str, list[Any]]) -> None:
    """Print the tables to stdout."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for title, rows in tables.items():
        table = Table(*rows[0]._fields, title=title, title_justify="left")
        for row in rows:
            table.add_row(*(_cell(value) for value in row))
        console.print(table)


def _cell(value: Any) -> str:
    if isinstance(value, Timing):
        return f"{1e3 * value.median:.1f} ms ({1e3 * value.low:.1f}-{1e3 * value.high:.1f})"
    return f"{value:.1f}" if isinstance(value, float) else str(value)
