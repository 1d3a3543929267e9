"""Looking at a model while it trains, in any loop: the run stays the run without, bit for bit."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from commissure.core.errors import InputError
from commissure.geometry import GeometryRecorder, Trajectory, estimate, folds_of, log_steps, rankme, segment_phases

FIT = (1, 4)


def batches(n: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(16, 5, generator=generator) for _ in range(n)]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 5))


def train(model: nn.Module, recorder: GeometryRecorder | None) -> dict[str, Tensor]:
    """Twenty steps with dropout and batch statistics, both of which a careless look would change."""
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()
    model[3].eval()  # a module kept in another mode
    for step in range(20):
        if recorder is not None:
            recorder.on_step(step, model)
        optimizer.zero_grad()
        model(torch.randn(16, 5)).square().mean().backward()
        optimizer.step()
    assert [model.training, model[2].training, model[3].training] == [True, True, False]
    return model.state_dict()


class Loader:
    """Draws from the global generator whenever it is gone through, as a DataLoader does."""

    def __iter__(self) -> Any:
        torch.rand(1)
        return iter(batches())


def test_a_recorded_run_is_the_run_without() -> None:
    recorder = GeometryRecorder(Loader(), sites=["0", "3"], steps=log_steps(19, count=6), fit_range=FIT)
    recorded, plain = train(network(), recorder), train(network(), None)
    for name, value in plain.items():
        assert torch.equal(recorded[name], value), name
    assert recorder.trajectory.series("0").steps.tolist() == list(log_steps(19, count=6))


def test_rows_are_those_of_the_states() -> None:
    model = network().eval()
    recorder = GeometryRecorder(batches(), sites=["0"], steps=1, frames=["raw"], fit_range=FIT, n_folds=2)
    (row,) = recorder.on_step(7, model)
    with torch.no_grad():
        states = model[0](torch.cat(batches()))
    assert (row.step, row.geometry.n_samples) == (7, 48)
    assert row.geometry.rankme == pytest.approx(rankme(states.double()), rel=1e-5)
    series = recorder.trajectory.series("0")
    assert (series.steps.tolist(), series.ranks.tolist()) == ([7.0], [row.geometry.rankme])
    assert (series.stderr[0], series.alpha[0]) == (row.geometry.rankme_stderr, row.geometry.alpha)
    assert np.isfinite([series.stderr[0], series.alpha[0]]).all()
    expected = estimate(rankme, folds_of(states, n_folds=2)).stderr
    assert row.geometry.rankme_stderr == pytest.approx(expected, rel=1e-4)
    assert row.geometry.alpha_window == FIT


def test_a_step_is_looked_at_once_and_only_if_asked_for() -> None:
    recorder = GeometryRecorder(batches(), sites=["0"], steps=[0, 4], fit_range=FIT)
    model = network()
    looks = [len(recorder.on_step(step, model)) for step in (4, 4, 3, 0)]
    assert looks == [2, 0, 0, 2]  # two frames a look
    assert recorder.trajectory.series("0", frame="unit").steps.tolist() == [0.0, 4.0]
    assert [row.step for row in recorder.trajectory.rows] == [0, 0, 4, 4]
    backwards = Trajectory(recorder.trajectory.rows[::-1])
    assert backwards.series("0").steps.tolist() == [0.0, 4.0]
    every = GeometryRecorder(batches(), sites=["0"], steps=10, fit_range=FIT)
    assert [every.is_due(step) for step in (0, 5, 10)] == [True, False, True]


def test_a_look_that_fails_puts_the_modes_back() -> None:
    model = network().train()
    recorder = GeometryRecorder([torch.zeros(4, 9)], sites=["0"], steps=1, fit_range=FIT)
    with pytest.raises(RuntimeError):
        recorder.on_step(0, model)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())
    assert recorder.trajectory.rows == ()


@pytest.mark.parametrize("kind", ["mapping", "tuple", "tensor", "forward"])
def test_batches_are_called_as_they_are(kind: str) -> None:
    class Double(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(5, 3), nn.Tanh()  # bends: no shift or scale goes unnoticed

        def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
            assert not torch.is_grad_enabled()
            return self.outer(self.inner(x if y is None else 3 * x - y))

    x = batches(1)[0]
    given: Any = {"mapping": {"y": 4 * x, "x": 2 * x}, "tuple": (x, x), "tensor": 2 * x, "forward": x}[kind]
    forward = (lambda model, batch: model(2 * batch)) if kind == "forward" else None
    model = Double()
    recorder = GeometryRecorder([given], sites=["outer"], steps=1, fit_range=(1, 3), forward=forward, frames=["raw"])
    (row,) = recorder.on_step(0, model)
    expected = rankme(torch.tanh(model.inner(2 * x)).detach().double())
    assert row.geometry.rankme == pytest.approx(expected, rel=1e-5)


def test_a_trajectory_has_phases_and_a_table() -> None:
    recorder = GeometryRecorder(batches(), sites=["0", "1"], steps=range(6), fit_range=FIT)
    model = network()
    for step in range(6):
        with torch.no_grad():
            model[0].weight[0] *= 3.0  # one direction outgrows the others: the rank falls
        recorder.on_step(step, model)
    series = recorder.trajectory.series("0")
    phases = segment_phases(series.steps, series.ranks, stderr=series.stderr, alpha=series.alpha)
    assert [phase.kind for phase in phases] == ["warmup"]
    table = recorder.trajectory.to_frame()
    assert len(table) == 6 * 2 * 2
    assert list(table.columns[:4]) == ["step", "site", "pooling", "frame"]
    with pytest.raises(InputError, match=r"'2', 'last', 'raw'.*'0', 'last', 'raw'"):
        recorder.trajectory.series("2")


def test_log_steps_begin_at_zero_and_end_at_the_last() -> None:
    found = log_steps(5000)
    assert (found[0], found[-1]) == (0, 5000)
    assert len(found) <= 90
    assert list(found) == sorted(set(found))
    assert log_steps(1) == (0, 1)
    for bad in (0, True, 2.0):
        with pytest.raises(InputError, match="last"):
            log_steps(bad)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="count"):
        log_steps(10, count=1)


def test_bad_input_is_named() -> None:
    with pytest.raises(InputError, match="gone through again"):
        GeometryRecorder(iter(batches()), sites=["0"], steps=1)
    for steps in ([], 0, True, [-1], [0.5], "a"):
        with pytest.raises(InputError, match="steps"):
            GeometryRecorder(batches(), sites=["0"], steps=steps)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="site, pooling, frame"):
        GeometryRecorder(batches(), sites=["0"], steps=1).trajectory.series("0")


def test_the_callback_of_transformers() -> None:
    pytest.importorskip("transformers")
    recorder = GeometryRecorder(batches(), sites=["0"], steps=[0, 2], fit_range=FIT)
    callback, model = recorder.for_transformers(), network()
    for event, step in (("on_train_begin", 0), ("on_step_end", 1), ("on_step_end", 2)):
        getattr(callback, event)(None, SimpleNamespace(global_step=step), None, model=model, optimizer=None)
    assert recorder.trajectory.series("0").steps.tolist() == [0.0, 2.0]


def test_a_real_trainer_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, n_positions=6, vocab_size=11, resid_pdrop=0.1)
    tokens = torch.randint(0, 11, (64, 6), generator=torch.Generator().manual_seed(0))

    def weights(callbacks: list[Any]) -> dict[str, Tensor]:
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=5, per_device_train_batch_size=8, report_to="none", use_cpu=True,
            save_strategy="no", disable_tqdm=True, logging_strategy="no", seed=3,
        )  # fmt: skip
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(config)
        data = [{"input_ids": row, "labels": row} for row in tokens]
        transformers.Trainer(model=model, args=arguments, train_dataset=data, callbacks=callbacks).train()
        return model.state_dict()

    recorder = GeometryRecorder([{"input_ids": tokens}], sites=["lm_head:input"], steps=2, fit_range=(1, 4))
    recorded, plain = weights([recorder.for_transformers()]), weights([])
    assert recorder.trajectory.series("lm_head:input").steps.tolist() == [0.0, 2.0, 4.0]
    assert all(torch.equal(recorded[name], value) for name, value in plain.items())


@pytest.mark.filterwarnings("ignore")  # its own, of the versions it meets
def test_a_real_trainer_of_lightning(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

        def training_step(self, batch: Tensor, _: int) -> Tensor:
            return self(batch).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def weights(callbacks: list[Any]) -> dict[str, Tensor]:
        model = Module()
        torch.manual_seed(2)
        trainer = lightning.Trainer(
            max_steps=5, callbacks=callbacks, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, accelerator="cpu", default_root_dir=str(tmp_path),
        )  # fmt: skip
        trainer.fit(model, torch.utils.data.DataLoader(torch.cat(batches(9)), batch_size=16))
        return model.state_dict()

    recorder = GeometryRecorder(batches(), sites=["inner.0"], steps=2, fit_range=FIT)
    recorded, plain = weights([recorder.for_lightning()]), weights([])
    assert recorder.trajectory.series("inner.0").steps.tolist() == [0.0, 2.0, 4.0]
    assert all(torch.equal(recorded[name], value) for name, value in plain.items())
