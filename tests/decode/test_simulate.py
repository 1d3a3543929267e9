"""The simulator: its laws against closed forms and references, its knobs, and what its results depend on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad

from commissure.core.errors import InputError
from commissure.decode import simulate
from commissure.decode.recording import SpikeRecording
from commissure.decode.simulate import (
    Kinematics,
    Population,
    ReachingConfig,
    reaching_population,
    simulate_reaching,
    spike_trains,
)


def _trains(recording: SpikeRecording) -> list[np.ndarray]:
    return [recording.times[recording.units == unit] for unit in range(recording.n_units)]


def _plain(config: ReachingConfig, *, seed: int = 0, **changes: Any) -> Population:
    """The population with every modulation but the preferred direction removed."""
    population = reaching_population(config, seed=seed)
    nothing = {
        name: 0 * getattr(population, name)
        for name in ("speed", "position", "acceleration", "rotation", "noise_weights")
    }
    return population._replace(**{**nothing, **changes})


# oracle 13 of the method's specification: spikes


def test_no_interval_is_shorter_than_three_milliseconds() -> None:
    [recording] = simulate_reaching(n_units=40, duration_s=60.0, rate_hz=60.0)
    intervals = np.concatenate([np.diff(train) for train in _trains(recording)])
    assert len(intervals) > 50_000
    assert 0.003 <= intervals.min() < 0.0032
    [free] = simulate_reaching(n_units=40, duration_s=60.0, rate_hz=60.0, refractory=False)
    assert np.concatenate([np.diff(train) for train in _trains(free)]).min() < 1e-5


@pytest.mark.parametrize("bin_s", [0.01, 0.1, 0.5])
def test_without_history_counts_are_poisson(bin_s: float) -> None:
    config = ReachingConfig(n_units=50, duration_s=120.0, rate_hz=30.0, refractory=False, drift=0.0)
    rates = np.full(50, 30.0)
    population = _plain(config, depth=np.zeros(50), base_rate=rates)
    trains = spike_trains(population, simulate._kinematics(config, 0, 0), config, seed=0)
    counts = np.stack([np.histogram(train, np.arange(0, 120 + bin_s / 2, bin_s))[0] for train in trains])
    assert abs(counts.mean() / (30 * bin_s) - 1) < 0.01
    fano = (counts.var(1, ddof=1) / counts.mean(1)).mean()
    assert abs(fano - 1) < 0.05
    intervals = np.concatenate([np.diff(train) for train in trains])
    assert abs(intervals.std() / intervals.mean() - 1) < 0.01  # exponential


def test_refractoriness_is_the_stated_hazard() -> None:
    rate = 100.0
    config = ReachingConfig(n_units=20, duration_s=120.0, rate_hz=rate, drift=0.0)
    population = _plain(config, depth=np.zeros(20), base_rate=np.full(20, rate))
    trains = spike_trains(population, simulate._kinematics(config, 0, 0), config, seed=0)
    intervals = np.concatenate([np.diff(train) for train in trains])

    def survival(tau: float) -> float:  # exp(-integral of the recovering intensity)
        partial = min(max(tau - 0.003, 0.0), 0.009)
        recovered = partial - 0.003 * (1 - np.exp(-partial / 0.003))
        return float(np.exp(-rate * (recovered + max(tau - 0.012, 0.0))))

    mean = quad(survival, 0, 0.012, limit=200)[0] + survival(0.012) / rate
    assert abs(intervals.mean() / mean - 1) < 0.01
    for tau in (0.005, 0.008, 0.0119, 0.0125, 0.02):
        assert abs((intervals > tau).mean() - survival(tau)) < 0.005


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    rate=st.sampled_from([20.0, 150.0, 2000.0]),
    seed=st.integers(0, 1000),
)
def test_refractoriness_is_the_spike_by_spike_loop(counts: list[int], rate: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    proposals = [np.cumsum(rng.exponential(1 / rate, n)) for n in counts]
    kept = simulate._refractory(proposals, [np.random.default_rng([seed, unit]) for unit in range(len(counts))])
    for unit, train in enumerate(proposals):
        needed = np.minimum(0.003 + np.random.default_rng([seed, unit]).exponential(0.003, len(train)), 0.012)
        expected: list[float] = []
        for time, need in zip(train, needed, strict=True):
            if not expected or time - expected[-1] >= need:
                expected.append(time)
        assert kept[unit].tolist() == expected


def test_preferred_directions_are_found_in_the_spikes() -> None:
    knobs: dict[str, Any] = {"n_units": 20, "duration_s": 480.0, "rate_hz": 20.0, "difficulty": "linear"}
    [recording] = simulate_reaching(**knobs, behavior_hz=200.0)
    population = reaching_population(ReachingConfig(**knobs), seed=0)
    speed = np.hypot(*recording.behavior.T)
    direction = recording.behavior * (np.tanh(2 * speed / 25) / np.maximum(speed, 1e-9))[:, None]
    assert recording.auxiliary is not None
    acceleration = np.gradient(recording.behavior, 1 / 200, axis=0)
    design = np.column_stack([direction, np.ones(len(speed)), speed, recording.auxiliary, acceleration])
    errors = []
    for unit, train in enumerate(_trains(recording)):
        if population.depth[unit] < 0.4:
            continue
        ahead = np.floor((train + population.lag_s[unit]) * 200).astype(int)
        counts = np.bincount(ahead[ahead < len(design)], minlength=len(design))
        weights = np.linalg.lstsq(design, counts.astype(float), rcond=None)[0]
        found = np.arctan2(weights[1], weights[0])
        errors.append(np.angle(np.exp(1j * (found - population.preferred_direction[unit])), deg=True))
    assert len(errors) > 10
    assert np.abs(errors).max() < 10


def test_spikes_lead_the_hand_by_the_lag() -> None:
    config = ReachingConfig(n_units=12, duration_s=480.0, rate_hz=20.0, drift=0.0)
    population = _plain(config, depth=np.full(12, 1.0), base_rate=np.full(12, 20.0))
    kinematics = simulate._kinematics(config, 0, 0)
    trains = spike_trains(population, kinematics, config, seed=0)
    shifts = np.arange(0, 200)  # ms
    for unit, train in enumerate(trains):
        angle = population.preferred_direction[unit]
        along = kinematics.velocity @ np.array([np.cos(angle), np.sin(angle)])
        rows = (train[train < 479.0] * 1000).astype(int)
        correlation = np.array([along[rows + shift].mean() for shift in shifts])
        assert abs(shifts[np.argmax(correlation)] / 1000 - population.lag_s[unit]) < 0.010


# laws of the parameters and processes


def test_the_population_has_the_stated_laws() -> None:
    hard = reaching_population(ReachingConfig(n_units=20_000), seed=1)
    linear = reaching_population(ReachingConfig(n_units=20_000, difficulty="linear"), seed=1)
    assert abs(np.median(hard.base_rate) - 6) < 0.2
    assert abs(np.log(hard.base_rate).std() - 0.8) < 0.02
    assert abs(np.exp(1j * hard.preferred_direction).mean()) < 0.02
    for population, shape, scale in ((hard, 2, 0.22), (linear, 3, 0.28)):
        assert abs(population.depth.mean() / (shape * scale) - 1) < 0.03
        assert abs(population.depth.var() / (shape * scale**2) - 1) < 0.06
    assert abs(hard.lag_s.mean() - 0.1) < 0.001
    assert 0.04 <= hard.lag_s.min() < 0.041
    assert 0.159 < hard.lag_s.max() <= 0.16
    assert abs(hard.speed.mean() - 0.15) < 0.01
    for values, sd in (
        (hard.speed, 0.25),
        (hard.position, 0.25),
        (hard.acceleration, 0.15),
        (hard.rotation, 0.9),
        (hard.noise_weights, 0.5),
        (linear.noise_weights, 0.28),
    ):
        assert abs(values.std() / sd - 1) < 0.03
    assert not linear.rotation.any()


def test_ornstein_uhlenbeck_is_its_recurrence() -> None:
    fast = simulate._ornstein_uhlenbeck(np.random.default_rng(0), 3000, 2, 200.0)
    noise = np.random.default_rng(0).standard_normal((3000, 2))
    a = np.exp(-1 / 200)
    slow = [noise[0]]
    for innovation in noise[1:]:
        slow.append(a * slow[-1] + np.sqrt(1 - a**2) * innovation)
    np.testing.assert_allclose(fast, slow, rtol=0, atol=1e-12)


@pytest.mark.parametrize("task", ["RT", "CO"])
def test_kinematics(task: Any) -> None:
    config = ReachingConfig(task=task, duration_s=120.0)
    hand: Kinematics = simulate._kinematics(config, 0, 0)
    np.testing.assert_allclose(np.gradient(hand.position, 0.001, axis=0), hand.velocity, atol=1e-9)
    np.testing.assert_allclose(np.gradient(hand.velocity, 0.001, axis=0), hand.acceleration, atol=1e-7)
    assert np.abs(hand.acceleration).max() < 2000  # smooth: a jump of 1 cm/s in a sample would be 1000 cm/s^2
    speed = np.hypot(*hand.velocity.T)
    for start, stop in hand.epochs["hold"][:50]:  # away from its ends by the boxcar's 10 ms and two samples
        assert speed[round((start + 0.012) * 1000) : round((stop - 0.012) * 1000)].max(initial=0) < 1e-6
    everything = np.concatenate(list(hand.epochs.values()))
    everything = everything[np.argsort(everything[:, 0])]
    np.testing.assert_allclose(everything[1:, 0], everything[:-1, 1], atol=1e-9)  # one after the other
    assert (everything[0, 0], everything[-1, 1]) == (0.0, 120.0)
    if task == "RT":
        assert set(hand.epochs) == {"random", "hold"}
        assert np.abs(hand.position).max() < 16
    else:
        assert set(hand.epochs) == {"reach", "return", "hold"}
        ends = hand.position[np.round(hand.epochs["reach"][:-1, 1] * 1000).astype(int) + 20]
        assert abs(np.hypot(*ends.T).mean() - 8) < 0.3
        octants = np.round(np.arctan2(ends[:, 1], ends[:, 0]) / (np.pi / 4)).astype(int) % 8
        assert len(np.unique(octants)) == 8


# fine timing


def test_timing_hides_the_velocity_from_the_counts() -> None:
    plain, timed = (
        simulate_reaching(n_units=30, duration_s=60.0, timing=timing, refractory=False)[0] for timing in (0.0, 0.8)
    )
    [a], [b] = plain.binned(0.05), timed.binned(0.05)
    np.testing.assert_array_equal(a.counts, b.counts)
    assert not np.array_equal(plain.binned(0.01)[0].counts, timed.binned(0.01)[0].counts)


@pytest.mark.parametrize("timing", [0.3, 0.8])
def test_phases_follow_the_velocity(timing: float) -> None:
    config = ReachingConfig(n_units=10, duration_s=120.0, rate_hz=20.0, timing=timing, refractory=False)
    population, hand = reaching_population(config, seed=0), simulate._kinematics(config, 0, 0)
    for unit, train in enumerate(spike_trains(population, hand, config, seed=0)):
        cycle = np.floor(train * 20)
        ahead = (((cycle + 0.5) / 20 + population.lag_s[unit]) * 1000).astype(int)
        angle = population.timing_direction[unit]
        along = hand.velocity[ahead] @ np.array([np.cos(angle), np.sin(angle)]) / 25
        error = 2 * np.pi * (train * 20 - cycle) - population.timing_phase[unit] - np.pi / 2 * along
        resultant = np.exp(1j * error).mean()
        assert abs(resultant - timing) < 4 / np.sqrt(len(train))


def test_timing_is_read_by_a_linear_decoder_of_times_not_of_counts() -> None:
    def score(recording: SpikeRecording, parts: int) -> float:
        target = recording.binned(0.05)[0].behavior
        features = np.sqrt(recording.binned(0.05 / parts)[0].counts).reshape(len(target), -1)
        features = np.column_stack([np.roll(features, lag, 0) for lag in range(3)] + [np.ones(len(target))])
        is_test = np.arange(len(target)) % 400 >= 320
        x, y = features[~is_test], target[~is_test]
        weights = np.linalg.solve(x.T @ x + 100 * np.eye(x.shape[1]), x.T @ y)
        error = ((target[is_test] - features[is_test] @ weights) ** 2).sum(0)
        return float(np.mean(1 - error / ((target[is_test] - target[is_test].mean(0)) ** 2).sum(0)))

    [timed] = simulate_reaching(n_units=30, duration_s=160.0, timing=0.6, seed=1)
    assert score(timed, 5) > score(timed, 1) + 0.2
    [plain] = simulate_reaching(n_units=30, duration_s=160.0, seed=1)
    assert score(plain, 5) < score(plain, 1) + 0.05


# what results depend on


def _assert_equal(one: SpikeRecording, other: SpikeRecording) -> None:
    for name in ("times", "units", "behavior", "behavior_times", "auxiliary"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert (one.unit_ids, one.session, one.subject) == (other.unit_ids, other.session, other.subject)
    assert {name: x.tolist() for name, x in one.epochs.items()} == {
        name: x.tolist() for name, x in other.epochs.items()
    }


@pytest.mark.parametrize("unit_drift", [1.0, 0.3])
def test_a_session_does_not_depend_on_how_many_there_are(unit_drift: float) -> None:
    knobs: dict[str, Any] = {
        "n_units": 6,
        "duration_s": 10.0,
        "unit_drift": unit_drift,
        "jitter_ms": 1.0,
        "dropout_units": 0.3,
        "timing": 0.5,
    }
    three = simulate_reaching("CO", n_sessions=3, **knobs)
    for one, other in zip(simulate_reaching("CO", n_sessions=2, **knobs), three, strict=False):
        _assert_equal(one, other)
    assert len({recording.session for recording in three}) == 3
    assert not np.array_equal(three[0].behavior, three[1].behavior)
    [other_seed] = simulate_reaching("CO", seed=1, **knobs)
    assert not np.array_equal(other_seed.behavior, three[0].behavior)
    assert not set(other_seed.unit_ids) & set(three[0].unit_ids)


def test_a_unit_does_not_depend_on_how_many_there_are() -> None:
    [few], [many] = (simulate_reaching(n_units=n, duration_s=10.0) for n in (4, 9))
    for one, other in zip(_trains(few), _trains(many), strict=False):
        np.testing.assert_array_equal(one, other)


def test_global_randomness_is_neither_used_nor_changed() -> None:
    np.random.seed(0)  # noqa: NPY002
    before = np.random.get_state()[1].tolist()  # type: ignore[index]  # noqa: NPY002
    [first] = simulate_reaching(n_units=3, duration_s=5.0)
    assert np.random.get_state()[1].tolist() == before  # type: ignore[index]  # noqa: NPY002
    np.random.seed(1)  # noqa: NPY002
    _assert_equal(first, simulate_reaching(n_units=3, duration_s=5.0)[0])


def test_the_recording_covers_its_duration() -> None:
    [recording] = simulate_reaching(n_units=5, duration_s=12.5, behavior_hz=50.0)
    np.testing.assert_allclose(recording.segments, [[0.0, 12.5]], atol=1e-9)
    assert recording.behavior.shape == (625, 2)
    assert recording.trials is None
    [segment] = recording.binned(0.05)
    assert segment.counts.sum() == len(recording.times)
    assert not np.isnan(segment.behavior).any()


# knobs


def test_units_drift_between_sessions() -> None:
    def populations(unit_drift: float) -> list[Population]:
        config = ReachingConfig(n_units=4000, unit_drift=unit_drift)
        return [reaching_population(config, seed=0, session=session) for session in range(3)]

    still = populations(0.0)
    np.testing.assert_array_equal(still[0].depth, still[2].depth)
    some = populations(0.4)
    for session in (1, 2):
        correlation = np.corrcoef(np.log(some[0].base_rate), np.log(some[session].base_rate))[0, 1]
        assert abs(correlation - (1 - 0.4**2) ** (session / 2)) < 0.03
        assert abs(np.log(some[session].base_rate).std() - 0.8) < 0.03
    new = populations(1.0)
    assert abs(np.corrcoef(new[0].base_rate, new[1].base_rate)[0, 1]) < 0.05
    same, other = simulate_reaching(n_sessions=2, n_units=2, duration_s=5.0, unit_drift=0.2)
    assert same.unit_ids == other.unit_ids
    same, other = simulate_reaching(n_sessions=2, n_units=2, duration_s=5.0)
    assert not set(same.unit_ids) & set(other.unit_ids)


def test_subjects_differ_in_pace() -> None:
    means = [
        np.diff(simulate_reaching("CO", n_units=1, duration_s=240.0, subject=subject)[0].epochs["reach"]).mean()
        for subject in range(6)
    ]
    assert np.std(means) > 0.01


def test_faults() -> None:
    knobs: dict[str, Any] = {"n_units": 20, "duration_s": 60.0, "rate_hz": 20.0}
    [whole] = simulate_reaching(**knobs)
    [dead] = simulate_reaching(**knobs, dead_channel=3)
    sizes = np.array([len(train) for train in _trains(dead)])
    assert (sizes == 0).sum() == 3
    assert all(np.array_equal(a, b) for a, b, n in zip(_trains(dead), _trains(whole), sizes, strict=True) if n)
    [lossy] = simulate_reaching(**knobs, dropout_units=0.25)
    cut = [unit for unit, (a, b) in enumerate(zip(_trains(lossy), _trains(whole), strict=True)) if len(a) < len(b)]
    assert len(cut) == 5
    for unit in cut:
        kept = _trains(lossy)[unit]
        np.testing.assert_array_equal(kept, _trains(whole)[unit][: len(kept)])
    [shaken] = simulate_reaching(**knobs, jitter_ms=0.2)
    assert (np.diff(shaken.times) >= 0).all()
    assert 0 <= shaken.times.min() < shaken.times.max() < 60
    pairs = zip(_trains(shaken), _trains(whole), strict=True)
    moved = np.concatenate([a - b for a, b in pairs if len(a) == len(b)])  # too little for two spikes to swap
    assert abs(moved.std() / 0.0002 - 1) < 0.03


def test_linear_is_easier_to_decode_than_hard() -> None:
    def score(difficulty: Any) -> float:
        [recording] = simulate_reaching(n_units=60, duration_s=160.0, difficulty=difficulty)
        [segment] = recording.binned(0.05)
        features = np.column_stack([np.roll(np.sqrt(segment.counts), lag, 0) for lag in range(8)] + [np.ones(3200)])
        x, y = features[:2600], segment.behavior[:2600]
        weights = np.linalg.solve(x.T @ x + 100 * np.eye(x.shape[1]), x.T @ y)
        error = (segment.behavior[2600:] - features[2600:] @ weights) ** 2
        return float(1 - error.mean() / segment.behavior[2600:].var())

    assert 0.4 < score("hard") + 0.05 < score("linear")


def test_dead_channels_alone_are_a_recording_without_spikes() -> None:
    [recording] = simulate_reaching(n_units=1, dead_channel=1, duration_s=5.0)
    assert recording.times.size == 0
    assert recording.duration == pytest.approx(5.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "XY"}, r"task = 'XY'"),
        ({"n_sessions": 0}, r"^n_sessions = 0"),
        ({"n_units": 0}, r"n_units = 0"),
        ({"duration_s": 0.0}, r"duration_s = 0.0"),
        ({"duration_s": np.inf}, r"duration_s = inf"),
        ({"seed": -1}, r"^seed = -1"),
        ({"noise": -1.0}, r"noise = -1.0"),
        ({"rate_hz": 0.0}, r"rate_hz = 0.0"),
        ({"timing": 1.0}, r"timing = 1.0"),
        ({"rhythm_hz": 0.0}, r"rhythm_hz = 0.0"),
        ({"unit_drift": 1.5}, r"unit_drift = 1.5"),
        ({"dropout_units": 2.0}, r"dropout_units = 2.0"),
        ({"dead_channel": 61}, r"^dead_channel = 61: expected at most n_units = 60"),
        ({"jitter_ms": -1.0}, r"jitter_ms = -1.0"),
        ({"behavior_hz": 2000.0}, r"behavior_hz = 2000.0"),
    ],
)
def test_bad_knobs(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        simulate_reaching(**changes)
