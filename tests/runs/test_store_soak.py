"""The run store under kill -9 at random moments: what was announced is there, once, and the file is whole."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from commissure.runs import RunStore

pytestmark = pytest.mark.soak

N_ROUNDS = 25

WRITER = """
import sys
import numpy as np
from commissure.runs import Run, RunStore

with RunStore(sys.argv[1]) as store:
    next_key = len(store.runs(limit=10**9))
    while True:
        large = np.random.default_rng(next_key).normal(size=130_000)  # lies beside the file
        with store.transaction():
            number = store.add(Run("soak", str(next_key)), arrays={"large": large, "small": large[:10]})
            store.add(Run("twin", str(next_key)))
        print(number, next_key, flush=True)
        next_key += 2
"""


def test_kill_9_at_random_moments(tmp_path: Path) -> None:
    path, rng, announced = tmp_path / "runs.sqlite", random.Random(0), {}
    for _ in range(N_ROUNDS):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        with process.stdout:
            lines = [process.stdout.readline()]  # it is at work
            time.sleep(rng.uniform(0.0, 0.3))
            process.kill()
            lines += process.stdout.readlines()
        process.wait()
        announced |= {int(number): key for number, key in (line.split() for line in lines if line.endswith("\n"))}
    with RunStore(path) as store:
        assert store.query("PRAGMA integrity_check") == [("ok",)]
        assert store.query("PRAGMA foreign_key_check") == []
        rows = {run.id: run.name for run in store.runs(kind="soak", limit=10**9)}
        twins = [run.name for run in store.runs(kind="twin", limit=10**9)]
        assert announced.items() <= rows.items()
        assert len(rows) - len(announced) <= N_ROUNDS, "at most the row whose announcement the kill cut off"
        assert sorted(rows.values()) == sorted(twins), "both rows of a transaction or none"
        assert sorted(map(int, twins)) == list(range(0, 2 * len(twins), 2)), "none twice, none missing"
        for number, key in rows.items():
            large = np.random.default_rng(int(key)).normal(size=130_000)
            np.testing.assert_array_equal(store.array(number, "large"), large)
            np.testing.assert_array_equal(store.array(number, "small"), large[:10])
