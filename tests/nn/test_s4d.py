"""S4D: impulse response, FFT convolution = chunks = recurrence, stability, published sizes and initialization."""

from __future__ import annotations

import math

import pytest
import torch

from commissure.core.errors import InputError
from commissure.core.mixer import scan
from commissure.nn import S4D


def make(dim=5, **sizes):
    torch.manual_seed(0)
    return S4D(dim, **sizes).double()


def continuous(layer):
    """A, C and dt as complex numbers, from the parameters."""
    a = torch.complex(-layer.log_decay.exp(), layer.frequency)
    return a, torch.view_as_complex(layer.readout), layer.log_dt.exp()[:, None]


def response(layer, length):
    """2 Re(C Bbar Abar^n) by complex powers; zero-order hold with B = 1."""
    a, c, dt = continuous(layer)
    a_bar = torch.exp(dt * a)
    b_bar = (a_bar - 1) / a
    powers = torch.stack([a_bar**n for n in range(length)], -1)
    return 2 * ((c * b_bar)[..., None] * powers).sum(1).real


def without_output(layer):
    """The layer up to the linear system: its output network replaced by the identity."""
    layer._output = lambda v: v
    return layer


@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_impulse_response(chunk):
    layer = without_output(make(d_state=12, chunk=chunk))
    impulse = torch.zeros(1, 40, 5, dtype=torch.float64)
    impulse[:, 0] = 1
    expected = response(layer, 40)
    torch.testing.assert_close(layer.kernel(40), expected, rtol=0, atol=1e-12)
    expected[:, 0] += layer.skip
    for y, _ in (layer(impulse), scan(layer, impulse)):
        torch.testing.assert_close(y[0].T, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("time", [1, 63, 64, 65, 200])
def test_fft_convolution_equals_chunks_equals_recurrence(time):
    layer = without_output(make())
    x = torch.randn(2, time, 5, dtype=torch.float64)
    spectrum = torch.fft.rfft(response(layer, time), n=2 * time) * torch.fft.rfft(x.transpose(1, 2), n=2 * time)
    expected = torch.fft.irfft(spectrum, n=2 * time)[..., :time].transpose(1, 2) + layer.skip * x
    torch.testing.assert_close(layer(x)[0], expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(scan(layer, x)[0], expected, rtol=0, atol=1e-10)


def test_the_state_is_the_exact_integral_of_the_continuous_system():
    """Zero-order hold: two half steps of half the dt give the state of one step under a constant input."""
    layer = without_output(make())
    u = torch.randn(1, 5, dtype=torch.float64)
    a, _, dt = continuous(layer)
    _, state = layer.step(u, layer.init_state(1))
    hidden = torch.complex(state.modes[0, :, 0], state.modes[0, :, 1]) * (torch.exp(dt * a) - 1) / a
    half = torch.exp(dt / 2 * a)
    b_half = (half - 1) / a * u[0, :, None]
    torch.testing.assert_close(hidden, half * b_half + b_half, rtol=0, atol=1e-13)


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_every_parameter_value_is_stable(scale):
    layer = make(dim=50)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(scale * torch.randn_like(p))
    system = layer.discretize()
    assert bool((system.log_magnitude < 0).all())
    assert bool((torch.hypot(system.decay_real, system.decay_imag) < 1).all())


def test_small_steps_lose_no_digits_in_float32():
    """Bbar = (Abar - 1) / A would cancel where |dt A| is small: 1e-4 of it would be lost, 1e-5 bounds what is."""
    layer = make(dim=100)
    double = layer.discretize()
    single = layer.float().discretize()
    for name in ("readout_real", "readout_imag"):
        error = (getattr(single, name).double() - getattr(double, name)).abs()
        scale = torch.hypot(double.readout_real, double.readout_imag)
        assert float((error / scale).detach().max()) < 1e-5


def test_initialization_is_s4d_lin():
    layer = make(dim=2000)
    a, c, dt = (t.detach() for t in continuous(layer))
    torch.testing.assert_close(a.real, torch.full_like(a.real, -0.5), rtol=0, atol=1e-7)
    torch.testing.assert_close(a.imag[0], math.pi * torch.arange(32, dtype=torch.float64), rtol=1e-6, atol=0)
    assert float(dt.min()) >= 1e-3 * (1 - 1e-6)
    assert float(dt.max()) <= 1e-1 * (1 + 1e-6)
    quarters = torch.quantile(layer.log_dt.detach(), torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    expected = math.log(1e-3) + math.log(100) * torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    torch.testing.assert_close(quarters, expected, rtol=0, atol=0.2)
    assert float(c.abs().square().mean()) == pytest.approx(1, abs=0.02)


def test_the_output_network_is_gelu_linear_glu():
    layer = make()
    v = torch.randn(3, 5, dtype=torch.float64)
    gelu = v * 0.5 * (1 + torch.erf(v / math.sqrt(2)))
    value, gate = (gelu @ layer.out.weight.T + layer.out.bias).chunk(2, 1)
    torch.testing.assert_close(layer._output(v), value * torch.sigmoid(gate))


def test_parameter_counts_of_the_published_size():
    layer = S4D(256)
    output = sum(p.numel() for p in layer.out.parameters())
    assert output == 131_584
    assert sum(p.numel() for p in layer.parameters()) - output == 33_280


@pytest.mark.parametrize("sizes", [{"d_state": 3}, {"d_state": 0}, {"chunk": 0}])
def test_impossible_sizes_are_refused(sizes):
    with pytest.raises(InputError):
        S4D(4, **sizes)
