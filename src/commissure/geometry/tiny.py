"""A language model small enough to train on one core while everything about its geometry is logged.

    text -> byte-level BPE of `vocab` tokens, learned on the same text (bytes without the `hf` extra)
    model: pre-norm GPT, learned positions, MLPs of 4 dim, head of its own, all weights N(0, .02)
           (those that write into the residual stream: .02 / sqrt(2 n_blocks)); last norm with or without a gain
    AdamW, betas .9 and .95, linear warm-up, then constant or to 10 % by a cosine; gradients clipped at norm 1

The last tenth of the tokens is held out; the contexts that are looked at are drawn from it once, by a seed of their
own, so that every run and step looks at the same ones.  Looked at: the last token of each context.

| logged         | at every look                                                                              |
|----------------|---------------------------------------------------------------------------------------------|
| `trajectory`   | embeddings ("blocks.0:input"), what every later block is given, before and after the last norm |
| `held_out`     | mean loss of the token after each context, nats                                              |
| `alignment`    | Spearman correlation of its probability with the longest-context one of the training tokens,  |
|                | nan where the latter are all equal                                                           |

`loss="balanced"` weighs every token by one over its frequency (at most 20 times that of a token of mean frequency):
skewed frequencies are what the theory makes responsible for the late fall of the rank.  arXiv 2509.23024, section 5.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from commissure.core.config import Config
from commissure.core.errors import CommissureWarning, DegenerateError, InputError
from commissure.core.rng import generator, isolated
from commissure.geometry.infinity_gram import InfinityGram, NextToken, infinity_gram_alignment
from commissure.geometry.recorder import GeometryRecorder, log_steps
from commissure.geometry.tracing import TraceFrame
from commissure.geometry.trajectory import Trajectory
from commissure.nn import Stack
from commissure.train import TrainConfig, train

__all__ = ["TinyRun", "TinySetting", "byte_pair_tokens", "train_tiny"]

_STD = 0.02
_WRITERS = ("mixer.out.weight", "mlp.down.weight")  # of a block, into the residual stream
_CAP = 20.0  # of a rare token's weight: one seen once would outweigh a thousand others


class TinySetting(Config):
    """Sizes and training; the defaults are the smallest model found with all three phases."""

    dim: int = Field(default=16, ge=2)
    n_blocks: int = Field(default=1, ge=1)
    heads: int = Field(default=2, ge=1)
    vocab: int = Field(default=1024, ge=257)
    context: int = Field(default=8, ge=2)
    final_gain: bool = Field(default=False, description="whether the last norm learns a gain and a bias")
    loss: Literal["cross_entropy", "balanced"] = "cross_entropy"
    steps: int = Field(default=5000, ge=1)
    batch_size: int = Field(default=32, ge=1)
    lr: float = Field(default=1e-2, gt=0)
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = Field(default=100, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    looks: int = Field(default=90, ge=2, description="at most, evenly in log(1 + step)")
    n_contexts: int = Field(default=2560, ge=2)
    n_folds: int = Field(default=16, ge=1)


@dataclass(frozen=True, eq=False)
class TinyRun:
    """The trained model and what was logged; `held_out` and `alignment` at `steps`, `losses` at every step."""

    model: Stack
    trajectory: Trajectory
    steps: Int64[np.ndarray, " looks"]
    held_out: Float64[np.ndarray, " looks"]
    alignment: Float64[np.ndarray, " looks"]
    losses: Float64[np.ndarray, " steps"]


def byte_pair_tokens(
    text: str, *, vocab: int = 1024, special: Sequence[str] = ("<unk>",)
) -> Int64[np.ndarray, " tokens"]:
    """Token numbers of a text by a byte-level BPE learned on it; its bytes where `tokenizers` is not installed.

    `special` are tokens of their own wherever they occur: WikiText writes "<unk>" for every rare word.

    >>> tokens = byte_pair_tokens("the cat and the <unk> and the cat " * 20, vocab=260)
    >>> 100 < len(tokens) <= 680, int(tokens.max()) < 260
    (True, True)
    """
    if not isinstance(text, str) or not text:
        raise InputError("text", text, "a string of one letter at least")
    if isinstance(vocab, bool) or not isinstance(vocab, int) or vocab < 256 + len(special):
        raise InputError("vocab", vocab, f"an integer >= {256 + len(special)}")
    if isinstance(special, str) or not all(isinstance(one, str) and one for one in special):
        raise InputError("special", special, "a list of tokens, such as ['<unk>']")
    if importlib.util.find_spec("tokenizers") is None:
        warnings.warn("without `tokenizers` (extra `hf`) tokens are bytes", CommissureWarning, stacklevel=2)
        return np.frombuffer(text.encode(), np.uint8).astype(np.int64)
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learner = trainers.BpeTrainer(
        vocab_size=vocab,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(special),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), learner)  # no entry reaches over a line's end
    return np.array(tokenizer.encode(text).ids, np.int64)


def train_tiny(
    tokens: Int64[np.ndarray, " tokens"],
    setting: TinySetting | None = None,
    *,
    seed: int,
    frames: Sequence[TraceFrame] = ("raw", "unit"),
    progress: Callable[[int, int, float], None] | None = None,
) -> TinyRun:
    """Train on all but the last tenth of `tokens` and look at the rest as it goes.

    Alpha is fitted on ranks 1 to dim / 2.  Too few tokens for one context a look: `InputError`.

    >>> tokens = generator(0, "doctest").integers(0, 300, 2000)
    >>> setting = TinySetting(vocab=300, steps=3, looks=3, n_contexts=64, dim=8)
    >>> train_tiny(tokens, setting, seed=0).steps.tolist()
    [0, 1, 3]
    """
    setting = setting or TinySetting()
    taught, held = _split(tokens, setting)
    model, looked = _model(setting, seed), _contexts(held, setting)
    # What the corpus says of the token after each context: the same at every look.
    corpus = InfinityGram(taught).next_tokens(looked)
    corpus = NextToken(*(found[:, -1:] for found in corpus))
    inputs, answers = (torch.from_numpy(part) for part in (looked[:, :-1], looked[:, -1]))
    recorder = GeometryRecorder(
        [inputs],
        sites=["blocks.*:input", "norm:input", "norm"],
        steps=log_steps(setting.steps, count=setting.looks),
        frames=frames,
        n_folds=setting.n_folds,
        fit_range=(1, setting.dim // 2),
        forward=lambda _, batch: model.hidden(model.embed(batch)),
    )
    told: list[tuple[int, float, float]] = []

    def look(step: int) -> None:
        if not recorder.on_step(step, model):
            return
        with torch.no_grad():
            log_probs = model(inputs)[0][:, -1].gather(1, answers[:, None])
        told.append((step, -float(log_probs.double().mean()), _alignment(log_probs, corpus)))

    def after(step: int, steps: int, loss: float) -> None:
        look(step)
        if progress is not None:
            progress(step, steps, loss)

    look(0)
    weights = _weights(taught, setting)
    found = train(model, _draws(taught, setting, seed), loss=lambda rows: _loss(model, rows, weights),
                  config=_config(setting), seed=seed, progress=after)  # fmt: skip
    steps, held_out, alignment = zip(*told, strict=True)
    return TinyRun(
        model, recorder.trajectory, np.array(steps), np.array(held_out), np.array(alignment), np.array(found.losses)
    )


def _split(tokens: Int64[np.ndarray, " tokens"], setting: TinySetting) -> tuple[np.ndarray, np.ndarray]:
    found = np.asarray(tokens)
    if found.ndim != 1 or not np.issubdtype(found.dtype, np.integer):
        raise InputError("tokens", (found.shape, str(found.dtype)), "integers (tokens,)")
    if len(found) < 20 * (setting.context + 1):
        raise InputError("tokens", len(found), f"at least {20 * (setting.context + 1)}, twenty contexts")
    if found.min() < 0 or found.max() >= setting.vocab:
        raise InputError("tokens", (int(found.min()), int(found.max())), f"all within [0, {setting.vocab})")
    cut = len(found) * 9 // 10
    return found[:cut].astype(np.int64), found[cut:].astype(np.int64)


def _contexts(held: Int64[np.ndarray, " tokens"], setting: TinySetting) -> Int64[np.ndarray, "contexts context_plus_1"]:
    """Drawn once for all seeds of the training."""
    starts = generator(0, "contexts").integers(0, len(held) - setting.context, setting.n_contexts)
    return held[starts[:, None] + np.arange(setting.context + 1)]


def _model(setting: TinySetting, seed: int) -> Stack:
    with isolated(seed, "tiny model"):
        model = Stack(
            ["attention"] * setting.n_blocks, setting.dim, vocab=setting.vocab, heads=setting.heads, norm="layer",
            positions=setting.context, start_token=False,
        )  # fmt: skip
        if not setting.final_gain:
            model.norm = nn.LayerNorm(setting.dim, elementwise_affine=False)
        writers = tuple(f"blocks.{i}.{name}" for i in range(setting.n_blocks) for name in _WRITERS)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=_STD / (2 * setting.n_blocks) ** 0.5 if name in writers else _STD)
        assert set(writers) <= dict(model.named_parameters()).keys()
    return model


def _draws(
    taught: Int64[np.ndarray, " tokens"], setting: TinySetting, seed: int
) -> Callable[[int], Int64[Tensor, "batch context_plus_1"]]:
    def draw(step: int) -> Int64[Tensor, "batch context_plus_1"]:
        starts = generator(seed, "tiny batch", step).integers(0, len(taught) - setting.context, setting.batch_size)
        return torch.from_numpy(taught[starts[:, None] + np.arange(setting.context + 1)])

    return draw


def _loss(model: Stack, rows: Int64[Tensor, "batch context_plus_1"], weights: Tensor | None) -> Tensor:
    log_probs = model(rows[:, :-1])[0]
    return F.nll_loss(log_probs.flatten(0, 1), rows[:, 1:].flatten(), weight=weights)


def _alignment(log_probs: Float32[Tensor, "contexts 1"], corpus: NextToken) -> float:
    """nan where the corpus gives every answer the same probability: no ranks, and no reason to end a run."""
    try:
        return infinity_gram_alignment(log_probs.numpy(), corpus)
    except DegenerateError:
        return float("nan")


def _weights(taught: Int64[np.ndarray, " tokens"], setting: TinySetting) -> Tensor | None:
    """Of a balanced loss: one over a token's frequency, capped, 1 on average over the text."""
    if setting.loss == "cross_entropy":
        return None
    shares = np.bincount(taught, minlength=setting.vocab) / len(taught)
    rare = np.minimum(1 / np.maximum(shares * setting.vocab, 1e-12), _CAP)
    return torch.from_numpy(rare / (shares @ rare)).float()


def _config(setting: TinySetting) -> TrainConfig:
    warm = min(setting.warmup_steps / setting.steps, 0.999)
    constant = 1 - warm - 1e-9 if setting.schedule == "constant" else 0.0
    return TrainConfig(
        steps=setting.steps, batch_size=setting.batch_size, lr=setting.lr, final_lr=0.1, betas=(0.9, 0.95),
        weight_decay=setting.weight_decay, warmup=warm, constant=max(0.0, constant), clip=1.0, keep="last",
    )  # fmt: skip
