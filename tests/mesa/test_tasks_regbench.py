"""RegBench: automata of the published kind, disjoint splits, strings that follow their automaton."""

from __future__ import annotations

from collections import Counter
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from commissure.core.errors import InputError
from commissure.mesa.tasks import RegBench
from commissure.mesa.tasks.regbench import _languages

SMALL = RegBench(n_train=300, n_test=100, length=300)
SEPARATOR, PADDING = 18, 19


def edges(source: RegBench, split: Any, automaton: int) -> list[dict[int, int]]:
    """For each state, symbol -> next state."""
    automata = source.automata(split)
    return [
        {int(s): int(t) for s, t in zip(symbols, targets, strict=True) if s >= 0}
        for symbols, targets in zip(automata.symbol[automaton], automata.target[automaton], strict=True)
    ]


def test_automata_are_of_the_published_kind() -> None:
    automata = SMALL.automata("train")
    exists = automata.symbol >= 0
    assert ((automata.target >= 0) == exists).all()
    n_edges = exists.sum(2)
    n_states = (n_edges > 0).sum(1)
    assert chisquare(np.bincount(n_states, minlength=13)[4:]).pvalue > 1e-3
    assert chisquare(np.bincount(n_edges[n_edges > 0], minlength=5)[1:]).pvalue > 1e-3
    for symbol, target, states in zip(automata.symbol, automata.target, n_states, strict=True):
        assert (symbol[:states, 0] >= 0).all()
        assert (symbol[states:] == -1).all(), "states that do not exist have no edges"
        assert target.max() < states
        assert len({int(s) for s in symbol.flatten() if s >= 0}) <= 18
        for row in symbol:
            kept = row[row >= 0]
            assert (np.diff(kept) > 0).all(), "deterministic: no symbol twice"
    assert chisquare(np.bincount(automata.symbol[exists], minlength=18)).pvalue > 1e-3


def test_alphabets_differ_in_size() -> None:
    """With an alphabet of c ~ U{4..18} symbols, some automata use few and some many."""
    used = [len(np.unique(s[s >= 0])) for s in SMALL.automata("train").symbol]
    assert min(used) <= 4
    assert max(used) >= 15


def test_train_and_test_automata_are_disjoint() -> None:
    """As tables and as languages; small alphabets, so that equal languages are drawn often."""
    source = RegBench(n_symbols=4, max_states=4, max_edges=2, n_train=300, n_test=100)
    automata = [edges(source, "train", a) for a in range(300)] + [edges(source, "test", a) for a in range(100)]
    assert not any(same_language(a, b) for a, b in combinations(automata, 2))


def test_the_digest_is_that_of_the_language() -> None:
    """Drawn at random and compared with the walk through both."""
    rng = np.random.default_rng(0)
    symbol = np.sort(rng.permuted(np.tile(np.arange(3), (60, 3, 1)), axis=2)[..., :2], 2)
    symbol[rng.random((60, 3)) < 0.6, 1] = -1
    target = np.where(symbol >= 0, rng.integers(0, 3, symbol.shape), -1)
    digest = _languages(symbol, target)
    tables = [
        [{int(s): int(t) for s, t in zip(*state, strict=True) if s >= 0} for state in zip(*rows, strict=True)]
        for rows in zip(symbol, target, strict=True)
    ]
    equal = 0
    for a, b in combinations(range(60), 2):
        assert (digest[a] == digest[b]) == same_language(tables[a], tables[b])
        equal += int(digest[a] == digest[b])
    assert equal > 5


def test_more_automata_than_there_are_is_refused() -> None:
    with pytest.raises(InputError, match="different automata"):
        RegBench(n_symbols=4, max_states=4, max_edges=1, n_train=200_000).automata("train")


def same_language(first: list[dict[int, int]], second: list[dict[int, int]]) -> bool:
    """Walk both at once: they agree where every pair of states reached allows the same symbols."""
    waiting, seen = [(0, 0)], {(0, 0)}
    while waiting:
        a, b = waiting.pop()
        if first[a].keys() != second[b].keys():
            return False
        for symbol in first[a]:
            pair = (first[a][symbol], second[b][symbol])
            if pair not in seen:
                seen.add(pair)
                waiting.append(pair)
    return True


@pytest.mark.parametrize("split", ["train", "test"])
def test_strings_follow_one_automaton(split: Any) -> None:
    """Found by trying all: the automaton whose transitions allow the whole prompt is the one of `distributions`."""
    tokens, targets, mask = SMALL.batch(3, 60, split=split)
    truth = SMALL.distributions(3, 60, split=split)
    automata = [edges(SMALL, split, a) for a in range(len(SMALL.automata(split).symbol))]
    chosen = []
    for row, following, scored, distribution in zip(tokens.tolist(), targets.tolist(), mask, truth, strict=True):
        prompt = [*row, following[-1]]
        fits = [a for a, automaton in enumerate(automata) if allows(automaton, prompt)]
        assert fits
        if len(fits) == 1:
            chosen.append(fits[0])
        state = automata[fits[0]][0].get(prompt[0], 0)
        for t, symbol in enumerate(following):
            expected = torch.zeros(20)
            if symbol < SEPARATOR:
                allowed = automata[fits[0]][state]
                expected[list(allowed)] = 1 / len(allowed)
                state = allowed[symbol]
            else:
                state = 0
            if len(fits) == 1:
                torch.testing.assert_close(distribution[t], expected)
            assert bool(scored[t]) == (symbol < SEPARATOR or (split == "train" and symbol == SEPARATOR))
    assert len(chosen) > 50
    assert max(Counter(chosen).values()) == 1, "no automaton twice"


def allows(automaton: list[dict[int, int]], prompt: list[int]) -> bool:
    state = 0
    for symbol in prompt:
        if symbol == PADDING:
            break
        if symbol == SEPARATOR:
            state = 0
        elif symbol in automaton[state]:
            state = automaton[state][symbol]
        else:
            return False
    return True


def test_next_symbols_are_as_frequent_as_their_distribution_says() -> None:
    """Counts of the k-th allowed symbol, over all positions with as many allowed symbols."""
    _, targets, _ = SMALL.batch(0, 300)
    truth = SMALL.distributions(0, 300)
    for n in (2, 3, 4):
        rows = (truth > 0).sum(-1) == n
        allowed = (truth[rows] > 0).nonzero()[:, 1].view(-1, n)
        place = (allowed == targets[rows][:, None]).int()
        assert (place.sum(1) == 1).all()
        # one automaton's positions repeat its words, so that every hundredth position is taken as independent
        assert chisquare(place.argmax(1)[::100].bincount(minlength=n).numpy()).pvalue > 1e-3


def test_prompts_have_the_published_sizes() -> None:
    source = RegBench(n_train=300, n_test=10)
    tokens, targets, mask = source.batch(0, 300)
    assert tokens.shape == (300, 1019)
    prompts = torch.cat([tokens, targets[:, -1:]], 1)
    n_strings = (prompts == SEPARATOR).sum(1) + 1
    assert (int(n_strings.min()), int(n_strings.max())) == (10, 20)
    assert chisquare(np.bincount(n_strings, minlength=21)[10:]).pvalue > 1e-3
    lengths = []
    for row in prompts.tolist():
        text = row[: row.index(PADDING)] if PADDING in row else row
        cuts = [-1, *[t for t, token in enumerate(text) if token == SEPARATOR], len(text)]
        lengths += [b - a - 1 for a, b in pairwise(cuts)]
    assert chisquare(np.bincount(lengths, minlength=51)[1:]).pvalue > 1e-3
    assert (mask == (targets != PADDING)).all()


def test_every_automaton_takes_its_turn() -> None:
    source = RegBench(n_train=5, n_test=5, length=50)
    first = source.batch(0, 12).inputs
    assert first.shape == (12, 50)
    _, _, rows = source._prompts(0, 12, "train")
    assert sorted(Counter(rows.tolist()).values()) == [2, 2, 2, 3, 3]
