"""Binned networks: architecture against a loop, learning, causality, restarts, masks, determinism, bad input."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from commissure.core.errors import InputError, NotFittedError
from commissure.decode.binned import BinnedGRU, BinnedMLP, _Batches, _padded
from commissure.decode.recording import SpikeRecording
from commissure.train import TrainConfig


def _gru(steps: int = 80) -> BinnedGRU:
    return BinnedGRU(input_dim=16, hidden_dim=24, input_dropout=0.1, hidden_dropout=0.1, training=_steps(steps))


def _mlp(steps: int = 80) -> BinnedMLP:
    return BinnedMLP(lags=3, input_dim=16, hidden_dim=24, dropout=0.1, training=_steps(steps))


def _steps(n: int) -> TrainConfig:
    return TrainConfig(steps=n, batch_size=16, lr=5e-3)


DECODERS = [pytest.param(_gru, id="gru"), pytest.param(_mlp, id="mlp")]


def _recording(seed: int = 0, *, trials: int = 40, length: int = 7, continuous: bool = False) -> SpikeRecording:
    """Counts of the current and the last bin drive two outputs of different scale and offset."""
    rng = np.random.default_rng(seed)
    weights = np.random.default_rng(9).normal(size=(2, 10, 2))
    counts, behavior = [], []
    for _ in range(trials):
        c = rng.poisson(1.5, size=(length, 10))
        past = np.vstack([np.zeros((1, 10)), c[:-1]])
        counts.append(c)
        behavior.append((c @ weights[0] + past @ weights[1]) * [10.0, 0.1] + [50.0, -3.0])
    if continuous:
        return SpikeRecording.from_counts(counts[0], 0.1, behavior=behavior[0], session="s")
    return SpikeRecording.from_counts(counts, 0.1, behavior=behavior, session="s")


@pytest.mark.parametrize("make", DECODERS)
def test_learns_and_undoes_the_target_scaling(make: Callable[[int], BinnedGRU | BinnedMLP]) -> None:
    model = make(120).fit(_recording())
    assert model.score(_recording(1)) > 0.6
    assert model.result.losses[-1] < 0.5 * model.result.losses[0]


@pytest.mark.parametrize("make", DECODERS)
def test_learns_from_windows_of_a_continuous_recording(make: Callable[[int], BinnedGRU | BinnedMLP]) -> None:
    model = make(100).fit(_recording(trials=1, length=400, continuous=True))
    assert model.score(_recording(1, trials=1, length=100, continuous=True)) > 0.6


@pytest.mark.parametrize("make", DECODERS)
def test_causal_and_restarts_at_each_trial(make: Callable[[int], BinnedGRU | BinnedMLP]) -> None:
    model = make(3).fit(_recording())
    test = _recording(2, trials=3)
    whole = model.predict(test).reshape(3, 7, 2)
    for trial in range(3):
        np.testing.assert_allclose(model.predict(test.select_trials([trial])), whole[trial], rtol=1e-5)
    counts = np.stack([segment.counts for segment in test.binned(0.1)]).astype(int)
    counts[1, 4:] += 5
    changed = SpikeRecording.from_counts(list(counts), 0.1, behavior=[np.zeros((7, 2))] * 3, session="s")
    other = model.predict(changed).reshape(3, 7, 2)
    np.testing.assert_allclose(other[[0, 2]], whole[[0, 2]], rtol=1e-5)
    np.testing.assert_allclose(other[1, :4], whole[1, :4], rtol=1e-5)
    assert np.abs(other[1, 4:] - whole[1, 4:]).min() > 1e-3


@pytest.mark.parametrize("make", DECODERS)
def test_padding_does_not_change_a_shorter_trial(make: Callable[[int], BinnedGRU | BinnedMLP]) -> None:
    model = make(3).fit(_recording())
    short, long = _recording(3, trials=1, length=2), _recording(4, trials=1, length=9)
    counts = [r.binned(0.1)[0].counts.astype(int) for r in (short, long)]
    both = SpikeRecording.from_counts(counts, 0.1, behavior=[np.zeros((2, 2)), np.zeros((9, 2))], session="s")
    np.testing.assert_allclose(model.predict(both)[:2], model.predict(short), rtol=1e-5)
    np.testing.assert_allclose(model.predict(both)[2:], model.predict(long), rtol=1e-5)


@pytest.mark.parametrize("make", DECODERS)
def test_same_seed_same_weights_and_the_global_generator_is_untouched(
    make: Callable[[int], BinnedGRU | BinnedMLP],
) -> None:
    recording = _recording()
    before = torch.random.get_rng_state()
    a, b, c = make(3).fit(recording, seed=1), make(3).fit(recording, seed=1), make(3).fit(recording, seed=2)
    assert torch.equal(torch.random.get_rng_state(), before)
    np.testing.assert_array_equal(a.predict(recording), b.predict(recording))
    assert np.abs(a.predict(recording) - c.predict(recording)).max() > 0


def test_mlp_equals_a_loop_over_bins() -> None:
    model = _mlp(3).fit(_recording())
    network = model.module
    counts = torch.from_numpy(_recording(5).binned(0.1)[0].counts).float()
    with torch.no_grad():
        embedded = torch.relu(counts @ network.embed[0].weight.T + network.embed[0].bias)
        actual = network(counts[None])[0]
        for t in range(len(counts)):
            hidden = network.lagged.bias.clone()
            for lag in range(min(3, t + 1)):
                bin_and_one = torch.cat([embedded[t - lag], torch.ones(1)])
                hidden += network.lagged.weight[:, :, 2 - lag] @ bin_and_one
            hidden = torch.relu(hidden)
            hidden = torch.relu(network.rest[2](hidden))
            torch.testing.assert_close(actual[t], network.rest[5](hidden), atol=1e-5, rtol=1e-4)


def test_unit_dropout_removes_a_unit_from_the_whole_trial() -> None:
    recording = SpikeRecording.from_counts([np.ones((5, 2000), int)] * 8, 0.1, behavior=[np.eye(5)] * 8, session="s")
    training = TrainConfig(steps=10, batch_size=4)
    batches = _Batches(recording.binned(0.1), np.zeros(5), np.ones(5), training, 0.4, None, 0)
    dropped = []
    for step in range(10):
        counts = batches.draw(step).counts
        kept = counts[:, :1]
        assert torch.equal(counts, kept.expand_as(counts))
        dropped += (1 - kept.mean((1, 2))).tolist()
    assert 0.1 < np.mean(dropped) < 0.3
    assert max(dropped) < 0.4 + 0.05
    assert np.std(dropped) > 0.05  # one probability a trial, not one for all


def test_every_trial_is_drawn_once_before_any_comes_again() -> None:
    recording = _recording(trials=8)
    batches = _Batches(recording.binned(0.1), np.zeros(2), np.ones(2), TrainConfig(steps=4, batch_size=4), 0.0, None, 0)
    assert sorted(batches.order[:2].ravel()) == list(range(8))
    assert sorted(batches.order[2:].ravel()) == list(range(8))


def test_windows_stay_inside_and_bins_without_behavior_have_no_weight() -> None:
    source = _recording(trials=1, length=50, continuous=True)
    keep = np.arange(50) % 2 == 0
    recording = SpikeRecording(
        source.times,
        source.units,
        unit_ids=source.unit_ids,
        behavior=source.behavior[keep],
        behavior_times=source.behavior_times[keep],
        session="s",
    )
    segments = recording.binned(0.1)
    batches = _Batches(segments, np.zeros(2), np.ones(2), TrainConfig(steps=20, batch_size=8), 0.0, 10, 3)
    for step in range(20):
        batch = batches.draw(step)
        assert batch.counts.shape == (8, 10, 10)
        assert batch.weight.sum() in range(8 * 4, 8 * 6 + 1)
        assert torch.isfinite(batch.target).all()
    assert np.isfinite(_gru(3).fit(recording).result.losses).all()


def test_presets() -> None:
    strong, tuned = BinnedGRU.from_preset("strong"), BinnedGRU.from_preset("tuned", bin_s=0.05)
    assert (strong.input_dropout, strong.hidden_dropout, strong.unit_dropout) == (0.5, 0.5, 0.3)
    assert (tuned.input_dropout, tuned.hidden_dropout, tuned.unit_dropout, tuned.bin_s) == (0.3, 0.3, 0.0, 0.05)
    assert (strong.input_dim, tuned.input_dim) == (256, 64)
    for model in (strong, tuned):
        assert model.hidden_dim == 256
        assert (model.training.steps, model.training.batch_size) == (300, 16)
        assert (model.training.lr, model.training.weight_decay) == (3e-3, 1e-3)
    with pytest.raises(InputError, match="strong, tuned"):
        BinnedGRU.from_preset("weak")


def test_padded() -> None:
    assert _padded([np.ones((1, 2)), np.ones((3, 2))]).tolist() == [[[1, 1], [0, 0], [0, 0]], [[1, 1]] * 3]


def test_progress_is_called_each_step() -> None:
    calls = []
    _gru(4).fit(_recording(), progress=lambda step, steps, loss: calls.append((step, steps)))
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_bad_input() -> None:
    with pytest.raises(NotFittedError, match="BinnedGRU is not fitted"):
        BinnedGRU().predict(_recording())
    with pytest.raises(NotFittedError, match="BinnedMLP"):
        _ = BinnedMLP().module
    for argument, value in (("bin_s", 0.0), ("hidden_dim", 0), ("input_dropout", 1.0), ("unit_dropout", -0.1)):
        with pytest.raises(InputError, match=argument):
            BinnedGRU(**{argument: value})  # type: ignore[arg-type]
    for argument, value in (("lags", 0), ("layers", 0), ("dropout", 1.0), ("window_s", 0.0)):
        with pytest.raises(InputError, match=argument):
            BinnedMLP(**{argument: value})  # type: ignore[arg-type]
    model = _gru(1).fit(_recording())
    counts = np.ones((3, 4), int)
    with pytest.raises(InputError, match="6 missing"):
        model.predict(
            SpikeRecording.from_counts(
                counts, 0.1, behavior=np.zeros((3, 2)), unit_ids=_recording().unit_ids[:4], session="t"
            )
        )
    wide = SpikeRecording.from_counts(np.ones((3, 10), int), 0.1, behavior=np.zeros((3, 3)), session="s")
    with pytest.raises(InputError, match=r"recordings\[1\]\.behavior"):
        _gru(1).fit([_recording(), wide])
