"""One model trained by several processes: DDP (arXiv 2006.15704) or FSDP2 (arXiv 2304.11277), started by `torchrun`.

Every process draws the same global batch and takes its own rows, so that the run does not depend on how many there
are: the mean over the processes of (processes * its rows' summed loss / the global count) is the loss of one process,
and the averaged gradients are its gradients up to rounding.

    with joined("ddp") as processes:
        model = processes.wrap(model)
        share = processes.rows(batch_size)
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed
from torch import Tensor, nn

from commissure.core.errors import InputError
from commissure.nn.decay import exempt, exempted

__all__ = ["Processes", "Strategy", "distribute_like", "joined", "whole"]

Strategy = Literal["single", "ddp", "fsdp"]


@dataclass(frozen=True)
class Processes:
    """This process among those that train together; the default is one alone."""

    strategy: Strategy = "single"
    rank: int = 0
    size: int = 1

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module to call and to train: itself, its DDP wrapper, or itself with its parameters sharded.

        FSDP shards each entry of a `ModuleList` and then what is left.
        """
        if self.strategy == "ddp":
            return nn.parallel.DistributedDataParallel(module)
        if self.strategy == "fsdp":
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            marked = exempted(module)
            mesh = init_device_mesh(next(module.parameters()).device.type, (self.size,))
            for part in [block for m in module.modules() if isinstance(m, nn.ModuleList) for block in m] + [module]:
                part.register_forward_hook(_without_views)
                fully_shard(part, mesh=mesh)
            exempt(module, marked)
        return module

    def unwrap(self, module: nn.Module) -> nn.Module:
        """The module `wrap` was given."""
        return module.module if isinstance(module, nn.parallel.DistributedDataParallel) else module

    def rows(self, batch_size: int) -> slice:
        """This process's rows of a global batch.

        >>> [Processes("ddp", rank, 2).rows(5) for rank in range(2)]
        [slice(0, 2, None), slice(2, 5, None)]
        """
        return slice(self.rank * batch_size // self.size, (self.rank + 1) * batch_size // self.size)

    def mean(self, value: Tensor) -> float:
        """Mean of a scalar over the processes."""
        if self.size == 1:
            return float(value)
        total = value.detach().double().clone()
        torch.distributed.all_reduce(total)
        return float(total) / self.size

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            torch.distributed.barrier()


@contextmanager
def joined(strategy: Strategy) -> Iterator[Processes]:
    """Join the processes `torchrun` started (gloo on a CPU, NCCL on GPUs); "single" joins nothing."""
    if strategy not in ("single", "ddp", "fsdp"):
        raise InputError("strategy", strategy, "'single', 'ddp' or 'fsdp'")
    if strategy == "single":
        yield Processes()
        return
    if "LOCAL_RANK" not in os.environ:
        fix = "start the same command by torchrun --nproc-per-node=N"
        raise InputError("strategy", strategy, "a process started by torchrun", fix)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield Processes(strategy, torch.distributed.get_rank(), torch.distributed.get_world_size())
        torch.distributed.barrier()  # a process that ends before another has saved could take it along
    finally:
        gc.collect()  # DDP's reducers hold the group; one freed as late as at the interpreter's exit can abort
        torch.distributed.destroy_process_group()


def whole(tensor: Any) -> Tensor:
    """The full tensor of a sharded one, on the CPU; every process must call it."""
    return (tensor.full_tensor() if _is_sharded(tensor) else tensor).detach().cpu()


def distribute_like(tensor: Tensor, like: Any) -> Tensor:
    """A full tensor placed as `like` is: on its device and, where that is sharded, in its shards."""
    if _is_sharded(like):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
    return tensor.to(like.device)


def _without_views(module: nn.Module, arguments: Any, output: Any) -> Any:
    """FSDP hangs its backward hooks on what a module returns; changed in place, a view would lose them."""
    from torch.utils._pytree import tree_map_only

    return tree_map_only(Tensor, lambda t: t.clone() if t.requires_grad and t._is_view() else t, output)


def _is_sharded(tensor: Any) -> bool:
    """Whether it is a DTensor; importing that type takes half a second, so its mark is looked for."""
    return hasattr(tensor, "device_mesh")
