"""The stream of batches: the same for any number of workers, disjoint for ranks and workers, resumable."""

from __future__ import annotations

from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader

from commissure.core.errors import InputError
from commissure.metahmm import MetaHMM, SequenceDataset, Sequences, data

ENV = MetaHMM.from_preset("e64", seed=0)


def _dataset(**options: object) -> SequenceDataset:
    return SequenceDataset(ENV, **{"batch_size": 3, "length": (1, 8), "seed": 5, **options})


def _names(batches: object, n: int) -> list[tuple]:
    """What tells batches apart."""
    return [tuple(torch.cat((b.tokens.flatten(), b.task_ids)).tolist()) for b in islice(batches, n)]


EVERY = _names((_dataset().batch(i) for i in range(24)), 24)


def test_batches_are_numbered_and_differ() -> None:
    assert _names(_dataset(), 24) == EVERY
    assert len(set(EVERY)) == 24
    assert _names(_dataset(seed=6), 24) != EVERY
    assert _names(_dataset(), 3) == EVERY[:3]  # a second pass is the first one again


@pytest.mark.parametrize("n_workers", [0, 2])
def test_a_loader_gives_the_same_batches_for_any_number_of_workers(n_workers: int) -> None:
    """Workers that share nothing with this process, so that all they know travels with the dataset."""
    context = "spawn" if n_workers else None
    dataset = _dataset(rank=1, n_ranks=3, switch_at=(1, 4))
    loader = DataLoader(dataset, batch_size=None, num_workers=n_workers, multiprocessing_context=context)
    for index, batch in enumerate(islice(loader, 7)):
        expected = dataset.batch(3 * index + 1)
        assert isinstance(batch, Sequences)
        for value, wanted in zip(batch, expected, strict=True):
            assert torch.equal(value, wanted)


@pytest.mark.parametrize("n_ranks", [1, 2, 3])
@pytest.mark.parametrize("n_workers", [1, 2, 4])
def test_ranks_and_workers_share_the_batches_of_one_process(
    n_ranks: int, n_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = {}
    for rank in range(n_ranks):
        dataset = _dataset(rank=rank, n_ranks=n_ranks)
        for worker in range(n_workers):
            info = SimpleNamespace(id=worker, num_workers=n_workers)
            monkeypatch.setattr(data, "get_worker_info", lambda info=info: info)
            for turn, name in enumerate(_names(dataset, 24 // (n_ranks * n_workers))):
                step = turn * n_workers + worker  # the loader takes from its workers in turn
                assert name not in taken
                taken[name] = step * n_ranks + rank
    assert sorted(taken, key=taken.__getitem__) == EVERY


def test_it_resumes() -> None:
    assert _names(_dataset(start=4), 3) == EVERY[4:7]
    resumed = _dataset(start=4, rank=1, n_ranks=2)
    assert _names(resumed, 2) == [EVERY[9], EVERY[11]]


def test_tasks_are_uniform_over_those_given() -> None:
    given = torch.tensor([3, 9, 40])
    dataset = _dataset(task_ids=given, batch_size=3000, length=2)
    ids = dataset.batch(0).task_ids
    counts = torch.bincount(ids, minlength=64)
    assert counts.sum() == counts[given].sum() == 3000
    assert (counts[given] - 1000).abs().max() < 5 * 667**0.5
    everything = _dataset(batch_size=3000, length=2).batch(0).task_ids
    assert len(everything.unique()) == 64


def test_switches_go_to_another_task() -> None:
    given = torch.tensor([3, 9, 40])
    batch = _dataset(task_ids=given, batch_size=600, length=6, switch_at=(2, 4)).batch(0)
    pairs = torch.stack((batch.task_ids, batch.switch_to), 1).unique(dim=0, return_counts=True)
    assert pairs[0].tolist() == [[3, 9], [3, 40], [9, 3], [9, 40], [40, 3], [40, 9]]
    assert (pairs[1] - 100).abs().max() < 5 * 9.2
    assert sorted(batch.switch_at.unique().tolist()) == [2, 3, 4]


def test_ranks_come_from_torchrun_or_from_the_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert (_dataset().rank, _dataset().n_ranks) == (0, 1)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert (_dataset().rank, _dataset().n_ranks) == (1, 4)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    made = _dataset()
    monkeypatch.undo()  # as in a worker process, which knows no group
    assert (made.rank, made.n_ranks) == (2, 3)
    assert _names(made, 2) == [EVERY[2], EVERY[5]]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"task_ids": []}, "one task at least"),
        ({"task_ids": [64]}, "task_ids = 64"),
        ({"task_ids": [1], "switch_at": 2}, "two tasks at least"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 2.5}, "batch_size"),
        ({"rank": 0.5, "n_ranks": 2}, "rank"),
        ({"length": 0}, "length"),
        ({"switch_at": -1}, "switch_at"),
        ({"start": -1}, "start"),
        ({"rank": 1}, "both of them"),
        ({"rank": 2, "n_ranks": 2}, "0 to n_ranks - 1 = 1"),
        ({"seed": -1}, "seed"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_refused_when_the_dataset_is_made(options: dict[str, object], named: str) -> None:
    with pytest.raises(InputError, match=named):
        _dataset(**options)


def test_what_is_no_environment_and_no_number_is_refused() -> None:
    with pytest.raises(InputError, match="env = 'str'"):
        SequenceDataset("e64", batch_size=3, length=8, seed=0)
    for index in (-1, 0.5):
        with pytest.raises(InputError, match="index"):
            _dataset().batch(index)
