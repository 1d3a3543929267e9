"""One face for the language models a predictor is built on: a `Stack` and any Hugging Face causal language model.

Vectors in, because a context code is a vector: both give token vectors and the vector the first prediction follows (a
Stack's learned start, the embedding of `bos_token_id`), run vectors to log-probabilities, and stream from States whose
rows `core.mixer.select` can repeat.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from commissure.core.errors import InputError
from commissure.core.mixer import State
from commissure.metahmm.inputs import whole
from commissure.metahmm.predictor_inputs import checked_tensor
from commissure.nn.attention import Attention
from commissure.nn.stack import Stack

__all__ = ["Backbone", "CausalLM", "StackLM", "backbone", "flops_per_token"]

_LOOKUPS = ("embedding", "position_table", "start")  # parameters read by index: no multiplication


@runtime_checkable
class Backbone(Protocol):
    """What `SoftPrefix`, pooled codes and the latent flow ask of a language model; a `SequencePredictor` too."""

    dim: int
    vocab: int

    def embed(self, tokens: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch dim"]:
        """Token vectors; a token outside [0, vocab) raises `InputError`."""

    def start(self, batch: int) -> Float[Tensor, "batch dim"]:
        """The vector the prior follows."""

    def hidden(self, x: Float[Tensor, "batch time dim"]) -> Float[Tensor, "batch time dim"]:
        """Outputs of the last norm."""

    def run(
        self, x: Float[Tensor, "batch time dim"], state: State | None = None
    ) -> tuple[Float[Tensor, "batch time vocab"], State]:
        """Log-probabilities after each vector, and the state after the last."""

    def log_probs(self, tokens: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time_plus_1 vocab"]:
        """Contract 2."""


def backbone(lm: nn.Module) -> Backbone:
    """The face of a Stack with a vocabulary and a start token, or of a Hugging Face causal language model.

    >>> backbone(Stack(["gru"], 8, vocab=5)).log_probs(torch.tensor([[1, 2]])).shape
    torch.Size([1, 3, 5])
    """
    if isinstance(lm, Stack):
        return StackLM(lm)
    if all(hasattr(lm, name) for name in ("get_input_embeddings", "get_output_embeddings", "config")):
        return CausalLM(lm)
    raise InputError("lm", type(lm).__name__, "a Stack or a Hugging Face causal language model")


class StackLM:
    """A Stack as a `Backbone`."""

    def __init__(self, stack: Stack) -> None:
        if stack.config.vocab is None or not stack.config.start_token:
            allowed = "a Stack with a vocabulary and a start token, which the prior needs"
            raise InputError("lm", stack.config, allowed, "make it by Stack(..., vocab=V, start_token=True)")
        self.module, self.dim, self.vocab = stack, stack.dim, stack.config.vocab

    def embed(self, tokens: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch dim"]:
        """Scaled token vectors."""
        return self.module.embed(checked_tensor("tokens", tokens, (...,)))

    def start(self, batch: int) -> Float[Tensor, "batch dim"]:
        """The learned start vector, scaled as embeddings are."""
        return (self.module.start * self.module.config.embed_scale).expand(batch, -1)

    def hidden(self, x: Float[Tensor, "batch time dim"]) -> Float[Tensor, "batch time dim"]:
        """Outputs of the last norm."""
        return self.module.hidden(x)[0]

    def run(
        self, x: Float[Tensor, "batch time dim"], state: State | None = None
    ) -> tuple[Float[Tensor, "batch time vocab"], State]:
        """One vector after a state by `hidden_step`, everything else at once."""
        if x.shape[1] == 1 and state is not None:
            h_t, state = self.module.hidden_step(x[:, 0], state)
            return self.module.logits(h_t)[:, None].log_softmax(-1), state
        h, state = self.module.hidden(x, state)
        return self.module.logits(h).log_softmax(-1), state

    def log_probs(self, tokens: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time_plus_1 vocab"]:
        """The Stack's own."""
        return self.module.log_probs(checked_tensor("tokens", tokens, ("batch", "time")))


class CacheState(NamedTuple):
    """Keys and values of every layer, batch first, as a State."""

    layers: tuple[tuple[Tensor, Tensor], ...]


class CausalLM:
    """A Hugging Face causal language model as a `Backbone`; without `bos_token_id` it has no prior: `InputError`."""

    def __init__(self, model: Any) -> None:
        self.module, self.bos = model, model.config.bos_token_id
        if self.bos is None:
            raise InputError("bos_token_id", None, "the token the prior follows", "set model.config.bos_token_id")
        self.vocab, self.dim = model.get_input_embeddings().weight.shape
        self.accepted = inspect.signature(model.forward).parameters

    def embed(self, tokens: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch dim"]:
        """Rows of the input embedding."""
        return self.module.get_input_embeddings()(checked_tensor("tokens", tokens, (...,), below=self.vocab))

    def start(self, batch: int) -> Float[Tensor, "batch dim"]:
        """The embedding of `bos_token_id`."""
        device = self.module.get_input_embeddings().weight.device
        return self.embed(torch.full((batch,), self.bos, device=device))

    def hidden(self, x: Float[Tensor, "batch time dim"]) -> Float[Tensor, "batch time dim"]:
        """The base model's last hidden state."""
        return self.module.base_model(inputs_embeds=x, use_cache=False).last_hidden_state

    def run(
        self, x: Float[Tensor, "batch time dim"], state: State | None = None
    ) -> tuple[Float[Tensor, "batch time vocab"], State]:
        """By `inputs_embeds`, with a mask of ones and positions that count the start."""
        from transformers.cache_utils import DynamicCache

        if state is not None and not state.layers:
            allowed = "a model whose cache is transformers' DynamicCache"
            raise InputError("lm", type(self.module).__name__, allowed, "this one cannot stream: use log_probs")
        cache = None if state is None else DynamicCache(state.layers)
        past = 0 if cache is None else cache.get_seq_length()
        batch, time = x.shape[:2]
        options = {
            "attention_mask": torch.ones(batch, past + time, dtype=torch.int64, device=x.device),
            "position_ids": torch.arange(past, past + time, device=x.device).expand(batch, -1),
            "past_key_values": cache,
        }
        options = {name: value for name, value in options.items() if name in self.accepted and value is not None}
        output = self.module(inputs_embeds=x, use_cache=True, **options)
        after = getattr(output, "past_key_values", None)
        layers = tuple((keys, values) for keys, values, *_ in after) if isinstance(after, DynamicCache) else ()
        return output.logits.log_softmax(-1), CacheState(layers)

    def log_probs(self, tokens: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time_plus_1 vocab"]:
        """Contract 2: the predictions after `bos_token_id` and each token."""
        tokens = checked_tensor("tokens", tokens, ("batch", "time"))
        return self.run(torch.cat([self.start(len(tokens))[:, None], self.embed(tokens)], 1))[0]


def flops_per_token(module: nn.Module, length: int) -> float:
    """Floating-point operations of one token at the mean context of a sequence of `length`: 2 a matrix element.

    Every parameter of two or more axes is one matrix product a token, embeddings and position tables excepted (a tied
    embedding counts once, as the output); attention adds 4 heads head_dim (length + 1) / 2.  Element-wise work and the
    state updates of linear mixers are left out: compare models of one mixer by it.

    >>> flops_per_token(nn.Linear(3, 5), 10)
    30.0
    """
    if not isinstance(module, nn.Module):
        raise InputError("module", type(module).__name__, "a torch module")
    length = whole("length", length, 1)
    is_tied = isinstance(module, Stack) and module.config.tie
    matrices = [
        p for name, p in module.named_parameters()
        if p.ndim >= 2 and (is_tied or name.rpartition(".")[2] not in _LOOKUPS)
    ]  # fmt: skip
    attended = sum(
        4 * m.heads * m.head_dim * (min(length, m.window or length) + 1) / 2
        for m in module.modules()
        if isinstance(m, Attention)
    )
    return float(2 * sum(p.numel() for p in matrices) + attended)
