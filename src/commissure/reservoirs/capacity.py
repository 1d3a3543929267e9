"""Capacity: how much of its input's past, and which functions of it, a network holds for a linear readout.

    C[y] = 1 - min_w |y - X w|^2 / |y|^2        X the states, y a function of past inputs, both without their mean
    memory              y = u_{t-k}
    processing          y = prod_i P_{d_i}(u_{t-k_i})      P_d Legendre's polynomials, u ~ U(-1, 1) independent
    linear, analytic    C_k = s v_k' (S + n^2 I)^-1 v_k,   v_k = w_in W^k,   S = W' S W + s w_in' w_in

| symbol | name                                                       |
|--------|------------------------------------------------------------|
| u      | `u`, one input channel                                     |
| s      | `input_variance`, 1/3 for U(-1, 1)                         |
| S      | covariance of the states                                   |
| n      | `noise`: standard deviation of what is added to each state |

The capacities of orthogonal functions sum to at most the number of nodes, and to that number for a network with fading
memory and independent states.  Jaeger, GMD report 152 (2001); Dambre et al., Scientific Reports 2 (2012).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike
from torch import Tensor

from commissure.core.errors import DegenerateError, InputError
from commissure.reservoirs.inputs import listed, numbers, real, whole

__all__ = [
    "ProcessingCapacity",
    "information_processing_capacity",
    "linear_memory_capacity",
    "linear_memory_capacity_reference",
    "memory_capacity",
]

Array = np.ndarray
_RANK = 1e-12  # singular values of the states below this times the largest are rounding
_NULL = 1e-13  # the same for the eigenvalues of a covariance


class ProcessingCapacity(NamedTuple):
    """Capacity of each target, 0 where it is not significant; a target is its (delay, degree) pairs."""

    targets: tuple[tuple[tuple[int, int], ...], ...]
    capacities: Float[Array, " targets"]
    threshold: float

    @property
    def total(self) -> float:
        """Sum over all targets, at most the number of nodes up to sampling error."""
        return float(self.capacities.sum())

    def by_degree(self) -> Float[Array, " degrees"]:
        """Sum over the targets of each total degree, from 1."""
        degrees = [sum(degree for _, degree in target) for target in self.targets]
        return np.bincount(degrees, weights=self.capacities)[1:]


def memory_capacity(states: ArrayLike, u: ArrayLike, *, max_delay: int, warmup: int = 0) -> Float[Array, " delays"]:
    """Capacity of u_{t-k} for k = 0 .. max_delay, from `states` (time, nodes) driven by `u` (time,); Jaeger's r^2.

    The first `warmup` or `max_delay` steps, the larger, are left out.  Estimates are those of the same data: one that
    is 0 comes out at about nodes / time.  Their sum is Jaeger's memory capacity.

    >>> u = np.random.default_rng(0).uniform(-1, 1, 1000)
    >>> memory_capacity(np.stack([u, np.roll(u, 1)], 1), u, max_delay=3).round(1)
    array([1., 1., 0., 0.])
    """
    basis, u, skip = _basis(states, u, max(whole("warmup", warmup, 0), whole("max_delay", max_delay, 0)))
    targets = np.stack([u[skip - k : len(u) - k] for k in range(max_delay + 1)], 1)
    return _explained(basis, targets)


def information_processing_capacity(
    states: ArrayLike,
    u: ArrayLike,
    *,
    max_delays: Sequence[int],
    warmup: int = 0,
    significance: float = 1e-4,
) -> ProcessingCapacity:
    """Capacities of all products of Legendre polynomials of `u` (time,), uniform on [-1, 1], in `states` (time, nodes).

    `max_delays`: the longest delay for total degree 1, 2, ...  The capacity of an unrelated target is chi-squared with
    as many degrees of freedom as the states have independent directions, over the number of steps; one below that
    law's upper `significance` quantile is set to 0.  The first `warmup` or longest delay steps are left out.

    >>> u = np.random.default_rng(0).uniform(-1, 1, 2000)
    >>> found = information_processing_capacity(np.stack([u, u**2], 1), u, max_delays=[2, 2])
    >>> found.by_degree().round(6), [target for target, c in zip(found.targets, found.capacities) if c > 0]
    (array([1., 1.]), [((0, 1),), ((0, 2),)])
    """
    from scipy.special import eval_legendre
    from scipy.stats import chi2  # slow to import

    longest = [whole(f"max_delays[{i}]", delay, 0) for i, delay in enumerate(listed("max_delays", max_delays))]
    if not longest:
        raise InputError("max_delays", max_delays, "a longest delay for each degree, at least one")
    if not 0 < real("significance", significance) < 1:
        raise InputError("significance", significance, "a number between 0 and 1")
    basis, u, skip = _basis(states, u, max(whole("warmup", warmup, 0), *longest))
    if np.abs(u).max() > 1:
        raise InputError("u", float(np.abs(u).max()), "numbers from -1 to 1, uniform and independent")
    polynomials = [eval_legendre(degree, u) for degree in range(len(longest) + 1)]
    targets, found = tuple(_products(longest)), []
    for start in range(0, len(targets), 256):
        columns = np.ones((len(basis), len(targets[start : start + 256])))
        for column, target in zip(columns.T, targets[start : start + 256], strict=True):
            for delay, degree in target:
                column *= polynomials[degree][skip - delay : len(u) - delay]
        found.append(_explained(basis, columns))
    capacities = np.concatenate(found)
    threshold = float(chi2.isf(significance, basis.shape[1])) / len(basis)
    return ProcessingCapacity(targets, np.where(capacities > threshold, capacities, 0.0), threshold)


def linear_memory_capacity(
    weights: Float[Tensor, "nodes nodes"],
    input_weights: Float[Tensor, " nodes"],
    *,
    max_delay: int,
    noise: float = 0.0,
    input_variance: float = 1 / 3,
) -> Float[Tensor, " delays"]:
    """Exact memory capacity for k = 0 .. max_delay of x_t = x_{t-1} W + u_t w_in, read with noise; differentiable.

    A leak is part of the matrix: (1 - leak) I + leak W, and leak w_in.  Without noise, directions whose variance is
    below 1e-13 of the largest do not count: no double-precision readout finds them.  A spectral radius of 1 or more
    has no stationary states: DegenerateError.

    >>> line = torch.diag(torch.ones(3, dtype=torch.float64), 1)
    >>> linear_memory_capacity(line, torch.eye(4, dtype=torch.float64)[0], max_delay=5).tolist()
    [1.0, 1.0, 1.0, 1.0, 0.0, 0.0]
    """
    _check_linear(weights, input_weights, max_delay, noise, input_variance)
    covariance = input_variance * torch.outer(input_weights, input_weights)
    power, smallest = weights, torch.finfo(weights.dtype).tiny
    # S_{2m} = S_m + (W^m)' S_m W^m: the number of terms doubles.
    while float(power.detach().norm()) ** 2 > smallest:
        covariance = covariance + power.T @ covariance @ power
        power = power @ power
    rows = [input_weights]
    for _ in range(max_delay):
        rows.append(rows[-1] @ weights)
    responses = torch.stack(rows)
    if noise > 0:
        factor = torch.linalg.cholesky(covariance + noise**2 * torch.eye(len(weights)).to(weights))
        return input_variance * torch.linalg.solve_triangular(factor, responses.T, upper=False).square().sum(0)
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > _NULL * values[-1]
    return input_variance * ((responses @ vectors[:, kept]).square() / values[kept]).sum(1)


def linear_memory_capacity_reference(
    weights: Float[Tensor, "nodes nodes"],
    input_weights: Float[Tensor, " nodes"],
    *,
    max_delay: int,
    noise: float = 0.0,
    input_variance: float = 1 / 3,
) -> Float[Tensor, " delays"]:
    """`linear_memory_capacity` by scipy's solver of the Lyapunov equation and a pseudo-inverse."""
    from scipy.linalg import solve_discrete_lyapunov

    _check_linear(weights, input_weights, max_delay, noise, input_variance)
    w, v = weights.detach().double().numpy(), input_weights.detach().double().numpy()
    covariance = solve_discrete_lyapunov(w.T, input_variance * np.outer(v, v), method="direct")
    inverse = np.linalg.pinv(covariance + noise**2 * np.eye(len(w)), rcond=0 if noise else _NULL, hermitian=True)
    found = []
    for _ in range(max_delay + 1):
        found.append(input_variance * v @ inverse @ v)
        v = v @ w
    return torch.tensor(found, dtype=torch.float64)


def _basis(states: ArrayLike, u: ArrayLike, skip: int) -> tuple[Float[Array, "time rank"], Float[Array, " steps"], int]:
    """Orthonormal columns that span the states after `skip` steps, without their means."""
    x, signal = numbers("states", states), numbers("u", u)
    if signal.ndim == 2 and signal.shape[1] == 1:
        signal = signal[:, 0]
    if x.ndim != 2 or not x.size:
        raise InputError("states", x.shape, "shape (time, nodes), neither 0")
    if signal.shape != (len(x),):
        raise InputError("u", signal.shape, f"shape ({len(x)},): one channel")
    if len(x) - skip <= x.shape[1] + 1:
        allowed = f"more steps than the {x.shape[1]} nodes and one, after the {skip} left out"
        raise InputError("states", x.shape, allowed, "run longer, or take shorter delays")
    x = x[skip:] - x[skip:].mean(0)
    vectors, sizes, _ = np.linalg.svd(x, full_matrices=False)
    return vectors[:, sizes > _RANK * max(float(sizes[0]), np.finfo(np.float64).tiny)], signal, skip


def _explained(basis: Float[Array, "time rank"], targets: Float[Array, "time targets"]) -> Float[Array, " targets"]:
    targets = targets - targets.mean(0)
    size = (targets**2).sum(0)
    if not (size > 0).all():
        raise DegenerateError("capacity: an input without variance")
    return ((basis.T @ targets) ** 2).sum(0) / size


def _products(max_delays: Sequence[int]) -> Iterator[tuple[tuple[int, int], ...]]:
    """Every choice of distinct delays, each with a degree >= 1, by total degree."""
    for total, longest in enumerate(max_delays, 1):
        for n_factors in range(1, total + 1):
            for cuts in combinations(range(1, total), n_factors - 1):
                edges = (0, *cuts, total)
                degrees = [after - before for before, after in pairwise(edges)]
                for delays in combinations(range(longest + 1), n_factors):
                    yield tuple(zip(delays, degrees, strict=True))


def _check_linear(weights: Tensor, input_weights: Tensor, max_delay: int, noise: float, input_variance: float) -> None:
    for name, tensor in (("weights", weights), ("input_weights", input_weights)):
        if not isinstance(tensor, Tensor) or tensor.dtype not in (torch.float32, torch.float64):
            raise InputError(name, getattr(tensor, "dtype", type(tensor).__name__), "a float32 or float64 tensor")
        if not torch.isfinite(tensor).all():
            raise InputError(name, "not finite", "finite numbers")
    if weights.ndim != 2 or weights.shape[0] != weights.shape[1] or not len(weights):
        raise InputError("weights", tuple(weights.shape), "a square matrix")
    if input_weights.shape != weights.shape[:1] or input_weights.dtype != weights.dtype:
        found = (tuple(input_weights.shape), input_weights.dtype)
        raise InputError("input_weights", found, f"shape ({len(weights)},), {weights.dtype}")
    whole("max_delay", max_delay, 0)
    real("noise", noise, 0)
    real("input_variance", input_variance, 0)
    radius = float(torch.linalg.eigvals(weights.detach().double()).abs().max())
    if radius >= 1:
        raise DegenerateError(
            f"linear_memory_capacity: spectral radius {radius:.6g}, no stationary states; scale below 1"
        )
