"""Sweeps: the same rows from any executor, one evaluation a cell, resumed after a kill, what cannot be sent."""

from __future__ import annotations

import cmath
import math
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
import warnings
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array

sys.path.insert(0, str(Path(__file__).parent))  # workers import the models by name
from sweep_models import TREE, Logged, flat

from commissure.core.errors import BackendMissing, InputError
from commissure.reservoirs import cells
from commissure.reservoirs.block_model import HierarchicalSBM
from commissure.reservoirs.cells import Cell, canonical, run_cell, sampled
from commissure.reservoirs.compare import compare
from commissure.reservoirs.connectome import Connectome
from commissure.reservoirs.evaluation import evaluate
from commissure.reservoirs.io_map import IOMap
from commissure.reservoirs.moments import IllConditionedWarning
from commissure.reservoirs.sweep import ModuleInputs, Sweep, SweepRow
from commissure.reservoirs.tasks import MemoryCapacity
from commissure.runs import IsolatedExecutor, RunStore, tasks

TASK = MemoryCapacity(max_delay=3, length=200, warmup=10)
MODELS = {"deep": HierarchicalSBM(TREE, p_within=0.8), "flat": flat}


def sweep(**options) -> Sweep:
    return Sweep(**{"models": MODELS, "spectral_radius": (0.7, 1.1), "seeds": range(3), **options})


@pytest.fixture
def store(tmp_path: Path):
    with RunStore(tmp_path / "runs.sqlite") as store:
        yield store


def test_every_row_is_one_of_evaluate() -> None:
    options = {"read_noise": (0.0, 0.01), "read_bits": (None, 6), "penalties": (1e-6, 1e-2), "lyapunov": True}
    result = sweep(weight_bits=(None, 4), **options).run(TASK, workers=0)
    expected = []
    for name, model in MODELS.items():
        for seed in range(3):
            network = sampled(model, seed)
            (io,) = ModuleInputs()(network, seed)
            for bits in (None, 4):
                scores = evaluate(
                    network, TASK, io=io, spectral_radius=(0.7, 1.1), weight_bits=bits, seed=seed, **options
                )
                expected += [SweepRow(**vars(s), model=name, seed=seed, weight_bits=bits) for s in scores]
    assert result.rows == tuple(expected)
    assert result.missing == ()
    assert len({row.score for row in result.rows}) == len(result.rows)


@pytest.mark.parametrize(
    "options",
    [
        {"leak": 0.5},
        {"activation": "sigmoid"},
        {"dtype": torch.float64},
        {"input_gain": 0.3},
        {"penalties": 1e-2},
    ],
)
def test_every_setting_reaches_evaluate(options: dict) -> None:
    io = IOMap(inputs=([0],), outputs=([6, 7], [12, 13, 14]))
    (cell,) = sweep(models={"m": sampled(flat, 2)}, seeds=(np.int64(5),), io=io, **options).cells(TASK)
    rows = run_cell(cell).rows
    scores = evaluate(cell.model, TASK, io=io, spectral_radius=(0.7, 1.1), seed=5, **options)
    assert [(row.score, row.capacity) for row in rows] == [(s.score, s.capacity) for s in scores]
    assert rows != run_cell(sweep(models={"m": cell.model}, seeds=(5,), io=io).cells(TASK)[0]).rows
    assert type(rows[0].seed) is int


def test_any_executor_gives_the_same_rows_to_the_last_bit() -> None:
    before = torch.get_num_threads()
    here = sweep().run(TASK, workers=0)
    assert torch.get_num_threads() == before
    assert sweep().run(TASK, workers=1) == here
    assert sweep().run(TASK, workers=2) == here
    with ThreadPoolExecutor(2) as pool:
        assert sweep().run(TASK, executor=pool) == here


class Inline(Executor):
    """Runs `runs` tasks where they are submitted and never begins the others."""

    def __init__(self, runs: int) -> None:
        self.runs, self.futures = runs, []

    def submit(self, function, /, *arguments):
        future: Future = Future()
        self.futures.append(future)
        if len(self.futures) <= self.runs:
            future.set_running_or_notify_cancel()
            try:
                future.set_result(function(*arguments))
            except RuntimeError as error:
                future.set_exception(error)
        return future


def test_cells_are_kept_in_their_order_and_what_waits_is_canceled(store: RunStore, tmp_path: Path) -> None:
    sweep(models={"m": flat}, seeds=range(7, 0, -1)).run(TASK, store=store, executor=Inline(7))
    found = store.query("SELECT seed FROM reservoir_cells ORDER BY rowid")
    assert [seed for (seed,) in found] == list(range(7, 0, -1))
    executor = Inline(1)
    with pytest.raises(RuntimeError, match="no such network"):
        sweep(models={"m": Logged(str(tmp_path), failing_seed=0)}).run(TASK, executor=executor)
    assert [future.cancelled() for future in executor.futures] == [False, True, True]


def test_by_default_there_is_a_worker_a_core(monkeypatch: pytest.MonkeyPatch) -> None:
    lanes = []
    monkeypatch.setattr(tasks, "IsolatedExecutor", lambda n: lanes.append(n) or ThreadPoolExecutor(1))
    monkeypatch.setattr(tasks, "cores", lambda: 5)
    for seeds, options in (((0,), {}), (range(3), {}), (range(3), {"workers": 2})):
        sweep(seeds=seeds).run(TASK, **options)
    assert lanes == [2, 5, 2]


def test_threads_of_the_caller_change_nothing() -> None:
    threads = []
    cell = sweep(models={"m": lambda seed: threads.append(torch.get_num_threads()) or flat(seed)}).cells(TASK)[0]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        rows = run_cell(cell).rows
        assert torch.get_num_threads() == 2
        torch.set_num_threads(1)
        assert run_cell(cell).rows == rows
        assert threads == [1, 1]
    finally:
        torch.set_num_threads(before)


def test_finished_cells_are_never_run_again(store: RunStore, tmp_path: Path) -> None:
    models = {"logged": Logged(str(tmp_path))}
    first = sweep(models=models).run(TASK, store=store, workers=0)
    assert len(list(tmp_path.glob("?.*.*"))) == 3
    assert sweep(models=models).run(TASK, store=store, workers=0) == first
    assert len(list(tmp_path.glob("?.*.*"))) == 3
    more = sweep(models=models, seeds=range(4)).run(TASK, store=store, workers=0)
    assert len(list(tmp_path.glob("?.*.*"))) == 4
    assert more.rows[: len(first.rows)] == first.rows
    renamed = sweep(models={"other": models["logged"]}).run(TASK, store=store, workers=0)
    assert len(list(tmp_path.glob("?.*.*"))) == 4
    assert {row.model for row in renamed.rows} == {"other"}
    with pytest.raises(sqlite3.IntegrityError, match="append-only"), store.transaction() as connection:
        connection.execute("DELETE FROM reservoir_cells")


def test_every_setting_is_part_of_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    variants = [
        {},
        {"spectral_radius": (0.7,)},
        {"read_noise": (0.1,)},
        {"read_bits": (3,)},
        {"weight_bits": (3,)},
        {"penalties": 1e-3},
        {"input_gain": 0.5},
        {"leak": 0.5},
        {"activation": "sigmoid"},
        {"lyapunov": True},
        {"dtype": torch.float64},
        {"io": ModuleInputs(which="each")},
        {"io": ModuleInputs(n_outputs=2)},
        {"io": IOMap(inputs=([0],), outputs=([1],))},
        {"io": IOMap(inputs=([0],), outputs=([2],))},
        {"models": {"deep": HierarchicalSBM(TREE, p_within=0.7)}},
        {"models": {"deep": flat}},
        {"models": {"deep": sampled(flat, 0)}},
        {"models": {"deep": sampled(flat, 1)}},
        {"models": {"deep": partial(flat)}},
        {"seeds": (1,)},
    ]
    keys = [sweep(**{"models": {"deep": MODELS["deep"]}, **v}).cells(TASK)[0].key for v in variants]
    assert len(set(keys)) == len(variants)
    assert sweep().cells(MemoryCapacity(max_delay=2, length=200, warmup=10))[0].key not in keys
    assert sweep().cells(TASK)[0].key == keys[0]
    monkeypatch.setattr(cells, "source_digest", lambda: "another version")
    assert sweep().cells(TASK)[0].key not in keys


def test_keys_are_the_same_in_another_process() -> None:
    with IsolatedExecutor(1) as pool:
        for cell in sweep(models={**MODELS, "fixed": sampled(flat, 0)}, seeds=(0,)).cells(TASK):
            assert pool.submit(getattr, cell, "key").result() == cell.key


@dataclass(frozen=True)
class One:
    value: int


@dataclass(frozen=True)
class Other:
    value: int


class Plain:
    def __init__(self, folder: str) -> None:
        self.folder = folder


def test_canonical_texts_tell_contents_apart() -> None:
    a = np.arange(4.0)
    different = [
        a,
        a.astype(np.float32),
        a.reshape(2, 2),
        a + 1,
        csr_array(a.reshape(2, 2)),
        [0.0, 1.0],
        1,
        True,
        "1",
        None,
    ]
    assert len({canonical(value) for value in different}) == len(different)
    same_bytes = [
        np.zeros(2),
        np.zeros(2, np.int64),
        csr_array((2, 2)),
        csr_array((2, 3)),
        csr_array([[1.0, 0.0]]),
        csr_array([[0.0, 1.0]]),
        partial(flat, 1),
        partial(flat, 2),
        partial(flat, seed=1),
        partial(flat, seed=2),
        math.sqrt,
        cmath.sqrt,
        One(1),
        Other(1),
        Logged("a"),
        Plain("a"),
        Plain("b"),
        datetime(2026, 1, 1, tzinfo=UTC),
        datetime(2026, 1, 2, tzinfo=UTC),
        flat,
        sampled,
    ]
    assert len({canonical(value) for value in same_bytes}) == len(same_bytes)
    assert canonical({"b": 1, "a": 2}) == canonical({"a": 2, "b": 1})
    assert canonical(np.asfortranarray(a.reshape(2, 2))) == canonical(a.reshape(2, 2))
    assert canonical(np.float64(0.5)) == canonical(0.5)
    assert canonical(csr_array(np.eye(2))) == canonical(csr_array(np.eye(2)))


SCRIPT = """
import sys
sys.path.insert(0, {here!r})
from sweep_models import Logged
from commissure.reservoirs.sweep import Sweep
from commissure.reservoirs.tasks import MemoryCapacity
from commissure.runs import RunStore

if __name__ == "__main__":
    with RunStore({path!r}) as store:
        sweep = Sweep(models={{"m": Logged({folder!r}, pause_s=0.3)}}, spectral_radius=(0.7, 1.1), seeds=range(6))
        sweep.run(MemoryCapacity(max_delay=3, length=200, warmup=10), store=store, workers=1)
"""


def test_a_killed_sweep_goes_on_where_it_was(tmp_path: Path) -> None:
    (folder := tmp_path / "log").mkdir()
    path = tmp_path / "runs.sqlite"
    script = tmp_path / "script.py"
    here = str(Path(__file__).parent)
    script.write_text(textwrap.dedent(SCRIPT.format(here=here, path=str(path), folder=str(folder))))
    process = subprocess.Popen(
        [sys.executable, str(script)], env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    )
    with RunStore(path) as store:
        cells.CellStore(store)
        deadline = time.monotonic() + 120
        while not (done := store.query("SELECT seed, rows FROM reservoir_cells")) and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        time.sleep(0.6)  # its worker ends with it; what it was sampling may still leave a file
        done = store.query("SELECT seed FROM reservoir_cells")
        assert 1 <= len(done) < 6
        for file in folder.iterdir():
            file.unlink()
        models = {"m": Logged(str(folder), pause_s=0.3)}
        resumed = sweep(models=models, seeds=range(6)).run(TASK, store=store, workers=0)
        again = {int(file.name.split(".")[0]) for file in folder.iterdir()}
        assert again == set(range(6)) - {seed for (seed,) in done}
        assert len(list(folder.iterdir())) == len(again)
    assert resumed.rows == sweep(models={"m": flat}, seeds=range(6)).run(TASK, workers=0).rows


def test_a_cell_finished_by_another_process_stays_as_it_is(store: RunStore) -> None:
    (cell,) = sweep(models={"m": flat}, seeds=(1,)).cells(TASK)
    kept, finished = cells.CellStore(store), run_cell(cell)
    assert 0 < finished.wall_s < 600
    kept.add(cell, finished)
    kept.add(cell, finished._replace(rows=tuple(replace(row, score=0.0) for row in finished.rows)))
    assert kept.get(cell) == finished.rows
    assert store.query("SELECT model, seed FROM reservoir_cells") == [("m", 1)]


def test_ctrl_c_keeps_what_is_finished(store: RunStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = {"m": Logged(str(tmp_path), interrupted_seed=2)}
    result = sweep(models=models, seeds=range(4)).run(TASK, store=store, workers=0)
    assert {row.seed for row in result.rows} == {0, 1}
    assert result.missing == (("m", 2), ("m", 3))
    assert "stopped: 2 of 4 cells finished" in capsys.readouterr().err
    assert len(store.query("SELECT 1 FROM reservoir_cells")) == 2


@pytest.mark.parametrize("workers", [0, 1])
def test_a_failing_cell_is_named_and_the_others_kept(store: RunStore, tmp_path: Path, workers: int) -> None:
    models = {"m": Logged(str(tmp_path), failing_seed=1)}
    with pytest.raises(RuntimeError, match="no such network") as caught:
        sweep(models=models).run(TASK, store=store, workers=workers)
    assert "in the cell of model 'm' at seed 1" in caught.value.__notes__
    assert len(store.query("SELECT 1 FROM reservoir_cells")) >= 1


def test_what_a_cell_warns_of_reaches_the_caller_once() -> None:
    for workers in (0, 1):
        with pytest.warns(IllConditionedWarning, match=r"penalty 1e-16 .*model 'deep', seed 0") as caught:
            sweep(models={"deep": MODELS["deep"]}, penalties=1e-16).run(TASK, workers=workers)
        assert len(caught) == len({str(w.message) for w in caught}) >= 1


def test_a_repeated_warning_of_each_cell_is_caught_and_told_where_run_was_called() -> None:
    with pytest.warns(IllConditionedWarning) as caught:
        sweep(models={"deep": MODELS["deep"]}, penalties=1e-16).run(TASK, workers=0)
    assert {w.filename for w in caught} == {__file__}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the worker's filters are not the caller's
        assert run_cell(sweep(penalties=1e-16).cells(TASK)[0]).warned


def test_a_result_compares_its_models(monkeypatch: pytest.MonkeyPatch) -> None:
    result = sweep(seeds=range(7)).run(TASK, workers=0)
    expected = compare(result.scores(), "deep", "flat", measure="capacity", seed=3)
    assert result.compare("deep", "flat", measure="capacity", seed=3) == expected
    others = (
        compare(result.scores(), "deep", "flat", measure="capacity"),
        compare(result.scores(), "deep", "flat", seed=3),
    )
    assert len({expected, *others}) == 3


def test_progress_counts_cells_those_kept_too(store: RunStore) -> None:
    seen: list[tuple[int, int]] = []
    sweep(seeds=range(2)).run(TASK, store=store, workers=0, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(k, 4) for k in range(5)]
    seen.clear()
    sweep().run(TASK, store=store, workers=0, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(4, 6), (5, 6), (6, 6)]


def test_a_bar_is_drawn_on_the_terminals_stderr_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep(seeds=np.arange(1)).run(TASK, workers=0)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes it for a terminal
    sweep(seeds=np.arange(1)).run(TASK, workers=0)
    out, err = capsys.readouterr()
    assert out == ""
    assert "2/2" in err


def test_module_inputs() -> None:
    network = sampled(flat, 0)
    drawn = {int(ModuleInputs()(network, seed)[0].inputs[0][0]) for seed in range(20)}
    assert drawn == {0, 6, 12, 18}
    assert [io.inputs[0][0] for io in ModuleInputs(which="each")(network, 0)] == [0, 6, 12, 18]
    assert [io.inputs[0][0] for io in ModuleInputs(which=(2, 1))(network, 0)] == [12, 6]
    assert ModuleInputs(level=1, n_outputs=3, which="each")(network, 0)[0].outputs[0].size == 3
    assert len(ModuleInputs(level=1, which="each")(network, 0)) == 2
    read = {tuple(ModuleInputs(n_outputs=3, which=(0,))(network, seed)[0].outputs[0]) for seed in range(10)}
    assert len(read) > 3
    with pytest.raises(InputError, match=r"^which = \(\)"):
        ModuleInputs(which=())(network, 0)
    for which in (None, {1}, np.arange(2)):
        with pytest.raises(InputError, match=r"^which = "):
            ModuleInputs(which=which)(network, 0)
    with pytest.raises(InputError, match=r"^which = 'all'"):
        ModuleInputs(which="all")(network, 0)


def test_a_frame_has_one_row_a_row() -> None:
    pandas = pytest.importorskip("pandas")
    result = sweep(seeds=(0,)).run(TASK, workers=0)
    frame = result.to_frame()
    assert isinstance(frame, pandas.DataFrame)
    assert len(frame) == len(result.rows)
    assert frame.score.tolist() == [row.score for row in result.rows]
    assert set(frame.columns) >= {
        "model",
        "seed",
        "weight_bits",
        "spectral_radius",
        "read_noise",
        "read_bits",
        "lyapunov",
    }


def test_without_pandas_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(BackendMissing, match=r"commissure\[frames\]"):
        sweep(seeds=(0,)).run(TASK, workers=0).to_frame()


class Unsendable(MemoryCapacity):
    def __reduce__(self) -> str:
        raise TypeError("never")


def test_what_cannot_be_sent_is_refused_before_anything_runs() -> None:
    with pytest.raises(InputError, match=r"^models\['m'\] = .*a top-level function, or run with workers=0"):
        sweep(models={"m": lambda seed: flat(seed)}).run(TASK, workers=1)
    with pytest.raises(InputError, match=r"^io = "):
        sweep(io=lambda network, seed: ModuleInputs()(network, seed)).run(TASK, workers=1)
    with pytest.raises(InputError, match=r"^task = "):
        sweep().run(Unsendable(max_delay=3, length=200, warmup=10), workers=1)
    with pytest.raises(InputError, match=r"^workers = 1\.5"):
        sweep().run(TASK, workers=1.5)
    assert sweep(models={"m": lambda seed: flat(seed)}, seeds=(0,)).run(TASK, workers=0).rows


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models": {}}, r"^models = \{\}"),
        ({"models": {"x": 3}}, r"^models\['x'\] = 'int': expected a Connectome"),
        ({"seeds": []}, r"^seeds = \[\]"),
        ({"seeds": [0, -1]}, r"^seeds\[1\] = -1"),
        ({"seeds": [0, 0]}, r"^seeds = \[0, 0\]: expected distinct"),
        ({"spectral_radius": ()}, r"^spectral_radius = \(\)"),
        ({"spectral_radius": 0.8}, r"^spectral_radius = 0\.8: expected several values"),
        ({"seeds": 3}, r"^seeds = 3: expected several values"),
        ({"io": 3}, r"^io = 3: expected an IOMap"),
        ({"models": [flat]}, r"^models = \["),
        ({"spectral_radius": ["0.5"]}, r"^spectral_radius\[0\] = '0\.5'"),
        ({"spectral_radius": np.array(0.5)}, r"^spectral_radius = .*: expected several"),
        ({"seeds": [[0]]}, r"^seeds\[0\] = \[0\]"),
        ({"read_noise": [True]}, r"^read_noise\[0\] = True"),
        ({"read_bits": [None, 2.5]}, r"^read_bits\[1\] = 2\.5"),
        ({"weight_bits": "8"}, r"^weight_bits = '8'"),
        ({"activation": ["tanh"]}, r"^activation = \['tanh'\]"),
        ({"dtype": "float32"}, r"^dtype = 'float32'"),
    ],
)
def test_bad_sweeps(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        sweep(**options)


@pytest.mark.parametrize("penalties", ["1", True, None, [1.0, None], {1.0}])
def test_bad_penalties(penalties: object) -> None:
    with pytest.raises(InputError, match=r"^penalties"):
        sweep(penalties=penalties).cells(TASK)


@pytest.mark.parametrize(
    "options", [{"task": None}, {"task": "memory"}, {"store": "x"}, {"executor": 2}, {"workers": -1}]
)
def test_runs_of_nothing_that_runs(options: dict) -> None:
    (name,) = options
    with pytest.raises(InputError, match=f"^{name} = "):
        sweep().run(**{"task": TASK, **options})


def test_bad_runs() -> None:
    with ThreadPoolExecutor(1) as pool, pytest.raises(InputError, match=r"^workers = 2: expected None together"):
        sweep().run(TASK, executor=pool, workers=2)
    with pytest.raises(InputError, match=r"^models = 'int': expected models that give a Connectome"):
        run_cell(Cell("m", lambda seed: seed, 0, sweep().cells(TASK)[0].settings))
    bare = Connectome.from_array(np.ones((4, 4)) - np.eye(4), orientation=None)
    with pytest.raises(InputError, match=r"^levels = \(\)"):
        sweep(models={"m": bare}).run(TASK, workers=0)
