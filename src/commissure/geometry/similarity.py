"""Two representations of the same rows: linear CKA and the angles between their main subspaces, from moments alone.

    CKA = |X'Y|^2 / (|X'X| |Y'Y|)                              X, Y centered, Frobenius norms
    cos(angle_i) = i-th singular value of U'V                  U, V: the top k eigenvectors of X'X and Y'Y

Rows are streamed: accumulate `core.moments` of [x, y] and both metrics follow, without a row kept.  CKA is invariant to
rotations and one scale, not to other linear maps; with fewer rows than components it is far too high.

Kornblith et al., arXiv 1905.00414; Bjorck & Golub, Math. Comp. 27 (1973).
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from commissure.core.errors import DegenerateError, InputError
from commissure.core.moments import Moments, measure
from commissure.geometry.spectra import Rows, rows_of

__all__ = ["linear_cka", "pair_moments", "principal_angles"]

Others = Float[Tensor, "samples other"] | Float[np.ndarray, "samples other"]  # of a width of their own


def pair_moments(x: Rows, y: Others) -> Moments:
    """Moments of [x, y]; merge those of many blocks with `core.moments.merge`.

    >>> pair_moments(torch.eye(3), torch.eye(3)).n_samples
    3
    """
    a, b = rows_of(x), rows_of(y)
    if len(a) != len(b):
        raise InputError("y", tuple(b.shape), f"{len(a)} rows, as many as x")
    return measure(torch.cat([a, b], 1))


def linear_cka(x: Rows | Moments, y: Others | None = None, *, dim: int | None = None) -> float:
    """Centered kernel alignment of linear kernels, 0 to 1, of rows x and y or of their `pair_moments` (x: `dim` wide).

    A representation without variance: `DegenerateError`.

    >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 3.0]])
    >>> round(linear_cka(x, -2 * x.flip(1)), 6)
    1.0
    """
    xx, yy, xy = _blocks(x, y, dim)
    scale = torch.linalg.norm(xx) * torch.linalg.norm(yy)
    if not float(scale) > 0:
        raise DegenerateError("a representation without variance has no alignment")
    return float(torch.linalg.norm(xy) ** 2 / scale)


def principal_angles(
    x: Rows | Moments, y: Others | None = None, *, k: int, dim: int | None = None
) -> Float64[np.ndarray, " k"]:
    """Angles (radians, ascending) between the subspaces of the top `k` directions of x and of y, of one width.

    >>> x = torch.tensor([[3.0, 0.0, 0.1], [-3.0, 0.0, -0.1], [0.0, 1.0, 0.0], [0.0, -1.0, 0.0]])
    >>> principal_angles(x, x, k=2).round(6).tolist()
    [0.0, 0.0]
    """
    xx, yy, _ = _blocks(x, y, dim)
    if len(xx) != len(yy):
        raise InputError("y", len(yy), f"{len(xx)} components, as many as x", "compare their rows by linear_cka")
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or not 1 <= k <= len(xx):
        raise InputError("k", k, f"an integer from 1 to {len(xx)}")
    u, v = (torch.linalg.eigh(scatter).eigenvectors[:, -k:] for scatter in (xx, yy))
    # From sines where they are small: an arc cosine near one has half the digits.
    cosines = torch.linalg.svdvals(u.T @ v).clamp(max=1.0)
    sines = torch.linalg.svdvals(v - u @ (u.T @ v)).flip(0).clamp(max=1.0)
    return torch.where(cosines > 0.5**0.5, sines.asin(), cosines.acos()).cpu().numpy()


def _blocks(x: Rows | Moments, y: Others | None, dim: int | None) -> tuple[Tensor, Tensor, Tensor]:
    if isinstance(x, Moments):
        if y is not None or dim is None or not 1 <= dim < len(x.mean):
            raise InputError("dim", dim, f"the width of x, 1 to {len(x.mean) - 1}, with moments alone")
        joint = x
    else:
        if y is None or dim is not None:
            raise InputError("y", y, "rows, and no dim beside them")
        joint, dim = pair_moments(x, y), x.shape[1]
    return joint.scatter[:dim, :dim], joint.scatter[dim:, dim:], joint.scatter[:dim, dim:]
