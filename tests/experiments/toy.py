"""Claims that pass, miss, raise, die or hang, for the tests of the runner; what ran when goes to $TOY_LOG."""

from __future__ import annotations

import os
import signal
import time

from commissure.experiments.claims import Bound, Claim, Context, Cost, Outcome, Row


def claim(name: str, *, exclusive: bool = False, cost: float = 1.0, min_seeds: int = 3) -> Claim:
    gate = (Bound("x", at_least=1.0),)
    return Claim(
        f"toy.{name}", "no paper", f"a claim that does {name}", "1 ± 0", gate, Cost(cost, cost, cost), "toy", min_seeds,
        exclusive,
    )  # fmt: skip


def run(ctx: Context) -> Outcome:
    name = ctx.claim.id.removeprefix("toy.")
    log(f"{name} start {os.getpid()}")
    ctx.progress(0.5, "half")
    value, n_seeds = 2.0, 3
    if name.startswith("crash"):
        os._exit(7)
    if name.startswith("segfault"):
        os.kill(os.getpid(), signal.SIGSEGV)
    if name.startswith("raise"):
        raise ValueError("a broken experiment")
    if name.startswith("hang"):
        time.sleep(120)
    if name.startswith("slow"):
        time.sleep(0.4)
    if name.startswith("gated"):  # waits until the test removes the file
        while os.path.exists(os.environ["TOY_GATE"]):
            time.sleep(0.02)
    if name.startswith("miss"):
        value = 0.5
    if name.startswith("few"):
        n_seeds = 2
    if name.startswith("verdict"):
        return Outcome((), "GREAT")  # type: ignore[arg-type]
    if name.startswith("nonote"):
        return Outcome((), "NOT RUN", note=None)  # type: ignore[arg-type]
    if name.startswith("surrogate"):
        return Outcome((), "NOT RUN", note="a file named \udcff")
    if name.startswith("print"):
        print("noise on stdout")
    if name.startswith("nothing"):
        return None  # type: ignore[return-value]
    log(f"{name} stop {os.getpid()}")
    figure = "<svg><script></script></svg>" if name.startswith("figure") else None
    rows = (Row("x", "the number", value, value - 0.1, value + 0.1),)
    return Outcome(rows, "PASS", n_seeds=n_seeds, data="toy data", figure=figure)


def log(line: str) -> None:
    if "TOY_LOG" in os.environ:
        with open(os.environ["TOY_LOG"], "a") as file:
            file.write(line + "\n")
