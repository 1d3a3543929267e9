"""`evaluate` written down as its definition: one row after another in numpy, all states kept, one solve a penalty."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

import numpy as np
import torch
from jaxtyping import Float
from scipy.sparse import csr_array

from commissure.core.rng import generator
from commissure.native.reservoir import Activation
from commissure.reservoirs.connectome import Connectome
from commissure.reservoirs.evaluation import Score
from commissure.reservoirs.io_map import IOMap
from commissure.reservoirs.tasks.data import Task

__all__ = ["evaluate_reference"]

Array = np.ndarray

_FUNCTIONS: dict[str, tuple[Callable[[Array], Array], Callable[[Array], Array]]] = {
    "tanh": (np.tanh, lambda p: 1 / np.cosh(p) ** 2),
    "linear": (lambda p: p, np.ones_like),
    "relu": (lambda p: np.maximum(p, 0), lambda p: (p > 0).astype(float)),
}


def evaluate_reference(
    network: Connectome | csr_array | Float[np.ndarray, "nodes nodes"],
    task: Task,
    *,
    io: IOMap | Sequence[IOMap],
    spectral_radius: float | Sequence[float | None] | None = 0.9,
    input_gain: float = 1.0,
    leak: float | Float[np.ndarray, " nodes"] = 1.0,
    activation: Activation = "tanh",
    penalties: float | Sequence[float] = 1e-6,
    read_noise: float | Sequence[float] = 0.0,
    read_bits: int | Sequence[int | None] | None = None,
    weight_bits: int | None = None,
    lyapunov: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> tuple[Score, ...]:
    """`evaluate` in float64 numpy for the activations tanh, linear and relu; memory grows with the series."""
    weights = network.weights if isinstance(network, Connectome) else network
    weights = weights.toarray() if isinstance(weights, csr_array) else np.asarray(weights, np.float64)
    own = np.abs(np.linalg.eigvals(weights)).max()
    if weight_bits is not None:
        step = np.abs(weights).max() / (2 ** (weight_bits - 1) - 1)
        weights = step * np.round(weights / step)
    function, slope = _FUNCTIONS[activation]
    scores = []
    maps = [io] if isinstance(io, IOMap) else list(io)
    for radius, (i, each) in product(_listed(spectral_radius), enumerate(maps)):
        w = weights if radius is None else weights * (radius / own)
        drive = input_gain * each.input_weights(len(w))
        states, noise, targets = {}, {}, {}
        exponent = None
        for split in ("train", "test"):
            data = task.data(seed, split)
            x, rows, before = np.zeros(len(w)), [], []
            for u in data.inputs:
                before.append(x @ w + u @ drive)
                x = (1 - leak) * x + leak * function(before[-1])
                rows.append(x)
            states[split], targets[split] = np.array(rows)[data.warmup :], data.targets[data.warmup :]
            noise[split] = generator(seed, "read noise", split).standard_normal(states[split].shape)
            if lyapunov and split == "train":
                exponent = _exponent(w, np.array(before), slope, leak, data.warmup, seed)
        for sigma, bits, o in product(_listed(read_noise), _listed(read_bits), range(each.n_readouts)):
            read = {s: _read(states[s] + sigma * noise[s], bits)[:, each.outputs[o]] for s in states}
            columns = slice(None) if each.targets is None else each.targets[o]
            y = {s: targets[s][:, columns] for s in targets}
            penalty, b = _fit(read["train"], y["train"], _listed(penalties))
            predicted = read["test"] @ b
            total = ((y["test"] - y["test"].mean(0)) ** 2).sum(0)
            r2 = 1 - ((y["test"] - predicted) ** 2).sum(0) / total
            r = [np.corrcoef(predicted[:, k], y["test"][:, k])[0, 1] for k in range(len(r2))]
            scores.append(
                Score(
                    radius, i, o, float(sigma), bits, penalty, float(r2.mean()), float(np.sum(np.square(r))),
                    tuple(r2.tolist()), "moments", exponent,
                )
            )  # fmt: skip
    return tuple(scores)


def _read(states: Array, bits: int | None) -> Array:
    """The nearest level for every state."""
    if bits is None:
        return states
    levels = np.linspace(1, -1, 2**bits)  # from above: a state halfway between two takes the upper one
    return levels[np.abs(states[..., None] - levels).argmin(-1)]


def _fit(x: Array, y: Array, penalties: list[float]) -> tuple[float, Array]:
    """The coefficients with the smallest error by generalized cross-validation, all from the singular values of x."""
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    fits = []
    for penalty in penalties:
        b = vt.T @ ((s / (s**2 + penalty))[:, None] * (u.T @ y))
        dof = np.sum(s**2 / (s**2 + penalty))
        fits.append((np.sum((y - x @ b) ** 2) / (len(x) - dof) ** 2, penalty, b))
    return min(fits, key=lambda fit: fit[0])[1:]


def _exponent(
    w: Array, before: Array, slope: Callable[[Array], Array], leak: float | Array, warmup: int, seed: int
) -> float:
    """Mean logarithm of a tangent's growth after the warm-up."""
    v, total = generator(seed, "tangent").standard_normal(len(w)), 0.0
    for t, p in enumerate(before):
        v = v / np.linalg.norm(v)
        v = (1 - leak) * v + leak * slope(p) * (v @ w)
        total += np.log(np.linalg.norm(v)) if t >= warmup else 0.0
    return float(total / (len(before) - warmup))


def _listed(value: object) -> list:
    return list(value) if isinstance(value, (list, tuple, np.ndarray)) else [value]
