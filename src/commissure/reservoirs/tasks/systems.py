"""Chaotic systems from their published equations, integrated at a stated step.

| name           | equation                                                    | source                           |
|----------------|-------------------------------------------------------------|----------------------------------|
| logistic       | x <- 4 x (1 - x)                                            | May 1976                         |
| henon          | x <- 1 - 1.4 x^2 + y,  y <- 0.3 x                           | Henon 1976                       |
| lorenz         | x' = 10 (y - x),  y' = x (28 - z) - y,  z' = x y - 8/3 z    | Lorenz 1963                      |
| rossler        | x' = -y - z,  y' = x + 0.2 y,  z' = 0.2 + z (x - 5.7)       | Rossler 1976                     |
| multiscroll    | x' = 35 (y - x),  y' = -7 x - x z + 28 y,  z' = x y - 3 z   | Chen & Ueta 1999                 |
| doublescroll   | two diodes and a resistor: `_doublescroll`                  | Chang et al. 1998; Gauthier 2021 |
| rabinovich_fabrikant | alpha = 1.1, gamma = 0.87: `_rabinovich_fabrikant`    | Rabinovich & Fabrikant 1979      |
| lorenz96       | x_i' = (x_{i+1} - x_{i-2}) x_{i-1} - x_i + 8,  40 sites     | Lorenz & Emanuel 1998            |
| mackey_glass   | x' = 0.2 x_17 / (1 + x_17^10) - 0.1 x,  x_17 = x(t - 17)    | Mackey & Glass 1977              |

Flows advance by the classical Runge-Kutta rule of order 4, several steps between samples; the delay equation by the
same rule, with the delayed value between two steps by cubic Hermite interpolation, of order 4 as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from commissure.core.errors import InputError
from commissure.reservoirs.inputs import named, numbers, whole

__all__ = ["SYSTEMS", "System", "advance", "simulate"]

Rule = Callable[..., tuple[float, ...]]


class System(NamedTuple):
    """A map (`interval` 0: one application a sample) or a flow sampled every `interval`, with RK4 steps of `step`.

    `start` is near the attractor, each coordinate of a run is drawn within `spread` of it; the first `transient`
    samples are dropped.  `delay` > 0: `rule(x, x(t - delay))`, the history before the start constant.
    """

    rule: Rule
    start: tuple[float, ...]
    spread: float
    transient: int
    interval: float = 0.0
    step: float = 0.0
    delay: float = 0.0


def simulate(name: str, n_samples: int, *, rng: np.random.Generator) -> Float[np.ndarray, "time coordinates"]:
    """`n_samples` samples on the attractor of the system `name`, from a start drawn by `rng`.

    >>> simulate("henon", 3, rng=np.random.default_rng(0)).shape
    (3, 2)
    """
    named("system", name, tuple(SYSTEMS))
    n_samples, system = whole("n_samples", n_samples, 1), SYSTEMS[name]
    if not isinstance(rng, np.random.Generator):
        raise InputError("rng", type(rng).__name__, "a numpy Generator", "pass core.rng.generator(seed)")
    start = [value + float(rng.uniform(-system.spread, system.spread)) for value in system.start]
    return advance(system, start, system.transient + n_samples)[system.transient :]


def advance(system: System, start: Sequence[float], n_samples: int) -> Float[np.ndarray, "time coordinates"]:
    """The `n_samples` samples that follow the state `start` (for a delay equation: the constant history)."""
    n_samples = whole("n_samples", n_samples, 1)
    if not isinstance(system, System):
        raise InputError("system", type(system).__name__, "a System", "pass for example SYSTEMS['lorenz']")
    if numbers("start", start).shape != (len(system.start),):
        raise InputError("start", np.shape(start), f"{len(system.start)} numbers, one a coordinate")
    n_steps = round(system.interval / system.step) if system.step else 1
    if system.delay:
        series = _delayed(system, float(start[0]), n_samples * n_steps)
        return np.array(series[n_steps::n_steps])[:, None]
    state, samples = tuple(float(value) for value in start), []
    for _ in range(n_samples):
        for _ in range(n_steps):
            state = _runge_kutta(system.rule, state, system.step) if system.step else system.rule(*state)
        samples.append(state)
    return np.array(samples)


def _runge_kutta(rule: Rule, x: tuple[float, ...], h: float) -> tuple[float, ...]:
    """One classical step of order 4; plain floats, because numpy's overhead is larger than these sums."""
    k1 = rule(*x)
    k2 = rule(*[a + 0.5 * h * b for a, b in zip(x, k1, strict=True)])
    k3 = rule(*[a + 0.5 * h * b for a, b in zip(x, k2, strict=True)])
    k4 = rule(*[a + h * b for a, b in zip(x, k3, strict=True)])
    return tuple([a + h / 6 * (p + 2 * (q + r) + s) for a, p, q, r, s in zip(x, k1, k2, k3, k4, strict=True)])


def _delayed(system: System, history: float, n_steps: int) -> list[float]:
    """x(0), x(h), ... of a scalar delay equation whose delay is a whole number of steps."""
    h, lag = system.step, round(system.delay / system.step)
    (slope,) = system.rule(history, history)
    x, slopes = [history], [slope]
    for n in range(n_steps):
        past, ahead = n - lag, n + 1 - lag  # the step the delayed value goes through
        if ahead <= 0:
            begin = middle = end = history
        else:
            begin, end = x[past], x[ahead]
            middle = (begin + end) / 2 + h / 8 * (slopes[past] - slopes[ahead])
        now = x[n]
        (k1,) = system.rule(now, begin)
        (k2,) = system.rule(now + 0.5 * h * k1, middle)
        (k3,) = system.rule(now + 0.5 * h * k2, middle)
        (k4,) = system.rule(now + h * k3, end)
        x.append(now + h / 6 * (k1 + 2 * (k2 + k3) + k4))
        slopes.append(system.rule(x[-1], end)[0])
    return x


def _logistic(x: float) -> tuple[float, ...]:
    return (4.0 * x * (1.0 - x),)


def _henon(x: float, y: float) -> tuple[float, ...]:
    return 1.0 - 1.4 * x * x + y, 0.3 * x


def _lorenz(x: float, y: float, z: float) -> tuple[float, ...]:
    return 10.0 * (y - x), x * (28.0 - z) - y, x * y - 8.0 / 3.0 * z


def _rossler(x: float, y: float, z: float) -> tuple[float, ...]:
    return -y - z, x + 0.2 * y, 0.2 + z * (x - 5.7)


def _multiscroll(x: float, y: float, z: float) -> tuple[float, ...]:
    return 35.0 * (y - x), -7.0 * x - x * z + 28.0 * y, x * y - 3.0 * z


def _doublescroll(v1: float, v2: float, current: float) -> tuple[float, ...]:
    """The dimensionless circuit: R1 = 1.2, R2 = 3.44, R4 = 0.193, beta = 11.6, I_r = 2.25e-5."""
    difference = v1 - v2
    through = difference / 3.44 + 2 * 2.25e-5 * math.sinh(11.6 * difference)
    return v1 / 1.2 - through, through - current, v2 - 0.193 * current


def _rabinovich_fabrikant(x: float, y: float, z: float) -> tuple[float, ...]:
    """Plasma waves: alpha = 1.1, gamma = 0.87."""
    return y * (z - 1.0 + x * x) + 0.87 * x, x * (3.0 * z + 1.0 - x * x) + 0.87 * y, -2.0 * z * (1.1 + x * y)


def _lorenz96(*x: float) -> tuple[float, ...]:
    n = len(x)
    return tuple([(x[(i + 1) % n] - x[i - 2]) * x[i - 1] - x[i] + 8.0 for i in range(n)])


def _mackey_glass(x: float, delayed: float) -> tuple[float, ...]:
    return (0.2 * delayed / (1.0 + delayed**10) - 0.1 * x,)


# Steps are small enough that halving them moves a tenth of a Lyapunov time by less than 1e-5 of the attractor (a test).
SYSTEMS = {
    "logistic": System(_logistic, (0.4,), 0.3, transient=100),
    "henon": System(_henon, (0.0, 0.0), 0.1, transient=100),
    "lorenz": System(_lorenz, (1.0, 1.0, 25.0), 1.0, transient=2000, interval=0.02, step=0.005),
    "rossler": System(_rossler, (1.0, 1.0, 0.0), 1.0, transient=5000, interval=0.2, step=0.02),
    "multiscroll": System(_multiscroll, (-3.0, 2.0, 20.0), 1.0, transient=4000, interval=0.01, step=0.0025),
    "doublescroll": System(_doublescroll, (0.37, -0.22, 0.05), 0.05, transient=1500, interval=0.25, step=0.05),
    "rabinovich_fabrikant": System(
        _rabinovich_fabrikant, (-1.0, 0.0, 0.5), 0.01, transient=4000, interval=0.05, step=0.0125
    ),
    "lorenz96": System(_lorenz96, (8.0,) * 40, 1.0, transient=500, interval=0.05, step=0.0125),
    "mackey_glass": System(_mackey_glass, (1.0,), 0.3, transient=2000, interval=1.0, step=0.1, delay=17.0),
}
