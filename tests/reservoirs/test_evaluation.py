"""Evaluation: one batched simulation against literal loops; memory, noise, precision, bad input."""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from commissure.core.errors import DegenerateError, InputError
from commissure.core.rng import generator
from commissure.reservoirs import simulation
from commissure.reservoirs.block_model import HierarchicalSBM
from commissure.reservoirs.block_tree import BlockTree
from commissure.reservoirs.connectome import Connectome
from commissure.reservoirs.dynamics import lyapunov
from commissure.reservoirs.evaluation import Score, evaluate, module_r2
from commissure.reservoirs.evaluation_reference import evaluate_reference
from commissure.reservoirs.io_map import DisconnectedWarning, IOMap
from commissure.reservoirs.moments import IllConditionedWarning, ReadoutMoments
from commissure.reservoirs.reservoir import Reservoir
from commissure.reservoirs.tasks import MemoryCapacity, Multitask
from commissure.reservoirs.tasks.data import TaskData

TASK = MemoryCapacity(max_delay=4, length=300, warmup=20)
F64 = torch.float64


@pytest.fixture(scope="module")
def network() -> Connectome:
    tree = BlockTree.balanced(branching=2, depth=2, leaf_size=8)
    return HierarchicalSBM(tree, p_within=0.6, decay=0.5).sample(0)


@pytest.fixture(scope="module")
def io(network: Connectome) -> tuple[IOMap, ...]:
    modules = network.modules(0)
    return IOMap.from_modules(modules, inputs=[0]), IOMap.from_modules(modules, inputs=[2], outputs=[0, 3], n_outputs=5)


@dataclass(frozen=True)
class TwoChannels:
    """Two inputs; series of different warm-up and, by default, length; targets mix both channels."""

    n_inputs: int = 2
    n_outputs: int = 3
    test_length: int = 350
    test_warmup: int = 17

    def data(self, seed: int, split: str) -> TaskData:
        length, warmup = (400, 30) if split == "train" else (self.test_length, self.test_warmup)
        u = generator(seed, "two", split).uniform(-1, 1, (length, 2))
        targets = np.stack([np.roll(u[:, 0], 1), np.roll(u[:, 1], 2), u[:, 0] * u[:, 1]], 1)
        return TaskData(u, targets, warmup)


def assert_same(ours: tuple[Score, ...], theirs: tuple[Score, ...], tolerance: float) -> None:
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        for field in dataclasses.fields(Score):
            x, y = getattr(a, field.name), getattr(b, field.name)
            if field.name in ("score", "capacity", "target_scores", "lyapunov") and x is not None:
                assert np.max(np.abs(np.subtract(x, y))) <= tolerance, (field.name, a, b)
            elif field.name != "solver":
                assert x == y, (field.name, a, b)


def test_every_condition_is_its_literal_loop(network: Connectome, io: tuple[IOMap, ...]) -> None:
    options = {
        "io": io,
        "spectral_radius": [0.6, 1.1],
        "input_gain": 0.5,
        "penalties": [1e-6, 1e-3, 1.0],
        "read_noise": [1e-2, 0.0],
        "read_bits": [6, None],
        "lyapunov": True,
        "seed": 3,
    }
    scores = evaluate(network, TASK, dtype=F64, **options)
    assert len(scores) == 2 * 2 * 2 * (3 + 2)
    assert len({s.penalty for s in scores}) > 1
    assert_same(scores, evaluate_reference(network, TASK, **options), 1e-8)


@pytest.mark.parametrize("activation", ["tanh", "linear", "relu"])
def test_two_channels_leak_and_unequal_series(network: Connectome, activation: str) -> None:
    io = IOMap(
        inputs=([0, 1], [9]),
        outputs=(np.arange(16, 24), np.arange(24, 32), [2, 5, 30]),
        targets=([0, 1], [2], [0, 1]),
    )
    options = {
        "io": io,
        "spectral_radius": [0.5, None],
        "leak": np.linspace(0.3, 1.0, 32),
        "activation": activation,
        "weight_bits": 4,
        "penalties": 1e-4,
        "lyapunov": True,
    }
    weights = network.to_array() / 8  # a radius of about 0.6
    scores = evaluate(weights, TwoChannels(), dtype=F64, **options)
    assert [len(s.target_scores) for s in scores[:3]] == [2, 1, 2]
    assert_same(scores, evaluate_reference(weights, TwoChannels(), **options), 1e-8)


@pytest.mark.parametrize("sizes", [{"test_length": 400}, {"test_warmup": 30}])
def test_series_may_differ_in_warm_up_or_length_alone(network: Connectome, sizes: dict) -> None:
    task, io = TwoChannels(**sizes), IOMap(inputs=([0], [9]), outputs=(np.arange(16, 24),))
    scores = evaluate(network, task, io=io, dtype=F64)
    assert_same(scores, evaluate_reference(network, task, io=io), 1e-8)


@pytest.mark.parametrize("n_inputs", [2, 4])
def test_several_tasks_at_once_are_their_literal_loop(network: Connectome, n_inputs: int) -> None:
    """Readouts of one map with targets of their own, in number too."""
    task = Multitask(n_inputs=n_inputs, max_delay=3, length=400, warmup=20)
    modules = [np.arange(4 * i, 4 * i + 4) for i in range(8)]
    options = {"io": task.io(modules, seed=0), "spectral_radius": 0.8, "penalties": [1e-5, 1e-1]}
    scores = evaluate(network, task, dtype=F64, **options)
    assert {len(s.target_scores) for s in scores} == {1, 3}
    assert_same(scores, evaluate_reference(network, task, **options), 1e-8)


def test_scikit_learn_agrees(network: Connectome, io: tuple[IOMap, ...]) -> None:
    """The published protocol by other hands: Ridge without an intercept and r2_score on the states of `Reservoir`."""
    linear_model, metrics = pytest.importorskip("sklearn.linear_model"), pytest.importorskip("sklearn.metrics")
    data = {split: TASK.data(5, split) for split in ("train", "test")}
    scores = iter(evaluate(network, TASK, io=io, spectral_radius=[0.7, 1.2], penalties=1e-6, seed=5, dtype=F64))
    for radius in (0.7, 1.2):
        for each in io:
            reservoir = Reservoir(network, inputs=each.input_weights(32), spectral_radius=radius, dtype=F64)
            states = {s: reservoir(torch.from_numpy(d.inputs)[None])[0][0].numpy()[20:] for s, d in data.items()}
            for nodes in each.outputs:
                ridge = linear_model.Ridge(alpha=1e-6, fit_intercept=False, solver="svd")
                ridge.fit(states["train"][:, nodes], data["train"].targets[20:])
                predicted = ridge.predict(states["test"][:, nodes])
                r2 = metrics.r2_score(data["test"].targets[20:], predicted, multioutput="raw_values")
                score = next(scores)
                assert np.max(np.abs(score.target_scores - r2)) <= 1e-8
                assert score.score == pytest.approx(r2.mean(), abs=1e-8)
    assert next(scores, None) is None


def test_a_row_does_not_depend_on_the_rows_beside_it(
    network: Connectome, io: tuple[IOMap, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"penalties": [1e-5, 1e-2], "seed": 1}
    together = evaluate(network, TASK, io=io, spectral_radius=[0.6, 0.9, 1.2], read_noise=[0.0, 1e-3], **options)
    alone = [
        score
        for radius in (0.6, 0.9, 1.2)
        for i, each in enumerate(io)
        for noise in (0.0, 1e-3)
        for score in evaluate(network, TASK, io=each, spectral_radius=radius, read_noise=noise, **options)
        if i == 0 or score
    ]
    assert [dataclasses.replace(s, input=0) for s in together] == alone
    monkeypatch.setattr(simulation, "_HELD", 1)
    assert (
        evaluate(network, TASK, io=io, spectral_radius=[0.6, 0.9, 1.2], read_noise=[0.0, 1e-3], **options) == together
    )


def test_float32_simulation_with_float64_moments_is_close(network: Connectome, io: tuple[IOMap, ...]) -> None:
    single, double = (evaluate(network, TASK, io=io, penalties=1e-6, dtype=dtype) for dtype in (torch.float32, F64))
    differences = [abs(a.score - b.score) for a, b in zip(single, double, strict=True)]
    assert 0 < max(differences) < 1e-3


def test_memory_does_not_grow_with_time(
    network: Connectome, io: tuple[IOMap, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest stretch of states and of columns, whatever the length."""
    largest = []
    for length in (600, 3000):
        seen = []
        scan, update = simulation.reservoir_scan, ReadoutMoments.update

        def watch_scan(*args, scan=scan, seen=seen, **options):
            done = scan(*args, **options)
            seen.append(done.states.numel())
            return done

        def watch_update(self, columns, update=update, seen=seen):
            seen.append(columns.numel())
            return update(self, columns)

        with monkeypatch.context() as patch:
            patch.setattr(simulation, "reservoir_scan", watch_scan)
            patch.setattr(ReadoutMoments, "update", watch_update)
            evaluate(network, MemoryCapacity(max_delay=4, length=length, warmup=20), io=io, read_noise=[0.0, 0.1])
        largest.append(max(seen))
    assert largest[0] == largest[1] > 0


def test_states_held_at_a_time_are_bounded(
    network: Connectome, io: tuple[IOMap, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many input maps run side by side as fit, at least one."""
    row, radii, batches = simulation.CHUNK * 32, [0.6, 0.9, 1.2], []
    scan = simulation.reservoir_scan

    def watch(*args, **options):
        batches.append(len(args[1]))
        return scan(*args, **options)

    monkeypatch.setattr(simulation, "reservoir_scan", watch)
    for held, rows in ((24 * row, [24]), (23 * row, [18, 6]), (12 * row, [12, 12]), (1, [6] * 4)):
        monkeypatch.setattr(simulation, "_HELD", held)
        batches.clear()
        evaluate(network, TASK, io=[*io, *io], spectral_radius=radii)
        assert [n for n, before in zip(batches[::3], [None, *batches], strict=False)] == rows, held


def test_a_penalty_lost_in_the_gram_is_solved_from_a_factor(network: Connectome, io: tuple[IOMap, ...]) -> None:
    options = {"io": io, "penalties": 1e-15, "spectral_radius": [0.5, 1.0], "dtype": F64, "read_noise": [0.0, 1e-3]}
    with pytest.warns(IllConditionedWarning, match=r"penalty 1e-15 is below 50 eps .* solved from a QR"):
        scores = evaluate(network, TASK, **options)
    assert {s.solver for s in scores} == {"factor"}
    assert_same(scores, evaluate_reference(network, TASK, **options), 1e-6)


def test_only_the_radii_that_need_a_factor_get_one(network: Connectome, io: tuple[IOMap, ...]) -> None:
    """Saturated states have a larger Gram."""
    options = {"io": io[0], "spectral_radius": [0.1, 3.0], "dtype": F64, "input_gain": 0.05}
    with pytest.warns(IllConditionedWarning, match=r"1 of 1 groups of readouts \(up to 1 spectral radii\)"):
        scores = evaluate(network, TASK, penalties=1e-13, **options)
    assert [s.solver for s in scores] == ["moments"] * 3 + ["factor"] * 3
    assert_same(scores, evaluate_reference(network, TASK, penalties=1e-13, **options), 1e-5)


def test_states_halfway_between_levels_take_the_upper_one(network: Connectome, io: tuple[IOMap, ...]) -> None:
    """Exact zeros of rectified units lie halfway between two levels."""
    options = {"io": io[0], "activation": "relu", "read_bits": [2, 4], "penalties": 1e-2}
    scores = evaluate(network, TASK, dtype=F64, **options)
    assert_same(scores, evaluate_reference(network, TASK, **options), 1e-8)


def test_states_beyond_float64_are_named(network: Connectome, io: tuple[IOMap, ...]) -> None:
    with pytest.raises(DegenerateError, match=r"states of the train series, input map 0, grew beyond"):
        evaluate(network, TASK, io=io, spectral_radius=1e3, activation="linear", dtype=F64)


def test_a_second_pass_keeps_its_radii_apart(network: Connectome) -> None:
    """One node's Gram needs a factor at fewer radii than eight nodes': its row is looked up, not counted off."""
    modules = network.modules(0)
    few = IOMap.from_modules(modules, inputs=[0], outputs=[3], n_outputs=1)
    options = {"io": (few, IOMap.from_modules(modules, inputs=[2])), "input_gain": 0.05, "penalties": 2e-12}
    options["spectral_radius"] = [0.5, 1.2, 3.0]
    with pytest.warns(IllConditionedWarning):
        scores = evaluate(network, TASK, dtype=F64, **options)
    with_factor = {(s.input, s.spectral_radius) for s in scores if s.solver == "factor"}
    assert with_factor == {(0, 3.0), (1, 1.2), (1, 3.0)}
    assert_same(scores, evaluate_reference(network, TASK, **options), 1e-5)


def test_no_warning_at_a_safe_penalty(network: Connectome, io: tuple[IOMap, ...]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert {s.solver for s in evaluate(network, TASK, io=io, penalties=1e-9)} == {"moments"}


def test_a_delay_line_remembers_its_length() -> None:
    """Linear, each node one step later: every delay it holds is exact, the next is not there."""
    line = np.diag(np.ones(9), 1)
    io = IOMap(inputs=([0],), outputs=(np.arange(10),), allow_overlap=True)
    task = MemoryCapacity(max_delay=12, length=2000, warmup=20)
    (score,) = evaluate(line, task, io=io, spectral_radius=None, activation="linear", penalties=1e-9, dtype=F64)
    assert np.allclose(score.target_scores[:9], 1.0)
    assert max(score.target_scores[9:]) < 0.05
    assert 9 <= score.capacity < 9.2
    with pytest.raises(DegenerateError, match=r"no cycle.*spectral_radius=None"):
        evaluate(line, task, io=io)


def test_the_exponent_of_a_linear_network_is_its_radius() -> None:
    rng = np.random.default_rng(0)
    io = IOMap(inputs=([0],), outputs=(np.arange(1, 30),))
    task = MemoryCapacity(max_delay=2, length=2000, warmup=200)
    scores = evaluate(
        rng.uniform(0, 1, (30, 30)), task, io=io, spectral_radius=[0.3, 0.9, 1.0], activation="linear", lyapunov=True
    )
    assert [s.lyapunov for s in scores] == pytest.approx(np.log([0.3, 0.9, 1.0]), abs=2e-4)


def test_the_exponent_is_that_of_dynamics(network: Connectome, io: tuple[IOMap, ...]) -> None:
    task = MemoryCapacity(max_delay=2, length=600, warmup=200)
    scores = evaluate(network, task, io=io[0], spectral_radius=[0.05, 0.9, 1.3], lyapunov=True, seed=2)
    for radius in (0.05, 0.9, 1.3):
        reservoir = Reservoir(network, inputs=io[0].input_weights(32), spectral_radius=radius, dtype=F64)
        expected = lyapunov(reservoir, task.data(2, "train").inputs, warmup=200).exponents[0]
        (ours,) = {s.lyapunov for s in scores if s.spectral_radius == radius}
        assert ours == pytest.approx(expected, abs=1e-5)


def test_module_r2_averages_readouts_then_inputs(network: Connectome, io: tuple[IOMap, ...]) -> None:
    scores = evaluate(network, TASK, io=io, spectral_radius=[0.6, 0.9], read_noise=[0.0, 0.01], lyapunov=True)
    rows = module_r2(scores)
    assert [(r.spectral_radius, r.read_noise) for r in rows] == [(0.6, 0.0), (0.6, 0.01), (0.9, 0.0), (0.9, 0.01)]
    first = [s for s in scores if (s.spectral_radius, s.read_noise) == (0.9, 0.01)]
    by_input = [np.mean([s.score for s in first if s.input == i]) for i in (0, 1)]
    assert rows[3].score == pytest.approx(np.mean(by_input))
    assert rows[3].score != pytest.approx(np.mean([s.score for s in first]), rel=1e-6)
    assert rows[3].lyapunov == pytest.approx(np.mean([first[0].lyapunov, first[-1].lyapunov]))


def test_nothing_given_is_changed(network: Connectome, io: tuple[IOMap, ...]) -> None:
    weights = network.to_array()
    before = weights.copy()
    state = torch.random.get_rng_state()
    evaluate(weights, TASK, io=io, read_noise=0.1, read_bits=4)
    assert (weights == before).all()
    assert (torch.random.get_rng_state() == state).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spectral_radius": [0.5, -1.0]}, r"^spectral_radius = -1"),
        ({"read_noise": [-0.1]}, r"^read_noise\[0\] = -0\.1"),
        ({"read_bits": [None, 17]}, r"^read_bits\[1\] = 17"),
        ({"penalties": [1.0, -1.0]}, r"^penalties\[1\] = -1"),
        ({"penalties": []}, r"^penalties = \[\]: expected at least one"),
        ({"io": []}, r"^io = \[\]: expected at least one"),
        ({"activation": "softmax"}, r"^activation = 'softmax'"),
        ({"leak": 0.0}, r"^leak = 0\.0"),
        ({"input_gain": np.nan}, r"^input_gain = nan"),
        ({"io": IOMap(inputs=([0], [1]), outputs=([2],))}, r"^io\[0\]\.inputs = 2: .* task's 1 channels"),
        ({"io": IOMap(inputs=([0],), outputs=([2],), targets=([4],))}, r"^io\[0\]\.targets\[0\] = 4: .* 0 to 3"),
        ({"io": IOMap(inputs=([0],), outputs=([32],))}, r"^n_nodes = 32"),
        ({"io": "a"}, r"^io\[0\] = 'a': expected an IOMap"),
        ({"weight_bits": 17}, r"^weight_bits = 17: expected 2 to 16"),
        ({"seed": -1}, r"^seed = -1"),
    ],
)
def test_bad_input(network: Connectome, io: tuple[IOMap, ...], options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        evaluate(network, TASK, **{"io": io[0], **options})


def test_bad_networks_and_series(io: tuple[IOMap, ...], network: Connectome) -> None:
    weights = network.to_array()
    weights[3, 4] = np.nan
    with pytest.raises(InputError, match=r"^network\[3, 4\] = nan"):
        evaluate(weights, TASK, io=io)
    with pytest.raises(InputError, match=r"^network = \(2, 3\)"):
        evaluate(np.ones((2, 3)), TASK, io=io)
    with pytest.raises(InputError, match=r"^max_delay = 30: expected .* warmup = 20"):
        MemoryCapacity(max_delay=30, length=300, warmup=20)

    class Broken(TwoChannels):
        def data(self, seed: int, split: str) -> TaskData:
            data = super().data(seed, split)
            if split == "test":
                data.targets[:, 1] = 3.0
            return data._replace(inputs=data.inputs[:, :1])

    with pytest.raises(DegenerateError, match=r"target 1 is constant"):
        evaluate(network, Broken(n_inputs=1), io=io)


def test_nodes_that_no_input_reaches_are_named() -> None:
    weights = np.kron(np.eye(2), np.ones((3, 3)))
    with pytest.warns(DisconnectedWarning, match=r"readout 1: nodes \[3, 5\]"):
        evaluate(weights, TASK, io=IOMap(inputs=([0],), outputs=([1], [3, 5])))
