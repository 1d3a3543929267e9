"""The run store: one SQLite file that survives kill -9, and the process pool that isolates what it runs."""

from commissure.runs.environment import git_state, machine, source_digest, versions
from commissure.runs.migrate import Migration
from commissure.runs.store import Run, RunStore, home
from commissure.runs.workers import DeadlineExceeded, IsolatedExecutor, WorkerDied, notify

__all__ = [
    "DeadlineExceeded",
    "IsolatedExecutor",
    "Migration",
    "Run",
    "RunStore",
    "WorkerDied",
    "git_state",
    "home",
    "machine",
    "notify",
    "source_digest",
    "versions",
]
