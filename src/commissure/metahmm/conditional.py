"""Predictors given a task: a language model that is told the task before its first prediction.

    p_dec(x_{t+1} | x_<=t, c)        inputs: start + W c, x_1, ..., x_T

A code c is a vector (hidden states of a pre-trained model pooled over an independent sequence of the task: label-free)
or a tuple of known factors, embedded by one learned vector a choice and summed.

| paper | name |
|---|---|
| context code c | `codes` |
| conditional predictor | `SoftPrefix` |
| context encoder | `pooled_codes` |

arXiv 2506.16288.  The paper gives the code as a token of its own in front, drops the output there and has
no start token.  Here the start is needed, because importance weights need p(x_1 | c), and the code is added to it: a
token of its own would be attended to even where it is zero and would shift every position, while a W of zeros here
gives exactly the language model's own predictions.  `every_token` adds it to all inputs, start + W c, x_1 + W c, ...:
not the paper's, and on small models much nearer to the optimum, on tasks never trained on too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from commissure.core.errors import InputError
from commissure.core.mixer import State
from commissure.metahmm.backbones import backbone
from commissure.metahmm.environment import MetaHMM
from commissure.metahmm.factors import TaskFamily
from commissure.metahmm.inputs import whole
from commissure.metahmm.predictor_inputs import checked_counts, checked_tensor

__all__ = [
    "ConditionalPredictor",
    "ExactConditional",
    "FactorEmbedding",
    "SoftPrefix",
    "hidden_states",
    "pooled_codes",
]


@runtime_checkable
class ConditionalPredictor(Protocol):
    """p(x_{t+1} | x_<=t, code): all positions at once, or one token at a time from States that can be selected."""

    vocab: int

    def log_probs(
        self, tokens: Int[Tensor, "batch time"], codes: Shaped[Tensor, "batch codes code_dim"]
    ) -> Float[Tensor, "batch codes time_plus_1 vocab"]:
        """Contract 2 for each of the row's codes."""

    def prefill(
        self, tokens: Int[Tensor, "rows time"], codes: Shaped[Tensor, "rows code_dim"]
    ) -> tuple[Float[Tensor, "rows time_plus_1 vocab"], State]:
        """One code a row; the state is the one after the last token, `step` goes on from it."""

    def step(self, tokens: Int[Tensor, " rows"], state: State) -> tuple[Float[Tensor, "rows vocab"], State]:
        """One token a row."""


class ToldState(NamedTuple):
    """What every later token is told, and the language model's state."""

    told: Float[Tensor, "rows dim"]
    body: State


class FactorEmbedding(nn.Module):
    """Factors (..., n_factors), integers, to the sum of one learned vector a choice (..., dim).

    >>> FactorEmbedding((4, 2), 8)(torch.tensor([[3, 1], [0, 0]])).shape
    torch.Size([2, 8])
    """

    first: Tensor
    sizes: Tensor

    def __init__(self, sizes: Sequence[int], dim: int) -> None:
        super().__init__()
        counts = torch.tensor(checked_counts("sizes", sizes))
        self.register_buffer("sizes", counts, persistent=False)
        self.register_buffer("first", counts.cumsum(0) - counts, persistent=False)
        self.dim = whole("dim", dim, 1)
        # Like token embeddings: the sum of F of them has the variance of one.
        self.weight = nn.Parameter(torch.randn(int(counts.sum()), dim) * (dim * len(counts)) ** -0.5)

    def forward(self, factors: Int[Tensor, "*batch factors"]) -> Float[Tensor, "*batch dim"]:
        """Raises `InputError` for a choice out of range."""
        factors = checked_tensor("codes", factors, (..., len(self.sizes)))
        is_wrong = ((factors < 0) | (factors >= self.sizes)).any(-1)
        if bool(is_wrong.any()):
            raise InputError("codes", factors[is_wrong][0].tolist(), f"factors below {tuple(self.sizes.tolist())}")
        return nn.functional.embedding(factors + self.first, self.weight).sum(-2)


class SoftPrefix(nn.Module):
    """A Stack or Hugging Face causal language model that predicts given a code.

    `codes` are vectors of `code_dim`, or, with `embedding`, integers that it turns into such vectors.  The projected
    code is added to the start's vector: the paper gives it as a token of its own in front, which shifts every position,
    asks one more entry of a learned position table and is attended to even where it is zero.  The projection begins as
    zeros, so that training starts at exactly the language model's own predictions.  With `every_token` it is added to
    each token's vector too, so that nothing has to remember it.

    >>> from commissure.nn import Stack
    >>> model = SoftPrefix(Stack(["gru"], 8, vocab=5), 3)
    >>> model.log_probs(torch.tensor([[1, 2]]), torch.zeros(1, 4, 3)).shape
    torch.Size([1, 4, 3, 5])
    """

    def __init__(
        self, lm: nn.Module, code_dim: int, *, embedding: FactorEmbedding | None = None, every_token: bool = False
    ) -> None:
        super().__init__()
        code_dim = whole("code_dim", code_dim, 1)
        if embedding is not None and not isinstance(embedding, FactorEmbedding):
            raise InputError("embedding", type(embedding).__name__, "a FactorEmbedding, or None")
        if embedding is not None and embedding.dim != code_dim:
            raise InputError("code_dim", code_dim, f"the embedding's width {embedding.dim}")
        self.body, self.lm = backbone(lm), lm
        self.vocab = self.body.vocab
        self.code_dim, self.embedding, self.every_token = code_dim, embedding, every_token
        self.projection = nn.Linear(code_dim, self.body.dim, bias=False)
        nn.init.zeros_(self.projection.weight)
        self.projection.to(next(lm.parameters()).dtype)

    def log_probs(
        self, tokens: Int[Tensor, "batch time"], codes: Shaped[Tensor, "batch codes code_dim"]
    ) -> Float[Tensor, "batch codes time_plus_1 vocab"]:
        """Predictions under each of a row's codes; position 0 is p(x_1 | code)."""
        return _under_each(self, tokens, codes)

    def prefill(
        self, tokens: Int[Tensor, "rows time"], codes: Shaped[Tensor, "rows code_dim"]
    ) -> tuple[Float[Tensor, "rows time_plus_1 vocab"], State]:
        """The start with its code and the tokens at once; `step` goes on from the state."""
        tokens = checked_tensor("tokens", tokens, ("rows", "time"))
        told = self._project(codes)
        if len(told) != len(tokens):
            raise InputError("codes", tuple(codes.shape), f"one code for each of {len(tokens)} rows")
        first, embedded = (self.body.start(len(tokens)) + told)[:, None], self.body.embed(tokens)
        if not self.every_token:
            return self.body.run(torch.cat([first, embedded], 1))
        log_probs, state = self.body.run(torch.cat([first, embedded + told[:, None]], 1))
        return log_probs, ToldState(told, state)

    def step(self, tokens: Int[Tensor, " rows"], state: State) -> tuple[Float[Tensor, "rows vocab"], State]:
        """One token a row."""
        x = self.body.embed(checked_tensor("tokens", tokens, ("rows",)))
        if not isinstance(state, ToldState):
            log_probs, state = self.body.run(x[:, None], state)
            return log_probs[:, 0], state
        log_probs, after = self.body.run((x + state.told)[:, None], state.body)
        return log_probs[:, 0], ToldState(state.told, after)

    def _project(self, codes: Shaped[Tensor, "rows code_dim"]) -> Float[Tensor, "rows dim"]:
        if self.embedding is None:
            vectors = checked_tensor("codes", codes, ("rows", self.code_dim), kind="real numbers")
        else:
            vectors = self.embedding(codes)
        return self.projection(vectors.to(self.projection.weight.dtype))


def _under_each(
    model: ConditionalPredictor, tokens: Int[Tensor, "batch time"], codes: Shaped[Tensor, "batch codes code_dim"]
) -> Float[Tensor, "batch codes time_plus_1 vocab"]:
    """`prefill` of every row with each of its codes."""
    tokens = checked_tensor("tokens", tokens, ("batch", "time"))
    if not isinstance(codes, Tensor) or codes.ndim != 3 or len(codes) != len(tokens) or not codes.shape[1]:
        shown = tuple(codes.shape) if isinstance(codes, Tensor) else type(codes).__name__
        raise InputError("codes", shown, f"a tensor of shape (batch = {len(tokens)}, codes >= 1, code_dim)")
    rows = tokens.repeat_interleave(codes.shape[1], 0)
    return model.prefill(rows, codes.flatten(0, 1))[0].unflatten(0, codes.shape[:2])


def hidden_states(lm: nn.Module, tokens: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time_plus_1 dim"]:
    """The last norm's outputs after the start and after each token."""
    body, tokens = backbone(lm), checked_tensor("tokens", tokens, ("batch", "time"))
    return body.hidden(torch.cat([body.start(len(tokens))[:, None], body.embed(tokens)], 1))


@torch.no_grad()
def pooled_codes(lm: nn.Module, tokens: Int[Tensor, "batch time"]) -> Float[Tensor, "batch dim"]:
    """Label-free codes: the mean of a frozen model's hidden states over a context sequence of the same task.

    >>> from commissure.nn import Stack
    >>> pooled_codes(Stack(["gru"], 8, vocab=5), torch.tensor([[1, 2, 3]])).shape
    torch.Size([1, 8])
    """
    after = hidden_states(lm, tokens)[:, 1:]
    if not after.shape[1]:
        raise InputError("tokens", tuple(tokens.shape), "shape (batch, time) with time >= 1")
    return after.mean(1)


class BeliefState(NamedTuple):
    """p(z_{t+1} | x_<=t, theta) and which matrices go on from it."""

    belief: Float[Tensor, "rows states"]
    transition: Int[Tensor, " rows"]
    emission: Int[Tensor, " rows"]


class ExactConditional:
    """The exact p(x_{t+1} | x_<=t, theta) of hidden Markov models: what a conditional predictor learns at best.

    `env` has `initial` (states,), `transitions` (U, states, states) and `emissions` (W, states, vocab).  A code is a
    task id u * W + w, (..., 1), or the factors of a MetaHMM's task.  Float64.  After a token that is
    impossible under a code nothing is predicted: -inf for every token, which is also the log-likelihood there.

    >>> from commissure.metahmm import MetaHMM
    >>> exact = ExactConditional(MetaHMM.from_preset("e64", seed=0))
    >>> exact.log_probs(torch.tensor([[1, 2]]), torch.tensor([[[5], [6]]])).exp().sum(-1).shape
    torch.Size([1, 2, 3])
    """

    def __init__(self, env: TaskFamily) -> None:
        if not isinstance(env, TaskFamily):
            raise InputError("env", type(env).__name__, "a MetaHMM, or what has initial, transitions and emissions")
        self.env, self.vocab = env, env.emissions.shape[-1]

    def log_probs(
        self, tokens: Int[Tensor, "batch time"], codes: Int[Tensor, "batch codes code_dim"]
    ) -> Float[Tensor, "batch codes time_plus_1 vocab"]:
        """Predictions under each of a row's codes."""
        return _under_each(self, tokens, codes)

    def prefill(
        self, tokens: Int[Tensor, "rows time"], codes: Int[Tensor, "rows code_dim"]
    ) -> tuple[Float[Tensor, "rows time_plus_1 vocab"], BeliefState]:
        """The scan of `step`, the prior first."""
        tokens = checked_tensor("tokens", tokens, ("rows", "time"), below=self.vocab)
        codes = checked_tensor("codes", codes, (len(tokens), "code_dim"))
        n_emissions = len(self.env.emissions)
        if codes.shape[1] == 1:
            task = checked_tensor("codes", codes[:, 0], ("rows",), below=len(self.env.transitions) * n_emissions)
        elif isinstance(self.env, MetaHMM):
            task = self.env.factors_to_task(codes)
        else:
            raise InputError("codes", tuple(codes.shape), "task ids, (..., 1)", "only a MetaHMM names factors")
        state = BeliefState(self.env.initial.expand(len(task), -1), task // n_emissions, task % n_emissions)
        predictions = [self._predict(state)]
        for token in tokens.unbind(1):
            state = self._advance(token, state)
            predictions.append(self._predict(state))
        return torch.stack(predictions, 1), state

    def step(self, tokens: Int[Tensor, " rows"], state: BeliefState) -> tuple[Float[Tensor, "rows vocab"], BeliefState]:
        """One token a row."""
        state = self._advance(checked_tensor("tokens", tokens, (len(state.belief),), below=self.vocab), state)
        return self._predict(state), state

    def _advance(self, tokens: Int[Tensor, " rows"], state: BeliefState) -> BeliefState:
        """Weigh the states by the token, normalize, move on; a belief of zeros where the token is impossible."""
        joint = state.belief * self.env.emissions[state.emission, :, tokens]
        evidence = joint.sum(1, keepdim=True)
        told = joint / torch.where(evidence > 0, evidence, 1.0)
        return state._replace(belief=torch.einsum("ns,nsr->nr", told, self.env.transitions[state.transition]))

    def _predict(self, state: BeliefState) -> Float[Tensor, "rows vocab"]:
        return torch.einsum("ns,nsv->nv", state.belief, self.env.emissions[state.emission]).log()
