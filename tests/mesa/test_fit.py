"""Training on tasks: every task trains with any mixer, repeats itself, is saved, resumes, and two processes agree."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from commissure.core.errors import InputError
from commissure.core.rng import spawn
from commissure.mesa.fit import Evaluation, FitConfig, _Source, evaluate, fit
from commissure.mesa.model import ModelConfig, TaskModel
from commissure.mesa.tasks import MQAR, LinearSystem, RegBench, Regression, Task, TaskBatch, task
from commissure.nn import GRU, Stack
from commissure.nn.decay import exempted
from commissure.train import Checkpoint, Processes

EASY = MQAR(n_pairs=2, length=12, vocab=12)
QUICK = FitConfig(steps=6, batch_size=4, validate_every=3, test_size=16)
TINY = ModelConfig(dim=8, heads=1, head_dim=4)
TASKS = [
    EASY,
    task("compression", length=8),
    task("regbench", length=40, n_train=20, n_test=10),
    Regression(dim=3, n_pairs=4),
    LinearSystem(dim=4, length=8),
]


def by_name(source: Any) -> str:
    return source.name


@pytest.mark.parametrize("source", TASKS, ids=by_name)
def test_every_kind_of_task_trains_repeats_itself_and_is_saved(source: Task, tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    first = fit(source, ["gru", "gated_linear"], model=TINY, config=QUICK, seed=3)
    again = fit(source, ["gru", "gated_linear"], model=TINY, config=QUICK, seed=3)
    other = fit(source, ["gru", "gated_linear"], model=TINY, config=QUICK, seed=4)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert (first.losses, first.evaluations, first.final) == (again.losses, again.evaluations, again.final)
    assert first.losses != other.losses
    assert [step for step, _ in first.evaluations] == [3, 6]
    assert first.evaluations[-1][1] == pytest.approx(first.final.value)
    assert not first.model.training
    first.model.save(tmp_path / "model")
    loaded = TaskModel.load(tmp_path / "model")
    assert loaded.task == source
    assert evaluate(loaded, source, seed=spawn(3, "test"), n_sequences=16) == first.final


def test_attention_learns_to_recall() -> None:
    """Far above the chance of one in two values shown."""
    config = FitConfig(steps=300, lr=5e-3, validate_every=300)
    result = fit(EASY, "attention", model=ModelConfig(dim=32), config=config, seed=0)
    assert result.final.value > 0.9
    assert result.final.nats is not None
    assert result.final.nats < 0.5
    unasked = [value for t, value in enumerate(result.final.by_position) if t < 4 or t % 2]
    assert unasked == [None] * len(unasked)
    assert result.final.n_scored == 2 * 256


def test_a_token_model_is_a_stack(tmp_path: Path) -> None:
    result = fit(EASY, "gru", model=TINY, config=QUICK)
    result.model.save(tmp_path / "model")
    stack = Stack.load(tmp_path / "model")
    tokens = EASY.batch(0, 3).inputs
    torch.testing.assert_close(stack(tokens)[0], result.model(tokens), rtol=0, atol=0)


def test_the_small_recall_model_has_the_published_parts() -> None:
    """Two mixers and three norms of width 64, an embedding and a head: no MLP, no positions without attention."""
    model = TaskModel(MQAR(vocab=128), ["gated_linear"])
    mixer = sum(p.numel() for p in model.body.blocks[0].mixer.parameters())
    assert sum(p.numel() for p in model.parameters()) == 2 * mixer + 3 * 64 + 2 * 128 * 64
    assert TaskModel(MQAR(), ["gated_linear", "attention"]).body.config.positions == "rotary"
    assert model.body.config.positions == "none"


def test_a_mesanet_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The published layout with the task's vocabulary, here of a size that a test can hold."""
    config = pytest.importorskip("commissure.mesa.config")

    def from_preset(name: str, *, hybrid: Any = None) -> Any:
        assert name == "140m"
        return config.MesaNetConfig(dim=8, blocks=2, heads=1, head_dim=4, hybrid=hybrid)

    monkeypatch.setattr(config.MesaNetConfig, "from_preset", from_preset)
    result = fit(EASY, "hawk-mesanet-140m", config=QUICK)
    assert [type(block.mixer).__name__ for block in result.model.body.blocks] == ["RGLRU", "MesaLayer"]
    assert result.model.body.config.soft_cap == 30
    result.model.save(tmp_path / "model")
    tokens = EASY.batch(0, 3).inputs
    torch.testing.assert_close(TaskModel.load(tmp_path / "model")(tokens), result.model(tokens), rtol=0, atol=0)
    for source, name in ((EASY, "big-mesanet-140m"), (LinearSystem(), "mesanet-140m")):
        with pytest.raises(InputError, match="mixers"):
            TaskModel(source, [name])
    with pytest.raises(InputError, match="default sizes"):
        TaskModel(EASY, ["mesanet-140m"], config=TINY)


def test_a_mixer_alone_is_only_that(tmp_path: Path) -> None:
    source = LinearSystem(dim=4, length=8)
    alone = TINY.model_copy(update={"alone": True})
    result = fit(source, lambda dim: GRU(dim), model=alone, config=QUICK)
    x = source.batch(0, 2).inputs
    torch.testing.assert_close(result.model(x), result.model.body(x)[0], rtol=0, atol=0)
    assert isinstance(result.model.body, GRU)
    result.model.save(tmp_path / "model")
    with pytest.raises(InputError, match="mixer = None"):
        TaskModel.load(tmp_path / "model")
    loaded = TaskModel.load(tmp_path / "model", mixer=GRU)
    torch.testing.assert_close(loaded(x), result.model(x), rtol=0, atol=0)


class Known(nn.Module):
    """A model that answers with a given function of the inputs."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer, self.weight = answer, nn.Parameter(torch.zeros(()))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.answer(inputs)


def test_evaluation_of_a_known_model() -> None:
    """Half of the probability on token 0: accuracy, nats and positions computed by hand."""
    source = task("memorization", vocab=5, length=4)

    def answer(inputs: Tensor) -> Tensor:
        return torch.tensor([0.2, 0.1, 0.4, 0.2, 0.1]).log().expand(*inputs.shape, 5)

    found = evaluate(Known(answer), source, seed=1, n_sequences=100)
    targets = source.batch(1, 100, split="test").targets[:, 1::2]
    share = float((targets == 2).double().mean())
    assert 0 < share < 1
    assert found.value == pytest.approx(share)
    assert found.by_position[::2] == (None, None)
    assert found.by_position[1] == pytest.approx(float((targets[:, 0] == 2).double().mean()))
    assert found.nats == pytest.approx(-share * math.log(0.4) - (1 - share) * math.log(0.2), rel=1e-5)
    lds = LinearSystem(dim=2, length=5)
    targets = lds.batch(1, 70, split="test").targets
    zero = evaluate(Known(torch.zeros_like), lds, seed=1, n_sequences=70)
    assert zero.metric == "mse"
    assert zero.value == pytest.approx(float(targets.square().mean()), rel=1e-5)
    assert zero.by_position == pytest.approx(targets.square().mean((0, 2)).tolist(), rel=1e-5)


def test_regbench_is_measured_against_its_automata() -> None:
    source = RegBench(length=60, n_train=20, n_test=10)
    truth = source.distributions(2, 10, split="test")

    def noisy(share: float) -> Evaluation:
        mixed = (1 - share) * truth + share / source.vocab
        return evaluate(Known(lambda inputs: mixed.clamp(min=1e-30).log()), source, seed=2, n_sequences=10)

    perfect, mixed = noisy(0.0), noisy(0.5)
    assert (perfect.value, mixed.value) == (1.0, 1.0), "any of the equally probable symbols is right"
    assert perfect.total_variation == pytest.approx(0, abs=1e-6)
    batch = source.batch(2, 10, split="test")
    allowed = (truth > 0).sum(-1)[batch.mask].double()
    share = (0.5 / allowed + 0.5 / 20) / (0.5 + 0.5 * 18 / 20)  # of an allowed symbol, among the 18
    assert mixed.total_variation == pytest.approx(float((1 - allowed * share).mean()), rel=1e-5)
    wrong = evaluate(Known(lambda inputs: (1 - truth.sign()).clamp(min=1e-9).log()), source, seed=2, n_sequences=10)
    assert wrong.value == 0


@pytest.mark.parametrize("ends", [0.04, 0.9])
def test_the_true_automaton_is_not_charged_for_the_separator(ends: float) -> None:
    """Strings of unknown length: the perfect predictor leaves some probability, or most, for their end."""
    source = RegBench(length=60, n_train=20, n_test=10)
    truth = source.distributions(2, 10, split="test")
    ending = torch.zeros(source.vocab)
    ending[source.n_symbols] = ends
    exact = ((1 - ends) * truth + ending).clamp(min=1e-30).log()
    found = evaluate(Known(lambda inputs: exact), source, seed=2, n_sequences=10)
    assert found.value == 1
    assert found.total_variation == pytest.approx(0, abs=1e-6)


def test_a_training_set_is_gone_through_in_epochs() -> None:
    config = FitConfig(batch_size=4, examples=10)
    source = _Source(EASY, config, 0, Processes(), "cpu")
    rows = torch.cat([source.draw(step).batch.inputs for step in range(10)])
    every = EASY.batch(spawn(0, "examples"), 10).inputs
    for epoch in range(4):
        seen = rows[10 * epoch : 10 * (epoch + 1)]
        assert sorted(seen.tolist()) == sorted(every.tolist())
    assert rows[:10].tolist() != rows[10:20].tolist()


def test_shares_sum_to_the_whole_batch() -> None:
    config = FitConfig(batch_size=5)
    source = task("noisy_recall", length=20)
    whole = _Source(source, config, 0, Processes(), "cpu").draw(2)
    shares = [_Source(source, config, 0, Processes("ddp", rank, 2), "cpu").draw(2) for rank in range(2)]
    for part, both in zip(whole.batch, zip(*(share.batch for share in shares), strict=True), strict=True):
        assert torch.equal(part, torch.cat(both))
    assert sum(share.scale for share in shares) / 2 == pytest.approx(2 / int(whole.batch.mask.sum()))


def test_what_decays() -> None:
    model = fit(EASY, ["gated_linear", "gru"], model=ModelConfig(dim=8, mlp="gelu"), config=QUICK).model
    marked = exempted(model)
    kept = {name.rpartition(".")[2] for name in marked}
    decayed = {name.rpartition(".")[2] for name, _ in model.named_parameters() if name not in marked}
    assert {"embedding", "bias", "bias_ih_l0"} <= kept
    assert {"head", "weight", "weight_hh_l0"} <= decayed
    assert all(p.ndim > 1 for name, p in model.named_parameters() if name not in marked)


def test_a_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    whole = fit(EASY, "gru", model=TINY, config=QUICK)

    def stop(step: int, steps: int, loss: float) -> None:
        if step == 5:
            raise KeyboardInterrupt

    checkpoint = Checkpoint(tmp_path / "run", every=2)
    with pytest.raises(KeyboardInterrupt):
        fit(EASY, "gru", model=TINY, config=QUICK, checkpoint=checkpoint, progress=stop)
    with pytest.raises(InputError, match="same configuration"):
        fit(MQAR(n_pairs=1, length=12, vocab=12), "gru", model=TINY, config=QUICK, checkpoint=checkpoint)
    resumed = fit(EASY, "gru", model=TINY, config=QUICK, checkpoint=checkpoint)
    assert resumed.losses == whole.losses
    assert resumed.evaluations == whole.evaluations
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], weight), name


def test_another_factory_does_not_take_up_a_run_unseen(tmp_path: Path) -> None:
    """Factories have no name that a checkpoint could compare: its key has to tell them apart."""
    path = tmp_path / "run"
    with pytest.raises(InputError, match=r"checkpoint\.key = ''"):
        fit(EASY, ["gru", GRU], model=TINY, config=QUICK, checkpoint=Checkpoint(path))
    fit(EASY, GRU, model=TINY, config=QUICK, checkpoint=Checkpoint(path, key="one"))
    with pytest.raises(InputError, match="same configuration"):
        fit(EASY, GRU, model=TINY, config=QUICK, checkpoint=Checkpoint(path, key="other"))


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="alone = True"):
        TaskModel(EASY, ["gru"], config=ModelConfig(alone=True))
    with pytest.raises(InputError, match="one mixer"):
        TaskModel(LinearSystem(), ["gru", "s4d"], config=ModelConfig(alone=True))
    with pytest.raises(InputError, match="mixers = 'gru'"):
        TaskModel(EASY, "gru")
    with pytest.raises(InputError, match="batch_size = 1"):
        fit(EASY, "gru", config=FitConfig(batch_size=1), processes=Processes("ddp", 0, 2))
    with pytest.raises(InputError, match=r"FitConfig\.keep"):
        FitConfig(keep="best")  # type: ignore[arg-type]
    Stack(["gru"], 4, vocab=3).save(tmp_path / "stack")
    (tmp_path / "text").write_text("no model")
    for path, message in (("stack", "mesa fit"), ("text", "safetensors"), ("missing", "existing file")):
        with pytest.raises(InputError, match=message):
            TaskModel.load(tmp_path / path)
    assert not any(TaskModel.is_saved(tmp_path / name) for name in ("stack", "missing"))


def torchrun(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    """A command in two processes; torchrun's own code is 1 where one of them fails."""
    launcher = ("torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0")
    command = [sys.executable, "-m", *launcher, "-m", "commissure.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == code, done.stderr[-3000:]
    return done


@pytest.mark.parametrize(
    ("option", "value", "said"), [("--steps", "2.5", "not an integer"), ("--set", "batch_size=1", "at least one row")]
)
def test_torchrun_says_once_what_is_wrong(option: str, value: str, said: str, tmp_path: Path) -> None:
    """Before the processes have joined, and after."""
    done = torchrun("mesa", "fit", option, value, "--parallel", "ddp", "--out", str(tmp_path / "model"), code=1)
    assert done.stderr.count(said) == 1
    assert re.search(r"Root Cause[^$]*exitcode +: 2 ", done.stderr), "as for any other bad input"


def test_sharded_blocks_return_nothing_that_loses_its_hooks(tmp_path: Path) -> None:
    """FSDP warns where a block or a model returns a view of something else."""
    done = torchrun(
        "mesa", "fit", "--task", "regression", "--size", "dim=3", "n_pairs=4", "--mixer", "gated_linear",
        "--steps", "1", "--set", "batch_size=2", "test_size=2", "dim=8", "heads=1", "head_dim=4", "mlp=gelu",
        "--parallel", "fsdp", "--out", str(tmp_path / "model"),
    )  # fmt: skip
    assert "Warning" not in done.stderr


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_torchrun_gives_the_single_process_s_model(strategy: str, tmp_path: Path) -> None:
    arguments = [
        "mesa", "fit", "--task", "mqar", "--size", "n_pairs=2", "length=12", "vocab=12", "--mixer",
        "attention,gated_linear", "--steps", "8", "--set", "batch_size=5", "dim=8", "heads=1", "head_dim=4",
        "weight_decay=0.1", "--checkpoint-every", "3",
    ]  # fmt: skip
    done = torchrun(*arguments, "--parallel", strategy, "--out", str(tmp_path / "two"))
    assert done.stdout.count("accuracy") == 1, "one process reports"
    config = FitConfig(steps=8, batch_size=5, weight_decay=0.1)
    one = fit(EASY, ["attention", "gated_linear"], model=ModelConfig(dim=8, heads=1, head_dim=4), config=config)
    two = TaskModel.load(tmp_path / "two")
    for name, weight in one.model.state_dict().items():
        torch.testing.assert_close(two.state_dict()[name], weight, rtol=1e-4, atol=2e-5)
    batch: TaskBatch = EASY.batch(9, 64)
    torch.testing.assert_close(two(batch.inputs), one.model(batch.inputs), rtol=1e-4, atol=1e-4)
