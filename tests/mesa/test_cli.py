"""`commissure mesa` as a user types it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from commissure.cli import main
from commissure.nn import Stack

MQAR = ["--task", "mqar", "--size", "n_pairs=2", "length=12", "vocab=12"]
TINY = ["--set", "dim=8", "heads=1", "head_dim=4", "batch_size=4"]


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["mesa", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mesa") / "model.safetensors"
    assert main(["mesa", "fit", *MQAR, *TINY, "--mixer", "mesa, gru", "--steps", "4", "--out", str(path)]) == 0
    return path


def test_fit_reports_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "model"
    found = run(
        capsys, "fit", *MQAR, *TINY, "--mixer", "gru", "--steps", 6, "--set", "validate_every=2", "--out", out,
        "--checkpoint-every", 2,
    )  # fmt: skip
    assert [step for step, _ in found["evaluations"]] == [2, 4, 6]
    assert found["evaluations"][-1][1] == pytest.approx(found["accuracy"])
    assert (len(found["by_position"]), found["n_scored"]) == (12, 512)
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "the run's checkpoint is gone when it is done"
    again = run(capsys, "fit", *MQAR, *TINY, "--mixer", "gru", "--steps", 6, "--set", "validate_every=2", "--out", out)
    assert again["loss"] == found["loss"]


def test_eval_measures_the_trained_task_and_others(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = run(capsys, "eval", trained, "--sequences", 50)
    assert (own["task"], own["n_pairs"], own["length"], own["n_scored"]) == ("mqar", 2, 12, 100)
    longer = run(capsys, "eval", trained, "--sequences", 50, "--size", "length=16")
    assert (longer["n_pairs"], longer["length"]) == (2, 16)
    other = run(
        capsys, "eval", trained, "--sequences", 5, "--task", "selective_copying", "--size", "vocab=12", "length=9",
        "n_copied=3",
    )  # fmt: skip
    assert other["n_scored"] == 15


def test_eval_in_words_leaves_the_positions_out(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["mesa", "eval", str(trained), "--sequences", "5"]) == 0
    shown = capsys.readouterr().out
    assert "accuracy" in shown
    assert "by_position" not in shown


def test_vectors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "lds"
    found = run(
        capsys, "fit", "--task", "lds", "--size", "dim=4", "length=8", "--mixer", "gru", "--steps", 2,
        "--set", "alone=true", "--out", out,
    )  # fmt: skip
    assert found["mse"] > 0
    assert run(capsys, "eval", out)["mse"] > 0


def test_show_prints_and_draws_the_mesa_heads(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("commissure.mesa.show")
    capsys.readouterr()
    figure = tmp_path / "heads.svg"
    assert main(["mesa", "show", str(trained), "--out", str(figure), "--json"]) == 0
    (head,) = json.loads(capsys.readouterr().out)
    assert head["lambda_mean"] == pytest.approx(1, abs=0.2)
    assert "<svg" in figure.read_text()
    Stack(["mesa"], 8, vocab=6, heads=1, head_dim=4).save(tmp_path / "stack")
    assert main(["mesa", "show", str(tmp_path / "stack")]) == 0
    assert "gamma" in capsys.readouterr().out


def test_a_killed_fit_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Killed by SIGKILL as soon as there is a checkpoint; the second run ends as if nothing had happened."""
    arguments = ["fit", *MQAR, *TINY, "--mixer", "gru", "--steps", "200", "--set", "validate_every=200"]
    out, training = tmp_path / "model", tmp_path / "model.training"
    command = [sys.executable, "-m", "commissure.cli", "mesa", *arguments, "--out", str(out), "--checkpoint-every", "5"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not training.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "killed before it was done"
    resumed = run(capsys, *arguments, "--out", out, "--checkpoint-every", 5)
    whole = run(capsys, *arguments, "--out", tmp_path / "whole")
    assert (resumed["loss"], resumed["accuracy"]) == (whole["loss"], whole["accuracy"])
    expected, found = load_file(tmp_path / "whole"), load_file(out)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["fit", "--out", "missing/x"], "out"),
        (["fit", "--out", "{folder}/x", "--task", "copying"], "task"),
        (["fit", "--out", "{folder}/x", "--mixer", "lstm"], "mixer"),
        (["fit", "--out", "{folder}/x", "--mixer", "mesanet"], "mesanet-SIZE"),
        (["fit", "--out", "{folder}/x.pt"], ".safetensors"),
        (["fit", "--out", "{folder}/x", "--steps", "0"], "steps"),
        (["fit", "--out", "{folder}/x", "--steps", "2.5"], "not an integer"),
        (["fit", "--out", "{folder}/x", "--set", "steps=2.5"], "steps"),
        (["fit", "--out", "{folder}/x", "--checkpoint-every", "1.5"], "not an integer"),
        (["fit", "--out", "{folder}/x", "--size", "pairs=3"], "length"),
        (["fit", "--out", "{folder}/x", "--set", "rate=3"], "batch_size"),
        (["fit", "--out", "{folder}/x", "--size", "n_pairs"], "NAME=VALUE"),
        (["fit", "--out", "{folder}/x", "--size", "pairs=3"], "pairs"),
        (["fit", "--out", "{folder}/x", "--size", "n_pairs=many"], "n_pairs"),
        (["fit", "--out", "{folder}/x", "--set", "rate=3"], "rate"),
        (["fit", "--out", "{folder}/x", "--set", "lr=-1"], "lr"),
        (["fit", "--out", "{folder}/x", "--parallel", "ddp"], "torchrun"),
        (["fit", "--out", "{folder}/x", "--device", "abacus"], "device"),
        (["fit", "--out", "{folder}/x", "--checkpoint-every", "0"], "checkpoint_every"),
        (["fit", "--out", "{folder}/x", "--set", "alone=true"], "alone"),
        (["eval", "missing"], "path"),
        (["eval", "{model}", "--task", "lds"], "task"),
        (["eval", "{model}", "--size", "vocab=14"], "vocab"),
        (["eval", "{model}", "--sequences", "0"], "sequences"),
        (["show", "missing"], "path"),
        (["eval", "{model}", "--sequences", "1.9"], "not an integer"),
        (["show", "{model}", "--out", "missing/x"], "out"),
        (["show", "{model}", "--out", "{folder}/heads.png"], "heads.svg"),
        (["bench", "--repeats", "0"], "repeats"),
    ],
)
def test_bad_input_exits_2_and_names_it(
    arguments: list[str], named: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [a.format(model=trained, folder=tmp_path) for a in arguments]
    capsys.readouterr()
    assert main(["mesa", *filled]) == 2
    captured = capsys.readouterr()
    assert named in captured.err
    assert captured.out == ""
    assert "fit" not in captured.err.partition("commissure:")[0], "no bar before an error"


@pytest.mark.parametrize(("options", "said"), [([], "nothing was saved"), (["--checkpoint-every", "1"], "is kept")])
def test_ctrl_c_says_what_is_left(
    options: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("commissure.mesa.fit.fit", interrupted)
    capsys.readouterr()
    assert main(["mesa", "fit", *MQAR, "--out", str(tmp_path / "model"), *options]) == 130
    assert said in capsys.readouterr().err
