"""The window decoder: an attention written out by hand, causality, permutation, one window slid over a stream."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from commissure.core.errors import InputError
from commissure.decode.recording import SpikeRecording
from commissure.decode.window import WindowDecoder


def _small(*, t_min: float = 5e-3) -> WindowDecoder:
    decoder = WindowDecoder(
        n_units=12, n_outputs=3, dim=16, depth=2, self_heads=2, head_dim=32, latents_per_group=2, t_min=t_min
    ).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # unit-scale embeddings: with the initial scale of .02 spikes hardly matter
        for weight in (decoder.unit_embedding, decoder.latents, decoder.query):
            weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64))
    return decoder


def _spikes(seed: int, n: int = 60, low: float = 0.0, high: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return np.sort(rng.uniform(low, high, size=n)), rng.integers(0, 12, size=n)


def _rotation_matrix(time: float, frequencies: Tensor, head_dim: int) -> Tensor:
    """R(t): 16 plane rotations of neighboring dimensions, identity on the others."""
    matrix = torch.eye(head_dim, dtype=torch.float64)
    for f, frequency in enumerate(frequencies.tolist()):
        angle = 2 * math.pi * time * frequency
        c, s = math.cos(angle), math.sin(angle)
        matrix[2 * f : 2 * f + 2, 2 * f : 2 * f + 2] = torch.tensor([[c, -s], [s, c]], dtype=torch.float64)
    return matrix


def _attention_reference(
    q: Tensor, k: Tensor, v: Tensor, q_times: list[float], k_times: list[float], frequencies: Tensor
) -> Tensor:
    """One query and one head at a time: softmax(q' R(t_k - t_q) k / sqrt(d)) applied to R(t_k - t_q) v."""
    out = torch.zeros_like(q)
    for i, t_q in enumerate(q_times):
        relative = [_rotation_matrix(t_k - t_q, frequencies, q.shape[-1]) for t_k in k_times]
        for head in range(q.shape[1]):
            keys = torch.stack([r @ k[j, head] for j, r in enumerate(relative)])
            values = torch.stack([r @ v[j, head] for j, r in enumerate(relative)])
            weights = torch.softmax(keys @ q[i, head] / math.sqrt(q.shape[-1]), dim=0)
            out[i, head] = weights @ values
    return out.flatten(1)


def _forward_reference(m: WindowDecoder, times: np.ndarray, units: np.ndarray, at: np.ndarray) -> Tensor:
    """The model as its equations say, spike by spike, with no table and no shared rotation."""

    def heads(x: Tensor, n: int) -> Tensor:
        return x.unflatten(-1, (n, -1))

    def cross(attention: nn.Module, q: Tensor, x: Tensor, q_times: list[float], x_times: list[float]) -> Tensor:
        n = attention.heads
        queries = heads(attention.to_q(attention.norm(q)), n)
        keys, values = attention.to_kv(attention.context_norm(x)).chunk(2, dim=-1)
        out = _attention_reference(queries, heads(keys, n), heads(values, n), q_times, x_times, m.frequencies)
        return q + attention.to_out(out)

    latent_times = m.latent_times.tolist()
    z = cross(m.encoder, m.latents.repeat(m.groups, 1), m.unit_embedding[units], latent_times, times.tolist())
    z = z + m.encoder_ffn(z)
    for block in m.blocks:
        q, k, v = (heads(x, block.heads) for x in block.to_qkv(block.norm(z)).chunk(3, dim=-1))
        z = z + block.to_out(_attention_reference(q, k, v, latent_times, latent_times, m.frequencies))
        z = z + block.ffn(z)
    y = cross(m.decoder, m.query.expand(len(at), -1), z, at.tolist(), latent_times)
    return m.readout(y + m.decoder_ffn(y))


def test_equals_the_equations_written_out() -> None:
    model = _small()
    times, units = _spikes(0, n=9)
    at = np.array([0.96, 0.99])
    with torch.no_grad():
        expected = _forward_reference(model, times, units, at)
        actual = model(times, units, at=at)
    assert actual.std() > 1e-3
    torch.testing.assert_close(actual, expected, atol=1e-10, rtol=0)


def test_default_size_is_the_published_one() -> None:
    model = WindowDecoder(n_units=300)
    assert model.latent_times.shape == (128,)
    vocabulary = model.unit_embedding.numel()
    assert sum(p.numel() for p in model.parameters()) - vocabulary == pytest.approx(1.25e6, rel=0.02)
    assert model([0.1], [2], at=[0.5, 0.9]).shape == (2, 2)


def test_order_of_the_spikes_does_not_matter() -> None:
    model = _small()
    times, units = _spikes(1)
    order = np.random.default_rng(2).permutation(len(times))
    with torch.no_grad():
        a, b = model(times, units, at=[0.9]), model(times[order], units[order], at=[0.9])
    torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_gradients_reach_every_parameter() -> None:
    model = _small()
    times, units = _spikes(2, n=200)
    model(times, units, at=[0.5, 0.9]).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_window_without_spikes() -> None:
    out = _small()([], [], at=[0.9])
    assert torch.isfinite(out).all()


def test_step_equals_forward_on_the_last_window() -> None:
    model = _small()
    times, units = _spikes(3, n=400, high=3.0)
    state = model.init_state()
    for chunk in range(60):
        end = (chunk + 1) * 0.05
        inside = (times >= chunk * 0.05) & (times < end)
        at = np.array([end - 0.03, end])
        values, state = model.step(times[inside], units[inside], state, end=end, at=at)
        window = (times >= end - 1.0) & (times < end)
        with torch.no_grad():
            expected = model(times[window] - (end - 1.0), units[window], at=at - (end - 1.0))
        torch.testing.assert_close(values, expected, atol=1e-12, rtol=0)
        np.testing.assert_array_equal(state.times, times[window])


def test_shift_of_all_times_changes_nothing() -> None:
    model = _small()
    times, units = _spikes(4)
    near, _ = model.step(times, units, model.init_state(), end=1.0)
    far, _ = model.step(times + 1e6, units, model.init_state(), end=1e6 + 1.0)
    torch.testing.assert_close(near, far, atol=1e-6, rtol=0)


def test_float32_keeps_the_digits_of_time() -> None:
    exact = _small(t_min=1e-4)  # ten thousand turns in the window: float32 would lose three digits of the angle
    model = _small(t_min=1e-4).float()
    times, units = _spikes(5)
    with torch.no_grad():
        torch.testing.assert_close(
            model(times, units, at=[0.9]).double(), exact(times, units, at=[0.9]), atol=1e-5, rtol=0
        )


def _recording(times: np.ndarray, units: np.ndarray) -> SpikeRecording:
    at = np.arange(30) * 0.1
    ids = tuple(f"u{i}" for i in range(12))
    trials = np.array([[0.0, 1.5], [1.5, 3.0]])
    return SpikeRecording(
        times, units, unit_ids=ids, behavior=np.zeros((30, 3)), behavior_times=at, session="s", trials=trials
    )


def test_predict_sees_no_spike_after_the_query_s_chunk_nor_of_another_trial() -> None:
    model = _small()
    times, units = _spikes(6, n=300, high=3.0)
    changed = units.copy()
    changed[times >= 2.0] = (changed[times >= 2.0] + 1) % 12
    a, b = model.predict(_recording(times, units)), model.predict(_recording(times, changed))
    at = np.arange(30) * 0.1
    np.testing.assert_array_equal(a[at < 1.99], b[at < 1.99])
    assert np.abs(a[at > 1.99] - b[at > 1.99]).min() > 0
    first = np.where(times < 1.5, (units + 5) % 12, units)
    c = model.predict(_recording(times, first))
    np.testing.assert_array_equal(a[at >= 1.5 - 1e-9], c[at >= 1.5 - 1e-9])


def test_predict_is_the_step_of_the_chunk_that_holds_the_time() -> None:
    model = _small()
    times, units = _spikes(7, n=300, high=3.0)
    value = model.predict(_recording(times, units), at=[0.72, 1.2])
    state, used = model.init_state(), 0
    for chunk in range(25):
        end = (chunk + 1) * 0.05
        last = int(np.searchsorted(times, end))
        out, state = model.step(times[used:last], units[used:last], state, end=end, at=[0.72, 1.2])
        used = last
        if chunk in (14, 24):
            np.testing.assert_allclose(value[0 if chunk == 14 else 1], out[0 if chunk == 14 else 1], atol=1e-12)


def test_bad_input() -> None:
    for argument, value in (("n_units", 0), ("depth", 0), ("head_dim", 16), ("t_min", 3.0), ("group_s", 0.3)):
        keywords = {"n_units": 4, argument: value}
        with pytest.raises(InputError, match=argument):
            WindowDecoder(**keywords)  # type: ignore[arg-type]
    model = _small()
    with pytest.raises(InputError, match="units"):
        model([0.1], [12], at=[0.5])
    with pytest.raises(InputError, match="units"):
        model([0.1, 0.2], [1], at=[0.5])
    state = model.init_state()
    with pytest.raises(InputError, match="before end"):
        model.step([0.1], [1], state, end=0.1)
    with pytest.raises(InputError, match="sorted"):
        model.step([0.05, 0.01], [1, 1], state, end=0.1)
    with pytest.raises(InputError, match="units"):
        model.step([0.05], [-1], state, end=0.1)
    _, state = model.step([0.05], [1], state, end=0.1)
    with pytest.raises(InputError, match="last spike"):
        model.step([0.02], [1], state, end=0.15)
    with pytest.raises(InputError, match="n_units"):
        model.predict(SpikeRecording.from_counts(np.ones((3, 2), int), 0.1, session="s"))
