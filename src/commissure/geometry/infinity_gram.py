"""What a corpus alone says of the next token: the longest context that it has seen, however long.

    P(w | ..., c_2, c_1) = count(c_n ... c_1 w) / count(c_n ... c_1 followed by any token)
    n: the most last tokens of the context that the corpus has somewhere followed by a token; n = 0: shares of tokens

The corpus is kept as the suffix array of its reverse: contexts that grow to the left are then nested intervals of it,
narrowed one token at a time for all questions at once, and counts of the next token are differences of two positions
in one sorted table.  Contexts do not cross the borders of documents.

A model that recites agrees with these probabilities in rank; their Spearman correlation over training is what
arXiv 2509.23024, section 4, calls memorization.  infini-gram: arXiv 2401.17377.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64, Int, Int64
from numpy.typing import ArrayLike

from commissure.core.errors import DegenerateError, InputError

__all__ = ["InfinityGram", "NextToken", "infinity_gram_alignment", "suffix_array", "suffix_array_reference"]

_MOST = 1 << 31  # tokens, document ends included: two ranks fit into one 64-bit key


class NextToken(NamedTuple):
    """Of every token: its probability after all before it, how many of them the corpus knows, how often it has them."""

    probability: Float64[np.ndarray, "batch time"]
    context_length: Int64[np.ndarray, "batch time"]
    context_count: Int64[np.ndarray, "batch time"]


class InfinityGram:
    """Counts of every context of a corpus: documents of token numbers >= 0, or one array as one document.

    Time O(n log^2 n), some hundred bytes a token while it is built and 40 after.

    >>> gram = InfinityGram([np.array([1, 2, 3, 1, 2, 4])])
    >>> found = gram.next_tokens(np.array([[1, 2, 3], [9, 2, 4]]))
    >>> found.probability.round(3).tolist(), found.context_length.tolist()
    ([[0.333, 1.0, 0.5], [0.0, 0.333, 0.5]], [[0, 1, 2], [0, 0, 1]])
    """

    def __init__(self, documents: Int[np.ndarray, " tokens"] | Sequence[Int[np.ndarray, " tokens"]]) -> None:
        listed = [documents] if isinstance(documents, np.ndarray) else list(documents)
        parts = [_tokens(f"documents[{i}]", document, 1) for i, document in enumerate(listed)]
        if not parts or not any(len(part) for part in parts):
            raise DegenerateError("no tokens: a corpus needs one at least")
        # After every document an end, -1, which no question holds.
        text = np.concatenate([np.append(part, -1) for part in parts])
        if len(text) >= _MOST:
            raise InputError("documents", len(text), f"fewer than {_MOST} tokens")
        self._reverse = text[::-1].copy()
        self._order = suffix_array(self._reverse)
        following = np.append(-1, self._reverse[:-1])[self._order]  # the token after each context that ends there
        self._known = np.append(0, np.cumsum(following >= 0))
        ranks = np.flatnonzero(following >= 0)
        self._next = np.sort(following[ranks] * np.int64(len(text) + 1) + ranks)
        self.n_tokens = int((text >= 0).sum())
        self._shares = np.sort(text[text >= 0])

    def next_tokens(self, tokens: Int[ArrayLike, "batch time"], *, max_context: int | None = None) -> NextToken:
        """For every token of every row, given those before it, the last `max_context` at most."""
        rows = _tokens("tokens", tokens, 2)
        batch, time = rows.shape
        is_whole = isinstance(max_context, int) and not isinstance(max_context, bool)
        if max_context is not None and not (is_whole and max_context >= 0):
            raise InputError("max_context", max_context, "an integer >= 0, or None")
        row, at = np.divmod(np.arange(batch * time), max(1, time))
        length = np.zeros(batch * time, np.int64)
        bottom, top = length.copy(), length + len(self._order)
        active = np.arange(batch * time)
        for depth in range(time if max_context is None else min(time, max_context)):
            active = active[at[active] > depth]
            token = rows[row[active], at[active] - 1 - depth]
            low, high = self._narrow(bottom[active], top[active], depth, token)
            is_known = self._known[high] > self._known[low]
            active = active[is_known]
            length[active], bottom[active], top[active] = depth + 1, low[is_known], high[is_known]
        count, total = self._counts(rows.reshape(-1), bottom, top, length)
        return NextToken(*(found.reshape(batch, time) for found in (count / total, length, total)))

    def _counts(
        self, wanted: np.ndarray, bottom: np.ndarray, top: np.ndarray, length: np.ndarray
    ) -> tuple[Int64[np.ndarray, " asked"], Int64[np.ndarray, " asked"]]:
        base = wanted * np.int64(len(self._order) + 1)
        count = np.searchsorted(self._next, base + top) - np.searchsorted(self._next, base + bottom)
        total = self._known[top] - self._known[bottom]
        free = length == 0
        alone = np.searchsorted(self._shares, wanted[free], "right") - np.searchsorted(self._shares, wanted[free])
        count[free], total[free] = alone, self.n_tokens
        return count, total

    def _narrow(
        self, low: np.ndarray, high: np.ndarray, depth: int, token: np.ndarray
    ) -> tuple[Int64[np.ndarray, " asked"], Int64[np.ndarray, " asked"]]:
        """Within intervals of suffixes that share `depth` tokens: those whose next one is `token`."""
        ends = []
        for is_upper in (False, True):
            left, right = low.copy(), high.copy()
            while (is_open := left < right).any():
                middle = (left + right) // 2
                place = self._order[np.minimum(middle, len(self._order) - 1)] + depth
                found = self._reverse[np.minimum(place, len(self._reverse) - 1)]
                is_below = (place >= len(self._reverse)) | ((found <= token) if is_upper else (found < token))
                left = np.where(is_open & is_below, middle + 1, left)
                right = np.where(is_open & ~is_below, middle, right)
            ends.append(left)
        return ends[0], ends[1]


def infinity_gram_alignment(log_probs: Float[ArrayLike, "batch time"], corpus: NextToken) -> float:
    """Spearman correlation, ties at their mean rank, of a model's probabilities of tokens with the corpus's.

    `log_probs[i, t]`: of the token that `corpus` tells of there, given the same tokens before it.  All equal on one
    side: `DegenerateError`.

    >>> corpus = InfinityGram(np.array([1, 2, 3, 1, 2, 4])).next_tokens([[1, 2, 3]])
    >>> infinity_gram_alignment([[-2.0, -0.1, -0.9]], corpus)
    1.0
    """
    from scipy.stats import spearmanr

    given = np.asarray(log_probs, np.float64)
    if given.shape != corpus.probability.shape:
        raise InputError("log_probs", given.shape, f"shape {corpus.probability.shape}, as the corpus was asked")
    if np.isnan(given).any():
        raise InputError("log_probs", "nan", "numbers, -inf for the impossible")
    if np.ptp(corpus.probability) == 0 or (given == given.flat[0]).all():
        raise DegenerateError("all probabilities are equal on one side: ranks need two values at least")
    return float(spearmanr(given.ravel(), corpus.probability.ravel()).statistic)


def suffix_array(text: Int[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
    """Starts of the suffixes of `text` in ascending order, a shorter one before those it begins; by prefix doubling.

    Manber & Myers, SIAM J. Comput. 22 (1993).

    >>> suffix_array(np.array([2, 1, 2, 1])).tolist()
    [3, 1, 2, 0]
    """
    n, width = len(text), 1
    rank = np.unique(text, return_inverse=True)[1].astype(np.int64) + 1
    while True:
        later = np.zeros(n, np.int64)
        later[: max(0, n - width)] = rank[width:]
        key = rank * np.int64(n + 1) + later
        order = np.argsort(key, kind="stable")
        ordered = key[order]
        rank[order] = np.append(0, np.cumsum(ordered[1:] != ordered[:-1])) + 1
        if n < 2 or rank[order[-1]] == n:
            return order
        width *= 2


def suffix_array_reference(text: Int[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
    """`suffix_array` by sorting the suffixes themselves."""
    whole = text.tolist()
    return np.array(sorted(range(len(whole)), key=lambda i: whole[i:]), np.int64)


def _tokens(name: str, given: ArrayLike, ndim: int) -> Int64[np.ndarray, "*axes"]:
    """Whole numbers >= 0 in an array of so many axes."""
    try:
        found = np.asarray(given)
    except (TypeError, ValueError):
        raise InputError(name, type(given).__name__, "an array of token numbers") from None
    if found.ndim != ndim or not (np.issubdtype(found.dtype, np.integer) or not found.size):
        raise InputError(name, (found.shape, str(found.dtype)), f"integers with {ndim} axes")
    if found.size and (found.min() < 0 or found.max() >= _MOST):
        raise InputError(name, (int(found.min()), int(found.max())), f"token numbers from 0 to {_MOST - 1}")
    return found.astype(np.int64)
