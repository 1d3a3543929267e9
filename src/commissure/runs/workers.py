"""A process pool whose tasks cannot hurt each other: a `concurrent.futures.Executor`.

`ProcessPoolExecutor` fails every pending task when one worker dies.  Here each task runs in a spawned worker of its
own lane; a crash (segmentation fault, `os._exit`, out of memory) or a passed deadline fails that task alone, and the
lane gets a fresh worker.  Workers compute with one thread, write what they print to stderr, ignore Ctrl-C (the parent
decides) and end with their parent, even when it was killed.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any, ParamSpec, TypeVar

from commissure.core.errors import CommissureError, InputError

__all__ = ["DeadlineExceeded", "IsolatedExecutor", "WorkerDied", "notify"]

P = ParamSpec("P")
T = TypeVar("T")

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
_NOTICE_INTERVAL_S = 0.1  # a progress bar needs no more, and a tight loop must not spend its time in a pipe

_spawning = threading.Lock()

_channel: Connection | None = None
_last_notice = 0.0


class DeadlineExceeded(CommissureError, TimeoutError):
    """A task ran past its deadline and its worker was killed."""


class WorkerDied(CommissureError, RuntimeError):
    """The process that ran a task ended before it answered."""


class IsolatedExecutor(Executor):
    """At most `workers` tasks at a time, each in a spawned process; functions and results are pickled.

    `on_notice(key, fraction, text)` gets what a task reports through `notify`, in one of this pool's threads; `key` is
    the one given to `submit_within`.  `shutdown(cancel_futures=True)` kills what runs.

    >>> with IsolatedExecutor(1) as pool:
    ...     pool.submit(pow, 2, 5).result()
    32
    """

    def __init__(self, workers: int, *, on_notice: Callable[[str, float, str], None] | None = None) -> None:
        if workers < 1:
            raise InputError("workers", workers, "an integer >= 1")
        self._lanes = ThreadPoolExecutor(workers, thread_name_prefix="commissure-lane")
        self._on_notice = on_notice
        self._local = threading.local()
        self._guard = threading.Lock()
        self._alive: set[_Worker] = set()
        self._is_closed = False

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run `fn(*args, **kwargs)` without a deadline."""
        return self._lanes.submit(self._run, "", None, fn, args, kwargs)

    def submit_within(self, seconds: float, key: str, fn: Callable[..., T], /, *args: Any) -> Future[T]:
        """Run `fn(*args)`; `seconds` after its start the worker is killed and the future gets `DeadlineExceeded`."""
        return self._lanes.submit(self._run, key, seconds, fn, args, {})

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Let the tasks end (`cancel_futures=True`: kill those that run), then end the workers."""
        if cancel_futures:
            self._close()
        self._lanes.shutdown(wait=wait, cancel_futures=cancel_futures)
        if wait:
            self._close()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.shutdown(cancel_futures=error is not None)

    def _close(self) -> None:
        with self._guard:
            self._is_closed = True
            for worker in self._alive:
                worker.kill()

    def _run(self, key: str, seconds: float | None, fn: Callable[..., T], args: tuple, kwargs: dict[str, Any]) -> T:
        worker = self._worker()
        notice = (lambda fraction, text: self._on_notice(key, fraction, text)) if self._on_notice else None
        try:
            return worker.call((fn, args, kwargs), seconds, notice)
        except BaseException:
            if worker.is_busy:  # it died, ran late, or `on_notice` raised: its answer must not reach the next task
                worker.kill()
                with self._guard:
                    self._alive.discard(worker)
                del self._local.worker
            raise

    def _worker(self) -> _Worker:
        """This lane's worker, started on first use and after each death."""
        if not hasattr(self._local, "worker"):
            with self._guard:
                if self._is_closed:
                    raise WorkerDied("the pool was shut down")
                self._local.worker = _Worker()
                self._alive.add(self._local.worker)
        return self._local.worker


class _Worker:
    """The parent's side of one spawned process."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, remote = context.Pipe()
        self.process = context.Process(target=_serve, args=(remote,), daemon=True)
        with _one_thread():
            self.process.start()
        remote.close()
        self.is_ready = False
        self.is_busy = False  # owes the answer to a task

    def call(self, task: tuple, seconds: float | None, notice: Callable[[float, str], None] | None) -> Any:
        message = ForkingPickler.dumps(task)  # an unpicklable task raises here and leaves the worker alone
        self.is_busy = True
        if not self.is_ready:  # the deadline is the task's: starting Python does not count
            self.is_ready = self._receive(None)
        end = None if seconds is None else time.monotonic() + seconds
        with contextlib.suppress(ConnectionError):  # a dead worker shows at the next receive
            self.pipe.send_bytes(message)
        while True:
            kind, *content = self._receive(end)
            self.is_busy = kind == "notice"
            if kind == "result":
                return content[0]
            if kind == "error":
                error, trace = content
                error.add_note(trace)
                raise error
            if notice is not None:
                notice(*content)

    def _receive(self, end: float | None) -> Any:
        try:
            if end is not None and not self.pipe.poll(max(0.0, end - time.monotonic())):
                raise DeadlineExceeded("deadline passed, worker killed")
            return self.pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join(5)
            raise WorkerDied(f"worker process died ({_exit_reason(self.process.exitcode)})") from None

    def kill(self) -> None:
        self.process.kill()
        self.process.join(5)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """The environment of a new process: libraries read it when they load, numpy before the process could set it."""
    with _spawning:
        before = {name: os.environ.get(name) for name in _THREAD_VARIABLES}
        os.environ.update(dict.fromkeys(_THREAD_VARIABLES, "1"))
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def _exit_reason(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {signal.Signals(-code).name}"
    except ValueError:
        return f"signal {-code}"


def notify(fraction: float, text: str = "") -> None:
    """Tell the parent how far this task is (0 to 1); outside a worker nothing happens."""
    global _last_notice
    now = time.monotonic()
    if _channel is None or now - _last_notice < _NOTICE_INTERVAL_S:
        return
    _last_notice = now
    _channel.send(("notice", float(fraction), text))


def _serve(pipe: Connection) -> None:
    """The worker's side: answer tasks until the parent hangs up."""
    global _channel
    _isolate()
    _channel = pipe
    pipe.send(True)
    while True:
        try:
            message = pipe.recv_bytes()
        except EOFError:
            return
        try:
            fn, args, kwargs = ForkingPickler.loads(message)
            answer = ForkingPickler.dumps(("result", fn(*args, **kwargs)))
        except BaseException as error:
            answer = _pickled_error(error)
        pipe.send_bytes(answer)


def _pickled_error(error: BaseException) -> Any:
    trace = "".join(traceback.format_exception(error))
    stand_in = RuntimeError(f"{type(error).__name__}: {error}")
    if not isinstance(error, Exception):  # a worker's SystemExit must not end the parent
        return ForkingPickler.dumps(("error", stand_in, trace))
    try:
        answer = ForkingPickler.dumps(("error", error, trace))
        ForkingPickler.loads(answer)  # some exceptions pickle but do not come back
    except Exception:
        return ForkingPickler.dumps(("error", stand_in, trace))
    return answer


def _isolate() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.stdout.flush()
    os.dup2(2, 1)  # results travel through the pipe; stdout belongs to the parent's result
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)
