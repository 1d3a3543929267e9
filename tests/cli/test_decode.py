"""`commissure decode`: simulate, fit, eval and stream, as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from commissure.cli import main


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A simulated session and a briefly fitted model."""
    folder = tmp_path_factory.mktemp("decode")
    recording, model = folder / "session.npz", folder / "model.safetensors"
    assert main(["decode", "simulate", str(recording), "--n-units", "20", "--duration-s", "20", "--seed", "1"]) == 0
    assert main(["decode", "fit", str(recording), "--output", str(model), "--steps", "5"]) == 0
    return recording, model


def read(capsys: pytest.CaptureFixture[str]) -> dict[str, float]:
    return json.loads(capsys.readouterr().out)


def test_eval_scores_the_held_out_part(session: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    recording, model = session
    capsys.readouterr()
    assert main(["decode", "eval", str(model), str(recording), "--json"]) == 0
    whole = read(capsys)
    assert main(["decode", "eval", str(model), str(recording), "--test-fraction", "0.2", "--json"]) == 0
    part = read(capsys)
    assert whole["n_samples"] == 2000
    assert part["n_samples"] == 400
    assert whole["r2"] == pytest.approx(sum(whole["r2_per_output"]) / 2)


@pytest.mark.parametrize("engine", ["auto", "torch"])
def test_stream_decodes_every_chunk(
    session: tuple[Path, Path], engine: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recording, model = session
    capsys.readouterr()
    arguments = ["decode", "stream", str(model), "--replay", str(recording), "--speed", "0", "--engine", engine]
    assert main([*arguments, "--json"]) == 0
    summary = read(capsys)
    assert summary["chunks"] == summary["predictions"] == 400
    assert summary["late"] == summary["dropped"] == summary["skipped"] == 0
    assert summary["spikes"] > 1000


def test_stream_keeps_the_clock(session: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    recording, model = session
    capsys.readouterr()
    assert main(["decode", "stream", str(model), "--replay", str(recording), "--speed", "20", "--json"]) == 0
    summary = read(capsys)
    assert summary["wall_s"] >= 20 / 20 * 0.99
    assert summary["late"] == summary["dropped"] == 0, "a slow computer skips readouts, it loses no spike"
    assert summary["chunks"] == summary["predictions"] + summary["skipped"] == 400


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["eval", "missing.safetensors", "missing.npz"], "path"),
        (["fit", "missing.npz", "--output", "x"], "recording"),
        (["fit", "{recording}", "--output", "x", "--preset", "possm-xl"], "possm-direct"),
        (["fit", "{recording}", "--output", "x", "--test-fraction", "1.5"], "test_fraction"),
        (["fit", "{recording}", "--output", "x", "--steps", "0"], "steps"),
        (["fit", "{recording}", "--output", "x", "--steps", "1", "--chunk-s", "0"], "chunk_s"),
        (["fit", "{recording}", "--output", "missing/x", "--steps", "1"], "output"),
        (["simulate", "missing/x", "--duration-s", "2"], "output"),
        (["stream", "{model}", "--replay", "{recording}", "--speed", "-1"], "speed"),
        (["eval", "{recording}", "{recording}"], "safetensors"),
        (["simulate", "x", "--n-units", "2.5"], "not an integer"),
        (["simulate", "x", "--seed", "0.5"], "not an integer"),
        (["fit", "{recording}", "--output", "x", "--steps", "2.5"], "not an integer"),
        (["fit", "{recording}", "--output", "x", "--seed", "0.5"], "not an integer"),
        (["eval", "{model}", "{recording}", "--seed", "0.5"], "not an integer"),
        (["bench", "--repeats", "2.5"], "not an integer"),
    ],
)
def test_bad_input_exits_2_and_names_it(
    arguments: list[str], named: str, session: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    recording, model = session
    filled = [a.format(recording=recording, model=model) for a in arguments]
    assert main(["decode", *filled]) == 2
    assert named in capsys.readouterr().err
