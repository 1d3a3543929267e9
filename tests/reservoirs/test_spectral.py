"""Spectral radii: every method against all eigenvalues, certificates, and matrices that break shortcuts."""

from __future__ import annotations

import re

import numpy as np
import pytest
from scipy.linalg import eigh
from scipy.sparse import csr_array

from commissure.core.errors import DegenerateError, InputError
from commissure.reservoirs import spectral
from commissure.reservoirs.block_model import HierarchicalSBM
from commissure.reservoirs.connectome import Connectome
from commissure.reservoirs.spectral import spectral_radius, spectral_radius_reference


def random_matrix(kind: str, n: int, seed: int, density: float = 0.1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    w = (rng.random((n, n)) < density) * (rng.normal(size=(n, n)) if "signed" in kind else rng.random((n, n)))
    return w + w.T if "symmetric" in kind else w


def check(matrix: np.ndarray, methods: set[str], rel: float = 1e-10) -> None:
    found, value = spectral_radius(matrix), spectral_radius_reference(matrix).value
    assert found.value == pytest.approx(value, rel=rel)
    assert found.lower <= value * (1 + 1e-11)
    assert value <= found.upper * (1 + 1e-11)
    assert found.method in methods


@pytest.mark.parametrize(
    ("kind", "n", "methods"),
    [
        ("positive", 60, {"power"}),
        ("positive", 250, {"power"}),
        ("symmetric", 250, {"power"}),
        ("signed", 60, {"dense"}),
        ("signed", 250, {"arnoldi"}),
        ("signed symmetric", 250, {"lanczos"}),
        ("signed symmetric", 60, {"dense"}),
    ],
)
@pytest.mark.parametrize("seed", range(4))
def test_equals_all_eigenvalues(kind: str, n: int, methods: set[str], seed: int) -> None:
    check(random_matrix(kind, n, seed), methods)


@pytest.mark.parametrize("low", [0.0, -1.0])
def test_directed_networks_are_scaled_to_one(low: float) -> None:
    """The published code took a symmetric solver, which reads one triangle: far off where weights are signed."""
    network = HierarchicalSBM.from_preset("milisav2025").sample(0)
    weights = network.to_array() * (1 if low == 0 else np.sign(random_matrix("signed", 400, 1, 1.0)))
    scaled = weights / spectral_radius(weights).value
    assert np.abs(np.linalg.eigvals(scaled)).max() == pytest.approx(1, abs=1e-10)
    by_one_triangle = weights / np.abs(eigh(weights, eigvals_only=True)).max()
    assert abs(np.abs(np.linalg.eigvals(by_one_triangle)).max() - 1) > (0.02 if low == 0 else 0.3)


def test_certificate_closes_on_a_network() -> None:
    found = spectral_radius(HierarchicalSBM.from_preset("milisav2025").sample(1))
    assert found.method == "power"
    assert found.lower <= found.value <= found.upper
    assert found.upper - found.lower <= 1e-12 * found.value


@pytest.mark.parametrize("n", [2, 3, 20, 90, 700])
def test_rings_are_periodic(n: int) -> None:
    """All eigenvalues have one modulus: plain power iteration would turn for ever."""
    weights = np.random.default_rng(n).uniform(0.5, 2.0, n)
    ring = np.roll(np.diag(weights), 1, axis=1)
    found = spectral_radius(ring)
    assert found.value == pytest.approx(np.exp(np.log(weights).mean()), rel=1e-10)
    assert found.lower <= found.value <= found.upper
    assert found.method == ("power" if n < 10 else "dense")


def test_bipartite_network() -> None:
    block = random_matrix("positive", 40, 0, 0.5)
    check(np.block([[np.zeros((40, 40)), block], [block.T, np.zeros((40, 40))]]), {"power"})


def test_parts_that_are_not_strongly_connected() -> None:
    """Reducible: Collatz's quotients would be 0 at nodes without inputs; the radius is that of the strongest part."""
    weak, strong = random_matrix("positive", 30, 0, 0.5), 3 * random_matrix("signed", 150, 1, 0.5)
    reducible = np.block([[weak, np.ones((30, 150))], [np.zeros((150, 30)), strong]])
    order = np.random.default_rng(0).permutation(180)
    for matrix, methods in ((reducible, {"arnoldi"}), (np.kron(np.diag([1.0, 2.0]), weak), {"power"})):
        check(matrix[order[order < len(matrix)]][:, order[order < len(matrix)]], methods)
    with_loop = np.triu(np.ones((5, 5)), 1)
    with_loop[3, 3] = 0.25
    assert spectral_radius(with_loop).value == pytest.approx(0.25, rel=1e-12)


def test_no_cycle_means_exactly_zero() -> None:
    """All eigenvalues of a permuted triangle are 0; a solver for them says 1e-3 or so here."""
    order = np.random.default_rng(1).permutation(200)
    nilpotent = np.triu(random_matrix("signed", 200, 0, 0.5), 1)[order][:, order]
    assert spectral_radius(nilpotent) == (0, 0, 0, "structure")
    assert spectral_radius(np.zeros((3, 3))).value == 0
    cancelled = csr_array((np.zeros(2), ([0, 1], [1, 0])), shape=(2, 2))  # explicit zeros are no edges
    assert spectral_radius(cancelled).method == "structure"
    assert cancelled.nnz == 2
    dense = csr_array((np.ones(9), np.tile([0, 1, 2], 3), [0, 3, 6, 9]), shape=(3, 3))
    dense.data[0] = 0
    assert spectral_radius(dense).method == "power"


def test_falls_back_to_all_eigenvalues(monkeypatch: pytest.MonkeyPatch) -> None:
    def give_up(*arguments, **options):
        raise spectral.ArpackError(-1)

    for name in ("eigs", "eigsh"):
        monkeypatch.setattr(spectral, name, give_up)
    for kind in ("signed", "signed symmetric"):
        check(random_matrix(kind, 150, 0), {"dense"})


def test_same_bits_twice_and_input_left_alone() -> None:
    weights = random_matrix("signed", 250, 3)
    before = weights.copy()
    assert spectral_radius(weights) == spectral_radius(csr_array(weights))
    assert np.array_equal(weights, before)
    network = Connectome.from_array(weights - np.diag(np.diag(weights)), orientation="source_target")
    assert spectral_radius(network) == spectral_radius(network.to_array())


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (np.ones((2, 3)), "weights = (2, 3)"),
        (np.array([[0, 1.0], [np.nan, 0]]), "weights[1, 0] = nan"),
        (np.array([[0, np.inf], [0, 0]]), "weights[0, 1] = inf"),
        (np.zeros((0, 0)), "weights = (0, 0)"),
    ],
)
def test_bad_input(matrix: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        spectral_radius(matrix)


@pytest.mark.parametrize("weights", [[[0, 1j], [1j, 0]], [["1", "2"], ["2", "1"]], 3.0])
def test_only_matrices_of_real_numbers_have_a_radius(weights: object) -> None:
    with pytest.raises(InputError, match=r"^weights"):
        spectral_radius(weights)


def nilpotent(kind: str, n: int) -> np.ndarray:
    """Strongly connected matrices without any eigenvalue but 0."""
    rng = np.random.default_rng(n)
    if kind == "signs":
        return np.outer(np.ones(n), np.where(np.arange(n) < n // 2, 1.0, -1.0))
    if kind == "squares to zero":
        block = rng.integers(-2, 3, (n // 2, n // 2)).astype(float)
        return np.block([[block, block], [-block, -block]])
    chains = np.diag((np.arange(1, n) % int(kind) != 0).astype(float), 1)  # Jordan blocks of size `kind`
    rotation = np.linalg.qr(rng.normal(size=(n, n)))[0]
    return rotation @ chains @ rotation.T


@pytest.mark.parametrize("kind", ["signs", "squares to zero", "2", "5", "20"])
@pytest.mark.parametrize("n", [20, 150])
def test_cycles_that_cancel_leave_no_radius(kind: str, n: int) -> None:
    """All eigenvalues by a solver are 1e-8 to 0.2 here: noise, by which no network may be scaled."""
    matrix = nilpotent(kind, n)
    for scale in (1.0, 1e200, 1e-200):
        with pytest.raises(DegenerateError, match="lost in rounding"):
            spectral_radius(scale * matrix)
    stronger = np.block([[matrix, np.ones((n, 3))], [np.zeros((3, n)), 9 * np.ones((3, 3))]])
    assert spectral_radius(stronger).value == pytest.approx(27, rel=1e-12)


@pytest.mark.parametrize("n", [30, 120])
def test_a_radius_however_small_is_kept_if_the_weights_decide_it(n: int) -> None:
    """Far from normal, leading eigenvalues repeated, 1e-12 on the only way back: none is taken for a nilpotent one."""
    rng = np.random.default_rng(0)
    ring = np.roll(np.diag(np.r_[-1e-12, np.ones(n - 1)]), 1, axis=1)
    assert spectral_radius(ring).value == pytest.approx(1e-12 ** (1 / n), rel=1e-4)
    orthogonal = np.linalg.qr(rng.normal(size=(n // 3, n // 3)))[0]
    assert spectral_radius(np.kron(np.roll(np.eye(3), 1, axis=1), orthogonal)).value == pytest.approx(1, rel=1e-10)
    forward = np.triu(rng.normal(size=(n, n)), 1) + 1e-8 * np.tril(rng.normal(size=(n, n)), -1)
    scaling = 10.0 ** rng.uniform(-6, 6, n)
    tiny = 1e-9 * random_matrix("signed", n, 0, 0.5)
    tiny[0, 1] = 1.0
    for matrix in (forward, tiny, random_matrix("signed", n, 2) * scaling[:, None] / scaling):
        check(matrix, {"dense", "arnoldi"}, rel=1e-7)


@pytest.mark.parametrize("kind", ["positive", "signed", "signed symmetric"])
@pytest.mark.parametrize("n", [60, 150])
@pytest.mark.parametrize("exponent", [-1000, -700, 700, 1000])
def test_any_power_of_two_passes_through(kind: str, n: int, exponent: int) -> None:
    """Weights of 1e-300 and 1e300: the same bits, and no bound that is 0, infinite or not a number."""
    matrix = random_matrix(kind, n, 0)
    plain, found = spectral_radius(matrix), spectral_radius(np.ldexp(matrix, exponent))
    assert found == (*np.ldexp(plain[:3], exponent).tolist(), plain.method)
    assert np.isfinite(found.upper)


def test_a_radius_beyond_float64_is_refused() -> None:
    assert spectral_radius(np.full((3, 3), 5e307)).value == pytest.approx(1.5e308)
    with pytest.raises(InputError, match=r"weights = 1\.7e\+308: expected weights whose spectral radius is below"):
        spectral_radius(np.full((3, 3), 1.7e308))
