"""An endless stream of batches for `torch.utils.data.DataLoader`: fresh sequences in every batch.

Batches are numbered: batch i depends on the arguments and i alone.  Of R processes (ranks) that train together, the
k-th batch of rank r is number k R + r, and of n worker processes of a rank, worker w makes those with k mod n = w.

Guaranteed: no two ranks and no two workers ever make the same batch; a rank gets the same batches in the same order
for any number of workers (the loader's default order; with `in_order=False` the same batches in another order); after
k steps, R processes have used the batches that one process uses in k R steps.  Rows are not divided: with R processes
a step has R `batch_size` sequences.

A batch has variable lengths if asked; then each row is a sequence of its own that begins at a uniform state, which is
what an oracle assumes, and not a piece cut out of a longer one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import count

import torch
from torch.utils.data import IterableDataset, get_worker_info

from commissure.core.errors import InputError
from commissure.core.rng import generator, spawn
from commissure.metahmm.environment import MetaHMM
from commissure.metahmm.inputs import Ids, whole
from commissure.metahmm.sample import Sequences

__all__ = ["SequenceDataset"]


class SequenceDataset(IterableDataset[Sequences]):
    """Endless batches of sequences, each of a task drawn uniformly (with replacement) from `task_ids`.

    `length`, `switch_at`: as for `MetaHMM.sample`; with `switch_at` each row goes over to another task drawn from
    `task_ids`.  `start`: steps already made, to resume.  `rank`, `n_ranks`: this process among those that train
    together; by default those of `torch.distributed`, or of `torchrun` if it is not initialized yet.  They are read
    here, because a worker process may not know them.

    >>> from torch.utils.data import DataLoader
    >>> dataset = SequenceDataset(MetaHMM.from_preset("e64", seed=0), batch_size=4, length=(1, 32), seed=0)
    >>> loader = iter(DataLoader(dataset, batch_size=None))
    >>> bool((next(loader).tokens == dataset.batch(0).tokens).all())
    True
    """

    def __init__(
        self,
        env: MetaHMM,
        task_ids: Ids | None = None,
        *,
        batch_size: int,
        length: int | tuple[int, int],
        seed: int,
        switch_at: int | tuple[int, int] | None = None,
        start: int = 0,
        rank: int | None = None,
        n_ranks: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(env, MetaHMM):
            raise InputError("env", type(env).__name__, "a MetaHMM")
        self.env, self.length, self.seed, self.switch_at = env, length, seed, switch_at
        self.task_ids = env.task_ids if task_ids is None else env.check_tasks("task_ids", task_ids)
        if len(self.task_ids) == 0:
            raise InputError("task_ids", [], "one task at least")
        if len(self.task_ids) < 2 and switch_at is not None:
            raise InputError("task_ids", self.task_ids.tolist(), "two tasks at least to switch between")
        if (rank is None) != (n_ranks is None):
            raise InputError("rank, n_ranks", (rank, n_ranks), "both of them, or neither")
        self.batch_size, self.start = whole("batch_size", batch_size, 1), whole("start", start, 0)
        rank, n_ranks = (rank, n_ranks) if rank is not None else _processes()
        self.rank, self.n_ranks = whole("rank", rank, 0), whole("n_ranks", n_ranks, 1)
        if self.rank >= self.n_ranks:
            raise InputError("rank", self.rank, f"0 to n_ranks - 1 = {self.n_ranks - 1}")
        self.batch(0)

    def batch(self, index: int) -> Sequences:
        """Batch number `index` of all processes together."""
        seed = spawn(self.seed, "metahmm batch", whole("index", index, 0))
        rng, n = generator(seed, "tasks"), len(self.task_ids)
        first = rng.integers(n, size=self.batch_size)
        ids = self.task_ids[first]
        if self.switch_at is None:
            return self.env.sample(ids, self.length, seed=seed)
        other = (first + rng.integers(1, n, size=self.batch_size)) % n
        return self.env.sample(ids, self.length, seed=seed, switch_to=self.task_ids[other], switch_at=self.switch_at)

    def __iter__(self) -> Iterator[Sequences]:
        worker = get_worker_info()
        first, stride = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for step in count(self.start + first, stride):
            yield self.batch(step * self.n_ranks + self.rank)


def _processes() -> tuple[int, int]:
    """Rank and number of the processes that train together."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
