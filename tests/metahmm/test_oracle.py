"""The oracle against enumeration and one HMM a task; its identities, streaming, pruning and scales."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from commissure.core.errors import DegenerateError, InputError
from commissure.core.mixer import select, where
from commissure.metahmm import HMMFilter, MetaHMM
from commissure.metahmm.oracle import BayesOracle
from commissure.metahmm.oracle_reference import dense_reference, enumeration_reference

spec = importlib.util.spec_from_file_location("oracle_families", Path(__file__).parent / "oracle_families.py")
families = importlib.util.module_from_spec(spec)
spec.loader.exec_module(families)
Family, draw_family, draw_prior, normalized = (
    families.Family, families.draw_family, families.draw_prior, families.normalized,
)  # fmt: skip

DTYPES = [torch.float64, torch.float32]
RESCALES = ["joint", "task"]
TINY = draw_family(4, 4, 4, 6, seed=1)


def total_variation(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """|p - q|_1 of log probabilities."""
    return (a.double().exp() - b.double().exp()).abs().sum(-1)


@pytest.mark.parametrize("prior", [None, draw_prior(16)], ids=["uniform", "skewed"])
@pytest.mark.parametrize("rescale", RESCALES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_enumeration_of_every_path_and_task(dtype, rescale, prior):
    """16 tasks, 4 states, 5 tokens, any start: 1e-12 in float64, 1e-6 in float32."""
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    oracle = BayesOracle(TINY, prior=prior, dtype=dtype, rescale=rescale)
    weights = torch.full((16,), 1 / 16, dtype=torch.float64) if prior is None else prior
    for seed in range(3):
        tokens = torch.randint(6, (1, 5), generator=torch.Generator().manual_seed(seed))
        told = oracle(tokens)
        want = enumeration_reference(*TINY.tasks(), weights, tokens[0])
        assert (told.log_probs[0].exp() - want.log_probs.exp()).abs().max() <= tolerance
        assert (told.log_evidence[0] - want.log_evidence).abs().max() <= 10 * tolerance
        assert (told.task_entropy[0] - want.task_entropy).abs().max() <= 10 * tolerance
        assert (oracle.epistemic(tokens)[0] - want.epistemic).abs().max() <= 10 * tolerance
        assert (oracle.task_posterior(tokens)[0] - want.posterior[-1]).abs().max() <= tolerance
        marginals = oracle.marginals(tokens)
        table = want.posterior.view(-1, 4, 4)
        assert (marginals.transition[0] - table.sum(2)).abs().max() <= tolerance
        assert (marginals.emission[0] - table.sum(1)).abs().max() <= tolerance


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 7), st.integers(1, 13), st.integers(1, 70)),
    time=st.integers(0, 40),
    seed=st.integers(0, 2**16),
)
def test_one_hmm_a_task(sizes, time, seed):
    family = draw_family(*sizes, seed=seed)
    n_tasks = sizes[0] * sizes[2]
    prior = draw_prior(n_tasks, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    tasks = torch.randint(n_tasks, (3,), generator=generator)
    tokens = family.sample(tasks, time, seed=seed)
    oracle, apart = BayesOracle(family, prior=prior), BayesOracle.from_hmms(*family.tasks(), prior=prior)
    for row in range(3):
        want = dense_reference(*family.tasks(), prior, tokens[row])
        for one in (oracle, apart):
            told = one(tokens)
            assert (told.log_probs[row].exp() - want.log_probs.exp()).abs().max() <= 1e-12
            torch.testing.assert_close(told.log_evidence[row], want.log_evidence, rtol=1e-12, atol=1e-11)
            torch.testing.assert_close(told.task_entropy[row], want.task_entropy, rtol=1e-11, atol=1e-12)
            torch.testing.assert_close(one.epistemic(tokens)[row], want.epistemic, rtol=1e-11, atol=1e-12)
            torch.testing.assert_close(one.task_posterior(tokens)[row], want.posterior[-1], rtol=1e-9, atol=1e-13)


def test_the_reference_of_one_hmm_a_task_by_enumeration():
    tokens, prior = torch.tensor([0, 3, 3, 1]), draw_prior(16, seed=5)
    a, b = (f(*TINY.tasks(), prior, tokens) for f in (dense_reference, enumeration_reference))
    for found, want in zip(a, b, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-13)


@pytest.fixture(scope="module")
def small():
    env = MetaHMM.from_preset("small", seed=15)
    return env, env.sample(torch.tensor([7, 9000]), 200, seed=3).tokens


def test_small_equals_one_hmm_a_task(small):
    """12,288 tasks, 200 tokens: 1e-12 in float64; 1e-6 in float32."""
    env, tokens = small
    family = Family(env.initial, env.transitions, env.emissions)
    want = dense_reference(*family.tasks(), torch.full((12288,), 1 / 12288, dtype=torch.float64), tokens[0])
    for dtype, tolerance in zip(DTYPES, (1e-12, 1e-6), strict=True):
        told = BayesOracle(env, dtype=dtype)(tokens)
        assert (told.log_probs[0].exp() - want.log_probs.exp()).abs().max() <= tolerance
        assert (told.log_evidence[0] / want.log_evidence - 1)[1:].abs().max() <= 10 * tolerance
        assert (told.task_entropy[0] - want.task_entropy).abs().max() <= 10 * tolerance


def test_before_the_first_token_the_predictive_is_that_of_the_start(small):
    env, tokens = small
    start = torch.einsum("s,wsv->v", env.initial, normalized(env.emissions)) / len(env.emissions)
    torch.testing.assert_close(BayesOracle(env).log_probs(tokens)[:, 0].exp(), start.expand(2, -1), rtol=0, atol=1e-14)


@pytest.mark.parametrize("variant", ["corrected", "reference"])
def test_evidence_is_the_sum_of_the_log_predictives(variant):
    """Rows of the half precision matrices are off by 2.5e-4; the oracle's are not."""
    env = MetaHMM.from_preset("small", seed=23, variant=variant)
    tokens = env.sample(torch.tensor([11, 5000]), 60, seed=0).tokens
    for dtype, tolerance in zip(DTYPES, (1e-10, 1e-4), strict=True):
        told = BayesOracle(env, dtype=dtype)(tokens)
        own = told.log_probs[:, :-1].gather(2, tokens[:, :, None])[:, :, 0].double().cumsum(1)
        assert (own - told.log_evidence[:, 1:]).abs().max() <= tolerance
        sums = told.log_probs.double().exp().sum(2)
        assert (sums - 1).abs().max() <= (1e-12 if dtype == torch.float64 else 1e-6)


def test_the_oracle_is_calibrated_on_its_own_data():
    """E[-log p(theta* | x)] = E[H] and E[-log p*(x)] = E[H[p*]], within three standard errors of paired differences."""
    env = MetaHMM.from_preset("e64", seed=4)
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(64, (3000,), generator=generator)
    tokens = env.sample(truth, 13, seed=1).tokens
    oracle = BayesOracle(env)
    told = oracle(tokens)
    for t in (1, 5, 12):
        own = -oracle.task_posterior(tokens[:, :t]).gather(1, truth[:, None])[:, 0].log()
        gap = own - told.task_entropy[:, t]
        assert gap.mean().abs() <= 3 * gap.std() / math.sqrt(3000)
        loss = -told.log_probs[:, t].gather(1, tokens[:, t : t + 1])[:, 0]
        gap = loss - torch.special.entr(told.log_probs[:, t].exp()).sum(1)
        assert gap.mean().abs() <= 3 * gap.std() / math.sqrt(3000)


def test_order_and_names_do_not_matter():
    """Permuted variants, relabelled states, relabelled tokens."""
    family, prior = draw_family(5, 4, 3, 7, seed=2), draw_prior(15, seed=2)
    tokens = family.sample(torch.tensor([0, 8, 14]), 30, seed=0)
    plain = BayesOracle(family, prior=prior)
    want, posterior = plain(tokens), plain.task_posterior(tokens)
    generator = torch.Generator().manual_seed(3)
    u, w, s, v = (torch.randperm(n, generator=generator) for n in (5, 3, 4, 7))

    moved = BayesOracle(
        Family(family.initial, family.transitions[u], family.emissions[w]), prior=prior.view(5, 3)[u][:, w].flatten()
    )
    torch.testing.assert_close(moved(tokens).log_probs, want.log_probs, rtol=1e-11, atol=1e-12)
    moved_posterior = moved.task_posterior(tokens).view(3, 5, 3)
    torch.testing.assert_close(moved_posterior, posterior.view(3, 5, 3)[:, u][:, :, w], rtol=1e-11, atol=1e-14)

    hidden = Family(family.initial[s], family.transitions[:, s][:, :, s], family.emissions[:, s])
    torch.testing.assert_close(
        BayesOracle(hidden, prior=prior)(tokens).log_probs, want.log_probs, rtol=1e-11, atol=1e-12
    )

    seen = BayesOracle(Family(family.initial, family.transitions, family.emissions[:, :, v]), prior=prior)
    torch.testing.assert_close(seen(v.argsort()[tokens]).log_probs, want.log_probs[:, :, v], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("rescale", RESCALES)
def test_twins_have_equal_posteriors(rescale):
    family = draw_family(6, 4, 3, 7, seed=2)
    twins = Family(family.initial, family.transitions[[0, 1, 2, 1]], family.emissions)
    tokens = family.sample(torch.tensor([4]), 50, seed=0)
    posterior = BayesOracle(twins, rescale=rescale).task_posterior(tokens).view(4, 3)
    assert torch.equal(posterior[1], posterior[3])


def test_an_assumed_set_of_one_is_a_plain_filter():
    tokens = TINY.sample(torch.tensor([6]), 40, seed=0)
    told = BayesOracle(TINY, tasks=[6])(tokens)
    initial, transition, emission = (x[6:7] for x in TINY.tasks())
    want = dense_reference(initial, transition, emission, torch.ones(1, dtype=torch.float64), tokens[0])
    torch.testing.assert_close(told.log_probs[0], want.log_probs, rtol=1e-12, atol=1e-12)
    assert told.task_entropy.abs().max() <= 1e-14


def test_tasks_that_are_not_assumed_stay_out():
    tokens = TINY.sample(torch.tensor([6, 1]), 20, seed=0)
    ids, prior = torch.tensor([13, 2, 6]), torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    whole = torch.zeros(16, dtype=torch.float64).index_put((ids,), prior)
    some, all_ = BayesOracle(TINY, tasks=ids, prior=prior), BayesOracle(TINY, prior=whole)
    for a, b in zip(some(tokens), all_(tokens), strict=True):
        assert torch.equal(a, b)
    posterior = some.task_posterior(tokens)
    assert (posterior[:, ids] > 0).all()
    torch.testing.assert_close(posterior[:, ids].sum(1), torch.ones(2, dtype=torch.float64))


@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(
    sizes=st.tuples(st.integers(1, 6), st.integers(1, 5), st.integers(1, 10), st.integers(2, 9)),
    rescale=st.sampled_from(RESCALES),
    prune=st.sampled_from([0.0, 1e-3]),
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=5),
    seed=st.integers(0, 2**16),
)
def test_steps_batches_and_padding_agree(sizes, rescale, prune, lengths, seed):
    family = draw_family(*sizes, seed=seed)
    oracle = BayesOracle(family, rescale=rescale, prune=min(prune, 0.5 / sizes[0]))
    batch, time = len(lengths), max(lengths)
    tasks = torch.arange(batch) % (sizes[0] * sizes[2])
    tokens, ends = family.sample(tasks, time, seed=seed), torch.tensor(lengths)
    padded = tokens.masked_fill(torch.arange(time) >= ends[:, None], -99)
    told, posterior = oracle(padded, ends), oracle.task_posterior(padded, ends)
    state, rows = oracle.init_state(batch), [told.log_probs[:, 0]]
    for t in range(time):
        log_probs, after = oracle.step(tokens[:, t], state)
        state = where(ends > t, after, state)
        rows.append(log_probs)
    for row, end in enumerate(lengths):
        alone = oracle(tokens[row : row + 1, :end])
        for a, b in zip(told, alone, strict=True):
            torch.testing.assert_close(a[row, : end + 1], b[0], rtol=1e-12, atol=1e-13)
            assert a[row, end + 1 :].isnan().all()
        stepped = torch.stack(rows[: end + 1], 0)[:, row]
        torch.testing.assert_close(stepped, told.log_probs[row, : end + 1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(oracle.posterior_of(state), posterior, rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(
        state.log_evidence, told.log_evidence.gather(1, ends[:, None])[:, 0], rtol=1e-12, atol=1e-12
    )


def test_chosen_rows_of_a_state_go_on_as_they_were():
    oracle, index = BayesOracle(TINY), torch.tensor([2, 0, 2])
    state = oracle.init_state(3)
    for token in torch.tensor([[0, 1, 2], [3, 3, 0]]):
        _, state = oracle.step(token, state)
    kept = [field.clone() for field in state]
    following = torch.tensor([5, 1, 2])
    chosen, _ = oracle.step(following[index], select(state, index))
    torch.testing.assert_close(chosen, oracle.step(following, state)[0][index], rtol=1e-13, atol=1e-13)
    assert all(torch.equal(a, b) for a, b in zip(kept, state, strict=True))


def test_factor_marginals_add_up_the_tasks():
    env = MetaHMM.from_preset("e64", seed=1)
    tokens = env.sample([3, 40], 15, seed=0).tokens
    oracle = BayesOracle(env)
    told, factors = oracle.factor_marginals(tokens), env.task_to_factors(range(64))
    posterior = oracle.task_posterior(tokens)
    assert told.names == tuple(env.factor_names)
    for number, (size, found) in enumerate(zip(env.factor_sizes, told.posteriors, strict=True)):
        want = torch.stack([posterior[:, factors[:, number] == value].sum(1) for value in range(size)], 1)
        torch.testing.assert_close(found[:, -1], want, rtol=1e-12, atol=1e-14)
    with pytest.raises(InputError, match="factor_sizes"):
        BayesOracle(TINY).factor_marginals(tokens)


def test_drawn_tasks_follow_the_posterior():
    tokens = TINY.sample(torch.tensor([3, 12]), 4, seed=0)
    oracle = BayesOracle(TINY, tasks=range(12))
    drawn = oracle.sample_tasks(tokens, 20_000, seed=1)
    assert drawn.shape == (2, 20_000)
    posterior = oracle.task_posterior(tokens)
    for row in range(2):
        share = drawn[row].bincount(minlength=16) / 20_000
        error = (posterior[row] * (1 - posterior[row]) / 20_000).sqrt()
        assert ((share - posterior[row]).abs() <= 4.5 * error).all()
    assert torch.equal(drawn, oracle.sample_tasks(tokens, 20_000, seed=1))
    everywhere = oracle.sample_tasks(tokens, 4000, seed=2, every_position=True, lengths=torch.tensor([4, 2]))
    assert everywhere.shape == (2, 5, 4000)
    for t, row in ((0, 0), (2, 0), (2, 1), (4, 1)):
        want = oracle.task_posterior(tokens[row : row + 1, : min(t, 4 if row == 0 else 2)])[0]
        share = everywhere[row, t].bincount(minlength=16) / 4000
        assert ((share - want).abs() <= 4.5 * (want * (1 - want) / 4000).sqrt()).all()
    assert not torch.equal(everywhere[0, 1], everywhere[0, 2])


def test_pruning_stays_within_the_mass_it_reports():
    """1e-8 on 100 sequences of 12,288 tasks: KL <= 1e-6, and errors that the later mass of what was dropped allows.

    |p - p*|_1 is at most twice that mass, a martingale: its mean over sequences is the mean of the mass dropped, and it
    exceeds c times that in at most 1 / c of the sequences.
    """
    env = MetaHMM.from_preset("small", seed=15)
    tasks = torch.randint(env.n_tasks, (100,), generator=torch.Generator().manual_seed(0))
    tokens = env.sample(tasks, 60, seed=1).tokens
    exact, pruned = BayesOracle(env)(tokens), BayesOracle(env, prune=1e-8)(tokens)
    kl = (exact.log_probs.exp() * (exact.log_probs - pruned.log_probs)).sum(2)
    assert kl.max() <= 1e-6
    error, dropped = total_variation(exact.log_probs, pruned.log_probs), pruned.dropped_mass
    assert error.max() > 1e-12
    assert (error.mean(0) <= 2 * dropped.mean(0) + 1e-14).all()
    for c in (2, 5, 20, 100):
        assert (error > 2 * c * dropped + 1e-12).any(1).double().mean() <= 1 / c
    assert error.max() <= dropped[:, -1].sum()
    assert not dropped[:, :8].any()
    assert (dropped.diff(dim=1) >= 0).all()
    assert (dropped[:, -1] > 0).all()
    assert (pruned.log_evidence - exact.log_evidence).abs().max() <= 1e-5


def test_a_threshold_at_the_prior_of_a_variant_is_refused():
    for prune in (1 / 4, 0.3, -1e-9, math.nan):
        with pytest.raises(InputError, match=r"prune.*least prior mass"):
            BayesOracle(TINY, prune=prune)
    BayesOracle(TINY, prune=0.2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_scale_for_each_task_revives_what_one_scale_has_lost(dtype):
    """One task explains 600 tokens, then another all the rest: by then it is far below the smallest number."""
    family = Family(
        torch.ones(1, dtype=torch.float64),
        torch.ones(1, 1, 1, dtype=torch.float64),
        torch.tensor([[[0.99, 0.01]], [[0.01, 0.99]]], dtype=torch.float64),
    )
    tokens = torch.tensor([[0] * 600 + [1] * 1200])
    want = dense_reference(*family.tasks(), torch.full((2,), 0.5, dtype=torch.float64), tokens[0])
    told = BayesOracle(family, rescale="task", dtype=dtype)(tokens)
    tolerance = 1e-11 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(told.log_probs[0].double(), want.log_probs, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(told.log_evidence[0], want.log_evidence, rtol=tolerance, atol=tolerance)
    assert told.log_probs[0, -1, 1].exp() > 0.98
    lost = BayesOracle(family, rescale="joint", dtype=dtype)(tokens)
    assert lost.log_probs[0, -1, 1].exp() < 0.02
    even = torch.full((1, 1, 2), 0.5, dtype=torch.float64)  # a third task, which is not assumed
    wider = BayesOracle(
        family._replace(emissions=torch.cat([family.emissions, even])), tasks=[0, 1], rescale="task", dtype=dtype
    )
    for found, expected in zip(wider(tokens), told, strict=True):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert bool(wider.epistemic(tokens).isfinite().all())


def test_tokens_and_lengths_of_any_kind():
    oracle, tokens = BayesOracle(TINY), TINY.sample(torch.arange(3), 9, seed=0)
    lengths = torch.tensor([9, 0, 4])
    want = oracle(tokens, lengths)
    kinds = [tokens.int(), tokens.to(torch.uint8), tokens.numpy(), tokens.numpy()[:, ::-1][:, ::-1], tokens.tolist()]
    for kind in kinds:
        for ends in (lengths.int(), lengths.numpy(), lengths.tolist()):
            for found, expected in zip(oracle(kind, ends), want, strict=True):
                torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    log_probs, state = oracle.step([0, 1, 2], oracle.init_state(3))
    for token in (torch.tensor([0, 1, 2], dtype=torch.int32), np.array([0, 1, 2])):
        assert torch.equal(oracle.step(token, oracle.init_state(3))[0], log_probs)
    assert torch.equal(oracle.posterior_of(state), oracle.task_posterior([[0], [1], [2]]))


def test_matrices_of_any_kind_and_one_start_for_all():
    initial, transition, emission = TINY.tasks()
    tokens, prior = TINY.sample(torch.arange(3), 9, seed=0), draw_prior(16)
    want = BayesOracle.from_hmms(initial, transition, emission, prior=prior).log_probs(tokens)
    matrices = (transition.numpy(), emission.numpy()), (transition.tolist(), emission.tolist())
    for move, emit in matrices:
        for start in (initial.numpy(), initial[0], initial[0].tolist()):
            found = BayesOracle.from_hmms(start, move, emit, prior=prior.numpy())
            assert torch.equal(found.log_probs(tokens), want)


def test_chunks_keep_the_numbers_of_rows_and_draws(monkeypatch):
    oracle, tokens = BayesOracle(TINY), TINY.sample(torch.arange(5), 6, seed=0)
    lengths = [6, 3, 0, 6, 2]
    want = oracle.sample_tasks(tokens, 7, seed=3, lengths=lengths, every_position=True)
    told = oracle(tokens, lengths)
    monkeypatch.setattr("commissure.metahmm.oracle._STATE_BYTES", 2 * 16 * 4 * 8)  # two rows at once
    assert torch.equal(oracle.sample_tasks(tokens, 7, seed=3, lengths=lengths, every_position=True), want)
    for found, expected in zip(oracle(tokens, lengths), told, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    tokens[3, 4] = 6
    with pytest.raises(InputError, match=r"tokens\[3, 4\] = 6"):
        oracle(tokens)


def test_impossible_evidence():
    eye = torch.eye(3, dtype=torch.float64)
    family = Family(torch.full((3,), 1 / 3, dtype=torch.float64), eye[None], eye[None])
    tokens = torch.tensor([[0, 0, 0, 0], [1, 1, 2, 1]])
    for rescale in RESCALES:
        with pytest.raises(DegenerateError, match=r"tokens\[1, 2\] = 2: probability 0"):
            BayesOracle(family, rescale=rescale)(tokens)
        oracle = BayesOracle(family, rescale=rescale, on_impossible="-inf")
        told = oracle(tokens)
        assert told.log_evidence[1, 3:].tolist() == [-math.inf, -math.inf]
        assert told.log_probs[1, 3:].isnan().all()
        assert told.task_entropy[1, 3:].isnan().all()
        assert not told.log_evidence[:, :3].isinf().any()
        assert not told.log_probs[0].isnan().any()
        torch.testing.assert_close(
            told.log_evidence[0], told.log_evidence[0, 1] * torch.tensor([0.0, 1, 1, 1, 1]).double()
        )
        state = oracle.init_state(2)
        for t in range(4):
            log_probs, state = oracle.step(tokens[:, t], state)
            torch.testing.assert_close(log_probs, told.log_probs[:, t + 1], equal_nan=True)
        torch.testing.assert_close(state.log_evidence, told.log_evidence[:, 4])


def test_no_task_is_drawn_where_none_is_possible():
    eye = torch.eye(2).expand(2, 2, 2)
    options = {"initial": torch.full((2, 2), 0.5), "transition": eye, "emission": eye}
    tokens = torch.tensor([[0, 0, 0], [0, 0, 1]])
    with pytest.raises(DegenerateError, match=r"tokens\[1\]: no assumed task"):
        BayesOracle.from_hmms(**options, on_impossible="-inf").sample_tasks(tokens, 3, seed=0)
    with pytest.raises(DegenerateError, match=r"tokens\[1, 2\] = 1"):
        BayesOracle.from_hmms(**options).sample_tasks(tokens, 3, seed=0, every_position=True)


def test_results_do_not_depend_on_threads_or_on_neighbours():
    oracle = BayesOracle(TINY, dtype=torch.float32)
    tokens = TINY.sample(torch.arange(16), 70, seed=0)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = oracle(tokens)
        torch.set_num_threads(3)
        three = oracle(tokens)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))
    alone = oracle(tokens[5:6])
    assert all(torch.equal(a[5], b[0]) for a, b in zip(one, alone, strict=True))


def test_bad_inputs_are_named():
    good = {"initial": TINY.initial, "transitions": TINY.transitions, "emissions": TINY.emissions}
    flawed = TINY.transitions.clone()
    flawed[2, 1] *= 1.01
    for name, value in (("transitions", flawed), ("transitions", flawed[0]), ("emissions", -TINY.emissions)):
        with pytest.raises(InputError, match=name):
            BayesOracle(Family(**good | {name: value}))
    with pytest.raises(InputError, match=r"transitions\[2, 1\]"):
        BayesOracle(Family(**good | {"transitions": flawed}))
    with pytest.raises(InputError, match="initial"):
        BayesOracle(Family(**good | {"initial": torch.full((5,), 0.2)}))
    bad_options = {"tasks": [[], [16], [-1], [1, 1]], "prior": [[0.5] * 16, [1.0], [-1.0] + [2 / 15] * 15],
                   "dtype": [torch.float16], "rescale": ["no"], "on_impossible": ["ignore"]}  # fmt: skip
    for name, values in bad_options.items():
        for value in values:
            with pytest.raises(InputError, match=name):
                BayesOracle(TINY, **{name: value})
    oracle = BayesOracle(TINY)
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    for bad in (tokens - 1, tokens + 6):
        with pytest.raises(InputError, match=r"tokens\[0, 0\]"):
            oracle(bad)
    for bad in (tokens[0], tokens.double(), tokens > 0, [[0, 1], [2]], [["a"]], [[math.nan]], None, 3, []):
        for method in (oracle, oracle.log_probs, oracle.epistemic, oracle.marginals, oracle.task_posterior):
            with pytest.raises(InputError, match="tokens"):
                method(bad)
        with pytest.raises(InputError, match="tokens"):
            oracle.sample_tasks(bad, 2, seed=0, every_position=True)
    batch = MetaHMM.from_preset("tiny", seed=0).sample([0, 1], 3, seed=0)
    with pytest.raises(InputError, match=r"pass tokens=batch\.tokens"):
        oracle(batch)
    for bad in (torch.tensor([4, 0]), torch.tensor([-1, 0]), [1], [1.0, 2.0], 1, [True, False], "ab"):
        with pytest.raises(InputError, match="lengths"):
            oracle(tokens, bad)
    for n in (0, 2.5, True, None):
        with pytest.raises(InputError, match="n = "):
            oracle.sample_tasks(tokens, n, seed=0)
    for batch_size in (-1, 2.5, True, "2", 10**14):
        with pytest.raises(InputError, match="batch_size"):
            oracle.init_state(batch_size)
    for token in (tokens, [0.5, 1.0], [0], [0, 6]):
        with pytest.raises(InputError, match=r"token|state\.joint"):
            oracle.step(token, oracle.init_state(2))
    for state in (None, tuple(oracle.init_state(2))):
        for use in (lambda state: oracle.step([0, 1], state), oracle.posterior_of):
            with pytest.raises(InputError, match="state"):
                use(state)


def test_bad_families_are_named():
    good = {"initial": TINY.initial, "transition": TINY.transitions, "emission": TINY.emissions}
    bad = {
        "initial": [TINY.initial[:3], TINY.initial[None], TINY.initial > 0, None, TINY.initial + 0.1],
        "transition": [TINY.transitions[0], TINY.transitions[:, :2], TINY.transitions * 2, "abc", [[[0.5], [0.5]]]],
        "emission": [TINY.emissions[:2], TINY.emissions[:, :3], TINY.emissions * math.nan, TINY.emissions[..., :0]],
    }
    for name, values in bad.items():
        for value in values:
            with pytest.raises(InputError, match=rf"^{name}(\W|$)"):
                BayesOracle.from_hmms(**good | {name: value})
    for env in (3, None, torch.eye(3)):
        with pytest.raises(InputError, match="from_hmms"):
            BayesOracle(env)
    for device in ("abc", 0.5, [], *(() if torch.cuda.is_available() else ("cuda",))):
        with pytest.raises(InputError, match="device"):
            BayesOracle(TINY, device=device)
    for prune in ("a", None, True):
        with pytest.raises(InputError, match="prune"):
            BayesOracle(TINY, prune=prune)
    for name, value in {"prior": ["a"] * 16, "tasks": [0.5]}.items():
        with pytest.raises(InputError, match=name):
            BayesOracle(TINY, **{name: value})
    for batch_size in (-1, 2.5):
        with pytest.raises(InputError, match="batch_size"):
            HMMFilter(*TINY).init_state(batch_size)
    with pytest.raises(InputError, match="initial"):
        HMMFilter(TINY.initial[:3], TINY.transitions, TINY.emissions)
    with pytest.raises(InputError, match=r"x_t\.dtype"):
        HMMFilter(*TINY)(torch.ones(1, 2, 6))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_gives_the_same():
    tokens = TINY.sample(torch.arange(4), 20, seed=0)
    there = BayesOracle(TINY, device="cuda")
    for found, want in zip(there(tokens), BayesOracle(TINY)(tokens), strict=True):
        assert found.device.type == "cuda"
        torch.testing.assert_close(found.cpu(), want, rtol=1e-5, atol=1e-5)
    assert there.sample_tasks(tokens, 3, seed=0, every_position=True).shape == (4, 21, 3)


def test_empty_batches_and_no_tokens():
    oracle = BayesOracle(TINY)
    assert oracle(torch.empty(0, 3, dtype=torch.int64)).log_probs.shape == (0, 4, 6)
    told = oracle(torch.empty(2, 0, dtype=torch.int64))
    assert told.log_probs.shape == (2, 1, 6)
    torch.testing.assert_close(told.task_entropy, torch.full((2, 1), math.log(16), dtype=torch.float64))
    assert not told.log_evidence.any()


def test_against_hmmlearn():
    """Log likelihood of single tasks."""
    hmm = pytest.importorskip("hmmlearn.hmm")
    tokens = TINY.sample(torch.arange(16), 50, seed=2)
    for task in range(16):
        model = hmm.CategoricalHMM(4, n_features=6)
        initial, transition, emission = (x[task].numpy() for x in TINY.tasks())
        model.startprob_, model.transmat_, model.emissionprob_ = initial, transition, emission
        told = BayesOracle(TINY, tasks=[task], dtype=torch.float32)(tokens[task : task + 1])
        assert float(told.log_evidence[0, -1]) == pytest.approx(model.score(tokens[task][:, None].numpy()), rel=1e-4)


def test_chunks_of_rows_keep_their_lengths_and_their_numbers(monkeypatch):
    """Memory for one row at a time: the same results, and an impossible token is named by its own row."""
    tokens, ends = TINY.sample(torch.arange(5), 12, seed=0), torch.tensor([12, 3, 0, 7, 12])
    oracle = BayesOracle(TINY)
    calls = (oracle, oracle.log_probs, oracle.epistemic, oracle.marginals, oracle.task_posterior)
    whole = [call(tokens, ends) for call in calls]
    eye = torch.eye(3, dtype=torch.float64)
    still = BayesOracle(Family(torch.full((3,), 1 / 3, dtype=torch.float64), eye[None], eye[None]))
    monkeypatch.setattr("commissure.metahmm.oracle._STATE_BYTES", 1)
    for call, want in zip(calls, whole, strict=True):
        found = call(tokens, ends)
        for a, b in zip(*((x if isinstance(x, tuple) else (x,)) for x in (found, want)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13, equal_nan=True)
    with pytest.raises(DegenerateError, match=r"tokens\[2, 1\] = 0: probability 0"):
        still(torch.tensor([[0, 0], [1, 1], [2, 0]]))


def test_every_result_ends_with_its_row():
    """Ragged rows of every output are those of the row alone, NaN after its end."""
    env = MetaHMM.from_preset("e64", seed=1)
    tokens, ends = env.sample([3, 40, 17], 9, seed=0).tokens, torch.tensor([4, 9, 0])
    oracle = BayesOracle(env)
    calls = (
        lambda *x: [oracle.log_probs(*x)],
        lambda *x: [oracle.epistemic(*x)],
        lambda *x: [*oracle.marginals(*x)],
        lambda *x: [*oracle.factor_marginals(*x).posteriors],
    )
    for call in calls:
        told = call(tokens, ends)
        for row, end in enumerate(ends.tolist()):
            for a, b in zip(told, call(tokens[row : row + 1, :end]), strict=True):
                torch.testing.assert_close(a[row, : end + 1], b[0], rtol=1e-12, atol=1e-14)
                assert a[row, end + 1 :].isnan().all()
