"""Spiking reservoirs as NIR files: the same numbers after a round trip, the units written, and files of others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from commissure.core.errors import InputError
from commissure.core.rng import generator
from commissure.reservoirs.nir import from_nir, to_nir
from commissure.reservoirs.reservoir import Reservoir
from commissure.reservoirs.spiking import LIFReservoir

nir = pytest.importorskip("nir")
h5py = pytest.importorskip("h5py")


def make(**options) -> LIFReservoir:
    rng = generator(0, "network")
    weights = rng.normal(size=(20, 20)) * (rng.random((20, 20)) < 0.3)
    np.fill_diagonal(weights, 0)
    settings = {"inputs": 2, "refractory_period": 0.0, "input_gain": 30.0, "time_step": 1e-3, "dtype": torch.float64}
    return LIFReservoir(weights, **{**settings, **options})


@pytest.mark.parametrize("output", ["trace", "spikes"])
@pytest.mark.parametrize("rise", [2e-3, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_round_trip_changes_nothing(tmp_path, output, rise, dtype):
    reservoir = make(output=output, synaptic_rise=rise, dtype=dtype, inhibitory_fraction=0.2)
    to_nir(reservoir, tmp_path / "net.nir")
    again = from_nir(tmp_path / "net.nir")
    for name, buffer in reservoir.named_buffers():
        assert torch.equal(buffer, dict(again.named_buffers())[name]), name
    u = torch.from_numpy(generator(1, "input").normal(size=(2, 300, 2))).to(dtype)
    (y, state), (y_again, state_again) = reservoir(u), again(u)
    assert y.any()
    assert torch.equal(y, y_again)
    assert all(torch.equal(a, b) for a, b in zip(state, state_again, strict=True))


def simulate(graph, u: np.ndarray, time_step: float, substeps: int) -> np.ndarray:
    """Spikes of a NIR graph from its units' equations, Euler steps, knowing nothing of reservoirs; delays of one step.

    A spike is an impulse of unit area: 1 / step for one step.
    """
    dt = time_step / substeps
    values = {name: np.zeros(node.output_type["output"]) for name, node in graph.nodes.items()}
    inner = {n: node.v_reset.copy() for n, node in graph.nodes.items() if isinstance(node, nir.LIF)}
    inner |= {n: np.zeros_like(node.tau) for n, node in graph.nodes.items() if isinstance(node, nir.LI)}
    spikes = []
    for u_t in u.repeat(substeps, axis=0):
        arriving = {name: sum((values[a] for a, b in graph.edges if b == name), 0.0) for name in graph.nodes}
        new = {}
        for name, node in graph.nodes.items():
            if isinstance(node, nir.Input):
                new[name] = u_t
            elif isinstance(node, nir.Linear):
                new[name] = node.weight @ (u_t if ("input", name) in graph.edges else arriving[name])
            elif isinstance(node, nir.LIF | nir.LI):
                inner[name] = inner[name] + dt / node.tau * (node.v_leak - inner[name] + node.r * arriving[name])
                new[name] = inner[name]
                if isinstance(node, nir.LIF):
                    new[name] = (inner[name] > node.v_threshold) / dt
                    inner[name] = np.where(inner[name] > node.v_threshold, node.v_reset, inner[name])
                    spikes.append(new[name] * dt)
            else:
                new[name] = arriving[name]
        values = new
    return np.array(spikes).reshape(len(u), substeps, -1).sum(1)


@pytest.mark.parametrize("rise", [5e-3, 0.0])
def test_the_units_written_mean_the_same_dynamics(tmp_path, rise):
    """The file, run by the units' own equations in small steps, gives the rates and the times of the spikes."""
    reservoir = make(synaptic_rise=rise, output="spikes", time_step=5e-5, input_gain=8.0, weight_gain=0.2)
    to_nir(reservoir, tmp_path / "net.nir")
    u = np.repeat(generator(2, "input").normal(size=(20, 2)), 100, axis=0)
    expected = simulate(nir.read(tmp_path / "net.nir"), u, 5e-5, 4)
    found = reservoir(torch.from_numpy(u)[None])[0][0].numpy()
    assert expected.sum() > 50
    assert abs(found.sum() - expected.sum()) <= 0.02 * expected.sum()
    near = np.abs(np.cumsum(found, 0) - np.cumsum(expected, 0))
    assert near.max() <= 1
    assert near.mean() < 0.05


def test_what_nir_cannot_express_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"refractory_period = 0\.002.*no refractory period"):
        to_nir(make(refractory_period=2e-3), tmp_path / "net.nir")
    with pytest.raises(InputError, match="echo state network cannot be written"):
        to_nir(Reservoir(np.eye(3)), tmp_path / "net.nir")
    assert not list(tmp_path.iterdir())


def changed(path: Path, edit) -> Path:
    """The file with its graph edited."""
    graph = nir.read(path)
    edit(graph)
    nir.write(path, nir.NIRGraph(graph.nodes, graph.edges, metadata=graph.metadata, type_check=False))
    return path


def drop(graph, *edge: str) -> None:
    graph.edges = [e for e in graph.edges if tuple(e) != edge]


def again(graph) -> None:
    """A second way from the neurons back to themselves."""
    graph.nodes |= {"again": graph.nodes["w"], "slow": graph.nodes["synapse"]}
    graph.edges += [("lif", "again"), ("again", "slow"), ("slow", "lif")]


def flat(graph) -> None:
    """Neurons in rows and columns."""
    for name in ("tau", "r", "v_leak", "v_threshold", "v_reset"):
        setattr(graph.nodes["lif"], name, np.ones((20, 1)))


EDITS = [
    ("lif.r", lambda g: g.nodes["lif"].r.__imul__(2)),
    ("lif.tau", lambda g: g.nodes["lif"].tau.__setitem__(0, 1.0)),
    ("lif.v_threshold", lambda g: g.nodes["lif"].v_threshold.__setitem__(3, 1.0)),
    ("LI.r", lambda g: g.nodes["synapse"].r.__imul__(2)),
    ("LI.v_leak", lambda g: g.nodes["trace"].v_leak.__iadd__(1)),
    ("time constants to the output", lambda g: g.nodes["trace"].tau.__imul__(2)),
    ("shapes of input", lambda g: g.nodes["w"].__setattr__("weight", np.ones((20, 19)))),
    ("lif.v_leak", flat),
    ("nodes", lambda g: g.nodes.__setitem__("delay", nir.Delay(np.ones(20)))),
    ("edges from", lambda g: g.edges.append(("trace", "lif"))),
    ("edges =", lambda g: drop(g, "lif", "trace")),
    ("edges =", lambda g: g.edges.append(("output", "lif"))),
    ("edges =", lambda g: g.edges.append(("input", "output"))),
    ("edges =", again),
    ("edges =", lambda g: [drop(g, "lif", "trace"), g.edges.append(("input", "trace"))]),
    ("time_step", lambda g: g.metadata.clear()),
    ("membrane_time", lambda g: g.nodes["lif"].tau.__imul__(-1)),
    ("bias", lambda g: g.nodes["lif"].v_leak.__setitem__(0, np.nan)),
]


@pytest.mark.parametrize(("message", "edit"), EDITS)
def test_other_graphs_are_refused_by_name(tmp_path, message, edit, monkeypatch):
    """Read without the package's own check, so that ours has to find it."""
    path = tmp_path / "net.nir"
    to_nir(make(synaptic_rise=0.0) if edit is again else make(), path)
    real = nir.read
    monkeypatch.setattr(nir, "read", lambda p: real(p, type_check=False))
    changed(path, edit)
    with pytest.raises(InputError, match=message):
        from_nir(path)


def test_a_file_without_time_step_asks_for_one(tmp_path):
    to_nir(make(), tmp_path / "net.nir")
    changed(tmp_path / "net.nir", lambda g: g.metadata.clear())
    assert from_nir(tmp_path / "net.nir", time_step=1e-4).time_step == 1e-4


def test_names_do_not_matter(tmp_path):
    reservoir = make()
    to_nir(reservoir, tmp_path / "net.nir")
    graph = nir.read(tmp_path / "net.nir")
    names = {name: f"n{i}" for i, name in enumerate(reversed(list(graph.nodes)))}
    nodes = {names[name]: node for name, node in graph.nodes.items()}
    edges = [(names[a], names[b]) for a, b in reversed(graph.edges)]
    nir.write(tmp_path / "other.nir", nir.NIRGraph(nodes, edges, metadata=graph.metadata))
    again = from_nir(tmp_path / "other.nir")
    assert all(torch.equal(a, b) for a, b in zip(reservoir.buffers(), again.buffers(), strict=True))


def test_files_that_are_none_are_refused(tmp_path):
    with pytest.raises(InputError, match="a NIR file"):
        from_nir(tmp_path / "missing.nir")
    (tmp_path / "text.nir").write_text("not HDF5")
    with pytest.raises(InputError, match="the package nir can read"):
        from_nir(tmp_path / "text.nir")
    with h5py.File(tmp_path / "empty.nir", "w") as file:
        file.create_group("node")
    with pytest.raises(InputError, match="the package nir can read"):
        from_nir(tmp_path / "empty.nir")
    with h5py.File(tmp_path / "large.nir", "w") as file:
        file.create_dataset("node/nodes/w/weight", shape=(1 << 20, 1 << 12), dtype="f8", chunks=(1024, 1024))
    with pytest.raises(InputError, match="at most"):
        from_nir(tmp_path / "large.nir")
    with h5py.File(tmp_path / "linked.nir", "w") as file:
        file["node"] = h5py.ExternalLink("text.nir", "/")
    with pytest.raises(InputError, match="a link"):
        from_nir(tmp_path / "linked.nir")


def test_paths_that_are_none_are_refused(tmp_path):
    for path in (None, 3, b"net.nir"):
        with pytest.raises(InputError, match=r"^path ="):
            from_nir(path)
        with pytest.raises(InputError, match=r"^path ="):
            to_nir(make(), path)
    for path in (tmp_path / "missing" / "net.nir", tmp_path):
        with pytest.raises(InputError, match="a file in an existing folder"):
            to_nir(make(), path)


def test_a_crash_while_writing_keeps_the_old_file(tmp_path, monkeypatch):
    path, whole = tmp_path / "net.nir", nir.write
    to_nir(make(), path)
    before = path.read_bytes()

    def crash(target, graph):
        whole(target, graph)
        raise OSError("no space left")

    monkeypatch.setattr(nir, "write", crash)
    with pytest.raises(OSError, match="no space left"):
        to_nir(make(output="spikes"), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
