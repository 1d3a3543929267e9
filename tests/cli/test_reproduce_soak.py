"""`commissure reproduce` under kill -9 at random moments: no finished row is lost or measured again."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest

from commissure.report.results import Report

pytestmark = pytest.mark.soak

Toy = Any  # the fixture's type lives in conftest.py

N_KILLS = 12
NAMES = [f"slow{i}" for i in range(60)]  # 0.4 s each: more than the rounds below can finish


def finished(folder: Path) -> set[str]:
    """Claims whose row is in the store."""
    path = folder / "home" / "runs.sqlite"
    if not path.exists():
        return set()
    with closing(sqlite3.connect(path)) as connection:
        made = connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'reproduction_rows'").fetchone()
        rows = connection.execute("SELECT claim_id FROM reproduction_rows").fetchall() if made else []
    assert len(set(rows)) == len(rows)
    return {name.removeprefix("toy.") for (name,) in rows}


def ended(process: subprocess.Popen[str], seconds: float) -> str | None:
    """What it printed, if it ends within this time."""
    try:
        return process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        return None


def test_the_reproduction_is_killed(toy: Toy) -> None:
    rng = random.Random(0)
    for _ in range(N_KILLS):
        before, n_starts = finished(toy.folder), len(toy.starts())
        process = toy.start(NAMES)
        assert ended(process, rng.uniform(0.3, 3.0)) is None
        process.kill()
        process.communicate()
        assert before <= finished(toy.folder), "a finished row is lost"
        assert not before & set(toy.starts()[n_starts:]), "a finished claim is measured again"
    assert finished(toy.folder)
    code, out, _ = toy.run(NAMES)
    assert code == 0
    assert f"{len(NAMES)} PASS" in out
    # a kill costs the claim that ran, and the one before it where its row was still on its way to the store
    assert len(toy.starts()) <= len(NAMES) + 2 * N_KILLS


def test_workers_are_killed(toy: Toy) -> None:
    rng, n_kills = random.Random(1), 0
    process = toy.start(NAMES[:40], "--json")
    while (out := ended(process, rng.uniform(0.2, 1.0))) is None:
        lines = toy.log()
        worker = int(lines[-1].split()[-1]) if lines else 0
        if n_kills < N_KILLS and worker and psutil.pid_exists(worker):
            os.kill(worker, signal.SIGKILL)
            n_kills += 1
    report = Report.from_json(out)
    errors = [entry for entry in report.entries if entry.verdict == "ERROR"]
    assert n_kills == N_KILLS
    assert 1 <= len(errors) <= n_kills, "a killed worker costs one claim at most"
    assert all("signal SIGKILL" in entry.note for entry in errors)
    assert report.counts["PASS"] == 40 - len(errors)
    assert process.returncode == 3
    assert len(set(toy.starts())) == len(toy.starts()), "no claim runs twice"
