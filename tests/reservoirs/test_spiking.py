"""Spiking reservoirs: a dense reference, the f-I curve in closed form, Dale's law, events, rates, and bad input."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array

from commissure.core.errors import InputError
from commissure.core.rng import generator
from commissure.reservoirs.connectome import Connectome
from commissure.reservoirs.spiking import LIFReservoir, dale_weights


def network(nodes: int, seed: int = 0, density: float = 0.4) -> np.ndarray:
    rng = generator(seed, "network")
    weights = rng.normal(size=(nodes, nodes)) * (rng.random((nodes, nodes)) < density)
    np.fill_diagonal(weights, 0)
    return weights


def reference(model: LIFReservoir, weights: np.ndarray, u: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One row, neuron by neuron from the equations: spikes, traces, final potentials; W is dense."""
    n, dt = len(weights), model.time_step
    bias, decay = model.bias.tolist(), model.synaptic_decay.tolist()
    v, last = [model.reset_potential] * n, [-math.inf] * n
    h, i, trace_h, trace = ([0.0] * n for _ in range(4))
    spikes, traces = np.zeros((len(u), n)), np.zeros((len(u), n))
    pause = round(model.refractory_period / dt)
    for t, u_t in enumerate(u):
        fired = []
        for j in range(n):
            if t - last[j] > pause:
                rest = (
                    bias[j]
                    + i[j]
                    + sum(float(a) * float(b) for a, b in zip(u_t, model.input_weights[:, j], strict=True))
                )
                v[j] = rest + (v[j] - rest) * math.exp(-dt / model.membrane_time)
                if v[j] > model.peak_potential:
                    v[j], last[j] = model.reset_potential, t
                    fired.append(j)
        spikes[t, fired] = 1
        left = math.exp(-dt / model.synaptic_rise) if model.synaptic_rise else 0.0
        for j in range(n):
            kept = math.exp(-dt / decay[j])
            arriving = sum(weights[k, j] for k in fired)
            h[j] = kept * h[j] + (1 - kept) / dt * arriving
            i[j] = left * i[j] + (1 - left) * h[j]
            trace_h[j] = kept * trace_h[j] + (1 - kept) / dt * (j in fired)
            trace[j] = left * trace[j] + (1 - left) * trace_h[j]
        traces[t] = trace
    return spikes, traces, np.array(v)


@pytest.mark.parametrize("rise", [2e-3, 0.0])
@pytest.mark.parametrize("pause", [2e-3, 0.0])
def test_a_network_is_its_dense_reference(rise, pause):
    weights = network(12)
    u = generator(1, "input").normal(size=(400, 3))
    options = {"inputs": 3, "weight_gain": 0.4, "input_gain": 40.0, "time_step": 5e-4, "synaptic_rise": rise}
    options |= {"refractory_period": pause, "dtype": torch.float64}
    model = LIFReservoir(weights, **options)
    spikes, traces, potentials = reference(model, 0.4 * weights, u)
    assert 50 < spikes.sum() < 2000
    y, state = model(torch.from_numpy(u)[None])
    np.testing.assert_allclose(y[0].numpy(), traces, rtol=1e-11, atol=1e-10)
    np.testing.assert_allclose(state.potential[0].numpy(), potentials, rtol=1e-11)
    fired, _ = LIFReservoir(weights, output="spikes", **options)(torch.from_numpy(u)[None])
    assert (fired[0].numpy() == spikes).all()


@pytest.mark.parametrize("current", [1.0, 5.0, 20.0, 200.0])
@pytest.mark.parametrize("pause", [0.0, 2e-3])
def test_the_f_i_curve_is_the_closed_form(current, pause):
    """From reset to peak in tau ln((i + peak - reset) / i), and the pause: to the very step it ends in."""
    neuron = LIFReservoir(
        [[0.0]], inputs=[[1.0]], refractory_period=pause, output="spikes", dtype=torch.float64, time_step=1e-4
    )
    spikes, _ = neuron(torch.full((1, 3000, 1), current, dtype=torch.float64))
    times = spikes[0, :, 0].nonzero()[:, 0]
    rise = 10e-3 * math.log((current + 25) / current)
    assert len(times) >= 3
    assert (times.diff() == math.ceil(rise / 1e-4) + round(pause / 1e-4)).all()
    assert times[0] + 1 == math.ceil(rise / 1e-4)


def test_a_neuron_without_input_never_fires():
    neuron = LIFReservoir([[0.0]], inputs=[[1.0]], output="spikes", dtype=torch.float64)
    spikes, state = neuron(torch.zeros(1, 4000, 1, dtype=torch.float64))
    assert not spikes.any()
    assert -40.001 < float(state.potential) <= -40


@pytest.mark.parametrize("rise", [2e-3, 0.0])
def test_the_mean_trace_is_the_rate_and_the_mean_current_the_weight_times_it(rise):
    model = LIFReservoir(
        [[0.0, 0.3], [0.0, 0.0]], inputs=[[1.0, 0.0]], synaptic_rise=rise, bias=[-40.0, -100.0], dtype=torch.float64,
        synaptic_decay=0.02, time_step=1e-3,
    )  # fmt: skip
    u = torch.full((1, 4000, 1), 10.0, dtype=torch.float64)
    traces, state = model(u)
    model.output = "spikes"
    spikes, _ = model(u)
    late = slice(2000, None)
    rate = float(spikes[0, late, 0].mean()) / 1e-3
    assert float(traces[0, late, 0].mean()) == pytest.approx(rate, rel=0.02)
    currents = []
    for _ in range(int(1e3)):
        _, state = model.step(u[:, 0], state)
        currents.append(float(state.current[0, 1]))
    assert np.mean(currents) == pytest.approx(0.3 * rate, rel=0.02)


def test_events_are_the_dense_product_to_the_last_bit():
    """A row of spikes times W, summed in the order of the sources as the events are."""
    weights = network(40, density=0.3)
    model = LIFReservoir(weights, dtype=torch.float64)
    fired = torch.from_numpy(generator(0, "spikes").random((5, 40)) < 0.4)
    fired[2] = False
    expected = np.zeros((5, 40))
    for source in range(40):
        expected += fired[:, source, None].numpy() * weights[source]
    assert (model._arriving(fired).numpy() == expected).all()


@pytest.mark.parametrize(("fraction", "inhibitory"), [(0.0, 0), (0.2, 6), (1.0, 30)])
def test_dales_law_gives_every_neuron_one_sign(fraction, inhibitory):
    weights = network(30)
    model = LIFReservoir(weights, inhibitory_fraction=fraction, dtype=torch.float64, seed=4)
    made = csr_array((model.values.numpy(), model.targets.numpy(), model.starts.numpy()), shape=(30, 30)).toarray()
    assert (np.abs(made) == np.abs(weights)).all()
    signs = np.sign(made)
    assert (np.abs(signs.sum(1)) == (weights != 0).sum(1)).all()
    assert (signs.sum(1) < 0).sum() == inhibitory
    other = dale_weights(csr_array(weights), fraction, seed=5).toarray()
    assert (np.sign(other) == signs).all() == (fraction in (0.0, 1.0))


def test_a_connectome_and_its_matrix_make_the_same_reservoir():
    weights = network(10)
    u = torch.from_numpy(30 * generator(2, "input").normal(size=(2, 200, 1)))
    options = {"dtype": torch.float64, "time_step": 1e-3, "seed": 1}
    y, _ = LIFReservoir(weights, **options)(u)
    again, _ = LIFReservoir(Connectome.from_array(weights, orientation="source_target"), **options)(u)
    other, _ = LIFReservoir(weights, **{**options, "seed": 2})(u)
    assert (y == again).all()
    assert y.any()
    assert (y != other).any()


def test_decay_times_are_drawn_from_their_range():
    times = LIFReservoir(network(50), synaptic_decay=(0.02, 0.05), dtype=torch.float64).synaptic_decay
    assert 0.02 <= float(times.min()) < 0.025
    assert 0.045 < float(times.max()) <= 0.05


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"time_step": 0.0}, "time_step"),
        ({"membrane_time": -1.0}, "membrane_time"),
        ({"refractory_period": -1e-3}, "refractory_period"),
        ({"synaptic_rise": float("nan")}, "synaptic_rise"),
        ({"synaptic_decay": 0.0}, "synaptic_decay"),
        ({"synaptic_decay": (0.05, 0.02)}, "synaptic_decay"),
        ({"synaptic_decay": [0.02, 0.03]}, "synaptic_decay"),
        ({"reset_potential": -30.0}, "reset_potential"),
        ({"inhibitory_fraction": 1.5}, "inhibitory_fraction"),
        ({"output": "rate"}, "output"),
        ({"bias": [0.0]}, "bias"),
        ({"weight_gain": float("inf")}, "weight_gain"),
        ({"dtype": torch.float16}, "dtype"),
        ({"dtype": "float64"}, "dtype"),
        ({"seed": True, "inputs": np.ones((1, 4)), "synaptic_decay": 0.02}, "seed"),
        ({"time_step": True}, "time_step"),
        ({"membrane_time": "1"}, "membrane_time"),
        ({"bias": "0"}, "bias"),
        ({"bias": True}, "bias"),
        ({"synaptic_decay": "x"}, "synaptic_decay"),
        ({"inputs": "x"}, "inputs"),
        ({"output": ["trace"]}, "output"),
    ],
)
def test_bad_input_is_refused(options, argument):
    with pytest.raises(InputError, match=argument):
        LIFReservoir(network(4), **options)


def test_signals_and_matrices_of_other_kinds_are_refused():
    model = LIFReservoir(network(4))
    for x in (torch.zeros(1, 3, 1, dtype=torch.float64), np.zeros((1, 3, 1), np.float32), None):
        with pytest.raises(InputError, match=r"^x ="):
            model(x)
        with pytest.raises(InputError, match=r"^x_t ="):
            model.step(x if x is None else x[:, 0], model.init_state(1))
    with pytest.raises(InputError, match="batch_size"):
        model.init_state(1.5)
    with pytest.raises(InputError, match="sparse"):
        dale_weights(network(4), 0.5, seed=0)
