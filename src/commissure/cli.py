"""The command line: a table of lazy dotted commands, and the exit codes every command shares.

Exit codes: 0 ran; 1 a MISS under `reproduce --strict`; 2 bad input; 3 failure or an ERROR row; 130 Ctrl-C, with what is
finished kept.  Results go to stdout, progress and errors to stderr.  A command's module is imported when it is called.
Under torchrun one process a machine says what is wrong with the input.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence

from cyclopts import App, CycloptsError

import commissure
from commissure.core.errors import CommissureError, InputError

__all__ = ["app", "main"]

COMMANDS = {
    "data": ("commissure.datasets.cli:app", "Real data by name: list, get."),
    "decode": ("commissure.decode.cli:app", "Decode behavior from spikes: simulate, fit, eval, stream, bench."),
    "env": ("commissure.runs.cli:env", "Versions, backend, device, threads, folders."),
    "geometry": ("commissure.geometry.cli:app", "What phase a training run is in: trace, phases, bench, show."),
    "mesa": ("commissure.mesa.cli:app", "The mesa layer: fit, eval, bench, show."),
    "metahmm": ("commissure.metahmm.cli:app", "Distance to the Bayes optimum in context: fit, eval, bench, show."),
    "reproduce": ("commissure.experiments.cli:reproduce", "Measure the claims; print the table, write the report."),
    "reservoirs": ("commissure.reservoirs.cli:app", "What a network computes: eval, bench, show, null."),
}

# How long the other processes of torchrun leave the word to the first.  They have the same arguments, hence the same
# error, and torchrun ends them as soon as the first has ended; who is still here then has an error of its own.
WAIT_S = 10.0

app = App(
    name="commissure",
    help="Published NeuroAI systems as one fast, exact, tested PyTorch library.",
    version=commissure.__version__,
    result_action="return_value",
    suppress_keyboard_interrupt=False,
)
for _name, (_path, _help) in COMMANDS.items():
    app.command(_path, name=_name, help=_help)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (default `sys.argv`) and return its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    is_first = "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        return _run(arguments, is_first)
    except KeyboardInterrupt:
        print("commissure: interrupted; what was finished is kept", file=sys.stderr)  # noqa: T201
        return 130


def _run(arguments: Sequence[str], is_first: bool) -> int:
    try:
        _check_command(arguments)
        code = app(arguments, exit_on_error=False, print_error=is_first)
    except (CycloptsError, InputError) as error:
        if not is_first:
            _wait_for_the_first()
        if not is_first or isinstance(error, InputError):  # the others of the first are printed by cyclopts
            print(f"commissure: {error}", file=sys.stderr)  # noqa: T201
        return 2
    except CommissureError as error:
        print(f"commissure: {type(error).__name__}: {error}", file=sys.stderr)  # noqa: T201
        return 3
    except Exception:
        traceback.print_exc()
        return 3
    return code if isinstance(code, int) else 0


def _wait_for_the_first() -> None:
    """Until torchrun ends this process, with the exit code of bad input, or until the first had time enough."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(2))
    try:
        time.sleep(WAIT_S)
    finally:
        signal.signal(signal.SIGTERM, before)


def _check_command(arguments: Sequence[str]) -> None:
    """Refuse a wrong command before cyclopts does: it would import every organ for its message."""
    if arguments and not arguments[0].startswith("-") and arguments[0] not in COMMANDS:
        raise InputError("command", arguments[0], f"one of {', '.join(COMMANDS)}", "commissure --help describes them")


if __name__ == "__main__":
    sys.exit(main())
