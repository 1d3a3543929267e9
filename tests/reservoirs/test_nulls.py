"""Null networks: what each kind keeps, what it randomizes, and the networks that have no other of their kind."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.sparse.csgraph import connected_components

from commissure.core.errors import CommissureError, InputError
from commissure.core.rng import generator
from commissure.reservoirs import nulls
from commissure.reservoirs.connectome import Connectome
from commissure.reservoirs.nulls import NothingRewiredWarning, rewire

N = 48
LEVELS = (np.arange(N) // 6, np.arange(N) // 12, np.arange(N) // 24)
PRESERVE = ("degree", "degree+modules", "degree+levels")


def network(kind: str, seed: int = 0) -> Connectome:
    """Denser the closer the nodes; signed by source in "dale", by edge in "signed"."""
    rng = generator(seed, "network", kind)
    shared = sum(level[:, None] == level for level in LEVELS)
    there = rng.random((N, N)) < np.array([0.1, 0.2, 0.3, 0.5])[shared]
    weights = there * rng.lognormal(size=(N, N))
    if kind == "undirected":
        weights = np.triu(weights, 1) + np.triu(weights, 1).T
    if kind == "signed":
        weights *= rng.choice([-1.0, 1.0], size=(N, N))
    if kind == "dale":
        weights *= np.where(rng.random(N) < 0.2, -1.0, 1.0)[:, None]
    np.fill_diagonal(weights, 0)
    return Connectome.from_array(weights, orientation="source_target", levels=LEVELS, provenance="drawn")


def category(preserve: str) -> np.ndarray:
    """Of each pair of nodes: how many of the levels that count do not hold both."""
    levels = {"degree": (), "degree+modules": LEVELS[:1], "degree+levels": LEVELS}[preserve]
    return sum((level[:, None] != level for level in levels), np.zeros((N, N), int))


@pytest.mark.parametrize("kind", ["undirected", "directed", "signed", "dale"])
@pytest.mark.parametrize("preserve", PRESERVE)
@pytest.mark.parametrize("strengths", [False, True])
def test_a_null_keeps_what_it_should(kind, preserve, strengths):
    original = network(kind)
    null, statistics = rewire(original, preserve=preserve, strengths=strengths, seed=4)
    old, new, categories = original.to_array(), null.to_array(), category(preserve)
    for c in range(categories.max() + 1):
        of_class = categories == c
        for axis in (0, 1):
            assert (((new != 0) & of_class).sum(axis) == ((old != 0) & of_class).sum(axis)).all()
        assert sorted(new[of_class]) == sorted(old[of_class])
    assert not new.diagonal().any()
    assert (new == new.T).all() == (kind == "undirected")
    if kind == "dale":
        assert (np.sign(new).sum(1) == np.sign(old).sum(1)).all()
    if not strengths and kind != "undirected":
        np.testing.assert_allclose(new.sum(1), old.sum(1), rtol=1e-12)
    moved = 1 - ((new != 0) & (old != 0)).sum() / (old != 0).sum()
    assert statistics.moved == pytest.approx(moved)
    assert moved > (0.5 if preserve == "degree" else 0.2)
    assert 0 < statistics.accepted < statistics.proposed == 10 * original.n_edges
    assert len(null.levels) == 3
    assert all(map(np.array_equal, null.levels, original.levels))


@pytest.mark.parametrize("kind", ["undirected", "directed"])
def test_edges_between_modules_are_counted_only_where_they_are_kept(kind):
    """Within every module for "degree+modules"; within and between modules of a level's module for "degree+levels"."""
    original = network(kind)

    def inside(connectome: Connectome, level: int) -> np.ndarray:
        there = connectome.to_array() != 0
        return np.array([there[np.ix_(nodes, nodes)].sum() for nodes in connectome.modules(level)])

    kept = {
        preserve: [
            np.array_equal(
                inside(original, level), inside(rewire(original, preserve=preserve, seed=1).connectome, level)
            )
            for level in range(3)
        ]
        for preserve in PRESERVE
    }
    assert kept == {
        "degree": [False, False, False],
        "degree+modules": [True, False, False],
        "degree+levels": [True, True, True],
    }


@pytest.mark.parametrize("kind", ["undirected", "directed", "signed"])
def test_annealed_weights_bring_the_strengths_back(kind):
    original = network(kind)
    _, free = rewire(original, seed=2)
    null, annealed = rewire(original, strengths=True, seed=2)
    assert annealed.strength_error_swapped == free.strength_error == free.strength_error_swapped
    assert annealed.strength_error < 0.25 * annealed.strength_error_swapped
    old, new = original.to_array(), null.to_array()
    axes = (0,) if kind == "undirected" else (0, 1)
    off = sum(np.abs(new.sum(axis) - old.sum(axis)).sum() for axis in axes)
    assert annealed.strength_error == pytest.approx(off / sum(np.abs(old.sum(axis)).sum() for axis in axes))


@pytest.mark.parametrize("kind", ["undirected", "directed"])
def test_lognormal_weights_come_near_their_strengths(kind):
    """From some 0.2 after the swaps; a schedule that starts 100 times as hot ends far from it."""
    errors = [rewire(network(kind, seed), strengths=True, seed=seed)[1].strength_error for seed in range(3)]
    assert max(errors) < 0.05


def test_equal_weights_have_nothing_to_exchange():
    original = network("directed")
    binary = Connectome.from_array(original.to_array() != 0, orientation="source_target")
    free, annealed = (rewire(binary, strengths=strengths, seed=0) for strengths in (False, True))
    assert (free.connectome.to_array() == annealed.connectome.to_array()).all()
    assert free.statistics == annealed.statistics
    assert annealed.statistics.strength_error == 0


def test_swaps_and_weights_have_streams_of_their_own(monkeypatch):
    keys = []
    for name in ("swap_edges", "anneal_weights"):
        real = getattr(nulls, name)
        monkeypatch.setattr(
            nulls, name, lambda *args, real=real, **options: keys.append(options["key"]) or real(*args, **options)
        )
    rewire(network("directed"), strengths=True, seed=0)
    assert len({*keys}) == 2


@pytest.mark.parametrize("kind", ["undirected", "directed"])
def test_seeds_decide(kind):
    original = network(kind)
    first, again, other = (rewire(original, strengths=True, seed=seed).connectome.to_array() for seed in (0, 0, 1))
    assert (first == again).all()
    assert ((first != 0) != (other != 0)).any()


def test_a_null_tells_what_it_is_and_leaves_the_original_alone():
    original = network("directed")
    original = replace(
        original, labels=tuple(f"n{i}" for i in range(N)), coordinates=np.zeros((N, 3)), tract_lengths=original.weights
    )
    before = original.to_array()
    null, statistics = rewire(original, preserve="degree+levels", swaps_per_edge=25, keep_connected=True, seed=3)
    assert (original.to_array() == before).all()
    assert null.labels == original.labels
    assert null.tract_lengths is None
    assert null.provenance == (
        "drawn",
        f"rewired: degree+levels, 25 swaps an edge, {statistics.accepted} of {statistics.proposed} accepted, "
        "kept connected, seed 3",
    )
    assert connected_components(null.weights, connection="strong")[0] == 1


@pytest.mark.parametrize("name", ["complete", "star", "modules"])
def test_the_only_network_of_its_kind_comes_back_unchanged(name):
    weights = np.zeros((8, 8))
    if name == "complete":
        weights = np.arange(64.0).reshape(8, 8) + 1
    elif name == "star":
        weights[0, 1:] = weights[1:, 0] = np.arange(1.0, 8)
    else:
        weights[0, 1] = weights[1, 0] = weights[6, 7] = weights[7, 6] = 2.0
    np.fill_diagonal(weights, 0)
    original = Connectome.from_array(weights, orientation="source_target", levels=[np.arange(8) // 4])
    with pytest.warns(NothingRewiredWarning, match="none of [0-9]+ proposed swaps"):
        null, statistics = rewire(
            original, preserve="degree+modules" if name == "modules" else "degree", strengths=True, seed=0
        )
    assert null is original
    assert (statistics.accepted, statistics.moved) == (0, 0.0)


def test_bad_input_is_refused():
    original = network("directed")
    with pytest.raises(InputError, match="preserve = 'degrees'"):
        rewire(original, preserve="degrees", seed=0)
    with pytest.raises(InputError, match="swaps_per_edge = 0"):
        rewire(original, swaps_per_edge=0, seed=0)
    with pytest.raises(InputError, match="levels"):
        rewire(original.with_levels([]), preserve="degree+levels", seed=0)
    for wrong in (
        {"swaps_per_edge": "a"},
        {"swaps_per_edge": 1e25},
        {"swaps_per_edge": float("nan")},
        {"swaps_per_edge": True},
        {"keep_connected": 1},
        {"strengths": "no"},
        {"preserve": np.array(["degree", "degree"])},
        {"seed": -1},
    ):
        with pytest.raises(InputError, match=f"^{next(iter(wrong))} = "):
            rewire(original, **({"seed": 0} | wrong))
    with pytest.raises(InputError, match="connectome = 'ndarray': expected a Connectome"):
        rewire(original.to_array(), seed=0)
    pieces = Connectome.from_array(np.diag(np.ones(3), 1), orientation="source_target")
    with pytest.raises(InputError, match="strongly connected"):
        rewire(pieces, keep_connected=True, seed=0)


@pytest.mark.parametrize(
    ("spoil", "broken"),
    [
        (lambda w: w[::-1, ::-1], "degrees"),
        (lambda w: w + np.tri(N, k=-1) * (w != 0) * 0.5, "the weights and the symmetry"),
    ],
)
def test_a_broken_null_is_not_returned(monkeypatch, spoil, broken):
    real = nulls._matrix
    monkeypatch.setattr(nulls, "_matrix", lambda *args: type(real(*args))(spoil(real(*args).toarray())))
    with pytest.raises(CommissureError, match=broken):
        rewire(network("undirected"), seed=0)
