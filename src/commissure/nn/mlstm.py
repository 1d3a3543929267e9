"""mLSTM, the matrix memory of xLSTM: exponential input gate, sigmoid forget gate, a normalizer beside the memory.

    C_t = f_t C_{t-1} + i_t k_t v_t^T,    n_t = f_t n_{t-1} + i_t k_t,    o_t = C_t^T q_t / max(|n_t . q_t|, 1)
    i_t = exp(b_proj x_t),    f_t = sigmoid(a_proj x_t),    q scaled by head_dim^-1/2

An exponential overflows, so memory and normalizer are kept as C exp(-m) and n exp(-m) with the stabilizer

    m_t = max(log f_t + m_{t-1}, log i_t, 0),    o_t = (C exp(-m))^T q / max(|(n exp(-m)) . q|, exp(-m))

The paper's m has no 0 in it; no output depends on m, and with the floor m starts at 0, is never infinite, and closed
gates need no special case: a normalizer below 1 has no effect.  In gradients m is a constant, for the same reason.
The stabilized recurrence is gated linear attention with log gates g = log f + m_{t-1} - m_t <= 0, beta = exp(log i - m)
and values [v, 1], so that is how it is computed.  When to use: its input gate can make one token outweigh all others.

| paper | here |
|---|---|
| i~, log f | `log_input`, `log_forget` |
| (C, n) exp(-m), m | `MLSTMMemory.cells`, `.normalizer`, `.stabilizer` |

Beck et al., arXiv 2405.04517, equations 19-27; without its output gate, with the convolution and projections of
arXiv 2506.05233, appendix E (no L2 norm of q and k).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from commissure.core.errors import InputError
from commissure.nn.heads import FORGET_BIAS, ConvState, HeadInputs, HeadOutput, gate_projection, head_sizes
from commissure.nn.linear_attention import check_shapes, compute_dtype, gated_linear_attention
from commissure.nn.mesa_checks import Gate, check_values, log_gate
from commissure.nn.padding import check_sequence, check_step, valid, zero_padding

__all__ = ["MLSTM", "MLSTMMemory", "MLSTMState", "matrix_lstm", "matrix_lstm_reference"]


class MLSTMMemory(NamedTuple):
    """Memory and normalizer times exp(-stabilizer); never in half precision."""

    cells: Float[Tensor, "batch heads head_dim value_dim"]
    normalizer: Float[Tensor, "batch heads head_dim"]
    stabilizer: Float[Tensor, "batch heads"]


class MLSTMState(NamedTuple):
    """The convolution's last inputs and the memory."""

    conv: ConvState
    memory: MLSTMMemory


class MLSTM(nn.Module):
    """One mLSTM layer as a sequence mixer.

    `heads` defaults to dim // 64 (at least 1), `head_dim` to dim // heads, `value_dim` to `head_dim`; `chunk_size` is
    the length of the parallel form's pieces and changes no result.

    >>> layer = MLSTM(8, heads=2)
    >>> y, state = layer(torch.zeros(1, 3, 8))
    >>> y.shape, state.memory.normalizer.shape
    (torch.Size([1, 3, 8]), torch.Size([1, 2, 4]))
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        conv_size: int = 4,
        chunk_size: int = 64,
    ) -> None:
        super().__init__()
        heads, head_dim = head_sizes(dim, heads, head_dim)
        if chunk_size < 1:
            raise InputError("chunk_size", chunk_size, "an integer >= 1")
        self.dim, self.chunk_size = dim, chunk_size
        self.inputs = HeadInputs(
            dim, heads=heads, head_dim=head_dim, value_dim=value_dim, conv_size=conv_size, normalize=False
        )
        self.a_proj = gate_projection(dim, heads, bias=FORGET_BIAS)
        self.b_proj = gate_projection(dim, heads)
        self.output = HeadOutput(dim, heads=heads, value_dim=self.inputs.value_dim)

    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> MLSTMState:
        """Nothing seen: zeros."""
        conv = self.inputs.init_state(batch_size, device=device, dtype=dtype)
        shape = (batch_size, self.inputs.heads, self.inputs.head_dim, self.inputs.value_dim)
        return MLSTMState(conv, _empty_memory(conv.keys, shape))

    def step(self, x_t: Float[Tensor, "batch dim"], state: MLSTMState) -> tuple[Float[Tensor, "batch dim"], MLSTMState]:
        """One element in, one out: the recurrence."""
        check_step(x_t, self.dim, state)
        x = x_t[:, None]
        q, k, v, conv = self.inputs(x, state.conv)
        o, memory = matrix_lstm_reference(q, k, v, self.b_proj(x), F.logsigmoid(self.a_proj(x)), state.memory)
        return self.output(o)[:, 0], MLSTMState(conv, memory)

    def forward(
        self,
        x: Float[Tensor, "batch time dim"],
        state: MLSTMState | None = None,
        *,
        lengths: Int[Tensor, " batch"] | None = None,
    ) -> tuple[Float[Tensor, "batch time dim"], MLSTMState]:
        """A whole stretch by chunks."""
        check_sequence(x, self.dim, state, lengths)
        state = self.init_state(x.shape[0], device=x.device, dtype=x.dtype) if state is None else state
        x = zero_padding(x, lengths)
        q, k, v, conv = self.inputs(x, state.conv, lengths=lengths)
        log_input, log_forget = self.b_proj(x), zero_padding(F.logsigmoid(self.a_proj(x)), lengths)
        if lengths is not None:  # i = 0 and f = 1 keep the memory
            log_input = log_input.masked_fill(~valid(lengths, x.shape[1])[:, :, None], -torch.inf)
        o, memory = _matrix_lstm(q, k, v, log_input, log_forget, state.memory, self.chunk_size)
        return self.output(o), MLSTMState(conv, memory)


def matrix_lstm(
    q: Float[Tensor, "batch time heads dim"],
    k: Float[Tensor, "batch time heads dim"],
    v: Float[Tensor, "batch time heads value_dim"],
    log_input: Float[Tensor, "batch time heads"],
    log_forget: Float[Tensor, "batch time heads"],
    initial_state: MLSTMMemory | None = None,
    *,
    chunk_size: int = 64,
) -> tuple[Float[Tensor, "batch time heads value_dim"], MLSTMMemory]:
    """Outputs and final memory; log_input any finite number or -inf, log_forget <= 0 (-inf forgets all before).

    Queries are scaled here.  Any length, zero included.  Half-precision inputs are computed in float32: outputs in
    `v`'s dtype, the memory in float32 (float64 for float64).  `chunk_size` changes no result.  Raises InputError for
    shapes, NaN, and gates out of range (naming the first).

    >>> one, zero = torch.ones(1, 2, 1, 1), torch.zeros(1, 2, 1)
    >>> matrix_lstm(one, one, 3 * one, zero + 100.0, zero)[0].flatten().tolist()
    [3.0, 3.0]
    """
    _check(q, k, v, log_input, log_forget, initial_state)
    memory = _empty_memory(v, (q.shape[0], *q.shape[2:], v.shape[3])) if initial_state is None else initial_state
    finite = {"q": q, "k": k, "v": v} | {f"initial_state.{name}": x for name, x in memory._asdict().items()}
    write = Gate(log_input, -math.inf, torch.finfo(log_input.dtype).max, "log i finite or -inf (writes nothing)")
    check_values(finite, {"log_input": write, "log_forget": log_gate(log_forget)})
    return _matrix_lstm(q, k, v, log_input, log_forget, memory, chunk_size)


def _matrix_lstm(
    q: Tensor, k: Tensor, v: Tensor, log_input: Tensor, log_forget: Tensor, memory: MLSTMMemory, chunk_size: int
) -> tuple[Tensor, MLSTMMemory]:
    """`matrix_lstm` without checks."""
    dtype = compute_dtype(v)
    log_input, log_forget = log_input.double(), log_forget.double()
    first = memory.stabilizer.double()
    levels = torch.cat([first[:, None], _stabilizers(log_input.detach(), log_forget.detach(), first.detach())], 1)
    before, after = levels[:, :-1], levels[:, 1:]
    g = log_forget + before - after
    g = g - g.detach().clamp(min=0)  # above 0 by rounding alone
    beta = (log_input - after).exp()
    # The normalizer is one more value, always 1.
    values = F.pad(v.to(dtype), (0, 1), value=1.0)
    state = torch.cat([memory.cells, memory.normalizer[..., None]], 3)
    scaled = q.to(dtype) * q.shape[3] ** -0.5
    o, state = gated_linear_attention(scaled, k.to(dtype), values, g, beta, state, chunk_size=chunk_size)
    o = _normalize(o[..., :-1], o[..., -1], after.to(dtype))
    return o.to(v.dtype), MLSTMMemory(state[..., :-1], state[..., -1], levels[:, -1].to(dtype))


def matrix_lstm_reference(
    q: Float[Tensor, "batch time heads dim"],
    k: Float[Tensor, "batch time heads dim"],
    v: Float[Tensor, "batch time heads value_dim"],
    log_input: Float[Tensor, "batch time heads"],
    log_forget: Float[Tensor, "batch time heads"],
    initial_state: MLSTMMemory | None = None,
    *,
    chunk_size: int = 64,
) -> tuple[Float[Tensor, "batch time heads value_dim"], MLSTMMemory]:
    """The stabilized recurrence itself, differentiated by autograd; `chunk_size` is ignored."""
    _check(q, k, v, log_input, log_forget, initial_state)
    memory = _empty_memory(v, (q.shape[0], *q.shape[2:], v.shape[3])) if initial_state is None else initial_state
    cells, normalizer, m = memory
    kept, dtype = v.dtype, compute_dtype(v)
    q, k, v, log_input, log_forget = (x.to(dtype) for x in (q, k, v, log_input, log_forget))
    outputs = []
    for t in range(q.shape[1]):
        faded = log_forget[:, t] + m
        m = torch.maximum(faded, log_input[:, t]).clamp(min=0).detach()
        forget, write = (faded - m).exp(), (log_input[:, t] - m).exp()
        key, query = k[:, t], q[:, t] * q.shape[3] ** -0.5
        cells = forget[..., None, None] * cells + (write[..., None] * key)[..., None] * v[:, t, :, None]
        normalizer = forget[..., None] * normalizer + write[..., None] * key
        outputs.append(_normalize((query[:, :, None] @ cells)[:, :, 0], (query * normalizer).sum(-1), m))
    return (torch.stack(outputs, 1) if outputs else torch.zeros_like(v)).to(kept), MLSTMMemory(cells, normalizer, m)


def _stabilizers(
    log_input: Float[Tensor, "batch time heads"],
    log_forget: Float[Tensor, "batch time heads"],
    first: Float[Tensor, "batch heads"],
) -> Float[Tensor, "batch time heads"]:
    """m after each element, by doubling: its recurrence is associative in (sum, max), and nothing is subtracted."""
    m, decay = torch.cat([first[:, None], log_input.clamp(min=0)], 1), F.pad(log_forget, (0, 0, 1, 0))
    reach = 1
    while reach < m.shape[1]:
        m = torch.cat([m[:, :reach], torch.maximum(m[:, reach:], decay[:, reach:] + m[:, :-reach])], 1)
        decay = torch.cat([decay[:, :reach], decay[:, reach:] + decay[:, :-reach]], 1)
        reach *= 2
    return m[:, 1:]


def _normalize(
    mixed: Float[Tensor, "*batch value_dim"], weight: Float[Tensor, "*batch"], m: Float[Tensor, "*batch"]
) -> Float[Tensor, "*batch value_dim"]:
    """mixed / max(|weight|, exp(-m)); where both underflow, 0 / tiny = 0."""
    floor = (-m).exp().clamp(min=torch.finfo(m.dtype).tiny)
    return mixed / torch.maximum(weight.abs(), floor)[..., None]


def _empty_memory(like: Tensor, shape: tuple[int, ...]) -> MLSTMMemory:
    """Zeros; `shape` is (batch, heads, head_dim, value_dim)."""
    dtype = compute_dtype(like)
    return MLSTMMemory(*(like.new_zeros(shape[:n_axes], dtype=dtype) for n_axes in (4, 3, 2)))


def _check(q: Tensor, k: Tensor, v: Tensor, log_input: Tensor, log_forget: Tensor, memory: MLSTMMemory | None) -> None:
    """Raise `InputError` unless the tensors belong together."""
    for name, gate in (("log_input", log_input), ("log_forget", log_forget)):
        if q.ndim == 4 and gate.shape != q.shape[:3]:
            raise InputError(name, tuple(gate.shape), f"shape {tuple(q.shape[:3])}: one number a head")
    check_shapes(q, k, v, log_forget, None, None if memory is None else memory.cells)
