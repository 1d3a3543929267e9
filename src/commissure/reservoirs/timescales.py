"""Timescales of units: how many steps their autocorrelation takes to decay.

    rho_k = sum_t (x_t - m)(x_{t+k} - m) / sum_t (x_t - m)^2,   k = 0 .. n_lags,   cut before its first negative value
    fit          log rho_k = intercept - k / tau, by ordinary least squares
    integrated   1/2 + sum_{k >= 1} rho_k = coth(1 / (2 tau)) / 2, which an exponential decay of time tau obeys

| symbol | name                                                               |
|--------|--------------------------------------------------------------------|
| rho    | `autocorrelation`                                                  |
| tau    | `timescales`, in steps                                             |
| -      | `LagProducts`: the sums above, kept while the states stream by     |

The published definition is the fit with 10 log10(T) lags, 33 for T = 2000 (bioRxiv 2025.06.20.660760).  Lags far
beyond tau hold noise only and tilt the line: of units with tau = 2, seen for 2000 steps, the middle 95 % come out from
1.2 to 11.  The integral, which takes no logarithm, puts them from 1.7 to 2.8; its lags reach to T / 10.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import ArrayLike

from commissure.core.errors import InputError
from commissure.reservoirs.inputs import listed, named, numbers, whole
from commissure.reservoirs.io_map import indices

__all__ = ["LagProducts", "Timescales", "autocorrelation", "lag_products", "timescales", "timescales_reference"]

Array = np.ndarray


class LagProducts(NamedTuple):
    """Sums of products of states up to `n_lags` steps apart, around `shift`, and the first and last `n_lags` rows."""

    n_samples: int
    shift: Float[Array, " units"]
    products: Float[Array, "lags units"]
    total: Float[Array, " units"]
    head: Float[Array, "early units"]
    tail: Float[Array, "late units"]


class Timescales(NamedTuple):
    """tau of every unit in steps; nan where it is undefined: a constant unit, or an autocorrelation without a decay."""

    values: Float[Array, " *units"]
    n_undefined: int

    def by_module(self, modules: Sequence[ArrayLike]) -> Float[Array, "*batch modules"]:
        """Mean over the units of each module that have one; nan where none has."""
        means = []
        for i, module in enumerate(listed("modules", modules)):
            nodes = indices(f"modules[{i}]", module)
            if nodes.max() >= self.values.shape[-1]:
                raise InputError(f"modules[{i}]", nodes.tolist(), f"indices from 0 to {self.values.shape[-1] - 1}")
            tau = self.values[..., nodes]
            n_defined = np.isfinite(tau).sum(-1)
            means.append(np.where(n_defined, np.nansum(tau, -1) / np.maximum(n_defined, 1), np.nan))
        if not means:
            raise InputError("modules", modules, "at least one module")
        return np.stack(means, -1)


def lag_products(states: ArrayLike, n_lags: int, *, before: LagProducts | None = None) -> LagProducts:
    """The sums for `states` (time, units) or, added to those `before` them, for the whole sequence so far.

    >>> whole = np.random.default_rng(0).normal(size=(100, 3))
    >>> parts = lag_products(whole[30:], 5, before=lag_products(whole[:30], 5))
    >>> bool(np.allclose(autocorrelation(parts), autocorrelation(lag_products(whole, 5))))
    True
    """
    x, n_lags = numbers("states", states), whole("n_lags", n_lags, 1)
    if x.ndim != 2 or not x.size:
        raise InputError("states", x.shape, "shape (time, units), neither 0")
    if before is None:
        shift = x.mean(0)
        nothing = np.zeros((0, x.shape[1]))
        before = LagProducts(0, shift, np.zeros((n_lags + 1, x.shape[1])), np.zeros(x.shape[1]), nothing, nothing)
    elif not isinstance(before, LagProducts) or before.products.shape != (n_lags + 1, x.shape[1]):
        raise InputError(
            "before", getattr(before, "products", before), f"LagProducts of {n_lags} lags of {x.shape[1]} units"
        )
    x = x - before.shift
    joined, n_old = np.concatenate([before.tail, x]), len(before.tail)
    products = before.products.copy()
    for lag in range(min(n_lags, len(joined) - 1) + 1):
        start = max(n_old, lag)  # the later one of each pair is new
        products[lag] += np.einsum("tu,tu->u", joined[start:], joined[start - lag : len(joined) - lag])
    head = np.concatenate([before.head, x[: n_lags - len(before.head)]])
    total = before.total + x.sum(0)
    return LagProducts(before.n_samples + len(x), before.shift, products, total, head, joined[-n_lags:])


def autocorrelation(lags: LagProducts) -> Float[Array, "lags units"]:
    """rho_k for k = 0 .. n_lags, around the mean of the whole sequence; nan for a unit that is constant."""
    if not isinstance(lags, LagProducts):
        raise InputError("lags", type(lags).__name__, "LagProducts", "make them with lag_products(states, n_lags)")
    count, n_lags = lags.n_samples, len(lags.products) - 1
    if count <= n_lags:
        raise InputError("n_lags", n_lags, f"an integer below the {count} steps")
    zero = np.zeros((1, lags.products.shape[1]))
    without_last = lags.total - np.concatenate([zero, lags.tail[::-1].cumsum(0)])
    without_first = lags.total - np.concatenate([zero, lags.head.cumsum(0)])
    mean, pairs = lags.total / count, (count - np.arange(n_lags + 1))[:, None]
    scatter = lags.products - mean * (without_last + without_first) + pairs * mean**2
    # What rounding leaves of a constant: each of its terms is off by at most eps times the values' squares.
    size = (lags.shift + mean) ** 2
    flat = scatter[0] <= count * (4 * np.finfo(np.float64).eps) ** 2 * size
    return np.where(flat, np.nan, scatter / np.where(flat, 1.0, scatter[0]))


def timescales(
    states: ArrayLike | LagProducts, *, method: Literal["fit", "integrated"] = "fit", n_lags: int | None = None
) -> Timescales:
    """The timescale of every unit of `states` (..., time, units), or of streamed `LagProducts`.

    `n_lags`: by default 10 log10(time) for the fit, time / 10 for the integral; those streamed, if streamed.

    >>> x, noise = np.zeros(20_000), np.random.default_rng(0).normal(size=20_000)
    >>> for t in range(1, len(x)):
    ...     x[t] = np.exp(-1 / 5) * x[t - 1] + noise[t]
    >>> timescales(x[:, None], n_lags=10).values.round().item(), timescales(x[:, None], method="integrated").n_undefined
    (5.0, 0)
    """
    named("method", method, ("fit", "integrated"))
    if isinstance(states, LagProducts):
        if n_lags is not None:
            raise InputError("n_lags", n_lags, "None with LagProducts, which hold their own")
        lags, shape = states, states.total.shape
    else:
        x = numbers("states", states)
        if x.ndim < 2 or not x.size:
            raise InputError("states", x.shape, "shape (..., time, units), none 0")
        time, shape = x.shape[-2], (*x.shape[:-2], x.shape[-1])
        flat = np.moveaxis(x, -2, 0).reshape(time, -1)
        lags = lag_products(flat, _default_lags(time, method) if n_lags is None else n_lags)
    rho = autocorrelation(lags)
    kept = np.logical_and.accumulate(rho >= 0, axis=0)  # false for nan
    tau = (_fitted if method == "fit" else _integrated)(np.where(kept, rho, 0.0), kept).reshape(shape)
    return Timescales(tau, int(np.isnan(tau).sum()))


def timescales_reference(
    states: ArrayLike, *, method: Literal["fit", "integrated"] = "fit", n_lags: int | None = None
) -> Timescales:
    """`timescales` of (time, units), one unit and one lag at a time, the line by `numpy.polyfit`."""
    named("method", method, ("fit", "integrated"))
    x = numbers("states", states)
    if x.ndim != 2 or not x.size:
        raise InputError("states", x.shape, "shape (time, units), neither 0")
    n_lags, values = _default_lags(len(x), method) if n_lags is None else whole("n_lags", n_lags, 1), []
    for unit in x.T:
        centered, rho = unit - unit.mean(), []
        if np.ptp(unit) == 0:
            values.append(np.nan)
            continue
        for lag in range(n_lags + 1):
            value = np.dot(centered[lag:], centered[: len(centered) - lag]) / np.dot(centered, centered)
            if value < 0:
                break
            rho.append(value)
        if method == "fit":
            slope = np.polyfit(np.arange(len(rho)), np.log(rho), 1)[0] if len(rho) > 1 else np.nan
            values.append(-1 / slope if slope < 0 else np.nan)
        else:
            area = 0.5 + sum(rho[1:])
            values.append(1 / np.log((2 * area + 1) / (2 * area - 1)) if area > 0.5 else np.nan)
    return Timescales(np.array(values), int(np.isnan(values).sum()))


def _default_lags(time: int, method: str) -> int:
    if time < 4:
        raise InputError("states", time, "at least 4 steps")
    return min(time - 1, int(10 * math.log10(time)) if method == "fit" else max(1, time // 10))


def _fitted(rho: Float[Array, "lags units"], kept: Bool[Array, "lags units"]) -> Float[Array, " units"]:
    """-1 / slope of log rho over the lags kept; nan where fewer than 2 are, or where the line does not fall."""
    kept = kept & (rho > 0)
    lag = np.arange(len(rho))[:, None]
    count = kept.sum(0)
    log = np.log(np.where(kept, rho, 1.0))
    centered = np.where(kept, lag - (lag * kept).sum(0) / np.maximum(count, 1), 0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        slope = (centered * log).sum(0) / (centered**2).sum(0)
        return np.where((count > 1) & (slope < 0), -1.0 / slope, np.nan)


def _integrated(rho: Float[Array, "lags units"], kept: Bool[Array, "lags units"]) -> Float[Array, " units"]:
    """tau of the exponential with this integral; nan where there is nothing beyond lag 0."""
    area = 0.5 + rho[1:].sum(0)
    with np.errstate(divide="ignore"):
        return np.where(kept[0] & (area > 0.5), 1.0 / np.log((2 * area + 1) / (2 * area - 1)), np.nan)
