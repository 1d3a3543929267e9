"""Triton kernels of the Mesa layer; imported only when one of them is about to run.

    states   S_j = exp(G_C) S_{j-1} + sum_i w_i a_i c_i^T             at every chunk boundary, float32
    outputs  o_t = d_t S^T q_t + sum_i M_ti (q_t . k_i) v_i           within a chunk, M_ti = zeta_ti beta_i [i <= t]
    solve    (H_t + Lambda) x_t = q_t by conjugate gradients, a chunk's tokens at once, until the last one is done

G is the running sum of log gates inside a chunk.  Forward: d = exp(G), w = exp(G_C - G) beta.  Reverse (adjoint states,
from the end of the sequence to its start) swaps the two and transposes M, without beta.  Chunks are the same in both
directions, so that forward and adjoint states meet at the same boundaries.

A log gate below LOG_ZERO is a factor that is zero in float32: it starts a new segment instead of entering the sums, so
that -inf is exact, and the float64 sums stay small enough for every difference to keep float32 precision.

| paper (arXiv 2506.05233, appendix D and algorithm 1) | here |
|---|---|
| q, k, v, beta, Lambda | q, k, v, beta, lamb |
| H_c, G_c^T (start of a chunk) | kk, kv (boundaries) |
| p, r, delta, alpha | direction, residual, norm (squared), length |

Not run on a GPU: equality tests run through Triton's interpreter; the compiler's output for sm_75 and sm_90 is checked
only for being produced and for the shared memory it asks for.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["chunk_outputs_kernel", "chunk_solve_kernel", "chunk_states_kernel", "decode_kernel"]

LOG_ZERO = tl.constexpr(-200.0)  # exp(-104) is already zero in float32


@triton.jit
def _running_gates(g: tl.tensor, beta: tl.tensor, rows: tl.tensor, T: tl.tensor, H: tl.constexpr) -> tl.tensor:
    """Sum of log gates up to each row, number of resets up to each row, input weights; rows past the end do nothing."""
    gate = tl.load(g + rows * H, mask=rows < T, other=0.0).to(tl.float64)
    weight = tl.load(beta + rows * H, mask=rows < T, other=0.0).to(tl.float32)
    is_reset = gate < LOG_ZERO
    resets = tl.cumsum(is_reset.to(tl.int32), 0)
    total = tl.cumsum(tl.where(is_reset, 0.0, gate), 0)
    return total, resets, weight


@triton.jit
def _from_start(total: tl.tensor, resets: tl.tensor) -> tl.tensor:
    """exp(G_t): what is left at row t of the state before the chunk."""
    return tl.where(resets == 0, tl.exp(total.to(tl.float32)), 0.0)


@triton.jit
def _to_end(total: tl.tensor, resets: tl.tensor) -> tl.tensor:
    """exp(G_C - G_t): what is left of row t after the chunk."""
    last, last_resets = tl.min(total, 0), tl.max(resets, 0)  # G never grows, resets never shrink
    return tl.where(resets == last_resets, tl.exp((last - total).to(tl.float32)), 0.0)


@triton.jit
def _between(
    total: tl.tensor, resets: tl.tensor, weight: tl.tensor, REVERSE: tl.constexpr, BLOCK_T: tl.constexpr
) -> tl.tensor:
    """M: row t reads row i <= t with zeta_ti beta_i; reversed, row s reads row t >= s with zeta_ts."""
    index = tl.arange(0, BLOCK_T)
    if REVERSE:
        seen = index[:, None] <= index[None, :]
        log = total[None, :] - total[:, None]
    else:
        seen = index[:, None] >= index[None, :]
        log = total[:, None] - total[None, :]
    seen = seen & (resets[:, None] == resets[None, :])
    mask = tl.exp(tl.where(seen, log, float("-inf")).to(tl.float32))
    if not REVERSE:
        mask = mask * weight[None, :]
    return mask


@triton.jit
def _load_rows(
    pointer: tl.tensor, rows: tl.tensor, columns: tl.tensor, T: tl.tensor, H: tl.constexpr, width: tl.tensor
) -> tl.tensor:
    """A [rows, columns] tile of a [T, H, width] slice in float32, zero outside."""
    inside = (rows < T)[:, None] & (columns < width)[None, :]
    return tl.load(pointer + rows[:, None] * H * width + columns[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def chunk_states_kernel(
    a: tl.tensor,
    c: tl.tensor,
    g: tl.tensor,
    beta: tl.tensor,
    first: tl.tensor,
    bounds: tl.tensor,
    T: tl.tensor,
    n_chunks: tl.tensor,
    H: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    REVERSE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """One [BLOCK_K, BLOCK_N] block of sum w a c^T at all boundaries of one (batch, head)."""
    blocks_k, blocks_n = tl.cdiv(K, BLOCK_K), tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0)
    block, lane = program % (blocks_k * blocks_n), (program // (blocks_k * blocks_n)).to(tl.int64)
    batch, head = lane // H, lane % H
    columns_k = (block // blocks_n) * BLOCK_K + tl.arange(0, BLOCK_K)
    columns_n = (block % blocks_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    a += (batch * T * H + head) * K
    c += (batch * T * H + head) * N
    g += batch * T * H + head
    beta += batch * T * H + head
    bounds += (lane * (n_chunks + 1) + (n_chunks if REVERSE else 0)) * K * N
    tile = columns_k[:, None] * N + columns_n[None, :]
    inside = (columns_k < K)[:, None] & (columns_n < N)[None, :]

    state = tl.load(first + lane * K * N + tile, mask=inside, other=0.0)
    for turn in range(n_chunks):
        tl.store(bounds + tile, state, mask=inside)
        bounds += -K * N if REVERSE else K * N
        chunk = n_chunks - 1 - turn if REVERSE else turn
        rows = chunk * BLOCK_T + tl.arange(0, BLOCK_T).to(tl.int64)
        total, resets, weight = _running_gates(g, beta, rows, T, H)
        weight = _from_start(total, resets) if REVERSE else _to_end(total, resets) * weight
        kept = tl.where(tl.max(resets, 0) == 0, tl.exp(tl.min(total, 0).to(tl.float32)), 0.0)
        keys = _load_rows(a, rows, columns_k, T, H, K)
        values = _load_rows(c, rows, columns_n, T, H, N) * weight[:, None]
        state = state * kept + tl.dot(tl.trans(keys), values, input_precision=PRECISION)
    tl.store(bounds + tile, state, mask=inside)


@triton.jit
def chunk_outputs_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    g: tl.tensor,
    beta: tl.tensor,
    bounds: tl.tensor,
    out: tl.tensor,
    T: tl.tensor,
    n_chunks: tl.tensor,
    H: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    stride_k: tl.tensor,
    stride_n: tl.tensor,
    REVERSE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """One [BLOCK_T, BLOCK_N] tile of gated linear attention; the strides let a state be read transposed."""
    blocks_n = tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0)
    block, place = program % blocks_n, program // blocks_n
    chunk, lane = place % n_chunks, (place // n_chunks).to(tl.int64)
    batch, head = lane // H, lane % H
    rows = chunk * BLOCK_T + tl.arange(0, BLOCK_T).to(tl.int64)
    columns_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    q += (batch * T * H + head) * K
    k += (batch * T * H + head) * K
    v += (batch * T * H + head) * N
    out += (batch * T * H + head) * N
    bounds += (lane * (n_chunks + 1) + chunk + REVERSE) * K * N
    total, resets, weight = _running_gates(g + batch * T * H + head, beta + batch * T * H + head, rows, T, H)
    decay = _to_end(total, resets) if REVERSE else _from_start(total, resets)

    score = tl.zeros([BLOCK_T, BLOCK_T], dtype=tl.float32)
    result = tl.zeros([BLOCK_T, BLOCK_N], dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        columns_k = start + tl.arange(0, BLOCK_K)
        queries = _load_rows(q, rows, columns_k, T, H, K)
        keys = _load_rows(k, rows, columns_k, T, H, K)
        inside = (columns_k < K)[:, None] & (columns_n < N)[None, :]
        state = tl.load(bounds + columns_k[:, None] * stride_k + columns_n[None, :] * stride_n, mask=inside, other=0.0)
        score += tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        result += tl.dot(queries * decay[:, None], state, input_precision=PRECISION)
    values = _load_rows(v, rows, columns_n, T, H, N)
    score = score * _between(total, resets, weight, REVERSE, BLOCK_T)
    result += tl.dot(score, values, input_precision=PRECISION)
    inside = (rows < T)[:, None] & (columns_n < N)[None, :]
    tl.store(out + rows[:, None] * H * N + columns_n[None, :], result, mask=inside)


@triton.jit
def _chunk_matrix(
    p: tl.tensor,
    kk: tl.tensor,
    k: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    T: tl.tensor,
    H: tl.constexpr,
    D: tl.constexpr,
    mask: tl.tensor,
    decay: tl.tensor,
    ridge: tl.tensor,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """Column t of the result is (H_t + Lambda) p_t, for all t of a chunk at once.

    Tokens are columns so that what stays (H, K) is spread over the warps and only p is copied to each; H and K are read
    again in every step, because as values they would live in registers, twice with tf32x3, and most would spill.
    """
    keys = _load_rows(k, rows, columns, T, H, D)
    score = tl.dot(keys, p, input_precision=PRECISION) * mask
    is_state = (columns < D)[:, None] & (columns < D)[None, :]
    memory = tl.load(kk + columns[:, None] * D + columns[None, :], mask=is_state, other=0.0)
    product = tl.dot(memory, p * decay[None, :], input_precision=PRECISION)
    product = tl.dot(tl.trans(keys), score, product, input_precision=PRECISION)
    return product + p * ridge[:, None]


@triton.jit
def _is_open(norm: tl.tensor, first_norm: tl.tensor, eps: tl.tensor) -> tl.tensor:
    """Tokens whose residual is above eps times the first one, all of them if eps is 0; not-a-number stays open."""
    is_small = tl.sqrt(norm) <= eps * tl.sqrt(first_norm)
    return (eps == 0) | (is_small == 0)


@triton.jit
def _ratio(a: tl.tensor, b: tl.tensor, is_wanted: tl.tensor) -> tl.tensor:
    """a / b where it is wanted and defined, otherwise 0: a guard without a bias."""
    is_safe = is_wanted & (b != 0)
    return tl.where(is_safe, a / tl.where(is_safe, b, 1.0), 0.0)


@triton.jit
def _read_out(
    x: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    kv: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    T: tl.tensor,
    H: tl.constexpr,
    D: tl.constexpr,
    N: tl.constexpr,
    mask: tl.tensor,
    decay: tl.tensor,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Store o_t = G_t x_t for all t of a chunk; column t of x is x_t."""
    keys = _load_rows(k, rows, columns, T, H, D)
    score = tl.dot(keys, x, input_precision=PRECISION) * mask
    decayed = x * decay[None, :]
    for start in range(0, N, BLOCK_N):
        columns_n = start + tl.arange(0, BLOCK_N)
        is_value = (columns < D)[:, None] & (columns_n < N)[None, :]
        state = tl.load(kv + columns[:, None] * N + columns_n[None, :], mask=is_value, other=0.0)
        values = _load_rows(v, rows, columns_n, T, H, N)
        result = tl.dot(tl.trans(state), decayed, input_precision=PRECISION)
        result = tl.dot(tl.trans(values), score, result, input_precision=PRECISION)
        is_output = (columns_n < N)[:, None] & (rows < T)[None, :]
        tl.store(out + columns_n[:, None] + rows[None, :] * H * N, result, mask=is_output)


@triton.jit
def chunk_solve_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    g: tl.tensor,
    beta: tl.tensor,
    lamb: tl.tensor,
    kk: tl.tensor,
    kv: tl.tensor,
    x: tl.tensor,
    out: tl.tensor,
    steps: tl.tensor,
    T: tl.tensor,
    n_chunks: tl.tensor,
    H: tl.constexpr,
    D: tl.constexpr,
    N: tl.constexpr,
    eps: tl.tensor,
    max_steps: tl.tensor,
    INIT: tl.constexpr,
    HAS_VALUES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Solve one chunk of one (batch, head) and, with values, apply the solution to them while it is at hand."""
    program = tl.program_id(0)
    chunk, lane = program % n_chunks, (program // n_chunks).to(tl.int64)
    batch, head = lane // H, lane % H
    rows, columns = chunk * BLOCK_T + tl.arange(0, BLOCK_T).to(tl.int64), tl.arange(0, BLOCK_D)
    tokens = batch * T * H + head
    kk += (lane * (n_chunks + 1) + chunk) * D * D
    total, resets, weight = _running_gates(g + tokens, beta + tokens, rows, T, H)
    decay = _from_start(total, resets)
    mask = tl.trans(_between(total, resets, weight, False, BLOCK_T))
    k += tokens * D
    ridge = tl.load(lamb + head * D + columns, mask=columns < D, other=1.0).to(tl.float32)

    is_token = (columns < D)[:, None] & (rows < T)[None, :]
    place = columns[:, None] + rows[None, :] * H * D
    target = tl.load(q + tokens * D + place, mask=is_token, other=0.0).to(tl.float32)
    scale = tl.max(tl.abs(target), 0)  # cotangents can be so small that their squares are zero
    scale = tl.where(scale > 0, scale, 1.0)
    target = target / scale[None, :]
    if INIT == "zero":
        solution = tl.zeros([BLOCK_D, BLOCK_T], dtype=tl.float32)
        residual = target
    else:
        solution = target
        if INIT == "diag":
            squares = tl.load(kk + columns * (D + 1), mask=columns < D, other=0.0)
            keys = _load_rows(k, rows, columns, T, H, D)
            diagonal = squares[:, None] * decay[None, :] + ridge[:, None]
            diagonal += tl.dot(tl.trans(keys * keys), mask, input_precision=PRECISION)
            solution = target / diagonal
        residual = target - _chunk_matrix(solution, kk, k, rows, columns, T, H, D, mask, decay, ridge, PRECISION)
    direction, norm = residual, tl.sum(residual * residual, 0)
    first_norm, is_open = norm, _is_open(norm, norm, eps)
    count = tl.zeros([BLOCK_T], dtype=tl.int32)
    step = 0
    while (step < max_steps) & (tl.max(is_open.to(tl.int32), 0) > 0):
        product = _chunk_matrix(direction, kk, k, rows, columns, T, H, D, mask, decay, ridge, PRECISION)
        length = _ratio(norm, tl.sum(direction * product, 0), is_open)
        solution += length[None, :] * direction
        residual -= length[None, :] * product
        new_norm = tl.sum(residual * residual, 0)
        direction = residual + _ratio(new_norm, norm, is_open)[None, :] * direction
        norm = new_norm
        count += is_open.to(tl.int32)
        is_open = is_open & _is_open(norm, first_norm, eps)
        step += 1

    solution = solution * scale[None, :]
    tl.store(x + tokens * D + place, solution, mask=is_token)
    tl.store(steps + tokens + rows * H, count, mask=rows < T)
    if HAS_VALUES:
        kv += (lane * (n_chunks + 1) + chunk) * D * N
        v, out = v + tokens * N, out + tokens * N
        _read_out(solution, k, v, kv, out, rows, columns, T, H, D, N, mask, decay, BLOCK_N, PRECISION)


@triton.jit
def decode_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    g: tl.tensor,
    beta: tl.tensor,
    lamb: tl.tensor,
    kk: tl.tensor,
    kv: tl.tensor,
    new_kk: tl.tensor,
    new_kv: tl.tensor,
    x: tl.tensor,
    out: tl.tensor,
    steps: tl.tensor,
    H: tl.constexpr,
    D: tl.constexpr,
    N: tl.constexpr,
    eps: tl.tensor,
    max_steps: tl.tensor,
    INIT: tl.constexpr,
    HAS_VALUES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """One token of one (batch, head): update the states, solve with the matrix in registers, read out."""
    lane = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    is_real = columns < D
    square = columns[:, None] * D + columns[None, :]
    inside = is_real[:, None] & is_real[None, :]
    decay = tl.exp(tl.load(g + lane).to(tl.float32))
    weight = tl.load(beta + lane).to(tl.float32)
    key = tl.load(k + lane * D + columns, mask=is_real, other=0.0).to(tl.float32)
    ridge = tl.load(lamb + (lane % H) * D + columns, mask=is_real, other=1.0).to(tl.float32)
    memory = tl.load(kk + lane * D * D + square, mask=inside, other=0.0)
    memory = memory * decay + weight * key[:, None] * key[None, :]
    tl.store(new_kk + lane * D * D + square, memory, mask=inside)

    target = tl.load(q + lane * D + columns, mask=is_real, other=0.0).to(tl.float32)
    scale = tl.max(tl.abs(target), 0)
    scale = tl.where(scale > 0, scale, 1.0)
    target = target / scale
    if INIT == "zero":
        solution = tl.zeros([BLOCK_D], dtype=tl.float32)
        residual = target
    else:
        solution = target
        if INIT == "diag":
            diagonal = tl.sum(tl.where(columns[:, None] == columns[None, :], memory, 0.0), 0)
            solution = target / (diagonal + ridge)
        residual = target - tl.sum(memory * solution[:, None], 0) - ridge * solution
    direction = residual
    norm = tl.sum(residual * residual, 0)
    first_norm = norm
    is_open = _is_open(norm, first_norm, eps)
    step = 0
    while (step < max_steps) & is_open:
        product = tl.sum(memory * direction[:, None], 0) + ridge * direction
        curvature = tl.sum(direction * product, 0)
        length = _ratio(norm, curvature, is_open)
        solution += length * direction
        residual -= length * product
        new_norm = tl.sum(residual * residual, 0)
        direction = residual + _ratio(new_norm, norm, is_open) * direction
        norm = new_norm
        is_open = _is_open(norm, first_norm, eps)
        step += 1

    solution = solution * scale
    tl.store(x + lane * D + columns, solution, mask=is_real)
    tl.store(steps + lane, step)
    if HAS_VALUES:
        for start in range(0, N, BLOCK_N):
            columns_n = start + tl.arange(0, BLOCK_N)
            is_state = is_real[:, None] & (columns_n < N)[None, :]
            tile = lane * D * N + columns[:, None] * N + columns_n[None, :]
            value = tl.load(v + lane * N + columns_n, mask=columns_n < N, other=0.0).to(tl.float32)
            state = tl.load(kv + tile, mask=is_state, other=0.0) * decay + weight * key[:, None] * value[None, :]
            tl.store(new_kv + tile, state, mask=is_state)
            tl.store(out + lane * N + columns_n, tl.sum(state * solution[:, None], 0), mask=columns_n < N)
