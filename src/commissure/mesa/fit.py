"""Training a model on a task, and measuring it: what `commissure mesa fit` and the claims call.

    fit(task("mqar", n_pairs=16, length=64, vocab=128), "mesa", seed=0)

Token tasks: cross-entropy over the scored positions, accuracy.  Vector tasks: mean squared error.  RegBench: a
prediction is right where the automaton allows it, and the total variation distance to the automaton's distribution is
given too (arXiv 2401.12973, section 3.3).  Both distributions are over symbols, as the automaton's is there: what a
model leaves for the separator, since a string may end anywhere, is taken out and the rest renormalized.  The public
code of that paper leaves it in, which charges the true automaton too.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from commissure.core.errors import InputError
from commissure.core.rng import generator, spawn
from commissure.mesa.model import ModelConfig, TaskModel
from commissure.mesa.tasks import RegBench, Task, TaskBatch
from commissure.mesa.tasks.batch import Split
from commissure.nn.decay import exempt
from commissure.nn.names import MixerFactory
from commissure.train import Checkpoint, Processes, TrainConfig, train
from commissure.train.parallel import whole

__all__ = ["Evaluation", "FitConfig", "FitResult", "evaluate", "fit"]

_CHUNK = 64  # sequences evaluated at once


class FitConfig(TrainConfig):
    """How a model is trained on a task; `keep="last"`, because the validations are on the test split."""

    steps: int = Field(default=600, ge=1)
    batch_size: int = Field(default=32, ge=1)
    lr: float = Field(default=5e-3, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    validate_every: int = Field(default=100, ge=1, description="steps between evaluations; the last step has one")
    keep: Literal["last"] = "last"
    examples: int | None = Field(default=None, ge=1, description="size of the training set; None: new in every step")
    test_size: int = Field(default=256, ge=1, description="sequences of an evaluation")


@dataclass(frozen=True)
class Evaluation:
    """`value` is the accuracy (fraction) or the mean squared error; by_position has None where nothing is scored."""

    metric: str
    value: float
    n_scored: int
    by_position: tuple[float | None, ...]
    nats: float | None = None
    total_variation: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)


class FitResult(NamedTuple):
    """The model in evaluation mode, one loss a step, (step, value) of the evaluations, and the last one whole."""

    model: TaskModel
    losses: tuple[float, ...]
    evaluations: tuple[tuple[int, float], ...]
    final: Evaluation


class Share(NamedTuple):
    """This process's rows; its summed loss times `scale` has the mean over the processes that the whole batch has."""

    batch: TaskBatch
    scale: float


def fit(
    task: Task,
    mixer: str | MixerFactory | Sequence[str | MixerFactory],
    *,
    model: ModelConfig | None = None,
    config: FitConfig | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int, float], None] | None = None,
    checkpoint: Checkpoint | None = None,
    processes: Processes | None = None,
) -> FitResult:
    """Train a model of these mixers on the task; the result depends on the arguments alone.

    `checkpoint`: a killed run goes on from there, bit for bit; a factory has no name, so that its `key` must tell it
    from others.  `processes`: of `train.joined`; every process of
    torchrun calls `fit` with the same arguments and returns the whole model.
    """
    config = FitConfig() if config is None else config
    processes = Processes() if processes is None else processes
    mixers = [mixer] if isinstance(mixer, str) or callable(mixer) else list(mixer)
    made = TaskModel(task, mixers, config=model, seed=seed).to(device)
    _exempt(made)
    if config.batch_size < processes.size:
        raise InputError("batch_size", config.batch_size, f"at least one row for each of {processes.size} processes")
    if checkpoint is not None:
        if None in made.names and not checkpoint.key:
            fix = "a factory has no name: pass Checkpoint(path, key=...) that says what it makes"
            raise InputError("checkpoint.key", checkpoint.key, "not empty where a mixer is a factory", fix)
        key = f"{task.name} {task.model_dump()} {made.names} {made.config.model_dump_json()} {checkpoint.key}"
        checkpoint = checkpoint._replace(key=key)
    result_model = copy.deepcopy(made) if processes.strategy == "fsdp" else made
    wrapped = processes.wrap(made)

    def score() -> float:
        measured = evaluate(made, task, seed=spawn(seed, "test"), n_sequences=config.test_size)
        return measured.value if measured.metric == "accuracy" else -measured.value

    result = train(
        wrapped,
        _Source(task, config, seed, processes, device).draw,
        loss=lambda share: _summed_loss(wrapped(share.batch.inputs), share.batch) * share.scale,
        config=config,
        seed=seed,
        validate=score,
        progress=progress,
        checkpoint=checkpoint,
        processes=processes,
    )
    if result_model is not made:
        result_model.load_state_dict({name: whole(t) for name, t in made.state_dict().items()})
    final = evaluate(result_model.eval(), task, seed=spawn(seed, "test"), n_sequences=config.test_size)
    return FitResult(result_model, result.losses, tuple((step, abs(value)) for step, value in result.scores), final)


@torch.no_grad()
def evaluate(
    model: nn.Module, task: Task, *, seed: int = 0, n_sequences: int = 256, split: Split = "test"
) -> Evaluation:
    """Measure a model on sequences of the task; by default of the test split."""
    batch = task.batch(seed, n_sequences, split=split)
    device = next(model.parameters()).device
    predicted = torch.cat([model(part.to(device)).cpu() for part in batch.inputs.split(_CHUNK)])
    if task.vocab is None:
        error = (predicted - batch.targets).double().square().mean(-1)
        return Evaluation("mse", *_means(error, batch.mask))
    variation, right = None, predicted.argmax(-1) == batch.targets
    if isinstance(task, RegBench):
        truth = task.distributions(seed, n_sequences, split=split)
        scored = batch.mask & (truth.sum(-1) > 0)
        symbols, allowed = predicted[..., : task.n_symbols].double().softmax(-1), truth[..., : task.n_symbols]
        distance = 0.5 * (symbols - allowed).abs().sum(-1)
        variation = float(distance[scored].mean())
        right = torch.where(scored, allowed.gather(-1, symbols.argmax(-1, keepdim=True))[..., 0] > 0, right)
    nats = float(_negative_log(predicted, batch.targets)[batch.mask].double().mean())
    return Evaluation("accuracy", *_means(right.double(), batch.mask), nats=nats, total_variation=variation)


class _Source:
    """The rows this process trains on in a step, a function of seed and step."""

    def __init__(
        self, task: Task, config: FitConfig, seed: int, processes: Processes, device: torch.device | str
    ) -> None:
        self.task, self.config, self.seed, self.processes, self.device = task, config, seed, processes, device
        self.examples = None if config.examples is None else task.batch(spawn(seed, "examples"), config.examples)

    def draw(self, step: int) -> Share:
        """This process's rows of the batch of this step."""
        size = self.config.batch_size
        if self.examples is None:
            batch = self.task.batch(spawn(self.seed, "train", step), size)
        else:
            chosen = torch.tensor(self._chosen(step))
            batch = TaskBatch(*(part[chosen] for part in self.examples))
        scale = self.processes.size / max(1, int(batch.mask.sum()))
        rows = self.processes.rows(size)
        return Share(TaskBatch(*(part[rows].to(self.device) for part in batch)), scale)

    def _chosen(self, step: int) -> list[int]:
        """Rows of the training set: each epoch is one permutation of it."""
        n, size = int(self.config.examples or 0), self.config.batch_size
        places = range(step * size, (step + 1) * size)
        orders = {e: generator(self.seed, "order", e).permutation(n) for e in {place // n for place in places}}
        return [int(orders[place // n][place % n]) for place in places]


def _summed_loss(predicted: Float[Tensor, "batch time output"], batch: TaskBatch) -> Float[Tensor, ""]:
    """Cross-entropy or squared error, summed over the scored positions."""
    if batch.targets.ndim == 2:
        error = _negative_log(predicted, batch.targets)
    else:
        error = (predicted - batch.targets).square().mean(-1)
    return error.masked_fill(~batch.mask, 0.0).sum()


def _negative_log(predicted: Float[Tensor, "batch time vocab"], targets: Tensor) -> Float[Tensor, "batch time"]:
    return -predicted.gather(-1, targets[..., None])[..., 0]


def _means(values: Float[Tensor, "batch time"], mask: Tensor) -> tuple[float, int, tuple[float | None, ...]]:
    """Mean over what is scored, how much that is, and the mean of each position."""
    counts = mask.sum(0)
    sums = values.masked_fill(~mask, 0.0).sum(0)
    by_position = tuple(s / n if n else None for s, n in zip(sums.tolist(), counts.tolist(), strict=True))
    total = int(counts.sum())
    return (float(sums.sum()) / total if total else math.nan), total, by_position


def _exempt(model: TaskModel) -> None:
    """Matrices and convolutions decay; embeddings, norms and biases do not (arXiv 2506.05233, appendix G)."""
    tables = ("embedding", "position_table")
    exempt(model, [name for name, p in model.named_parameters() if p.ndim < 2 or name.endswith(tables)])
