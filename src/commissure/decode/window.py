"""A causal window decoder: a perceiver over spikes that runs again on the last second at every step (POYO's layout).

    z_0 = latents + XA(latents, spikes)         z_l = z_{l-1} + SA(z_{l-1}),  l = 1..depth
    y   = W (q + XA(q, z_depth)) + w            each attention is followed by z + FFN(LN z), FFN = GEGLU of width 4 dim

Spikes are those of the window [end - window_s, end): nothing after the end of the chunk is seen.  Attention is rotary
in time, of values too: scores see R(t_k - t_q), outputs are rotated back by the query's time.  This is the Transformer
that a recurrent decoder is compared with: each step pays for the whole window, of which only the last chunk is new.
Source: POYO, arXiv 2310.16046 (the defaults here are its 1.3 M parameter model).

| symbol | name |
|---|---|
| latents | `latents_per_group` learned vectors, repeated in every `group_s` of the window at its center |
| XA, SA | cross- and self-attention of `cross_heads` and `self_heads` heads of `head_dim` |
| q | learned output query, one copy for each time asked for |

What makes it fast changes no result: a spike's key and value before rotation depend on its unit alone, so they are
looked up in a table over units instead of being projected spike by spike; what depends on weights alone (the table, the
rotated queries of the latents, their rotations) is computed once a stream.  Angles are reduced in float64.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Complex, Float, Int
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.nn import functional

from commissure.core.errors import InputError
from commissure.core.rng import isolated
from commissure.decode.recording import SpikeRecording, bin_index
from commissure.decode.segments import check_times

__all__ = ["WindowDecoder", "WindowState"]

_ROTATED = 32  # dimensions of a head that carry time, as 16 complex numbers; the others are position-free


class _Constants(NamedTuple):
    """What depends on the weights and not on the spikes."""

    unit_keys_values: Float[Tensor, "n_units two_heads head_dim"]
    latents: Float[Tensor, "n_latents dim"]
    latent_queries: Float[Tensor, "n_latents heads head_dim"]
    latent_rotation: Complex[Tensor, "n_latents 16"]


class WindowState(NamedTuple):
    """A stream between two steps: spikes of the window (float64 seconds, sorted) and constants of the weights."""

    times: Float[np.ndarray, " n_spikes"]
    units: Int[np.ndarray, " n_spikes"]
    constants: _Constants


class WindowDecoder(nn.Module):
    """Causal POYO-style decoder from the spikes of `n_units` units to `n_outputs` values; times in seconds.

    `forward` decodes one window, with times from the window's start; `step` keeps a stream's window and decodes it.
    `t_min`, `t_max` are the shortest and longest rotary periods.

    >>> decoder = WindowDecoder(n_units=10, n_outputs=2, depth=1)
    >>> tuple(decoder([0.2, 0.3], [4, 9], at=[0.975]).shape)
    (1, 2)
    """

    def __init__(
        self,
        n_units: int,
        n_outputs: int = 2,
        *,
        dim: int = 64,
        depth: int = 6,
        cross_heads: int = 2,
        self_heads: int = 8,
        head_dim: int = 64,
        latents_per_group: int = 16,
        group_s: float = 0.125,
        window_s: float = 1.0,
        t_min: float = 1e-4,
        t_max: float = 2.0627,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (("n_units", n_units), ("n_outputs", n_outputs), ("dim", dim), ("depth", depth)):
            if value < 1:
                raise InputError(name, value, "an integer >= 1")
        if head_dim < _ROTATED:
            raise InputError("head_dim", head_dim, f"an integer >= {_ROTATED}, the dimensions that are rotated")
        if not 0 < t_min < t_max:
            raise InputError("t_min", t_min, f"a number in (0, t_max = {t_max}) (seconds)")
        groups = round(window_s / group_s)
        if groups < 1 or abs(groups * group_s - window_s) > 1e-9:
            raise InputError("group_s", group_s, f"a divisor of window_s = {window_s} (seconds)")
        self.n_units, self.n_outputs, self.window_s, self.groups = n_units, n_outputs, window_s, groups
        periods = torch.logspace(math.log10(t_min), math.log10(t_max), _ROTATED // 2, dtype=torch.float64)
        centers = (torch.arange(groups, dtype=torch.float64) + 0.5) * group_s
        # plain attributes, not buffers: module.float() would round them, and at 1e4 turns every digit counts
        self.frequencies = 1 / periods
        self.latent_times = centers.repeat_interleave(latents_per_group)
        with isolated(seed, "init"):
            self.unit_embedding = nn.Parameter(0.02 * torch.randn(n_units, dim))
            self.latents = nn.Parameter(0.02 * torch.randn(latents_per_group, dim))
            self.query = nn.Parameter(0.02 * torch.randn(1, dim))
            self.encoder = _CrossAttention(dim, cross_heads, head_dim)
            self.encoder_ffn = _FeedForward(dim)
            self.blocks = nn.ModuleList(_Block(dim, self_heads, head_dim) for _ in range(depth))
            self.decoder = _CrossAttention(dim, cross_heads, head_dim)
            self.decoder_ffn = _FeedForward(dim)
            self.readout = nn.Linear(dim, n_outputs)

    def forward(
        self, times: ArrayLike | Tensor, units: ArrayLike | Tensor, *, at: ArrayLike | Tensor
    ) -> Float[Tensor, "n_queries n_outputs"]:
        """Outputs at times `at` from one window's spikes; all times from the window's start, in [0, window_s].

        A window without spikes gives the answer of the latents alone.
        """
        spikes = torch.as_tensor(times, dtype=torch.float64)
        rows = torch.as_tensor(units, dtype=torch.int64)
        if spikes.ndim != 1 or rows.shape != spikes.shape:
            raise InputError("units", tuple(rows.shape), f"one entry a spike, shape {tuple(spikes.shape)}")
        if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < self.n_units:
            raise InputError("units", [int(rows.min()), int(rows.max())], f"0..{self.n_units - 1}")
        return self._decode(spikes, rows, torch.as_tensor(at, dtype=torch.float64), self._constants())

    @torch.inference_mode()
    def init_state(self) -> WindowState:
        """The empty window; it holds tables of the present weights, so make a new one after changing them."""
        return WindowState(np.zeros(0), np.zeros(0, np.int64), self._constants())

    @torch.inference_mode()
    def step(
        self, times: ArrayLike, units: ArrayLike, state: WindowState, *, end: float, at: ArrayLike | None = None
    ) -> tuple[Float[Tensor, "n_queries n_outputs"], WindowState]:
        """Add the spikes of a chunk that ends at `end` (stream seconds), re-run the window `[end - window_s, end)`.

        New spikes are sorted, follow those given before and lie before `end`.  Outputs are for `at` (default `end`).
        """
        new_times, new_units = np.asarray(times, np.float64), np.asarray(units, np.int64)
        start = end - self.window_s
        if new_times.shape != new_units.shape or new_times.ndim != 1:
            raise InputError("units", new_units.shape, f"one entry a spike, shape {new_times.shape}")
        if new_times.size:
            last = state.times[-1] if state.times.size else new_times[0]
            if not (new_times[0] >= last and new_times[-1] < end and (np.diff(new_times) >= 0).all()):
                allowed = f"sorted times from {float(last)} (the last spike) to before end = {end}"
                raise InputError("times", [float(new_times[0]), float(new_times[-1])], allowed)
            if not 0 <= new_units.min() <= new_units.max() < self.n_units:
                raise InputError("units", [int(new_units.min()), int(new_units.max())], f"0..{self.n_units - 1}")
        first = int(np.searchsorted(state.times, start))
        kept = WindowState(
            np.concatenate([state.times[first:], new_times]),
            np.concatenate([state.units[first:], new_units]),
            state.constants,
        )
        queries = np.array([end]) if at is None else np.asarray(at, np.float64)
        values = self._decode(
            torch.from_numpy(kept.times - start),
            torch.from_numpy(kept.units),
            torch.from_numpy(queries - start),
            state.constants,
        )
        return values, kept

    def predict(
        self, recording: SpikeRecording, *, at: ArrayLike | None = None, step_s: float = 0.05
    ) -> Float[np.ndarray, "n n_outputs"]:
        """Outputs at times `at` (default: the behavior's), each from the window that ends with its chunk of `step_s`.

        Windows are cut at the start of the segment.
        """
        if recording.n_units != self.n_units:
            raise InputError("recording.n_units", recording.n_units, f"{self.n_units} units")
        times, rows = check_times(recording, at)
        spike_rows = recording.segment_index(recording.times)
        values = np.empty((len(times), self.n_outputs))
        for row in np.unique(rows):
            inside, start = spike_rows == row, float(recording.segments[row, 0])
            spikes, units = recording.times[inside], recording.units[inside]
            state, used = self.init_state(), 0
            chunk_of_spike, chunks = bin_index(spikes, start, step_s), bin_index(times[rows == row], start, step_s)
            queries = np.flatnonzero(rows == row)
            for chunk in range(int(chunks.max()) + 1):
                end, last = start + (chunk + 1) * step_s, int(np.searchsorted(chunk_of_spike, chunk, side="right"))
                asked = queries[chunks == chunk]
                # an edge met by tolerance may lie a rounding past the chunk's end; it belongs to the next chunk
                out, state = self.step(spikes[used:last], units[used:last], state, end=end, at=times[asked])
                values[asked], used = out.double().cpu().numpy(), last
        return values

    def _constants(self) -> _Constants:
        latents = self.latents.repeat(self.groups, 1)
        rotation = self._rotation(self.latent_times)
        keys_values = self.encoder.keys_values(self.unit_embedding)
        return _Constants(keys_values, latents, _rotate(self.encoder.queries(latents), rotation), rotation)

    def _rotation(self, times: Float[Tensor, " n"]) -> Complex[Tensor, "n 16"]:
        """exp(2 pi i t f): whole turns are removed in float64, the rest keeps its digits in float32."""
        turns = torch.outer(times, self.frequencies)
        angle = (turns - turns.floor()).to(self.latents.dtype) * (2 * math.pi)
        return torch.complex(angle.cos(), angle.sin()).to(self.latents.device)

    def _decode(
        self,
        times: Float[Tensor, " n_spikes"],
        units: Int[Tensor, " n_spikes"],
        at: Float[Tensor, " n_queries"],
        constants: _Constants,
    ) -> Float[Tensor, "n_queries n_outputs"]:
        z, rotation = constants.latents, constants.latent_rotation
        if times.numel():
            spikes = _rotate(constants.unit_keys_values.index_select(0, units.to(z.device)), self._rotation(times))
            z = z + self.encoder.attend(constants.latent_queries, spikes, rotation)
        z = z + self.encoder_ffn(z)
        for block in self.blocks:
            z = block(z, rotation)
        query, query_rotation = self.query.expand(len(at), -1), self._rotation(at)
        queries = _rotate(self.decoder.queries(query), query_rotation)
        y = query + self.decoder.attend(queries, _rotate(self.decoder.keys_values(z), rotation), query_rotation)
        return self.readout(y + self.decoder_ffn(y))


class _CrossAttention(nn.Module):
    """Pre-norm attention whose projections are called separately, so that their results can be kept."""

    def __init__(self, dim: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.norm, self.context_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, heads * head_dim, bias=False)
        self.to_kv = nn.Linear(dim, 2 * heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, dim)

    def queries(self, x: Float[Tensor, "n dim"]) -> Float[Tensor, "n heads head_dim"]:
        return self.to_q(self.norm(x)).unflatten(-1, (self.heads, self.head_dim))

    def keys_values(self, x: Float[Tensor, "n dim"]) -> Float[Tensor, "n two_heads head_dim"]:
        return self.to_kv(self.context_norm(x)).unflatten(-1, (2 * self.heads, self.head_dim))

    def attend(
        self,
        queries: Float[Tensor, "n heads head_dim"],
        keys_values: Float[Tensor, "m two_heads head_dim"],
        rotation: Complex[Tensor, "n 16"],
    ) -> Float[Tensor, "n dim"]:
        """Attention of rotated queries over rotated keys and values, rotated back by the queries' `rotation`."""
        keys, values = keys_values.split(self.heads, dim=1)
        return self.to_out(_attention(queries, keys, values, rotation))


class _Block(nn.Module):
    """Pre-norm self-attention over the latents, then the feed-forward layer."""

    def __init__(self, dim: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.norm = nn.LayerNorm(dim)
        self.to_qkv = nn.Linear(dim, 3 * heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, dim)
        self.ffn = _FeedForward(dim)

    def forward(self, x: Float[Tensor, "n dim"], rotation: Complex[Tensor, "n 16"]) -> Float[Tensor, "n dim"]:
        qkv = _rotate(self.to_qkv(self.norm(x)).unflatten(-1, (3 * self.heads, self.head_dim)), rotation)
        queries, keys, values = qkv.split(self.heads, dim=1)
        x = x + self.to_out(_attention(queries, keys, values, rotation))
        return x + self.ffn(x)


class _FeedForward(nn.Module):
    """Linear(LN x) = (u, g), then Linear(u * gelu(g))."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.into, self.out = nn.LayerNorm(dim), nn.Linear(dim, 8 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Float[Tensor, "n dim"]) -> Float[Tensor, "n dim"]:
        value, gate = self.into(self.norm(x)).chunk(2, dim=-1)
        return self.out(value * functional.gelu(gate))


def _rotate(
    x: Float[Tensor, "n heads head_dim"], rotation: Complex[Tensor, "n 16"]
) -> Float[Tensor, "n heads head_dim"]:
    """Multiply the first dimensions, as complex numbers, by `rotation`: in place, `x` is always a fresh result."""
    torch.view_as_complex(x[..., :_ROTATED].unflatten(-1, (-1, 2))).mul_(rotation[:, None])
    return x


def _attention(
    queries: Float[Tensor, "n heads head_dim"],
    keys: Float[Tensor, "m heads head_dim"],
    values: Float[Tensor, "m heads head_dim"],
    rotation: Complex[Tensor, "n 16"],
) -> Float[Tensor, "n heads_dim"]:
    """Softmax attention head by head; the result is rotated back, so that only time differences remain."""
    out = functional.scaled_dot_product_attention(
        queries.transpose(0, 1)[None], keys.transpose(0, 1)[None], values.transpose(0, 1)[None]
    )
    merged = out[0].transpose(0, 1).contiguous()
    if merged.requires_grad:  # the backward pass needs what the attention gave
        merged = merged.clone()
    return _rotate(merged, rotation.conj()).flatten(1)
