"""The scan of reservoirs: the kernel against its reference, and the bits that nothing may change."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array
from torch import Tensor

from commissure.core.errors import InputError
from commissure.native import backend, kernels
from commissure.native import reservoir as door
from commissure.native.reservoir import (
    ACTIVATIONS,
    ReservoirMatrix,
    reservoir_matrix,
    reservoir_scan,
    reservoir_scan_reference,
)

compiled = pytest.mark.skipif(backend() != "c++", reason="built without a C++ compiler")
CLONES = [""] if backend() != "c++" else kernels().clones()
FULL = ("scale", "leak", "bias", "noise", "tangents")


def network(nodes: int, density: float, seed: int = 0) -> csr_array:
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=(nodes, nodes)) * (rng.random((nodes, nodes)) < density)
    return csr_array(weights / max(1.0, np.sqrt(nodes * density)))


def problem(
    nodes: int, batch: int, time: int, inputs: int = 2, *, own: bool = False, dtype: torch.dtype = torch.float64
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Operands after the matrix, and every optional tensor."""
    generator = torch.Generator().manual_seed(nodes + 100 * batch + time)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    weights = normal(batch, inputs, nodes) if own else normal(inputs, nodes)
    operands = [normal(batch, time, inputs), normal(batch, nodes), weights]
    optional = {"scale": 1 + 0.1 * normal(batch), "leak": torch.linspace(0.2, 1, nodes, dtype=dtype)}
    return operands, {
        **optional,
        "bias": normal(nodes),
        "noise": normal(batch, time, nodes),
        "tangents": normal(batch, 3, nodes),
    }


def assert_same(matrix: ReservoirMatrix, operands: list[Tensor], options: dict[str, Any], clone: str = "") -> None:
    """The kernel's clone and the reference to 1e-12."""
    expected = reservoir_scan_reference(matrix, *operands, **options)
    if clone:
        optional = [options.get(name) for name in FULL]
        rounds = options.get("activation", "tanh"), options.get("state_bits") or 0
        states, *rest = door._scan(list(matrix), *operands, optional, *rounds, clone=clone)
    else:
        states, *rest = reservoir_scan(matrix, *operands, **options)
    torch.testing.assert_close(states, expected.states, rtol=1e-12, atol=1e-12)
    if expected.tangents is not None:
        torch.testing.assert_close(rest[0], expected.tangents, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("clone", CLONES)
@pytest.mark.parametrize("batch", [1, 2, 4, 5, 11, 17, 33])
def test_the_kernel_equals_its_reference(batch: int, clone: str) -> None:
    matrix = reservoir_matrix(network(37, 0.2), dtype=torch.float64)
    operands, optional = problem(37, batch, 6)
    assert_same(matrix, operands, {}, clone)
    assert_same(matrix, operands, {k: v for k, v in optional.items() if k != "tangents"}, clone)
    assert_same(matrix, operands, optional, clone)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("batch", [1, 6])
def test_every_activation_and_its_slope(activation: str, batch: int) -> None:
    matrix = reservoir_matrix(network(20, 0.3), dtype=torch.float64)
    operands, optional = problem(20, batch, 5)
    assert_same(matrix, operands, {"activation": activation})
    assert_same(matrix, operands, {"activation": activation, **optional})


@compiled
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("batch", [1, 6])
def test_thresholds_belong_to_the_same_side_and_nan_stays(activation: str, batch: int) -> None:
    bias = torch.tensor([-0.5, 0.0, 0.5, float("nan")], dtype=torch.float64)
    matrix = reservoir_matrix(csr_array(np.eye(3)), dtype=torch.float64)
    rest = torch.zeros(batch, 3, dtype=torch.float64)
    operands = [torch.zeros(batch, 1, 1, dtype=torch.float64), rest, torch.zeros(1, 3, dtype=torch.float64)]
    assert_same(matrix, operands, {"activation": activation, "bias": bias[:3]})
    assert_same(matrix, operands, {"activation": activation, "bias": bias[:3], "tangents": rest[:, None] + 1})
    states = reservoir_scan(matrix, *operands, activation=activation, bias=bias[1:]).states
    assert states.isnan().tolist() == [[[False, False, True]]] * batch


@pytest.mark.parametrize("name", [name for name in ACTIVATIONS if name != "step"])
def test_slopes_are_the_derivatives(name: str) -> None:
    function, slope = ACTIVATIONS[name]
    p = torch.linspace(-3, 3, 13, dtype=torch.float64) + 0.01
    p.requires_grad_()
    (gradient,) = torch.autograd.grad(function(p).sum(), p)
    torch.testing.assert_close(slope(p, function(p)), gradient, rtol=1e-12, atol=1e-12)


def test_tangents_are_the_jacobians_product() -> None:
    matrix = reservoir_matrix(network(12, 0.4), dtype=torch.float64)
    (x, state, weights), optional = problem(12, 1, 7)
    options = {key: optional[key] for key in ("scale", "leak", "bias")}

    def last(start: Tensor) -> Tensor:
        return reservoir_scan_reference(matrix, x, start[None], weights, **options).states[0, -1]

    jacobian = torch.autograd.functional.jacobian(last, state[0])
    found = reservoir_scan(matrix, x, state, weights, **options, tangents=optional["tangents"]).tangents
    torch.testing.assert_close(found[0], optional["tangents"][0] @ jacobian.T, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("bits", [1, 3, 8])
@pytest.mark.parametrize("batch", [1, 5])
def test_rounded_states_are_levels(bits: int, batch: int) -> None:
    matrix = reservoir_matrix(network(30, 0.2), dtype=torch.float64)
    operands, optional = problem(30, batch, 6)
    options = {"state_bits": bits, "noise": optional["noise"], "activation": "linear"}
    assert_same(matrix, operands, options)
    levels = torch.linspace(-1, 1, 2**bits, dtype=torch.float64)
    states = reservoir_scan(matrix, *operands, **options).states
    assert (states.unsqueeze(-1) - levels).abs().amin(-1).max() < 1e-15
    assert len(states.unique()) > 1


@pytest.mark.parametrize("batch", [1, 9])
def test_every_row_may_have_its_own_input_weights(batch: int) -> None:
    matrix = reservoir_matrix(network(25, 0.2), dtype=torch.float64)
    operands, optional = problem(25, batch, 4, own=True)
    assert_same(matrix, operands, {})
    assert_same(matrix, operands, optional)


@compiled
@pytest.mark.parametrize("is_plain", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bits_do_not_depend_on_company_or_threads(dtype: torch.dtype, is_plain: bool) -> None:
    matrix = reservoir_matrix(network(150, 0.3), dtype=dtype)
    operands, optional = problem(150, 37, 40, own=True, dtype=dtype)
    for name in ("tangents", "noise") if is_plain else ("tangents",):
        optional.pop(name)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(reservoir_scan(matrix, *operands, **optional).states)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    for rows in (slice(3, 4), slice(20, 26), slice(36, 37)):
        own = [operand[rows] for operand in operands]
        chosen = {key: value[rows] if key in ("scale", "noise") else value for key, value in optional.items()}
        assert torch.equal(reservoir_scan(matrix, *own, **chosen).states, found[0][rows])


@compiled
@pytest.mark.parametrize("is_plain", [False, True])
def test_tangents_leave_the_states_alone(is_plain: bool) -> None:
    matrix = reservoir_matrix(network(40, 0.2), dtype=torch.float64)
    for batch in (1, 6):
        operands, optional = problem(40, batch, 9)
        tangents = optional.pop("tangents")
        if is_plain:
            optional.pop("noise")
        alone = reservoir_scan(matrix, *operands, **optional).states
        assert torch.equal(reservoir_scan(matrix, *operands, **optional, tangents=tangents).states, alone)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cutting_leaves_the_bits(dtype: torch.dtype) -> None:
    matrix = reservoir_matrix(network(50, 0.2), dtype=dtype)
    for batch in (1, 5):
        (x, state, weights), _ = problem(50, batch, 12, dtype=dtype)
        whole = reservoir_scan(matrix, x, state, weights).states
        first = reservoir_scan(matrix, x[:, :5], state, weights).states
        second = reservoir_scan(matrix, x[:, 5:], first[:, -1], weights).states
        assert torch.equal(torch.cat([first, second], 1), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_odd_symmetry_is_exact(dtype: torch.dtype) -> None:
    matrix = reservoir_matrix(network(60, 0.2), dtype=dtype)
    for batch in (1, 7):
        (x, state, weights), _ = problem(60, batch, 20, dtype=dtype)
        states = reservoir_scan(matrix, x, state, weights).states
        assert torch.equal(reservoir_scan(matrix, -x, -state, weights).states, -states)


def test_float32_is_close_to_float64() -> None:
    (x, state, weights), optional = problem(80, 6, 30, dtype=torch.float32)
    single = reservoir_matrix(network(80, 0.2), dtype=torch.float32)
    double = reservoir_matrix(network(80, 0.2), dtype=torch.float64)
    found = reservoir_scan(single, x, state, weights, leak=optional["leak"]).states
    wide = [tensor.double() for tensor in (x, state, weights)]
    exact = reservoir_scan(double, *wide, leak=optional["leak"].double()).states
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=2e-5)


def test_many_nodes_need_wide_sources() -> None:
    nodes = 2**16 + 1
    ring = csr_array((np.full(nodes, 0.5), (np.arange(nodes), (np.arange(nodes) + 1) % nodes)), shape=(nodes, nodes))
    matrix = reservoir_matrix(ring, dtype=torch.float64)
    assert matrix.sources.dtype == torch.int32
    state = torch.arange(nodes, dtype=torch.float64)[None].repeat(2, 1)
    empty, weights = torch.zeros(2, 1, 1, dtype=torch.float64), torch.zeros(1, nodes, dtype=torch.float64)
    for rows in (1, 2):
        states = reservoir_scan(matrix, empty[:rows], state[:rows], weights, activation="linear").states
        assert torch.equal(states[:, 0], 0.5 * state[:rows].roll(1, 1))


def test_empty_stretches_batches_and_matrices() -> None:
    matrix = reservoir_matrix(csr_array((3, 3)), dtype=torch.float64)
    (x, state, weights), optional = problem(3, 2, 4)
    states = reservoir_scan(matrix, x, state, weights).states
    torch.testing.assert_close(states, torch.tanh(x @ weights), rtol=1e-14, atol=1e-14)
    nothing = reservoir_scan(matrix, x[:, :0], state, weights, tangents=optional["tangents"])
    assert nothing.states.shape == (2, 0, 3)
    assert torch.equal(nothing.tangents, optional["tangents"])
    assert reservoir_scan(matrix, x[:0], state[:0], weights).states.shape == (0, 4, 3)


def test_the_matrix_is_by_target() -> None:
    weights = network(23, 0.3)
    matrix = reservoir_matrix(weights, dtype=torch.float64)
    target = np.repeat(np.arange(23), np.diff(matrix.starts.numpy()))
    dense = np.zeros((23, 23))
    np.add.at(dense, (matrix.sources.numpy(), target), matrix.values.numpy())
    assert np.array_equal(dense, weights.toarray())
    assert not (matrix.starts % 4).any()


def test_gradients_flow_to_every_operand() -> None:
    matrix = reservoir_matrix(network(5, 0.5), dtype=torch.float64)
    (x, state, weights), optional = problem(5, 2, 3)
    rest = [optional[name] for name in FULL]
    operands = [tensor.clone().requires_grad_() for tensor in (x, state, weights, *rest)]

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(reservoir_scan(matrix, *tensors[:3], **dict(zip(FULL, tensors[3:], strict=True))))

    assert torch.autograd.gradcheck(run, operands)


def test_arguments_are_left_alone_and_need_not_be_contiguous() -> None:
    matrix = reservoir_matrix(network(10, 0.5), dtype=torch.float64)
    operands, optional = problem(10, 3, 4)
    kept = [tensor.clone() for tensor in (*operands, *optional.values())]
    plain = reservoir_scan(matrix, *operands, **optional)
    assert all(torch.equal(a, b) for a, b in zip((*operands, *optional.values()), kept, strict=True))
    turned = [tensor.mT.contiguous().mT for tensor in operands]
    optional = {name: x.mT.contiguous().mT if x.ndim > 1 else x for name, x in optional.items()}
    again = reservoir_scan(matrix, *turned, **optional)
    assert torch.equal(again.states, plain.states)
    assert torch.equal(again.tangents, plain.tangents)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("x", lambda a: {**a, "x": a["x"][0]}),
        ("x", lambda a: {**a, "x": a["x"].float()}),
        ("state", lambda a: {**a, "state": a["state"][:, :-1]}),
        ("input_weights", lambda a: {**a, "input_weights": a["input_weights"][:, :-1]}),
        ("scale", lambda a: {**a, "scale": torch.ones(3, dtype=torch.float64)}),
        ("leak", lambda a: {**a, "leak": torch.ones(3, dtype=torch.float64)}),
        ("bias", lambda a: {**a, "bias": torch.ones(4)}),
        ("noise", lambda a: {**a, "noise": torch.ones(2, 4, dtype=torch.float64)}),
        ("tangents", lambda a: {**a, "tangents": torch.ones(2, 4, dtype=torch.float64)}),
        ("activation", lambda a: {**a, "activation": "gelu"}),
        ("state_bits", lambda a: {**a, "state_bits": 17}),
    ],
)
def test_what_does_not_fit_is_refused(name: str, change: Any) -> None:
    (x, state, input_weights), _ = problem(4, 2, 3)
    arguments = {"x": x, "state": state, "input_weights": input_weights}
    with pytest.raises(InputError, match=f"^{name} ="):
        reservoir_scan(reservoir_matrix(network(4, 0.5), dtype=torch.float64), **change(arguments))


def test_bad_matrices_are_refused() -> None:
    with pytest.raises(InputError, match="square"):
        reservoir_matrix(csr_array((2, 3)), dtype=torch.float64)
    with pytest.raises(InputError, match="dtype"):
        reservoir_matrix(csr_array((3, 3)), dtype=torch.float16)
