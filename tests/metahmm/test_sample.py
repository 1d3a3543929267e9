"""Sampling: the law against enumeration, lengths, switches that keep the state, and what never happens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import chdtrc

from commissure.core.errors import InputError
from commissure.metahmm import MetaHMM, Sequences
from commissure.metahmm.sample import alias_table, sample_reference

TINY = MetaHMM.from_preset("tiny", seed=0)
E64 = MetaHMM.from_preset("e64", seed=0)
HALF = MetaHMM.from_preset("tiny", seed=0, variant="reference")  # drawn from the normalized rows


def _joint(env: MetaHMM, tasks: tuple[int, int, int]) -> np.ndarray:
    """p(x_1, x_2, x_3), where the token at each position and the state after it are of that position's task."""
    a = _normalized(env.transition_matrix(tasks))
    e = _normalized(env.emission_matrix(tasks))
    pi = env.initial.numpy()
    return np.einsum("i,ia,ij,jb,jk,kc->abc", pi, e[0], a[0], e[1], a[1], e[2])


def _state_joint(env: MetaHMM, tasks: tuple[int, int, int]) -> np.ndarray:
    a = _normalized(env.transition_matrix(tasks))
    return np.einsum("i,ij,jk->ijk", env.initial.numpy(), a[0], a[1])


def _normalized(table: torch.Tensor) -> np.ndarray:
    return (table / table.sum(-1, keepdim=True)).numpy()


def _p_value(columns: torch.Tensor, expected: np.ndarray) -> float:
    """Chi-square test of the first three columns; cells with fewer than 5 expected are one cell."""
    cells = np.ravel_multi_index(tuple(columns.numpy().T), expected.shape)
    mean = len(cells) * expected.reshape(-1)
    counts = np.bincount(cells, minlength=mean.size)
    assert (counts[mean == 0] == 0).all()
    rare = mean < 5
    mean = np.append(mean[~rare], mean[rare].sum())
    counts = np.append(counts[~rare], counts[rare].sum())
    kept = mean > 0
    return float(chdtrc(kept.sum() - 1, ((counts - mean)[kept] ** 2 / mean[kept]).sum()))


def test_tokens_of_all_tasks_have_the_exact_joint() -> None:
    """Mixture of all tasks, 1e5 sequences."""
    ids = torch.arange(100_000) % TINY.n_tasks
    drawn = TINY.sample(ids, 3, seed=1)
    mixture = np.mean([_joint(TINY, (task,) * 3) for task in range(TINY.n_tasks)], 0)
    assert abs(mixture.sum() - 1) < 1e-12
    assert _p_value(drawn.tokens, mixture) > 1e-3


@pytest.mark.parametrize("env", [TINY, HALF, E64], ids=["tiny", "half precision", "e64"])
def test_each_task_has_its_exact_joint(env: MetaHMM) -> None:
    ids = torch.arange(env.n_tasks).repeat_interleave(5000)
    drawn = env.sample(ids, 3, seed=2)
    for task in range(env.n_tasks):
        rows = ids == task
        assert _p_value(drawn.tokens[rows], _joint(env, (task,) * 3)) > 1e-3 / env.n_tasks
        assert _p_value(drawn.states[rows], _state_joint(env, (task,) * 3)) > 1e-3 / env.n_tasks


@pytest.mark.parametrize("env", [TINY, HALF], ids=["exact", "half precision"])
def test_the_loop_has_the_exact_joint(env: MetaHMM) -> None:
    ids = torch.arange(8000) % 2 * 9
    drawn = sample_reference(env, ids, 3, seed=1)
    for task in (0, 9):
        assert _p_value(drawn.tokens[ids == task], _joint(env, (task,) * 3)) > 1e-3


@pytest.mark.parametrize("step", [0, 1, 2, 3])
def test_a_switch_has_the_exact_joint(step: int) -> None:
    old, new = 1, 14
    tasks = tuple(old if t < step else new for t in range(3))
    for draw, n in ((TINY.sample, 50_000), (lambda *a, **k: sample_reference(TINY, *a, **k), 4000)):
        drawn = draw(torch.full((n,), old), 3, seed=3, switch_to=torch.full((n,), new), switch_at=step)
        assert _p_value(drawn.tokens, _joint(TINY, tasks)) > 1e-3
        assert _p_value(drawn.states, _state_joint(TINY, tasks)) > 1e-3


@given(
    arrays(np.float64, st.tuples(st.integers(1, 4), st.integers(1, 9)), elements=st.sampled_from([0, 1, 2, 1e-5, 0.3])),
    st.data(),
)
def test_alias_tables_hold_their_rows(rows: np.ndarray, data: st.DataObject) -> None:
    n = rows.shape[1]
    rows[:, data.draw(st.integers(0, n - 1))] += 1
    table = alias_table(rows.copy())
    threshold, alias = table.threshold.reshape(rows.shape), table.alias.reshape(rows.shape)
    assert ((alias >= 0) & (alias < n)).all()
    own = np.clip(threshold, 0, 1)
    held = own.copy()
    for r, c in np.ndindex(rows.shape):
        held[r, alias[r, c]] += 1 - own[r, c]
    p = rows / rows.sum(1, keepdims=True)
    np.testing.assert_allclose(held / n, p, atol=1e-14)
    assert (own[p == 0] == 0).all()
    drawn_from = np.take_along_axis(p, alias, 1)
    assert (drawn_from[own < 1] > 0).all()


def test_an_entry_of_probability_zero_is_not_drawn_by_the_number_zero() -> None:
    table = alias_table(np.array([[0.0, 1.0, 0.0, 3.0]]))
    columns = np.arange(4)
    assert (table.pick(columns, columns, np.zeros(4)) % 2 == 1).all()


@pytest.mark.parametrize("variant", ["corrected", "reference"])
def test_only_edges_are_walked(variant: str) -> None:
    env = MetaHMM.from_preset("small", seed=23, variant=variant)
    ids = torch.arange(0, env.n_tasks, 37)
    states = env.sample(ids, 100, seed=0).states
    p = env.transition_matrix(ids)[torch.arange(len(ids))[:, None], states[:, :-1], states[:, 1:]]
    assert (p > 0).all()
    assert states.amin() == 0
    assert states.amax() == env.n_states - 1


def _same(a: Sequences, b: Sequences) -> bool:
    return all(x is y is None or torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_sample_depends_on_its_arguments_alone() -> None:
    ids = torch.arange(64)
    before = np.random.get_state()[1].copy(), torch.random.get_rng_state()  # noqa: NPY002
    first, again, other = (E64.sample(ids, 9, seed=seed) for seed in (0, 0, 1))
    assert _same(first, again)
    assert not _same(first, other)
    assert _same(first, MetaHMM.from_preset("e64", seed=0).sample(ids.tolist(), 9, seed=0))
    assert np.array_equal(before[0], np.random.get_state()[1])  # noqa: NPY002
    assert torch.equal(before[1], torch.random.get_rng_state())


def test_variable_lengths_are_uniform_and_begin_like_long_sequences() -> None:
    ids = torch.arange(16_000) % 64
    ragged, full = E64.sample(ids, (2, 9), seed=5), E64.sample(ids, 9, seed=5)
    counts = torch.bincount(ragged.lengths, minlength=10)
    assert counts[:2].sum() == 0
    assert chdtrc(7, float(((counts[2:] - 2000.0) ** 2 / 2000).sum())) > 1e-3
    inside = torch.arange(9) < ragged.lengths[:, None]
    assert torch.equal(ragged.is_scored, inside)
    for name in ("tokens", "states"):
        assert torch.equal(getattr(ragged, name), torch.where(inside, getattr(full, name), 0))
    assert (full.lengths == 9).all()
    assert full.is_scored.all()
    longer = E64.sample(ids, 12, seed=5)
    assert torch.equal(longer.tokens[:, :9], full.tokens)


def test_variable_sequences_begin_at_a_uniform_state() -> None:
    states = E64.sample(torch.zeros(30_000, dtype=torch.int64), (1, 50), seed=0).states[:, 0]
    counts = torch.bincount(states, minlength=6)
    assert chdtrc(5, float(((counts - 5000.0) ** 2 / 5000).sum())) > 1e-3


def test_a_switch_keeps_the_state_and_changes_nothing_before() -> None:
    ids = torch.arange(64).repeat(20)
    to = ids.flip(0)
    plain, switched = E64.sample(ids, 20, seed=7), E64.sample(ids, 20, seed=7, switch_to=to, switch_at=(3, 12))
    at = switched.switch_at
    assert sorted(set(at.tolist())) == list(range(3, 13))
    position = torch.arange(20)
    assert torch.equal(plain.tokens[position < at[:, None]], switched.tokens[position < at[:, None]])
    assert torch.equal(plain.states[position <= at[:, None]], switched.states[position <= at[:, None]])
    assert not torch.equal(plain.tokens, switched.tokens)
    assert torch.equal(switched.is_scored, position >= at[:, None])
    assert torch.equal(switched.task_by_position, torch.where(position < at[:, None], ids[:, None], to[:, None]))
    assert torch.equal(switched.task_ids, ids)
    assert torch.equal(switched.switch_to, to)
    same = E64.sample(ids, 20, seed=7, switch_to=ids, switch_at=4)
    assert torch.equal(same.tokens, plain.tokens)
    assert torch.equal(plain.task_by_position, ids[:, None].expand(-1, 20))


def test_a_switch_scores_what_is_inside_the_length() -> None:
    ids = torch.arange(64)
    drawn = E64.sample(ids, (1, 10), seed=7, switch_to=ids, switch_at=5)
    expected = [[5 <= t < n for t in range(10)] for n in drawn.lengths.tolist()]
    assert drawn.is_scored.tolist() == expected


@pytest.mark.parametrize("length", [0, -1, (3, 2), (0, 4), True, 2.5, (1, 2, 3), "9"], ids=str)
def test_bad_lengths(length: object) -> None:
    with pytest.raises(InputError, match="length"):
        TINY.sample([0], length, seed=0)


def test_lengths_of_any_kind() -> None:
    assert _same(TINY.sample(np.array([0, 3]), np.int64(4), seed=0), TINY.sample([0, 3], 4, seed=0))
    assert _same(TINY.sample([0, 3], [2, 4], seed=0), TINY.sample([0, 3], (2, 4), seed=0))


def test_bad_samples() -> None:
    with pytest.raises(InputError, match="task_ids = 16"):
        TINY.sample([0, 16], 3, seed=0)
    with pytest.raises(InputError, match="switch_to = 99"):
        TINY.sample([0], 3, seed=0, switch_to=[99], switch_at=1)
    with pytest.raises(InputError, match="both switch_to and switch_at"):
        TINY.sample([0], 3, seed=0, switch_to=[1])
    with pytest.raises(InputError, match="both switch_to and switch_at"):
        TINY.sample([0], 3, seed=0, switch_at=1)
    with pytest.raises(InputError, match="one task for each of 2"):
        TINY.sample([0, 1], 3, seed=0, switch_to=[1], switch_at=1)
    with pytest.raises(InputError, match="switch_at"):
        TINY.sample([0], 3, seed=0, switch_to=[1], switch_at=-1)
    with pytest.raises(InputError, match="seed"):
        TINY.sample([0], 3, seed=-1)
    assert TINY.sample([], 3, seed=0).tokens.shape == (0, 3)


def test_all_numbers_follow_the_seed() -> None:
    """States, tokens of equal states, lengths and steps of a switch, each by itself."""
    ids = torch.arange(64)
    a, b = (E64.sample(ids, 9, seed=seed) for seed in (0, 1))
    is_same = a.states == b.states
    assert not is_same.all()
    assert (a.tokens != b.tokens)[is_same].any()
    a, b = (E64.sample(ids, (1, 9), seed=seed, switch_to=ids.flip(0), switch_at=(0, 9)) for seed in (0, 1))
    assert not torch.equal(a.lengths, b.lengths)
    assert not torch.equal(a.switch_at, b.switch_at)
