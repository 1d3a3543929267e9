"""A killed run goes on bit for bit; another run's checkpoint, or a damaged one, is refused."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from commissure.core.errors import InputError
from commissure.core.files import read_tensors
from commissure.train import Checkpoint, TrainConfig, train

SCRIPT = str(Path(__file__).with_name("run.py"))


def command(*arguments: object) -> list[str]:
    return [sys.executable, SCRIPT, "single", *map(str, arguments)]


def test_a_killed_process_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """With dropout, so that the generator's state counts; killed at step 24, the last checkpoint is that of step 21."""
    subprocess.run(command(tmp_path / "whole.dropout", tmp_path / "unused"), check=True, timeout=120)
    checkpoint = tmp_path / "checkpoint"
    process = subprocess.Popen(command(tmp_path / "never.dropout", checkpoint, 24), stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        process.kill()
    assert process.returncode == -9
    subprocess.run(command(tmp_path / "resumed.dropout", checkpoint), check=True, timeout=120)
    expected, found = load_file(tmp_path / "whole.dropout"), load_file(tmp_path / "resumed.dropout")
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint", "resumed.dropout", "unused", "whole.dropout",
    ]  # fmt: skip


def fit(
    path: Path, *, stop: int | None = None, seed: int = 0, key: str = "", wide: bool = False, **config: object
) -> tuple[nn.Module, list[int], object]:
    """Early stopping on scripted scores; `stop` leaves the run after that step."""
    torch_module = nn.Linear(1, 2 if wide else 1, bias=False)
    nn.init.ones_(torch_module.weight)
    steps: list[int] = []

    def progress(step: int, n_steps: int, loss: float) -> None:
        steps.append(step)
        if step == stop:
            raise KeyboardInterrupt

    def validate() -> float:
        return -abs(len(steps) + first - 20)  # best at step 20

    first = 0
    if path.exists() and stop is None:
        first = len(load_file(path)["losses"])
    settings = {"steps": 100, "validate_every": 5, "patience": 3, **config}
    try:
        result = train(
            torch_module, lambda s: None, loss=lambda b: torch_module.weight.square().sum(), validate=validate,
            config=TrainConfig(**settings), seed=seed, progress=progress, checkpoint=Checkpoint(path, 10, key),
        )  # fmt: skip
    except KeyboardInterrupt:
        result = None
    return torch_module, steps, result


@pytest.mark.parametrize("stop", [13, 27, 33])
def test_early_stop_and_best_weights_survive(stop: int, tmp_path: Path) -> None:
    expected, _, whole = fit(tmp_path / "whole")
    fit(tmp_path / "cut", stop=stop)
    found, steps, resumed = fit(tmp_path / "cut")
    assert resumed == whole
    assert torch.equal(found.weight, expected.weight)  # type: ignore[arg-type]
    assert steps == list(range(stop // 10 * 10 + 1, 36)), "nothing is done twice"


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    expected, _, whole = fit(tmp_path / "run", steps=20)
    found, steps, again = fit(tmp_path / "run", steps=20)
    assert (again, steps) == (whole, [])
    assert torch.equal(found.weight, expected.weight)  # type: ignore[arg-type]


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    fit(tmp_path / "run", steps=20)
    for other in ({"seed": 1}, {"lr": 1.0}, {"key": "other data"}):
        with pytest.raises(InputError, match="same configuration and seed"):
            fit(tmp_path / "run", **{"steps": 20, **other})  # type: ignore[arg-type]
    with pytest.raises(InputError, match="weights of this Linear"):
        fit(tmp_path / "run", steps=20, wide=True)
    (tmp_path / "run").write_bytes(b"damaged")
    with pytest.raises(InputError, match="safetensors"):
        fit(tmp_path / "run", stop=5)
    with pytest.raises(InputError, match="existing folder"):
        fit(tmp_path / "missing" / "run", steps=20)


@pytest.mark.parametrize("missing", ["rng.cpu", "losses", "scores"])
def test_a_checkpoint_without_its_parts_is_refused(missing: str, tmp_path: Path) -> None:
    path = tmp_path / "run"
    fit(path, steps=20)
    rewrite(path, lambda tensors: tensors.pop(missing))
    with pytest.raises(InputError, match=rf"checkpoint\['{missing}'\] = 'missing'"):
        fit(path, stop=5, steps=20)


@pytest.mark.parametrize("part", ["model.weight", "best.weight", "exp_avg.weight"])
def test_a_checkpoint_with_weights_that_are_not_finite_is_refused(part: str, tmp_path: Path) -> None:
    path = tmp_path / "run"
    fit(path, steps=20)
    rewrite(path, lambda tensors: tensors[part].fill_(float("nan")))
    with pytest.raises(InputError, match="not finite"):
        fit(path, stop=5, steps=20)


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """The same file with its tensors changed."""
    metadata, tensors = read_tensors(path)
    change(tensors)
    save_file(tensors, path, metadata=metadata)


@pytest.mark.parametrize("every", [0, -3])
def test_a_checkpoint_every_no_steps_is_refused(every: int, tmp_path: Path) -> None:
    module = nn.Linear(1, 1)
    with pytest.raises(InputError, match=rf"checkpoint\.every = {every}"):
        train(
            module, lambda s: None, loss=lambda b: module.weight.sum(), config=TrainConfig(steps=2), seed=0,
            checkpoint=Checkpoint(tmp_path / "run", every),
        )  # fmt: skip
