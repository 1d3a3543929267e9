"""A command line whose table of claims is a toy table, run in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

SCRIPT = """
import sys
sys.path.insert(0, {toys!r})

if __name__ == "__main__":
    import functools
    import toy
    from commissure import cli
    from commissure.experiments.cli import reproduce

    claims = tuple(toy.claim(name) for name in {names!r})
    del cli.app["reproduce"]
    cli.app.command(functools.partial(reproduce, claims=claims), name="reproduce")
    sys.exit(cli.main())
"""


class Toy(NamedTuple):
    """Folder of the run, and a starter of `commissure reproduce ARGUMENTS` on the toy claims called `names`."""

    folder: Path
    start: Callable[..., subprocess.Popen[str]]

    def run(self, names: list[str], *arguments: str) -> tuple[int, str, str]:
        process = self.start(names, *arguments)
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err

    def log(self) -> list[str]:
        path = self.folder / "log"
        return path.read_text().splitlines() if path.exists() else []

    def starts(self) -> list[str]:
        return [line.split()[0] for line in self.log() if " start " in line]


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    environment = os.environ | {
        "COMMISSURE_HOME": str(tmp_path / "home"),
        "TOY_LOG": str(tmp_path / "log"),
        "TOY_GATE": str(tmp_path / "gate"),
        "COLUMNS": "100",
        "PYTHONIOENCODING": "utf-8",
    }

    def start(names: list[str], *arguments: str) -> subprocess.Popen[str]:
        script = tmp_path / "toy_cli.py"
        toys = str(Path(__file__).parents[1] / "experiments")
        script.write_text(SCRIPT.format(toys=toys, names=tuple(names)))
        workers = () if "--workers" in arguments else ("--workers", "1")
        return subprocess.Popen(
            [sys.executable, str(script), "reproduce", "--budget", "smoke", *workers, *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment,
            encoding="utf-8",
        )  # fmt: skip

    return Toy(tmp_path, start)
