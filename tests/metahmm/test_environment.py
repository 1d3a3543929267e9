"""Environments: counts that were published, tables rebuilt by literal loops, and what the reference variant repeats."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from commissure.core.errors import InputError
from commissure.metahmm import MetaHMM, MetaHMMConfig
from commissure.metahmm.blocks import draw_blocks

PRESETS = ("small", "medium", "default", "tiny", "e64")
TASKS = {"small": (512, 24), "medium": (1536, 48), "default": (1536, 32), "tiny": (4, 4), "e64": (16, 4)}


@pytest.mark.parametrize("name", PRESETS)
def test_sizes(name: str) -> None:
    env = MetaHMM.from_preset(name, seed=3)
    config = env.config
    n_transitions, n_emissions = TASKS[name]
    assert (env.n_transitions, env.n_emissions) == (n_transitions, n_emissions)
    assert env.n_tasks == n_transitions * n_emissions == math.prod(env.factor_sizes)
    assert env.transitions.shape == (n_transitions, config.n_states, config.n_states)
    assert env.emissions.shape == (n_emissions, config.n_states, config.n_obs)
    assert env.transitions.dtype == env.emissions.dtype == env.initial.dtype == torch.float64
    assert len(env.factor_names) == len(set(env.factor_names))


def test_published_numbers_of_tasks() -> None:
    sizes = {name: MetaHMMConfig.from_preset(name) for name in ("small", "default", "medium")}
    assert {name: c.n_transitions * c.n_emissions for name, c in sizes.items()} == {
        "small": 12_288,
        "default": 49_152,
        "medium": 73_728,
    }


@pytest.mark.parametrize(
    ("variant", "seed", "n_distinct", "n_edges"),
    [
        ("reference", 15, 512, 38.9),
        ("reference", 23, 480, 36.0),
        ("reference", 5345, 512, 44.6),
        ("corrected", 15, 512, 65.4),
        ("corrected", 23, 512, 59.1),
        ("corrected", 5345, 512, 68.3),
    ],
)
def test_published_counts(variant: str, seed: int, n_distinct: int, n_edges: float) -> None:
    transitions = MetaHMM.from_preset("small", seed=seed, variant=variant).transitions
    assert len(torch.unique(transitions, dim=0)) == n_distinct
    assert round(float((transitions > 0).sum()) / len(transitions), 1) == n_edges


@pytest.mark.parametrize("name", PRESETS)
def test_rows_are_distributions(name: str) -> None:
    env = MetaHMM.from_preset(name, seed=15)
    for table in (env.initial, env.transitions, env.emissions):
        assert (table >= 0).all()
        assert (table.sum(-1) - 1).abs().max() <= 1e-12


def test_reference_is_stored_in_half_precision() -> None:
    env = MetaHMM.from_preset("small", seed=15, variant="reference")
    for table in (env.transitions, env.emissions):
        assert torch.equal(table.half().double(), table)
        assert 2e-4 < (table.sum(-1) - 1).abs().max() < 2.5e-4  # the published defect: 2.4e-4


def test_transitions_are_the_sum_of_strided_cycles() -> None:
    """Every matrix rebuilt edge by edge from cycles drawn again."""
    env = MetaHMM.from_preset("small", seed=5345)
    rng, n = np.random.default_rng(5345), 20
    base = [list(rng.permutation(n)) for _ in range(4)]
    families = []
    for _ in range(3):
        families.append([])
        for _ in range(2):
            lengths = list(rng.integers(3, 9, size=3))
            families[-1].append([list(rng.choice(n, size=k, replace=False)) for k in lengths])

    def walk(counts: np.ndarray, cycle: list[int], direction: int, speed: int) -> None:
        cycle = list(reversed(cycle)) if direction else cycle
        for place, state in enumerate(cycle):
            counts[state, cycle[(place + speed + 1) % len(cycle)]] += 1

    for u in range(env.n_transitions):
        b, direction, speed, *groups, family_direction, family_speed = env.task_to_factors([u * 24])[0, :8].tolist()
        counts = np.zeros((n, n))
        walk(counts, base[b], direction, speed)
        for family, group in zip(families, groups, strict=True):
            for cycle in family[group]:
                walk(counts, cycle, family_direction, family_speed)
        np.testing.assert_allclose(env.transitions[u].numpy(), counts / counts.sum(1, keepdims=True), atol=1e-15)


def test_emissions_are_edges_drawn_by_attachment_and_shifted_inside_groups() -> None:
    env = MetaHMM.from_preset("small", seed=23)
    rng = np.random.default_rng(23)
    for _ in range(4):
        rng.permutation(20)
    for _ in range(6):
        for k in rng.integers(3, 9, size=3):
            rng.choice(20, size=k, replace=False)
    groups = [list(range(7)), list(range(7, 14)), list(range(14, 20))]
    edges: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for g, states in enumerate(groups):
        for option in range(2):
            drawn = list(enumerate(rng.choice(50, size=len(states), replace=False).tolist()))
            for _ in range(3 * len(states)):
                degrees = np.bincount([token for _, token in drawn], minlength=50)
                source = int(rng.integers(len(states)))
                drawn.append((source, int(rng.choice(50, p=np.exp(degrees) / np.exp(degrees).sum()))))
            edges[g, option] = drawn
    for w in range(env.n_emissions):
        *options, shift = env.task_to_factors([w])[0, 8:].tolist()
        weights = np.full((20, 50), 1e-5)
        for g, option in enumerate(options):
            for source, token in edges[g, option]:
                weights[groups[g][(source + shift) % len(groups[g])], token] = 1 + 1e-5
        np.testing.assert_allclose(env.emissions[w].numpy(), weights / weights.sum(1, keepdims=True), atol=1e-15)


def test_tasks_are_pairs_of_matrices() -> None:
    env = MetaHMM.from_preset("e64", seed=1)
    ids = torch.tensor([0, 5, 63])
    assert torch.equal(env.transition_matrix(ids), env.transitions[[0, 1, 15]])
    assert torch.equal(env.emission_matrix(ids), env.emissions[[0, 1, 3]])
    assert torch.equal(env.task_ids, torch.arange(64))


def test_reference_keeps_the_last_cycle_of_a_group() -> None:
    """Stride 1 is prime to every length, so that a published group is one cycle instead of three."""
    config = MetaHMMConfig.from_preset("small")
    right, published = (draw_blocks(config, seed=15, variant=v).family[:, :, 0, 0] for v in ("corrected", "reference"))
    assert (right.sum((-1, -2)) >= 9).all()
    for block in published.reshape(-1, 20, 20):
        states = np.flatnonzero(block.sum(1))
        assert 3 <= len(states) <= 8
        assert (block.sum(1)[states] == 1).all()
        assert (block.sum(0)[states] == 1).all()
    assert (published <= right).all()


def test_reference_puts_base_edges_into_families() -> None:
    """Stride 2 and an even length: half turns of the last base cycle in its last direction."""
    blocks = draw_blocks(MetaHMMConfig.from_preset("small"), seed=23, variant="reference")
    stale = blocks.base[-1, -1, 1]
    has_stale = (blocks.family[:, :, :, 1] >= stale).all((-1, -2))
    assert has_stale.any()
    assert not has_stale.all()
    assert np.array_equal(has_stale[..., 0], has_stale[..., 1])  # the family's own direction does not matter
    assert not (blocks.family[:, :, :, 0] >= stale).all((-1, -2)).any()


def test_reference_splits_a_cycle_wrongly_where_the_stride_does_not_divide_it() -> None:
    config = MetaHMMConfig(n_states=6, n_obs=8, base_speeds=4, base_directions=1, emission_groups=2)
    right, published = (draw_blocks(config, seed=0, variant=v).base for v in ("corrected", "reference"))
    assert (right.sum(-1) == 1).all()
    assert np.array_equal(right[:, :, :3], published[:, :, :3])  # strides 1, 2 and 3 divide 6
    assert (published[:, :, 3].sum((-1, -2)) == 2).all()  # stride 4: two parts of 6 // 4 = 1 state
    with pytest.raises(InputError, match="leave every state a successor"):
        MetaHMM(config.model_copy(update={"cycle_families": 0}), seed=0, variant="reference")


def test_a_digest_names_everything_that_decides_the_tables() -> None:
    env = MetaHMM.from_preset("tiny", seed=3)
    assert env.digest == MetaHMM.from_preset("tiny", seed=3).digest
    noisier = MetaHMM(env.config.model_copy(update={"emission_noise": 2e-2}), seed=3)
    others = {noisier.digest, MetaHMM.from_preset("tiny", seed=4).digest}
    others.add(MetaHMM.from_preset("tiny", seed=3, variant="reference").digest)
    assert len(others | {env.digest}) == 4


def test_a_digest_sees_another_stream_of_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    digest, numpy_rng = MetaHMM.from_preset("tiny", seed=3).digest, np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed: numpy_rng(seed + 1))
    assert MetaHMM.from_preset("tiny", seed=3).digest != digest


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"n_states": 2}, "n_states"),
        ({"base_directions": 3}, "base_directions"),
        ({"base_speeds": 30}, "base_speeds"),
        ({"emission_groups": 31}, "emission_groups"),
        ({"emission_groups": 1, "n_obs": 29}, "n_obs"),
        ({"emission_noise": math.nan}, "emission_noise"),
        ({"states": 3}, "states"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_configurations(fields: dict[str, int], named: str) -> None:
    with pytest.raises(InputError, match=named):
        MetaHMMConfig(**fields)


def test_bad_environments() -> None:
    with pytest.raises(InputError, match="small, medium, default, tiny, e64"):
        MetaHMM.from_preset("big", seed=0)
    with pytest.raises(InputError, match="variant"):
        MetaHMM.from_preset("tiny", seed=0, variant="fixed")
    with pytest.raises(InputError, match="config"):
        MetaHMM({"n_states": 4}, seed=0)
    for name in (3, ["tiny"], None):
        with pytest.raises(InputError, match="name"):
            MetaHMM.from_preset(name, seed=0)
    assert MetaHMM.from_preset("tiny", seed=np.int64(3)).digest == MetaHMM.from_preset("tiny", seed=3).digest
    for seed in (-1, True, 0.5):
        with pytest.raises(InputError, match="seed"):
            MetaHMM.from_preset("tiny", seed=seed)


def test_every_state_is_as_likely_first() -> None:
    env = MetaHMM.from_preset("small", seed=15)
    assert torch.equal(env.initial, torch.full((20,), 0.05, dtype=torch.float64))
