"""A reservoir of leaky integrate-and-fire neurons, as a sequence mixer; one element of a sequence is one time step.

    tau_m dv/dt = bias + i - v + u W_in      v > v_peak: a spike, v = v_reset for the refractory period
    tau_d dh/dt = -h + S W,  tau_r di/dt = -i + h      S: a unit impulse at each spike of the step before

    here                                        meaning
    membrane_time, synaptic_rise, _decay        tau_m, tau_r, tau_d (seconds), tau_d one a neuron
    bias, peak_potential, reset_potential       mV; bias = v_peak: the least input at all makes a neuron fire
    weights                                     mV s: a source that fires at 1 Hz gives a mean current of w mV
    trace                                       each neuron's own spikes, filtered as a synapse does: its rate in Hz

Between spikes the equations are solved exactly for inputs held over a step (the authors take Euler steps), and the
filters keep the area of every spike, so that rates do not depend on the step.  Spikes are events: a step adds up the
rows of W of the neurons that fired, in the order of the sources.  Spikes have no derivative: gradients flow through
the potentials between them, the rest is constant.

Constants: the spiking network of bioRxiv 2025.06.20.660760 (its repository; double-exponential synapses and rows by
event as in Nicola & Clopath 2017, 10.1038/s41467-017-01827-3).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.sparse import csr_array, issparse
from torch import Tensor, nn

from commissure.core.errors import InputError
from commissure.core.mixer import where
from commissure.core.rng import generator
from commissure.nn.padding import check_sequence, check_step, zero_padding
from commissure.reservoirs.connectome import Connectome, as_csr
from commissure.reservoirs.inputs import named, real, whole
from commissure.reservoirs.reservoir import input_matrix, per_node

__all__ = ["LIFReservoir", "LIFState", "dale_weights"]


class LIFState(NamedTuple):
    """Potentials (mV), steps until a neuron may fire again, and two stages of its synapses and of its own trace."""

    potential: Float[Tensor, "batch nodes"]
    refractory: Int[Tensor, "batch nodes"]
    drive: Float[Tensor, "batch nodes"]
    current: Float[Tensor, "batch nodes"]
    trace_drive: Float[Tensor, "batch nodes"]
    trace: Float[Tensor, "batch nodes"]


class LIFReservoir(nn.Module):
    """A network of spiking neurons as a mixer from (batch, time, inputs) to (batch, time, nodes).

    `network`: a Connectome, or a square matrix with `network[i, j]` from source i to target j, times `weight_gain`
    (mV s).  `inputs`: how many, with weights uniform in [-1, 1] drawn by `seed`, or the weights (inputs, nodes), times
    `input_gain` (mV).  `inhibitory_fraction`: Dale's law by `dale_weights`; None leaves the signs as they are.
    `synaptic_decay`: seconds, one number, one a neuron, or a range (shortest, longest) to draw from by `seed`.
    `synaptic_rise=0`: single exponentials.  `refractory_period` is rounded to whole steps.  `output`: "trace" (Hz) or
    "spikes" (0 or 1).  All times in seconds, all > 0 but the rise and the refractory period, which are >= 0.

    >>> neuron = LIFReservoir([[0.0]], inputs=[[1.0]], output="spikes")
    >>> int(neuron(torch.full((1, 20_000, 1), 10.0))[0].sum())  # 1 s: 2 ms + 10 ms ln(35 / 10) from spike to spike
    68
    """

    starts: Tensor
    targets: Tensor
    values: Tensor
    input_weights: Tensor
    bias: Tensor
    synaptic_decay: Tensor

    def __init__(
        self,
        network: Connectome | csr_array | Float[np.ndarray, "nodes nodes"] | list[list[float]],
        *,
        inputs: int | Float[np.ndarray, "inputs nodes"] | list[list[float]] = 1,
        weight_gain: float = 1.0,
        input_gain: float = 1.0,
        inhibitory_fraction: float | None = None,
        time_step: float = 5e-5,
        membrane_time: float = 10e-3,
        refractory_period: float = 2e-3,
        synaptic_rise: float = 2e-3,
        synaptic_decay: float | tuple[float, float] | Float[np.ndarray, " nodes"] = (20e-3, 50e-3),
        reset_potential: float = -65.0,
        peak_potential: float = -40.0,
        bias: float | Float[np.ndarray, " nodes"] | None = None,
        output: Literal["trace", "spikes"] = "trace",
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        weights = as_csr("network", network) * real("weight_gain", weight_gain)
        nodes = weights.shape[0]
        if inhibitory_fraction is not None:
            weights = dale_weights(weights, inhibitory_fraction, seed=seed)
        named("output", output, ("trace", "spikes"))
        whole("seed", seed, 0)
        if not isinstance(dtype, torch.dtype) or dtype not in (torch.float32, torch.float64):
            raise InputError("dtype", str(dtype), "torch.float32 or torch.float64")
        if not real("reset_potential", reset_potential) < real("peak_potential", peak_potential):
            raise InputError("reset_potential", reset_potential, f"below peak_potential = {peak_potential}")
        for name, value in (("time_step", time_step), ("membrane_time", membrane_time)):
            if not real(name, value) > 0:
                raise InputError(name, value, "a number > 0 (seconds)")
        self.time_step, self.membrane_time, self.output = float(time_step), float(membrane_time), output
        self.refractory_period = real("refractory_period", refractory_period, 0)
        self.synaptic_rise = real("synaptic_rise", synaptic_rise, 0)
        self.reset_potential, self.peak_potential = float(reset_potential), float(peak_potential)
        arrays = {
            "starts": weights.indptr.astype(np.int64),
            "targets": weights.indices.astype(np.int64),
            "values": weights.data,
            "input_weights": real("input_gain", input_gain) * input_matrix(inputs, nodes, seed),
            "bias": per_node("bias", peak_potential if bias is None else bias, nodes),
            "synaptic_decay": _decay_times(synaptic_decay, nodes, seed),
        }
        for name, array in arrays.items():
            self.register_buffer(name, torch.from_numpy(array).to(dtype if array.dtype == np.float64 else torch.int64))

    @property
    def n_nodes(self) -> int:
        """Neurons."""
        return len(self.bias)

    @property
    def n_inputs(self) -> int:
        """Channels of the signal."""
        return len(self.input_weights)

    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> LIFState:
        """Every neuron at its reset potential, no currents."""
        device, dtype = device or self.values.device, dtype or self.values.dtype
        zeros = torch.zeros(whole("batch_size", batch_size, 0), self.n_nodes, device=device, dtype=dtype)
        refractory = torch.zeros_like(zeros, dtype=torch.int64)
        return LIFState(torch.full_like(zeros, self.reset_potential), refractory, zeros, zeros, zeros, zeros)

    def step(
        self, x_t: Float[Tensor, "batch inputs"], state: LIFState
    ) -> tuple[Float[Tensor, "batch nodes"], LIFState]:
        """One time step of input in, traces or spikes out."""
        self._check_signal("x_t", x_t)
        check_step(x_t, self.n_inputs, state)
        return self._advance(x_t @ self.input_weights, state, self._decays())

    def forward(
        self,
        x: Float[Tensor, "batch time inputs"],
        state: LIFState | None = None,
        *,
        lengths: Int[Tensor, " batch"] | None = None,
    ) -> tuple[Float[Tensor, "batch time nodes"], LIFState]:
        """A whole stretch, step by step."""
        self._check_signal("x", x)
        check_sequence(x, self.n_inputs, state, lengths)
        state = self.init_state(len(x), device=x.device, dtype=x.dtype) if state is None else state
        external, decays = zero_padding(x, lengths) @ self.input_weights, self._decays()
        outputs = []
        for t, current in enumerate(external.unbind(1)):
            y, after = self._advance(current, state, decays)
            state = after if lengths is None else where(t < lengths, after, state)
            outputs.append(y)
        return torch.stack(outputs, 1) if outputs else external, state

    def _check_signal(self, name: str, x: object) -> None:
        if not isinstance(x, Tensor) or x.dtype != self.values.dtype:
            found = str(x.dtype) if isinstance(x, Tensor) else type(x).__name__
            raise InputError(name, found, f"a tensor of {self.values.dtype}", "cast it, or the module by .to(dtype)")

    def _decays(self) -> tuple[float, float, Tensor]:
        """What is left after one step: of the potentials, of the synapses' second stage and of their first."""
        rise = float(np.exp(-self.time_step / self.synaptic_rise)) if self.synaptic_rise else 0.0
        return (
            float(np.exp(-self.time_step / self.membrane_time)),
            rise,
            torch.exp(-self.time_step / self.synaptic_decay),
        )

    def _advance(
        self, external: Float[Tensor, "batch nodes"], state: LIFState, decays: tuple[float, float, Tensor]
    ) -> tuple[Float[Tensor, "batch nodes"], LIFState]:
        membrane, rise, decay = decays
        rest = self.bias + state.current + external
        is_free = state.refractory == 0
        potential = torch.where(is_free, rest + (state.potential - rest) * membrane, state.potential)
        fired = potential > self.peak_potential
        potential = torch.where(fired, self.reset_potential, potential)
        pause = round(self.refractory_period / self.time_step)
        refractory = torch.where(fired, pause, (state.refractory - 1).clamp(min=0))
        spikes = fired.to(potential.dtype)
        impulse = (1 - decay) / self.time_step
        drive = decay * state.drive + impulse * self._arriving(fired)
        current = rise * state.current + (1 - rise) * drive
        trace_drive = decay * state.trace_drive + impulse * spikes
        trace = rise * state.trace + (1 - rise) * trace_drive
        after = LIFState(potential, refractory, drive, current, trace_drive, trace)
        return trace if self.output == "trace" else spikes, after

    def _arriving(self, fired: Bool[Tensor, "batch nodes"]) -> Float[Tensor, "batch nodes"]:
        """The rows of W of the neurons that fired, summed."""
        total = torch.zeros(fired.numel(), device=fired.device, dtype=self.values.dtype)
        row, source = fired.nonzero(as_tuple=True)
        if len(row):
            first, counts = self.starts[source], self.starts[source + 1] - self.starts[source]
            ends = counts.cumsum(0)
            event = torch.repeat_interleave(counts)
            place = first[event] + torch.arange(len(event), device=event.device) - (ends - counts)[event]
            total.index_add_(0, row[event] * self.n_nodes + self.targets[place], self.values[place])
        return total.view_as(fired)


def dale_weights(weights: csr_array, inhibitory_fraction: float, *, seed: int) -> csr_array:
    """Dale's law: all weights of a neuron negative or none, by their magnitudes; inhibitory ones drawn by `seed`.

    >>> dale_weights(csr_array([[0.0, -1.0], [2.0, 0.0]]), 1.0, seed=0).toarray().tolist()
    [[0.0, -1.0], [-2.0, 0.0]]
    """
    if not issparse(weights) or weights.ndim != 2 or weights.shape[0] != weights.shape[1]:
        raise InputError("weights", type(weights).__name__, "a square scipy.sparse matrix", "pass csr_array(weights)")
    weights = csr_array(weights)
    nodes = weights.shape[0]
    chosen = round(real("inhibitory_fraction", inhibitory_fraction, 0, 1) * nodes)
    signs = np.ones(nodes)
    signs[generator(seed, "inhibitory neurons").permutation(nodes)[:chosen]] = -1
    signed = abs(weights)
    signed.data *= np.repeat(signs, np.diff(signed.indptr))
    return signed


def _decay_times(value: object, nodes: int, seed: int) -> Float[np.ndarray, " nodes"]:
    if isinstance(value, tuple):
        if len(value) != 2 or not 0 < real("synaptic_decay[0]", value[0]) <= real("synaptic_decay[1]", value[1]):
            raise InputError("synaptic_decay", value, "(shortest, longest) seconds, 0 < shortest <= longest")
        return generator(seed, "synaptic decay").uniform(*value, nodes)
    times = per_node("synaptic_decay", value, nodes)
    if not (times > 0).all():
        raise InputError("synaptic_decay", value, "numbers > 0 (seconds)")
    return times
