"""The run store: one SQLite file that survives kill -9, and the process pool that isolates what it runs."""

from commissure.runs.environment import cores, git_state, machine, source_digest, versions
from commissure.runs.migrate import Migration, append_only
from commissure.runs.store import Run, RunStore, home
from commissure.runs.tasks import check_workers, finished, one_thread, sweep_bar
from commissure.runs.workers import DeadlineExceeded, IsolatedExecutor, WorkerDied, notify

__all__ = [
    "DeadlineExceeded",
    "IsolatedExecutor",
    "Migration",
    "Run",
    "RunStore",
    "WorkerDied",
    "append_only",
    "check_workers",
    "cores",
    "finished",
    "git_state",
    "home",
    "machine",
    "notify",
    "one_thread",
    "source_digest",
    "sweep_bar",
    "versions",
]
