"""The run store: nothing committed is ever lost, nothing is ever changed."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from commissure.core.errors import CommissureError, InputError
from commissure.runs import Run, RunStore, home
from commissure.runs.migrate import migrate, schema_version

RUN = Run("fit", "wiener", {"lags": 3}, seed=7, device="cpu", wall_s=1.5, cpu_s=1.25, metrics={"r2": [0.5, 0.25]},
          versions={"torch": "2"}, git={"commit": "abc", "dirty": False})  # fmt: skip


def test_what_goes_in_comes_out(tmp_path: Path) -> None:
    small, large = np.arange(6.0).reshape(2, 3), np.random.default_rng(0).normal(size=200_000)
    with RunStore(tmp_path / "new" / "runs.sqlite") as store:
        number = store.add(RUN, arrays={"small": small, "large": large, "strided": small.T})
    with RunStore(tmp_path / "new" / "runs.sqlite") as store:
        back = store.run(number)
        assert back.created
        assert (back.kind, back.name, back.config, back.seed, back.metrics) == (
            "fit", "wiener", {"lags": 3}, 7, {"r2": [0.5, 0.25]},
        )  # fmt: skip
        assert (back.wall_s, back.cpu_s, back.versions, back.git) == (1.5, 1.25, RUN.versions, RUN.git)
        assert back.config_digest == RUN.config_digest
        np.testing.assert_array_equal(store.array(number, "small"), small)
        np.testing.assert_array_equal(store.array(number, "large"), large)
        np.testing.assert_array_equal(store.array(number, "strided"), small.T)
    beside = list((tmp_path / "new" / "artefacts").iterdir())
    assert len(beside) == 1, "only the large array lies beside the file"
    assert beside[0].suffix == ".safetensors"


def test_runs_filters_newest_first(tmp_path: Path) -> None:
    with RunStore(tmp_path / "runs.sqlite") as store:
        numbers = [store.add(Run(kind, name)) for kind, name in (("a", "x"), ("a", "y"), ("b", "x"))]
        assert [run.id for run in store.runs()] == numbers[::-1]
        assert [run.id for run in store.runs(kind="a")] == [numbers[1], numbers[0]]
        assert [run.id for run in store.runs(name="x", limit=1)] == [numbers[2]]


def test_append_only(tmp_path: Path) -> None:
    with RunStore(tmp_path / "runs.sqlite") as store:
        store.add(RUN, arrays={"w": np.ones(1)})
        for statement in ("UPDATE runs SET seed = 1", "DELETE FROM runs", "DELETE FROM artefacts"):
            with pytest.raises(sqlite3.IntegrityError, match="append-only"), store.transaction() as connection:
                connection.execute(statement)
        assert store.run(1).seed == 7


def test_foreign_keys_hold(tmp_path: Path) -> None:
    with (
        RunStore(tmp_path / "runs.sqlite") as store,
        pytest.raises(sqlite3.IntegrityError, match="FOREIGN KEY"),
        store.transaction() as connection,
    ):
        connection.execute("INSERT INTO artefacts VALUES (99, 'w', 'd', NULL)")


def test_durability_settings(tmp_path: Path) -> None:
    with RunStore(tmp_path / "runs.sqlite") as store:
        assert store.query("PRAGMA journal_mode") == [("wal",)]
        assert store.query("PRAGMA synchronous") == [(2,)], "FULL"


WRITER = """
import sys, time
from commissure.runs import Run, RunStore
with RunStore(sys.argv[1]) as store:
    for _ in range(40):
        print(store.add(Run("fit", "whole")), flush=True)
    with store.transaction():
        store.add(Run("fit", "torn"))
        print("torn", flush=True)
        time.sleep(60)
"""


def test_kill_9_loses_no_committed_row_and_keeps_no_torn_one(tmp_path: Path) -> None:
    path = tmp_path / "runs.sqlite"
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    committed = []
    with process.stdout:
        for line in iter(process.stdout.readline, "torn\n"):  # it then sits in an open transaction
            committed.append(int(line))
    process.kill()
    process.wait()
    with RunStore(path) as store:
        assert store.query("PRAGMA integrity_check") == [("ok",)]
        assert sorted(run.id for run in store.runs()) == committed == list(range(1, 41))
        assert store.add(RUN) == 41


def test_failed_transaction_leaves_nothing(tmp_path: Path) -> None:
    def add_and_fail(store: RunStore) -> None:
        with store.transaction():
            store.add(RUN)
            raise ZeroDivisionError

    with RunStore(tmp_path / "runs.sqlite") as store:
        with pytest.raises(ZeroDivisionError):
            add_and_fail(store)
        assert store.runs() == []


class InterruptedCommit:
    """A connection whose COMMIT is followed by Ctrl-C: signals are handled when the call into SQLite returns."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.connection = connection

    def execute(self, sql: str, *parameters: object) -> sqlite3.Cursor:
        cursor = self.connection.execute(sql, *parameters)
        if sql == "COMMIT":
            raise KeyboardInterrupt
        return cursor

    def __getattr__(self, name: str) -> object:
        return getattr(self.connection, name)


def test_ctrl_c_during_commit_is_ctrl_c(tmp_path: Path) -> None:
    with RunStore(tmp_path / "runs.sqlite") as store:
        connection = store._connection
        store._connection = InterruptedCommit(connection)  # type: ignore[assignment]
        with pytest.raises(KeyboardInterrupt):
            store.add(RUN)
        with pytest.raises(KeyboardInterrupt):
            store.migrate("notes", [("CREATE TABLE notes (text TEXT)",)])
        store._connection = connection
        assert store.run(1).name == "wiener", "committed before the signal was handled"
        assert store.migrate("notes", [("CREATE TABLE notes (text TEXT)",)]) == 1


def test_newer_schema_is_refused_untouched(tmp_path: Path) -> None:
    path = tmp_path / "runs.sqlite"
    with RunStore(path) as store, store.transaction() as connection:
        connection.execute("UPDATE schema_versions SET version = 99 WHERE owner = 'runs'")
    with pytest.raises(InputError, match=r"schema version of 'runs' = 99.*upgrade commissure"):
        RunStore(path)


def test_migrations_run_once_in_order_and_whole(tmp_path: Path) -> None:
    first = ("CREATE TABLE notes (text TEXT)",)
    second = ("ALTER TABLE notes ADD COLUMN author TEXT", "INSERT INTO notes VALUES ('a', 'b')")
    broken = ("INSERT INTO notes VALUES ('c', 'd')", "CREATE TABLE notes (x)")
    path = tmp_path / "runs.sqlite"
    with RunStore(path) as store:
        assert store.migrate("notes", [first]) == 1
        assert store.migrate("notes", [first, second]) == 2
        assert store.migrate("notes", [first, second]) == 2
        with pytest.raises(sqlite3.OperationalError):
            store.migrate("notes", [first, second, broken])
        assert store.query("SELECT * FROM notes") == [("a", "b")]
    connection = sqlite3.connect(path, isolation_level=None)
    assert (schema_version(connection, "notes"), schema_version(connection, "nobody")) == (2, 0)
    with pytest.raises(InputError, match="at most 1"):
        migrate(connection, "notes", [first])
    connection.close()


def test_damaged_or_missing_array(tmp_path: Path) -> None:
    with RunStore(tmp_path / "runs.sqlite") as store:
        number = store.add(RUN, arrays={"w": np.zeros(200_000)})
        file = next((tmp_path / "artefacts").iterdir())
        file.write_bytes(file.read_bytes()[:-1] + b"\1")
        with pytest.raises(InputError, match="digest"):
            store.array(number, "w")
        with pytest.raises(InputError, match=r"\['w'\]"):
            store.array(number, "v")
        with pytest.raises(InputError, match="number of a run"):
            store.run(99)


def test_foreign_files_are_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no database, only words " * 100)
    with pytest.raises(InputError, match="a run store"):
        RunStore(tmp_path / "text")
    other = sqlite3.connect(tmp_path / "other.sqlite")
    other.execute("CREATE TABLE theirs (x)")
    other.commit()
    other.close()
    with pytest.raises(InputError, match="another program's"):
        RunStore(tmp_path / "other.sqlite")
    with pytest.raises(InputError, match="write-ahead"):
        RunStore(":memory:")


def test_unwritable_place_and_unjsonable_values(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="COMMISSURE_HOME"):
        RunStore(tmp_path / "file" / "runs.sqlite")
    with RunStore(tmp_path / "runs.sqlite") as store:
        with pytest.raises(InputError, match="metrics"):
            store.add(Run("fit", "x", metrics={"r2": np.float32(1)}))
        assert store.runs() == []


def test_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COMMISSURE_HOME", raising=False)
    assert home() == Path(".commissure")
    monkeypatch.setenv("COMMISSURE_HOME", "elsewhere")
    assert home() == Path("elsewhere")


def test_lock(tmp_path: Path) -> None:
    with RunStore(tmp_path / "runs.sqlite") as store:
        with store.lock("sweep"):
            with pytest.raises(InputError, match="no other sweep"), store.lock("sweep"):
                pass
            with store.lock("other"):
                pass
        with store.lock("sweep"):
            pass


def test_a_lock_that_cannot_be_taken_says_why(tmp_path: Path) -> None:
    (tmp_path / "sweep.lock").mkdir()
    (tmp_path / "scan.lock").write_text("no lock, only words " * 100)
    with RunStore(tmp_path / "runs.sqlite") as store:
        for name, reason in (("sweep", "unable to open"), ("scan", "not a database")):
            with pytest.raises(InputError, match=rf"{name}\.lock.*{reason}.*COMMISSURE_HOME"), store.lock(name):
                pass


@pytest.mark.parametrize("read_only", ["home", "home/runs.sqlite"])
def test_a_read_only_store_is_refused_at_once(read_only: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    RunStore(tmp_path / "home" / "runs.sqlite").close()
    access = os.access  # for root everything is writable
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path / read_only and access(path, mode))
    with pytest.raises(InputError, match=r"a writable place \(.* is read-only\); set COMMISSURE_HOME"):
        RunStore(tmp_path / "home" / "runs.sqlite")


def test_another_process_may_not_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RunStore(tmp_path / "runs.sqlite") as store:
        monkeypatch.setattr(os, "getpid", lambda: -1)
        with pytest.raises(CommissureError, match="the parent writes"):
            store.add(RUN)
