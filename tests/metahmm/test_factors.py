"""Tasks and their factors: numbering, splits, and pairs of values that training never shows."""

from __future__ import annotations

import itertools

import pytest
import torch

from commissure.core.errors import InputError
from commissure.core.rng import generator
from commissure.metahmm import MetaHMM, Split
from commissure.metahmm.factors import FactorSpace

SPACE = FactorSpace({"a": 4, "b": 2, "c": 1, "d": 3})


def test_ids_are_the_row_major_order() -> None:
    every = list(itertools.product(range(4), range(2), range(1), range(3)))
    assert SPACE.to_factors(torch.arange(24)).tolist() == [list(values) for values in every]
    assert SPACE.to_ids(every).tolist() == list(range(24))


@pytest.mark.parametrize("name", ["small", "medium", "default"])
def test_round_trip(name: str) -> None:
    env = MetaHMM.from_preset(name, seed=0)
    factors = env.task_to_factors(env.task_ids)
    assert torch.equal(env.factors_to_task(factors), env.task_ids)
    assert torch.equal(factors.amax(0) + 1, torch.tensor(env.factor_sizes))
    assert torch.equal(env.factors_to_task(factors.flip(0).int()), env.task_ids.flip(0))


def _check_partition(split: Split, n_tasks: int) -> None:
    together = torch.cat(split[:3])
    assert torch.equal(together.sort().values, torch.arange(n_tasks))  # disjoint and exhaustive at once
    for part in split[:3]:
        assert torch.equal(part, part.sort().values)


@pytest.mark.parametrize("n_pairs", [0, 1, 6])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_splits_are_disjoint_and_exhaustive(n_pairs: int, seed: int) -> None:
    env = MetaHMM.from_preset("small", seed=15)
    split = env.split(1000, seed=seed, n_held_out_pairs=n_pairs)
    _check_partition(split, env.n_tasks)
    assert len(split.val) == 1000
    assert len(split.held_out) == len(set(split.held_out)) == n_pairs
    assert (len(split.ood) > 0) == (n_pairs > 0)


@pytest.mark.parametrize("name", ["small", "e64", "tiny"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_held_out_pairs_are_unseen_and_their_values_are_seen(name: str, seed: int) -> None:
    env = MetaHMM.from_preset(name, seed=0)
    split = env.split(2, seed=seed, n_held_out_pairs=2)
    column = {factor: index for index, factor in enumerate(env.factor_names)}
    seen, unseen = (env.task_to_factors(ids) for ids in (torch.cat((split.train, split.val)), split.ood))
    explained = torch.zeros(len(unseen), dtype=torch.bool)
    for factor, value, other_factor, other_value in split.held_out:
        i, j = column[factor], column[other_factor]
        assert not ((seen[:, i] == value) & (seen[:, j] == other_value)).any()
        assert (seen[:, i] == value).any()
        assert (seen[:, j] == other_value).any()
        explained |= (unseen[:, i] == value) & (unseen[:, j] == other_value)
    assert explained.all()


def test_no_value_is_held_out_altogether() -> None:
    """Two pairs of two binary factors can take a value away: (0, 0) and (0, 1) would."""
    space = FactorSpace({"a": 2, "b": 2, "c": 2})
    for seed in range(60):
        split = space.split(0, seed=seed, n_held_out_pairs=2)
        assert all(len(column.unique()) == 2 for column in space.to_factors(split.train).T)


def test_validation_tasks_are_uniform_and_depend_on_the_seed() -> None:
    drawn = [SPACE.split(6, seed=seed).val.tolist() for seed in range(400)]
    counts = torch.bincount(torch.tensor(drawn).reshape(-1), minlength=24)
    assert (counts - 100).abs().max() < 5 * (100 * 0.75) ** 0.5
    assert drawn[0] == SPACE.split(6, seed=0).val.tolist() != drawn[1]


def test_bad_factors() -> None:
    for ids in ([24], [-1]):
        with pytest.raises(InputError, match="task ids from 0 to 23"):
            SPACE.to_factors(ids)
    with pytest.raises(InputError, match="integers"):
        SPACE.to_factors([1.5])
    with pytest.raises(InputError, match=r"ids = \['a'\]: expected numbers"):
        SPACE.to_factors(["a"])
    with pytest.raises(InputError, match=r"ids = .*axes \(n\)"):
        SPACE.to_factors(3)
    with pytest.raises(InputError, match="a, b, c, d"):
        SPACE.to_ids([[0, 0, 0]])
    with pytest.raises(InputError, match=r"factors \(d\) = 3: expected 0 to 2"):
        SPACE.to_ids([[0, 0, 0, 3]])
    assert SPACE.to_factors([]).shape == (0, 4)


def test_training_tasks_show_every_value() -> None:
    """Validation tasks drawn without a look at the values would often leave one out of training."""
    few = FactorSpace({"a": 3, "b": 2})
    drawn_freely = 0
    for seed in range(40):
        for n_val, n_pairs in ((2, 1), (3, 0)):
            split = few.split(n_val, seed=seed, n_held_out_pairs=n_pairs)
            _check_partition(split, 6)
            assert len(split.val) == n_val
            assert [len(column.unique()) for column in few.to_factors(split.train).T] == [3, 2]
        order = generator(seed, "metahmm split").permutation(6)
        drawn_freely += sorted(order[:3].tolist()) == split.val.tolist()
    assert 0 < drawn_freely < 40
    with pytest.raises(InputError, match="n_val = 4: expected 0 to 3: training needs 3 tasks"):
        few.split(4, seed=0)


def test_bad_splits() -> None:
    for n_val in (-1, 24, 21, 2.5, True):
        with pytest.raises(InputError, match="n_val"):
            SPACE.split(n_val, seed=0)
    for n_pairs in (-1, 1.0, False):
        with pytest.raises(InputError, match="n_held_out_pairs"):
            SPACE.split(1, seed=0, n_held_out_pairs=n_pairs)
    for size in (0, 2.5):
        with pytest.raises(InputError, match=r"factors\['a'\]"):
            FactorSpace({"a": size})
    with pytest.raises(InputError, match="factors = 3"):
        FactorSpace(3)
    with pytest.raises(InputError, match="every value stays seen"):
        SPACE.split(1, seed=0, n_held_out_pairs=100)


def test_held_out_pairs_depend_on_the_seed() -> None:
    drawn = [SPACE.split(0, seed=seed, n_held_out_pairs=1).held_out for seed in range(20)]
    assert drawn[0] == SPACE.split(5, seed=0, n_held_out_pairs=1).held_out
    assert len(set(drawn)) > 5
