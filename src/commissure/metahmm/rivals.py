"""Rivals of the oracle, re-written: the published associative scan, and dense forward recursions in batches.

    m_t[i,j] = A_theta[i,j] E_theta[i, x_t]           message of token t: from z_t = i to z_{t+1} = j
    m_1 ... m_t                                       by an associative scan, S x S products, log2(T) rounds
    p(z_{t+1} | x_1..x_t, theta) ~ pi m_1 ... m_t,    log p(x_1..x_t | theta) = log of its sum

`scan_reference` is that design for every task (arXiv 2506.16288's oracle, written from its description): N T S^3
operations and N T S^2 numbers at once.  It is context; what the oracle is measured against is `forward_batched`, the
best dense form in torch: all tasks of one emission matrix share no work, but one batched product advances them all.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor

__all__ = ["forward_batched", "scan_reference"]


def scan_reference(
    initial: Float[Tensor, " states"],
    transition: Float[Tensor, "tasks states states"],
    emission: Float[Tensor, "tasks states vocab"],
    tokens: Int64[Tensor, " time"],
) -> tuple[Float[Tensor, "times vocab"], Float[Tensor, " times"]]:
    """Predictive and task entropy after 0, 1, ..., time tokens, uniform prior.

    >>> stay, half = torch.ones(2, 1, 1), torch.tensor([[[0.5, 0.5]], [[1.0, 0.0]]])
    >>> probs, entropy = scan_reference(torch.ones(1), stay, half, torch.tensor([0, 0]))
    >>> torch.round(probs[:, 0], decimals=3).tolist(), round(float(entropy[0]), 3)
    ([0.75, 0.8330000042915344, 0.8999999761581421], 0.693)
    """
    messages = emission[:, :, tokens].permute(0, 2, 1)[..., None] * transition[:, None]
    scale = messages.amax((2, 3), keepdim=True)
    products, logs = _scan(messages / scale, scale[:, :, 0, 0].log())
    rows = torch.einsum("s,ntsz->ntz", initial, products)
    sums = rows.sum(2)
    states = torch.cat([initial.expand(len(transition), 1, -1), rows / sums[:, :, None]], 1)
    log_likelihood = torch.nn.functional.pad(sums.log() + logs, (1, 0))
    posterior = log_likelihood.softmax(0)
    predictive = torch.einsum("nts,nsv->ntv", states, emission)
    return torch.einsum("nt,ntv->tv", posterior, predictive), torch.special.entr(posterior).sum(0)


def _scan(messages: Tensor, logs: Tensor) -> tuple[Tensor, Tensor]:
    """Running products along axis 1 by recursive pairing, each brought back to a largest entry of one."""
    time = messages.shape[1]
    if time < 2:
        return messages, logs
    even, odd = messages[:, 0 : time - 1 : 2], messages[:, 1::2]
    pairs, pair_logs = _product(even, logs[:, 0 : time - 1 : 2], odd, logs[:, 1::2])
    products, sums = _scan(pairs, pair_logs)
    out, out_logs = torch.empty_like(messages), torch.empty_like(logs)
    out[:, 1::2], out_logs[:, 1::2] = products, sums
    out[:, 0], out_logs[:, 0] = messages[:, 0], logs[:, 0]
    if time > 2:
        before = products[:, : (time - 1) // 2], sums[:, : (time - 1) // 2]
        out[:, 2::2], out_logs[:, 2::2] = _product(*before, messages[:, 2::2], logs[:, 2::2])
    return out, out_logs


def _product(a: Tensor, a_log: Tensor, b: Tensor, b_log: Tensor) -> tuple[Tensor, Tensor]:
    product = a @ b
    scale = product.amax((2, 3), keepdim=True)
    return product / scale, a_log + b_log + scale[:, :, 0, 0].log()


def forward_batched(
    initial: Float[Tensor, " states"],
    transitions: Float[Tensor, "variants states states"],
    emissions: Float[Tensor, "emissions states vocab"],
    tokens: Int64[Tensor, " time"],
) -> tuple[Float[Tensor, "times vocab"], Float[Tensor, " times"]]:
    """The same for all pairs of matrices: a product of S x S by S x W for each variant and token."""
    n_tasks = len(transitions) * len(emissions)
    joint = (initial[:, None] / n_tasks).expand(len(transitions), -1, len(emissions))
    probs, entropies = [], []
    for t in range(len(tokens) + 1):
        if t:
            joint = joint * emissions[:, :, tokens[t - 1]].T
            joint = transitions.mT @ (joint / joint.sum())
        probs.append(torch.einsum("sw,wsv->v", joint.sum(0), emissions))
        entropies.append(torch.special.entr(joint.sum(1)).sum())
    return torch.stack(probs), torch.stack(entropies)
