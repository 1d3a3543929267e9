"""`commissure geometry`: real saved models, tables, figures, and what is said of bad input."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from commissure.cli import main
from commissure.geometry import segment_phases
from commissure.geometry.bench import BenchRow
from commissure.geometry.saved_report import plain_row, read_series, read_trajectory, write_report
from commissure.geometry.show import phases_of
from commissure.geometry.spectra import FewSamplesWarning
from commissure.geometry.tracing import TraceRow
from commissure.geometry.trajectory import Trajectory, TrajectoryRow
from commissure.runs.turns import Range

STEPS = (0, 1, 3, 7, 15, 31, 63, 127, 255, 511, 1023)
RANKS = (20, 19, 12, 5, 3, 6, 9, 12, 11, 9, 7)


def report(sites: tuple[str, ...] = ("h.0", "norm")) -> Trajectory:
    rows = []
    for step, rank in zip(STEPS, RANKS, strict=True):
        for k, site in enumerate(sites):
            for frame in ("raw", "unit"):
                value = float(rank + k)
                rows.append(TrajectoryRow(step, TraceRow(site, "last", frame, 99, 30, value, 0.2, value + 0.1, None,
                                                         value / 2, 2.0, 0.4, 20 / value, (1, 8))))  # fmt: skip
    return Trajectory(tuple(rows))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "report.json"
    write_report(path, {"model": "m", "rows": [plain_row(row) for row in report().rows], "failed": []})
    return path


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "curve.csv"
    lines = ["step,rankme,error,note", *(f"{s}, {r},0.2,x" for s, r in zip(STEPS, RANKS, strict=True))]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with two checkpoints, a broken one and a tokenizer, and a text."""
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    place = tmp_path_factory.mktemp("models")
    letters = {letter: i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz ")}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({**letters, "<unk>": 27, "<end>": 28}, "<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>")
    for step in (0, 10, 20):
        torch.manual_seed(step)
        config = transformers.GPT2Config(n_layer=2, n_embd=12, n_head=2, vocab_size=29, n_positions=32)
        transformers.GPT2LMHeadModel(config).save_pretrained(place / "m" / f"step{step}")
    wrapped.save_pretrained(place / "m" / "step0")
    wrapped.save_pretrained(place / "m" / "step20")
    (place / "m" / "broken").mkdir()
    weights = place / "m" / "step20" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    (place / "m" / "pickled").mkdir()
    torch.save({}, place / "m" / "pickled" / "pytorch_model.bin")
    (place / "m" / "pickled" / "config.json").write_bytes((place / "m" / "step0" / "config.json").read_bytes())
    drawn = np.random.default_rng(0).integers(97, 123, (60, 20))
    (place / "text.txt").write_text("\n".join("".join(map(chr, row)) for row in drawn))
    return place


def run(*arguments: object) -> int:
    return main(["geometry", *map(str, arguments)])


def is_figure(path: Path) -> bool:
    return ElementTree.parse(path).getroot().tag.endswith("svg") and path.stat().st_size > 3000


def test_trace_and_what_follows(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["trace", folder / "m", "--text", folder / "text.txt", "--fit-range", 1, 6, "--folds", 4,
               "--revisions", "0=step0", "10=step10"]  # fmt: skip
    assert run(*command, "--out", "found.json") == 0
    shown = capsys.readouterr().out
    assert "ln_f" in shown
    assert shown.count("unit") == 6
    told = json.loads(Path("found.json").read_text())
    assert told["sequences"] == 60
    assert {row["site"] for row in told["rows"]} == {"h.0", "h.1", "ln_f"}
    assert run(*command, "--json") == 0
    assert json.loads(capsys.readouterr().out)["rows"] == told["rows"], "from the store"
    trajectory = read_trajectory(Path("found.json"))
    assert json.loads(json.dumps([plain_row(row) for row in trajectory.rows])) == told["rows"]
    assert run("phases", "found.json", "--out", "phases.svg") == 0
    assert run("show", "found.json", "--out", "layers.svg", "--kind", "layers") == 0
    assert run("show", "found.json", "--out", "run.svg", "--site", "h.0") == 0
    assert all(is_figure(Path(name)) for name in ("phases.svg", "layers.svg", "run.svg"))
    assert run(*command, "5=broken", "7=absent", "--json") == 3, "told, and the rest is there"
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [one["step"] for one in told["failed"]] == [5, 7]
    assert len(told["rows"]) == 12


def test_broken_checkpoints_do_not_stop_others_wherever_they_stand(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["trace", folder / "m", "--text", folder / "text.txt", "--fit-range", "auto", "--revisions"]
    assert run(*command, "5=absent", "20=step20", "7=broken", "9=pickled", "0=step0", "--out", "x.json") == 3
    shown = capsys.readouterr().out
    assert [line.split(":")[0] for line in shown.splitlines()[-4:]] == ["step 5", "step 7", "step 9", "step 20"]
    assert {row["step"] for row in json.loads(Path("x.json").read_text())["rows"]} == {0}
    assert run(*command, "20=step20", "9=pickled") == 3, "none can be looked at"
    assert "step 20: step20 failed: SafetensorError" in capsys.readouterr().out
    assert run("trace", folder / "m" / "step20", "--text", folder / "text.txt") == 3
    assert run(*command, "9=absent") == 2
    assert "step0" in capsys.readouterr().err, "what there is"


@pytest.mark.parametrize(("folds", "said"), [(1, "neither errors"), (2, "2 folds are rough"), (16, "")])
def test_how_sure_errors_are(
    folds: int, said: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    model = folder / "m" / "step0"
    assert run("trace", model, "--text", folder / "text.txt", "--folds", folds, "--sites", "ln_f") == 0
    shown = capsys.readouterr().out
    assert said in shown
    assert (" fold" in shown) == bool(said)


def test_show_says_what_it_drew(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("show", saved, "--out", tmp_path / "a.svg", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["sites"] == ["norm"]
    assert told["steps"] == list(STEPS)
    assert run("show", saved, "--out", tmp_path / "b.svg", "--kind", "layers") == 0
    assert "layers of h.0, norm, 11 steps" in capsys.readouterr().out
    assert is_figure(tmp_path / "a.svg")
    assert is_figure(tmp_path / "b.svg")


def test_one_model_by_its_sites(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = [
        "trace",
        folder / "m" / "step0",
        "--text",
        folder / "text.txt",
        "--sites",
        "h.1",
        "--pooling",
        "all",
        "mean",
    ]
    assert run(*command, "--n", 20, "--max-length", 10, "--skip", 1, "--json") == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["pooling"], row["n_samples"]) for row in rows] == [
        ("all", 180),
        ("all", 180),
        ("mean", 20),
        ("mean", 20),
    ]
    assert [row["alpha"] for row in rows] == [None] * 4, "12 ranks do not reach 100"
    with pytest.warns(FewSamplesWarning):
        assert run(*command, "--n", 8) == 0
    assert "fewer samples" in capsys.readouterr().out


def test_phases_of_a_table(table: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run("phases", table, "--stderr", "error", "--json", "--out", tmp_path / "p.svg") == 0
    found = json.loads(capsys.readouterr().out)["phases"]
    assert [phase["kind"] for phase in found] == ["warmup", "entropy-seeking", "compression-seeking"]
    assert [phase["start"] for phase in found] == [0, 15, 127]
    assert is_figure(tmp_path / "p.svg")
    assert run("phases", table) == 0
    assert "compression-seeking" in capsys.readouterr().out


def test_phases_of_a_report_say_what_is_undetermined(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("phases", saved, "--site", "h.0", "--frame", "unit") == 0
    assert "compression-seeking" in capsys.readouterr().out
    told = json.loads(saved.read_text())
    for row in told["rows"]:
        row["alpha"] = row["rankme"] / 20
    saved.write_text(json.dumps(told))
    assert run("phases", saved) == 0
    shown = capsys.readouterr().out
    assert "undetermined" in shown
    assert "another window" in shown


def test_bench(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    told = []

    def run_bench(*, full: bool, repeats: int) -> tuple[BenchRow, ...]:
        told.append((full, repeats))
        return (BenchRow("memory", "SVD each", "50 x 8", "float32", "MB", 2.0, 9.0, Range(4.0, 4.5, 5.0), 1e-7),)

    monkeypatch.setattr("commissure.geometry.bench.run_bench", run_bench)
    assert run("bench", "--full", "--repeats", 7) == 0
    assert "4.5 [4, 5]" in capsys.readouterr().out
    assert run("bench", "--json") == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["ratio"] == {"low": 4.0, "median": 4.5, "high": 5.0}
    assert told == [(True, 7), (False, 3)]
    assert run("bench", "--repeats", 0) == 2


def test_nan_is_null_in_a_report(tmp_path: Path) -> None:
    (row,) = (row for row in report(("norm",)).rows if row.step == 0 and row.geometry.frame == "raw")
    empty = TrajectoryRow(0, TraceRow(**{**vars(row.geometry), "rankme": math.nan, "alpha": None}))
    write_report(tmp_path / "r.json", {"rows": [plain_row(empty)]})
    assert "NaN" not in (tmp_path / "r.json").read_text()
    found = read_trajectory(tmp_path / "r.json").rows[0].geometry
    assert math.isnan(found.rankme)
    assert found.alpha is None
    assert found.alpha_window == (1, 8)


def test_columns_are_found_by_name(table: Path) -> None:
    found = read_series(table, stderr="error")
    np.testing.assert_array_equal(found.steps, STEPS)
    np.testing.assert_array_equal(found.ranks, RANKS)
    assert (found.stderr == 0.2).all()
    assert np.isnan(found.alpha).all()
    table.write_text("step,rankme,alpha\n1,2\n3,,5\n")
    gaps = read_series(table)
    np.testing.assert_array_equal(gaps.ranks, [2, np.nan])
    np.testing.assert_array_equal(gaps.alpha, [np.nan, 5])


def test_errors_and_jumps_both_count() -> None:
    series = report().series("norm")
    jumps = segment_phases(series.steps, series.ranks)
    assert phases_of(series)[0].stderr > segment_phases(series.steps, series.ranks, stderr=series.stderr)[0].stderr
    assert [phase.kind for phase in phases_of(series)] == [phase.kind for phase in jumps]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "JSON"), ("[]", "rows"), ('{"rows": []}', "rows"), ('{"rows": [1]}', r"rows\[0\]"),
        ('{"rows": [{"step": 1}]}', r"rows\[0\]"), ("\udcff", "file"),
    ],
)  # fmt: skip
def test_no_report(content: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.json"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    assert run("show", path, "--out", tmp_path / "x.svg") == 2
    assert pytest.importorskip("re").search(said, capsys.readouterr().err)


@pytest.mark.parametrize("field", ["step", "rankme", "alpha_window", "site", "n_samples"])
@pytest.mark.parametrize("value", [[], {}, True, "x", -1.5, [1], [1, True]])
def test_a_report_of_other_things(field: str, value: Any, saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = json.loads(saved.read_text())
    told["rows"][3][field] = value
    saved.write_text(json.dumps(told))
    fits = (field, value) in [("site", "x"), ("rankme", -1.5)]
    code = run("phases", saved, "--json", "--site", "h.0")
    assert code == (0 if fits else 2)
    if not fits:
        assert f"rows[3].{field}" in capsys.readouterr().err


def test_bad_input_is_named(
    folder: Path, saved: Path, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    model, text = folder / "m" / "step0", ("--text", folder / "text.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "void.csv").write_text("step,rankme\n")
    (tmp_path / "words.csv").write_text("step,rankme\n1,many\n")
    for arguments, said in (
        (("trace", model, "--text", "absent.txt"), "text"),
        (("trace", model, "--text", "latin.txt"), "UTF-8"),
        (("trace", tmp_path, *text), "model"),
        (("trace", folder / "m", *text, "--revisions", "one"), "STEP=NAME"),
        (("trace", folder / "m", *text, "--revisions", "1=a", "1=b"), "another step"),
        (("trace", model, *text, "--pooling", "median"), "pooling"),
        (("trace", model, *text, "--n", 0), "n = 0"),
        (("trace", model, *text, "--max-length", 1), "max_length"),
        (("trace", model, *text, "--folds", 2.5), "integer"),
        (("trace", model, *text, "--folds", 0), "folds = 0"),
        (("trace", model, *text, "--skip", -1), "skip = -1"),
        (("trace", model, *text, "--pooling"), "pooling = ()"),
        (("trace", model, *text, "--sites", "h.7"), "close: h.1"),
        (("trace", "absent", "--text", "absent.txt", "--fit-range", 6, 1), "1 <= first < last"),
        (("trace", model, *text, "--fit-range", "most"), "two ranks"),
        (("trace", model, *text, "--n", 1), "2 sequences"),
        (("trace", model, "--text", "blank.txt"), "text = 0"),
        (("trace", folder / "m", *text), "--revisions 0=step0"),
        (("trace", folder / "m" / "pickled", *text), "safetensors"),
        (("trace", model, *text, "--workers", -1), "workers"),
        (("trace", model, *text, "--out", "x.txt"), ".json"),
        (("trace", model, *text, "--out", "absent/x.json"), "out"),
        (("phases", "absent.csv"), "file"),
        (("phases", "void.csv"), "one row"),
        (("phases", "words.csv"), "line 2"),
        (("phases", table, "--rank", "rank"), "one of step, rankme"),
        (("phases", saved, "--site", "h.9"), "h.9"),
        (("phases", table, "--out", "x.png"), ".svg"),
        (("show", saved, "--out", "x.svg", "--pooling", "mean"), "mean"),
        (("show", saved, "--out", "x.svg", "--kind", "layers", "--pooling", "mean"), "mean"),
    ):
        assert run(*arguments) == 2, arguments
        assert said in capsys.readouterr().err, arguments
    assert not list(tmp_path.glob("x.*"))
