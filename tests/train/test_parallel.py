"""DDP and FSDP2 on two gloo processes give the single process's losses, weights and checkpoints."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from commissure.core.errors import InputError
from commissure.train import Processes, joined

SCRIPT = str(Path(__file__).with_name("run.py"))
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0")


def start(strategy: str, *arguments: object) -> None:
    launcher = () if strategy == "single" else TORCHRUN
    command = [sys.executable, *launcher, SCRIPT, strategy, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("single")
    start("single", folder / "result", folder / "checkpoint")
    return folder


def same(found: Path, expected: Path) -> None:
    first, second = load_file(found), load_file(expected)
    assert first.keys() == second.keys()
    for key, tensor in second.items():
        torch.testing.assert_close(first[key], tensor, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_give_the_single_process_s_run(strategy: str, single: Path, tmp_path: Path) -> None:
    """Stopped on the way and taken up again, by as many processes and by one; the checkpoints are the same too."""
    checkpoint = tmp_path / "checkpoint"
    start(strategy, tmp_path / "result", checkpoint, 24)
    same(tmp_path / "result", single / "result")
    same(checkpoint, single / "checkpoint")
    stopped = tmp_path / "checkpoint.stopped"
    assert len(load_file(stopped)["losses"]) == 21
    start("single", tmp_path / "resumed", stopped)
    same(tmp_path / "resumed", single / "result")


def test_rows_cover_the_batch_once() -> None:
    for size in (1, 2, 3, 7):
        rows = [i for rank in range(size) for i in range(11)[Processes("ddp", rank, size).rows(11)]]
        assert rows == list(range(11))


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(InputError, match="torchrun"), joined("ddp"):
        pass
    with pytest.raises(InputError, match="'single', 'ddp' or 'fsdp'"), joined("pipeline"):  # type: ignore[arg-type]
        pass
    with joined("single") as processes:
        assert processes == Processes()
