"""The exact filter of a family of hidden Markov models that share their parts, on a CPU or a GPU.

    a_t[u,s,w] = p(task = (u, w), z_{t+1} = s, x_1..x_t)
    a_{t+1}[u,:,w] = A_u^T (a_t[u,:,w] * E_w[:, x_{t+1}])          sum_s a ~ posterior of the tasks
    p(x_{t+1} = v | x_1..x_t) ~ sum_{s,w} (sum_u a_t)[s,w] E_w[s,v]

    here                 meaning
    transitions          A_u, U variants, rows sum to one
    emissions            E_w, W variants, one table for all u, or one for each (then W = 1 as a rule)

The joint of all U W tasks has one scale, so that mixing over u comes before the emission product: nnz(A) W + S W V
multiplications a token, not N S (S + V).  The kernel walks over the entries of A with W as the vectors' lanes; on a
GPU, and without the kernel, `hmm_filter_reference` multiplies whole matrices.
Setting: arXiv 2506.16288, section 2 (its oracle composes S x S messages by an associative scan); the factorization and
the pruning are our own.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from commissure.core.errors import InputError
from commissure.native import backend, kernels
from commissure.native.hmm_reference import (
    PRUNE_PERIOD,
    HMMFamily,
    HMMFiltered,
    HMMState,
    hmm_filter_reference,
)
from commissure.native.linear_attention import addresses

__all__ = [
    "PRUNE_PERIOD",
    "HMMFamily",
    "HMMFiltered",
    "HMMState",
    "hmm_family",
    "hmm_filter",
    "hmm_filter_reference",
    "hmm_kernel_available",
    "hmm_state",
]

_FLOATS = (torch.float32, torch.float64)
_PADDING = 128  # bytes that rows of `by_state` are padded to: four registers of the widest clone
_SHIFT = 8  # largest power of two that one token's probability is multiplied by: 8 tokens stay within float32


def hmm_kernel_available() -> bool:
    """Whether `hmm_filter` runs in C++ on a CPU; without a compiler at build time it runs its reference."""
    return backend() == "c++"


def hmm_family(
    transitions: Float[Tensor, "variants states states"], emissions: Float[Tensor, "tables emissions states vocab"]
) -> HMMFamily:
    """The arrays of a family, in the dtype and on the device of its matrices.

    `tables` is 1, or the number of transition variants, each with its own emission tables.

    >>> family = hmm_family(torch.eye(2)[None], torch.full((1, 3, 2, 5), 0.2))
    >>> family.rows.tolist(), family.by_token.shape
    ([0, 1], torch.Size([1, 5, 2, 3]))
    """
    if transitions.ndim != 3 or transitions.shape[1] != transitions.shape[2] or transitions.dtype not in _FLOATS:
        found = (tuple(transitions.shape), str(transitions.dtype))
        raise InputError("transitions", found, "a float32 or float64 tensor [variants, states, states]")
    variants, states, _ = transitions.shape
    is_fine = emissions.ndim == 4 and emissions.shape[0] in (1, variants) and emissions.shape[2] == states
    if not is_fine or emissions.dtype != transitions.dtype or emissions.device != transitions.device:
        given = (tuple(emissions.shape), str(emissions.dtype), emissions.device.type)
        allowed = f"shape (1 or {variants}, emissions, {states}, vocab), dtype and device of transitions"
        raise InputError("emissions", given, allowed)
    columns = transitions.mT.contiguous()
    counts = (columns != 0).sum(2)
    order = counts.argsort(dim=1, stable=True)
    columns = columns.gather(1, order[:, :, None].expand_as(columns))
    counts = counts.gather(1, order)
    stops = torch.searchsorted(counts, counts, right=True)
    by_state = emissions.transpose(1, 2)
    padding = -by_state.shape[3] % (_PADDING // emissions.element_size())
    mean = emissions.double().mean((0, 1, 2)).clamp(min=2.0**-_SHIFT)
    return HMMFamily(
        transitions.contiguous(),
        emissions.contiguous(),
        torch.cat([counts.new_zeros(1), counts.flatten().cumsum(0)]),
        stops,
        order.int(),
        columns.nonzero()[:, 2].int(),
        columns[columns != 0],
        emissions.permute(0, 3, 2, 1).contiguous(),
        torch.nn.functional.pad(by_state, (0, padding)).contiguous(),
        (-mean.log2()).round().int(),
    )


def hmm_state(joint: Float[Tensor, "batch variants states emissions"], *, per_task: bool = False) -> HMMState:
    """The state before the first token, from p(u, w, z_1 = s), which must sum to one.

    `per_task` gives every task a scale of its own: none is ever lost to underflow, at about three times the cost.

    >>> hmm_state(torch.full((2, 1, 2, 1), 0.5)).log_mass.tolist()
    [0.0, 0.0]
    """
    batch, variants, _, emissions = joint.shape
    zeros = torch.zeros(batch, dtype=torch.float64, device=joint.device)
    scaled = (variants, emissions) if per_task else (0, 0)
    exponent = torch.zeros(batch, *scaled, dtype=torch.int32, device=joint.device)
    return HMMState(joint, exponent, zeros, zeros, zeros, torch.zeros_like(zeros, dtype=torch.int64))


def hmm_filter(
    family: HMMFamily,
    tokens: Int[Tensor, "batch time"],
    state: HMMState,
    lengths: Int[Tensor, " batch"],
    *,
    prune: float = 0.0,
    start: bool = True,
    entropy: bool = True,
    epistemic: bool = False,
    marginals: bool = False,
) -> tuple[HMMFiltered, HMMState]:
    """Filter sequences that go on from `state`, `lengths` tokens of each row; what holds at each time, and the state.

    `start`: whether time 0, before the first token, is wanted (NaN otherwise).  `prune`: after every 8th token from
    a sequence's start, transition variants with less posterior mass are left out; the mass they had is added up in
    `dropped_mass`.  `entropy` (nats, of the posterior over tasks), `epistemic` (the mutual information of next token
    and task: N S V multiplications a token, for tasks above 1e-21 of the posterior mass (1e-13 in float32), so that at
    most that times N log V is missing) and `marginals` (posteriors over u and over w) are optional.  Runs on up to
    `torch.get_num_threads()` threads, sequences shared out, with the same bits for any number.  No gradient.

    >>> family = hmm_family(torch.eye(2)[None], torch.eye(2)[None, None])
    >>> prior = hmm_state(torch.full((1, 1, 2, 1), 0.5))
    >>> told, _ = hmm_filter(family, torch.tensor([[1]]), prior, torch.tensor([1]))
    >>> told.log_probs.exp().tolist()
    [[[0.5, 0.5], [0.0, 1.0]]]
    """
    _check(family, tokens, state, lengths)
    options = (float(prune), start, entropy, epistemic, marginals)
    told = torch.ops.commissure.hmm_filter(list(family), tokens, list(state), lengths, *options)
    joint, exponent, log_mass, log_evidence, dropped = told[:5]
    after = HMMState(joint, exponent, log_mass, log_evidence, dropped, state.position + lengths)
    optional = [x if is_wanted else None for x, is_wanted in zip(told[9:], _wanted(*options[2:]), strict=True)]
    return HMMFiltered(*told[5:9], *optional), after


def _wanted(entropy: bool, epistemic: bool, marginals: bool) -> tuple[bool, bool, bool, bool]:
    return entropy, epistemic, marginals, marginals


def _check(family: HMMFamily, tokens: Tensor, state: HMMState, lengths: Tensor) -> None:
    """Raise InputError naming the first argument that does not fit."""
    variants, states, _ = family.transitions.shape
    emissions, vocab = family.emissions.shape[1], family.emissions.shape[3]
    if tokens.ndim != 2 or tokens.dtype != torch.int64:
        raise InputError("tokens", (tuple(tokens.shape), str(tokens.dtype)), "an int64 tensor [batch, time]")
    batch, time = tokens.shape
    if not tokens.device == lengths.device == state.joint.device == family.transitions.device:
        devices = [str(x.device) for x in (family.transitions, tokens, state.joint, lengths)]
        raise InputError("devices of family, tokens, state, lengths", devices, "one device")
    if lengths.shape != (batch,) or lengths.dtype != torch.int64:
        raise InputError("lengths", (tuple(lengths.shape), str(lengths.dtype)), f"int64, shape ({batch},)")
    if bool(((lengths < 0) | (lengths > time)).any()):
        raise InputError("lengths", lengths.tolist(), f"0 <= length <= time = {time}")
    outside = ((tokens < 0) | (tokens >= vocab)) & (torch.arange(time, device=tokens.device) < lengths[:, None])
    if outside.any():
        at = tuple(outside.nonzero()[0].tolist())
        raise InputError(f"tokens[{at[0]}, {at[1]}]", int(tokens[at]), f"0 <= token < {vocab}")
    shape = (batch, variants, states, emissions)
    if state.joint.shape != shape or state.joint.dtype != family.transitions.dtype:
        found = (tuple(state.joint.shape), str(state.joint.dtype))
        raise InputError("state.joint", found, f"shape {shape}, dtype {family.transitions.dtype}")
    if state.exponent.shape not in ((batch, 0, 0), (batch, variants, emissions)):
        raise InputError("state.exponent", tuple(state.exponent.shape), f"{(batch, variants, emissions)} or none")
    dtypes = (torch.int32, torch.float64, torch.float64, torch.float64, torch.int64)
    for name, field, dtype in zip(state._fields[1:], state[1:], dtypes, strict=True):
        if field.dtype != dtype or len(field) != batch:
            raise InputError(f"state.{name}", (tuple(field.shape), str(field.dtype)), f"{batch} rows of {dtype}")


_library = torch.library.Library("commissure", "FRAGMENT")
_library.define(
    "hmm_filter(Tensor[] family, Tensor tokens, Tensor[] state, Tensor lengths, float prune, bool start, bool entropy,"
    " bool epistemic, bool marginals) -> Tensor[]"
)


def _filter(
    family: list[Tensor],
    tokens: Tensor,
    state: list[Tensor],
    lengths: Tensor,
    prune: float,
    start: bool,
    entropy: bool,
    epistemic: bool,
    marginals: bool,
    clone: str = "",
) -> list[Tensor]:
    """The operator on CPU tensors: the state's first five fields, then all of HMMFiltered, empty where not wanted."""
    native = kernels()
    if native is None:
        return _dense(family, tokens, state, lengths, prune, start, entropy, epistemic, marginals)
    model, before = HMMFamily(*family), HMMState(*(x.contiguous() for x in state))
    tokens, lengths = _padded(tokens, lengths)
    results = _allocate(model, tokens, before, entropy, epistemic, marginals)
    states, (log_probs, evidence, drops, impossible, *optional) = results[:5], results[5:]
    entropies, mutual, transition, emission = optional
    scaled = before.exponent.shape[1] > 0
    inputs = [tokens, lengths, before.joint, before.exponent if scaled else None, *before[2:]]
    outputs = [states[0], states[1] if scaled else None, *states[2:], log_probs, evidence, entropies, drops]
    outputs += [mutual, transition, emission, impossible]
    sizes = [*tokens.shape, *before.joint.shape[1:], model.emissions.shape[3], len(model.emissions)]
    arrays = [*model[2:]]
    native.hmm_filter(
        *(addresses(x) for x in (arrays, inputs, outputs)),
        sizes,
        prune,
        PRUNE_PERIOD,
        start,
        float(len(model.values)),
        before.joint.dtype == torch.float32,
        torch.get_num_threads(),
        clone,
    )
    return results


def _dense(
    family: list[Tensor],
    tokens: Tensor,
    state: list[Tensor],
    lengths: Tensor,
    prune: float,
    start: bool,
    entropy: bool,
    epistemic: bool,
    marginals: bool,
) -> list[Tensor]:
    """The operator by its reference, on any device."""
    told, after = hmm_filter_reference(
        HMMFamily(*family),
        _padded(tokens, lengths)[0],
        HMMState(*state),
        lengths,
        prune=prune,
        start=start,
        entropy=entropy,
        epistemic=epistemic,
        marginals=marginals,
    )
    empty = after.log_mass.new_empty(0)
    return [*after[:5], *(empty if x is None else x for x in told)]


def _padded(tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Contiguous arrays, with a token that exists in the padding."""
    padding = torch.arange(tokens.shape[1], device=tokens.device) >= lengths[:, None]
    return tokens.masked_fill(padding, 0).contiguous(), lengths.contiguous()


def _allocate(
    family: HMMFamily, tokens: Tensor, state: HMMState, entropy: bool, epistemic: bool, marginals: bool
) -> list[Tensor]:
    """The results' memory, not filled."""
    batch, times = tokens.shape[0], tokens.shape[1] + 1
    dtype = state.joint.dtype

    def empty(*shape: int, kind: torch.dtype = torch.float64) -> Tensor:
        return torch.empty(shape, dtype=kind, device=tokens.device)

    optional = [
        empty(batch, times),
        empty(batch, times),
        empty(batch, times, state.joint.shape[1], kind=dtype),
        empty(batch, times, state.joint.shape[3], kind=dtype),
    ]
    wanted = _wanted(entropy, epistemic, marginals)
    return [
        *(torch.empty_like(x, memory_format=torch.contiguous_format) for x in state[:5]),
        empty(batch, times, family.emissions.shape[3], kind=dtype),
        empty(batch, times),
        empty(batch, times),
        empty(batch, kind=torch.int64),
        *(x if is_wanted else empty(0) for x, is_wanted in zip(optional, wanted, strict=True)),
    ]


def _fake(
    family: list[Tensor],
    tokens: Tensor,
    state: list[Tensor],
    lengths: Tensor,
    prune: float,
    start: bool,
    entropy: bool,
    epistemic: bool,
    marginals: bool,
) -> list[Tensor]:
    return _allocate(HMMFamily(*family), tokens, HMMState(*state), entropy, epistemic, marginals)


_library.impl("hmm_filter", _filter, "CPU")
_library.impl("hmm_filter", _dense, "CUDA")
torch.library.register_fake("commissure::hmm_filter", _fake, lib=_library)
