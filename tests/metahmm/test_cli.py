"""`commissure metahmm` as a user types it, on the environment of 16 tasks."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from commissure.cli import main
from commissure.core.errors import InputError
from commissure.metahmm import BayesOracle, MetaHMM, Setting, Trained, evaluate_divergence
from commissure.metahmm.fit import FitConfig, fit, implicit_stack
from commissure.metahmm.show import ambiguity, facts
from commissure.nn import GRU, Stack

TINY = ["--preset", "tiny", "--seed", "3", "--mixer", "gru", "--set", "batch_size=4", "length=6"]


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["metahmm", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out, parse_constant=pytest.fail)  # NaN and Infinity are not JSON


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("metahmm") / "run"
    assert main(["metahmm", "fit", *TINY, "--steps", "3", "--held-out-pairs", "1", "--out", str(folder)]) == 0
    return folder


def test_fit_writes_a_predictor_with_its_environment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(capsys, "fit", *TINY, "--steps", 5, "--checkpoint-every", 2, "--out", tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["model.safetensors"], "no checkpoint is left"
    assert (found["steps"], found["tasks"]) == (5, {"train": 14, "val": 2, "ood": 0})
    loaded = Trained.load(tmp_path / "run" / "model.safetensors")
    assert sum(p.numel() for p in loaded.model.parameters()) == found["parameters"]
    assert loaded.env.digest == MetaHMM.from_preset("tiny", seed=3).digest
    assert [len(part) for part in loaded.split[:3]] == [14, 2, 0]
    assert not loaded.model.training
    again = run(capsys, "fit", *TINY, "--steps", 5, "--out", tmp_path / "again")
    assert again["loss"] == found["loss"]
    config = FitConfig(steps=5, batch_size=4, length=6)
    model = implicit_stack("cpu", vocab=6, mixer="gru", seed=3)
    losses = fit(model, loaded.env, tasks=loaded.split.train, config=config, seed=3).losses
    assert found["loss"] == pytest.approx(sum(losses) / 5)


def test_only_training_tasks_are_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    sample = MetaHMM.sample

    def watched(self: MetaHMM, task_ids: Any, *arguments: Any, **options: Any) -> Any:
        seen.append(torch.as_tensor(task_ids))
        return sample(self, task_ids, *arguments, **options)

    monkeypatch.setattr(MetaHMM, "sample", watched)
    out = tmp_path / "run"
    arguments = ["metahmm", "fit", *TINY, "--steps", "30", "--val", "5", "--held-out-pairs", "1", "--out", str(out)]
    assert main(arguments) == 0
    train = Trained.load(out / "model.safetensors").split.train
    assert torch.cat(seen).unique().tolist() == train.tolist()
    assert len(train) < 11


def test_eval_measures_every_group_against_all_tasks(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(capsys, "eval", trained, "--sequences", 20, "--length", 5)
    assert list(found) == ["train", "val", "ood"]
    loaded = Trained.load(trained / "model.safetensors")
    for group, ids in zip(found, loaded.split[:3], strict=True):
        tables = found[group]
        assert [row["position"] for row in tables["by_position"]] == [0, 1, 2, 3, 4, 5]
        assert tables["by_position"][0]["task_entropy"] == pytest.approx(math.log(16))
        assert tables["by_position"][-1]["nll"] is None, "no token follows the last"
        assert sum(row["n"] for row in tables["by_entropy"]) == tables["overall"]["n"] == 20 * 6
        first = tables["by_position"][0]["divergence"]
        expected = evaluate_divergence(
            loaded.model, loaded.env.sample(ids[:1], 1, seed=0).tokens, oracle=BayesOracle(loaded.env)
        )
        assert first == pytest.approx(expected.by_position[0].divergence.estimate), "the prior needs no sequence"
    one = run(capsys, "eval", trained / "model.safetensors", "--tasks", "val", "--sequences", 20, "--length", 5)
    assert one == {"val": found["val"]}


def test_eval_draws_from_the_group_only(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[list[int]] = []
    sample = MetaHMM.sample

    def watched(self: MetaHMM, task_ids: Any, *arguments: Any, **options: Any) -> Any:
        seen.append(torch.as_tensor(task_ids).unique().tolist())
        return sample(self, task_ids, *arguments, **options)

    monkeypatch.setattr(MetaHMM, "sample", watched)
    run(capsys, "eval", trained, "--sequences", 200)
    assert seen == [part.tolist() for part in Trained.load(trained / "model.safetensors").split[:3]]


def test_eval_in_words(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["metahmm", "eval", str(trained), "--sequences", "10", "--tasks", "train", "val"]) == 0
    shown = capsys.readouterr().out
    for text in ("train tasks, 10 sequences", "val tasks", "tokens seen", "task entropy", "1.5 to 2", "all "):
        assert text in shown
    assert "ood" not in shown
    assert "nan" not in shown


def test_show_counts_and_draws(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain, full = tmp_path / "environment.svg", tmp_path / "divergence.svg"
    found = run(capsys, "show", "--preset", "tiny", "--seed", 3, "--length", 4, "--out", plain)
    env = MetaHMM.from_preset("tiny", seed=3)
    assert (found["n_tasks"], found["digest"]) == (16, env.digest)
    assert math.prod(size for _, size in found["factors"]) == 16
    assert found["successors"] == pytest.approx(int((env.transitions > 0).sum()) / (4 * 4))
    assert 1 <= found["tokens_per_state"] <= 4, "edges, not noise"
    entropy = [row["mean"] for row in found["task_entropy"]]
    assert len(entropy) == 5
    assert entropy[0] == pytest.approx(math.log(16))
    assert entropy[0] > entropy[1] > entropy[4] > 0
    own = run(capsys, "show", trained, "--sequences", 5, "--out", full)
    assert own["digest"] == found["digest"]
    assert len(own["task_entropy"]) == 7, "the length it was trained on"
    assert "<svg" in plain.read_text()
    assert len(full.read_text()) > 2 * len(plain.read_text())
    capsys.readouterr()
    assert main(["metahmm", "show", "--preset", "tiny", "--variant", "reference"]) == 0
    assert "family_0_group 2" in capsys.readouterr().out


def test_bench_prints_both_tables(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--preset", "tiny", "--length", "5", "--repeats", "1"]
    tables = run(capsys, "bench", *options)
    assert tables["oracle"][0]["contender"] == "oracle"
    assert tables["oracle"][0]["gain"] == {"low": 1.0, "median": 1.0, "high": 1.0}
    assert tables["sampler"][0]["contender"] == "vectorized"
    assert main(["metahmm", "bench", *options]) == 0
    shown = capsys.readouterr().out
    assert "associative scan" in shown
    assert "bisections" in shown


def test_a_killed_fit_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Killed by SIGKILL as soon as there is a checkpoint; the second run ends as if nothing had happened."""
    arguments, out = ["fit", *TINY, "--steps", "100", "--checkpoint-every", "5"], tmp_path / "run"
    command = [sys.executable, "-m", "commissure.cli", "metahmm", *arguments, "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (out / "training.safetensors").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "killed before it was done"
    assert main(["metahmm", "eval", str(out)]) == 2, "there is no model yet"
    resumed = run(capsys, *arguments, "--out", out)
    whole = run(capsys, *arguments, "--out", tmp_path / "whole")
    assert resumed["loss"] == whole["loss"]
    expected, found = load_file(tmp_path / "whole" / "model.safetensors"), load_file(out / "model.safetensors")
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_another_environment_s_checkpoint_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "run"
    arguments = ["metahmm", "fit", *TINY, "--steps", "4", "--checkpoint-every", "2", "--out", str(out)]
    with monkeypatch.context() as patch:
        patch.setattr(Trained, "save", interrupted)
        assert main(arguments) == 130
    assert "is kept" in capsys.readouterr().err
    assert main([*arguments, "--val", "3"]) == 2
    assert "training.safetensors" in capsys.readouterr().err
    assert main(arguments) == 0


def test_a_model_is_refused_where_its_environment_is_drawn_differently(tmp_path: Path) -> None:
    setting = Setting.from_preset("tiny", seed=0)
    path = tmp_path / "model"
    Trained(Stack(["gru"], 4, vocab=6), setting, setting.environment()).save(path)
    assert Trained.load(path).setting == setting
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(load_file(path), path, metadata={**metadata, "digest": "0" * 64})
    with pytest.raises(InputError, match="000000000000"):
        Trained.load(path)
    assert Stack.load(path).config.vocab == 6


def test_only_what_can_be_loaded_is_saved(tmp_path: Path) -> None:
    setting, other = Setting.from_preset("tiny", seed=0), Setting.from_preset("tiny", seed=1)
    env = setting.environment()
    for model, given, named in (
        (Stack(["gru"], 4, vocab=7), setting, "vocab"),
        (Stack([lambda dim: GRU(dim)], 4, vocab=6), setting, "mixers are named"),
        (torch.nn.Linear(2, 2), setting, "model"),
        (Stack(["gru"], 4, vocab=6), other, "setting"),
    ):
        with pytest.raises(InputError, match=named):
            Trained(model, given, env).save(tmp_path / "model")  # type: ignore[arg-type]
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["fit", "--out", "missing/x"], "out"),
        (["fit", "--out", "{folder}/file"], "out"),
        (["fit", "--out", "{folder}/x", "--preset", "large"], "e64"),
        (["fit", "--out", "{folder}/x", "--mixer", "lstm"], "mixer"),
        (["fit", "--out", "{folder}/x", "--size", "3m"], "6.3m"),
        (["fit", "--out", "{folder}/x", "--steps", "0"], "steps"),
        (["fit", "--out", "{folder}/x", "--steps", "2.5"], "not an integer"),
        (["fit", "--out", "{folder}/x", "--val", "64"], "n_val"),
        (["fit", "--out", "{folder}/x", "--held-out-pairs", "-1"], "n_held_out_pairs"),
        (["fit", "--out", "{folder}/x", "--seed", "-1"], "seed"),
        (["fit", "--out", "{folder}/x", "--variant", "fixed"], "variant"),
        (["fit", "--out", "{folder}/x", "--recipe", "gpu"], "paper"),
        (["fit", "--out", "{folder}/x", "--set", "rate=3"], "batch_size"),
        (["fit", "--out", "{folder}/x", "--set", "lr"], "NAME=VALUE"),
        (["fit", "--out", "{folder}/x", "--set", "lr=-1"], "lr"),
        (["fit", "--out", "{folder}/x", "--checkpoint-every", "0"], "checkpoint_every"),
        (["fit", "--out", "{folder}/x", "--device", "abacus"], "device"),
        (["eval", "missing"], "path"),
        (["eval", "{folder}/file"], "path"),
        (["eval", "{folder}/stack"], "metahmm fit"),
        (["eval", "{model}", "--tasks", "test"], "tasks"),
        (["eval", "{model}", "--sequences", "0"], "sequences"),
        (["eval", "{model}", "--sequences", "1.9"], "not an integer"),
        (["eval", "{model}", "--length", "0"], "length"),
        (["eval", "{model}", "--prune", "-1"], "prune"),
        (["show"], "preset"),
        (["show", "{model}", "--preset", "tiny"], "one of the two"),
        (["show", "--preset", "large"], "e64"),
        (["show", "--preset", "tiny", "--length", "0"], "length"),
        (["show", "--preset", "tiny", "--sequences", "0"], "sequences"),
        (["show", "{model}", "--out", "missing/x.svg"], "out"),
        (["show", "{model}", "--out", "{folder}/x.png"], "x.svg"),
        (["bench", "--preset", "large"], "e64"),
        (["bench", "--preset", "tiny", "--repeats", "0"], "repeats"),
        (["bench", "--preset", "tiny", "--length", "0"], "length"),
    ],
)
def test_bad_input_exits_2_and_names_it(
    arguments: list[str], named: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("no model")
    Stack(["gru"], 4, vocab=6).save(tmp_path / "stack")
    filled = [a.format(model=trained, folder=tmp_path) for a in arguments]
    capsys.readouterr()
    assert main(["metahmm", *filled]) == 2
    captured = capsys.readouterr()
    assert named in captured.err
    assert captured.out == ""
    assert not (tmp_path / "x").exists(), "no folder before an error"


def test_a_group_without_tasks_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["metahmm", "fit", *TINY, "--steps", "1", "--out", str(tmp_path / "run")]) == 0
    assert main(["metahmm", "eval", str(tmp_path / "run"), "--tasks", "train", "ood"]) == 2
    assert "--held-out-pairs" in capsys.readouterr().err


def test_a_setting_is_its_environment_and_its_split() -> None:
    options: dict[str, Any] = {"seed": 5, "variant": "reference"}
    setting = Setting.from_preset("tiny", **options, n_val=4, n_held_out_pairs=1)
    env = MetaHMM.from_preset("tiny", **options)
    assert setting.environment().digest == env.digest
    found, want = setting.split(env), env.split(4, seed=5, n_held_out_pairs=1)
    assert all(torch.equal(a, b) for a, b in zip(found[:3], want[:3], strict=True))
    assert found.held_out == want.held_out


def test_entropies_are_the_rows_and_the_doubt_has_quartiles() -> None:
    env = MetaHMM.from_preset("e64", seed=3)
    found = facts(env)
    for rows, entropy in ((env.transitions, found.transition_entropy), (env.emissions, found.emission_entropy)):
        every = [sum(-p * math.log(p) for p in row if p > 0) for row in rows.flatten(0, 1).tolist()]
        assert entropy == pytest.approx(sum(every) / len(every))
    doubt = ambiguity(env, n_sequences=200, length=6, seed=1)
    assert [row.position for row in doubt] == list(range(7))
    assert all(row.low < row.mean < row.high for row in doubt[2:5])
