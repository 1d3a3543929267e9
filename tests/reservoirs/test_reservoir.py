"""Reservoir: against a loop in numpy and reservoirpy, its symmetries, its noise, its rounding, what it refuses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.sparse import csr_array
from scipy.stats import kstest

from commissure.core.errors import DegenerateError, InputError
from commissure.core.rng import spawn
from commissure.reservoirs.connectome import Connectome
from commissure.reservoirs.reservoir import Reservoir, rounded
from commissure.reservoirs.state_noise import place_noise

NODES = 60


def weights(nodes: int = NODES, seed: int = 0, density: float = 0.2) -> np.ndarray:
    """Directed and signed."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(nodes, nodes)) * (rng.random((nodes, nodes)) < density)


def signal(batch: int, time: int, inputs: int = 2, seed: int = 1) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).uniform(-1, 1, (batch, time, inputs)))


def made(network: Any = None, **options: Any) -> Reservoir:
    return Reservoir(weights() if network is None else network, **{"inputs": 2, "dtype": torch.float64, **options})


def noise(streams: list[int], *, time: int = 4, nodes: int = 5, seed: int = 0, position: int = 0) -> torch.Tensor:
    stream = torch.tensor(streams)
    return place_noise(seed, stream, torch.full_like(stream, position), time=time, nodes=nodes)


def test_states_are_those_of_a_loop() -> None:
    w, w_in, x = weights(), np.random.default_rng(2).normal(size=(2, NODES)), signal(3, 25)
    leak, bias = np.linspace(0.1, 1, NODES), np.linspace(-0.5, 0.5, NODES)
    reservoir = made(w, inputs=w_in, spectral_radius=1.2, input_gain=0.7, leak=leak, bias=bias)
    scaled = w * (1.2 / np.abs(np.linalg.eigvals(w)).max())
    for row, states in zip(x.numpy(), reservoir(x)[0].numpy(), strict=True):
        activity = np.zeros(NODES)
        for u, state in zip(row, states, strict=True):
            driven = np.tanh(scaled.T @ activity + w_in.T @ (0.7 * u) + bias)
            activity = (1 - leak) * activity + leak * driven
            np.testing.assert_allclose(state, activity, rtol=0, atol=1e-12)


def test_states_are_those_of_reservoirpy() -> None:
    nodes = pytest.importorskip("reservoirpy.nodes", reason="a rival of the benchmarks (group bench)")
    w, w_in, x = weights(), np.random.default_rng(2).normal(size=(2, NODES)), signal(1, 200)
    w *= 0.9 / np.abs(np.linalg.eigvals(w)).max()
    peer = nodes.Reservoir(W=w.T.copy(), Win=w_in.T.copy(), bias=np.zeros(NODES), lr=0.6)
    found = made(w, inputs=w_in, spectral_radius=None, leak=0.6)(x)[0][0]
    np.testing.assert_allclose(found, peer.run(x[0].numpy()), rtol=0, atol=1e-12)


@pytest.mark.parametrize("network", ["array", "list", "sparse", "connectome"])
def test_networks_of_every_kind(network: str) -> None:
    w = weights()
    np.fill_diagonal(w, 0.0)
    kinds = {
        "array": lambda: w,
        "list": lambda: w.tolist(),
        "sparse": lambda: csr_array(w),
        "connectome": lambda: Connectome.from_array(w, orientation="source_target"),
    }
    kept, x = w.copy(), signal(2, 9)
    states = made(kinds[network]())(x)[0]
    assert torch.equal(states, made(w)(x)[0])
    assert np.array_equal(w, kept)


def test_the_callers_matrix_is_left_alone() -> None:
    matrix = csr_array(weights())
    matrix.data[3] = 0.0
    kept = matrix.copy()
    made(matrix, weight_bits=3)
    rounded(matrix, 3)
    assert matrix.nnz == kept.nnz
    assert np.array_equal(matrix.data, kept.data)


def test_the_radius_of_a_directed_signed_network_is_the_one_asked_for() -> None:
    reservoir = made(spectral_radius=1.0)
    assert dense(reservoir).shape == (NODES, NODES)
    assert np.abs(np.linalg.eigvals(dense(reservoir))).max() == pytest.approx(1.0, abs=1e-10)
    assert np.abs(np.linalg.eigvals(dense(made()))).max() == pytest.approx(0.9, abs=1e-10)


def dense(reservoir: Reservoir) -> np.ndarray:
    """W, source by target."""
    target = np.repeat(np.arange(reservoir.n_nodes), np.diff(reservoir.starts.numpy()))
    matrix = np.zeros((reservoir.n_nodes, reservoir.n_nodes))
    np.add.at(matrix, (reservoir.sources.numpy(), target), reservoir.values.double().numpy())
    return matrix


def test_permuting_the_nodes_permutes_the_states() -> None:
    order, w = np.random.default_rng(3).permutation(NODES), weights()
    w_in, x = np.random.default_rng(2).normal(size=(2, NODES)), signal(2, 30)
    plain = made(w, inputs=w_in)(x)[0]
    permuted = made(w[np.ix_(order, order)], inputs=w_in[:, order])(x)[0]
    torch.testing.assert_close(permuted, plain[..., order], rtol=0, atol=1e-12)


@pytest.mark.parametrize("activation", ["tanh", "linear"])
def test_odd_symmetry_is_exact(activation: Any) -> None:
    for dtype in (torch.float32, torch.float64):
        reservoir, x = made(activation=activation, leak=0.4, dtype=dtype), signal(3, 40).to(dtype)
        assert torch.equal(reservoir(-x)[0], -reservoir(x)[0])


@pytest.mark.parametrize("options", [{}, {"state_noise": 0.1}, {"state_bits": 6, "leak": 0.5}])
def test_chunks_of_a_long_signal_have_the_bits_of_the_whole(options: dict[str, Any]) -> None:
    reservoir, x = made(**options), signal(3, 90)
    whole, last = reservoir(x)
    state, pieces = None, []
    for piece in x.split([1, 30, 59], 1):
        y, state = reservoir(piece, state)
        pieces.append(y)
    assert torch.equal(torch.cat(pieces, 1), whole)
    assert all(torch.equal(a, b) for a, b in zip(state, last, strict=True))


def test_noise_is_standard_normal() -> None:
    sample = noise([0, 1, 2, 3], time=100, nodes=500).flatten()
    assert kstest(sample.numpy(), "norm").pvalue > 1e-3
    n = len(sample)
    assert abs(float(sample.mean())) < 4 / n**0.5
    assert abs(float(sample.var()) - 1) < 4 * (2 / n) ** 0.5
    assert abs(float((sample**4).mean()) - 3) < 4 * (96 / n) ** 0.5


def test_noise_of_neighboring_places_is_independent() -> None:
    sample = noise([0, 1], time=300, nodes=301)
    assert kstest(sample[0, :, 0].numpy(), "norm").pvalue > 1e-3
    pairs = {
        "node": (sample[:, :, 1:], sample[:, :, :-1]),
        "time": (sample[:, 1:], sample[:, :-1]),
        "stream": (sample[1:], sample[:1]),
        "diagonal": (sample[:, 1:, :-1], sample[:, :-1, 1:]),
        "seed": (sample, noise([0, 1], time=300, nodes=301, seed=1)),
    }
    for name, (a, b) in pairs.items():
        for power in (1, 2):
            r = float(torch.corrcoef(torch.stack([(a**power).flatten(), (b**power).flatten()]))[0, 1])
            assert abs(r) < 4.5 / a.numel() ** 0.5, (name, power, r)


def test_noise_depends_on_its_place_alone() -> None:
    whole = noise([5, 6, 7], time=6, nodes=4)
    assert torch.equal(noise([6], time=2, nodes=4, position=3), whole[1:2, 3:5])
    assert torch.equal(noise([7, 5], time=6, nodes=4), whole[[2, 0]])
    assert len(whole.unique()) == whole.numel()


def test_noise_is_box_muller_of_splitmix64() -> None:
    """The formula in Python's own integers, place by place."""
    mask = 2**64 - 1

    def mixed(word: int) -> int:
        word = (word * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) & mask
        word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & mask
        word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & mask
        return word ^ (word >> 31)

    found = noise([3, 4], time=3, nodes=2, seed=7, position=5)
    for row, time, node in np.ndindex(2, 3, 2):
        word = mixed(mixed(mixed(mixed(spawn(7, "state noise")) + 3 + row) + 5 + time) + node)
        a, b = (word >> 32) + 0.5, word & 0xFFFFFFFF
        expected = math.sqrt(-2 * math.log(a / 2**32)) * math.cos(2 * math.pi * b / 2**32)
        assert float(found[row, time, node]) == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_rows_of_equal_streams_share_their_noise() -> None:
    reservoir, x = made(state_noise=0.2), signal(1, 10).repeat(2, 1, 1)
    shared = reservoir(x)[0]
    assert torch.equal(shared[0], shared[1])
    own, state = reservoir(x, reservoir.init_state(2, streams=torch.tensor([0, 1])))
    assert torch.equal(own[0], shared[0])
    assert (own[0] - own[1]).abs().mean() > 0.05
    assert state.position.tolist() == [10, 10]
    other = made(state_noise=0.2, inputs=reservoir.input_weights.numpy(), seed=1)
    assert (other(x)[0][0] - shared[0]).abs().mean() > 0.05


def test_noise_has_the_strength_asked_for() -> None:
    quiet = made(np.zeros((NODES, NODES)), spectral_radius=None)
    loud = made(np.zeros((NODES, NODES)), spectral_radius=None, state_noise=0.25)
    x = signal(1, 400)
    assert float((loud(x)[0] - quiet(x)[0]).std()) == pytest.approx(0.25, rel=0.03)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rounded_weights_are_levels_after_scaling(bits: int) -> None:
    exact, rounded = dense(made(spectral_radius=0.8)), dense(made(spectral_radius=0.8, weight_bits=bits))
    step = np.abs(exact).max() / (2 ** (bits - 1) - 1)
    np.testing.assert_allclose(rounded / step, np.round(rounded / step), rtol=0, atol=1e-9)
    assert np.abs(rounded - exact).max() <= step / 2 + 1e-12
    assert len(np.unique(np.round(rounded / step))) <= 2**bits - 1


def test_rounded_states_are_levels_from_minus_one_to_one() -> None:
    states = made(state_bits=3)(10 * signal(2, 50))[0]
    levels = torch.linspace(-1, 1, 8, dtype=torch.float64)
    assert (states.unsqueeze(-1) - levels).abs().amin(-1).max() < 1e-15
    assert set(states[0].unique().round(decimals=9).tolist()) == set(levels.round(decimals=9).tolist())
    assert made(state_bits=1)(signal(2, 50))[0].unique().tolist() == [-1.0, 1.0]


def test_a_seed_draws_the_input_weights_and_nothing_else() -> None:
    one, two = made(seed=1), made(seed=2)
    assert torch.equal(one.input_weights, made(seed=1).input_weights)
    assert not torch.equal(one.input_weights, two.input_weights)
    assert torch.equal(one.values, two.values)
    assert -1 <= float(one.input_weights.min()) < -0.5 < 0.5 < float(one.input_weights.max()) <= 1


def test_saving_and_loading_keeps_every_bit(tmp_path: Path) -> None:
    x, saved = signal(2, 12), made(seed=1, leak=0.3, bias=0.1)
    save_file(saved.state_dict(), tmp_path / "reservoir.safetensors")
    loaded = made(seed=2)
    loaded.load_state_dict(load_file(tmp_path / "reservoir.safetensors"))
    assert torch.equal(loaded(x)[0], saved(x)[0])


def test_gradients_reach_inputs_and_initial_state() -> None:
    reservoir = made(weights(6), inputs=2, leak=0.5)
    x, state = signal(2, 4).requires_grad_(), reservoir.init_state(2)
    start = torch.linspace(-0.5, 0.5, 12, dtype=torch.float64).view(2, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, s: reservoir(x, state._replace(activity=s))[0], (x, start))


@pytest.mark.parametrize(
    ("match", "options"),
    [
        (r"network\[2, 3\] = nan", {"network": np.where(np.arange(16).reshape(4, 4) == 11, np.nan, 1.0)}),
        (r"network\[2, 3\] = inf", {"network": np.where(np.arange(16).reshape(4, 4) == 11, np.inf, 1.0)}),
        ("network = ", {"network": np.ones((3, 4))}),
        ("network = ", {"network": np.ones((0, 0))}),
        ("network = ", {"network": "connectome.npy"}),
        ("inputs = ", {"inputs": 0}),
        ("inputs = ", {"inputs": np.ones((2, NODES + 1))}),
        (r"inputs\[1, 0\] = nan", {"inputs": np.vstack([np.zeros(NODES), np.full(NODES, np.nan)])}),
        ("spectral_radius = ", {"spectral_radius": -0.1}),
        ("spectral_radius = ", {"spectral_radius": np.nan}),
        ("leak = ", {"leak": 0.0}),
        ("leak = ", {"leak": 1.5}),
        ("leak = ", {"leak": np.ones(3)}),
        ("bias = ", {"bias": np.inf}),
        ("activation = ", {"activation": "gelu"}),
        ("state_noise = ", {"state_noise": -1.0}),
        ("input_gain = ", {"input_gain": np.inf}),
        ("weight_bits = ", {"weight_bits": 1}),
        ("state_bits = ", {"state_bits": 17}),
        ("seed = ", {"seed": -1}),
        ("seed = ", {"seed": 1.5, "inputs": np.ones((2, NODES))}),
        ("inputs = ", {"inputs": True}),
        ("inputs = ", {"inputs": np.ones((0, NODES))}),
        ("dtype = ", {"dtype": torch.float16}),
    ],
)
def test_bad_input_is_named(match: str, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"^{match}"):
        made(**options)


def test_a_network_without_cycles_has_no_radius_to_scale() -> None:
    line = np.diag(np.ones(9), 1)
    with pytest.raises(DegenerateError, match="spectral_radius=None"):
        made(line)
    assert made(line, spectral_radius=None)(signal(1, 3))[0].shape == (1, 3, 10)


def test_bad_signals_and_states_are_named() -> None:
    reservoir = made()
    with pytest.raises(InputError, match=r"^x = "):
        reservoir(signal(2, 5, inputs=3))
    with pytest.raises(InputError, match=r"^x = "):
        reservoir(signal(2, 5).float())
    with pytest.raises(InputError, match=r"^state = "):
        reservoir(signal(2, 5), reservoir.init_state(3))
    with pytest.raises(InputError, match=r"^lengths"):
        reservoir(signal(2, 5), lengths=torch.tensor([2, 6]))
    with pytest.raises(InputError, match=r"^streams = "):
        reservoir.init_state(2, streams=torch.tensor([1]))
