"""In-context language learning of random automata (RegBench, arXiv 2401.12973, section 3).

Each sequence holds strings of one probabilistic automaton, separated by a separator: a model must find out which.

    states n ~ U{4..max_states}, symbols: a random set of c ~ U{4..n_symbols} of them
    each state: m ~ U{1..max_edges} edges with different symbols of the set, to random states, equally probable
    prompt: 10 to 20 strings from state 0, each 1 to 50 symbols

Known to us are the upper limits (at most 12 states, 4 edges a state, 20 tokens, 10 to 20 strings of at most 50 symbols, 5,000
and 500 automata); the lower ends and the uniform draws of states and alphabet are our reading of section 3, not checked
against the paper's text.  The version of its public code that we read draws as many symbols as states,
from 2, and stays below the upper limits; figures here are not comparable with those published.

The training and the test automata are disjoint sets (5,000 and 500), the same for every seed of a batch, and no two of
them have the same language.  Automata are not minimized.  A string's end cannot be known, so in the test separators are
not scored.
"""

from __future__ import annotations

from functools import lru_cache
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor

from commissure.core.config import Config
from commissure.core.errors import InputError
from commissure.core.rng import generator
from commissure.mesa.tasks.batch import Split, TaskBatch, distinct, draws, token_batch

__all__ = ["Automata", "RegBench"]

_FEWEST = 4  # states, and symbols of an automaton


class Automata(NamedTuple):
    """Edges of many automata, sorted by symbol; -1 where a state has fewer."""

    symbol: Int[np.ndarray, "automata states edges"]
    target: Int[np.ndarray, "automata states edges"]


class RegBench(Config):
    """Prompts of `length` + 1 tokens: symbols 0 .. n_symbols - 1, then the separator, then padding.

    >>> task = RegBench(length=64, n_train=20, n_test=10)
    >>> task.vocab, task.batch(seed=0, batch_size=2).inputs.shape
    (20, torch.Size([2, 64]))
    """

    name: ClassVar[str] = "regbench"
    reads: ClassVar[Literal["each", "last"]] = "each"
    input_dim: ClassVar[int] = 0
    output_dim: ClassVar[int] = 0

    n_symbols: int = Field(default=18, ge=_FEWEST)
    max_states: int = Field(default=12, ge=_FEWEST)
    max_edges: int = Field(default=4, ge=1, le=_FEWEST)
    n_train: int = Field(default=5000, ge=1)
    n_test: int = Field(default=500, ge=1)
    min_strings: int = Field(default=10, ge=1)
    max_strings: int = Field(default=20, ge=1)
    max_symbols: int = Field(default=50, ge=1, description="longest string")
    length: int = Field(default=1019, ge=2, description="the longest prompt has 20 * 51 - 1 = 1019 tokens")
    automata_seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _ordered(self) -> RegBench:
        if self.min_strings > self.max_strings:
            raise InputError("min_strings", self.min_strings, f"at most max_strings = {self.max_strings}")
        return self

    @property
    def vocab(self) -> int:
        """Symbols, separator, padding."""
        return self.n_symbols + 2

    def automata(self, split: Split) -> Automata:
        """The automata of a split."""
        every = _automata(
            self.n_symbols, self.max_states, self.max_edges, self.n_train + self.n_test, self.automata_seed
        )
        part = slice(0, self.n_train) if split == "train" else slice(self.n_train, None)
        return Automata(every.symbol[part], every.target[part])

    def batch(self, seed: int, batch_size: int, *, split: Split = "train") -> TaskBatch:
        """One automaton a row, none twice while there are enough; in training separators are scored too."""
        tokens, _, _ = self._prompts(seed, batch_size, split)
        targets = tokens[:, 1:]
        mask = targets <= self.n_symbols if split == "train" else targets < self.n_symbols
        return token_batch(tokens[:, :-1], targets, mask)

    def distributions(self, seed: int, batch_size: int, *, split: Split = "train") -> Float[Tensor, "batch time vocab"]:
        """The automaton's distribution of each target of `batch`, given that its string goes on; 0 at other targets."""
        tokens, states, rows = self._prompts(seed, batch_size, split)
        symbol = self.automata(split).symbol[rows[:, None], states[:, 1:]]
        exists = (symbol >= 0) & (tokens[:, 1:] < self.n_symbols)[..., None]
        result = np.zeros((*symbol.shape[:2], self.vocab + 1), np.float32)
        share = 1 / np.maximum(exists.sum(-1, keepdims=True), 1)
        np.put_along_axis(result, np.where(exists, symbol, self.vocab), share.astype(np.float32), 2)
        return torch.from_numpy(result[..., : self.vocab].copy())

    def _prompts(self, seed: int, batch_size: int, split: Split) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens, the state each was drawn in (0 for separators and padding), and each row's automaton."""
        rng, automata = draws(self.name, seed, batch_size, split), self.automata(split)
        n = len(automata.symbol)
        rows = rng.permuted(np.tile(np.arange(n), (-(-batch_size // n), 1)), axis=1).reshape(-1)[:batch_size]
        symbols, states = _strings(rng, automata, np.repeat(rows, self.max_strings), self.max_symbols)
        lengths = rng.integers(1, self.max_symbols + 1, (batch_size, self.max_strings))
        counts = rng.integers(self.min_strings, self.max_strings + 1, batch_size)
        shape = (batch_size, self.max_strings, self.max_symbols + 1)
        tokens = np.full(shape, self.n_symbols)
        tokens[..., :-1] = symbols.reshape(batch_size, self.max_strings, -1)
        visited = np.zeros(shape, np.int64)
        visited[..., :-1] = states.reshape(batch_size, self.max_strings, -1)
        column, string = np.arange(shape[2]), np.arange(shape[1])
        is_symbol = column < lengths[..., None]
        is_end = (column == lengths[..., None]) & (string[:, None] < counts[:, None, None] - 1)
        is_kept = (is_symbol | is_end) & (string[:, None] < counts[:, None, None])
        tokens, visited = np.where(is_symbol, tokens, self.n_symbols), np.where(is_symbol, visited, 0)
        order = (~is_kept).reshape(batch_size, -1).argsort(1, kind="stable")[:, : self.length + 1]
        kept = np.take_along_axis(is_kept.reshape(batch_size, -1), order, 1)
        tokens = np.where(kept, np.take_along_axis(tokens.reshape(batch_size, -1), order, 1), self.vocab - 1)
        visited = np.where(kept, np.take_along_axis(visited.reshape(batch_size, -1), order, 1), 0)
        missing = max(0, self.length + 1 - tokens.shape[1])
        tokens = np.pad(tokens, ((0, 0), (0, missing)), constant_values=self.vocab - 1)
        return tokens, np.pad(visited, ((0, 0), (0, missing))), rows


@lru_cache(maxsize=8)
def _automata(n_symbols: int, max_states: int, max_edges: int, count: int, seed: int) -> Automata:
    """`count` automata, no two with the same language."""
    rng = generator(seed, "automata")
    drawn = count + count // 2 + 50
    n_states = rng.integers(_FEWEST, max_states + 1, (drawn, 1, 1))
    alphabet = distinct(rng, drawn, n_symbols, n_symbols)  # the first c of a random order
    sizes = rng.integers(_FEWEST, n_symbols + 1, drawn)
    places = np.where(np.arange(n_symbols) < sizes[:, None], 1.0, 1e-300)
    picked = distinct(rng, drawn * max_states, max_edges, n_symbols, np.repeat(places, max_states, 0))
    symbol = np.take_along_axis(alphabet[:, None], picked.reshape(drawn, max_states, max_edges), 2)
    target = (rng.random(symbol.shape) * n_states).astype(np.int64)
    n_edges = rng.integers(1, max_edges + 1, (drawn, max_states, 1))
    exists = (np.arange(max_edges) < n_edges) & (np.arange(max_states)[:, None] < n_states)
    order = np.where(exists, symbol, n_symbols).argsort(2, kind="stable")
    symbol = np.take_along_axis(np.where(exists, symbol, -1), order, 2)
    target = np.take_along_axis(np.where(exists, target, -1), order, 2)
    first = np.sort(np.unique(_languages(symbol, target), return_index=True)[1])[:count]
    if len(first) < count:
        raise InputError("n_train + n_test", count, f"at most the {len(first)} different automata of these sizes found")
    return Automata(symbol[first], target[first])


def _languages(symbol: np.ndarray, target: np.ndarray) -> np.ndarray:
    """A 64-bit digest of the strings each automaton can give.

    Two automata that allow the same strings of length 2 max_states allow the same of every length (Moore 1956); the
    digest of a state is that of its symbols with the digests of the states behind them, so many times over.
    """
    rows = np.arange(len(symbol))[:, None, None]
    digest = np.ones(symbol.shape[:2], np.uint64)
    for _ in range(2 * symbol.shape[1]):
        behind = _mix(digest[rows, target] + _mix((symbol + 1).astype(np.uint64)))
        digest = _mix(np.where(symbol >= 0, behind, 0).sum(2, dtype=np.uint64))
    return digest[:, 0]


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64 (Steele, Lea & Flood 2014): every bit of the result depends on every bit of x."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _strings(rng: np.random.Generator, automata: Automata, rows: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """`n` symbols from state 0 of automaton `rows[i]`, and the state each was drawn in."""
    n_edges = (automata.symbol >= 0).sum(2)
    state = np.zeros(len(rows), np.int64)
    symbols, states = np.empty((n, len(rows)), np.int64), np.empty((n, len(rows)), np.int64)
    uniform = rng.random((n, len(rows)))
    for step in range(n):
        states[step] = state
        edge = (uniform[step] * n_edges[rows, state]).astype(np.int64)
        symbols[step] = automata.symbol[rows, state, edge]
        state = automata.target[rows, state, edge]
    return symbols.T, states.T
