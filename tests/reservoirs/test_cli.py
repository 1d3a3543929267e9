"""`commissure reservoirs`: what the commands print is what the functions return."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from scipy.io import savemat

from commissure.cli import main
from commissure.core.errors import InputError
from commissure.core.stats import mean_interval
from commissure.reservoirs import bench, by_name, cells, cli, sweep
from commissure.reservoirs.block_model import HierarchicalSBM
from commissure.reservoirs.block_tree import BlockTree
from commissure.reservoirs.by_name import PRESETS, NullModel, TaskInputs, models_by_name, task_by_name
from commissure.reservoirs.cells import ModuleInputs, run_cell
from commissure.reservoirs.communities import louvain_hierarchy
from commissure.reservoirs.connectome import Connectome, Orientation
from commissure.reservoirs.evaluation import evaluate, module_r2
from commissure.reservoirs.inputs import real
from commissure.reservoirs.io_map import IOMap
from commissure.reservoirs.loading import _READERS
from commissure.reservoirs.nulls import Preserve, rewire
from commissure.reservoirs.show import facts
from commissure.reservoirs.tasks import ChaoticForecast, MemoryCapacity, Multitask, NonlinearTransform

QUICK = ["--workers", "0", "--length", "120", "--delays", "4", "--radius", "0.5", "0.9", "--penalty", "1e-6"]
SMALL_TREE = BlockTree.balanced(depth=2, leaf_size=12)
SMALL = HierarchicalSBM(SMALL_TREE, p_within=0.7, decay=0.3).sample(0)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["reservoirs", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out, parse_constant=pytest.fail)  # NaN and Infinity are not JSON


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMMISSURE_HOME", str(tmp_path / "home"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    np.save(tmp_path / "net.npy", SMALL.to_array())
    return tmp_path / "net.npy"


def test_eval_of_a_preset_is_the_published_protocol(capsys: pytest.CaptureFixture[str]) -> None:
    """One module drawn by seed is driven, every other is read whole."""
    rows = run(capsys, "eval", "milisav2025", *QUICK, "--levels", 0, 3, "--seeds", 2, "--seed", 4, "--gain", 0.3,
               "--lyapunov")["rows"]  # fmt: skip
    assert sorted((r["network"], r["seed"], r["spectral_radius"]) for r in rows) == [
        (name, seed, radius) for name in ("0 random", "3 levels") for seed in (4, 5) for radius in (0.5, 0.9)
    ]
    network = HierarchicalSBM.from_preset("milisav2025", level=3).sample(5)
    (io,) = ModuleInputs()(network, 5)
    assert sorted([len(io.inputs), *map(len, io.outputs)]) == [1, *[50] * 7]
    task = MemoryCapacity(max_delay=4, length=120)
    scores = evaluate(
        network, task, io=io, spectral_radius=[0.5, 0.9], input_gain=0.3, penalties=1e-6, lyapunov=True, seed=5
    )
    for row, expected in zip(rows[-2:], module_r2(scores), strict=True):
        assert (row["score"], row["capacity"], row["lyapunov"]) == (
            expected.score, expected.capacity, expected.lyapunov)  # fmt: skip


def test_eval_of_a_file_drives_every_module(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--orientation", "source_target", *QUICK, "--seeds", "1"]
    (first, _) = run(capsys, "eval", path, *options)["rows"]
    network = SMALL.with_levels(louvain_hierarchy(SMALL, seed=0).levels)
    modules = network.modules()
    n = min(10, *(len(module) for module in modules))
    maps = [IOMap.from_modules(modules, inputs=[i], n_outputs=n, seed=0) for i in range(len(modules))]
    task = MemoryCapacity(max_delay=4, length=120)
    (expected, _) = module_r2(evaluate(network, task, io=maps, spectral_radius=[0.5, 0.9], penalties=1e-6, seed=0))
    assert first["score"] == expected.score
    fewer, one = (
        run(capsys, "eval", path, *options, *more)["rows"][0]["score"]
        for more in (["--outputs", 3], ["--inputs", "random"])
    )
    assert len({first["score"], fewer, one}) == 3


def test_eval_compares_with_nulls_under_conditions(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figure = tmp_path / "sweep.svg"
    options = ["--orientation", "source_target", *QUICK, "--nulls", "degree", "degree+levels", "--noise", "0", "0.01",
               "--bits", "8", "--seeds", "2", "--inputs", "random"]  # fmt: skip
    told = run(capsys, "eval", path, *options, "--out", figure)
    rows, compared = told["rows"], told["comparisons"]
    assert [(c["a"], c["b"]) for c in compared[::8]] == [("net.npy", f"null: degree{more}") for more in ("", "+levels")]
    first = compared[0]
    pairs = [[r["score"] for r in rows if (r["network"], r["spectral_radius"], r["read_noise"], r["read_bits"])
              == (first[side], first["spectral_radius"], 0, None)] for side in "ab"]  # fmt: skip
    assert first["difference"]["estimate"] == pytest.approx(np.subtract(*pairs).mean(), rel=1e-12)
    assert {r["network"] for r in rows} == {"net.npy", "null: degree", "null: degree+levels"}
    assert {(r["read_noise"], r["read_bits"]) for r in rows} == {(0, None), (0, 8), (0.01, None), (0.01, 8)}
    assert len({r["score"] for r in rows}) == len(rows) == 3 * 2 * 2 * 4
    text = figure.read_text()
    for name in ("net.npy", "null: degree+levels", "noise 0.01, 8 bits", "spectral radius"):
        assert f"<!-- {name} -->" in text
    assert main(["reservoirs", "eval", str(path), *options]) == 0
    shown = capsys.readouterr().out
    for title in ("clean: mean R² [95 % over 2 seeds]", "8 bits:", "noise 0.01:", "noise 0.01, 8 bits:"):
        assert title in shown
    values = [r["score"] for r in rows if r["network"] == "null: degree" and r["spectral_radius"] == 0.9
              and not r["read_noise"] and r["read_bits"] is None]  # fmt: skip
    mean, low, high = mean_interval(values)
    assert f"{mean:.4f} [{low:.3f}, {high:.3f}]" in shown
    assert "net.npy (a) against null: degree+levels (b), 2 seeds" in shown
    assert f"{first['difference']['estimate']:+.4f} [" in shown


def test_eval_stops_and_goes_on(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted after one cell it says so; the same command then computes only what is missing."""
    command = ["reservoirs", "eval", "milisav2025", *QUICK, "--levels", "1", "3", "--seeds", "1", "--json"]
    done: list[str] = []

    def interrupted(cell: Any) -> Any:
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(cell.name)
        return run_cell(cell)

    monkeypatch.setattr(sweep, "run_cell", interrupted)
    assert main(command) == 130
    captured = capsys.readouterr()
    assert json.loads(captured.out)["missing"] == [["3 levels", 0]]
    assert "1 of 2 cells" in captured.err
    done.append("")
    assert main(command) == 0
    assert done == ["1 modular", "", "3 levels"]
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["network"] for row in rows[::2]] == ["1 modular", "3 levels"]


def test_inputs_of_tasks_with_several_channels() -> None:
    lorenz = task_by_name("lorenz", length=50)
    (io,) = TaskInputs(task=lorenz, which="each", most_outputs=7)(SMALL, 0)
    modules = [set(module.tolist()) for module in SMALL.modules()]
    assert len(io.inputs) == 3
    assert all(set(nodes.tolist()) in modules for nodes in io.inputs)
    assert [len(nodes) for nodes in io.outputs] == [7]
    assert len(TaskInputs(task=task_by_name("memory"), which="each")(SMALL, 0)) == 4
    halves = SMALL.with_levels(SMALL.levels[1:])
    with pytest.raises(InputError, match=r"task = '3 inputs': expected fewer inputs than the network has modules, 2"):
        TaskInputs(task=lorenz, which="random")(halves, 0)
    (io,) = TaskInputs(task=task_by_name("memory"), which="random", most_outputs=50)(SMALL, 0)
    assert {len(nodes) for nodes in io.outputs} == {12}, "at most the smallest module"


def test_inputs_are_drawn_by_the_seed() -> None:
    lorenz, thirds = task_by_name("lorenz", length=50), np.repeat([0, 1, 2], 16)
    drawn = [TaskInputs(task=lorenz, which="each", n_outputs=3)(SMALL, seed)[0] for seed in range(12)]
    assert len({tuple(int(nodes[0]) for nodes in io.inputs) for io in drawn}) > 6
    assert len({tuple(io.outputs[0]) for io in drawn if io.outputs[0][0] < 12}) > 1
    many = [TaskInputs(task=task_by_name("multitask"), which="each")(SMALL, seed)[0] for seed in range(12)]
    assert len({tuple(int(nodes[0]) for nodes in io.inputs) for io in many}) > 3
    with pytest.raises(InputError, match=r"^task = '3 inputs'"):
        TaskInputs(task=lorenz, which="each")(SMALL.with_levels([thirds]), 0)
    with pytest.raises(InputError, match=r"^task = 'memory'"):
        TaskInputs(task="memory", which="each")(SMALL, 0)
    for bad in (0, 1.5, "3"):
        with pytest.raises(InputError, match=r"^most_outputs = "):
            TaskInputs(task=task_by_name("memory"), which="each", most_outputs=bad)(SMALL, 0)


def test_tasks_have_the_length_and_the_delays_asked_for() -> None:
    sizes = {"length": 150, "max_delay": 5}
    assert task_by_name("memory", **sizes) == MemoryCapacity(max_delay=5, length=150)
    assert task_by_name("multitask", **sizes) == Multitask(max_delay=5, length=150)
    assert task_by_name("nonlinear", **sizes) == NonlinearTransform(length=150)
    assert task_by_name("henon", **sizes) == ChaoticForecast(system="henon", length=150)
    with pytest.raises(InputError, match=r"^task = 3"):
        task_by_name(3)


def test_a_file_is_read_and_parted_as_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = SMALL.to_array()[::-1, ::-1]
    savemat(tmp_path / "two.mat", {"a": SMALL.to_array(), "b": other})
    seeds = []
    found = louvain_hierarchy

    def watched(*arguments: Any, seed: int, **options: Any) -> Any:
        seeds.append(seed)
        return found(*arguments, seed=seed, **options)

    monkeypatch.setattr(by_name, "louvain_hierarchy", watched)
    (network,) = models_by_name(str(tmp_path / "two.mat"), orientation="source_target", variable="b", seed=7).values()
    assert np.array_equal(network.to_array(), other)
    assert seeds == [7]
    for name, options in (("levels", {"levels": 3}), ("nulls", {"nulls": 3}), ("nulls[0]", {"nulls": ("all",)})):
        with pytest.raises(InputError) as raised:
            models_by_name("milisav2025", **options)
        assert raised.value.argument == name
    with pytest.raises(InputError, match=r"^network = None"):
        models_by_name(None)


def test_nulls_of_a_model_are_of_its_networks() -> None:
    model = HierarchicalSBM(SMALL_TREE, p_within=0.7, decay=0.3)
    for source, network in ((model, model.sample(3)), (SMALL, SMALL)):
        null = NullModel(source, "degree").sample(3)
        assert np.array_equal(null.to_array(), rewire(network, seed=3).connectome.to_array())


@pytest.mark.parametrize("task", ["nonlinear", "henon", "multitask"])
def test_eval_has_other_tasks(task: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--task", task, *QUICK, "--seeds", "1", "--bits", "6"]
    rows = run(capsys, "eval", "milisav2025", *options)["rows"]
    assert all(-5 < row["score"] < 1 for row in rows)
    memory = run(capsys, "eval", "milisav2025", *options[2:])["rows"]
    assert [row["score"] for row in rows] != [row["score"] for row in memory]


def test_eval_prints_exponents(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reservoirs", "eval", "milisav2025", *QUICK, "--seeds", "1", "--lyapunov"]) == 0
    shown = capsys.readouterr().out
    assert "ordered below 0, chaotic above" in shown
    assert "nan" not in shown


def test_null_writes_what_rewire_makes(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "nulls"
    command = ["null", path, "--orientation", "source_target", "--preserve", "degree+modules", "--count", 2,
               "--swaps-per-edge", 5, "--seed", 3, "--out", out]  # fmt: skip
    rows = run(capsys, *command)["rows"]
    assert [Path(row["file"]).name for row in rows] == ["null-0000.npy", "null-0001.npy"]
    network = SMALL.with_levels(louvain_hierarchy(SMALL, seed=3).levels)
    for k, row in enumerate(rows):
        made = rewire(network, preserve="degree+modules", swaps_per_edge=5, seed=3 + k)
        found = Connectome.from_file(row["file"], orientation="source_target")
        assert np.array_equal(found.to_array(), made.connectome.to_array())
        assert (row["seed"], row["accepted"], row["moved"]) == (3 + k, made.statistics.accepted, made.statistics.moved)
    assert main(["reservoirs", *map(str, command)]) == 0
    shown = capsys.readouterr().out
    assert f"{rows[0]['accepted']:,} of {rows[0]['proposed']:,}" in shown


def test_bench_prints_what_was_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    rows = bench.bench_states(40, 0.1, rows=2, repeats=1, steps=3)
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(bench, "bench", lambda **options: asked.append(options) or rows)
    found = run(capsys, "bench", "--full", "--repeats", 2)["rows"]
    assert asked == [{"full": True, "repeats": 2}]
    assert [(row["rival"], row["gain"]["median"]) for row in found] == [(row.rival, row.gain.median) for row in rows]
    assert main(["reservoirs", "bench"]) == 0
    shown = capsys.readouterr().out
    assert asked[-1] == {"full": False, "repeats": 5}
    for row in rows:
        assert f"{row.rival:8} " in shown
        assert f"{row.gain.median:.3g} [{row.gain.low:.3g}, {row.gain.high:.3g}]" in shown
    assert main(["reservoirs", "bench", "--repeats", "0"]) == 2


def test_show_counts_and_draws(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figure = tmp_path / "net.svg"
    found = run(capsys, "show", path, "--orientation", "source_target", "--runs", 5, "--out", figure)
    network = SMALL.with_levels(louvain_hierarchy(SMALL, n_runs=5, seed=0).levels)
    assert found == json.loads(json.dumps(facts(network).to_dict()))
    assert "<svg" in figure.read_text()
    finer = run(capsys, "show", path, "--orientation", "source_target", "--runs", 5, "--gamma", 3)
    assert finer["modules"][0] > found["modules"][0]
    (flat,) = (run(capsys, "show", "milisav2025", "--levels", 1, "--seed", 2) for _ in range(1))
    assert flat["edges"] == HierarchicalSBM.from_preset("milisav2025", level=1).sample(2).n_edges
    savemat(path.with_suffix(".mat"), {"a": SMALL.to_array(), "b": np.eye(48)[::-1]})
    mat = ["show", path.with_suffix(".mat"), "--variable", "a", "--orientation", "target_source", "--runs", 2]
    assert run(capsys, *mat)["edges"] == SMALL.n_edges
    assert main(["reservoirs", *map(str, mat)]) == 0
    shown = capsys.readouterr().out
    assert "spectral_method          power" in shown


def test_show_of_negative_weights_looks_for_no_modules(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = Connectome.from_array(-SMALL.to_array(), orientation="source_target")
    np.save(tmp_path / "signed.npy", network.to_array())
    found = run(capsys, "show", tmp_path / "signed.npy", "--orientation", "source_target", "--runs", 0)
    assert (found["negative"], found["modules"], found["edges"]) == (1.0, [], SMALL.n_edges)


def test_nulls_are_not_mixed_with_others(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "nulls"
    command = ["null", path, "--orientation", "source_target", "--swaps-per-edge", 1, "--out", out, "--count"]
    run(capsys, *command, 3)
    run(capsys, *command, 3)
    assert main(["reservoirs", *map(str, command), "2"]) == 2
    assert "found null-0002.npy; take a new folder" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_bad_input_before_the_work(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cells, "evaluate", pytest.fail)
    long, closed = "x" * 300, tmp_path / "closed"
    closed.mkdir()
    access = os.access
    monkeypatch.setattr(os, "access", lambda place, mode: place != closed and access(place, mode))
    for out in (long, closed / "x"):
        for command in (["show", "{}.svg"], ["eval", "{}.svg", "--workers", "0"], ["null", "{}"]):
            arguments = [command[0], "milisav2025", "--out", command[1].format(out), *command[2:]]
            assert main(["reservoirs", *arguments]) == 2
            assert "expected a place that can be written" in capsys.readouterr().err


def test_a_full_disk_is_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was computed is printed first."""

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    command = ["eval", "milisav2025", *QUICK, "--seeds", "1", "--out", tmp_path / "x.svg"]
    assert main(["reservoirs", *map(str, command)]) == 2
    captured = capsys.readouterr()
    assert "clean: mean R²" in captured.out
    assert "No space left on device" in captured.err
    monkeypatch.setattr(np, "save", full)
    assert main(["reservoirs", "null", "milisav2025", "--out", str(tmp_path / "n")]) == 2
    assert "No space left on device" in capsys.readouterr().err


def test_interrupted_at_once_it_still_prints_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "run_cell", interrupted)
    command = ["reservoirs", "eval", "milisav2025", *QUICK, "--seeds", "1"]
    assert main([*command, "--json"]) == 130
    told = json.loads(capsys.readouterr().out)
    assert (told["rows"], told["comparisons"], told["missing"]) == ([], [], [["3 levels", 0]])
    assert main(command) == 130
    assert capsys.readouterr().out == ""


def test_copies_of_choices_are_those_of_the_modules() -> None:
    assert get_args(cli.Preserve) == get_args(Preserve)
    assert get_args(cli.Orientation) == get_args(Orientation)
    assert all(f"{suffix}," in cli._NETWORK or f"{suffix} of The Virtual Brain" in cli._NETWORK for suffix in _READERS)
    assert all(preset in cli._NETWORK for preset in PRESETS)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["eval", "milisav"], "hcp-s400 or milisav2025"),
        (["eval", "missing.npy"], "missing.npy"),
        (["eval", "{net}"], "orientation"),
        (["eval", "{net}", "--orientation", "rows"], "orientation"),
        (["eval", "{net}", "--orientation", "source_target", "--levels", "1"], "only presets"),
        (["eval", "milisav2025", "--levels", "4"], "level"),
        (["eval", "milisav2025", "--levels", "1.5"], "1.5"),
        (["eval", "milisav2025", "--nulls", "weights"], "nulls"),
        (
            ["eval", "milisav2025", "--task", "chess"],
            "task = 'chess': expected one of memory, nonlinear, multitask, logistic, henon, lorenz",
        ),
        (["eval", "milisav2025", "--seeds", "0"], "seeds"),
        (["eval", "milisav2025", "--seeds", "2.5"], "not an integer"),
        (["eval", "milisav2025", "--seed", "-1"], "seed"),
        (["eval", "milisav2025", "--length", "0"], "length"),
        (["eval", "milisav2025", "--length", "1000000000000000"], "length"),
        (["eval", "milisav2025", "--seeds", "1000000000000"], "seeds"),
        (["eval", "milisav2025", "--seed", "9223372036854775807"], "seed"),
        (["eval", "milisav2025", "--gain", "nan"], " gain = nan"),
        (["eval", "milisav2025", "--delays", "101"], " delays = 101"),
        (["eval", "milisav2025", "--radius", "-1"], " radius = -1"),
        (["eval", "milisav2025", "--leak", "0"], "leak"),
        (["eval", "milisav2025", "--penalty", "-1"], "penalty[0]"),
        (["eval", "milisav2025", "--noise", "-1"], " noise[0]"),
        (["eval", "milisav2025", "--bits", "0"], "bits[1] = 0"),
        (["eval", "milisav2025", "--outputs", "51"], " outputs = 51"),
        (["eval", "milisav2025", "--out", "{folder}/x.png"], "x.svg"),
        (["eval", "milisav2025", "--out", "missing/x.svg"], "out"),
        (["null", "{net}", "--out", "{folder}/x"], "orientation"),
        (["null", "milisav2025", "--out", "missing/x"], "out"),
        (["null", "milisav2025", "--out", "{net}"], "out"),
        (["null", "milisav2025", "--out", "{folder}/x", "--count", "0"], "count"),
        (["null", "milisav2025", "--out", "{folder}/x", "--preserve", "all"], "preserve"),
        (["null", "milisav2025", "--out", "{folder}/x", "--swaps-per-edge", "0"], "swaps_per_edge"),
        (["show", "{net}", "--orientation", "source_target", "--runs", "-1"], "runs"),
        (["show", "{net}", "--orientation", "source_target", "--levels", "1"], "only presets"),
        (["show", "{net}", "--orientation", "source_target", "--gamma", "-1"], "gamma"),
        (["show", "{net}", "--orientation", "source_target", "--variable", "a"], "variable"),
        (["show", "milisav2025", "--out", "{folder}/x.pdf"], "x.svg"),
    ],
)
def test_bad_input_exits_2_and_names_it(
    arguments: list[str], named: str, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [a.format(net=path, folder=path.parent) for a in arguments]
    filled += ["--workers", "0"] if filled[0] == "eval" else []
    capsys.readouterr()
    assert main(["reservoirs", *filled]) == 2
    captured = capsys.readouterr()
    assert named in captured.err
    assert captured.out == ""
    assert not (path.parent / "x").exists(), "no folder before an error"


@pytest.mark.parametrize(("levels", "depth"), [((), 3), ((1,), 1), ((3, 0, 2), 2)])
def test_nulls_are_of_the_network_that_is_compared(levels: tuple[int, ...], depth: int) -> None:
    models = models_by_name("milisav2025", levels=levels, nulls=("degree",))
    *chosen, last = models.values()
    assert isinstance(last, NullModel)
    assert last.source is chosen[-1]
    assert isinstance(last.source, HierarchicalSBM)
    assert last.source.level == depth


def test_integers_beyond_float64_are_refused() -> None:
    with pytest.raises(InputError, match="gain"):
        real("gain", 10**400)
