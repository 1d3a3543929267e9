"""What decoding costs: the ragged encoder against the padded layout, forward and backward.

Every figure is CPU seconds of this thread, the two contenders alternating in one process; the table gives the median,
the range and the ratio.  Sizes where the ratio falls below 1 are printed like the others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from commissure.core.rng import generator, isolated
from commissure.decode.encoder import SpikeEncoder, SpikeTokens, encode_padded_reference

__all__ = ["EncoderTiming", "Timing", "alternate", "bench_encoder"]


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
