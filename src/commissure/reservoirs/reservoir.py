"""The reservoir: a fixed recurrent network driven by a signal, as a sequence mixer.

    x_t = Q((1 - leak) x_{t-1} + leak f(x_{t-1} W + u_t W_in + bias) + sigma n_t),      x_0 = 0

| here | meaning |
|---|---|
| W | `weights[i, j]` from source i to target j, times `spectral_radius` over its own, then rounded to `weight_bits` |
| W_in | `input_gain` times the input weights (inputs, nodes) |
| leak | 1: the authors' dynamics; one number or one a node |
| sigma n_t | `state_noise` times standard normal numbers, a function of (seed, stream, position, node) |
| Q | the nearest of 2^`state_bits` levels from -1 to 1, left out by default |

bioRxiv 2025.06.20.660760, Methods; leak: Jaeger et al., Neural Networks 20 (2007).  Negative `u` gives negative states
to the last bit where f is tanh or linear, without bias, noise and Q.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.sparse import csr_array
from torch import Tensor, nn

from commissure.core.errors import DegenerateError, InputError
from commissure.core.rng import generator
from commissure.native.reservoir import (
    ACTIVATIONS,
    Activation,
    ReservoirMatrix,
    reservoir_matrix,
    reservoir_scan,
)
from commissure.nn.padding import check_sequence, check_step, zero_padding
from commissure.reservoirs.connectome import Connectome, as_csr
from commissure.reservoirs.inputs import numbers, real, whole
from commissure.reservoirs.spectral import spectral_radius as network_radius
from commissure.reservoirs.state_noise import place_noise

__all__ = ["Reservoir", "ReservoirState"]


class ReservoirState(NamedTuple):
    """The nodes' activity, how many elements each row has seen, and which noise it gets."""

    activity: Float[Tensor, "batch nodes"]
    position: Int[Tensor, " batch"]
    stream: Int[Tensor, " batch"]


class Reservoir(nn.Module):
    """A network as a mixer from (batch, time, inputs) to the states of all nodes, (batch, time, nodes).

    `network`: a Connectome, or a square matrix (array or scipy.sparse) with `network[i, j]` from source i to target j.
    `inputs`: how many, with weights uniform in [-1, 1] drawn by `seed`; or the weights (inputs, nodes).
    `spectral_radius`: of W after scaling; None leaves the weights as they are.
    `leak`: in (0, 1].  `weight_bits` (2 to 16): W rounded to 2^bits - 1 levels symmetric about 0, after scaling.
    Everything is a buffer: `.to` casts and moves it, gradients flow to the inputs and to the initial state.
    Raises InputError for bad values and DegenerateError for a network without cycles that is given a radius.

    >>> reservoir = Reservoir([[0.0, 2.0], [2.0, 0.0]], inputs=[[1.0, 0.0]], spectral_radius=0.5, activation="linear")
    >>> reservoir(torch.tensor([[[1.0], [0.0]]]))[0].tolist()
    [[[1.0, 0.0], [0.0, 0.5]]]
    """

    starts: Tensor
    sources: Tensor
    values: Tensor
    input_weights: Tensor
    leak: Tensor
    bias: Tensor

    def __init__(
        self,
        network: Connectome | csr_array | Float[np.ndarray, "nodes nodes"] | list[list[float]],
        *,
        inputs: int | Float[np.ndarray, "inputs nodes"] | list[list[float]] = 1,
        spectral_radius: float | None = 0.9,
        input_gain: float = 1.0,
        leak: float | Float[np.ndarray, " nodes"] = 1.0,
        activation: Activation = "tanh",
        bias: float | Float[np.ndarray, " nodes"] | None = None,
        state_noise: float = 0.0,
        weight_bits: int | None = None,
        state_bits: int | None = None,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        weights = as_csr("network", network)
        nodes = weights.shape[0]
        if activation not in ACTIVATIONS:
            raise InputError("activation", activation, f"one of {', '.join(ACTIVATIONS)}")
        check_bits("weight_bits", weight_bits, 2)
        check_bits("state_bits", state_bits, 1)
        rates = per_node("leak", leak, nodes)
        if not ((rates > 0) & (rates <= 1)).all():
            raise InputError("leak", leak, "0 < leak <= 1")
        weights = scaled(weights, spectral_radius)
        if weight_bits is not None:
            weights = rounded(weights, weight_bits)
        self.activation, self.state_bits, self.seed = activation, state_bits, whole("seed", seed, 0)
        self.state_noise = real("state_noise", state_noise, 0)
        matrix = reservoir_matrix(weights, dtype=dtype)
        arrays = {
            **matrix._asdict(),
            "input_weights": real("input_gain", input_gain) * input_matrix(inputs, nodes, seed),
            "leak": rates,
            "bias": per_node("bias", 0.0 if bias is None else bias, nodes),
        }
        for name, array in arrays.items():
            tensor = array if isinstance(array, Tensor) else torch.from_numpy(array).to(dtype)
            self.register_buffer(name, tensor)

    @property
    def n_nodes(self) -> int:
        """Nodes of the network, the size of a state."""
        return len(self.leak)

    @property
    def n_inputs(self) -> int:
        """Channels of the signal."""
        return len(self.input_weights)

    @property
    def matrix(self) -> ReservoirMatrix:
        """W after scaling and rounding, as `native.reservoir_scan` takes it."""
        return ReservoirMatrix(self.starts, self.sources, self.values)

    def init_state(
        self,
        batch_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        streams: Int[Tensor, " batch"] | None = None,
    ) -> ReservoirState:
        """Rest.  Rows of equal `streams` get equal noise, and by default all do (common random numbers)."""
        device, dtype = device or self.values.device, dtype or self.values.dtype
        activity = torch.zeros(batch_size, self.n_nodes, device=device, dtype=dtype)
        position = torch.zeros(batch_size, device=device, dtype=torch.int64)
        if streams is None:
            return ReservoirState(activity, position, position)
        if streams.shape != position.shape or streams.dtype != torch.int64:
            raise InputError("streams", (tuple(streams.shape), str(streams.dtype)), f"int64, shape ({batch_size},)")
        return ReservoirState(activity, position, streams.to(position.device))

    def step(
        self, x_t: Float[Tensor, "batch inputs"], state: ReservoirState
    ) -> tuple[Float[Tensor, "batch nodes"], ReservoirState]:
        """One element in, the states after it out."""
        check_step(x_t, self.n_inputs, state)
        states, after = self(x_t[:, None], state)
        return states[:, 0], after

    def forward(
        self,
        x: Float[Tensor, "batch time inputs"],
        state: ReservoirState | None = None,
        *,
        lengths: Int[Tensor, " batch"] | None = None,
    ) -> tuple[Float[Tensor, "batch time nodes"], ReservoirState]:
        """A whole stretch; memory grows with time, so cut long signals and hand the state on."""
        check_sequence(x, self.n_inputs, state, lengths)
        state = self.init_state(len(x), device=x.device) if state is None else state
        noise = None
        if self.state_noise:
            normal = place_noise(self.seed, state.stream, state.position, time=x.shape[1], nodes=self.n_nodes)
            noise = (self.state_noise * normal).to(x.dtype)
        states = reservoir_scan(
            self.matrix,
            zero_padding(x, lengths),
            state.activity,
            self.input_weights,
            leak=self.leak,
            bias=self.bias,
            activation=self.activation,
            noise=noise,
            state_bits=self.state_bits,
        ).states
        steps = torch.full_like(state.position, x.shape[1]) if lengths is None else lengths
        last = torch.cat([state.activity[:, None], states], 1)[torch.arange(len(x), device=x.device), steps]
        return states, ReservoirState(last, state.position + steps, state.stream)


def scaled(weights: csr_array, spectral_radius: float | None) -> csr_array:
    """The matrix with this spectral radius; with None, as it is."""
    return weights if spectral_radius is None else weights * gains(weights, [spectral_radius])[0]


def gains(weights: csr_array, radii: Sequence[float | None]) -> list[float]:
    """The factors that give the matrix these spectral radii, from one computation of its own; 1 for None."""
    wanted = [None if radius is None else real("spectral_radius", radius, 0) for radius in radii]
    if all(radius is None for radius in wanted):
        return [1.0] * len(wanted)
    own = network_radius(weights).value
    if own == 0:
        raise DegenerateError(
            "the network has no cycle, so its spectral radius is 0 and no factor can change it; "
            "pass spectral_radius=None"
        )
    return [1.0 if radius is None else radius / own for radius in wanted]


def check_bits(name: str, bits: int | None, least: int) -> None:
    """InputError for a precision that there is none of."""
    if bits is not None and whole(name, bits, least) > 16:
        raise InputError(name, bits, f"{least} to 16, or None for none")


def rounded(weights: csr_array, bits: int) -> csr_array:
    """Weights at the nearest of 2^bits - 1 equally spaced levels from -max |w| to max |w|."""
    if not weights.nnz:
        return weights
    step = np.abs(weights.data).max() / (2 ** (bits - 1) - 1)
    result = weights.copy()
    result.data = np.round(result.data / step) * step
    result.eliminate_zeros()
    return result


def input_matrix(inputs: object, nodes: int, seed: int) -> Float[np.ndarray, "inputs nodes"]:
    """The input weights given, or drawn."""
    if isinstance(inputs, (int, np.integer)) and not isinstance(inputs, bool):
        return generator(seed, "input weights").uniform(-1, 1, (whole("inputs", inputs, 1), nodes))
    array = numbers("inputs", inputs).copy()
    if array.ndim != 2 or array.shape[1] != nodes or len(array) < 1:
        raise InputError("inputs", array.shape, f"a number of inputs, or weights of shape (inputs, {nodes})")
    return array


def per_node(name: str, value: object, nodes: int) -> Float[np.ndarray, " nodes"]:
    """One number a node."""
    array = numbers(name, value)
    if array.shape not in ((), (nodes,)) or isinstance(value, bool):
        raise InputError(name, array.shape or value, f"one number, or one a node: shape ({nodes},)")
    return np.broadcast_to(array, (nodes,)).copy()
