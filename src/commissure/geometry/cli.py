"""`commissure geometry`: trace, phases, bench, show."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter

from commissure.core.errors import InputError
from commissure.core.files import check_target
from commissure.core.options import whole

__all__ = ["app"]

app = App(
    name="geometry", help="What phase is my training run in?  Effective ranks of representations, by site and step."
)

Flag = Annotated[bool, Parameter(negative="")]
Json = Annotated[bool, Parameter(name="--json", negative="", help="Print JSON.")]
Whole = Annotated[int, Parameter(converter=whole)]
Several = Parameter(consume_multiple=True, negative="")
# Copies of what the modules have: importing them takes torch, hence seconds, also for --help.
Pooling = Literal["last", "first", "mean", "all"]
Poolings = Annotated[tuple[Pooling, ...], Several, Parameter(help="Which tokens are samples.")]
Sites = Annotated[tuple[str, ...], Several, Parameter(help="Names or patterns of modules; default blocks, last norms.")]
Revisions = Annotated[
    tuple[str, ...], Several, Parameter(help="STEP=NAME of checkpoints: subfolders of a folder, revisions at a hub.")
]
Window = Annotated[
    tuple[str, ...], Several, Parameter(help="Ranks to fit alpha on, first and last, or auto: to where noise begins.")
]
Figure = Annotated[Path | None, Parameter(help="Figure to write (.svg).")]
Report = Annotated[Path | None, Parameter(help="Report to write (.json).")]

_MOST_TURNS = 10**4
_ROUGH = 8  # folds; with fewer an error is known to within a factor of 1.3 or worse
# What an option is called in the functions that read it.
_OPTIONS = {"n_folds": "folds", "texts": "text"}


@app.command
def trace(
    model: str,
    /,
    *,
    text: str,
    sites: Sites = (),
    pooling: Poolings = ("last",),
    revisions: Revisions = (),
    n: Whole = 10_000,
    max_length: Whole = 128,
    min_length: Whole = 2,
    batch_size: Whole = 32,
    folds: Whole = 2,
    skip: Whole = 0,
    fit_range: Window = ("11", "100"),
    workers: Annotated[Whole | None, Parameter(help="Processes, 0: none but this one.")] = 0,
    out: Report = None,
    as_json: Json = False,
) -> int:
    """Trace a Hugging Face model over a text; print RankMe, alpha and others of every site, in both frames.

    Checkpoints that were traced before, on the same text, are not run again.  A checkpoint that fails is told, the
    others go on, and the exit code is 3.

    Parameters
    ----------
    model
        A folder, or a name at the hub; weights as safetensors.
    text
        A UTF-8 file, one sequence a line, or wikitext2.
    n
        Sequences at most.
    max_length
        Tokens of a sequence at most; shorter ones are padded and masked.
    min_length
        Tokens of a sequence at least.
    folds
        16 for errors, 2 for the correction alone.
    skip
        Leading tokens that "mean" and "all" leave out.
    """
    from commissure.geometry.checkpoints import CheckpointSweep
    from commissure.geometry.pretrained import PretrainedCheckpoints, text_batches
    from commissure.geometry.saved_report import plain_row, write_report
    from commissure.runs import RunStore

    _check_out(out, ".json")
    window, checkpoints = _window(fit_range), _checkpoints(model, revisions)
    lines, load = _texts(text), PretrainedCheckpoints(model)
    tokenizer, found_sites = _opened(load, list(checkpoints.values()), sites)
    with _named_as_options():
        batches = text_batches(
            lines, tokenizer, n=n, min_length=min_length, max_length=max_length, batch_size=batch_size
        )
        sweep = CheckpointSweep(checkpoints=checkpoints, load=load, batches=batches, sites=found_sites,
                                pooling=pooling, n_folds=folds, skip=skip)  # fmt: skip
    sequences = sum(len(batch["input_ids"]) for batch in batches)
    if sequences < 2 and set(pooling) != {"all"}:
        raise InputError("text", text, f"2 sequences of {min_length} tokens at least", "one a line; see --n")
    with RunStore() as store:
        found = sweep.run(store=store, workers=workers)
        rows = [plain_row(row) for row in found.trajectory_of(fit_range=window).rows]
    about = {"model": model, "text": text, "sequences": sequences}
    told = {**about, "rows": rows, "failed": [one._asdict() for one in found.failed], "missing": found.missing}
    if out is not None:
        write_report(out, told)
    if as_json:
        _print(json.dumps(told))
    else:
        _print_rows(rows, several=len(checkpoints) > 1, folds=folds)
        for one in found.failed:
            _print(f"step {one.step}: {one.revision} failed: {one.error}")
    return 130 if found.missing else 3 if found.failed else 0


@app.command
def phases(
    file: Path,
    /,
    *,
    site: str | None = None,
    pooling: Pooling = "last",
    frame: Literal["raw", "unit"] = "raw",
    step: str = "step",
    rank: str = "rankme",
    stderr: str | None = None,
    alpha: str | None = None,
    out: Figure = None,
    as_json: Json = False,
) -> None:
    """Find the phases of a training run in a table of ranks; print where they turn and how sure that is.

    Parameters
    ----------
    file
        A report of trace (.json), or a table with a header (.csv).
    site
        Of a report: which; default the last.
    pooling
        Of a report.
    frame
        Of a report: rows as they are, or directions alone.
    step
        Of a table: the column of steps (or tokens).
    rank
        The column of ranks.
    stderr
        The column of their errors; default rankme_stderr, where there is one.
    alpha
        The column of decay exponents; default alpha, where there is one.
    """
    from commissure.geometry.saved_report import read_series, read_trajectory
    from commissure.geometry.show import draw_trajectory, phases_of

    _check_out(out, ".svg")
    if file.suffix == ".json":
        trajectory = read_trajectory(file)
        named = site or trajectory.rows[-1].geometry.site
        series = trajectory.series(named, pooling=pooling, frame=frame)
    else:
        named, series = rank, read_series(file, step=step, rank=rank, stderr=stderr, alpha=alpha)
    found = phases_of(series)
    if out is not None:
        _draw(out, (8.0, 5.0), lambda figure: draw_trajectory(figure, {named: series}, x_label=f"1 + {step}"))
    if as_json:
        _print(json.dumps({"file": str(file), "phases": [asdict(phase) for phase in found]}))
        return
    _print(f"{'phase':20} {'from':>12} {'to':>12}  {'rank times':>10}  turns within")
    for phase in found:
        ratio = f"{math.exp(phase.change):.3g}"
        low, high = phase.ends
        _print(f"{phase.kind:20} {phase.start:12g} {phase.stop:12g}  {ratio:>10}  {low:g} to {high:g}")
    if any(phase.kind == "undetermined" for phase in found):
        _print("\nundetermined: alpha moves with the rank, not against it; try another window of ranks")


@app.command
def bench(*, full: Flag = False, repeats: Whole = 3, as_json: Json = False) -> None:
    """Time metrics, tracing and segmentation against other ways to do them; print ratios with their ranges.

    Parameters
    ----------
    full
        20,000 rows of 2,048 components too, which takes some ten minutes.
    repeats
        Turns of each contender.
    """
    from commissure.geometry.bench import run_bench

    if not 1 <= repeats <= _MOST_TURNS:
        raise InputError("repeats", repeats, f"an integer from 1 to {_MOST_TURNS}")
    rows = run_bench(full=full, repeats=repeats)
    if as_json:
        _print(json.dumps({"rows": [asdict(row) for row in rows]}))
        return
    _print(f"{'part':15} {'size':16} {'dtype':8} {'ours':>12}  {'rival':24} {'ratio':>22} {'differs by':>11}")
    for row in rows:
        ratio = f"{row.ratio.median:.3g} [{row.ratio.low:.3g}, {row.ratio.high:.3g}]"
        _print(f"{row.part:15} {row.size:16} {row.dtype:8} {row.ours:9.4g} {row.unit:2}  {row.rival:24} {ratio:>22} "
               f"{row.difference:11.0e}")  # fmt: skip
    _print("\nratio: the rival's over ours (RankMe + alpha, memory, phases); over the forward pass alone (trace)")


@app.command
def show(
    file: Path,
    /,
    *,
    out: Annotated[Path, Parameter(help="Figure to write (.svg).")],
    kind: Literal["trajectory", "layers"] = "trajectory",
    site: str | None = None,
    pooling: Pooling = "last",
    as_json: Json = False,
) -> None:
    """Draw a report of trace: one site over the steps with its phases, or all layers at once.

    Parameters
    ----------
    file
        The report (.json).
    kind
        trajectory: RankMe and alpha of one site, raw and unit rows; layers: RankMe of every site and step.
    site
        Of a trajectory: which; default the last.
    """
    from commissure.geometry.saved_report import read_trajectory
    from commissure.geometry.show import draw_heat_map, draw_trajectory

    _check_out(out, ".svg")
    trajectory = read_trajectory(file)
    if kind == "layers":
        drawn = list(dict.fromkeys(row.geometry.site for row in trajectory.rows if row.geometry.pooling == pooling))
        _draw(out, (9.0, 2.0 + 0.3 * len(drawn)), lambda figure: draw_heat_map(figure, trajectory, pooling=pooling))
    else:
        named = site or trajectory.rows[-1].geometry.site
        series = {f"{named}, rows as they are": trajectory.series(named, pooling=pooling)}
        if any(row.geometry.frame == "unit" for row in trajectory.rows):
            series[f"{named}, unit rows"] = trajectory.series(named, pooling=pooling, frame="unit")
        _draw(out, (1.0 + 4.5 * len(series), 5.0), lambda figure: draw_trajectory(figure, series))
        drawn = [named]
    told = {"out": str(out), "kind": kind, "pooling": pooling, "sites": drawn,
            "steps": sorted({row.step for row in trajectory.rows})}  # fmt: skip
    _print(json.dumps(told) if as_json else f"{out}: {kind} of {', '.join(drawn)}, {len(told['steps'])} steps")


def _checkpoints(model: str, given: Sequence[str]) -> dict[int, str]:
    if not given:
        return {0: "." if Path(model).is_dir() else "main"}
    found: dict[int, str] = {}
    for one in given:
        step, equals, name = one.partition("=")
        if not equals or not step.isdecimal() or not name:
            raise InputError("revisions", one, "STEP=NAME, such as 1000=step1000")
        if int(step) in found:
            raise InputError("revisions", one, "another step for each")
        found[int(step)] = name
    return found


def _texts(text: str) -> list[str]:
    if text == "wikitext2":
        from commissure.datasets.text import wikitext2

        found = wikitext2("valid").text
    else:
        path = Path(text)
        try:
            found = path.read_text(encoding="utf-8-sig")
        except OSError as error:
            raise InputError("text", text, "a file that can be read, or wikitext2", error.strerror or "") from None
        except UnicodeDecodeError as error:
            raise InputError("text", text, f"UTF-8 ({error.reason} at byte {error.start})") from None
    return [line.strip() for line in found.splitlines() if line.strip()]


def _opened(load: Any, revisions: Sequence[str], sites: Sequence[str]) -> tuple[Any, Sequence[str]]:
    """The tokenizer, and the sites: of the first checkpoint that has them, for others may be broken."""
    from commissure.geometry.pretrained import default_sites
    from commissure.geometry.tracing import resolve

    if len(revisions) == 1 and Path(load.source).is_dir():
        folder = Path(load.source) / revisions[0]
        if folder.is_dir() and next(folder.glob("*.safetensors"), None) is None:
            below = sorted({path.parent.name for path in folder.glob("*/*.safetensors")})
            fix = (
                f"--revisions 0={below[0]} for its folders {', '.join(below)}"
                if below
                else "save_pretrained writes them"
            )
            raise InputError("model", str(folder), "a folder with weights as safetensors", fix)
    model = _first_that_opens(load.source, load.outline, revisions)
    found = tuple(resolve(model, sites)) if sites else default_sites(model)
    return _first_that_opens(load.source, load.tokenizer, revisions), found


def _first_that_opens(source: str, read: Any, revisions: Sequence[str]) -> Any:
    from commissure.core.errors import BackendMissing

    first: Exception | None = None
    for revision in revisions:
        try:
            return read(revision)
        except BackendMissing:
            raise
        except Exception as error:  # transformers raises many kinds
            first = first or error
    if isinstance(first, InputError):
        raise first
    fix = "" if first is None else f"{type(first).__name__}: {_first_line(first)}"
    raise InputError("model", source, "a folder or a hub's name with a model and its tokenizer", fix)


def _window(given: Sequence[str]) -> tuple[int, int] | Literal["auto"]:
    if tuple(given) == ("auto",):
        return "auto"
    if len(given) != 2 or not all(end.isascii() and end.isdecimal() for end in given):
        raise InputError("fit_range", " ".join(given), "two ranks, first and last, or auto", "such as 11 100")
    first, last = map(int, given)
    if not 1 <= first < last:
        raise InputError("fit_range", " ".join(given), "two ranks, 1 <= first < last, or auto", "such as 11 100")
    return first, last


@contextmanager
def _named_as_options() -> Iterator[None]:
    """Errors name the option that was typed, not the argument it became."""
    try:
        yield
    except InputError as error:
        raise InputError(_OPTIONS.get(error.argument, error.argument), error.value, error.allowed, error.fix) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _print_rows(rows: Sequence[dict[str, Any]], *, several: bool, folds: int) -> None:
    width = max([4, *(len(row["site"]) for row in rows)])
    columns = (
        ("rankme", 9, 2),
        ("rankme_stderr", 8, 2),
        ("rankme_corrected", 9, 2),
        ("top_share", 9, 3),
        ("alpha", 6, 2),
    )
    head = f"{'step':>9}  " if several else ""
    _print(f"{head}{'site':{width}}  {'tokens':6} {'rows':5} {'N':>7} {'dim':>5} {'RankMe':>9} {'error':>8} "
           f"{'corrected':>9} {'top share':>9} {'alpha':>6}")  # fmt: skip
    for row in rows:
        step = f"{row['step']:9}  " if several else ""
        place = f"{row['site']:{width}}  {row['pooling']:6} {row['frame']:5} {row['n_samples']:7} {row['dim']:5}"
        _print(f"{step}{place} " + " ".join(_cell(row[name], *shape) for name, *shape in columns))
    if any(row["n_samples"] < row["dim"] for row in rows):
        _print("\nfewer samples than components: these ranks are far too low; take more text")
    if rows and folds < _ROUGH:
        _print(f"\nerrors of {folds} folds are rough; --folds 16 for better ones" if folds > 1 else
               "\none fold has neither errors nor corrections; see --folds")  # fmt: skip


def _cell(value: float | None, width: int, digits: int) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:{width}.{digits}f}"


def _draw(out: Path, size: tuple[float, float], draw: Any) -> None:
    from matplotlib.figure import Figure as Empty

    from commissure.core.files import replacing

    figure = Empty(figsize=size, layout="constrained")
    draw(figure)
    try:
        with replacing(out) as partial:
            figure.savefig(partial, format="svg")
    except OSError as error:
        raise InputError("out", str(out), "a place that can be written", error.strerror or str(error)) from error


def _check_out(out: Path | None, suffix: str) -> None:
    """Before the work, not after it."""
    if out is None:
        return
    try:
        check_target(out, "out")
    except OSError as error:
        raise InputError("out", str(out), "a place that can be written", error.strerror or str(error)) from error
    if out.suffix != suffix:
        raise InputError("out", str(out), f"a name ending in {suffix}", f"pass {out.with_suffix(suffix)}")
    if not os.access(out.parent, os.W_OK | os.X_OK):
        raise InputError("out", str(out), "a place that can be written", f"{out.parent} cannot be")


def _print(text: str) -> None:
    sys.stdout.write(text + "\n")
