"""Two reports side by side."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from commissure.core.errors import InputError
from commissure.geometry import compare, trace
from commissure.geometry.tracing import TraceRow


def report(scale: float, *, sites: tuple[str, ...] = ("0", "1"), n: int = 200) -> tuple[TraceRow, ...]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    with torch.no_grad():
        model[1].weight[0] *= scale
    with torch.no_grad(), trace(model, sites=sites, frames=("raw",), n_folds=8) as traced:
        model(torch.randn(n, 6))
    return traced.report(fit_range=(1, 4))


def test_changes_are_those_of_both_reports() -> None:
    before, after = report(1), report(30)
    found = compare(before, after)
    assert [one.site for one in found] == ["0", "1"]
    assert found[0].change == 0
    one, a, b = found[1], before[1], after[1]
    assert one.change == pytest.approx(np.log(b.rankme) - np.log(a.rankme))
    assert one.change < -0.3
    assert one.ratio == pytest.approx(b.rankme / a.rankme)
    assert one.stderr**2 == pytest.approx((a.rankme_stderr / a.rankme) ** 2 + (b.rankme_stderr / b.rankme) ** 2)
    assert one.alpha == pytest.approx(b.alpha - a.alpha)
    assert one.top_share == pytest.approx(b.top_share - a.top_share)
    assert one.participation_ratio == pytest.approx(b.participation_ratio / a.participation_ratio)


def test_only_what_both_hold_is_compared() -> None:
    both = report(1)
    assert [one.site for one in compare(both, report(2, sites=("1",)))] == ["1"]
    assert compare([replace(both[0], alpha=None)], both)[0].alpha is None
    with pytest.raises(InputError, match="after"):
        compare(both[:1], both[1:])
    with pytest.raises(InputError, match="n_samples"):
        compare(both, report(1, n=100))
    assert compare(both, [replace(row, alpha_window=(2, 4)) for row in both])[0].alpha is None
    for wrong in ((), "rows", [1]):
        with pytest.raises(InputError, match="before"):
            compare(wrong, both)
