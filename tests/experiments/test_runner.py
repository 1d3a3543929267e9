"""The runner on toy claims: isolation, order, deadlines, resuming."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from commissure.core.errors import InputError
from commissure.experiments import runner
from commissure.report import page
from commissure.report.results import Entry, Report
from commissure.runs import RunStore

Log = Callable[[], list[str]]


def table(*names: str, **options: object) -> tuple:
    import toy

    return tuple(toy.claim(name, **options) for name in names)


def verdicts(report: Report) -> dict[str, str]:
    return {entry.id.removeprefix("toy."): entry.verdict for entry in report.entries}


def entry(report: Report, name: str) -> Entry:
    return next(entry for entry in report.entries if entry.id == f"toy.{name}")


def starts(log: list[str]) -> list[str]:
    return [line.split()[0] for line in log if " start " in line]


def test_every_verdict_and_no_crash_spreads(toy_log: Log) -> None:
    names = ("crash", "pass", "segfault", "miss", "raise", "few", "nothing", "print", "figure", "pass2")
    report = runner.reproduce(claims=table(*names), budget="smoke", workers=2)
    assert verdicts(report) == {
        "crash": "ERROR", "pass": "PASS", "segfault": "ERROR", "miss": "MISS", "raise": "ERROR", "few": "NOT CLAIMED",
        "nothing": "ERROR", "print": "PASS", "figure": "ERROR", "pass2": "PASS",
    }  # fmt: skip
    assert "exit code 7" in entry(report, "crash").note
    assert "SIGSEGV" in entry(report, "segfault").note
    assert entry(report, "raise").note == "ValueError: a broken experiment"
    assert "toy.py" in entry(report, "raise").trace
    assert "an Outcome" in entry(report, "nothing").note
    assert entry(report, "pass").data == "toy data"
    assert entry(report, "pass").rows[0].high == 2.1


def test_what_the_report_cannot_hold_costs_one_row(toy_log: Log, tmp_path: Path) -> None:
    report = runner.reproduce(claims=table("verdict", "nonote", "surrogate", "pass"), budget="smoke", workers=1)
    assert verdicts(report) == {"verdict": "ERROR", "nonote": "ERROR", "surrogate": "ERROR", "pass": "PASS"}
    assert "verdict" in entry(report, "verdict").note
    assert page.write(report, tmp_path / "index.html").exists()


def test_missing_module_is_an_error_row(toy_log: Log) -> None:
    claims = (replace(table("pass")[0], module="toy_not_written"), *table("pass2"))
    report = runner.reproduce(claims=claims, budget="smoke", workers=1)
    assert verdicts(report) == {"pass": "ERROR", "pass2": "PASS"}
    assert "toy_not_written" in report.entries[0].note


def test_deadline_kills_only_its_claim(toy_log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "deadline_s", lambda claim, budget: 0.5 if "hang" in claim.id else 60.0)
    report = runner.reproduce(claims=table("hang", "pass", "slow"), budget="smoke", workers=1)
    assert verdicts(report) == {"hang": "ERROR", "pass": "PASS", "slow": "PASS"}
    assert "deadline" in entry(report, "hang").note


def test_exclusive_claims_run_alone_and_last(toy_log: Log) -> None:
    claims = (*table("slow_x1", "slow_x2", exclusive=True), *table("slow_a", "slow_b", "slow_c"))
    report = runner.reproduce(claims=claims, budget="smoke", workers=2)
    assert set(verdicts(report).values()) == {"PASS"}
    assert [entry.id for entry in report.entries] == [claim.id for claim in claims], "the table's order"
    running: set[str] = set()
    most_shared = 0
    for line in toy_log():
        name, what, _ = line.split()
        running = running | {name} if what == "start" else running - {name}
        if "_x" in name:
            assert running <= {name}
        most_shared = max(most_shared, len(running))
    assert most_shared == 2
    assert starts(toy_log())[3:] == ["slow_x1", "slow_x2"]


def test_interrupted_reproduction_resumes_and_a_finished_one_starts_anew(toy_log: Log, tmp_path: Path) -> None:
    claims = table("pass", "pass2", "gated")
    (tmp_path / "gate").touch()

    def interrupt(entry: Entry) -> None:
        if entry.id == "toy.pass2":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runner.reproduce(claims=claims, budget="smoke", workers=1, on_entry=interrupt)
    (tmp_path / "gate").unlink()
    seen: list[str] = []
    report = runner.reproduce(claims=claims, budget="smoke", workers=1, on_entry=lambda entry: seen.append(entry.id))
    assert set(verdicts(report).values()) == {"PASS"}
    assert seen == ["toy.pass", "toy.pass2", "toy.gated"]
    assert starts(toy_log()).count("pass") == starts(toy_log()).count("pass2") == 1
    before = len(starts(toy_log()))
    runner.reproduce(claims=claims, budget="smoke", workers=1)
    assert len(starts(toy_log())) == before + 3


def test_other_budget_or_source_does_not_resume(toy_log: Log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(entry: Entry) -> None:
        raise KeyboardInterrupt

    (tmp_path / "gate").touch()
    with pytest.raises(KeyboardInterrupt):
        runner.reproduce(claims=table("pass", "gated"), budget="smoke", workers=1, on_entry=interrupt)
    (tmp_path / "gate").unlink()
    runner.reproduce(claims=table("pass", "gated"), budget="quick", workers=1)
    assert starts(toy_log()).count("pass") == 2
    monkeypatch.setattr(runner, "source_digest", lambda: "other")
    runner.reproduce(claims=table("pass", "gated"), budget="smoke", workers=1)
    assert starts(toy_log()).count("pass") == 3


def test_other_package_versions_do_not_resume(toy_log: Log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(entry: Entry) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runner.reproduce(claims=table("pass", "pass2"), budget="smoke", workers=1, on_entry=interrupt)
    monkeypatch.setattr(runner, "versions", lambda: {"torch": "other"})
    n_starts = len(starts(toy_log()))
    runner.reproduce(claims=table("pass", "pass2"), budget="smoke", workers=1)
    assert starts(toy_log())[n_starts:] == ["pass", "pass2"]


def test_selection_keeps_the_whole_table(toy_log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    claims = table("pass", "miss", "few")
    report = runner.reproduce(claims=claims, only=["toy.miss"], budget="smoke", workers=1)
    assert verdicts(report) == {"pass": "NOT RUN", "miss": "MISS", "few": "NOT RUN"}
    report = runner.reproduce(claims=claims, only=["toy.few"], budget="smoke", workers=1)
    assert verdicts(report) == {"pass": "NOT RUN", "miss": "MISS", "few": "NOT CLAIMED"}, "measured by this source"
    monkeypatch.setattr(runner, "source_digest", lambda: "other")
    report = runner.reproduce(claims=claims, only=["toy.pass"], budget="smoke", workers=1)
    assert verdicts(report) == {"pass": "PASS", "miss": "NOT RUN", "few": "NOT RUN"}, "other code measured those"
    monkeypatch.setattr(runner, "versions", lambda: {"torch": "other"})
    report = runner.reproduce(claims=claims, only=["toy.few"], budget="smoke", workers=1)
    assert verdicts(report) == {"pass": "NOT RUN", "miss": "NOT RUN", "few": "NOT CLAIMED"}, "other packages did"


def test_cost_zero_is_not_run(toy_log: Log) -> None:
    report = runner.reproduce(claims=table("pass", cost=0.0), budget="smoke")
    assert verdicts(report) == {"pass": "NOT RUN"}
    assert not toy_log()


def test_any_executor(toy_log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    with ThreadPoolExecutor(2) as pool:
        report = runner.reproduce(claims=table("pass", "raise", "miss"), budget="smoke", executor=pool)
        assert verdicts(report) == {"pass": "PASS", "raise": "ERROR", "miss": "MISS"}
        assert pool.submit(int, "3").result() == 3, "left open"
    with ProcessPoolExecutor(1) as processes:
        report = runner.reproduce(claims=table("crash"), budget="smoke", executor=processes)
    assert verdicts(report) == {"crash": "ERROR"}


def test_a_foreign_executor_cannot_hang_the_run(toy_log: Log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "deadline_s", lambda claim, budget: 0.3)
    (tmp_path / "gate").touch()
    with ThreadPoolExecutor(1) as pool:
        report = runner.reproduce(claims=table("gated"), budget="smoke", executor=pool)
        (tmp_path / "gate").unlink()
    assert verdicts(report) == {"gated": "ERROR"}
    assert "deadline" in report.entries[0].note


def test_progress_reaches_the_caller(toy_log: Log) -> None:
    seen: list[tuple[str, float, str]] = []
    lock = threading.Lock()

    def on_progress(name: str, fraction: float, text: str) -> None:
        with lock:
            seen.append((name, fraction, text))

    runner.reproduce(claims=table("pass"), budget="smoke", on_progress=on_progress)
    assert seen == [("toy.pass", 0.5, "half")]


def test_rows_are_in_the_store(toy_log: Log) -> None:
    with RunStore() as store:
        runner.reproduce(claims=table("pass", "raise"), budget="smoke", store=store, workers=1)
        rows = store.runs(kind="claim")
    assert {row.name: row.metrics["verdict"] for row in rows} == {"toy.pass": "PASS", "toy.raise": "ERROR"}
    assert all(row.versions["torch"] for row in rows)


def test_two_at_once_are_refused(toy_log: Log) -> None:
    with RunStore() as store, store.lock("reproduction"), pytest.raises(InputError, match="no other reproduction"):
        runner.reproduce(claims=table("pass"), budget="smoke")


def test_bad_input(toy_log: Log) -> None:
    with pytest.raises(InputError, match="only = 'to'"):
        runner.reproduce(claims=table("pass"), only=["to"])
    with pytest.raises(InputError, match="budget"):
        runner.reproduce(claims=table("pass"), budget="huge")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="workers"):
        runner.reproduce(claims=table("pass"), budget="smoke", workers=0)
