"""Counts of every context: against a scan of the corpus, and ranks against scipy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kendalltau, rankdata

from commissure.core.errors import DegenerateError, InputError
from commissure.geometry import InfinityGram, infinity_gram_alignment
from commissure.geometry.infinity_gram import suffix_array, suffix_array_reference

TEXT = (
    "the cat sat on the mat; the dog sat on the log; the cat saw the dog and the dog saw the cat. " * 3
    + "a commissure joins two halves, and the two halves join into one whole, as the whole joins the two. " * 20
)


def scanned(documents: list[list[int]], context: list[int], token: int) -> tuple[float, int, int]:
    """By looking at every place of every document."""
    for n in range(len(context), 0, -1):
        after = [
            document[i + n]
            for document in documents
            for i in range(len(document) - n)
            if document[i : i + n] == context[len(context) - n :]
        ]
        if after:
            return after.count(token) / len(after), n, len(after)
    every = [other for document in documents for other in document]
    return every.count(token) / len(every), 0, len(every)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60))
@settings(deadline=None)
def test_suffixes_are_sorted(text: list[int]) -> None:
    np.testing.assert_array_equal(suffix_array(np.array(text)), suffix_array_reference(np.array(text)))


@given(
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=30), min_size=1, max_size=3),
    st.lists(st.integers(0, 4), min_size=1, max_size=9),
)
@settings(deadline=None)
def test_probabilities_are_those_of_a_scan(documents: list[list[int]], question: list[int]) -> None:
    found = InfinityGram([np.array(document) for document in documents]).next_tokens([question])
    for t, token in enumerate(question):
        told = found.probability[0, t], found.context_length[0, t], found.context_count[0, t]
        assert told == scanned(documents, question[:t], token)


def test_text_of_two_kilobytes_agrees_with_a_scan_of_its_string() -> None:
    text = TEXT[:2000]
    assert len(text) == 2000
    gram = InfinityGram(np.frombuffer(text.encode(), np.uint8))
    asked = "the two halves saw the whole commissure sat, and the dog"
    found = gram.next_tokens(np.frombuffer(asked.encode(), np.uint8)[None])
    for t, letter in enumerate(asked):
        n = int(found.context_length[0, t])
        context = asked[t - n : t]
        places = [i for i in range(len(text) - n) if text.startswith(context, i)]  # one letter at least after it
        after = [text[i + n] for i in places]
        assert found.context_count[0, t] == len(after)
        assert found.probability[0, t] == after.count(letter) / len(after)
        if n < t:
            longer = asked[t - n - 1 : t]
            assert not any(text.startswith(longer, i) for i in range(len(text) - n - 1))


def test_contexts_stay_inside_documents() -> None:
    gram = InfinityGram([np.array([1, 2]), np.array([3, 4])])
    found = gram.next_tokens([[1, 2, 3]])
    assert found.context_length.tolist() == [[0, 1, 0]]  # nothing follows 2 in its document
    assert found.probability[0].tolist() == [0.25, 1.0, 0.25]


def test_a_context_can_be_bounded() -> None:
    gram = InfinityGram(np.array([0, 1, 2, 0, 1, 3, 2, 1, 2]))
    assert gram.next_tokens([[0, 1, 2]]).probability[0, 2] == 1 / 2
    assert gram.next_tokens([[0, 1, 2]], max_context=1).probability[0, 2] == 2 / 3
    assert gram.next_tokens([[0, 1, 2]], max_context=0).probability[0, 2] == 3 / 9


def test_probabilities_of_all_tokens_sum_to_one() -> None:
    rng = np.random.default_rng(0)
    gram = InfinityGram([rng.integers(0, 5, 200), rng.integers(0, 5, 50)])
    contexts = rng.integers(0, 5, (20, 4))
    total = sum(gram.next_tokens(np.c_[contexts, np.full(20, token)]).probability[:, -1] for token in range(5))
    np.testing.assert_allclose(total, 1, rtol=1e-14)


def test_alignment_ranks_ties_at_their_mean() -> None:
    tokens = np.array([[0, 1, 0, 2, 0, 1]])
    gram = InfinityGram(np.array([0, 1, 0, 2, 0, 1, 1, 0]))
    log_probs = np.log([[0.2, 0.2, 0.7, 0.1, 0.7, 0.4]])
    corpus = gram.next_tokens(tokens).probability[0]
    assert len(set(corpus)) < len(corpus)  # ties on both sides
    expected = np.corrcoef(rankdata(log_probs[0]), rankdata(corpus))[0, 1]
    assert infinity_gram_alignment(log_probs, gram.next_tokens(tokens)) == pytest.approx(expected, abs=1e-14)
    assert np.sign(expected) == np.sign(kendalltau(log_probs[0], corpus).statistic)


def test_a_model_that_recites_the_corpus_is_aligned_with_it() -> None:
    rng = np.random.default_rng(1)
    corpus = rng.integers(0, 8, 500)
    gram, tokens = InfinityGram(corpus), corpus[:200].reshape(10, 20)
    corpus = gram.next_tokens(tokens)
    recited = corpus.probability
    assert infinity_gram_alignment(np.log(recited), corpus) == pytest.approx(1, abs=1e-12)
    assert infinity_gram_alignment(-recited, corpus) == pytest.approx(-1, abs=1e-12)


def test_bad_input_is_named() -> None:
    gram = InfinityGram(np.array([0, 1]))
    refused = [(np.array([0.5]), r"documents\[0\]"), ([[1], [-1]], r"documents\[1\]"), ([[[1]]], "documents")]
    for corpus, match in refused:
        with pytest.raises(InputError, match=match):
            InfinityGram(corpus)
    with pytest.raises(DegenerateError, match="no tokens"):
        InfinityGram([])
    for tokens in ([0, 1], [[0.5]], [[-1]], "ab"):
        with pytest.raises(InputError, match="tokens"):
            gram.next_tokens(tokens)
    for bound in (-1, True, 1.0):
        with pytest.raises(InputError, match="max_context"):
            gram.next_tokens([[0]], max_context=bound)
    with pytest.raises(InputError, match="log_probs"):
        infinity_gram_alignment([[0.0]], gram.next_tokens([[0, 1]]))
    with pytest.raises(InputError, match="nan"):
        infinity_gram_alignment([[0.0, np.nan]], gram.next_tokens([[0, 1]]))
    with pytest.raises(DegenerateError, match="equal on one side"):
        infinity_gram_alignment([[-1.0, -1.0]], gram.next_tokens([[0, 1]]))
    with pytest.raises(DegenerateError, match="equal on one side"):
        infinity_gram_alignment([[-1.0, -2.0]], InfinityGram(np.array([1, 1])).next_tokens([[1, 1]]))


def test_empty_rows_have_no_answers() -> None:
    assert InfinityGram(np.array([1])).next_tokens(np.zeros((3, 0), int)).probability.shape == (3, 0)
