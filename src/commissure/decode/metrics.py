"""The coefficient of determination, the one score of every decoder here.

    R2_d = 1 - sum_t (y_td - p_td)^2 / sum_t (y_td - mean_t y_td)^2,      R2 = mean_d R2_d

y is the target and p the prediction, d runs over output dimensions.  All sums are in float64 and centered first, so a
large common offset loses nothing.  A prediction that is the target's mean scores 0, a perfect one 1.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from commissure.core.errors import DegenerateError, InputError

__all__ = ["r2_per_output", "r2_score"]


def r2_score(target: ArrayLike, prediction: ArrayLike) -> float:
    """R2 with a uniform average over outputs; equals `sklearn.metrics.r2_score`.

    `target` and `prediction` are (n_samples, n_outputs) or (n_samples,).  A value that is not finite raises
    `InputError` with its row; an output that never varies raises `DegenerateError`.

    >>> r2_score([[0.0], [1.0], [2.0]], [[0.0], [1.0], [2.0]])
    1.0
    >>> r2_score([0.0, 1.0, 2.0], [1.0, 1.0, 1.0])
    0.0
    """
    return float(r2_per_output(target, prediction).mean())


def r2_per_output(target: ArrayLike, prediction: ArrayLike) -> Float[np.ndarray, " n_outputs"]:
    """R2 of each output dimension, float64; same arguments and errors as `r2_score`.

    >>> r2_per_output([[0.0, 1.0], [2.0, 3.0]], [[0.0, 2.0], [2.0, 2.0]])
    array([1., 0.])
    """
    y, p = _checked("target", target), _checked("prediction", prediction)
    if y.shape != p.shape:
        raise InputError("prediction", p.shape, f"the shape of the target {y.shape}")
    if len(y) < 2:
        raise InputError("target", y.shape, "at least 2 rows: the variance of one sample is not defined")
    constant = np.ptp(y, axis=0) == 0
    if constant.any():
        raise DegenerateError(
            f"target does not vary in output(s) {np.flatnonzero(constant).tolist()} over {len(y)} samples: "
            "R2 is not defined; score other outputs or more samples"
        )
    return 1 - ((y - p) ** 2).sum(0) / ((y - y.mean(0)) ** 2).sum(0)


def _checked(name: str, values: ArrayLike) -> Float[np.ndarray, "n_samples n_outputs"]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim == 1:
        array = array[:, None]
    if array.ndim != 2 or array.shape[1] == 0:
        raise InputError(name, array.shape, "shape (n_samples, n_outputs)")
    bad = np.flatnonzero(~np.isfinite(array).all(1))
    if bad.size:
        raise InputError(
            name, f"row {bad[0]}: {array[bad[0]].tolist()}", "finite values", f"drop the {bad.size} bad row(s) first"
        )
    return array
