"""The smallest model with three phases: free features and a linear head, trained on skewed labels through a bottleneck.

    Z = F W      F: features (samples, dim), W: head (dim, classes)        full-batch gradient descent on the mean loss
    F <- F - lr G W' / N,    W <- W - lr F' G / N,    G = softmax(Z) - Y     (squared loss: G = Z - Y)

With orthonormal inputs features are free parameters.  Its gradient flow conserves F'F - W W', so a step of descent
changes it by O(lr^2) and a run to a fixed time by O(lr).  Ranks are those of F as it is, not centered.

| start       | what it is                                                                                      |
|-------------|-------------------------------------------------------------------------------------------------|
| "clustered" | frequent classes lie and are told apart already, rare ones coincide at zero, features and head    |
| "iid"       | everything normal, of `scale`                                                                     |

The published figure starts from "clustered", as read from its markers; from "iid" most runs do not turn down at the
end.  The last fall is a transient: the rare classes, `jitter` apart at first and parting at about .03 a step, must part
before the run ends, and it recovers later.  Toy model of arXiv 2509.23024, section 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float64

from commissure.core.errors import InputError
from commissure.core.rng import generator
from commissure.geometry.effective_rank import rankme
from commissure.geometry.spectra import Spectrum

__all__ = ["ToyRun", "ToySetting", "run_toy"]

# Of the frequent classes, two: where their features lie, where their head points (arXiv 2509.23024, figure 5).
_FEATURES = (0.6 * np.array([np.cos(np.deg2rad(100)), np.sin(np.deg2rad(100))]), 0.75 * np.array([1.0, 0.03]))
_HEADS = (np.array([0.0, 0.6]), 0.74 * np.array([1.0, 0.03]))
_APART = 0.05  # two samples of a class, to both sides of it


class ToySetting(NamedTuple):
    """Samples of each class, components of a feature, loss, start, and the spread of the normal numbers added to it."""

    counts: tuple[int, ...] = (2, 2, 1, 1)
    dim: int = 2
    loss: Literal["cross_entropy", "squared"] = "cross_entropy"
    start: Literal["clustered", "iid"] = "clustered"
    jitter: float = 1e-3
    scale: float = 0.5


class ToyRun(NamedTuple):
    """What was so before every step and after the last.

    `conserved`: Frobenius norm of the change of F'F - W W' since the start; `rare_cosine`: between the heads of the
    last two classes.
    """

    rankme: Float64[np.ndarray, " steps"]
    eigenvalues: Float64[np.ndarray, "steps dim"]
    loss: Float64[np.ndarray, " steps"]
    conserved: Float64[np.ndarray, " steps"]
    rare_cosine: Float64[np.ndarray, " steps"]


def run_toy(setting: ToySetting | None = None, *, lr: float = 0.25, n_steps: int = 300, seed: int = 0) -> ToyRun:
    """Train the toy model and tell its spectrum at every step.

    >>> found = run_toy(n_steps=20)
    >>> bool(10 < found.rankme.argmin() <= 20)
    True
    """
    setting = setting or ToySetting()
    _check(setting, lr, n_steps)
    labels = np.repeat(np.arange(len(setting.counts)), setting.counts)
    f, w = _start(setting, labels, seed)
    y = np.eye(len(setting.counts))[labels]
    first = f.T @ f - w @ w.T
    told = []
    for _ in range(n_steps + 1):
        z = f @ w
        loss, g = _loss(z, y, setting.loss)
        values = np.linalg.svd(f, compute_uv=False) ** 2
        cosine = w[:, -1] @ w[:, -2] / max(np.linalg.norm(w[:, -1]) * np.linalg.norm(w[:, -2]), 1e-300)
        drift = np.linalg.norm(f.T @ f - w @ w.T - first)
        told.append((rankme(Spectrum.of(values)), values, loss, drift, cosine))
        g = g / len(f)
        f, w = f - lr * g @ w.T, w - lr * f.T @ g
    ranks, eigenvalues, losses, conserved, cosines = zip(*told, strict=True)
    return ToyRun(*(np.array(column) for column in (ranks, eigenvalues, losses, conserved, cosines)))


def _start(setting: ToySetting, labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = generator(seed, "toy")
    shapes = (len(labels), setting.dim), (setting.dim, len(setting.counts))
    if setting.start == "iid":
        return rng.normal(0, setting.scale, shapes[0]), rng.normal(0, setting.scale, shapes[1])
    f, w = (rng.normal(0, setting.jitter, shape) for shape in shapes)
    for k, (feature, head) in enumerate(zip(_FEATURES, _HEADS, strict=True)):
        samples = np.flatnonzero(labels == k)
        across = np.array([-feature[1], feature[0]]) / np.linalg.norm(feature)
        for place, i in zip(np.linspace(-_APART, _APART, len(samples)), samples, strict=True):
            f[i, :2] += feature + place * across
        w[:2, k] += head
    return f, w


def _loss(z: np.ndarray, y: np.ndarray, kind: str) -> tuple[float, np.ndarray]:
    """Mean over samples, and its derivative by z times the number of samples."""
    if kind == "squared":
        return float(((z - y) ** 2).sum(1).mean() / 2), z - y
    z = z - z.max(1, keepdims=True)
    log_p = z - np.log(np.exp(z).sum(1, keepdims=True))
    return float(-(y * log_p).sum(1).mean()), np.exp(log_p) - y


def _check(setting: ToySetting, lr: float, n_steps: int) -> None:
    counts: Sequence[int] = setting.counts
    if len(counts) < 2 or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in counts):
        raise InputError("counts", counts, "two numbers of samples >= 1 at least")
    for name, value in (("dim", setting.dim), ("n_steps", n_steps)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(name, value, "an integer >= 1")
    for name, number in (("lr", lr), ("jitter", setting.jitter), ("scale", setting.scale)):
        if isinstance(number, bool) or not isinstance(number, int | float) or not 0 <= number < np.inf:
            raise InputError(name, number, "a number >= 0")
    if setting.loss not in ("cross_entropy", "squared"):
        raise InputError("loss", setting.loss, "'cross_entropy' or 'squared'")
    if setting.start not in ("clustered", "iid"):
        raise InputError("start", setting.start, "'clustered' or 'iid'")
    if setting.start == "clustered" and setting.dim < 2:
        raise InputError("dim", setting.dim, "an integer >= 2 for the clustered start")
