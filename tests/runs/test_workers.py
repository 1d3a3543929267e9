"""The isolated pool: a task that dies or hangs takes nobody with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from commissure.core.errors import InputError
from commissure.runs import DeadlineExceeded, IsolatedExecutor, WorkerDied

TASKS = """
import os, signal, sys, time
from commissure.runs import notify

def pid(): return os.getpid()
def die(code): os._exit(code)
def fail(): raise KeyError("missing")
def leave(): sys.exit(3)
def sleep(seconds): time.sleep(seconds)
def unpicklable(): return lambda: None
class Odd(Exception):
    def __init__(self, a, b): super().__init__(a)
def odd(): raise Odd(1, 2)
def interrupt(): os.kill(os.getpid(), signal.SIGINT); time.sleep(0.05); return "alive"
def threads():
    import torch
    from threadpoolctl import threadpool_info
    import numpy, scipy.linalg
    return torch.get_num_threads(), {pool["num_threads"] for pool in threadpool_info()}
def tell():
    for k in range(3):
        notify(k / 2, f"step {k}"); time.sleep(0.15)
def touch(path, seconds):
    open(path, "w").write(str(os.getpid())); time.sleep(seconds)
"""


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    (tmp_path / "isolated_tasks.py").write_text(TASKS)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("isolated_tasks", None)
    import isolated_tasks

    return isolated_tasks


def test_errors_stay_with_their_task(tasks: object) -> None:
    with IsolatedExecutor(1) as pool:
        fail, die = pool.submit(tasks.fail), pool.submit(tasks.die, 9)
        leave, odd = pool.submit(tasks.leave), pool.submit(tasks.odd)
        result, bad_result, bad_task = pool.submit(pow, 2, 10), pool.submit(tasks.unpicklable), pool.submit(lambda: 0)
        assert isinstance(fail.exception(), KeyError)
        assert "fail" in fail.exception().__notes__[0], "the traceback of the worker"
        with pytest.raises(WorkerDied, match="exit code 9"):
            die.result()
        with pytest.raises(RuntimeError, match="SystemExit: 3"):
            leave.result()
        with pytest.raises(RuntimeError, match="Odd"):
            odd.result()
        assert result.result() == 1024
        assert bad_result.exception() is not None
        assert bad_task.exception() is not None


def test_a_lane_keeps_its_worker_until_it_dies(tasks: object) -> None:
    with IsolatedExecutor(1) as pool:
        first, second = pool.submit(tasks.pid).result(), pool.submit(tasks.pid).result()
        assert first == second != os.getpid()
        pool.submit(tasks.die, 0).exception()
        assert pool.submit(tasks.pid).result() != first


def test_deadline_counts_from_the_start_of_the_task(tasks: object) -> None:
    with IsolatedExecutor(1) as pool:
        slow = pool.submit_within(30, "slow", tasks.sleep, 0.6)
        late = pool.submit_within(0.5, "late", tasks.sleep, 60)
        quick = pool.submit_within(0.5, "quick", tasks.sleep, 0)  # waits for longer than its deadline
        assert slow.result() is None
        with pytest.raises(DeadlineExceeded, match="deadline"):
            late.result()
        assert quick.result() is None


@pytest.mark.parametrize("of_parent", [None, "2"])
def test_workers_use_one_thread(tasks: object, of_parent: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("threadpoolctl", reason="comes with scikit-learn")
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False) if of_parent is None else monkeypatch.setenv(name, of_parent)
    before = dict(os.environ)
    with IsolatedExecutor(1) as pool:
        assert pool.submit(tasks.threads).result() == (1, {1})
    assert dict(os.environ) == before


def test_workers_ignore_ctrl_c_and_report(tasks: object) -> None:
    seen: list[tuple[str, float, str]] = []
    with IsolatedExecutor(1, on_notice=lambda *notice: seen.append(notice)) as pool:
        assert pool.submit(tasks.interrupt).result() == "alive"
        pool.submit_within(30, "key", tasks.tell).result()
    assert seen == [("key", 0.0, "step 0"), ("key", 0.5, "step 1"), ("key", 1.0, "step 2")]


def test_a_callback_that_raises_costs_its_task_and_gives_no_stale_answer(tasks: object) -> None:
    def on_notice(key: str, fraction: float, text: str) -> None:
        raise LookupError(key)

    with IsolatedExecutor(1, on_notice=on_notice) as pool:
        told = pool.submit_within(30, "told", tasks.tell)
        power = pool.submit(pow, 2, 10)
        assert isinstance(told.exception(), LookupError)
        assert power.result() == 1024


def test_shutdown_with_cancel_kills_what_runs(tasks: object, tmp_path: Path) -> None:
    pool = IsolatedExecutor(1)
    running, waiting = pool.submit(tasks.touch, str(tmp_path / "pid"), 60), pool.submit(tasks.pid)
    process = psutil.Process(int(wait_for(lambda: (tmp_path / "pid").read_text())))
    pool.shutdown(cancel_futures=True)
    assert isinstance(running.exception(), WorkerDied)
    assert waiting.cancelled()
    assert not process.is_running()


ORPHAN = """
import sys
sys.path.insert(0, sys.argv[1])
if __name__ == "__main__":
    import isolated_tasks
    from commissure.runs import IsolatedExecutor
    with IsolatedExecutor(1) as pool:
        pool.submit(isolated_tasks.touch, sys.argv[2], 60).result()
"""


def test_workers_end_with_a_killed_parent(tasks: object, tmp_path: Path) -> None:
    (tmp_path / "parent.py").write_text(ORPHAN)
    parent = subprocess.Popen([sys.executable, str(tmp_path / "parent.py"), str(tmp_path), str(tmp_path / "pid")])
    worker = psutil.Process(int(wait_for(lambda: (tmp_path / "pid").read_text())))
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    worker.wait(timeout=20)


def test_bad_input() -> None:
    with pytest.raises(InputError, match="workers = 0"):
        IsolatedExecutor(0)


def wait_for(read: Callable[[], str], seconds: float = 60) -> str:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if text := read():
                return text
        except FileNotFoundError:
            pass
        time.sleep(0.02)
    raise TimeoutError
