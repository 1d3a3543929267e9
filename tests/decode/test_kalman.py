"""The Kalman filter: Gaussian conditioning, the Riccati equation, causality, restarts, bad input."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import solve_discrete_are

from commissure.core.errors import DegenerateError, InputError, NotFittedError
from commissure.decode.kalman import KalmanFilter, KalmanParameters, kalman_filter, kalman_gains
from commissure.decode.recording import SpikeRecording


def _parameters(seed: int, state: int = 3, n_units: int = 5) -> KalmanParameters:
    rng = np.random.default_rng(seed)

    def covariance(n: int) -> np.ndarray:
        root = rng.normal(size=(n, n))
        return root @ root.T / n + 0.1 * np.eye(n)

    transition = rng.normal(size=(state, state))
    transition *= 0.9 / np.abs(np.linalg.eigvals(transition)).max()
    return KalmanParameters(
        transition,
        rng.normal(size=state),
        covariance(state),
        rng.normal(size=(n_units, state)),
        rng.normal(size=n_units),
        covariance(n_units),
        rng.normal(size=state),
        covariance(state),
    )


def _conditioned(p: KalmanParameters, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """E and Cov of s_T given z_0..z_T from the joint Gaussian of all states and observations, written out."""
    steps, state = len(z), len(p.offset)
    mean, cov = [p.initial_mean], np.zeros((steps * state, steps * state))
    for _ in range(1, steps):
        mean.append(p.transition @ mean[-1] + p.offset)
    marginal = p.initial_covariance
    for t in range(steps):
        block = marginal
        for u in range(t, steps):
            cov[u * state : (u + 1) * state, t * state : (t + 1) * state] = block
            cov[t * state : (t + 1) * state, u * state : (u + 1) * state] = block.T
            block = p.transition @ block
        marginal = p.transition @ marginal @ p.transition.T + p.process_noise
    observe = np.kron(np.eye(steps), p.observation)
    noise = np.kron(np.eye(steps), p.observation_noise)
    expected = observe @ np.concatenate(mean) + np.tile(p.baseline, steps)
    gain = cov @ observe.T @ np.linalg.inv(observe @ cov @ observe.T + noise)
    posterior = np.concatenate(mean) + gain @ (z.ravel() - expected)
    return posterior[-state:], (cov - gain @ observe @ cov)[-state:, -state:]


@pytest.mark.parametrize("seed", range(3))
def test_equals_conditioning_of_the_joint_gaussian(seed: int) -> None:
    parameters = _parameters(seed)
    z = np.random.default_rng(seed + 50).normal(size=(5, 5))
    means = kalman_filter(parameters, [z])[0]
    covariances, _ = kalman_gains(parameters, 5)
    for t in range(5):
        mean, covariance = _conditioned(parameters, z[: t + 1])
        np.testing.assert_allclose(means[t], mean, atol=1e-10)
        np.testing.assert_allclose(covariances[t], covariance, atol=1e-10)


@pytest.mark.parametrize("seed", range(3))
def test_steady_gain_solves_the_riccati_equation(seed: int) -> None:
    p = _parameters(seed)
    predicted = solve_discrete_are(p.transition.T, p.observation.T, p.process_noise, p.observation_noise)
    innovation = p.observation @ predicted @ p.observation.T + p.observation_noise
    expected = predicted @ p.observation.T @ np.linalg.inv(innovation)
    covariances, information = kalman_gains(p, 500)
    np.testing.assert_allclose(covariances[-1] @ information, expected, atol=1e-10)


def test_steady_gain_of_a_fitted_filter_with_lead_and_history() -> None:
    p = KalmanFilter(lead=1, history=1, shrinkage=0.3, power=0.5).fit(_recording()).parameters
    predicted = solve_discrete_are(p.transition.T, p.observation.T, p.process_noise, p.observation_noise)
    expected = (
        predicted @ p.observation.T @ np.linalg.inv(p.observation @ predicted @ p.observation.T + p.observation_noise)
    )
    covariances, information = kalman_gains(p, 500)
    np.testing.assert_allclose(covariances[-1] @ information, expected, atol=1e-9)


def _recording(seed: int = 0, *, trials: int = 40, length: int = 8, noise: float = 0.3) -> SpikeRecording:
    """Smooth 2-d velocity; square-root counts of 20 units follow it one bin ahead."""
    rng = np.random.default_rng(seed)
    tuning = np.random.default_rng(7).normal(size=(2, 20))
    counts, velocity, position = [], [], []
    for _ in range(trials):
        v = np.zeros((length + 1, 2))
        v[0] = rng.normal(size=2)
        for t in range(1, length + 1):
            v[t] = 0.9 * v[t - 1] + 0.4 * rng.normal(size=2)
        root = 3 + v[1:] @ tuning * 0.5 + noise * rng.normal(size=(length, 20))
        counts.append(np.rint(np.maximum(root, 0) ** 2).astype(int))
        velocity.append(v[:-1])
        position.append(np.cumsum(v[:-1], axis=0))
    return SpikeRecording.from_counts(counts, 0.1, behavior=velocity, auxiliary=position, session="s")


def test_cross_validation_finds_the_lead() -> None:
    model = KalmanFilter().fit(_recording())
    assert model.selection.lead >= 1
    assert model.selection.score is not None
    leading = model.score(_recording(1))
    blind = KalmanFilter(lead=0, history=0, position=False, shrinkage=0.1, power=0.5).fit(_recording())
    assert blind.selection.score is None
    assert leading > 0.85
    assert leading > blind.score(_recording(1)) + 0.02


def test_same_seed_same_filter() -> None:
    a, b = (KalmanFilter(folds=3).fit(_recording(), seed=4) for _ in range(2))
    assert a.selection == b.selection
    np.testing.assert_array_equal(a.parameters.observation, b.parameters.observation)


def test_causal_and_restarts_at_each_trial() -> None:
    model = KalmanFilter(lead=2, history=1, position=True, shrinkage=0.3, power=0.5).fit(_recording())
    test = _recording(2, trials=3)
    whole = model.predict(test).reshape(3, 8, 2)
    for trial in range(3):
        np.testing.assert_allclose(model.predict(test.select_trials([trial])), whole[trial], atol=1e-12)
    counts = np.stack([segment.counts for segment in test.binned(0.1)]).astype(int)
    counts[1, 5:] += 4
    changed = SpikeRecording.from_counts(list(counts), 0.1, behavior=[np.zeros((8, 2))] * 3, session="s")
    other = model.predict(changed).reshape(3, 8, 2)
    np.testing.assert_array_equal(other[[0, 2]], whole[[0, 2]])
    np.testing.assert_array_equal(other[1, :5], whole[1, :5])
    assert np.abs(other[1, 5:] - whole[1, 5:]).min() > 0


def test_shift_structure_of_the_transition() -> None:
    p = KalmanFilter(lead=1, history=1, position=False, shrinkage=0.3, power=0.5).fit(_recording()).parameters
    np.testing.assert_array_equal(p.transition[2:], np.eye(6)[:4])
    np.testing.assert_array_equal(p.process_noise[2:], 0)
    np.testing.assert_array_equal(p.offset[2:], 0)


def test_silent_units_and_constant_kinematics_are_regularized() -> None:
    source = _recording()
    counts = [np.hstack([s.counts, np.zeros((8, 3))]).astype(int) for s in source.binned(0.1)]
    behavior = [s.behavior for s in source.binned(0.1)]
    constant = [np.full((8, 2), 7.0)] * len(counts)
    recording = SpikeRecording.from_counts(counts, 0.1, behavior=behavior, auxiliary=constant, session="s")
    model = KalmanFilter(lead=1, history=0, position=True, shrinkage=0.0, power=0.5).fit(recording)
    without = KalmanFilter(lead=1, history=0, position=False, shrinkage=0.0, power=0.5).fit(source)
    assert np.linalg.cond(model.parameters.observation_noise) < 1e3 * 23 * 10
    assert model.noise_floor == 1e-3
    assert model.score(recording) == pytest.approx(without.score(source), abs=1e-3)


def test_fewer_rows_than_units_stays_finite() -> None:
    rng = np.random.default_rng(0)
    velocity = np.cumsum(rng.normal(size=(30, 2)), axis=0)
    counts = rng.poisson(2.0, size=(30, 80))
    recording = SpikeRecording.from_counts(counts, 0.1, behavior=velocity, session="s")
    assert np.isfinite(KalmanFilter().fit(recording).predict(recording)).all()


def test_continuous_recording_with_gaps_in_behavior() -> None:
    source = _recording(trials=1, length=300)
    keep = np.ones(300, dtype=bool)
    keep[100:120] = False
    recording = SpikeRecording(
        source.times,
        source.units,
        unit_ids=source.unit_ids,
        behavior=source.behavior[keep],
        behavior_times=source.behavior_times[keep],
        session="s",
        bin_s=0.1,
    )
    model = KalmanFilter().fit(recording)
    assert model.score(recording) > 0.8
    assert np.isfinite(model.predict(recording, at=source.behavior_times)).all()


def test_bad_input() -> None:
    recording = _recording(trials=4)
    with pytest.raises(NotFittedError, match="call fit"):
        KalmanFilter().predict(recording)
    bad = (("lead", -1), ("history", -1), ("shrinkage", 1.5), ("power", 0.0), ("folds", 1))
    for argument, value in bad:
        with pytest.raises(InputError, match=argument):
            KalmanFilter(**{argument: value})  # type: ignore[arg-type]
    plain = SpikeRecording.from_counts(np.ones((9, 2), int), 0.1, behavior=np.arange(9.0)[:, None], session="s")
    with pytest.raises(InputError, match="position"):
        KalmanFilter(position=True).fit(plain)
    with pytest.raises(DegenerateError, match="do not vary"):
        KalmanFilter(lead=0, history=0, shrinkage=0.5, power=0.5).fit(plain)
    model = KalmanFilter(lead=0, history=0, position=False, shrinkage=0.5, power=0.5).fit(recording)
    with pytest.raises(InputError, match="18 missing"):
        model.predict(plain)
    single = SpikeRecording.from_counts([np.ones((1, 2), int)] * 3, 0.1, behavior=[[[1.0]]] * 3, session="s")
    with pytest.raises(DegenerateError, match="no dynamics"):
        KalmanFilter(lead=0, history=0, shrinkage=0.5, power=0.5).fit(single)


def test_shrinkage_leaves_variances_and_scales_covariances() -> None:
    plain, shrunk = (
        KalmanFilter(lead=1, history=0, position=False, shrinkage=s, power=0.5).fit(_recording()).parameters
        for s in (0.0, 0.3)
    )
    off = ~np.eye(20, dtype=bool)
    np.testing.assert_allclose(shrunk.observation_noise[off], 0.7 * plain.observation_noise[off], atol=1e-12)
    np.testing.assert_allclose(np.diag(shrunk.observation_noise), np.diag(plain.observation_noise), atol=1e-12)
