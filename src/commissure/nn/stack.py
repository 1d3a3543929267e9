"""Stack: the one backbone and language model, residual blocks around any sequence mixers.

    x <- x + mixer(norm(x)),   x <- x + mlp(norm(x))        for each block, then a last norm
    p(token_t | tokens_<t) = softmax(c tanh(z / c)),   z = W x_{t-1},   x_{-1} from a learned start vector

Without a vocabulary a Stack maps vectors to vectors and is itself a mixer; with one it is a predictor whose
`log_probs` begins with the prior.  Pre-norm blocks: arXiv 2002.04745; RMS norm: arXiv 1910.07467; SwiGLU: arXiv
2002.05202; soft cap: arXiv 2408.00118.  Initialization: fan-in normal, residual-writing matrices of the MLPs divided by
sqrt(2 blocks) (Radford et al. 2019); mixers keep their own.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from commissure.core.config import Config
from commissure.core.errors import InputError
from commissure.core.files import read_tensors, replacing
from commissure.core.mixer import SequenceMixer, State
from commissure.core.rng import isolated
from commissure.nn.decay import exempt, exempted
from commissure.nn.names import ROTARY, MixerFactory, mixer
from commissure.nn.padding import check_batch, check_lengths, check_sequence, check_step, valid, zero_padding

__all__ = ["Stack", "StackConfig", "StackState"]

_FORMAT = "commissure.nn.Stack"


class StackConfig(Config):
    """What a checkpoint stores: a mixer's name, or None where a factory made it."""

    mixers: tuple[str | None, ...] = Field(min_length=1)
    dim: int = Field(ge=1)
    vocab: int | None = Field(default=None, ge=1)
    heads: int | None = Field(default=None, ge=1)
    head_dim: int | None = Field(default=None, ge=1)
    mlp: Literal["gelu", "swiglu", "none"] = "gelu"
    mlp_ratio: float = Field(default=4.0, gt=0)
    norm: Literal["rms", "layer", "none"] = "rms"
    positions: Literal["none", "rotary"] | Annotated[int, Field(ge=1, strict=True)] = "none"
    tie: bool = False
    embed_scale: float = Field(default=1.0, gt=0)
    soft_cap: float | None = Field(default=None, gt=0)
    start_token: bool = True


class StackState(NamedTuple):
    """Vectors consumed by each row (the start vector counts), and one state a block."""

    position: Int[Tensor, " batch"]
    blocks: State


class Block(nn.Module):
    """One residual block: a mixer and, unless `mlp` is "none", a position-wise network."""

    mixer: Any  # a SequenceMixer that is also a module

    def __init__(self, mixer: SequenceMixer, config: StackConfig) -> None:
        super().__init__()
        self.mixer = mixer
        self.norm = _norm(config)
        self.mlp = None if config.mlp == "none" else MLP(config)
        self.mlp_norm = None if config.mlp == "none" else _norm(config)

    def forward(self, x: Tensor, state: State | None, lengths: Tensor | None) -> tuple[Tensor, State]:
        mixed, state = self.mixer(self.norm(x), state, lengths=lengths)
        return self._add(x, mixed), state

    def step(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        """`forward` for one vector a row."""
        mixed, state = self.mixer.step(self.norm(x_t), state)
        return self._add(x_t, mixed), state

    def _add(self, x: Tensor, mixed: Tensor) -> Tensor:
        """The residual stream after the mixer's output."""
        x = x + mixed
        return x if self.mlp is None or self.mlp_norm is None else x + self.mlp(self.mlp_norm(x))


class MLP(nn.Module):
    """W_2 gelu(W_1 x), or W_2 (silu(W_g x) * W_1 x); hidden width mlp_ratio * dim."""

    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        dim, hidden = config.dim, max(1, round(config.mlp_ratio * config.dim))
        self.is_gated = config.mlp == "swiglu"
        self.up = nn.Linear(dim, 2 * hidden if self.is_gated else hidden, bias=not self.is_gated)
        self.down = nn.Linear(hidden, dim, bias=not self.is_gated)
        nn.init.normal_(self.up.weight, std=dim**-0.5)
        nn.init.normal_(self.down.weight, std=(2 * len(config.mixers) * hidden) ** -0.5)
        for bias in (self.up.bias, self.down.bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        up = self.up(x)
        if self.is_gated:
            gate, value = up.chunk(2, -1)
            return self.down(F.silu(gate) * value)
        return self.down(F.gelu(up))


class Stack(nn.Module):
    """Residual blocks around `mixers`, one entry a block: the name of an `nn` mixer or a factory `dim -> mixer`.

    `vocab=None`: a backbone, (batch, time, dim) to the same, a `SequenceMixer`.  `vocab=V`: a predictor on tokens;
    `log_probs` gives (batch, time + 1, V), `forward` and `step` the log-probabilities of the token after each one.
    `heads`, `head_dim`: of every named mixer that has heads.  `positions`: "none", "rotary" (turns the queries and keys
    of "attention" and "sliding_window") or an integer, the size of a learned table added to the input.  `tie`: the
    output matrix is the embedding.  `embed_scale` multiplies embeddings, `soft_cap` = c bounds logits to (-c, c).
    `start_token`: a learned start vector, so that position 0 of `log_probs` is the prior.

    >>> model = Stack(["gru", "attention"], 8, vocab=5)
    >>> model.log_probs(torch.tensor([[1, 2, 3]])).exp().sum(-1).shape
    torch.Size([1, 4])
    """

    def __init__(
        self,
        mixers: Sequence[str | MixerFactory],
        dim: int,
        *,
        vocab: int | None = None,
        heads: int | None = None,
        head_dim: int | None = None,
        mlp: Literal["gelu", "swiglu", "none"] = "gelu",
        mlp_ratio: float = 4.0,
        norm: Literal["rms", "layer", "none"] = "rms",
        positions: Literal["none", "rotary"] | int = "none",
        tie: bool = False,
        embed_scale: float = 1.0,
        soft_cap: float | None = None,
        start_token: bool = True,
    ) -> None:
        super().__init__()
        if isinstance(mixers, str):
            raise InputError("mixers", mixers, "a sequence with one entry a block", f"pass [{mixers!r}]")
        self.config = config = StackConfig(
            mixers=tuple(entry if isinstance(entry, str) else None for entry in mixers),
            dim=dim, vocab=vocab, heads=heads, head_dim=head_dim, mlp=mlp, mlp_ratio=mlp_ratio, norm=norm,
            positions=positions, tie=tie, embed_scale=embed_scale, soft_cap=soft_cap, start_token=start_token,
        )  # fmt: skip
        _check_combination(config)
        self.blocks = nn.ModuleList(Block(_make(entry, config), config) for entry in mixers)
        self.norm = _norm(config)
        if isinstance(positions, int):
            self.position_table = nn.Parameter(torch.randn(positions, dim) * dim**-0.5)
        if vocab is not None:
            self.embedding = nn.Parameter(torch.randn(vocab, dim) * dim**-0.5)
            if not tie:
                self.head = nn.Parameter(torch.randn(vocab, dim) * dim**-0.5)
            if start_token:
                self.start = nn.Parameter(torch.randn(dim) * dim**-0.5)

    @property
    def dim(self) -> int:
        """Width of the residual stream."""
        return self.config.dim

    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> StackState:
        """The state before the first input; a predictor has already consumed its start vector."""
        parameter = next(self.parameters())
        device, dtype = device or parameter.device, dtype or parameter.dtype
        mixers = (block.mixer.init_state(batch_size, device=device, dtype=dtype) for block in self._blocks())
        state = StackState(torch.zeros(batch_size, device=device, dtype=torch.int64), _bundle(*mixers))
        if self.config.vocab is None or not self.config.start_token:
            return state
        return self.hidden_step(self._starts(batch_size).to(dtype), state)[1]

    def step(self, x_t: Tensor, state: StackState) -> tuple[Tensor, StackState]:
        """One vector (batch, dim), or one token (batch,), in; one vector, or log-probabilities (batch, vocab), out."""
        if self.config.vocab is None:
            return self.hidden_step(x_t, state)
        if x_t.ndim != 1:
            raise InputError("x_t", tuple(x_t.shape), "tokens of shape (batch,)")
        check_batch(state, x_t.shape[0])
        h, state = self.hidden_step(self.embed(x_t), state)
        return self.logits(h).log_softmax(-1), state

    def forward(
        self, x: Tensor, state: StackState | None = None, *, lengths: Int[Tensor, " batch"] | None = None
    ) -> tuple[Tensor, StackState]:
        """A whole stretch of vectors (batch, time, dim) or tokens (batch, time)."""
        if self.config.vocab is None:
            return self.hidden(x, state, lengths=lengths)
        tokens = self._masked_tokens(x, lengths)
        state = self.init_state(x.shape[0]) if state is None else state
        h, state = self.hidden(self.embed(tokens), state, lengths=lengths)
        return self.logits(h).log_softmax(-1), state

    def log_probs(self, tokens: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time_plus_1 vocab"]:
        """Log-probabilities of each next token, the prior first: entry t has seen `tokens[:, :t]`."""
        tokens = self._masked_tokens(tokens, None)
        x = torch.cat([self._starts(tokens.shape[0])[:, None], self.embed(tokens)], 1)
        return self.logits(self.hidden(x)[0]).log_softmax(-1)

    def prior(self, batch_size: int) -> Float[Tensor, "batch vocab"]:
        """Log-probabilities of the first token, which `init_state` and `step` leave out."""
        return self.logits(self.hidden(self._starts(batch_size)[:, None])[0][:, 0]).log_softmax(-1)

    def embed(self, tokens: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch dim"]:
        """Token vectors, scaled; a token outside [0, vocab) raises `InputError`."""
        vocab = self._vocab()
        if tokens.dtype.is_floating_point or tokens.dtype == torch.bool:
            raise InputError("tokens", tokens.dtype, "an integer tensor")
        if tokens.numel() and (int(tokens.min()) < 0 or int(tokens.max()) >= vocab):
            raise InputError("tokens", (int(tokens.min()), int(tokens.max())), f"all within [0, {vocab})")
        return F.embedding(tokens, self.embedding) * self.config.embed_scale

    def hidden(
        self,
        x: Float[Tensor, "batch time dim"],
        state: StackState | None = None,
        *,
        lengths: Int[Tensor, " batch"] | None = None,
    ) -> tuple[Float[Tensor, "batch time dim"], StackState]:
        """Vectors through the blocks and the last norm; without a state, from nothing (not even the start vector)."""
        check_sequence(x, self.dim, state, lengths)
        x = zero_padding(x, lengths)
        batch, time = x.shape[:2]
        position = x.new_zeros(batch, dtype=torch.int64) if state is None else state.position
        x = self._place(x, position[:, None] + torch.arange(time, device=x.device))
        states = []
        for index, block in enumerate(self._blocks()):
            x, after = block(x, None if state is None else state.blocks[index], lengths)
            states.append(after)
        return self.norm(x), StackState(position + (time if lengths is None else lengths), _bundle(*states))

    def hidden_step(
        self, x_t: Float[Tensor, "batch dim"], state: StackState
    ) -> tuple[Float[Tensor, "batch dim"], StackState]:
        """`hidden` for one vector a row."""
        check_step(x_t, self.dim, state)
        x_t = self._place(x_t, state.position)
        states = []
        for block, before in zip(self._blocks(), state.blocks, strict=True):
            x_t, after = block.step(x_t, before)
            states.append(after)
        return self.norm(x_t), StackState(state.position + 1, _bundle(*states))

    def logits(self, h: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch vocab"]:
        """Scores of the next token, soft-capped."""
        self._vocab()
        scores = F.linear(h, self.embedding if self.config.tie else self.head)
        cap = self.config.soft_cap
        return scores if cap is None else cap * torch.tanh(scores / cap)

    def save(self, path: str | Path) -> None:
        """Write the weights as safetensors, the configuration (names of mixers only) in the metadata."""
        from safetensors.torch import save_file

        metadata = {"format": _FORMAT, "config": self.config.model_dump_json()}
        weights = {name: t.detach().contiguous() for name, t in self.state_dict().items()}
        with replacing(path) as partial:
            save_file(weights, partial, metadata=metadata)

    @classmethod
    def load(cls, path: str | Path, *, mixer: MixerFactory | None = None) -> Stack:
        """Read a checkpoint of `save`; `mixer` makes the blocks it stores no name for.

        Raises `InputError` for a file that is not one, or whose weights do not fit its configuration.
        """
        metadata, weights = read_tensors(path)
        if metadata.get("format") != _FORMAT:
            raise InputError("path", str(path), f"a checkpoint written by Stack.save (format {_FORMAT!r})")
        config = StackConfig.from_json(metadata.get("config", ""))
        if None in config.mixers and mixer is None:
            block = config.mixers.index(None)
            raise InputError("mixer", None, f"the factory that made block {block}", "pass load(path, mixer=factory)")
        entries = [entry if entry is not None else mixer for entry in config.mixers]
        with isolated(0, "load"):  # the weights drawn here are replaced below; the caller's generator stays put
            model = cls(entries, **config.model_dump(exclude={"mixers"}))  # type: ignore[arg-type]
        _check_weights(model, weights)
        marked = exempted(model)
        model.load_state_dict(weights, assign=True)
        exempt(model, marked)
        return model

    def _blocks(self) -> Iterable[Block]:
        return cast(Iterable[Block], self.blocks)

    def _starts(self, batch: int) -> Float[Tensor, "batch dim"]:
        if self.config.vocab is None or not self.config.start_token:
            allowed = "a vocabulary and a start vector, which the prior needs"
            raise InputError("start_token", self.config.start_token, allowed, "pass vocab= and start_token=True")
        return (self.start * self.config.embed_scale).expand(batch, -1)

    def _vocab(self) -> int:
        if self.config.vocab is None:
            raise InputError("vocab", None, "a vocabulary", "this Stack is a backbone: pass vocab= to predict tokens")
        return self.config.vocab

    def _masked_tokens(self, tokens: Tensor, lengths: Tensor | None) -> Int[Tensor, "batch time"]:
        if tokens.ndim != 2:
            raise InputError("tokens", tuple(tokens.shape), "shape (batch, time)")
        if lengths is None:
            return tokens
        check_lengths(lengths, *tokens.shape)
        return tokens.masked_fill(~valid(lengths, tokens.shape[1]), 0)

    def _place(self, x: Tensor, positions: Int[Tensor, "*batch"]) -> Tensor:
        """Add learned positions."""
        if not isinstance(self.config.positions, int):
            return x
        if positions.numel() and int(positions.max()) >= self.config.positions:
            raise InputError("positions", int(positions.max()), f"below the learned table's {self.config.positions}")
        return x + F.embedding(positions, self.position_table)


def _bundle(*states: State) -> State:
    """The blocks' states as one State."""
    return _bundle_type(len(states))(*states)


@cache
def _bundle_type(n_blocks: int) -> type:
    """A NamedTuple type with one field a block."""
    return namedtuple(f"Blocks{n_blocks}", [f"block_{index}" for index in range(n_blocks)])


def _check_combination(config: StackConfig) -> None:
    if config.positions == "rotary" and not ROTARY.keys() & set(config.mixers):
        allowed = f"a block named {' or '.join(map(repr, ROTARY))} to turn"
        raise InputError("positions", "rotary", allowed, "use positions='none'")
    if config.vocab is None and (config.tie or config.soft_cap is not None or config.embed_scale != 1.0):
        raise InputError("vocab", None, "a vocabulary where tie, soft_cap or embed_scale is given")


def _make(entry: str | MixerFactory, config: StackConfig) -> SequenceMixer:
    rotary = config.positions == "rotary"
    return mixer(entry, config.dim, heads=config.heads, head_dim=config.head_dim, rotary=rotary)


def _norm(config: StackConfig) -> nn.Module:
    kinds = {"rms": lambda: nn.RMSNorm(config.dim, eps=1e-6), "layer": lambda: nn.LayerNorm(config.dim)}
    return kinds.get(config.norm, nn.Identity)()


def _check_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Every tensor of the model, no other, each of its shape and finite."""
    expected = model.state_dict()
    for name in sorted(expected.keys() ^ weights.keys()):
        problem = "a tensor of this name" if name in expected else "no tensor of this name"
        raise InputError(f"checkpoint[{name!r}]", "missing" if name in expected else "present", problem)
    for name, weight in weights.items():
        if weight.shape != expected[name].shape:
            raise InputError(f"checkpoint[{name!r}]", tuple(weight.shape), f"shape {tuple(expected[name].shape)}")
        if weight.dtype.is_floating_point and not bool(weight.isfinite().all()):
            raise InputError(f"checkpoint[{name!r}]", "not finite", "finite numbers", "the file is damaged")
