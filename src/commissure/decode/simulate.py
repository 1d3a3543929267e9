r"""A simulated motor cortex that reaches: sessions with known truth, for tests, tuning and work without a network.

Hand: minimum-jerk reaches with speed-distance scaling, endpoint noise, curvature and a 20 ms boxcar, at 1 kHz, in cm.
Unit i fires as a Poisson process of log intensity

    log lambda_i(t) = b_i + k_i tanh(2 |v| / 25) cos(theta_i + R r_i x / 8 - angle(v)) + s_i |v| / 25
                      + p_i . pos / 8 + a_i . acc / 100 + W_i . xi(t) + drift_i(t),        all kinematics at t + lag_i,

capped at 150 Hz, then thinned by refractoriness: after a spike the intensity is 0 for 3 ms and recovers as
1 - exp(-(tau - 3 ms) / 3 ms) until 12 ms, where it is whole again.

| symbol | name | law |
|---|---|---|
| exp b_i | `base_rate` | lognormal, median `rate_hz` (6 Hz), log sd .8 |
| theta_i, k_i | `preferred_direction`, `depth` | uniform; Gamma(2, .22) (linear: Gamma(3, .28)) |
| s_i, p_i, a_i | `speed`, `position`, `acceleration` | N(.15, .25), N(0, .25), N(0, .15) |
| R, r_i | `rotation` (knob), `rotation` (unit) | .9 (linear: 0); N(0, 1) |
| lag_i | `lag_s` | uniform in 40 to 160 ms: the neuron leads the hand |
| W_i, xi | `noise_weights` | N(0, `noise`), .5 (linear: .28); 4 Ornstein-Uhlenbeck processes, 200 ms, shared |
| drift_i | `drift` (knob) | Ornstein-Uhlenbeck, 20 s, sd .15 |

The rotation of the preferred direction with posture and the saturating speed gain are what a linear decoder cannot
follow.  Poisson processes are drawn exactly (thinning of candidates at the cap), refractoriness is exact too.

Fine timing (`timing` = rho in (0, 1), off by default): an internal rhythm of `rhythm_hz` (20 Hz: one cycle is 50 ms)
starts at time 0.  Each spike is moved inside its cycle to a phase drawn from a wrapped Cauchy law of resultant length
rho around

    phase_i = eta_i + (pi / 2) d_i . v / 25,      v at the center of the cycle plus lag_i,

with unit vectors d_i and phases eta_i drawn once.  Spikes never leave their cycle, so counts in bins of whole cycles
are, but for refractoriness, the same as without the rhythm: what the phases say about velocity is lost to them.

Own design, after the data of arXiv 2506.05320 (center-out and random-target reaches of monkeys).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float
from pydantic import Field
from scipy.special import gammaincinv, ndtr

from commissure.core.config import Config
from commissure.core.errors import InputError
from commissure.core.rng import generator
from commissure.decode.recording import SpikeRecording

__all__ = ["Kinematics", "Population", "ReachingConfig", "reaching_population", "simulate_reaching", "spike_trains"]

_RATE_CAP_HZ = 150.0
_ABSOLUTE_S, _RECOVERY_S, _RECOVERED_S = 0.003, 0.003, 0.012
_HZ = 1000  # of the kinematic grid
_MARGIN_S = 0.2  # kinematics needed past the end of the recording: the largest lag, rounded up
_SPEED_CM_S, _REACH_CM, _ACCELERATION_CM_S2 = 25.0, 8.0, 100.0  # what one unit of each regressor is
_NOISE_DIM, _NOISE_S, _DRIFT_S, _DRIFT_HZ = 4, 0.2, 20.0, 10
_N_LATENTS = 19  # standard normals that determine one unit


class ReachingConfig(Config):
    """The knobs of `simulate_reaching`; see there."""

    task: Literal["RT", "CO"] = "RT"
    n_units: int = Field(default=60, ge=1)
    duration_s: float = Field(default=240.0, ge=1, allow_inf_nan=False)
    difficulty: Literal["hard", "linear"] = "hard"
    noise: float | None = Field(default=None, ge=0, description="None: .5 when hard, .28 when linear")
    rotation: float | None = Field(default=None, ge=0, description="None: .9 when hard, 0 when linear")
    rate_hz: float = Field(default=6.0, gt=0, le=_RATE_CAP_HZ)
    drift: float = Field(default=0.15, ge=0)
    refractory: bool = True
    timing: float = Field(default=0.0, ge=0, lt=1)
    rhythm_hz: float = Field(default=20.0, gt=0, allow_inf_nan=False)
    subject: int = Field(default=0, ge=0)
    unit_drift: float = Field(default=1.0, ge=0, le=1)
    dropout_units: float = Field(default=0.0, ge=0, le=1)
    dead_channel: int = Field(default=0, ge=0)
    jitter_ms: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    behavior_hz: float = Field(default=100.0, gt=0, le=_HZ)


class Kinematics(NamedTuple):
    """The hand at 1 kHz from time 0, somewhat past the end of the recording, and named intervals (seconds)."""

    position: Float[np.ndarray, "time 2"]  # cm
    velocity: Float[np.ndarray, "time 2"]  # cm/s
    acceleration: Float[np.ndarray, "time 2"]  # cm/s^2
    epochs: dict[str, Float[np.ndarray, "n 2"]]


class Population(NamedTuple):
    """The truth about the units of a session; symbols in the module's docstring."""

    base_rate: Float[np.ndarray, " n_units"]  # Hz, at rest
    preferred_direction: Float[np.ndarray, " n_units"]  # radians
    depth: Float[np.ndarray, " n_units"]
    speed: Float[np.ndarray, " n_units"]
    position: Float[np.ndarray, "n_units 2"]
    acceleration: Float[np.ndarray, "n_units 2"]
    rotation: Float[np.ndarray, " n_units"]  # radians per 8 cm of x
    lag_s: Float[np.ndarray, " n_units"]
    noise_weights: Float[np.ndarray, "n_units 4"]
    timing_direction: Float[np.ndarray, " n_units"]  # radians, of d_i
    timing_phase: Float[np.ndarray, " n_units"]  # radians, eta_i


def simulate_reaching(
    task: Literal["RT", "CO"] = "RT",
    *,
    n_sessions: int = 1,
    n_units: int = 60,
    duration_s: float = 240.0,
    seed: int = 0,
    difficulty: Literal["hard", "linear"] = "hard",
    noise: float | None = None,
    rotation: float | None = None,
    rate_hz: float = 6.0,
    drift: float = 0.15,
    refractory: bool = True,
    timing: float = 0.0,
    rhythm_hz: float = 20.0,
    subject: int = 0,
    unit_drift: float = 1.0,
    dropout_units: float = 0.0,
    dead_channel: int = 0,
    jitter_ms: float = 0.0,
    behavior_hz: float = 100.0,
) -> list[SpikeRecording]:
    """Sessions of a simulated animal that reaches, continuous recordings with hand velocity (cm/s) as behavior.

    - `task`: "RT" random targets in +-10 cm, epochs "random" (moving) and "hold"; "CO" eight targets at 8 cm and back,
      epochs "reach", "return" and "hold".  Epochs cover the recording.  `auxiliary` is the position (cm).
    - `difficulty`, `noise`, `rotation`, `rate_hz`, `drift`, `refractory`, `timing`, `rhythm_hz`: see the module.
    - `subject`: animals differ in pace (lognormal, .08) and in how their reaches bend (N(0, .05) of the distance).
    - `unit_drift`: how far units change from a session to the next, in [0, 1]: 0 the same units, 1 new ones (the
      default).  In between each unit's standard-normal latents follow z' = sqrt(1 - d^2) z + d e, so that every session
      has the same law; unit names are then shared by the sessions.
    - `dropout_units`: fraction of the units that fall silent for good at a uniform time; `dead_channel`: units without
      any spike; `jitter_ms`: standard deviation of a Gaussian error on each spike time.
    - `behavior_hz`: samples of behavior a second.

    Session k depends on `seed`, `subject` and k, not on `n_sessions`; unit i not on `n_units` (but for the last four).

    >>> [recording] = simulate_reaching(duration_s=10.0, n_units=5)
    >>> recording.n_units, recording.behavior.shape, round(recording.duration, 6)
    (5, (1000, 2), 10.0)
    """
    if not isinstance(n_sessions, int) or n_sessions < 1:
        raise InputError("n_sessions", n_sessions, "an integer >= 1")
    config = ReachingConfig(
        task=task,
        n_units=n_units,
        duration_s=duration_s,
        difficulty=difficulty,
        noise=noise,
        rotation=rotation,
        rate_hz=rate_hz,
        drift=drift,
        refractory=refractory,
        timing=timing,
        rhythm_hz=rhythm_hz,
        subject=subject,
        unit_drift=unit_drift,
        dropout_units=dropout_units,
        dead_channel=dead_channel,
        jitter_ms=jitter_ms,
        behavior_hz=behavior_hz,
    )
    if dead_channel > n_units:
        raise InputError("dead_channel", dead_channel, f"at most n_units = {n_units}")
    return [_session(config, seed, session) for session in range(n_sessions)]


def reaching_population(config: ReachingConfig, *, seed: int, session: int = 0) -> Population:
    """The units behind session number `session` of `simulate_reaching` with these knobs and this seed."""
    steps = range(session + 1) if config.unit_drift < 1 else [session]
    z = np.zeros((config.n_units, _N_LATENTS))
    for step in steps:
        fresh = generator(seed, "reaching", config.subject, "population", step).standard_normal(z.shape)
        change = config.unit_drift if step != steps[0] else 1.0
        z = np.sqrt(1 - change**2) * z + change * fresh
    hard = config.difficulty == "hard"
    noise = config.noise if config.noise is not None else (0.5 if hard else 0.28)
    rotation = config.rotation if config.rotation is not None else (0.9 if hard else 0.0)
    shape, scale = (2.0, 0.22) if hard else (3.0, 0.28)
    return Population(
        base_rate=config.rate_hz * np.exp(0.8 * z[:, 0]),
        preferred_direction=np.arctan2(z[:, 2], z[:, 1]),
        depth=scale * gammaincinv(shape, ndtr(z[:, 3])),
        speed=0.15 + 0.25 * z[:, 4],
        position=0.25 * z[:, 5:7],
        acceleration=0.15 * z[:, 7:9],
        rotation=rotation * z[:, 9],
        lag_s=0.04 + 0.12 * ndtr(z[:, 10]),
        noise_weights=noise * z[:, 11:15],
        timing_direction=np.arctan2(z[:, 16], z[:, 15]),
        timing_phase=np.arctan2(z[:, 18], z[:, 17]),
    )


def _session(config: ReachingConfig, seed: int, session: int) -> SpikeRecording:
    path = ("reaching", config.subject, "session", session)
    population = reaching_population(config, seed=seed, session=session)
    kinematics = _kinematics(config, seed, session)
    trains = spike_trains(population, kinematics, config, seed=seed, session=session)
    rng = generator(seed, *path, "faults")
    trains = _faulty(trains, config, rng)
    times = np.concatenate(trains)
    units = np.repeat(np.arange(config.n_units), [len(train) for train in trains])
    if config.jitter_ms:
        times = times + rng.normal(0.0, config.jitter_ms / 1000, len(times))
        inside = (times >= 0) & (times < config.duration_s)
        times, units = times[inside], units[inside]
    order = np.argsort(times, kind="stable")
    n_samples = int(np.ceil(config.duration_s * config.behavior_hz - 1e-9))
    samples = np.arange(n_samples) / config.behavior_hz
    name = f"simulated-{config.task}-{seed}-subject-{config.subject}"
    owner = f"{name}-session-{session}" if config.unit_drift == 1 else name
    return SpikeRecording(
        times[order],
        units[order],
        unit_ids=tuple(f"{owner}/{unit}" for unit in range(config.n_units)),
        behavior=_sampled(kinematics.velocity, samples),
        behavior_times=samples,
        session=f"{name}-session-{session}",
        subject=f"simulated-{seed}-subject-{config.subject}",
        epochs=kinematics.epochs,
        auxiliary=_sampled(kinematics.position, samples),
    )


def _sampled(values: np.ndarray, times: np.ndarray) -> np.ndarray:
    grid = np.arange(len(values)) / _HZ
    return np.stack([np.interp(times, grid, column) for column in values.T], axis=1)


def _faulty(trains: list[np.ndarray], config: ReachingConfig, rng: np.random.Generator) -> list[np.ndarray]:
    trains = list(trains)
    silent_from = rng.uniform(0.0, config.duration_s, config.n_units)
    order = rng.permutation(config.n_units)
    for unit in order[: config.dead_channel]:
        trains[unit] = trains[unit][:0]
    n_lost = round(config.dropout_units * config.n_units)
    for unit in rng.permutation(config.n_units)[:n_lost]:
        trains[unit] = trains[unit][trains[unit] < silent_from[unit]]
    return trains


class _Movement(NamedTuple):
    """A stay (`epoch` "hold") or a reach, `start` to `start + length` seconds."""

    epoch: str
    start: float
    length: float
    origin: np.ndarray
    target: np.ndarray
    curvature: float


def _kinematics(config: ReachingConfig, seed: int, session: int) -> Kinematics:
    movements = _movements(config, seed, session)
    n_samples = round((config.duration_s + _MARGIN_S) * _HZ) + 1
    starts = np.array([movement.start for movement in movements])
    times = np.arange(n_samples) / _HZ
    row = np.searchsorted(starts, times, side="right") - 1
    lengths = np.array([movement.length for movement in movements])
    fraction = np.clip((times - starts[row]) / lengths[row], 0.0, 1.0)
    progress = fraction**3 * (10 - 15 * fraction + 6 * fraction**2)  # minimum jerk
    origin = np.array([movement.origin for movement in movements])
    way = np.array([movement.target for movement in movements]) - origin
    bend = np.stack([-way[:, 1], way[:, 0]], axis=1) * np.array([m.curvature for m in movements])[:, None]
    path = origin[row] + way[row] * progress[:, None] + bend[row] * np.sin(np.pi * progress)[:, None]
    position = _boxcar(path, round(0.02 * _HZ))
    velocity = np.gradient(position, axis=0) * _HZ
    return Kinematics(position, velocity, np.gradient(velocity, axis=0) * _HZ, _epochs(movements, config.duration_s))


def _movements(config: ReachingConfig, seed: int, session: int) -> list[_Movement]:
    animal = generator(seed, "reaching", config.subject, "animal")
    pace, bend = np.exp(0.08 * animal.standard_normal()), 0.05 * animal.standard_normal()
    rng = generator(seed, "reaching", config.subject, "session", session, "hand")
    movements: list[_Movement] = []
    time, hand, outward = 0.0, np.zeros(2), True
    while time < config.duration_s + _MARGIN_S:
        stay = rng.uniform(0.02, 0.12) if config.task == "RT" else rng.uniform(0.2, 0.5)
        movements.append(_Movement("hold", time, stay, hand, hand, 0.0))
        if config.task == "RT":
            epoch, goal = "random", rng.uniform(-10.0, 10.0, 2)
        elif outward:
            angle = rng.integers(8) * np.pi / 4
            epoch, goal = "reach", _REACH_CM * np.array([np.cos(angle), np.sin(angle)])
        else:
            epoch, goal = "return", np.zeros(2)
        goal = goal + rng.normal(0.0, 0.4, 2)
        distance = float(np.hypot(*(goal - hand)))
        length = float(np.clip((0.28 + 0.035 * distance) * pace * np.exp(0.18 * rng.standard_normal()), 0.25, 1.0))
        movements.append(_Movement(epoch, time + stay, length, hand, goal, bend + 0.12 * rng.standard_normal()))
        time, hand, outward = time + stay + length, goal, not outward
    return movements


def _epochs(movements: list[_Movement], duration_s: float) -> dict[str, np.ndarray]:
    epochs: dict[str, list[tuple[float, float]]] = {}
    for movement in movements:
        if movement.start < duration_s:
            stop = min(movement.start + movement.length, duration_s)
            epochs.setdefault(movement.epoch, []).append((movement.start, stop))
    return {name: np.array(intervals) for name, intervals in epochs.items()}


def _boxcar(values: np.ndarray, width: int) -> np.ndarray:
    """Centered moving mean of an even `width`, the ends repeated."""
    padded = np.pad(values, ((width // 2 + 1, width - width // 2 - 1), (0, 0)), mode="edge")
    total = np.cumsum(padded, axis=0)
    return (total[width:] - total[:-width]) / width


def spike_trains(
    population: Population, kinematics: Kinematics, config: ReachingConfig, *, seed: int, session: int = 0
) -> list[Float[np.ndarray, " n_spikes"]]:
    """Sorted spike times of each unit in `[0, duration_s)`, before faults and jitter."""
    path = ("reaching", config.subject, "session", session)
    n_samples = len(kinematics.velocity)
    shared = _ornstein_uhlenbeck(generator(seed, *path, "noise"), n_samples, _NOISE_DIM, _NOISE_S * _HZ)
    speed = np.hypot(*kinematics.velocity.T)
    hand = _Hand(kinematics, speed, np.tanh(2 * speed / _SPEED_CM_S), np.arctan2(*kinematics.velocity.T[::-1]))
    proposals, rngs = [], []
    for unit in range(len(population.lag_s)):
        rng = generator(seed, *path, "unit", unit)
        drift = config.drift * _ornstein_uhlenbeck(rng, int(config.duration_s * _DRIFT_HZ) + 1, 1, _DRIFT_S * _DRIFT_HZ)
        times = _uniform_order_statistics(rng, rng.poisson(_RATE_CAP_HZ * config.duration_s)) * config.duration_s
        rate = np.exp(_log_rate(population, unit, hand, shared, times) + drift[(times * _DRIFT_HZ).astype(np.int64), 0])
        times = times[rng.random(len(times)) * _RATE_CAP_HZ < rate]
        if config.timing:
            times = _phase_locked(times, population, unit, kinematics.velocity, config, rng)
        proposals.append(times)
        rngs.append(rng)
    return _refractory(proposals, rngs) if config.refractory else proposals


def _uniform_order_statistics(rng: np.random.Generator, n: int) -> Float[np.ndarray, " n"]:
    """Sorted uniforms in (0, 1), from exponential spacings: no sorting."""
    total = np.cumsum(rng.standard_exponential(n + 1))
    return total[:-1] / total[-1]


class _Hand(NamedTuple):
    kinematics: Kinematics
    speed: np.ndarray
    gain: np.ndarray
    angle: np.ndarray


def _log_rate(population: Population, unit: int, hand: _Hand, shared: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Log intensity without drift at `times`, from the millisecond each of them, and it plus the lag, falls into."""
    ahead = ((times + population.lag_s[unit]) * _HZ).astype(np.int64)
    position = hand.kinematics.position[ahead]
    preferred = population.preferred_direction[unit] + population.rotation[unit] * position[:, 0] / _REACH_CM
    return (
        np.log(population.base_rate[unit])
        + population.depth[unit] * hand.gain[ahead] * np.cos(preferred - hand.angle[ahead])
        + population.speed[unit] * hand.speed[ahead] / _SPEED_CM_S
        + position @ population.position[unit] / _REACH_CM
        + hand.kinematics.acceleration[ahead] @ population.acceleration[unit] / _ACCELERATION_CM_S2
        + shared[(times * _HZ).astype(np.int64)] @ population.noise_weights[unit]
    )


def _phase_locked(
    times: np.ndarray,
    population: Population,
    unit: int,
    velocity: np.ndarray,
    config: ReachingConfig,
    rng: np.random.Generator,
) -> np.ndarray:
    """Each spike at a new phase of its own cycle; a spike of a last, partial cycle stays where it is."""
    cycle = np.floor(times * config.rhythm_hz)
    ahead = (cycle + 0.5) / config.rhythm_hz + population.lag_s[unit]
    seen = velocity[np.minimum((ahead * _HZ).astype(np.int64), len(velocity) - 1)] / _SPEED_CM_S
    direction = population.timing_direction[unit]
    mean = population.timing_phase[unit] + np.pi / 2 * (np.cos(direction) * seen[:, 0] + np.sin(direction) * seen[:, 1])
    spread = (1 - config.timing) / (1 + config.timing)
    angle = mean + 2 * np.arctan(spread * np.tan(np.pi * (rng.random(len(times)) - 0.5)))  # wrapped Cauchy
    moved = (cycle + np.mod(angle / (2 * np.pi), 1.0)) / config.rhythm_hz
    whole = (cycle + 1) / config.rhythm_hz <= config.duration_s + 1e-9
    return np.sort(np.where(whole, np.minimum(moved, np.nextafter(config.duration_s, 0)), times))


def _refractory(proposals: list[np.ndarray], rngs: list[np.random.Generator]) -> list[np.ndarray]:
    """Keep a proposed spike with the probability of having recovered since the last kept one.

    A spike recovers after 3 ms + an exponential time of mean 3 ms, at most 12 ms in all, so it is kept when that time
    has passed.  Proposals 12 ms apart do not interact: they cut the train into clusters, and the n-th spikes of all
    clusters of all units are decided at once.
    """
    needed = [
        np.minimum(_ABSOLUTE_S + rng.exponential(_RECOVERY_S, len(t)), _RECOVERED_S)
        for t, rng in zip(proposals, rngs, strict=True)
    ]
    times, need = np.concatenate(proposals), np.concatenate(needed)
    bounds = np.cumsum([0, *map(len, proposals)])
    fresh = np.diff(times, prepend=-np.inf) >= _RECOVERED_S
    fresh[bounds[:-1][bounds[:-1] < len(times)]] = True
    starts = np.flatnonzero(fresh)
    sizes = np.diff(starts, append=len(times))
    by_size = np.argsort(-sizes, kind="stable")
    starts, sizes = starts[by_size], sizes[by_size]
    kept, last = fresh, times[starts]
    for ordinal in range(1, int(sizes[0]) if len(sizes) else 0):
        n_active = int(np.searchsorted(-sizes, -ordinal, side="left"))
        rows = starts[:n_active] + ordinal
        passed = times[rows] - last[:n_active] >= need[rows]
        kept[rows] = passed
        last[:n_active][passed] = times[rows[passed]]
    return [times[a:b][kept[a:b]] for a, b in pairwise(bounds.tolist())]


def _ornstein_uhlenbeck(rng: np.random.Generator, n: int, dim: int, decay: float) -> np.ndarray:
    """Stationary unit-variance processes (n, dim) with correlation exp(-k / decay) at k samples.

    The recurrence x_k = a x_{k-1} + sqrt(1 - a^2) e_k by doubling: after pass j a sample holds its last 2^j
    innovations; it stops where what is left weighs less than float64's rounding.
    """
    a = np.exp(-1.0 / decay)
    x = rng.standard_normal((n, dim)) * np.sqrt(1 - a**2)
    x[0] /= np.sqrt(1 - a**2)
    span = 1
    while span < n and a**span > 1e-17:
        x[span:] += a**span * x[:-span].copy()
        span *= 2
    return x
