"""Task inference: proposals q(code | x_<=t) at every position, with the exact log-density importance weights need.

    FactorPosterior    q(theta | x_<=t) = prod_f q(theta_f | theta_<f, h_t)           one causal pass gives every h_t
    LatentFlow         q(c | x_<=t) = sum_m pi_m(h_t) N(z; mu_m(h_t), s_m(h_t)) |det dz/dc|      z = flow(c; h_t)
    OraclePosterior    the exact posterior over tasks: what the others are measured against

h_t is the last norm's output after t tokens.  The flow stands in for the paper's diffusion over pooled codes, which has
no tractable density: affine coupling layers (arXiv 1605.08803) over a mixture of Gaussians, all conditional on h_t.
A prior that is not known in closed form (the flow's) is q at position 0.  arXiv 2506.16288.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, Protocol, cast, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from commissure.core.errors import InputError
from commissure.core.rng import torch_generator
from commissure.metahmm.backbones import backbone
from commissure.metahmm.conditional import FactorEmbedding, hidden_states
from commissure.metahmm.inputs import whole
from commissure.metahmm.predictor_inputs import checked_counts, checked_tensor

__all__ = ["FactorPosterior", "LatentFlow", "OraclePosterior", "Proposal", "TablePosterior", "TaskSampler"]


_SMALLEST = 2.0**-53  # the step of float64's uniform numbers: a drawn 0 becomes the next one, -8.2 deviations


@runtime_checkable
class Proposal(Protocol):
    """q(code | x_<=t) of a batch of sequences, at any of its positions 0 .. T."""

    def sample(
        self, positions: Int[Tensor, " positions"], n: int, *, seed: int
    ) -> Shaped[Tensor, "batch positions n code_dim"]:
        """`n` independent codes a sequence and position."""

    def log_prob(
        self, positions: Int[Tensor, " positions"], codes: Shaped[Tensor, "batch positions n code_dim"]
    ) -> Float[Tensor, "batch positions n"]:
        """log q of given codes."""

    def log_prior(self, codes: Shaped[Tensor, "batch positions n code_dim"]) -> Float[Tensor, "batch positions n"]:
        """log p(code), up to a constant of the batch's row."""


@runtime_checkable
class TaskSampler(Protocol):
    """Reads sequences once and proposes codes at every position."""

    def propose(self, tokens: Int[Tensor, "batch time"]) -> Proposal:
        """The proposals of a batch."""


class TablePosterior:
    """A proposal over `n_tasks` numbered tasks from its table of log-probabilities (batch, time + 1, n_tasks).

    `codes` (n_tasks, code_dim), distinct rows of integers, are what the tasks are called; without them a code is the
    task's number, (..., 1).  The prior is uniform unless given.
    """

    def __init__(
        self,
        log_probs: Float[Tensor, "batch time_plus_1 tasks"],
        *,
        codes: Int[Tensor, "tasks code_dim"] | None = None,
        log_prior: Float[Tensor, " tasks"] | None = None,
    ) -> None:
        allowed = "a real tensor (batch, time + 1, n_tasks >= 1), every row of it with a task above -inf"
        if not isinstance(log_probs, Tensor) or not log_probs.dtype.is_floating_point:
            raise InputError("log_probs", type(log_probs).__name__, allowed)
        n_tasks = log_probs.shape[-1] if log_probs.ndim == 3 else 0
        if not n_tasks or not bool(log_probs.amax(-1).isfinite().all()):
            raise InputError("log_probs", tuple(log_probs.shape), allowed)
        self.table = log_probs
        self.codes = torch.arange(n_tasks, device=log_probs.device)[:, None] if codes is None else codes
        checked_tensor("codes", self.codes, (n_tasks, "code_dim"))
        sizes = self.codes.amax(0) + 1
        self.strides = sizes.flip(0).cumprod(0).flip(0) // sizes
        self.number = torch.full((int(sizes.prod()),), -1, device=log_probs.device)
        self.number[(self.codes * self.strides).sum(-1)] = torch.arange(n_tasks, device=log_probs.device)
        if int((self.number >= 0).sum()) < n_tasks:
            raise InputError("codes", "a row twice", "a code of its own for each task")
        if log_prior is not None and (not isinstance(log_prior, Tensor) or log_prior.shape != (n_tasks,)):
            raise InputError("log_prior", log_prior, f"a tensor of shape ({n_tasks},)")
        self.prior = log_probs.new_full((n_tasks,), -math.log(n_tasks)) if log_prior is None else log_prior

    def sample(
        self, positions: Int[Tensor, " positions"], n: int, *, seed: int
    ) -> Shaped[Tensor, "batch positions n code_dim"]:
        """By inversion of the cumulative probabilities, of one position after the other: they are as long as tasks."""
        positions = _within(positions, self.table)
        uniform = _uniform(positions, len(self.table), n, seed=seed).unbind(1)
        drawn = [_invert(self.table[:, t].double(), u) for t, u in zip(positions.tolist(), uniform, strict=True)]
        return self.codes[torch.stack(drawn, 1)]

    def log_prob(
        self, positions: Int[Tensor, " positions"], codes: Shaped[Tensor, "batch positions n code_dim"]
    ) -> Float[Tensor, "batch positions n"]:
        """Looked up."""
        positions = _within(positions, self.table)
        tasks = self._tasks(codes, len(positions))
        rows = torch.arange(len(tasks), device=tasks.device)[:, None, None]
        return self.table[rows, positions[:, None], tasks]

    def log_prior(self, codes: Shaped[Tensor, "batch positions n code_dim"]) -> Float[Tensor, "batch positions n"]:
        """Looked up."""
        return self.prior[self._tasks(codes)]

    def _tasks(
        self, codes: Int[Tensor, "batch positions n code_dim"], positions: int | str = "positions"
    ) -> Int[Tensor, "batch positions n"]:
        """The number of each code; `InputError` for one that is no task's."""
        codes = checked_tensor("codes", codes, (len(self.table), positions, "n", self.codes.shape[1]))
        within = ((codes >= 0) & (codes <= self.codes.amax(0))).all(-1)
        tasks = self.number[(codes * self.strides).sum(-1).masked_fill(~within, 0)]
        known = within & (tasks >= 0)
        if not bool(known.all()):
            raise InputError("codes", codes[~known][0].tolist(), f"a code of one of the {len(self.codes)} tasks")
        return tasks


@runtime_checkable
class StreamingOracle(Protocol):
    """What is asked of `BayesOracle`."""

    def init_state(self, batch_size: int) -> Any:
        """The state before the first token."""

    def step(self, token: Tensor, state: Any) -> tuple[Tensor, Any]:
        """The next prediction, and the state after the token."""

    def posterior_of(self, state: Any) -> Tensor:
        """p(task | tokens so far), (batch, n_tasks)."""


class OraclePosterior:
    """The exact posterior over all tasks as a sampler.

    A code is a task's number, or its row of `codes` (n_tasks, code_dim), for instance its factors.  The table of a
    batch holds batch * (time + 1) * n_tasks numbers of the oracle's dtype, and is most of what is held at any time.
    """

    def __init__(self, oracle: StreamingOracle, *, codes: Int[Tensor, "tasks code_dim"] | None = None) -> None:
        if not isinstance(oracle, StreamingOracle):
            raise InputError("oracle", type(oracle).__name__, "a BayesOracle")
        self.oracle = oracle
        self.codes = None if codes is None else checked_tensor("codes", codes, ("tasks", "code_dim"))

    def propose(self, tokens: Int[Tensor, "batch time"]) -> TablePosterior:
        """The posterior after each prefix; the one after none is the prior."""
        tokens = checked_tensor("tokens", tokens, ("batch", "time"))
        state = self.oracle.init_state(len(tokens))
        prior = self.oracle.posterior_of(state)
        table = prior.new_empty(len(tokens), tokens.shape[1] + 1, prior.shape[1])
        table[:, 0] = prior
        for t, token in enumerate(tokens.unbind(1)):
            _, state = self.oracle.step(token, state)
            table[:, t + 1] = self.oracle.posterior_of(state)
        table.log_()
        return TablePosterior(table, codes=self.codes, log_prior=table[0, 0])


class FactorPosterior(nn.Module):
    """Amortized posterior over known factors, autoregressive in their order, from one causal pass of a Stack.

    `lm` is the encoder (its output matrix is not used).  The prior is uniform over all combinations of factors.

    >>> from commissure.nn import Stack
    >>> sampler = FactorPosterior(Stack(["gru"], 8, vocab=5), (4, 2, 2))
    >>> proposal = sampler.propose(torch.tensor([[1, 2, 3]]))
    >>> codes = proposal.sample(torch.arange(4), 6, seed=0)
    >>> codes.shape, proposal.log_prob(torch.arange(4), codes).shape
    (torch.Size([1, 4, 6, 3]), torch.Size([1, 4, 6]))
    """

    def __init__(self, lm: nn.Module, factor_sizes: Sequence[int]) -> None:
        super().__init__()
        self.lm, self.factor_sizes = lm, checked_counts("factor_sizes", factor_sizes)
        dim = backbone(lm).dim
        self.embedding = FactorEmbedding(factor_sizes, dim)
        self.hidden = nn.ModuleList(nn.Linear(dim, dim) for _ in factor_sizes)
        self.out = nn.ModuleList(nn.Linear(dim, size) for size in factor_sizes)

    def propose(self, tokens: Int[Tensor, "batch time"]) -> FactorProposal:
        """One pass over the tokens."""
        return FactorProposal(self, hidden_states(self.lm, tokens))

    def loss(self, tokens: Int[Tensor, "batch time"], factors: Int[Tensor, "batch factors"]) -> Float[Tensor, ""]:
        """Mean of -log q(theta | x_<=t) over all sequences and positions: its minimum is the posterior."""
        proposal = self.propose(tokens)
        factors = checked_tensor("factors", factors, (len(tokens), len(self.factor_sizes)))
        positions = torch.arange(tokens.shape[1] + 1, device=tokens.device)
        codes = factors[:, None, None].expand(-1, len(positions), 1, -1)
        return -proposal.log_prob(positions, codes).mean()

    def logits(
        self, factor: int, h: Float[Tensor, "*batch dim"], known: Float[Tensor, "*batch dim"]
    ) -> Float[Tensor, "*batch choices"]:
        """log q of each choice of a factor, given the context and the embedded sum of the factors before it."""
        return self.out[factor](F.gelu(self.hidden[factor](h + known))).log_softmax(-1)


class FactorProposal:
    """q(theta | x_<=t) from h_t."""

    def __init__(self, model: FactorPosterior, h: Float[Tensor, "batch time_plus_1 dim"]) -> None:
        self.model, self.h = model, h

    def sample(
        self, positions: Int[Tensor, " positions"], n: int, *, seed: int
    ) -> Int[Tensor, "batch positions n factors"]:
        """Factor by factor; each choice inverts the cumulative probabilities at one uniform number."""
        positions, n_factors = _within(positions, self.h), len(self.model.factor_sizes)
        uniform = _uniform(positions, len(self.h), n, n_factors, seed=seed)
        h = self.h[:, positions, None].expand(-1, -1, n, -1)
        known, chosen = torch.zeros_like(h), []
        for factor in range(n_factors):
            choice = _invert(self.model.logits(factor, h, known).double(), uniform[..., factor, None])[..., 0]
            chosen.append(choice)
            known = known + self._embedded(factor, choice)
        return torch.stack(chosen, -1)

    def log_prob(
        self, positions: Int[Tensor, " positions"], codes: Int[Tensor, "batch positions n factors"]
    ) -> Float[Tensor, "batch positions n"]:
        """The sum of the factors' conditional log-probabilities."""
        positions = _within(positions, self.h)
        codes = self._checked(codes, len(positions))
        h = self.h[:, positions, None].expand(-1, -1, codes.shape[2], -1)
        known, total = torch.zeros_like(h), h.new_zeros(h.shape[:3])
        for factor in range(codes.shape[-1]):
            choice = codes[..., factor]
            total = total + self.model.logits(factor, h, known).gather(-1, choice[..., None])[..., 0]
            known = known + self._embedded(factor, choice)
        return total

    def log_prior(self, codes: Int[Tensor, "batch positions n factors"]) -> Float[Tensor, "batch positions n"]:
        """Uniform over all combinations."""
        codes = self._checked(codes)
        return self.h.new_full(codes.shape[:3], -math.log(math.prod(self.model.factor_sizes)))

    def _checked(
        self, codes: Int[Tensor, "batch positions n factors"], positions: int | str = "positions"
    ) -> Int[Tensor, "batch positions n factors"]:
        sizes = self.model.embedding.sizes
        codes = checked_tensor("codes", codes, (len(self.h), positions, "n", len(sizes)))
        is_wrong = ((codes < 0) | (codes >= sizes)).any(-1)
        if bool(is_wrong.any()):
            raise InputError("codes", codes[is_wrong][0].tolist(), f"factors below {self.model.factor_sizes}")
        return codes

    def _embedded(self, factor: int, choice: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch dim"]:
        return F.embedding(choice + self.model.embedding.first[factor], self.model.embedding.weight)


class LatentFlow(nn.Module):
    """Label-free q(c | x_<=t) over code vectors: coupling layers over a mixture of Gaussians, conditional on h_t.

    The context is read by a frozen copy of the pre-trained model `lm`, in evaluation mode also while the rest trains;
    codes are standardized by `set_scale`'s mean and deviation.
    """

    mean: Tensor
    scale: Tensor

    def __init__(
        self, lm: nn.Module, code_dim: int, *, layers: int = 4, components: int = 16, width: int = 128
    ) -> None:
        super().__init__()
        code_dim = whole("code_dim", code_dim, 2)  # a coupling layer splits the code
        layers, width = whole("layers", layers, 1), whole("width", width, 1)
        components, dim = whole("components", components, 1), backbone(lm).dim
        self.lm = copy.deepcopy(lm).requires_grad_(False).eval()
        self.code_dim, self.components = code_dim, components
        self.register_buffer("mean", torch.zeros(code_dim))
        self.register_buffer("scale", torch.ones(code_dim))
        self.couplings = nn.ModuleList(Coupling(code_dim, dim, width, is_odd=layer % 2 == 1) for layer in range(layers))
        self.base = nn.Sequential(nn.Linear(dim, width), nn.GELU(), nn.Linear(width, components * (1 + 2 * code_dim)))

    def train(self, mode: bool = True) -> LatentFlow:
        """What is frozen stays in evaluation mode."""
        super().train(mode)
        self.lm.eval()
        return self

    def set_scale(self, codes: Float[Tensor, "n code_dim"]) -> None:
        """Standardize by these codes; a constant entry keeps its scale."""
        codes = checked_tensor("codes", codes, ("n", self.code_dim), kind="real numbers")
        if len(codes) < 2:
            raise InputError("codes", tuple(codes.shape), f"shape (n >= 2, {self.code_dim})")
        deviation = codes.std(0)
        self.mean.copy_(codes.mean(0))
        self.scale.copy_(torch.where(deviation > 0, deviation, torch.ones_like(deviation)))

    @torch.no_grad()
    def context(self, tokens: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time_plus_1 dim"]:
        """h_t of the frozen model."""
        return hidden_states(self.lm, tokens)

    def propose(self, tokens: Int[Tensor, "batch time"]) -> FlowProposal:
        """One pass of the frozen model over the tokens."""
        return FlowProposal(self, self.context(tokens))

    def loss(self, tokens: Int[Tensor, "batch time"], codes: Float[Tensor, "batch code_dim"]) -> Float[Tensor, ""]:
        """Mean of -log q(c | x_<=t) over all sequences and positions."""
        proposal = self.propose(tokens)
        codes = checked_tensor("codes", codes, (len(tokens), self.code_dim), kind="real numbers")
        positions = torch.arange(tokens.shape[1] + 1, device=tokens.device)
        return -proposal.log_prob(positions, codes[:, None, None].expand(-1, len(positions), 1, -1)).mean()

    def log_density(
        self, codes: Float[Tensor, "*batch code_dim"], h: Float[Tensor, "*batch dim"]
    ) -> Float[Tensor, "*batch"]:
        """log q(c | h), exact."""
        z, total = (codes - self.mean) / self.scale, -self.scale.log().sum()
        for coupling in self.couplings:
            z, log_det = coupling(z, h)
            total = total + log_det
        weights, means, log_scales = self._mixture(h)
        standard = (z[..., None, :] - means) * torch.exp(-log_scales)
        gaussian = -0.5 * (standard.square() + math.log(2 * math.pi)).sum(-1) - log_scales.sum(-1)
        return total + torch.logsumexp(weights + gaussian, -1)

    def draw(
        self, h: Float[Tensor, "*batch dim"], uniform: Float[Tensor, "*batch code_dim_plus_1"]
    ) -> Float[Tensor, "*batch code_dim"]:
        """One code for each h, from independent numbers in [0, 1): the component's, then one an entry."""
        noise = torch.special.ndtri(uniform[..., 1:].clamp(min=_SMALLEST)).to(h.dtype)
        weights, means, log_scales = self._mixture(h)
        component = _invert(weights.double(), uniform[..., :1])[..., None].expand(*h.shape[:-1], 1, self.code_dim)
        mean, log_scale = (t.gather(-2, component)[..., 0, :] for t in (means, log_scales))
        z = mean + log_scale.exp() * noise
        for coupling in reversed(self.couplings):
            z = cast(Coupling, coupling).inverse(z, h)
        return self.mean + self.scale * z

    def _mixture(self, h: Float[Tensor, "*batch dim"]) -> tuple[Tensor, Tensor, Tensor]:
        """log weights (*batch, components), means and log scales (*batch, components, code_dim)."""
        weights, rest = self.base(h).split([self.components, 2 * self.components * self.code_dim], -1)
        means, log_scales = rest.unflatten(-1, (2, self.components, self.code_dim)).unbind(-3)
        return weights.log_softmax(-1), means, _bounded(log_scales)


class FlowProposal:
    """q(c | x_<=t) from the frozen h_t."""

    def __init__(self, model: LatentFlow, h: Float[Tensor, "batch time_plus_1 dim"]) -> None:
        self.model, self.h = model, h

    def sample(
        self, positions: Int[Tensor, " positions"], n: int, *, seed: int
    ) -> Float[Tensor, "batch positions n code_dim"]:
        """Independent draws."""
        positions = _within(positions, self.h)
        uniform = _uniform(positions, len(self.h), n, 1 + self.model.code_dim, seed=seed)
        return self.model.draw(self.h[:, positions, None].expand(-1, -1, n, -1), uniform)

    def log_prob(
        self, positions: Int[Tensor, " positions"], codes: Float[Tensor, "batch positions n code_dim"]
    ) -> Float[Tensor, "batch positions n"]:
        """Exact."""
        positions = _within(positions, self.h)
        codes = self._checked(codes, len(positions))
        return self.model.log_density(codes, self.h[:, positions, None].expand(-1, -1, codes.shape[2], -1))

    def log_prior(self, codes: Float[Tensor, "batch positions n code_dim"]) -> Float[Tensor, "batch positions n"]:
        """q(c) before the first token, learned from all tasks."""
        codes = self._checked(codes)
        return self.model.log_density(codes, self.h[:, :1, None].expand(-1, *codes.shape[1:3], -1))

    def _checked(
        self, codes: Float[Tensor, "batch positions n code_dim"], positions: int | str = "positions"
    ) -> Float[Tensor, "batch positions n code_dim"]:
        return checked_tensor("codes", codes, (len(self.h), positions, "n", self.model.code_dim), kind="real numbers")


class Coupling(nn.Module):
    """One half of the code is scaled and shifted by what the other half and h say; `is_odd` swaps the halves."""

    def __init__(self, code_dim: int, dim: int, width: int, *, is_odd: bool) -> None:
        super().__init__()
        self.kept = code_dim // 2 if is_odd else code_dim - code_dim // 2
        self.is_odd = is_odd
        moved = code_dim - self.kept
        self.net = nn.Sequential(nn.Linear(self.kept + dim, width), nn.GELU(), nn.Linear(width, 2 * moved))
        for parameter in self.net[-1].parameters():
            nn.init.zeros_(parameter)  # the identity at first

    def forward(
        self, c: Float[Tensor, "*batch code_dim"], h: Float[Tensor, "*batch dim"]
    ) -> tuple[Float[Tensor, "*batch code_dim"], Float[Tensor, "*batch"]]:
        """The transformed code and log |det|."""
        kept, moved = self._halves(c)
        log_scale, shift = self._affine(kept, h)
        return self._joined(kept, moved * log_scale.exp() + shift), log_scale.sum(-1)

    def inverse(
        self, z: Float[Tensor, "*batch code_dim"], h: Float[Tensor, "*batch dim"]
    ) -> Float[Tensor, "*batch code_dim"]:
        """Undo `forward`."""
        kept, moved = self._halves(z)
        log_scale, shift = self._affine(kept, h)
        return self._joined(kept, (moved - shift) * torch.exp(-log_scale))

    def _affine(self, kept: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        log_scale, shift = self.net(torch.cat([kept, h], -1)).chunk(2, -1)
        return _bounded(log_scale), shift

    def _halves(self, c: Tensor) -> tuple[Tensor, Tensor]:
        moved = c.shape[-1] - self.kept
        if self.is_odd:
            return c[..., moved:], c[..., :moved]
        return c[..., : self.kept], c[..., self.kept :]

    def _joined(self, kept: Tensor, moved: Tensor) -> Tensor:
        return torch.cat([moved, kept] if self.is_odd else [kept, moved], -1)


def _bounded(log_scale: Tensor) -> Tensor:
    """Log scales within (-5, 5): no component can shrink to a point, where its density would outgrow all others'."""
    return 5 * torch.tanh(log_scale / 5)


def _within(
    positions: Int[Tensor, " positions"], values: Float[Tensor, "batch time_plus_1 dim"]
) -> Int[Tensor, " positions"]:
    return checked_tensor("positions", positions, ("positions",), below=values.shape[1])


def _uniform(
    positions: Int[Tensor, " positions"], batch: int, *shape: int, seed: int
) -> Float[Tensor, "batch positions *shape"]:
    """Numbers in [0, 1), those of a position the same whichever others are drawn with it."""
    whole("n", shape[0], 1)
    device = positions.device
    drawn = [
        torch.rand(
            (batch, *shape),
            generator=torch_generator(seed, "sample", position, device=device),
            dtype=torch.float64,
            device=device,
        )
        for position in positions.tolist()
    ]
    return torch.stack(drawn, 1)


def _invert(log_probs: Float[Tensor, "*batch choices"], uniform: Float[Tensor, "*batch n"]) -> Int[Tensor, "*batch n"]:
    """The first choice whose cumulative probability exceeds each number; never one of probability zero."""
    cumulative = log_probs.exp().cumsum(-1)
    cumulative = cumulative / cumulative[..., -1:]  # ends at exactly 1, which no number reaches
    return torch.searchsorted(cumulative, uniform.contiguous(), right=True)
