"""Run claims: in parallel, isolated from each other, each under a deadline, and never twice.

Claims share a pool of single-threaded processes; `exclusive` ones (timings) run one by one after it has drained.  A
claim that raises, dies or passes its deadline becomes an ERROR row and the others go on.  Each finished row is in the
run store before the next is waited for, so an interrupted reproduction, called again with the same budget, selection,
source and package versions, continues where it stopped; a finished one starts anew.
"""

from __future__ import annotations

import hashlib
import importlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import get_args

from commissure.core.errors import InputError
from commissure.experiments.claims import CLAIMS, Budget, Claim, Context, Outcome, Verdict
from commissure.report.page import check_figure
from commissure.report.results import Entry, Report, entry_from_json, entry_to_json
from commissure.runs import (
    DeadlineExceeded,
    IsolatedExecutor,
    Migration,
    Run,
    RunStore,
    cores,
    git_state,
    machine,
    notify,
    source_digest,
    versions,
)

__all__ = ["deadline_s", "reproduce", "select"]

OnProgress = Callable[[str, float, str], None]
OnEntry = Callable[[Entry], None]

_MIGRATIONS: tuple[Migration, ...] = (
    (
        "CREATE TABLE reproductions (id INTEGER PRIMARY KEY, key TEXT NOT NULL, n_claims INTEGER NOT NULL) STRICT",
        """CREATE TABLE reproduction_rows (
            reproduction_id INTEGER NOT NULL REFERENCES reproductions (id), claim_id TEXT NOT NULL,
            run_id INTEGER NOT NULL REFERENCES runs (id), PRIMARY KEY (reproduction_id, claim_id)
        ) STRICT""",
    ),
)


def deadline_s(claim: Claim, budget: Budget) -> float:
    """Wall seconds a claim may take: a minute and ten times its cost, so that a busy machine never trips it.

    >>> deadline_s(CLAIMS[0], "quick")
    110.0
    """
    return 60.0 + 10.0 * claim.cost.at(budget)


def select(claims: Sequence[Claim], only: Iterable[str]) -> tuple[Claim, ...]:
    """The claims named in `only`, all when it is empty; 'decode' selects every claim whose id begins with 'decode.'.

    >>> [claim.id for claim in select(CLAIMS, ["bridges"])]
    ['bridges.least_squares']
    """
    chosen: set[str] = set()
    for name in only:
        found = {claim.id for claim in claims if claim.id == name or claim.id.startswith(f"{name}.")}
        if not found:
            raise InputError(
                "only", name, f"one of {', '.join(claim.id for claim in claims)}, or the part before a dot"
            )
        chosen |= found
    return tuple(claim for claim in claims if not chosen or claim.id in chosen)


def reproduce(
    *,
    claims: Sequence[Claim] = CLAIMS,
    only: Sequence[str] = (),
    budget: Budget = "quick",
    workers: int | None = None,
    executor: Executor | None = None,
    store: RunStore | None = None,
    on_progress: OnProgress | None = None,
    on_entry: OnEntry | None = None,
) -> Report:
    """Measure the selected claims and return the report on the whole table.

    Claims outside the selection appear with the row that this very source and these package versions last gave them at
    this budget, else as NOT RUN.  `executor` (any `concurrent.futures.Executor`; it is left open) replaces the process
    pool: crashes are then isolated as well as it isolates them, and a deadline ends the waiting, not the work.
    `on_progress(id, fraction, text)` may be called from other threads; `on_entry` gets each finished entry, resumed
    ones included.
    """
    if budget not in get_args(Budget):
        raise InputError("budget", budget, f"one of {', '.join(get_args(Budget))}")
    selected = select(claims, only)
    with ExitStack() as stack:
        store = store if store is not None else stack.enter_context(RunStore())
        stack.enter_context(store.lock("reproduction"))
        journal = _Journal.open(store, selected, budget)
        entries: dict[str, Entry] = {}
        for entry in _measured(selected, budget, journal, executor, workers, on_progress):
            entries[entry.id] = entry
            if on_entry is not None:
                on_entry(entry)
        rest = [claim for claim in claims if claim.id not in entries]
        entries |= {claim.id: journal.latest(claim) or _empty(claim, "NOT RUN") for claim in rest}
    git = git_state()
    return Report(
        budget=budget,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        commit=f"{git['commit']}{' (altered)' if git['dirty'] else ''}" if git else "",
        machine=machine(),
        versions=versions(),
        entries=tuple(entries[claim.id] for claim in claims),
    )


def _measured(
    selected: Sequence[Claim],
    budget: Budget,
    journal: _Journal,
    executor: Executor | None,
    workers: int | None,
    on_progress: OnProgress | None,
) -> Iterator[Entry]:
    """Entries as they finish: those already in the journal, the shared claims, then the exclusive ones alone."""
    done = journal.entries()
    yield from done.values()
    todo = []
    for claim in selected:
        if claim.id in done:
            continue
        if claim.cost.at(budget) > 0:
            todo.append(claim)
        else:
            yield journal.write(claim, _empty(claim, "NOT RUN", note=f"not run at budget {budget}"))
    if not todo:
        return
    # The longest first: none is left to run alone at the end.
    shared = sorted((claim for claim in todo if not claim.exclusive), key=lambda claim: -claim.cost.at(budget))
    batches = [shared, *([claim] for claim in todo if claim.exclusive)]
    with ExitStack() as stack:
        if executor is None:
            lanes = workers if workers is not None else min(cores(), len(todo))
            executor = stack.enter_context(IsolatedExecutor(lanes, on_notice=on_progress))
        for batch in batches:
            for finished in _run_batch(batch, budget, executor):
                yield from [journal.write(claim, entry) for claim, entry in finished]  # all kept before any is shown


def _run_batch(batch: Sequence[Claim], budget: Budget, executor: Executor) -> Iterator[list[tuple[Claim, Entry]]]:
    """What finished since the last wait, in the order of the batch, until nothing is left."""
    limits = {claim.id: deadline_s(claim, budget) for claim in batch}
    begin = time.monotonic()
    pending: dict[Future, Claim] = {}
    for claim in batch:
        if isinstance(executor, IsolatedExecutor):
            future = executor.submit_within(limits[claim.id], claim.id, _measure, claim, budget)
        else:
            future = executor.submit(_measure, claim, budget)
        pending[future] = claim
    # a foreign executor may run one claim at a time, so only the sum of the deadlines bounds the last one
    end = None if isinstance(executor, IsolatedExecutor) else begin + sum(limits.values())
    while pending:
        left = None if end is None else max(0.0, end - time.monotonic())
        finished, _ = wait(pending, timeout=left, return_when=FIRST_COMPLETED)
        if not finished:
            finished = set(pending)
            for future in finished:
                future.cancel()
        waited = time.monotonic() - begin
        done = [(future, claim) for future, claim in pending.items() if future in finished]
        pending = {future: claim for future, claim in pending.items() if future not in finished}
        yield [(claim, _entry(claim, future, limits[claim.id], waited)) for future, claim in done]


def _measure(claim: Claim, budget: Budget) -> Entry:
    """In the worker: the entry with its wall and CPU seconds, the imports included."""
    wall, cpu = time.perf_counter(), time.process_time()
    module = importlib.import_module(claim.module)
    outcome = module.run(Context(budget, claim, notify))
    if not isinstance(outcome, Outcome):
        raise InputError(f"{claim.module}.run", type(outcome).__name__, "an Outcome")
    check_figure(outcome.figure)  # here it costs one row, in the report it would cost them all
    if outcome.verdict in ("PASS", "MISS"):  # the gate decides, not the module
        outcome = replace(outcome, verdict=claim.judge(outcome.rows, outcome.n_seeds))
    entry = replace(
        _empty(claim, outcome.verdict, note=outcome.note, wall_s=time.perf_counter() - wall),
        rows=outcome.rows,
        n_seeds=outcome.n_seeds,
        data=outcome.data,
        figure=outcome.figure,
        cpu_s=time.process_time() - cpu,
    )
    return entry_from_json(entry_to_json(entry))  # what the report cannot hold costs this row, not the reproduction


def _entry(claim: Claim, future: Future, limit: float, waited: float) -> Entry:
    if future.cancelled() or not future.done():
        return _empty(claim, "ERROR", note=f"deadline: not finished after {waited:.0f} s", wall_s=waited)
    error = future.exception()
    if isinstance(error, DeadlineExceeded):
        return _empty(claim, "ERROR", note=f"deadline: not finished {limit:.0f} s after its start", wall_s=limit)
    if error is not None:
        trace = "\n".join(getattr(error, "__notes__", ()))
        return _empty(claim, "ERROR", note=f"{type(error).__name__}: {error}", trace=trace, wall_s=waited)
    return future.result()


def _empty(claim: Claim, verdict: Verdict, *, note: str = "", trace: str = "", wall_s: float = 0.0) -> Entry:
    about = (claim.id, claim.paper, claim.statement, claim.quoted, claim.gate)
    return Entry(*about, verdict, note=note, trace=trace, wall_s=wall_s)


@dataclass(frozen=True)
class _Journal:
    """The rows of one reproduction in the run store."""

    store: RunStore
    number: int
    budget: Budget

    @classmethod
    def open(cls, store: RunStore, selected: Sequence[Claim], budget: Budget) -> _Journal:
        """The unfinished reproduction of the same budget, selection, source and versions, else a new one."""
        store.migrate("experiments", _MIGRATIONS)
        key = hashlib.sha256(repr((budget, selected, source_digest(), versions())).encode()).hexdigest()
        unfinished = store.query(
            """SELECT id FROM reproductions AS r WHERE key = ? AND n_claims >
               (SELECT count(*) FROM reproduction_rows WHERE reproduction_id = r.id) ORDER BY id DESC LIMIT 1""",
            (key,),
        )
        if unfinished:
            return cls(store, unfinished[0][0], budget)
        with store.transaction() as connection:
            values = (key, len(selected))
            number = connection.execute("INSERT INTO reproductions (key, n_claims) VALUES (?, ?)", values).lastrowid
        assert number is not None
        return cls(store, number, budget)

    def entries(self) -> dict[str, Entry]:
        rows = self.store.query(
            "SELECT claim_id, run_id FROM reproduction_rows WHERE reproduction_id = ? ORDER BY run_id", (self.number,)
        )
        return {claim: entry_from_json(self.store.run(run).metrics["entry"]) for claim, run in rows}

    def write(self, claim: Claim, entry: Entry) -> Entry:
        run = Run(
            "claim",
            claim.id,
            self._config(claim),
            wall_s=entry.wall_s,
            cpu_s=entry.cpu_s,
            metrics={"verdict": entry.verdict, "entry": entry_to_json(entry)},
            versions=versions(),
            git=git_state(),
        )
        with self.store.transaction() as connection:
            number = self.store.add(run)
            connection.execute("INSERT INTO reproduction_rows VALUES (?, ?, ?)", (self.number, claim.id, number))
        return entry

    def latest(self, claim: Claim) -> Entry | None:
        """The newest entry this very source, with these versions, gave a claim at this budget."""
        digest = Run("claim", claim.id, self._config(claim)).config_digest
        rows = self.store.query(
            "SELECT max(id) FROM runs WHERE kind = 'claim' AND name = ? AND config_digest = ?", (claim.id, digest)
        )
        return None if rows[0][0] is None else entry_from_json(self.store.run(rows[0][0]).metrics["entry"])

    def _config(self, claim: Claim) -> dict[str, object]:
        return {"budget": self.budget, "claim": repr(claim), "source": source_digest(), "versions": versions()}
