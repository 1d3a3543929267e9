"""Sweeps over checkpoints: real saved models, kills, other executors, and a store that repeats nothing."""

from __future__ import annotations

import linecache
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from commissure.core.errors import InputError
from commissure.core.rng import generator
from commissure.geometry import (
    CheckpointSweep,
    PretrainedCheckpoints,
    SweepReport,
    compare,
    rankme,
    segment_phases,
    text_batches,
    trace,
)
from commissure.geometry import checkpoints as module
from commissure.runs import RunStore

FIT = (1, 4)
STEPS = {0: "0", 10: "1", 100: "2"}


@dataclass(frozen=True)
class Logged:
    """A model that depends on its revision; every load is a line of a file."""

    log: str
    broken: tuple[str, ...] = ()

    def __call__(self, revision: str) -> nn.Module:
        with open(self.log, "a") as file:
            file.write(revision + "\n")
        if revision in self.broken:
            raise OSError(f"no weights of {revision}")
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))
        own = torch.Generator().manual_seed(int(revision))  # threads share the global one
        for parameter in model.parameters():
            parameter.data = torch.randn(parameter.shape, generator=own)
        return model

    def identity(self, revision: str) -> str:
        return revision


def twice(model: nn.Module, batch: Tensor) -> Tensor:
    return model(2 * batch)


def batches(shift: float = 0.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(20, 6, generator=generator) + shift for _ in range(3)]


def sweep(log: Path, **changes: Any) -> CheckpointSweep:
    settings = {"checkpoints": STEPS, "load": Logged(str(log)), "batches": batches(), "sites": ["0", "2"], "n_folds": 4}
    return CheckpointSweep(**{**settings, **changes})


def told(report: SweepReport) -> list[Any]:
    return [(row.step, row.geometry) for row in report.trajectory_of(fit_range=FIT).rows]


def loads(log: Path) -> list[str]:
    return log.read_text().split() if log.exists() else []


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "loads"


@pytest.fixture
def store(tmp_path: Path) -> Any:
    with RunStore(tmp_path / "home" / "runs.sqlite") as opened:
        yield opened


def test_rows_are_those_of_a_trace(log: Path) -> None:
    report = sweep(log).run(workers=0)
    for step, revision in STEPS.items():
        model = Logged(str(log))(revision)
        with torch.no_grad(), trace(model, sites=["0", "2"], n_folds=4) as traced:
            for batch in batches():
                model(batch)
        expected = traced.report(fit_range=FIT)
        for row, other in zip(report.rows(step, fit_range=FIT), expected, strict=True):
            assert (row.site, row.frame, row.n_samples) == (other.site, other.frame, 60)
            for name in ("rankme", "rankme_stderr", "alpha", "participation_ratio"):
                assert getattr(row, name) == pytest.approx(getattr(other, name), rel=1e-9), name
    spectra = report.spectra("2", frame="unit")
    assert list(spectra) == [0, 10, 100]
    series = report.trajectory_of(fit_range=FIT).series("2", frame="unit")
    assert [rankme(one) for one in spectra.values()] == pytest.approx(series.ranks.tolist(), rel=1e-12)
    segment_phases(series.steps, series.ranks, stderr=series.stderr)


@pytest.mark.parametrize(
    "make",
    [
        lambda: None,
        lambda: ThreadPoolExecutor(2),
        lambda: ProcessPoolExecutor(1, mp_context=get_context("spawn")),
    ],
    ids=["isolated", "threads", "processes"],
)
def test_any_executor_gives_the_same_bits(make: Callable[[], Executor | None], log: Path, store: RunStore) -> None:
    expected = told(sweep(log).run(workers=0))
    executor = make()
    try:
        found = sweep(log).run(executor=executor, workers=2 if executor is None else None, store=store)
    finally:
        if executor is not None:
            executor.shutdown()
    assert told(found) == expected
    assert told(sweep(log).run(store=store)) == expected, "and as the store gives them back"


def test_nothing_is_computed_twice(log: Path, store: RunStore) -> None:
    first = sweep(log).run(workers=0, store=store)
    assert loads(log) == ["0", "1", "2"]
    again = sweep(log, checkpoints={**STEPS, 5: "7"}).run(workers=0, store=store)
    assert loads(log) == ["0", "1", "2", "7"]
    assert [row for row in told(again) if row[0] != 5] == told(first)
    assert again.rows(10, fit_range=(2, 5))[0].alpha != again.rows(10, fit_range=FIT)[0].alpha
    assert len(loads(log)) == 4, "another window needs no forward pass"
    runs = store.runs(kind="geometry")
    assert [run.config["revision"] for run in runs] == ["7", "2", "1", "0"]


@pytest.mark.parametrize(
    "changes",
    [
        {"batches": batches(0.1)},
        {"sites": ["0"]},
        {"pooling": ("last", "mean")},
        {"frames": ("raw",)},
        {"n_folds": 2},
        {"skip": 1},
        {"forward": twice},
        {"checkpoints": {0: "3", 10: "4", 100: "5"}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_changes_the_result_is_computed_anew(changes: dict[str, Any], log: Path, store: RunStore) -> None:
    sweep(log).run(workers=0, store=store)
    sweep(log, **changes).run(workers=0, store=store)
    assert len(loads(log)) == 6


def test_another_version_of_the_code_computes_anew(log: Path, store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep(log).run(workers=0, store=store)
    monkeypatch.setattr(module, "source_digest", lambda: "later")
    sweep(log).run(workers=0, store=store)
    assert len(loads(log)) == 6


@pytest.mark.parametrize("name", ["load", "forward"])
def test_an_edited_function_of_the_same_name_computes_anew(
    name: str, tmp_path: Path, store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a script is edited and run again: a pickle holds the function's name alone."""
    source = """
    from torch import nn
    import torch
    def load(revision):
        model = nn.Sequential(nn.Linear(6, 8, bias=False))
        model[0].weight.data = LOAD * torch.eye(8, 6) + torch.arange(6.0)
        return model
    def forward(model, batch):
        return model(batch * (1 + FORWARD * torch.arange(6)))
    """
    ranks = []
    for factor in ("1", "1", "9"):
        factors = {"LOAD": "1", "FORWARD": "1", name.upper(): factor}
        script = tmp_path / "edited_functions.py"
        script.write_text(
            textwrap.dedent(source).replace("LOAD", factors["LOAD"]).replace("FORWARD", factors["FORWARD"])
        )
        found = ModuleType("edited_functions")
        found.__file__ = str(script)
        monkeypatch.setitem(sys.modules, "edited_functions", found)
        linecache.cache.pop(str(script), None)
        exec(compile(script.read_text(), str(script), "exec"), vars(found))
        settings = {"checkpoints": {0: "a"}, "batches": batches(), "sites": ["0"], "frames": ["raw"]}
        edited = CheckpointSweep(load=found.load, forward=found.forward, **settings)
        ranks.append(edited.run(workers=0, store=store).rows(0)[0].rankme)
        assert ranks[-1] == edited.run(workers=0).rows(0)[0].rankme
    assert ranks[0] == ranks[1] != ranks[2]
    assert len(store.runs(kind="geometry")) == 2


def test_a_failed_checkpoint_is_a_row_and_is_tried_again(log: Path, store: RunStore) -> None:
    def run(load: Logged) -> SweepReport:
        return sweep(log, load=load, frames=("raw",)).run(workers=0, store=store)

    first = run(Logged(str(log), broken=("1",)))
    assert [(one.step, one.revision, one.error) for one in first.failed] == [(10, "1", "OSError: no weights of 1")]
    assert sorted(first.moments) == [0, 100]
    assert first.missing == ()
    again = run(Logged(str(log), broken=("1",)))
    assert [one.step for one in again.failed] == [10]
    assert loads(log) == ["0", "1", "2", "1"]
    with pytest.raises(InputError, match="step"):
        again.rows(10)


def test_whatever_fails_is_told_by_step(log: Path) -> None:
    wrong = sweep(log, sites=["9"]).run(workers=0)
    assert [one.step for one in wrong.failed] == [0, 10, 100]
    assert "close" in wrong.failed[0].error
    dead = sweep(log, load=_die).run(workers=1)
    assert "WorkerDied" in dead.failed[0].error
    no_model = sweep(log, load=str).run(workers=0)
    assert "a model for revision" in no_model.failed[0].error
    with pytest.raises(InputError, match="site"):
        sweep(log).run(workers=0).spectra("0", pooling="mean")


def _die(revision: str) -> nn.Module:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def test_ctrl_c_keeps_what_is_finished(log: Path, store: RunStore, capsys: pytest.CaptureFixture[str]) -> None:
    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    report = sweep(log).run(workers=0, store=store, progress=stop)
    assert (sorted(report.moments), report.missing) == ([0, 10], (100,))
    assert "stopped: 2 of 3" in capsys.readouterr().err
    sweep(log).run(workers=0, store=store)
    assert loads(log) == ["0", "1", "2"]


_KILLED = """
    import os, sys, signal
    sys.path.insert(0, {folder!r})
    from test_checkpoints import *
    def kill(done, total):
        if done == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
    with RunStore({store!r}) as store:
        print(told(sweep(Path(sys.argv[1])).run(workers=0, store=store, progress=kill)))
"""


def test_after_kill_9_only_the_rest_is_computed(log: Path, store: RunStore) -> None:
    code = textwrap.dedent(_KILLED.format(folder=str(Path(__file__).parent), store=str(store.path)))
    for after, expected in ((1, ["0"]), (2, ["0", "1"]), (99, ["0", "1", "2"])):
        command = [sys.executable, "-c", code, str(log), str(after)]
        done = subprocess.run(command, env=os.environ, check=False, capture_output=True, text=True)
        assert done.returncode == (0 if after == 99 else -signal.SIGKILL), done.stderr
        assert loads(log) == expected
    assert done.stdout.strip() == repr(told(sweep(log).run(workers=0)))


def test_large_arrays_lie_beside_the_store_and_come_back(log: Path, store: RunStore) -> None:
    wide = [torch.randn(30, 300, generator=torch.Generator().manual_seed(1))]
    settings = {
        "load": _wide,
        "batches": wide,
        "sites": ["0"],
        "frames": ("raw",),
        "n_folds": 4,
        "checkpoints": {1: "a"},
    }
    first = sweep(log, **settings).run(workers=0)
    sweep(log, **settings).run(workers=0, store=store)
    assert list((store.path.parent / "artefacts").glob("*.safetensors"))
    found = sweep(log, **settings).run(workers=0, store=store)
    ((key, folds),), ((other, expected),) = found.moments[1]().items(), first.moments[1]().items()
    assert key == other
    for one, same in zip(folds, expected, strict=True):
        assert one.n_samples == same.n_samples
        assert torch.equal(one.mean, same.mean)
        assert torch.equal(one.scatter, same.scatter)
        assert torch.equal(one.scatter, one.scatter.T)


def _wide(revision: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(300, 300))


def test_two_stores_at_work_on_one_file(log: Path, store: RunStore) -> None:
    with RunStore(store.path) as other:

        def meanwhile(done: int, total: int) -> None:
            if done == 0:
                sweep(log).run(workers=0, store=other)

        report = sweep(log).run(workers=0, store=store, progress=meanwhile)
        assert told(report) == told(sweep(log).run(workers=0, store=other))
    assert len(store.runs(kind="geometry")) == 3


def saved(folder: Path, seed: int, kind: str = "gpt2") -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    if kind == "gpt2":
        config = transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=50, n_positions=32)
        model = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.LlamaConfig(
            num_hidden_layers=2, hidden_size=16, intermediate_size=32, num_attention_heads=2, vocab_size=50,
            num_key_value_heads=2,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder)


class Letters:
    """A tokenizer's door: one number a letter."""

    pad_token_id = None
    eos_token_id = 49

    def __call__(self, text: str, *, truncation: bool, max_length: int) -> dict[str, list[int]]:
        assert truncation
        return {"input_ids": [ord(letter) % 49 for letter in text][:max_length]}


TEXTS = ["the whole", "a", "is not", "the sum of halves", "", "but a bridge between them"] * 8


@pytest.mark.parametrize(("kind", "norm"), [("gpt2", "ln_f"), ("llama", "norm")])
def test_saved_models_are_swept(kind: str, norm: str, tmp_path: Path, store: RunStore) -> None:
    for step in (0, 100):
        saved(tmp_path / "model" / f"step{step}", step, kind)
    (tmp_path / "model" / "step50").mkdir()
    pickled = tmp_path / "model" / "step70"
    saved(pickled, 1, kind)
    weights = pickled / "model.safetensors"
    torch.save({}, pickled / "pytorch_model.bin")
    weights.unlink()
    settings = {
        "checkpoints": {step: f"step{step}" for step in (0, 50, 60, 70, 100)},
        "load": PretrainedCheckpoints(str(tmp_path / "model")),
        "batches": text_batches(TEXTS, Letters(), max_length=12, batch_size=5),
        "sites": ["h.*" if kind == "gpt2" else "layers.*", norm],
        "pooling": ("last", "mean", "all"),
    }
    report = CheckpointSweep(**settings).run(workers=0, store=store)
    assert sorted(report.moments) == [0, 100]
    assert [one.step for one in report.failed] == [50, 60, 70]
    assert "a folder in" in report.failed[1].error
    rows = report.rows(0, fit_range=FIT)
    assert {row.site for row in rows} == {f"{settings['sites'][0][:-1]}{i}" for i in (0, 1)} | {norm}
    assert {row.n_samples for row in rows if row.pooling == "last"} == {32}
    changes = compare(report.rows(0), report.rows(100))
    assert len(changes) == len(rows)
    saved(tmp_path / "model" / "step100", 5, kind)
    other = CheckpointSweep(**settings).run(workers=0, store=store)
    assert sorted(other.moments) == [0, 100], "a folder without usable weights is nobody's moments"
    assert other.rows(0, fit_range=FIT) == rows
    assert other.rows(100, fit_range=FIT) != report.rows(100, fit_range=FIT), "new weights are another checkpoint"
    assert len(store.runs(kind="geometry")) == 3


def test_padding_on_either_side_changes_nothing(tmp_path: Path) -> None:
    saved(tmp_path / "m", 0, "llama")
    model = PretrainedCheckpoints(str(tmp_path / "m"))(".")
    drawn = generator(0, "texts")
    texts = ["".join(map(chr, drawn.integers(65, 110, n))) for n in drawn.integers(2, 15, 60)]
    right = text_batches(texts, Letters(), max_length=12, batch_size=5)
    left = []
    for batch in right:
        ids, mask = torch.zeros_like(batch["input_ids"]), torch.zeros_like(batch["attention_mask"])
        for i, n in enumerate(batch["attention_mask"].sum(1).tolist()):
            ids[i, ids.shape[1] - n :] = batch["input_ids"][i, :n]
            mask[i, ids.shape[1] - n :] = 1
        places = (mask.cumsum(1) - 1).clamp(min=0)
        left.append({"input_ids": ids, "attention_mask": mask, "position_ids": places})
    found = []
    for side in (right, left):
        with torch.no_grad(), trace(model, sites=["norm"], pooling=("last", "first", "mean", "all")) as traced:
            for batch in side:
                model(**batch)
        found.append(traced.report(fit_range=FIT))
    for one, other in zip(*found, strict=True):
        assert one.n_samples == other.n_samples
        assert one.rankme == pytest.approx(other.rankme, rel=1e-5), one


def test_texts_become_batches() -> None:
    found = text_batches(TEXTS, Letters(), max_length=12, batch_size=5, n=11)
    assert sum(len(batch["input_ids"]) for batch in found) == 11
    assert max(batch["input_ids"].shape[1] for batch in found) == 12
    first = found[0]
    assert first["attention_mask"].sum(1).tolist() == [9, 6, 12, 12, 9]
    assert first["input_ids"][1, 6:].tolist() == [49] * 6, "the end token pads where there is no other"
    assert first["input_ids"][1, :6].tolist() == [ord(letter) % 49 for letter in "is not"]


def test_bad_input_is_named(log: Path, store: RunStore) -> None:
    for name, value in (
        ("checkpoints", {}), ("checkpoints", {-1: "a"}), ("checkpoints", {True: "a"}), ("checkpoints", {0: 3}),
        ("load", "model"), ("batches", []), ("batches", iter(batches())),
        ("sites", "0"), ("sites", []), ("pooling", "last"), ("pooling", ["lst"]), ("frames", ()), ("n_folds", 0),
        ("n_folds", True), ("skip", -1), ("forward", 3),
    ):  # fmt: skip
        with pytest.raises(InputError, match=name):
            sweep(log, **{name: value})
    with pytest.raises(InputError, match="batches"):
        sweep(log, batches=[object()]).run(workers=0, store=store)
    with pytest.raises(InputError, match="load"):
        sweep(log, load=lambda revision: None).run(workers=2)
    for options, name in (
        ({"store": 3}, "store"), ({"workers": -1}, "workers"), ({"executor": 3}, "executor"),
        ({"executor": ThreadPoolExecutor(1), "workers": 1}, "workers"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=name):
            sweep(log).run(**options)
    for options, name in (
        ({"n": 0}, "n"), ({"max_length": 1}, "max_length"), ({"batch_size": True}, "batch_size"),
        ({"min_length": 0}, "min_length"), ({"min_length": 12, "max_length": 12, "n": 1}, ""),
    ):  # fmt: skip
        if name:
            with pytest.raises(InputError, match=name):
                text_batches(TEXTS, Letters(), **options)
    with pytest.raises(InputError, match="texts"):
        text_batches("one text", Letters())
    with pytest.raises(InputError, match="texts"):
        text_batches(["a"], Letters())
    assert loads(log) == []


def test_the_digest_tells_batches_apart() -> None:
    x = torch.zeros(2, 3)
    different = [
        x,
        x.double(),
        x.T,
        [x],
        [x, x],
        {"a": x},
        {"b": x},
        x.bfloat16(),
        x[0, 0],
        x[0, :1],
        1,
        "1",
        None,
        True,
    ]
    assert len({module._content(one) for one in different}) == len(different)
    assert module._content({"a": 1, "b": x}) == module._content({"b": x.clone(), "a": 1})
    assert module._content(x.numpy()) != module._content(x + 1)
    with pytest.raises(InputError, match="batches"):
        module._content(np.array(["a", None], dtype=object))


def test_threads_of_the_caller_change_nothing(log: Path) -> None:
    before, seen = torch.get_num_threads(), []

    def load(revision: str) -> nn.Module:
        seen.append(torch.get_num_threads())
        return Logged(str(log))(revision)

    try:
        torch.set_num_threads(2)
        sweep(log, load=load).run(workers=0)
        assert (seen, torch.get_num_threads()) == ([1, 1, 1], 2)
    finally:
        torch.set_num_threads(before)
