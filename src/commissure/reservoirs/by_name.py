"""Networks, tasks and input maps by the names that the command line has for them.

Everything here can be sent to other processes: a null is a distribution of networks like the model it is drawn from.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from commissure.core.errors import InputError
from commissure.core.rng import generator
from commissure.reservoirs.block_model import HierarchicalSBM
from commissure.reservoirs.cells import ModuleInputs
from commissure.reservoirs.communities import louvain_hierarchy
from commissure.reservoirs.connectome import Connectome, Orientation
from commissure.reservoirs.datasets import hcp_s400
from commissure.reservoirs.inputs import listed, named, whole
from commissure.reservoirs.io_map import IOMap
from commissure.reservoirs.loading import load
from commissure.reservoirs.nulls import Preserve, rewire
from commissure.reservoirs.tasks import ChaoticForecast, MemoryCapacity, Multitask, NonlinearTransform, Task

__all__ = ["PRESETS", "NullModel", "TaskInputs", "models_by_name", "network_by_name", "task_by_name"]

PRESETS = ("milisav2025",)

_DATA = "hcp-s400"
_MOST_OUTPUTS = 10  # nodes of a module of a connectome that a readout reads, as published
_LEVELS = {0: "0 random", 1: "1 modular"}


@dataclass(frozen=True, eq=False)
class NullModel:
    """Rewired networks: of one connectome, or at each seed of the model's network of that seed."""

    source: Connectome | HierarchicalSBM
    preserve: Preserve

    def sample(self, seed: int) -> Connectome:
        """One null network."""
        network = self.source if isinstance(self.source, Connectome) else self.source.sample(seed)
        return rewire(network, preserve=self.preserve, seed=seed).connectome


@dataclass(frozen=True, kw_only=True)
class TaskInputs:
    """Where a task enters and is read, by modules: `ModuleInputs` for one input, else modules drawn by seed.

    `most_outputs`: reads so many nodes of each module, or the size of the smallest module.
    """

    task: Task
    which: Literal["random", "each"]
    n_outputs: int | None = None
    most_outputs: int | None = None

    def __call__(self, network: Connectome, seed: int) -> tuple[IOMap, ...]:
        """The maps of a network."""
        if not isinstance(self.task, Task):
            raise InputError("task", self.task, "a task", "task_by_name gives one")
        modules = network.modules()
        if isinstance(self.task, Multitask):
            return (self.task.io(modules, seed=seed),)
        if len(modules) <= self.task.n_inputs:
            allowed = f"fewer inputs than the network has modules, {len(modules)}"
            raise InputError("task", f"{self.task.n_inputs} inputs", allowed, "show NETWORK prints its modules")
        n_outputs = self.n_outputs
        if n_outputs is None and self.most_outputs is not None:
            n_outputs = min(whole("most_outputs", self.most_outputs, 1), *(len(module) for module in modules))
        if self.task.n_inputs == 1:
            return ModuleInputs(which=self.which, n_outputs=n_outputs)(network, seed)
        drawn = generator(seed, "input modules").choice(len(modules), self.task.n_inputs, replace=False).tolist()
        return (IOMap.from_modules(modules, inputs=drawn, n_outputs=n_outputs, seed=seed),)

    @classmethod
    def published(
        cls, task: Task, *, of_preset: bool, which: Literal["random", "each"] | None, n_outputs: int | None
    ) -> TaskInputs:
        """What is not given is as in bioRxiv 2025.06.20.660760: other for models than for connectomes."""
        which = which or ("random" if of_preset else "each")
        return cls(task=task, which=which, n_outputs=n_outputs, most_outputs=None if of_preset else _MOST_OUTPUTS)


def network_by_name(
    name: str,
    *,
    orientation: Orientation | None = None,
    variable: str | None = None,
    level: int | None = None,
    with_levels: bool = True,
    gamma: float = 1.0,
    n_runs: int = 100,
    seed: int = 0,
) -> Connectome:
    """A sample of a preset, the connectome "hcp-s400" or that of a file, with Louvain's modules unless it has some.

    >>> network_by_name("milisav2025", level=1, seed=2).n_nodes
    400
    """
    _require_text("network", name)
    if name in PRESETS:
        return HierarchicalSBM.from_preset(name, level=level).sample(seed)
    if level is not None:
        raise InputError("levels", level, "none: only presets have models of several levels")
    if name == _DATA:
        connectome = hcp_s400()
    elif Path(name).suffix:
        connectome = load(name, orientation=orientation, variable=variable)
    else:
        raise InputError("network", name, f"a file, {_DATA} or {', '.join(PRESETS)}")
    if not with_levels:
        return connectome
    found = louvain_hierarchy(connectome, gamma=gamma, n_runs=whole("runs", n_runs, 1), seed=seed)
    return connectome.with_levels(found.levels)


def models_by_name(
    name: str,
    *,
    levels: tuple[int, ...] = (),
    nulls: tuple[Preserve, ...] = (),
    orientation: Orientation | None = None,
    variable: str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """What a sweep compares: the levels of a preset, or one network; then nulls of the last of them.

    >>> list(models_by_name("milisav2025", levels=(0, 2), nulls=("degree",)))
    ['0 random', '2 levels', 'null: degree']
    """
    _require_text("network", name)
    for i, preserve in enumerate(nulls := tuple(listed("nulls", nulls))):
        named(f"nulls[{i}]", preserve, get_args(Preserve))
    models: dict[str, Any]
    source: Connectome | HierarchicalSBM
    if name in PRESETS:
        chosen = [HierarchicalSBM.from_preset(name, level=level) for level in listed("levels", levels)] or [
            HierarchicalSBM.from_preset(name)
        ]
        source = chosen[-1]
        models = {_LEVELS.get(model.level, f"{model.level} levels"): model for model in chosen}
    else:
        if levels:
            raise InputError("levels", levels, "none: only presets have models of several levels", "see --nulls")
        source = network_by_name(name, orientation=orientation, variable=variable, seed=seed)
        models = {Path(name).name: source}
    return models | {f"null: {preserve}": NullModel(source, preserve) for preserve in nulls}


def task_by_name(name: str, *, length: int = 2000, max_delay: int = 16) -> Task:
    """ "memory", "nonlinear", "multitask", or the name of a system to forecast; an unknown one lists the systems."""
    _require_text("task", name)
    if name == "memory":
        return MemoryCapacity(max_delay=max_delay, length=length)
    if name == "nonlinear":
        return NonlinearTransform(length=length)
    if name == "multitask":
        return Multitask(max_delay=max_delay, length=length)
    return ChaoticForecast(system=name, length=length)


def _require_text(argument: str, name: object) -> None:
    if not isinstance(name, str):
        raise InputError(argument, name, "a name")
