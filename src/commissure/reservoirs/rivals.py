"""Reservoirs as others simulate them, for `bench`: a loop over time in numpy, and batched products in torch.

`loop_states`, `loop_exponents` and `module_scores` are written after the public code the method was published with
(conn2res): every state stored, one sequence after another, all exponents by a QR decomposition of every step, one ridge
a module.  Two of its slips are not repeated: the Jacobian has the transpose its row convention asks for, and exponents
are in nats.  `dense_states` and `sparse_states` are the best batched loops that torch has operators for.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.linalg import solve
from torch import Tensor

__all__ = ["dense_states", "loop_exponents", "loop_states", "module_scores", "sparse_states"]


def loop_states(
    weights: Float[np.ndarray, "nodes nodes"],
    x: Float[np.ndarray, "batch time inputs"],
    input_weights: Float[np.ndarray, "inputs nodes"],
) -> Float[np.ndarray, "batch time nodes"]:
    """States of the sequences, one after another, each from rest.

    >>> loop_states(np.zeros((1, 1)), np.ones((1, 2, 1)), np.ones((1, 1))).round(3).ravel().tolist()
    [0.762, 0.762]
    """
    states = np.zeros((len(x), x.shape[1] + 1, len(weights)), weights.dtype)
    for row, sequence in zip(states, x, strict=True):
        for t in range(1, len(row)):
            row[t] = np.tanh(np.dot(row[t - 1], weights) + np.dot(sequence[t - 1], input_weights))
    return states[:, 1:]


def loop_exponents(
    weights: Float[np.ndarray, "nodes nodes"], states: Float[np.ndarray, "time nodes"]
) -> Float[np.ndarray, " nodes"]:
    """All Lyapunov exponents (nats a step) along the states of a tanh reservoir.

    >>> loop_exponents(np.diag([0.5, 0.25]), np.zeros((3, 2))).round(3).tolist()
    [-0.693, -1.386]
    """
    basis, growth = np.eye(len(weights), dtype=weights.dtype), np.zeros(len(weights))
    for state in states:
        basis, triangle = np.linalg.qr((1 - state**2)[:, None] * (weights.T @ basis))
        growth += np.log(np.abs(np.diag(triangle)))
    return growth / len(states)


def dense_states(
    weights: Float[Tensor, "nodes nodes"],
    x: Float[Tensor, "batch time inputs"],
    input_weights: Float[Tensor, "inputs nodes"],
) -> Float[Tensor, "batch time nodes"]:
    """One matrix product a step for all sequences; the drive of all steps beforehand.

    >>> dense_states(torch.zeros(1, 1), torch.ones(1, 2, 1), torch.ones(1, 1)).shape
    torch.Size([1, 2, 1])
    """
    drive = x @ input_weights
    states = torch.empty_like(drive)
    state = drive.new_zeros(len(x), len(weights))
    for t in range(x.shape[1]):
        state = torch.addmm(drive[:, t], state, weights).tanh_()
        states[:, t] = state
    return states


def sparse_states(
    by_target: Float[Tensor, "nodes nodes"],
    x: Float[Tensor, "batch time inputs"],
    input_weights: Float[Tensor, "inputs nodes"],
) -> Float[Tensor, "batch time nodes"]:
    """`dense_states` with the transposed weights in torch's CSR layout; sequences are columns.

    >>> empty = torch.zeros(1, 1).to_sparse_coo()
    >>> sparse_states(empty, torch.ones(1, 2, 1), torch.ones(1, 1)).shape
    torch.Size([1, 2, 1])
    """
    drive = (x @ input_weights).permute(1, 2, 0).contiguous()
    states = x.new_empty(len(x), x.shape[1], drive.shape[1])
    state = torch.zeros_like(drive[0]) if len(drive) else drive
    for t in range(x.shape[1]):
        state = torch.sparse.mm(by_target, state).add_(drive[t]).tanh_()
        states[:, t] = state.T
    return states


def module_scores(
    train: tuple[Float[np.ndarray, "time nodes"], Float[np.ndarray, "time outputs"]],
    test: tuple[Float[np.ndarray, "time nodes"], Float[np.ndarray, "time outputs"]],
    *,
    modules: Sequence[Int[np.ndarray, " members"]],
    penalty: float,
) -> list[float]:
    """Mean R^2 over the outputs of one ridge (without intercept, by Cholesky) a module, on the test states.

    >>> x = np.arange(1.0, 5.0)[:, None]
    >>> module_scores((x, 2 * x), (x, 2 * x), modules=[np.array([0])], penalty=0.0)
    [1.0]
    """
    scores = []
    for members in modules:
        x, y = train[0][:, members], train[1]
        coefficients = solve(x.T @ x + penalty * np.eye(len(members)), x.T @ y, assume_a="pos")
        error = ((test[1] - test[0][:, members] @ coefficients) ** 2).sum(0)
        scores.append(float(np.mean(1 - error / ((test[1] - test[1].mean(0)) ** 2).sum(0))))
    return scores
