"""`commissure reproduce` from the outside: exit codes, streams, files, Ctrl-C and kill -9."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from commissure.core.errors import InputError
from commissure.experiments import cli as experiments_cli
from commissure.report.results import Report

Toy = Any  # the fixture's type lives in conftest.py


def wait_for_line(toy: Toy, line: str, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not any(entry.startswith(line) for entry in toy.log()):
        assert time.monotonic() < end, f"{line!r} never came: {toy.log()}"
        time.sleep(0.02)


def wait_for_rows(toy: Toy, n: int, seconds: float = 60) -> None:
    """Until `n` rows are in the run store: a claim may end well before the parent has written its row."""
    end = time.monotonic() + seconds
    while True:
        with closing(sqlite3.connect(toy.folder / "home" / "runs.sqlite")) as store:
            (found,) = store.execute("SELECT count(*) FROM reproduction_rows").fetchone()
        if found >= n:
            return
        assert time.monotonic() < end, f"{found} of {n} rows"
        time.sleep(0.02)


def test_table_on_stdout_progress_on_stderr_files_beside(toy: Toy) -> None:
    code, out, err = toy.run(["pass", "miss", "few"])
    assert code == 0
    assert "noise" not in out
    for text in ("toy.pass", "PASS", "MISS", "NOT CLAIMED", "paper: 1 ± 0", "2.00 [1.90, 2.10]", "≥ 1", "CPU s"):
        assert text in out
    assert "3/3" in err
    assert "index.html" in err
    report = Report.from_json((toy.folder / "reports" / "smoke.json").read_text("utf-8"))
    assert [entry.verdict for entry in report.entries] == ["PASS", "MISS", "NOT CLAIMED"]
    assert (toy.folder / "reports" / "index.html").read_text("utf-8").startswith("<!doctype html>")


def test_strict_exits_1_on_a_miss_only(toy: Toy) -> None:
    assert toy.run(["miss", "pass"], "--strict")[0] == 1
    assert toy.run(["few", "pass"], "--strict")[0] == 0
    assert toy.run(["miss", "pass"], "--strict", "--only", "toy.pass")[0] == 0


def test_an_error_row_exits_3_and_the_others_are_there(toy: Toy) -> None:
    code, out, err = toy.run(["crash", "raise", "pass", "miss"], "--strict")
    assert code == 3
    assert out.count("ERROR") >= 2
    assert "exit code 7" in out
    assert "a broken experiment" in err
    assert "1 PASS, 1 MISS, 2 ERROR" in out


def test_json_is_alone_on_stdout(toy: Toy) -> None:
    code, out, _ = toy.run(["print", "pass"], "--json")
    assert code == 0
    report = Report.from_json(out)
    assert [entry.id for entry in report.entries] == ["toy.print", "toy.pass"]
    assert json.loads(out)["budget"] == "smoke"


def test_the_report_is_written_though_nobody_reads_the_table(toy: Toy) -> None:
    for arguments in ((), ("--json",)):
        process = toy.start(["pass"], "--report-dir", f"reports{len(arguments)}", *arguments)
        process.stdout.close()  # as in `commissure reproduce | head -0`
        process.stderr.read()
        assert process.wait(timeout=120) != 0
        process.stderr.close()
        report = Report.from_json((toy.folder / f"reports{len(arguments)}" / "smoke.json").read_text("utf-8"))
        assert report.entries[0].verdict == "PASS"


def test_a_read_only_report_folder_is_refused_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(**options: object) -> Report:
        raise AssertionError("it ran")

    monkeypatch.setattr(experiments_cli, "run", run)
    access = os.access  # for root everything is writable
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path and access(path, mode))
    with pytest.raises(InputError, match=r"report_dir.*Permission denied"):
        experiments_cli.reproduce(report_dir=tmp_path)


def test_bad_input_exits_2(toy: Toy) -> None:
    code, out, err = toy.run(["pass"], "--only", "tip.pass")
    assert (code, out) == (2, "")
    assert "only = 'tip.pass'" in err
    assert "toy.pass" in err
    assert toy.run(["pass"], "--budget", "huge")[0] == 2
    assert toy.run(["pass"], "--workers", "0")[0] == 2
    assert toy.run(["pass"], "--workers", "2.5")[0] == 2
    assert toy.run(["pass"], "--wrokers", "1")[0] == 2
    (toy.folder / "file").touch()
    assert toy.run(["pass"], "--report-dir", "file")[0] == 2
    assert toy.starts() == [], "nothing ran"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_reproduction_resumes_and_repeats_nothing(toy: Toy, how: signal.Signals) -> None:
    gate: Path = toy.folder / "gate"
    gate.touch()
    process = toy.start(["pass", "crash", "gated", "pass2"])
    wait_for_line(toy, "gated start")
    wait_for_rows(toy, 2)
    worker = int(toy.log()[-1].split()[-1])
    process.send_signal(how)
    out, err = process.communicate(timeout=60)
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert "kept" in err
        assert out == ""
    wait_for_exit(worker)
    gate.unlink()
    code, out, _ = toy.run(["pass", "crash", "gated", "pass2"])
    assert code == 3
    assert "3 PASS, 1 ERROR" in out
    assert toy.starts() == ["pass", "crash", "gated", "gated", "pass2"]
    toy.run(["pass", "crash", "gated", "pass2"])
    assert len(toy.starts()) == 9, "a finished reproduction starts anew"


def wait_for_exit(process: int) -> None:
    import psutil

    if psutil.pid_exists(process):
        psutil.Process(process).wait(timeout=30)
