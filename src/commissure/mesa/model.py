"""A sequence model and what a task needs around it.

    tokens              Stack with a vocabulary
    compression         the same, and a small network that reads every token from the last output and a position's code
    vectors             linear map, Stack without vocabulary, linear map; or a mixer alone

The decoder of the compression task is MAD's (arXiv 2403.17844, appendix B.6): RMS norm, linear, GELU, twice, then RMS
norm and linear, with sinusoidal positions.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Shaped
from pydantic import Field
from torch import Tensor, nn

from commissure.core.config import Config
from commissure.core.errors import InputError
from commissure.core.files import read_tensors, replacing
from commissure.core.mixer import SequenceMixer
from commissure.core.rng import isolated
from commissure.mesa.tasks import Task
from commissure.mesa.tasks import task as find_task
from commissure.nn.names import MIXERS, ROTARY, MixerFactory, mixer
from commissure.nn.stack import Stack

__all__ = ["ModelConfig", "TaskModel"]

_FORMAT = "commissure.mesa.TaskModel"


class ModelConfig(Config):
    """Sizes of the model; the defaults are those of the small MQAR experiment (two mixers of width 64, no MLPs)."""

    dim: int = Field(default=64, ge=1)
    layers: int = Field(default=2, ge=1, description="blocks; several mixers take turns")
    heads: int | None = Field(default=2, ge=1)
    head_dim: int | None = Field(default=16, ge=1)
    mlp: Literal["gelu", "swiglu", "none"] = "none"
    mlp_ratio: float = Field(default=3.0, gt=0)
    positions: Literal["none", "rotary"] | None = Field(
        default=None, description="None: rotary where there is attention"
    )
    alone: bool = Field(default=False, description="vector tasks: one mixer as wide as the vectors and nothing else")


class TaskModel(nn.Module):
    """(batch, time) tokens to log-probabilities (batch, time, vocab), or vectors to vectors.

    `mixers`: names or factories `dim -> mixer` that take turns over `config.layers` blocks, or the name of a whole
    MesaNet ("mesanet-140m").

    >>> model = TaskModel(find_task("mqar", vocab=32), ["gru"], config=ModelConfig(dim=8), seed=0)
    >>> model(torch.zeros(1, 5, dtype=torch.int64)).shape
    torch.Size([1, 5, 32])
    """

    body: Any  # a Stack, or a mixer alone

    def __init__(
        self, task: Task, mixers: Sequence[str | MixerFactory], *, config: ModelConfig | None = None, seed: int = 0
    ) -> None:
        super().__init__()
        self.task, self.config = task, ModelConfig() if config is None else config
        if isinstance(mixers, str) or not mixers:
            raise InputError("mixers", mixers, "a sequence of one or more names or factories", f"pass [{mixers!r}]")
        self.names = tuple(entry if isinstance(entry, str) else None for entry in mixers)
        with isolated(seed, "model"):
            self.body = self._alone(mixers) if self.config.alone else self._stack(mixers)
            self.inward = self.outward = self.decoder = None
            if task.vocab is None and not self.config.alone:
                self.inward = nn.Linear(task.input_dim, self.config.dim)
                self.outward = nn.Linear(self.config.dim, task.output_dim)
            if task.vocab is not None and task.reads == "last":
                self.decoder = Decoder(self.config.dim, task.vocab)

    def forward(self, inputs: Shaped[Tensor, "batch time *input"]) -> Float[Tensor, "batch time output"]:
        """Log-probabilities of the targets, or the targets' estimates."""
        if self.decoder is not None:
            last = self.body.hidden(self.body.embed(inputs))[0][:, -1]
            return self.decoder(last, inputs.shape[1])
        if self.inward is None or self.outward is None:
            return self.body(inputs)[0]
        return self.outward(self.body(self.inward(inputs))[0])

    def save(self, path: str | Path) -> None:
        """Write weights, names of mixers, sizes and the task as safetensors.

        A model of tokens without a decoder is its Stack: `Stack.load` reads the file too.
        """
        from safetensors.torch import save_file

        is_stack = isinstance(self.body, Stack) and self.inward is None and self.decoder is None
        is_stack = is_stack and None not in self.body.config.mixers
        metadata = {
            "format": "commissure.nn.Stack" if is_stack else _FORMAT,
            "config": self.body.config.model_dump_json() if is_stack else "",
            "model": self.config.model_dump_json(),
            "mixers": json.dumps(self.names),
            "task": json.dumps({"name": self.task.name, "sizes": self.task.model_dump()}),
        }
        weights = {name.removeprefix("body."): t.detach().cpu().contiguous() for name, t in self.state_dict().items()}
        with replacing(path) as partial:
            save_file(weights, partial, metadata=metadata)

    @classmethod
    def load(cls, path: str | Path, *, mixer: MixerFactory | None = None) -> TaskModel:
        """Read a file of `save`; `mixer` makes the blocks it stores no name for.  `InputError` for another file."""
        metadata, weights = read_tensors(path)
        if not {"model", "mixers", "task"} <= metadata.keys():
            raise InputError("path", str(path), "a file written by commissure mesa fit", "check which model it holds")
        try:
            names, stored = json.loads(metadata["mixers"]), json.loads(metadata["task"])
            kind = find_task(stored["name"], **stored["sizes"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError("path", str(path), "the metadata of a TaskModel", str(error)) from None
        if None in names and mixer is None:
            raise InputError("mixer", None, "the factory the model was made with", "pass load(path, mixer=factory)")
        entries = [mixer if name is None else name for name in names]
        model = cls(kind, entries, config=ModelConfig.from_json(metadata["model"]))  # type: ignore[arg-type]
        own = {name.removeprefix("body."): t for name, t in model.state_dict().items()}
        if {name: t.shape for name, t in own.items()} != {name: t.shape for name, t in weights.items()}:
            raise InputError("path", str(path), "the weights of its configuration", "the file is damaged")
        for name, tensor in own.items():
            tensor.copy_(weights[name])
        return model.eval()

    @staticmethod
    def is_saved(path: str | Path) -> bool:
        """Whether `path` is a file written by `save`."""
        return Path(path).is_file() and {"model", "mixers", "task"} <= read_tensors(path)[0].keys()

    def _stack(self, mixers: Sequence[str | MixerFactory]) -> Stack:
        if isinstance(mixers[0], str) and "mesanet-" in mixers[0]:
            return self._mesanet(mixers)
        for name in self.names:
            if name is not None and name not in MIXERS:
                fix = "or one of mesanet-SIZE, hawk-mesanet-SIZE with SIZE 140m, 440m or 940m, alone"
                raise InputError("mixer", name, f"one of {', '.join(sorted(MIXERS))}", fix)
        config, entries = self.config, list(islice(cycle(mixers), self.config.layers))
        positions = config.positions or ("rotary" if ROTARY.keys() & set(self.names) else "none")
        return Stack(
            entries, config.dim, vocab=self.task.vocab, heads=config.heads, head_dim=config.head_dim, mlp=config.mlp,
            mlp_ratio=config.mlp_ratio, positions=positions, tie=self.task.reads == "last", start_token=False,
        )  # fmt: skip

    def _mesanet(self, names: Sequence[str | MixerFactory]) -> Stack:
        """A whole model of the published sizes, "mesanet-140m" or "hawk-mesanet-140m", with the task's vocabulary."""
        from commissure.mesa.config import MesaNetConfig, build_stack

        kind, _, size = str(names[0]).rpartition("-")
        if kind not in ("mesanet", "hawk-mesanet") or len(names) != 1:
            raise InputError("mixers", self.names, "one name, mesanet-SIZE or hawk-mesanet-SIZE, for a whole model")
        if self.task.vocab is None or self.task.reads == "last":
            raise InputError("mixers", self.names, "a task of next tokens for a MesaNet", "name a mixer: mesa")
        if self.config != ModelConfig():
            raise InputError("config", self.config, "the default sizes: a MesaNet has its own", "name a mixer: mesa")
        preset = MesaNetConfig.from_preset(size, hybrid="hawk" if kind == "hawk-mesanet" else None)
        own = {"vocab": self.task.vocab, "bos_token_id": None, "eos_token_id": None}
        return build_stack(MesaNetConfig(**{**preset.model_dump(), **own}))

    def _alone(self, mixers: Sequence[str | MixerFactory]) -> SequenceMixer:
        if self.task.vocab is not None or self.task.input_dim != self.task.output_dim:
            raise InputError("alone", True, "a task of vectors, as wide as their targets", "use lds, or alone=False")
        if len(mixers) != 1:
            raise InputError("mixers", self.names, "one mixer where it stands alone")
        return mixer(mixers[0], self.task.input_dim)


class Decoder(nn.Module):
    """log p(token t) = f(h + code(t)), f: norm, linear, GELU, norm, linear, GELU, norm, linear."""

    def __init__(self, dim: int, vocab: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(2):
            layers += [nn.RMSNorm(dim, eps=1e-6), nn.Linear(dim, dim), nn.GELU()]
        self.layers = nn.Sequential(*layers, nn.RMSNorm(dim, eps=1e-6), nn.Linear(dim, vocab))

    def forward(self, h: Float[Tensor, "batch dim"], time: int) -> Float[Tensor, "batch time vocab"]:
        """Log-probabilities of the tokens 0 .. time - 1."""
        return self.layers(h[:, None] + _code(time, h.shape[1]).to(h)).log_softmax(-1)


def _code(time: int, dim: int) -> Float[Tensor, "time dim"]:
    """Sines, then cosines, of t w_f with w_f = 10000^(-f / (F - 1)) (arXiv 1706.03762, section 3.5)."""
    n = -(-dim // 2)
    frequency = 10_000.0 ** -(torch.arange(n) / max(1, n - 1))
    angle = torch.arange(time)[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], 1)[:, :dim]
