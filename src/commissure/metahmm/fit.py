"""Training on an environment's stream: implicit predictors, conditional predictors, task samplers; every batch is new.

    implicit       -log p(x_{t+1} | x_<=t)                  a Stack or Hugging Face causal language model
    conditional    -log p_dec(x_{t+1} | x_<=t, c)           SoftPrefix; c known factors or an independent context's code
    sampler        -log q(c | x_<=t)                        FactorPosterior, LatentFlow

Each is a mean over all sequences and positions 0 .. T (tokens 1 .. T for the predictors), minimized by `train.train`.

| paper | `size` | layers | heads | width | parameters at 50 tokens |
|---|---|---|---|---|---|
| gpt_smaller | "1.1m" | 4 | 4 | 128 | 1.07 M |
| gpt_small | "2m" | 6 | 6 | 128 | 1.98 M |
| gpt_med | "6.3m" | 6 | 8 | 256 | 6.33 M |
| gpt_large | "25m" | 8 | 8 | 512 | 25.2 M |
| - | "cpu" | 2 | 4 | 64 | 0.10 M at 10 tokens |

Heads of the paper's sizes are 64 wide whatever the width.  Deviations: rotary positions (the paper: scaled sinusoidal),
RMS norms, and a learned start token (the paper has none, so that its first prediction follows the first token).
arXiv 2506.16288.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int, Shaped
from pydantic import Field
from torch import Tensor, nn

from commissure.core.errors import InputError
from commissure.core.rng import generator, isolated, spawn
from commissure.metahmm.backbones import backbone
from commissure.metahmm.conditional import SoftPrefix, pooled_codes
from commissure.metahmm.environment import MetaHMM
from commissure.metahmm.inputs import whole
from commissure.metahmm.predictor_inputs import checked_environment
from commissure.metahmm.samplers import FactorPosterior, LatentFlow
from commissure.nn.names import ROTARY, MixerFactory
from commissure.nn.stack import Stack
from commissure.train import Checkpoint, TrainConfig, train

__all__ = ["ContextCodes", "FitConfig", "FitResult", "KnownFactors", "TaskCodes", "fit", "implicit_stack"]

_SIZES = {  # layers, heads, width, head width
    "1.1m": (4, 4, 128, 64),
    "2m": (6, 6, 128, 64),
    "6.3m": (6, 8, 256, 64),
    "25m": (8, 8, 512, 64),
    "cpu": (2, 4, 64, 16),
}
_SCALE_CODES = 512  # codes that the flow's standardization is measured on


class FitConfig(TrainConfig):
    """How a model is trained: the defaults are the CPU-scale demo's, `from_preset("paper")` the published run's."""

    steps: int = Field(default=4000, ge=1)
    batch_size: int = Field(default=32, ge=1)
    length: int = Field(default=32, ge=1, description="tokens of a sequence")
    lr: float = Field(default=4e-3, gt=0)
    weight_decay: float = Field(default=1e-2, ge=0)
    warmup: float = Field(default=0.05, ge=0, lt=1)
    keep: Literal["last"] = "last"

    @classmethod
    def from_preset(cls, name: str) -> FitConfig:
        """ "cpu" or "paper" (constant rate, 2.56 G tokens); an unknown name lists them."""
        presets = {"cpu": cls(), "paper": _paper()}
        if name not in presets:
            raise InputError("name", name, f"one of {', '.join(presets)}")
        return presets[name]


def _paper() -> FitConfig:
    return FitConfig(
        steps=50_000, batch_size=256, length=200, lr=1e-3, betas=(0.9, 0.999), warmup=0.0, final_lr=1.0
    )  # fmt: skip


class FitResult(NamedTuple):
    """One loss a step (nats); the model is trained in place and left in evaluation mode."""

    model: nn.Module
    losses: tuple[float, ...]


@runtime_checkable
class TaskCodes(Protocol):
    """What a task is called during training."""

    key: str  # tells checkpoints apart

    def __call__(self, task_ids: Int[Tensor, " batch"], *, seed: int) -> Shaped[Tensor, "batch code_dim"]:
        """The code of each task."""


class KnownFactors:
    """The factors themselves."""

    def __init__(self, env: MetaHMM) -> None:
        self.env, self.key = checked_environment(env), "factors"

    def __call__(self, task_ids: Int[Tensor, " batch"], *, seed: int) -> Int[Tensor, "batch factors"]:
        """Row by row; `seed` is not used."""
        return self.env.task_to_factors(task_ids)


class ContextCodes:
    """Label-free: a language model's hidden states pooled over an independent sequence of the task.

    The model is copied as it is now, so that codes keep their meaning if it is trained further.
    """

    def __init__(self, env: MetaHMM, lm: nn.Module, *, length: int = 100) -> None:
        self.env = checked_environment(env)
        _check_vocab(lm, env, exactly=False)
        self.lm, self.length = copy.deepcopy(lm).eval(), whole("length", length, 1)
        weights = hashlib.sha256()
        for tensor in lm.state_dict().values():
            weights.update(tensor.detach().cpu().float().numpy().tobytes())
        self.key = f"context {length} {weights.hexdigest()}"

    def __call__(self, task_ids: Int[Tensor, " batch"], *, seed: int) -> Float[Tensor, "batch code_dim"]:
        """A new sequence for each task."""
        device = next(self.lm.parameters()).device
        return pooled_codes(self.lm, self.env.sample(task_ids, self.length, seed=seed).tokens.to(device))


class Batch(NamedTuple):
    """Sequences, and the codes of their tasks where they are asked for."""

    tokens: Int[Tensor, "batch time"]
    codes: Shaped[Tensor, "batch code_dim"] | None


def implicit_stack(size: str, *, vocab: int, mixer: str | MixerFactory = "attention", seed: int = 0) -> Stack:
    """A predictor of one of the sizes above, every block with the same mixer.

    >>> sum(p.numel() for p in implicit_stack("1.1m", vocab=50).parameters())
    1065216
    """
    vocab = whole("vocab", vocab, 1)
    if size not in _SIZES:
        raise InputError("size", size, f"one of {', '.join(_SIZES)}")
    if not isinstance(mixer, str) and not callable(mixer):
        raise InputError("mixer", mixer, "the name of a mixer, or a factory")
    layers, heads, dim, head_dim = _SIZES[size]
    positions: Literal["rotary", "none"] = "rotary" if mixer in ROTARY else "none"
    with isolated(seed, "model"):
        return Stack([mixer] * layers, dim, vocab=vocab, heads=heads, head_dim=head_dim, positions=positions)


def fit(
    model: nn.Module,
    env: MetaHMM,
    *,
    tasks: Int[Tensor, " tasks"] | Sequence[int] | None = None,
    codes: TaskCodes | None = None,
    config: FitConfig | None = None,
    seed: int = 0,
    progress: Callable[[int, int, float], None] | None = None,
    checkpoint: Checkpoint | None = None,
) -> FitResult:
    """Train `model` in place on fresh sequences of tasks drawn uniformly from `tasks` (default: all).

    The objective follows from the model: a language model predicts; a `SoftPrefix` predicts given `codes`; a
    `FactorPosterior` or `LatentFlow` infers them.  `codes` defaults to `KnownFactors`.  The result depends on the
    arguments alone; with `checkpoint` a killed run goes on, bit for bit.

    >>> env = MetaHMM.from_preset("e64", seed=0)
    >>> model = Stack(["gru"], 8, vocab=env.n_obs)
    >>> len(fit(model, env, config=FitConfig(steps=2, batch_size=4, length=6)).losses)
    2
    """
    config = FitConfig() if config is None else config
    checked_environment(env)
    for name, value, kind in (
        ("config", config, FitConfig),
        ("codes", codes, TaskCodes),
        ("checkpoint", checkpoint, Checkpoint),
    ):
        if value is not None and not isinstance(value, kind):
            raise InputError(name, type(value).__name__, f"a {kind.__name__}, or None")
    tasks = env.task_ids if tasks is None else env.check_tasks("tasks", tasks)
    if not len(tasks):
        raise InputError("tasks", tuple(tasks.shape), "task ids of shape (n,), n >= 1")
    is_implicit = not isinstance(model, (SoftPrefix, FactorPosterior, LatentFlow))
    lm = model if is_implicit else model.lm
    _check_vocab(lm, env, exactly=is_implicit or isinstance(model, SoftPrefix))  # type: ignore[arg-type]
    if is_implicit and codes is not None:
        raise InputError("codes", type(codes).__name__, "None for a model that is not told the task")
    codes = KnownFactors(env) if codes is None and not is_implicit else codes
    if isinstance(model, LatentFlow) and codes is not None and (checkpoint is None or not checkpoint.path.exists()):
        drawn = _tasks_of(tasks, _SCALE_CODES, spawn(seed, "scale"))
        model.set_scale(codes(drawn, seed=spawn(seed, "scale", "context")))
    if checkpoint is not None:
        checkpoint = checkpoint._replace(key=_key(model, env, tasks, codes, checkpoint))
    device = next(model.parameters()).device

    def draw(step: int) -> Batch:
        chosen = _tasks_of(tasks, config.batch_size, spawn(seed, "tasks", step))
        tokens = env.sample(chosen, config.length, seed=spawn(seed, "sequences", step)).tokens
        code = None if codes is None else codes(chosen, seed=spawn(seed, "context", step)).to(device)
        return Batch(tokens.to(device), code)

    result = train(
        model, draw, loss=lambda batch: _loss(model, batch), config=config, seed=seed, progress=progress,
        checkpoint=checkpoint,
    )  # fmt: skip
    return FitResult(model, result.losses)


def _check_vocab(lm: nn.Module, env: MetaHMM, *, exactly: bool) -> None:
    """A predictor has the environment's tokens; what only reads them may know more."""
    vocab = backbone(lm).vocab
    if vocab < env.n_obs or (exactly and vocab > env.n_obs):
        raise InputError("vocab", vocab, f"the environment's n_obs = {env.n_obs}", f"make the model with {env.n_obs}")


def _loss(model: nn.Module, batch: Batch) -> Float[Tensor, ""]:
    if batch.codes is None:
        log_probs = backbone(model).log_probs(batch.tokens)
    elif isinstance(model, SoftPrefix):
        log_probs = model.log_probs(batch.tokens, batch.codes[:, None])[:, 0]
    else:
        return model.loss(batch.tokens, batch.codes)  # type: ignore[operator]
    return -log_probs[:, :-1].gather(-1, batch.tokens[..., None]).mean()


def _tasks_of(tasks: Int[Tensor, " tasks"], n: int, seed: int) -> Int[Tensor, " n"]:
    """Uniform draws with replacement."""
    return tasks[torch.from_numpy(generator(seed).integers(len(tasks), size=n))]


def _key(
    model: nn.Module,
    env: MetaHMM,
    tasks: Int[Tensor, " tasks"],
    codes: TaskCodes | None,
    checkpoint: Checkpoint,
) -> str:
    """What a checkpoint must have been written with, besides the configuration and the seed."""
    chosen = hashlib.sha256(json.dumps(tasks.tolist()).encode()).hexdigest()
    stack = model.config.model_dump_json() if isinstance(model, Stack) else ""
    named = codes.key if codes is not None else ""
    return f"{type(model).__name__} {stack} {env.digest} {chosen} {named} {checkpoint.key}"
