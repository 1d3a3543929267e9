"""The table of claims, and the judge."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from commissure.core.errors import InputError
from commissure.experiments.claims import CLAIMS, Bound, Claim, Context, Cost, Outcome, Row

CLAIM = Claim(
    "a.b", "paper", "statement", "1", (Bound("x", at_least=1), Bound("y", at_most=2, side="high")), Cost(1, 2, 3), "m"
)
GOOD = (Row("x", "x", 1.0), Row("y", "y", 5.0, 0.0, 2.0))


def test_table_is_sound() -> None:
    assert len({claim.id for claim in CLAIMS}) == len(CLAIMS)
    assert sum(claim.cost.quick for claim in CLAIMS) <= 300
    for claim in CLAIMS:
        assert 0 <= claim.cost.smoke <= claim.cost.quick <= claim.cost.full
        assert claim.min_seeds >= 2, "one seed is never a PASS"
        assert claim.module.startswith("commissure.experiments.")


def test_first_four_claims() -> None:
    first = {claim.id: claim for claim in CLAIMS}
    named = {"bridges.least_squares", "decode.latency", "decode.accuracy", "decode.timing", "decode.stream"}
    assert named <= set(first)
    assert first["decode.latency"].exclusive
    assert first["decode.accuracy"].min_seeds == 5


@pytest.mark.parametrize(
    ("rows", "n_seeds", "verdict"),
    [
        (GOOD, 3, "PASS"),
        (GOOD, 2, "NOT CLAIMED"),
        ((replace(GOOD[0], value=0.99), GOOD[1]), 3, "MISS"),
        ((replace(GOOD[0], value=0.99), GOOD[1]), 2, "NOT CLAIMED"),
        ((GOOD[0], replace(GOOD[1], high=2.01)), 3, "MISS"),
        ((replace(GOOD[0], value=math.nan), GOOD[1]), 3, "MISS"),
    ],
)
def test_judge(rows: tuple[Row, ...], n_seeds: int, verdict: str) -> None:
    assert Context("quick", CLAIM).judge(rows, n_seeds) == verdict


def test_judge_refuses_incomplete_rows() -> None:
    with pytest.raises(InputError, match="'y'"):
        CLAIM.judge(GOOD[:1], 3)
    with pytest.raises(InputError, match=r"y\.high"):
        CLAIM.judge((GOOD[0], Row("y", "y", 1.0)), 3)


def test_one_seed_has_no_interval_and_is_not_claimed() -> None:
    assert CLAIM.judge((GOOD[0], Row("y", "y", 1.0)), 1) == "NOT CLAIMED"


def test_bad_definitions() -> None:
    with pytest.raises(InputError, match="gate"):
        replace(CLAIM, gate=())
    with pytest.raises(InputError, match="min_seeds"):
        replace(CLAIM, min_seeds=0)
    with pytest.raises(InputError, match="at_least"):
        Bound("x")
    with pytest.raises(InputError, match="different keys"):
        Outcome((GOOD[0], GOOD[0]), "PASS")
