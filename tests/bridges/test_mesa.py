"""The Mesa layer is regularized least squares: ridge, weighted ridge, recursive least squares; and it streams.

With Lambda = lambda I the memory after t tokens is the ridge of the values on the keys so far, a token's weight its
input gate times all later forget gates; float64, every solver.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from commissure.core.lsq import RecursiveLeastSquares, ridge
from commissure.decode import POSSM, SpikeRecording, StreamingDecoder
from commissure.nn.mesa import mesa_attention

TOLERANCE = 1e-10
TIME, DIM, OUTPUTS, PENALTY = 41, 7, 3, 0.3
SOLVERS = {
    "sequential": {},
    "cholesky": {},
    "block_rls": {},
    "cg": {"max_cg_steps": 4 * DIM},
}


@pytest.fixture(params=SOLVERS)
def solver(request: pytest.FixtureRequest) -> dict[str, object]:
    """Options of one solver."""
    return {"solver": request.param, **SOLVERS[request.param]}


def problem(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries, keys of length 1 and values of one sequence."""
    rng = torch.Generator().manual_seed(seed)
    q, k = (normalize(torch.randn(TIME, DIM, generator=rng, dtype=torch.float64), dim=-1) for _ in range(2))
    return q.numpy(), k.numpy(), torch.randn(TIME, OUTPUTS, generator=rng, dtype=torch.float64).numpy()


def mesa(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, gamma: np.ndarray, beta: np.ndarray, solver: dict[str, object]
) -> np.ndarray:
    """Outputs of one head after every token."""
    rows = (torch.from_numpy(x)[None, :, None] for x in (q, k, v, np.log(gamma), beta))
    lamb = torch.full((1, DIM), PENALTY, dtype=torch.float64)
    return mesa_attention(*rows, lamb, **solver).output[0, :, 0].numpy()  # type: ignore[arg-type]


def assert_same(a: np.ndarray, b: np.ndarray) -> None:
    assert a.shape == b.shape
    assert np.max(np.abs(a - b)) <= TOLERANCE * np.max(np.abs(b))


def test_without_forgetting_it_is_ridge_and_recursive_least_squares(solver: dict[str, object]) -> None:
    q, k, v = problem()
    one = np.ones(TIME)
    o = mesa(q, k, v, one, one, solver)
    ridges = [ridge(k[: t + 1], v[: t + 1], penalty=PENALTY, intercept=False) for t in range(TIME)]
    assert_same(o, np.stack([fit.predict(q[t : t + 1])[0] for t, fit in enumerate(ridges)]))
    rls = RecursiveLeastSquares(n_features=DIM, n_outputs=OUTPUTS, penalty=PENALTY)
    state, predicted = rls.init_state(), []
    for q_t, k_t, v_t in zip(q, k, v, strict=True):
        state = rls.update(state, k_t, v_t)
        predicted.append(rls.predict(state, q_t))
    assert_same(o, np.stack(predicted))


def test_gates_are_sample_weights(solver: dict[str, object]) -> None:
    q, k, v = problem(1)
    rng = np.random.default_rng(0)
    gamma, beta = rng.uniform(0.8, 1.0, TIME), rng.uniform(0.0, 1.0, TIME)
    o = mesa(q, k, v, gamma, beta, solver)
    for t in range(TIME):
        later = np.append(np.cumprod(gamma[t:0:-1])[::-1], 1.0)  # gamma_{i+1} ... gamma_t
        fit = ridge(k[: t + 1], v[: t + 1], penalty=PENALTY, sample_weight=later * beta[: t + 1], intercept=False)
        assert_same(o[t : t + 1], fit.predict(q[t : t + 1]))


def test_with_forgetting_it_is_not_recursive_least_squares() -> None:
    """Recursive least squares forgets its penalty too; the Mesa layer keeps it."""
    q, k, v = problem()
    gamma = np.full(TIME, 0.9)
    o = mesa(q, k, v, gamma, np.ones(TIME), {"solver": "sequential"})
    rls = RecursiveLeastSquares(n_features=DIM, n_outputs=OUTPUTS, penalty=PENALTY, forgetting=0.9)
    last = rls.predict(rls.update(rls.init_state(), k, v), q[-1])
    assert np.abs(o[-1] - last).max() > 0.05 * np.abs(last).max()


CHUNK, UNITS, CHUNKS, PER_CHUNK = 0.05, 8, 20, 5


def recording() -> SpikeRecording:
    rng = np.random.default_rng(0)
    times = np.sort(rng.uniform(0, CHUNKS * CHUNK, 400))
    at = (np.arange(CHUNKS)[:, None] * CHUNK + np.arange(PER_CHUNK) * (CHUNK / PER_CHUNK)).ravel() + 1e-3
    return SpikeRecording(
        times,
        rng.integers(0, UNITS, times.size),
        unit_ids=tuple(f"unit-{i}" for i in range(UNITS)),
        behavior=rng.normal(size=(at.size, 2)),
        behavior_times=at,
        session="monday",
        trials=np.array([[0.0, CHUNKS * CHUNK]]),
    )


def decoder(*, seed: int = 0) -> POSSM:
    """An untrained decoder with a Mesa backbone, float64."""
    model = POSSM.from_preset("possm-ss", backbone="mesa", chunk_s=CHUNK, seed=seed).double()
    model.add_session(recording())
    with torch.no_grad():
        model.unit_embedding.normal_(generator=torch.Generator().manual_seed(1))
    return model.eval()


def test_a_mesa_backbone_streams_as_it_decodes_offline() -> None:
    model, rec = decoder(), recording()
    stream = StreamingDecoder(model, session="monday", output_offsets=1e-3 + np.arange(PER_CHUNK) * (CHUNK / PER_CHUNK))
    assert stream.backend == "torch"
    online = []
    for b in range(CHUNKS):
        inside = (rec.times >= b * CHUNK) & (rec.times < (b + 1) * CHUNK)
        stream.push(rec.times[inside], rec.units[inside])
        made = stream.poll((b + 1) * CHUNK)
        assert made is not None
        online.append(made.values)
    offline = model.predict(rec)
    assert np.abs(offline).std() > 1e-3, "outputs that vary"
    np.testing.assert_allclose(np.concatenate(online), offline, rtol=0, atol=1e-9 * np.abs(offline).max())


def test_a_mesa_backbone_remembers() -> None:
    """Its outputs depend on spikes of earlier chunks: the law above is not met by forgetting everything."""
    model, rec = decoder(), recording()
    whole = model.predict(rec)
    late = rec.times >= CHUNK
    silent = SpikeRecording(
        rec.times[late],
        rec.units[late],
        unit_ids=rec.unit_ids,
        behavior=rec.behavior,
        behavior_times=rec.behavior_times,
        session="monday",
        trials=rec.trials,
    )
    changed = np.abs(model.predict(silent) - whole)[-PER_CHUNK:]
    assert changed.max() > 1e-8 * np.abs(whole).max()
