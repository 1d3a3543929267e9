"""Numbered migrations of a SQLite file, one list per owner of tables.

An owner (the run store, an organ) passes its whole list, oldest first; each migration is a tuple of SQL statements.
The file remembers, per owner, how many have been applied: the missing ones run in order inside one transaction, so a
killed process leaves either the old schema or the new one.  A file with more than the owner knows was written by a
newer commissure and is refused untouched.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

from commissure.core.errors import InputError

__all__ = ["Migration", "append_only", "migrate", "schema_version"]

Migration = tuple[str, ...]

_TABLE = "CREATE TABLE IF NOT EXISTS schema_versions (owner TEXT PRIMARY KEY, version INTEGER NOT NULL) STRICT"


def append_only(*tables: str) -> Migration:
    """Statements after which no row of these tables can be changed or removed.

    >>> len(append_only("notes"))
    2
    """
    return tuple(
        f"CREATE TRIGGER {table}_no_{verb} BEFORE {verb} ON {table} "
        f"BEGIN SELECT RAISE(ABORT, '{table} is append-only'); END"
        for table in tables
        for verb in ("UPDATE", "DELETE")
    )


def schema_version(connection: sqlite3.Connection, owner: str) -> int:
    """How many of `owner`'s migrations the file has; 0 for an unknown owner."""
    known = connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'schema_versions'").fetchone()
    if known is None:
        return 0
    row = connection.execute("SELECT version FROM schema_versions WHERE owner = ?", (owner,)).fetchone()
    return 0 if row is None else int(row[0])


def migrate(connection: sqlite3.Connection, owner: str, migrations: Sequence[Migration]) -> int:
    """Bring `owner`'s tables up to date and return the version; a newer file raises `InputError`.

    The connection must be in autocommit mode (`isolation_level=None`).

    >>> connection = sqlite3.connect(":memory:", isolation_level=None)
    >>> migrate(connection, "notes", [("CREATE TABLE notes (text TEXT)",)])
    1
    """
    if _checked(connection, owner, len(migrations)) == len(migrations):
        return len(migrations)
    connection.execute("BEGIN IMMEDIATE")  # only one process migrates; the others find the work done
    try:
        connection.execute(_TABLE)
        for migration in migrations[_checked(connection, owner, len(migrations)) :]:
            for statement in migration:
                connection.execute(statement)
        connection.execute("INSERT OR REPLACE INTO schema_versions VALUES (?, ?)", (owner, len(migrations)))
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:  # Ctrl-C during COMMIT arrives here when it is done
            connection.execute("ROLLBACK")
        raise
    return len(migrations)


def _checked(connection: sqlite3.Connection, owner: str, known: int) -> int:
    version = schema_version(connection, owner)
    if version > known:
        raise InputError(
            f"schema version of {owner!r}",
            version,
            f"at most {known}, the newest this commissure knows",
            "upgrade commissure, or set COMMISSURE_HOME to another folder",
        )
    return version
