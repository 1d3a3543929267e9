"""Reservoirs that share one sparse matrix, all steps of all rows in one call.

    p_t = scale_b (x_{t-1} W) + u_t W_in + bias         x_t = Q((1 - leak) x_{t-1} + leak f(p_t) + noise_t)
    v_t = (1 - leak) v_{t-1} + leak f'(p_t) scale_b (v_{t-1} W)            tangents, any number a row

    here            meaning
    matrix          W by target; `weights[i, j]` is the edge from source i to target j
    scale           one factor a row: rows may differ in spectral radius, input weights, inputs and state
    leak            1: no memory but through W
    Q               the nearest of 2^state_bits levels from -1 to 1; left out by default

The kernel always walks over the edges: one block of up to four vectors of rows at a time (16 float64, 32 float32), each
source's lanes together in memory, 2 nnz operations a row and step and one tanh a node.  Measured on one core with AVX2,
400 and 1000 nodes, 1, 16 and 64 rows, both dtypes: at density .3 dense products take 1.1 to 3.8 times as long, at .5
still 1.2 to 1.7 times (400 nodes); at density 1 they take .4 to 1.1 of the kernel's time.  Connectomes are far below.
With AVX-512 (400 nodes, density .1, 64 rows) an edge takes 6.5 cycles for 128 bytes of lanes: the sums 3.6, where
multiply-adds alone would take 2.0 and their loads from the first-level cache some 3.5; the rest is tanh, the update and
writing states out.

A row's bits depend on that row alone: not on the rows beside it, on how time is cut, on tangents or on threads.  They
do depend on the instruction set (fused multiply-adds or none).  Where a tensor wants a gradient, on a GPU, and without
the kernel, `reservoir_scan_reference` runs; there, equal shapes give equal bits and other batches agree to rounding.

Jaeger, "The echo state approach", GMD report 148 (2001); tangents: Benettin et al., Meccanica 15 (1980).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from commissure.core.errors import InputError
from commissure.native import kernels
from commissure.native.linear_attention import addresses, contiguous
from commissure.native.reservoir_reference import (
    ACTIVATIONS,
    Activation,
    ReservoirMatrix,
    ReservoirScan,
    reservoir_scan_reference,
)

if TYPE_CHECKING:
    from scipy.sparse import csr_array

__all__ = [
    "ACTIVATIONS",
    "Activation",
    "ReservoirMatrix",
    "ReservoirScan",
    "reservoir_matrix",
    "reservoir_scan",
    "reservoir_scan_reference",
]

_FLOATS = (torch.float32, torch.float64)
_GROUP = 4  # entries of a row that are added up side by side


def reservoir_matrix(weights: csr_array, *, dtype: torch.dtype) -> ReservoirMatrix:
    """The arrays of a square sparse matrix, `weights[i, j]` from source i to target j.

    >>> from scipy.sparse import csr_array
    >>> matrix = reservoir_matrix(csr_array([[0.0, 2.0], [0.0, 0.0]]), dtype=torch.float64)
    >>> matrix.starts.tolist(), matrix.values.tolist()
    ([0, 0, 4], [2.0, 0.0, 0.0, 0.0])
    """
    if weights.ndim != 2 or weights.shape[0] != weights.shape[1]:
        raise InputError("weights", weights.shape, "a square matrix")
    if dtype not in _FLOATS:
        raise InputError("dtype", str(dtype), "torch.float32 or torch.float64")
    columns = weights.tocsc()
    columns.sum_duplicates()
    counts = np.diff(columns.indptr).astype(np.int64)
    padded = -(-counts // _GROUP) * _GROUP
    starts = np.concatenate([[0], padded.cumsum()]).astype(np.int64)
    small = weights.shape[0] <= 2**16
    place = np.arange(columns.nnz) + np.repeat(starts[:-1] - columns.indptr[:-1], counts)
    values = np.zeros(starts[-1])
    values[place] = columns.data
    last = columns.indices[np.maximum(columns.indptr[1:] - 1, 0)] if columns.nnz else np.zeros(len(counts), np.int64)
    sources = np.repeat(last, padded).astype(np.uint16 if small else np.int32)
    sources[place] = columns.indices
    return ReservoirMatrix(torch.from_numpy(starts), torch.from_numpy(sources), torch.from_numpy(values).to(dtype))


def reservoir_scan(
    matrix: ReservoirMatrix,
    x: Float[Tensor, "batch time inputs"],
    state: Float[Tensor, "batch nodes"],
    input_weights: Float[Tensor, "inputs nodes"] | Float[Tensor, "batch inputs nodes"],
    *,
    scale: Float[Tensor, " batch"] | None = None,
    leak: Float[Tensor, " nodes"] | None = None,
    bias: Float[Tensor, " nodes"] | None = None,
    activation: Activation = "tanh",
    noise: Float[Tensor, "batch time nodes"] | None = None,
    state_bits: int | None = None,
    tangents: Float[Tensor, "batch tangents nodes"] | None = None,
) -> ReservoirScan:
    """The states of rows that go on from `state`; row b runs W * scale[b], and its own input weights if they are given.

    `tangents` are multiplied by every Jacobian of the stretch (of the dynamics without Q), not renormalized.  The
    state after the stretch is `states[:, -1]`.  Runs on up to `torch.get_num_threads()` threads, rows shared out.
    Differentiable (by the reference).  Raises InputError for shapes or dtypes that do not fit.

    >>> from scipy.sparse import csr_array
    >>> matrix = reservoir_matrix(csr_array([[0.0, 2.0], [0.0, 0.0]]), dtype=torch.float64)
    >>> x, state = torch.ones(1, 2, 1, dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64)
    >>> weights = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    >>> reservoir_scan(matrix, x, state, weights, activation="linear").states.tolist()
    [[[1.0, 0.0], [1.0, 2.0]]]
    """
    optional = {"scale": scale, "leak": leak, "bias": bias, "noise": noise, "tangents": tangents}
    _check(matrix, x, state, input_weights, activation, state_bits, optional)
    operands = [matrix.values, x, state, input_weights, *optional.values()]
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in operands):
        return _plain(matrix, x, state, input_weights, activation, state_bits, optional)
    told = torch.ops.commissure.reservoir_scan(
        list(matrix), x, state, input_weights, list(optional.values()), activation, state_bits or 0
    )
    return ReservoirScan(told[0], None if tangents is None else told[1])


def _check(
    matrix: ReservoirMatrix,
    x: Tensor,
    state: Tensor,
    input_weights: Tensor,
    activation: str,
    state_bits: int | None,
    optional: dict[str, Tensor | None],
) -> None:
    """Raise InputError naming the first argument that does not fit the matrix and x."""
    nodes, dtype, device = len(matrix.starts) - 1, matrix.values.dtype, matrix.values.device
    if x.ndim != 3:
        raise InputError("x", tuple(x.shape), "shape (batch, time, inputs)")
    batch, time, inputs = x.shape
    if activation not in ACTIVATIONS:
        raise InputError("activation", activation, f"one of {', '.join(ACTIVATIONS)}")
    if state_bits is not None and not 1 <= state_bits <= 16:
        raise InputError("state_bits", state_bits, "1 to 16, or None for no quantization")
    if input_weights.shape not in ((inputs, nodes), (batch, inputs, nodes)):
        allowed = f"shape ({inputs}, {nodes}) or ({batch}, {inputs}, {nodes})"
        raise InputError("input_weights", tuple(input_weights.shape), allowed)
    tangents = optional["tangents"]
    shapes = {
        "state": (batch, nodes),
        "scale": (batch,),
        "leak": (nodes,),
        "bias": (nodes,),
        "noise": (batch, time, nodes),
        "tangents": (batch, tangents.shape[1] if tangents is not None and tangents.ndim == 3 else 1, nodes),
    }
    for name, tensor in {"x": x, "state": state, "input_weights": input_weights, **optional}.items():
        if tensor is None:
            continue
        if name in shapes and tensor.shape != shapes[name]:
            raise InputError(name, tuple(tensor.shape), f"shape {shapes[name]}")
        if tensor.dtype != dtype or tensor.device != device:
            raise InputError(name, (str(tensor.dtype), str(tensor.device)), f"the matrix's: {dtype}, {device}")


def _plain(
    matrix: ReservoirMatrix,
    x: Tensor,
    state: Tensor,
    input_weights: Tensor,
    activation: Activation,
    state_bits: int | None,
    optional: dict[str, Tensor | None],
) -> ReservoirScan:
    return reservoir_scan_reference(
        matrix, x, state, input_weights, activation=activation, state_bits=state_bits, **optional
    )


_library = torch.library.Library("commissure", "FRAGMENT")
_library.define(
    "reservoir_scan(Tensor[] matrix, Tensor x, Tensor state, Tensor input_weights, Tensor?[] optional,"
    " str activation, int state_bits) -> Tensor[]"
)
_OPTIONAL = ("scale", "leak", "bias", "noise", "tangents")


def _scan(
    matrix: list[Tensor],
    x: Tensor,
    state: Tensor,
    input_weights: Tensor,
    optional: list[Tensor | None],
    activation: Activation,
    state_bits: int,
    clone: str = "",
) -> list[Tensor]:
    """The operator on CPU tensors."""
    native = kernels()
    if native is None:
        return _dense(matrix, x, state, input_weights, optional, activation, state_bits)
    scale, leak, bias, noise, tangents = contiguous(*optional)
    batch, time, inputs = x.shape
    nodes = state.shape[1]
    given = contiguous(*matrix, x, state, input_weights)
    given += [state.new_ones(batch) if scale is None else scale, state.new_ones(nodes) if leak is None else leak]
    given += [state.new_zeros(nodes) if bias is None else bias, noise, tangents]
    results = _empty(x, state, tangents)
    rounds = [list(ACTIVATIONS).index(activation), state_bits]
    native.reservoir_scan(
        addresses(given) + addresses(results) + [0] * (2 - len(results)),
        [batch, time, nodes, inputs, 0 if tangents is None else tangents.shape[1], *rounds],
        input_weights.ndim == 3,
        matrix[1].dtype == torch.int32,
        x.dtype == torch.float32,
        torch.get_num_threads(),
        clone,
    )
    return results


def _dense(
    matrix: list[Tensor],
    x: Tensor,
    state: Tensor,
    input_weights: Tensor,
    optional: list[Tensor | None],
    activation: Activation,
    state_bits: int,
) -> list[Tensor]:
    """The operator by its reference."""
    named = dict(zip(_OPTIONAL, optional, strict=True))
    told = _plain(ReservoirMatrix(*matrix), x, state, input_weights, activation, state_bits or None, named)
    return [told.states] if told.tangents is None else [told.states, told.tangents.clone()]


def _empty(x: Tensor, state: Tensor, tangents: Tensor | None) -> list[Tensor]:
    """Memory for the results."""
    states = x.new_empty(x.shape[0], x.shape[1], state.shape[1])
    return [states] if tangents is None else [states, torch.empty_like(tangents)]


def _fake(
    matrix: list[Tensor],
    x: Tensor,
    state: Tensor,
    input_weights: Tensor,
    optional: list[Tensor | None],
    activation: Activation,
    state_bits: int,
) -> list[Tensor]:
    return _empty(x, state, optional[-1])


_library.impl("reservoir_scan", _scan, "CPU")
_library.impl("reservoir_scan", _dense, "CUDA")
torch.library.register_fake("commissure::reservoir_scan", _fake, lib=_library)
