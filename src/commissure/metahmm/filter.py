"""The Bayes filter of a family of HMMs as a sequence mixer: differentiable, and on soft evidence as well as on tokens.

    l_t[w,s] = sum_v E_w[s,v] x_t[v]                       likelihood of the evidence x_t; a one-hot x_t is a token
    a_t[u,:,w] = A_u^T (a_{t-1}[u,:,w] * l_t[w,:]) / c_t   joint distribution of task and next hidden state
    y_t[v] = log sum_{u,s,w} a_t[u,s,w] E_w[s,v]           log probabilities of the next token

x_t[v] is p(observation | token v) up to a factor, nonnegative; a row of ones is no evidence, time goes on.
`BayesOracle` is the fast form for tokens, this one the form to train through.  Setting: arXiv 2506.16288, section 2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from commissure.core.errors import InputError
from commissure.core.mixer import where
from commissure.metahmm.inputs import Table, checked_matrices, checked_prior, stochastic, whole
from commissure.nn.padding import check_sequence, check_step, valid

__all__ = ["HMMFilter", "HMMFilterState"]


class HMMFilterState(NamedTuple):
    """p(u, w, z_{t+1} = s | x_1..x_t), and log p(x_1..x_t)."""

    joint: Float[Tensor, "batch variants states emissions"]
    log_evidence: Float[Tensor, " batch"]


class HMMFilter(nn.Module):
    """The filter as a mixer from (batch, time, vocab) to (batch, time, vocab).

    Matrices and prior as in `BayesOracle`, uniform prior if None; float64 buffers, moved and cast by `.to`.
    Evidence that no task explains gives NaN.  Gradients flow to the evidence and to the initial state.

    >>> mixer = HMMFilter(torch.tensor([1.0, 0.0]), torch.tensor([[[0.0, 1.0], [1.0, 0.0]]]), torch.eye(2)[None])
    >>> mixer(torch.tensor([[[1.0, 0.0]]], dtype=torch.float64))[0].exp().tolist()
    [[[0.0, 1.0]]]
    """

    initial: Tensor
    transitions: Tensor
    emissions: Tensor
    prior: Tensor

    def __init__(
        self,
        initial: Table,
        transitions: Table,
        emissions: Table,
        *,
        prior: Table | None = None,
    ) -> None:
        super().__init__()
        names = ("transitions", "emissions")
        initial, transitions, emissions = checked_matrices(
            names, stochastic("initial", initial, 1), transitions, emissions
        )
        for name, matrix in {"initial": initial, "transitions": transitions, "emissions": emissions}.items():
            self.register_buffer(name, matrix)
        parts = len(transitions), len(emissions)
        weights = checked_prior(prior, None, parts[0] * parts[1]).view(parts)
        self.register_buffer("prior", weights.to(initial.device))
        self.dim = emissions.shape[2]

    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> HMMFilterState:
        """Prior and initial distribution, for each row."""
        joint = (self.prior[:, None, :] * self.initial[None, :, None]).to(device=device, dtype=dtype)
        return HMMFilterState(
            joint.expand(whole("batch_size", batch_size, 0), -1, -1, -1).clone(), joint.new_zeros(batch_size)
        )

    def step(
        self, x_t: Float[Tensor, "batch vocab"], state: HMMFilterState
    ) -> tuple[Float[Tensor, "batch vocab"], HMMFilterState]:
        """One element of evidence in, the log probabilities of the next token out."""
        check_step(x_t, self.dim, state)
        if x_t.dtype != self.emissions.dtype:
            fix = "cast the evidence, or the module by .to(dtype)"
            raise InputError("x_t.dtype", x_t.dtype, f"that of the matrices, {self.emissions.dtype}", fix)
        seen = state.joint * torch.einsum("wsv,bv->bsw", self.emissions, x_t)[:, None]
        mass = seen.sum((1, 2, 3))
        joint = self.transitions.mT @ (seen / mass[:, None, None, None])
        y_t = torch.einsum("bsw,wsv->bv", joint.sum(1), self.emissions).log()
        return y_t, HMMFilterState(joint, state.log_evidence + mass.log())

    def forward(
        self,
        x: Float[Tensor, "batch time vocab"],
        state: HMMFilterState | None = None,
        *,
        lengths: Int[Tensor, " batch"] | None = None,
    ) -> tuple[Float[Tensor, "batch time vocab"], HMMFilterState]:
        """A whole stretch, one element after another."""
        check_sequence(x, self.dim, state, lengths)
        state = self.init_state(x.shape[0], device=x.device, dtype=x.dtype) if state is None else state
        running = None if lengths is None else valid(lengths, x.shape[1])
        x = x if running is None else x.masked_fill(~running[:, :, None], 1.0)  # no evidence, and no division by zero
        outputs = []
        for t, x_t in enumerate(x.unbind(1)):
            y_t, after = self.step(x_t, state)
            state = after if running is None else where(running[:, t], after, state)
            outputs.append(y_t)
        return torch.stack(outputs, 1) if outputs else x.new_zeros(x.shape), state
