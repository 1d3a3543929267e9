"""How a driven reservoir treats small disturbances: Lyapunov exponents, and the regime they and the branches name.

    delta_t = delta_{t-1} J_t,    J_t = (1 - leak) I + W diag(leak f'(p_t))        rows, as the states
    Q_t R_t = (Q_{t-1} J_t ...)',    lambda_j = mean log |R_jj| / steps between factorizations

| symbol   | name                                             |
|----------|--------------------------------------------------|
| lambda_j | `exponents`: nats per step, the largest first    |
| Q        | `k` orthonormal tangents, carried along the orbit |

A reservoir whose largest exponent is negative forgets a small disturbance.  It may still remember which of several
branches it started on: with non-negative weights and a spectral radius above 1, x and -x are two of them, and what
was published as chaos is that.  Benettin et al., Meccanica 15 (1980); bioRxiv 2025.06.20.660760.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike
from torch import Tensor

from commissure.core.errors import InputError
from commissure.core.mixer import select
from commissure.core.rng import generator
from commissure.native.reservoir import reservoir_scan
from commissure.reservoirs.inputs import numbers, whole
from commissure.reservoirs.reservoir import Reservoir, ReservoirState
from commissure.reservoirs.state_noise import place_noise

__all__ = ["Lyapunov", "Regime", "lyapunov", "lyapunov_reference", "regime"]

_INTERVAL = 10  # steps between factorizations, halved where they would lose digits
_BLOCKS = 20  # whose means give the standard error
_MARGINAL = 5e-3  # nats per step: a disturbance takes 200 steps to change by a factor e
_CONVERGED = 1e-3  # distance of two orbits, of the size of the states


class Lyapunov(NamedTuple):
    """Exponents in nats per step, largest first, and their standard errors from the means of 20 blocks of time.

    An exponent is -inf, its error nan, where some step wipes the tangents out (a matrix of low rank, a flat f).
    """

    exponents: Float[np.ndarray, " k"]
    standard_errors: Float[np.ndarray, " k"]


class Regime(NamedTuple):
    """The regime's name, the exponent that gives it, and how far apart orbits from several starts ended.

    `distance` is the largest between any two of them at the end, of the root mean square state of the run.
    """

    name: Literal["ordered", "marginal", "chaotic", "bistable"]
    exponent: float
    standard_error: float
    distance: float


def lyapunov(reservoir: Reservoir, u: ArrayLike, *, k: int = 1, warmup: int = 100, seed: int = 0) -> Lyapunov:
    """The `k` largest Lyapunov exponents of `reservoir` driven by `u` (time, inputs), from rest.

    Orbit and `k` random tangents (drawn by `seed`) run `warmup` steps first; at least 20 steps must follow.  State
    noise is part of the orbit.  States rounded to `state_bits` have no exponents: InputError.

    >>> cycle = Reservoir([[0.0, 0.5], [0.5, 0.0]], spectral_radius=None, activation="linear", dtype=torch.float64)
    >>> lyapunov(cycle, np.zeros((200, 1)), k=2).exponents.round(9) == np.log([0.5, 0.5]).round(9)
    array([ True,  True])
    """
    drive = _checked(reservoir, u, k, warmup)
    drawn = generator(seed, "tangents").normal(size=(reservoir.n_nodes, k))
    tangents = torch.from_numpy(np.linalg.qr(drawn)[0].T).to(drive)[None]
    return _exponents(reservoir, drive, reservoir.init_state(1), tangents, warmup)


def lyapunov_reference(reservoir: Reservoir, u: ArrayLike, *, k: int = 1, warmup: int = 100, seed: int = 0) -> Lyapunov:
    """`lyapunov` from the full Jacobian of each step, by automatic differentiation, and a dense QR after each step."""
    drive = _checked(reservoir, u, k, warmup)[0].double()
    tangents, logs = np.eye(reservoir.n_nodes), []
    state = torch.zeros(reservoir.n_nodes, dtype=torch.float64)
    weights = torch.zeros(reservoir.n_nodes, reservoir.n_nodes, dtype=torch.float64)
    for target, (start, end) in enumerate(zip(reservoir.starts[:-1], reservoir.starts[1:], strict=True)):
        for entry in range(int(start), int(end)):
            weights[int(reservoir.sources[entry]), target] += float(reservoir.values[entry])
    functions = {"tanh": torch.tanh, "linear": lambda p: p, "relu": torch.relu, "sigmoid": torch.sigmoid}
    if reservoir.activation not in functions or reservoir.state_noise:
        raise InputError(
            "reservoir", (reservoir.activation, reservoir.state_noise), f"one of {list(functions)}, no noise"
        )
    function = functions[reservoir.activation]
    leak, bias, inputs = reservoir.leak.double(), reservoir.bias.double(), reservoir.input_weights.double()
    for u_t in drive:

        def step(x: Tensor, u_t: Tensor = u_t) -> Tensor:
            return (1 - leak) * x + leak * function(x @ weights + u_t @ inputs + bias)

        jacobian = torch.autograd.functional.jacobian(step, state).numpy()  # [to, from]
        state = step(state)
        tangents, r = np.linalg.qr(jacobian @ tangents)
        with np.errstate(divide="ignore"):
            logs.append(np.log(np.abs(np.diag(r))))
    rates = np.array(logs)[warmup:]
    exponents, errors = _summarized(rates)
    return Lyapunov(exponents[:k], errors[:k])


def regime(reservoir: Reservoir, u: ArrayLike, *, warmup: int = 100, seed: int = 0) -> Regime:
    """The regime of `reservoir` driven by `u` (time, inputs), by its largest exponent L and orbits from three starts.

    L belongs to the orbit from the drawn start: rest may be a fixed point that no disturbed network stays at.

    | name     | L                                                 | starts: rest's two sides and one drawn by `seed` |
    |----------|---------------------------------------------------|--------------------------------------------------|
    | chaotic  | above 0.005 nats per step and two standard errors | -                                                |
    | marginal | otherwise above -0.005 or minus two such errors   | -                                                |
    | bistable | below                                             | orbits stay apart, ten times what L would leave  |
    | ordered  | below                                             | all end on one orbit                             |

    >>> ring = Reservoir(np.roll(np.eye(4), 1, 1), spectral_radius=1.5)
    >>> regime(ring, np.zeros((300, 1))).name
    'bistable'
    """
    drive = _checked(reservoir, u, 1, warmup)
    rng, n_nodes = generator(seed, "regime"), reservoir.n_nodes
    starts = np.stack([np.full(n_nodes, 0.5), np.full(n_nodes, -0.5), rng.uniform(-1.0, 1.0, n_nodes)])
    rest = reservoir.init_state(3)
    begin = rest._replace(activity=torch.from_numpy(starts).to(rest.activity))
    tangent = torch.from_numpy(rng.normal(size=n_nodes) / math.sqrt(n_nodes)).to(drive)[None, None]
    (exponent,), (error,) = _exponents(reservoir, drive, select(begin, torch.tensor([2])), tangent, warmup)
    states = reservoir(drive.expand(3, -1, -1), begin)[0].double()
    # orbits of a cycle can meet at one step: the least distance of the last 20 counts
    last = states[:, -_BLOCKS:]
    apart = max(float((last[i] - last[j]).norm(dim=1).min()) for i, j in ((0, 1), (0, 2), (1, 2)))
    size = float(states.square().sum(2).mean().sqrt())
    distance = apart / size if size else 0.0
    margin = max(_MARGINAL, 2 * float(error)) if math.isfinite(error) else _MARGINAL
    name: Literal["ordered", "marginal", "chaotic", "bistable"]
    if exponent > margin:
        name = "chaotic"
    elif exponent > -margin:
        name = "marginal"
    else:
        left = math.exp(len(drive[0]) * (float(exponent) + margin / 2))  # of a start, on its way to the others
        name = "bistable" if distance > max(_CONVERGED, 10 * left) else "ordered"
    return Regime(name, float(exponent), float(error), distance)


def _checked(reservoir: Reservoir, u: ArrayLike, k: int, warmup: int) -> Float[Tensor, "1 time inputs"]:
    if not isinstance(reservoir, Reservoir):
        raise InputError("reservoir", type(reservoir).__name__, "a Reservoir")
    array = numbers("u", u)
    if array.ndim != 2 or array.shape[1] != reservoir.n_inputs:
        raise InputError("u", array.shape, f"shape (time, {reservoir.n_inputs})")
    if whole("k", k, 1) > reservoir.n_nodes:
        raise InputError("k", k, f"an integer from 1 to the {reservoir.n_nodes} nodes")
    if whole("warmup", warmup, 0) > len(array) - _BLOCKS:
        raise InputError(
            "warmup", warmup, f"0 to {len(array) - _BLOCKS}: {_BLOCKS} of the {len(array)} steps must follow"
        )
    if reservoir.state_bits is not None:
        raise InputError("reservoir.state_bits", reservoir.state_bits, "None: rounded states have no exponents")
    return torch.from_numpy(array).to(reservoir.values)[None]


def _exponents(
    reservoir: Reservoir,
    drive: Float[Tensor, "1 time inputs"],
    state: ReservoirState,
    tangents: Float[Tensor, "1 k n"],
    warmup: int,
) -> Lyapunov:
    """Growth of the tangents over the steps after the warm-up, factorized after every interval."""
    growth, at = [], 0
    edges = sorted({*range(0, warmup, _INTERVAL), *range(warmup, drive.shape[1], _INTERVAL), drive.shape[1]})
    for end in edges[1:]:
        state, tangents, logs = _stretch(reservoir, drive[:, at:end], state, tangents)
        growth.append(np.tile(logs / (end - at), (end - at, 1)))
        at = end
    return _summarized(np.concatenate(growth)[warmup:])


def _summarized(rates: Float[np.ndarray, "time k"]) -> Lyapunov:
    blocks = np.stack([block.mean(0) for block in np.array_split(rates, _BLOCKS)])
    with np.errstate(invalid="ignore"):  # -inf
        order = np.argsort(-rates.mean(0), kind="stable")
        return Lyapunov(rates.mean(0)[order], (blocks.std(0, ddof=1) / math.sqrt(_BLOCKS))[order])


def _stretch(
    reservoir: Reservoir, drive: Float[Tensor, "1 time inputs"], state: ReservoirState, tangents: Float[Tensor, "1 k n"]
) -> tuple[ReservoirState, Float[Tensor, "1 k n"], Float[np.ndarray, " k"]]:
    """State and tangents after a stretch, and log |R_jj|; in two halves where the tangents would line up.

    Columns of R that shrink relative to the first lose as many digits as they shrink: half of those there are may go.
    """
    noise = None
    if reservoir.state_noise:
        normal = place_noise(reservoir.seed, state.stream, state.position, time=drive.shape[1], nodes=reservoir.n_nodes)
        noise = (reservoir.state_noise * normal).to(drive)
    scan = reservoir_scan(
        reservoir.matrix,
        drive,
        state.activity,
        reservoir.input_weights,
        leak=reservoir.leak,
        bias=reservoir.bias,
        activation=reservoir.activation,
        noise=noise,
        tangents=tangents,
    )
    assert scan.tangents is not None
    q, r = torch.linalg.qr(scan.tangents[0].T.double())
    sizes, steps = r.diagonal().abs(), drive.shape[1]
    info = torch.finfo(drive.dtype)
    lost = float(sizes.min()) < max(math.sqrt(info.eps) * float(sizes.max()), info.tiny / info.eps)
    if (lost or not torch.isfinite(sizes).all()) and steps > 1:
        state, tangents, first = _stretch(reservoir, drive[:, : steps // 2], state, tangents)
        state, tangents, second = _stretch(reservoir, drive[:, steps // 2 :], state, tangents)
        return state, tangents, first + second
    after = ReservoirState(scan.states[:, -1], state.position + steps, state.stream)
    return after, q.T.to(drive)[None].contiguous(), sizes.log().numpy()
