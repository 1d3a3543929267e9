"""The run store: one SQLite file, one row a run, append-only, safe against kill -9.

Write-ahead logging with `synchronous=FULL`: a row whose `add` returned is on the disk.  WAL shares memory between
processes, so the file must lie on a local disk; network file systems lose rows or refuse.  Path:
`$COMMISSURE_HOME/runs.sqlite`, default `./.commissure/runs.sqlite`.  Arrays travel as safetensors: up to 1 MB inside
the file, above it in `artefacts/<sha256>.safetensors` beside it.  Workers return results; only the process that opened
the store writes.

Other owners add tables to the same file with `RunStore.migrate(owner, migrations)`.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from commissure.core.errors import CommissureError, InputError
from commissure.runs.migrate import Migration, append_only, migrate

__all__ = ["Run", "RunStore", "home"]

APPLICATION_ID = 0x636D7372  # "cmsr", in the file's header: a foreign SQLite file is refused, never altered
INLINE_BYTES = 1_000_000  # larger blobs slow every scan of the file down; they lie beside it

_RUNS: tuple[Migration, ...] = (
    (
        """CREATE TABLE runs (
            id INTEGER PRIMARY KEY, created TEXT NOT NULL, kind TEXT NOT NULL, name TEXT NOT NULL,
            config TEXT NOT NULL, config_digest TEXT NOT NULL, versions TEXT NOT NULL, git TEXT NOT NULL,
            seed INTEGER NOT NULL, device TEXT NOT NULL, wall_s REAL NOT NULL, cpu_s REAL NOT NULL,
            metrics TEXT NOT NULL
        ) STRICT""",
        "CREATE INDEX runs_by_name ON runs (kind, name, config_digest)",
        """CREATE TABLE artefacts (
            run_id INTEGER NOT NULL REFERENCES runs (id), name TEXT NOT NULL, digest TEXT NOT NULL, data BLOB,
            PRIMARY KEY (run_id, name)
        ) STRICT""",
        *append_only("runs", "artefacts"),
    ),
)


def home() -> Path:
    """The folder of the run store: `$COMMISSURE_HOME`, else `./.commissure`."""
    return Path(os.environ.get("COMMISSURE_HOME") or ".commissure")


@dataclass(frozen=True)
class Run:
    """One run; `id` and `created` (UTC, ISO 8601) are the store's, 0 and "" before.

    `config`, `versions`, `git` and `metrics` hold what JSON can hold; `config_digest` is the SHA-256 of the canonical
    JSON of `config`.
    """

    kind: str
    name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    device: str = "cpu"
    wall_s: float = 0.0
    cpu_s: float = 0.0
    metrics: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    git: Mapping[str, Any] = field(default_factory=dict)
    id: int = 0
    created: str = ""

    @property
    def config_digest(self) -> str:
        return hashlib.sha256(_json("config", self.config).encode()).hexdigest()


class RunStore:
    """Open (and create) the run store at `path`, default `home() / "runs.sqlite"`; a context manager.

    Raises `InputError` where the file is not a run store, comes from a newer commissure, or lies on a file system
    without write-ahead logging.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, RunStore(f"{folder}/runs.sqlite") as store:
    ...     number = store.add(Run("fit", "wiener", {"lags": 3}, metrics={"r2": 0.5}), arrays={"w": np.ones(2)})
    ...     store.run(number).metrics["r2"], store.array(number, "w")
    (0.5, array([1., 1.]))
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = Path(path) if path is not None else home() / "runs.sqlite"
        self._process = os.getpid()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            for place in (self.path.parent, self.path):  # SQLite would open a read-only file and fail at the first row
                if place.exists() and not os.access(place, os.W_OK):
                    raise PermissionError(f"{place} is read-only")
            self._connection = sqlite3.connect(self.path, timeout=30, isolation_level=None)
        except (OSError, sqlite3.OperationalError) as error:
            raise InputError("path", str(self.path), f"a writable place ({error})", "set COMMISSURE_HOME") from None
        try:
            self._prepare()
        except sqlite3.DatabaseError as error:
            self._connection.close()
            raise InputError("path", str(self.path), f"a run store ({error})", "move the file away") from None
        except BaseException:
            self._connection.close()
            raise

    def _prepare(self) -> None:
        execute = self._connection.execute
        execute("PRAGMA foreign_keys = ON")
        is_empty = execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0
        application = execute("PRAGMA application_id").fetchone()[0]  # in this order: another process may be creating
        if application != APPLICATION_ID and not is_empty:
            raise InputError("path", str(self.path), "a run store, not another program's SQLite file", "move it away")
        mode = execute("PRAGMA journal_mode = WAL").fetchone()[0]
        if mode != "wal":
            raise InputError("path", str(self.path), f"a local disk with write-ahead logging (got {mode!r})")
        execute("PRAGMA synchronous = FULL")
        if application != APPLICATION_ID:
            execute(f"PRAGMA application_id = {APPLICATION_ID}")
        migrate(self._connection, "runs", _RUNS)

    def migrate(self, owner: str, migrations: Sequence[Migration]) -> int:
        """Bring the tables of another owner up to date in this file; see `commissure.runs.migrate`."""
        return migrate(self._connection, owner, migrations)

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All statements inside or none; committed and on the disk when the block ends.  Blocks may nest."""
        if os.getpid() != self._process:
            raise CommissureError("the run store was opened by another process; workers return rows, the parent writes")
        if self._connection.in_transaction:
            yield self._connection
            return
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield self._connection
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:  # Ctrl-C during COMMIT arrives here when it is done
                self._connection.execute("ROLLBACK")
            raise

    def query(self, sql: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Rows of a SELECT."""
        return self._connection.execute(sql, parameters).fetchall()

    def add(self, run: Run, *, arrays: Mapping[str, np.ndarray] | None = None) -> int:
        """Append a run with its named arrays and return its number; it survives kill -9 from here on."""
        row = (
            datetime.now(UTC).isoformat(timespec="milliseconds"), run.kind, run.name,
            _json("config", run.config), run.config_digest,
            _json("versions", run.versions), _json("git", run.git), run.seed, run.device, run.wall_s, run.cpu_s,
            _json("metrics", run.metrics),
        )  # fmt: skip
        blobs = [(name, *self._stored(array)) for name, array in (arrays or {}).items()]
        with self.transaction() as connection:
            columns = "created, kind, name, config, config_digest, versions, git, seed, device, wall_s, cpu_s, metrics"
            marks = ", ".join("?" * len(row))
            number = connection.execute(f"INSERT INTO runs ({columns}) VALUES ({marks})", row).lastrowid
            assert number is not None
            connection.executemany(
                "INSERT INTO artefacts VALUES (?, ?, ?, ?)",
                [(number, name, digest, data) for name, digest, data in blobs],
            )
        return number

    def run(self, number: int) -> Run:
        """The run with this number."""
        found = self._runs("WHERE id = ?", (number,))
        if not found:
            raise InputError("number", number, f"the number of a run in {self.path}")
        return found[0]

    def runs(self, *, kind: str | None = None, name: str | None = None, limit: int = 1000) -> list[Run]:
        """The newest runs first, of one kind or name if given."""
        return self._runs(
            "WHERE kind = coalesce(?, kind) AND name = coalesce(?, name) ORDER BY id DESC LIMIT ?", (kind, name, limit)
        )

    def _runs(self, where: str, parameters: Sequence[Any]) -> list[Run]:
        columns = "kind, name, config, seed, device, wall_s, cpu_s, metrics, versions, git, id, created"
        rows = self.query(f"SELECT {columns} FROM runs {where}", parameters)
        return [
            Run(
                kind, name, json.loads(config), seed, device, wall, cpu,
                json.loads(metrics), json.loads(versions), json.loads(git), i, at,
            )
            for kind, name, config, seed, device, wall, cpu, metrics, versions, git, i, at in rows
        ]  # fmt: skip

    def array(self, number: int, name: str) -> np.ndarray:
        """Array `name` of run `number`, checked against its digest."""
        from safetensors.numpy import load

        found = self.query("SELECT digest, data FROM artefacts WHERE run_id = ? AND name = ?", (number, name))
        if not found:
            known = [row[0] for row in self.query("SELECT name FROM artefacts WHERE run_id = ?", (number,))]
            raise InputError("name", name, f"an array of run {number}: {known}")
        digest, data = found[0]
        data = self._beside(digest).read_bytes() if data is None else data
        if hashlib.sha256(data).hexdigest() != digest:
            raise InputError("name", name, f"bytes with digest {digest}", f"restore {self._beside(digest)}")
        return load(data)["array"]

    def _beside(self, digest: str) -> Path:
        return self.path.parent / "artefacts" / f"{digest}.safetensors"

    def _stored(self, array: np.ndarray) -> tuple[str, bytes | None]:
        """Digest, and the bytes where they are small; large ones are on the disk under their digest on return."""
        from safetensors.numpy import save

        data = save({"array": np.ascontiguousarray(array)})
        digest = hashlib.sha256(data).hexdigest()
        if len(data) <= INLINE_BYTES:
            return digest, data
        target = self._beside(digest)
        if not target.exists():
            target.parent.mkdir(exist_ok=True)
            partial = target.with_suffix(f".{os.getpid()}.partial")
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(target)
        return digest, None

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Hold a named lock among the processes of this store; one that dies lets go.  Taken: `InputError`."""
        file, fix = self.path.parent / f"{name}.lock", "set COMMISSURE_HOME to another folder"
        try:
            connection = sqlite3.connect(file, timeout=0, isolation_level=None)
        except sqlite3.OperationalError as error:
            raise InputError("store", str(self.path), f"a file {file} that can be opened ({error})", fix) from None
        try:
            try:
                connection.execute("BEGIN EXCLUSIVE")
            except sqlite3.DatabaseError as error:
                if getattr(error, "sqlite_errorcode", None) != sqlite3.SQLITE_BUSY:
                    raise InputError("store", str(self.path), f"a lock at {file} ({error})", fix) from None
                message = f"no other {name} at work on it"
                raise InputError("store", str(self.path), message, f"wait for it, or {fix}") from None
            yield
        finally:
            connection.close()

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _json(argument: str, value: Mapping[str, Any]) -> str:
    """Canonical JSON; what JSON cannot hold raises `InputError`."""
    try:
        return json.dumps(dict(value), sort_keys=True, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise InputError(argument, value, f"JSON values ({error})") from None
