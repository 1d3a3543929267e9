"""The compiled filter of HMM families: every clone against the dense reference, its layouts, limits and errors."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from commissure.core.errors import CommissureWarning, InputError
from commissure.native import hmm, kernels
from commissure.native.hmm import (
    HMMFamily,
    HMMState,
    hmm_family,
    hmm_filter,
    hmm_filter_reference,
    hmm_kernel_available,
    hmm_state,
)

native = kernels() if hmm_kernel_available() else None
CLONES = [] if native is None else native.mesa_clones()
needs_kernel = pytest.mark.skipif(native is None, reason="built without the C++ kernels")
DTYPES = [torch.float64, torch.float32]


def draw(
    variants: int,
    states: int,
    emissions: int,
    vocab: int,
    *,
    tables: int = 1,
    seed: int = 0,
    dead: float = 0.0,
    sharp: float = 6.0,
) -> tuple[HMMFamily, Tensor]:
    """A family with rows of any number of entries, and a prior joint of which about `dead` of the variants are zero."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    transitions = uniform(variants, states, states) * (uniform(variants, states, states) < uniform(variants, 1, 1))
    transitions = transitions + torch.eye(states)[torch.randperm(states, generator=generator)] * 0.1
    emission = uniform(tables, emissions, states, vocab) ** sharp + 1e-4
    joint = uniform(variants, states, emissions) + 1e-2
    joint[torch.rand(variants, generator=generator) < dead] = 0
    joint[int(torch.randint(variants, (), generator=generator))] += 1.0
    rows = (x / x.sum(-1, keepdim=True) for x in (transitions, emission))
    return hmm_family(*rows), joint / joint.sum()


def cast(family: HMMFamily, dtype: torch.dtype) -> HMMFamily:
    return hmm_family(family.transitions.to(dtype), family.emissions.to(dtype))


def starting(joint: Tensor, batch: int, *, per_task: bool = False, dtype: torch.dtype = torch.float64) -> HMMState:
    return hmm_state(joint.to(dtype).expand(batch, *joint.shape).contiguous(), per_task=per_task)


def compiled(clone: str, family: HMMFamily, tokens: Tensor, state: HMMState, lengths: Tensor, **options: Any) -> list:
    """All results of one clone: the state's five fields, then those of HMMFiltered."""
    asked = {"prune": 0.0, "start": True, "entropy": True, "epistemic": True, "marginals": True} | options
    return hmm._filter(list(family), tokens, list(state), lengths, *asked.values(), clone=clone)


def dense(family: HMMFamily, tokens: Tensor, state: HMMState, lengths: Tensor, **options: Any) -> list:
    asked = {"epistemic": True, "marginals": True} | options
    told, after = hmm_filter_reference(family, tokens, state, lengths, **asked)
    return [*after[:5], *told]


def posterior(joint: Tensor, exponent: Tensor) -> Tensor:
    """What a state's numbers mean, whatever its scale."""
    if exponent.shape[1]:
        alive = joint.sum(2) > 0
        top = torch.where(alive, exponent, -(2**30)).amax((1, 2), keepdim=True)
        joint = joint * torch.where(alive, exponent - top, 0).double().exp2()[:, :, None].to(joint.dtype)
    return joint / joint.sum((1, 2, 3), keepdim=True)


def assert_equal(found: list, want: list, tolerance: float) -> None:
    """Results and states; a state's scale is free, and the mass that goes with it."""
    torch.testing.assert_close(
        posterior(found[0], found[1]).double(), posterior(want[0], want[1]).double(), rtol=0, atol=tolerance,
        equal_nan=True,
    )  # fmt: skip
    for a, b in zip(found[3:], want[3:], strict=True):
        if b is None or not b.numel():
            assert a is None or not a.numel()
            continue
        torch.testing.assert_close(a.double(), b.double(), rtol=10 * tolerance, atol=10 * tolerance, equal_nan=True)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    sizes=st.tuples(st.integers(1, 20), st.integers(1, 9), st.integers(1, 60), st.integers(1, 70)),
    own_tables=st.booleans(),
    lengths=st.lists(st.sampled_from([0, 1, 3, 7, 8, 9, 17]), min_size=1, max_size=4),
    per_task=st.booleans(),
    prune=st.sampled_from([0.0, 1e-3]),
    dead=st.sampled_from([0.0, 0.5]),
    seed=st.integers(0, 2**16),
)
@pytest.mark.parametrize("clone", CLONES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_clone_equals_the_reference(dtype, clone, sizes, own_tables, lengths, per_task, prune, dead, seed):
    family, joint = draw(*sizes, tables=sizes[0] if own_tables else 1, seed=seed, dead=dead)
    batch, ends = len(lengths), torch.tensor(lengths)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(sizes[3], (batch, max(lengths)), generator=generator)
    want = dense(family, tokens, starting(joint, batch, per_task=per_task), ends, prune=prune)
    args = cast(family, dtype), tokens, starting(joint, batch, per_task=per_task, dtype=dtype), ends
    tolerance = 1e-13 if dtype == torch.float64 else 1e-6
    assert_equal(compiled(clone, *args, prune=prune), want, tolerance)
    plain = compiled(clone, *args, prune=prune, epistemic=False)  # several tokens between two looks at the scales
    want[10] = torch.empty(0)
    assert_equal(plain, want, tolerance)


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("clone", CLONES)
def test_rows_of_any_length_have_their_lanes(clone, dtype):
    """W across every number of registers, alone and side by side."""
    for emissions in (1, 2, 3, 4, 7, 8, 9, 16, 23, 24, 40, 47, 48, 49, 100):
        for batch in (1, 2, 50):
            family, joint = draw(3, 4, emissions, 5, seed=emissions)
            tokens = torch.randint(5, (batch, 11), generator=torch.Generator().manual_seed(batch))
            ends = torch.where(torch.arange(batch) % 5 == 4, 6, 11)
            want = dense(family, tokens, starting(joint, batch), ends)
            args = cast(family, dtype), tokens, starting(joint, batch, dtype=dtype), ends
            assert_equal(compiled(clone, *args), want, 1e-13 if dtype == torch.float64 else 1e-6)


@needs_kernel
@pytest.mark.parametrize("clone", CLONES)
def test_surprising_tokens_do_not_underflow(clone):
    """Tokens of probability 1e-12 in float32, eight in a row: scales guessed for common ones are far off."""
    family, joint = draw(4, 3, 8, 4)
    emission = family.emissions.clone()
    emission[..., 3] = 1e-12
    family = hmm_family(family.transitions, emission / emission.sum(3, keepdim=True))
    tokens = torch.tensor([[0, 1] + [3] * 20 + [2, 0]])
    ends = torch.tensor([24])
    want = dense(family, tokens, starting(joint, 1), ends)
    args = cast(family, torch.float32), tokens, starting(joint, 1, dtype=torch.float32), ends
    assert_equal(compiled(clone, *args, epistemic=False), [*want[:10], torch.empty(0), *want[11:]], 2e-6)


@needs_kernel
@pytest.mark.parametrize("clone", CLONES)
def test_rare_tokens_that_turn_out_common_do_not_overflow(clone):
    """256 tokens, of which one is certain in the only state that is left."""
    emission = torch.full((1, 8, 2, 256), 1e-6, dtype=torch.float64)
    emission[:, :, 0, 7] = 1.0
    emission[:, :, 1] = 1.0
    joint = torch.zeros(1, 2, 8, dtype=torch.float64)
    joint[:, 0] = 1 / 8
    family = hmm_family(torch.eye(2, dtype=torch.float64)[None], emission / emission.sum(3, keepdim=True))
    tokens, ends = torch.full((1, 64), 7), torch.tensor([64])
    want = dense(family, tokens, starting(joint, 1), ends, epistemic=False)
    args = cast(family, torch.float32), tokens, starting(joint, 1, dtype=torch.float32), ends
    assert_equal(compiled(clone, *args, epistemic=False), want, 2e-6)


@pytest.mark.parametrize("per_task", [False, True], ids=["joint", "task"])
@pytest.mark.parametrize("prune", [0.0, 1e-3])
def test_any_split_goes_on_from_the_state(per_task, prune):
    family, joint = draw(6, 5, 8, 7, seed=3)
    tokens = torch.randint(7, (3, 30), generator=torch.Generator().manual_seed(1))
    state = starting(joint, 3, per_task=per_task)
    whole, last = hmm_filter(family, tokens, state, torch.full((3,), 30), prune=prune)
    for split in ((0, 30), (1, 29), (8, 22), (13, 17), (1,) * 30):
        after, first = state, 0
        for length in split:
            piece, after = hmm_filter(
                family, tokens[:, first : first + length], after, torch.full((3,), length), prune=prune, start=False
            )
            assert piece.log_probs[:, 0].isnan().all()
            assert piece.log_evidence[:, 0].isnan().all()
            for a, b in zip(piece[:3], whole[:3], strict=True):
                torch.testing.assert_close(a[:, 1:], b[:, first + 1 : first + length + 1], rtol=1e-12, atol=1e-13)
            first += length
        assert torch.equal(after.position, last.position)
        torch.testing.assert_close(posterior(*after[:2]), posterior(*last[:2]), rtol=1e-11, atol=1e-15)


@needs_kernel
def test_the_caller_keeps_what_it_passed_and_misaligned_states_work():
    family, joint = draw(5, 4, 8, 6, seed=1)
    tokens = torch.randint(6, (2, 9), generator=torch.Generator().manual_seed(0))
    state, ends = starting(joint, 2), torch.tensor([9, 9])
    shifted = torch.empty(state.joint.numel() + 1, dtype=torch.float64)[1:].view(state.joint.shape).copy_(state.joint)
    kept = state.joint.clone()
    want = compiled("", family, tokens, state, ends)
    assert torch.equal(kept, state.joint)
    found = compiled("", family, tokens, state._replace(joint=shifted), ends)
    for a, b in zip(found, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("per_task", [False, True], ids=["joint", "task"])
@pytest.mark.parametrize("clone", CLONES)
def test_impossible_tokens_are_told_and_stay_impossible(clone, per_task):
    family, joint = draw(3, 4, 8, 5, seed=6)
    emission = family.emissions.clone()
    emission[..., 4] = 0
    family = hmm_family(family.transitions, emission / emission.sum(3, keepdim=True))
    tokens, ends = torch.tensor([[0, 1, 4, 0, 4, 1], [0, 1, 2, 3, 2, 1], [1, 4, 0, 0, 0, 0]]), torch.tensor([6, 6, 1])
    for options in ({"epistemic": False}, {"prune": 1e-4}):
        args = family, tokens, starting(joint, 3, per_task=per_task), ends
        found, want = compiled(clone, *args, **options), dense(*args, **options)
        assert found[8].tolist() == want[8].tolist() == [2, -1, -1]
        for a, b in zip(found[5:], want[5:], strict=True):
            if b is not None:
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, equal_nan=True)
        assert found[6][0, 3:].isneginf().all()


def test_variants_without_prior_mass_stay_empty():
    family, joint = draw(6, 4, 8, 5, seed=2)
    joint[[1, 4]] = 0
    tokens = torch.randint(5, (1, 20), generator=torch.Generator().manual_seed(0))
    told, after = hmm_filter(family, tokens, starting(joint / joint.sum(), 1), torch.tensor([20]), marginals=True)
    assert not after.joint[:, [1, 4]].any()
    assert not told.transition_posterior[:, :, [1, 4]].any()
    assert (told.transition_posterior[:, :, [0, 2, 3, 5]] > 0).all()


def test_threads_make_no_difference():
    family, joint = draw(40, 9, 24, 30, seed=2)
    tokens = torch.randint(30, (7, 80), generator=torch.Generator().manual_seed(0))
    state, ends, threads = starting(joint, 7), torch.full((7,), 80), torch.get_num_threads()
    try:
        results = []
        for count in (1, 4):
            torch.set_num_threads(count)
            told, after = hmm_filter(family, tokens, state, ends)
            results.append([*told[:5], *after])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_columns_are_ordered_by_their_entries():
    family, _ = draw(3, 6, 2, 4, seed=8)
    counts = (family.transitions != 0).sum(1)
    for u in range(3):
        rebuilt = torch.zeros(6, 6, dtype=torch.float64)
        for i, target in enumerate(family.order[u].tolist()):
            a, b = family.starts[u * 6 + i : u * 6 + i + 2].tolist()
            rebuilt[family.rows[a:b].long(), target] = family.values[a:b]
            assert b - a == counts[u, target]
            stop = int(family.stops[u, i])
            assert (counts[u, family.order[u, i:stop].long()] == b - a).all()
            assert stop == 6 or counts[u, family.order[u, stop]] > b - a
        assert torch.equal(rebuilt, family.transitions[u])


def test_bad_inputs_are_named():
    family, joint = draw(3, 4, 2, 5)
    state, tokens, ends = starting(joint, 2), torch.zeros(2, 3, dtype=torch.int64), torch.tensor([3, 3])
    bad = {
        "tokens": [tokens.int(), tokens[0], tokens + 5, tokens - 1],
        "state": [
            starting(joint, 3),
            starting(joint, 2, dtype=torch.float32),
            state._replace(exponent=joint[None].int()),
            state._replace(log_mass=state.log_mass.float()),
            state._replace(position=state.position[:1]),
        ],
        "lengths": [ends + 1, ends - 4, ends.int(), ends[:1], ends[None]],
    }
    for name, values in bad.items():
        for value in values:
            with pytest.raises(InputError, match=name):
                hmm_filter(family, **{"tokens": tokens, "state": state, "lengths": ends} | {name: value})
    hmm_filter(family, torch.tensor([[0, 9, 9], [1, 1, -1]]), state, torch.tensor([1, 2]))  # padding is never looked at
    for name, value in {"transitions": family.transitions[:, :3], "emissions": family.emissions[0]}.items():
        good = {"transitions": family.transitions, "emissions": family.emissions}
        with pytest.raises(InputError, match=name):
            hmm_family(**good | {name: value})
    if native is not None:
        with pytest.raises(ValueError, match="no clone"):
            compiled("z80", family, tokens, state, ends)


def test_without_the_kernel_the_reference_runs(monkeypatch):
    family, joint = draw(3, 4, 2, 5)
    args = family, torch.zeros(2, 3, dtype=torch.int64), starting(joint, 2), torch.tensor([3, 1])
    want, _ = hmm_filter(*args, epistemic=True, marginals=True)
    monkeypatch.setattr(hmm, "kernels", lambda: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CommissureWarning)
        found, _ = hmm_filter(*args, epistemic=True, marginals=True)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13, equal_nan=True)


def test_the_operator_can_be_traced():
    family, joint = draw(3, 4, 2, 5)
    args = list(family), torch.zeros(2, 3, dtype=torch.int64), list(starting(joint, 2)), torch.tensor([3, 1])
    checks = ("test_schema", "test_faketensor")
    for options in ((0.0, True, True, True, True), (0.0, False, False, False, False)):
        torch.library.opcheck(torch.ops.commissure.hmm_filter.default, (*args, *options), test_utils=checks)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_gives_the_same():
    family, joint = draw(6, 5, 8, 7, seed=3)
    tokens, ends = torch.randint(7, (3, 30), generator=torch.Generator().manual_seed(1)), torch.tensor([30, 4, 0])
    state = starting(joint, 3)
    want, _ = hmm_filter(family, tokens, state, ends, epistemic=True)
    there = [HMMFamily(*(x.cuda() for x in family)), tokens.cuda(), HMMState(*(x.cuda() for x in state)), ends.cuda()]
    found, _ = hmm_filter(*there, epistemic=True)
    for a, b in zip(found[:6], want[:6], strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_variants_without_prior_mass_are_written_as_zeros():
    """Into memory that is not zero by chance: torch fills it with NaN here."""
    family, joint = draw(6, 4, 8, 5, seed=2)
    joint[[1, 4]] = 0
    tokens, state = torch.zeros(1, 20, dtype=torch.int64), starting(joint / joint.sum(), 1)
    torch.use_deterministic_algorithms(True)
    try:
        _, after = hmm_filter(family, tokens, state, torch.tensor([20]))
    finally:
        torch.use_deterministic_algorithms(False)
    assert not after.joint[:, [1, 4]].any()


@needs_kernel
@pytest.mark.parametrize("per_task", [False, True], ids=["joint", "task"])
@pytest.mark.parametrize("clone", CLONES)
def test_dropped_mass_adds_up_and_what_is_left_goes_on(clone, per_task):
    """Three coins and nothing but heads: one is left out after 8 tokens, one after 24, each with its share by then."""
    heads = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64)
    tables = torch.stack([heads, 1 - heads], 1)[:, None, None]
    family = hmm_family(torch.ones(3, 1, 1, dtype=torch.float64), tables)
    state = hmm_state(torch.full((1, 3, 1, 1), 1 / 3, dtype=torch.float64), per_task=per_task)
    args = family, torch.zeros(1, 30, dtype=torch.int64), state, torch.tensor([30])
    dropped = torch.zeros(31, dtype=torch.float64)
    dropped[8:] += heads[2] ** 8 / (heads**8).sum()
    dropped[24:] += heads[1] ** 24 / (heads[:2] ** 24).sum()
    live = [heads[: 3 if t <= 8 else 2 if t <= 24 else 1] for t in range(1, 31)]
    gained = [((left**t).sum() / (left ** (t - 1)).sum()).log() for t, left in enumerate(live, 1)]
    evidence = torch.stack([dropped[0], *gained]).cumsum(0)
    for told in (compiled(clone, *args, prune=1e-6), dense(*args, prune=1e-6)):
        torch.testing.assert_close(told[7][0], dropped, rtol=1e-11, atol=0)
        torch.testing.assert_close(told[6][0], evidence, rtol=1e-11, atol=1e-15)
        torch.testing.assert_close(told[4], dropped[-1:], rtol=1e-11, atol=0)
