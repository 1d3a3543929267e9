"""`commissure reservoirs`: what the commands print is what the functions return."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.io import savemat

from commissure.cli import main
from commissure.core.rng import generator
from commissure.core.stats import mean_interval
from commissure.reservoirs.block_model import HierarchicalSBM
from commissure.reservoirs.block_tree import BlockTree
from commissure.reservoirs.communities import louvain_hierarchy
from commissure.reservoirs.connectome import Connectome
from commissure.reservoirs.evaluation import evaluate, module_r2
from commissure.reservoirs.io_map import IOMap
from commissure.reservoirs.nulls import rewire
from commissure.reservoirs.show import facts
from commissure.reservoirs.tasks import MemoryCapacity

QUICK = ["--length", "120", "--delays", "4", "--radius", "0.5", "0.9", "--penalty", "1e-6"]
SMALL = HierarchicalSBM(BlockTree.balanced(depth=2, leaf_size=12), p_within=0.7, decay=0.3).sample(0)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["reservoirs", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out, parse_constant=pytest.fail)  # NaN and Infinity are not JSON


@pytest.fixture
def path(tmp_path: Path) -> Path:
    np.save(tmp_path / "net.npy", SMALL.to_array())
    return tmp_path / "net.npy"


def test_eval_of_a_preset_is_the_published_protocol(capsys: pytest.CaptureFixture[str]) -> None:
    """One module drawn by seed is driven, every other is read whole."""
    rows = run(capsys, "eval", "milisav2025", *QUICK, "--levels", 0, 3, "--seeds", 2, "--seed", 4, "--gain", 0.3,
               "--lyapunov")["rows"]  # fmt: skip
    assert [(r["network"], r["seed"], r["spectral_radius"]) for r in rows] == [
        (name, seed, radius) for name in ("0 random", "3 levels") for seed in (4, 5) for radius in (0.5, 0.9)
    ]
    network = HierarchicalSBM.from_preset("milisav2025", level=3).sample(5)
    module = int(generator(5, "input modules").choice(8, 1, replace=False)[0])
    io = IOMap.from_modules(network.modules(), inputs=[module])
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
    fewer = run(capsys, "eval", path, *options, "--outputs", 3, "--inputs", "random")["rows"][0]
    assert fewer["score"] != first["score"]


def test_eval_compares_with_nulls_under_conditions(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figure = tmp_path / "sweep.svg"
    options = ["--orientation", "source_target", *QUICK, "--nulls", "degree", "degree+levels", "--noise", "0", "0.01",
               "--bits", "8", "--seeds", "2", "--inputs", "random"]  # fmt: skip
    rows = run(capsys, "eval", path, *options, "--out", figure)["rows"]
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
        (["eval", "milisav2025", "--task", "chess"], "lorenz"),
        (["eval", "milisav2025", "--seeds", "0"], "seeds"),
        (["eval", "milisav2025", "--seeds", "2.5"], "not an integer"),
        (["eval", "milisav2025", "--seed", "-1"], "seed"),
        (["eval", "milisav2025", "--length", "0"], "length"),
        (["eval", "milisav2025", "--delays", "101"], "max_delay"),
        (["eval", "milisav2025", "--radius", "-1"], "spectral_radius"),
        (["eval", "milisav2025", "--leak", "0"], "leak"),
        (["eval", "milisav2025", "--penalty", "-1"], "penalties"),
        (["eval", "milisav2025", "--noise", "-1"], "read_noise"),
        (["eval", "milisav2025", "--bits", "0"], "read_bits"),
        (["eval", "milisav2025", "--outputs", "51"], "n_outputs"),
        (["eval", "milisav2025", "--out", "{folder}/x.png"], "x.svg"),
        (["eval", "milisav2025", "--out", "missing/x.svg"], "out"),
        (["null", "{net}", "--out", "{folder}/x"], "orientation"),
        (["null", "milisav2025", "--out", "missing/x"], "out"),
        (["null", "milisav2025", "--out", "{net}"], "out"),
        (["null", "milisav2025", "--out", "{folder}/x", "--count", "0"], "count"),
        (["null", "milisav2025", "--out", "{folder}/x", "--preserve", "all"], "preserve"),
        (["null", "milisav2025", "--out", "{folder}/x", "--swaps-per-edge", "0"], "swaps_per_edge"),
        (["show", "{net}", "--orientation", "source_target", "--runs", "0"], "runs"),
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
    capsys.readouterr()
    assert main(["reservoirs", *filled]) == 2
    captured = capsys.readouterr()
    assert named in captured.err
    assert captured.out == ""
    assert not (path.parent / "x").exists(), "no folder before an error"
