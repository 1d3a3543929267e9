"""`commissure reservoirs`: eval, bench, show, null."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter

from commissure.core.errors import InputError
from commissure.core.files import check_target
from commissure.core.options import whole

__all__ = ["app"]

app = App(
    name="reservoirs", help="What does this network compute?  Tasks, nulls and figures of connectomes and models."
)

Flag = Annotated[bool, Parameter(negative="")]
Json = Annotated[bool, Parameter(name="--json", negative="", help="Print JSON.")]
Whole = Annotated[int, Parameter(converter=whole)]
Several = Parameter(consume_multiple=True, negative="")
# Copies of what the modules have: importing them takes torch, hence seconds, also for --help.
Orientation = Literal["source_target", "target_source"]
Preserve = Literal["degree", "degree+modules", "degree+levels"]

_Whole = Parameter(converter=whole)
_NETWORK = (
    "A file (.npy, .csv, .tsv, .txt, .mat, .graphml, .zip of The Virtual Brain), hcp-s400, or the preset milisav2025."
)
_OUTPUTS = "Nodes read in each module; default all for presets, 10 (or the smallest module) for connectomes."
_INPUTS = "random: one module by seed, each: one after the other; default random for presets, each for connectomes."
Network = Annotated[str, Parameter(help=_NETWORK)]
Levels = Annotated[
    tuple[Whole, ...], Several, Parameter(help="Of a preset: 0 random, 1 flat modules, ...; default the depth.")
]
Nulls = Annotated[tuple[Preserve, ...], Several, Parameter(help="Rewired networks to compare with.")]
Radii = Annotated[tuple[float, ...], Several, Parameter(help="Spectral radii to scale the weights to.")]
Penalties = Annotated[
    tuple[float, ...], Several, Parameter(help="Of the ridge regression; the best by generalized cross-validation.")
]
Noise = Annotated[tuple[float, ...], Several, Parameter(help="Standard deviations of noise on the states read.")]
Bits = Annotated[int | None, _Whole, Parameter(help="Precision of the states read, beside full precision.")]
Inputs = Annotated[Literal["random", "each"] | None, Parameter(help=_INPUTS)]
Outputs = Annotated[int | None, _Whole, Parameter(help=_OUTPUTS)]
Rows = Annotated[Orientation | None, Parameter(help="Of a file that is not symmetric: which way its rows point.")]
Variable = Annotated[str | None, Parameter(help="The matrix to take from a .mat file with several.")]
Figure = Annotated[Path | None, Parameter(help="Figure to write (.svg).")]
Workers = Annotated[int | None, _Whole, Parameter(help="Processes, 0: none but this one; default one a core.")]

_MOST = 10**6  # seeds, networks, turns: as many as fit into memory as rows
_MOST_RUNS = 10**4  # each is compared with every other
_LONGEST = 10**8  # steps; their targets take gigabytes
# What an option is called in the functions that read it.
_OPTIONS = {
    "spectral_radius": "radius", "input_gain": "gain", "penalties": "penalty", "read_noise": "noise",
    "read_bits": "bits", "n_outputs": "outputs", "max_delay": "delays", "system": "task", "level": "levels",
}  # fmt: skip
_NULL = "null-{:04d}.npy"
_RADII = (0.6, 0.8, 1.0, 1.2, 1.4)
_PENALTIES = tuple(10.0**k for k in range(-8, 2))  # the readout takes the best by generalized cross-validation


@app.command(name="eval")
def evaluate(
    network: Network,
    /,
    *,
    task: str = "memory",
    levels: Levels = (),
    nulls: Nulls = (),
    radius: Radii = _RADII,
    gain: float = 1.0,
    leak: float = 1.0,
    penalty: Penalties = _PENALTIES,
    noise: Noise = (0.0,),
    bits: Bits = None,
    inputs: Inputs = None,
    outputs: Outputs = None,
    length: Whole = 2000,
    delays: Whole = 16,
    lyapunov: Flag = False,
    seeds: Whole = 5,
    seed: Whole = 0,
    orientation: Rows = None,
    variable: Variable = None,
    out: Figure = None,
    workers: Workers = None,
    as_json: Json = False,
) -> int:
    """Run a task on a network over spectral radii and seeds; print the mean R² with 95 % intervals over seeds.

    The task enters at all nodes of one module and every other module is read by a ridge regression of its own; the
    score is the mean over them.  Draw it to OUT (.svg).  Interrupted, the same command goes on where it stopped.

    Parameters
    ----------
    task
        memory, nonlinear, multitask, or a system to forecast: lorenz, mackey_glass, henon, rossler, narma, ...
    gain
        Weight of the input.
    leak
        1: no memory in the nodes themselves.
    length
        Steps to fit, and as many to score.
    delays
        Of the memory task.
    lyapunov
        Measure the largest Lyapunov exponent too.
    seeds
        How many; each draws a network (of a preset), a null, inputs and the series.
    seed
        The first.
    """
    from commissure.reservoirs.by_name import PRESETS, TaskInputs, models_by_name, task_by_name
    from commissure.reservoirs.sweep import Sweep
    from commissure.runs import RunStore

    _check_figure(out)
    _check_sizes(seeds, seed, length, workers)
    with _named_as_options():
        chosen = task_by_name(task, length=length, max_delay=delays)
        models = models_by_name(
            network, levels=levels, nulls=nulls, orientation=orientation, variable=variable, seed=seed
        )
        sweep = Sweep(
            models=models,
            spectral_radius=radius,
            seeds=range(seed, seed + seeds),
            io=TaskInputs.published(chosen, of_preset=network in PRESETS, which=inputs, n_outputs=outputs),
            read_noise=noise,
            read_bits=(None,) if bits is None else (None, bits),
            penalties=penalty,
            input_gain=gain,
            leak=leak,
            lyapunov=lyapunov,
        )
        with RunStore() as store:
            found = sweep.run(chosen, store=store, workers=workers)
    _tell(found, list(models), {"network": network, "task": task}, as_json=as_json)
    if out is not None and not found.missing:
        _draw_scores(out, _rows(found))
    return 130 if found.missing else 0


@app.command
def bench(*, full: Flag = False, repeats: Whole = 5, as_json: Json = False) -> None:
    """Time reservoirs against other ways to simulate them, in turns in one process; print ratios with their ranges.

    Parameters
    ----------
    full
        All sizes, up to 5000 nodes, which takes some ten minutes; default the published size.
    repeats
        Turns of each contender.
    """
    from commissure.reservoirs.bench import bench as measure

    rows = measure(full=full, repeats=_within("repeats", repeats))
    if as_json:
        _print(json.dumps({"rows": _plain(rows)}))
        return
    _print(f"{'part':17} {'nodes':>6} {'density':>8} {'rows':>5} {'dtype':8} {'ours':>10} "
           f"{'rival':28} {'times ours':>24} {'differs by':>11}")  # fmt: skip
    for row in rows:
        gain = f"{row.gain.median:.3g} [{row.gain.low:.3g}, {row.gain.high:.3g}]"
        _print(f"{row.part:17} {row.nodes:6} {row.density:8.3f} {row.rows:5} {row.dtype:8} {row.ours:10.4g} "
               f"{row.rival:28} {gain:>24} {row.difference:11.1e}")  # fmt: skip
    _print("\nours: microseconds a sequence and step (states), CPU seconds (sweep), megabytes (memory)")


@app.command
def null(
    network: Network,
    /,
    *,
    preserve: Preserve = "degree",
    count: Whole = 1,
    out: Path,
    swaps_per_edge: float = 10.0,
    keep_connected: Flag = False,
    strengths: Flag = False,
    orientation: Rows = None,
    variable: Variable = None,
    seed: Whole = 0,
    as_json: Json = False,
) -> None:
    """Rewire a network COUNT times into the folder OUT (null-0000.npy, ..., rows are sources); print how far it moved.

    Nodes keep their order, and with it the names a file gives them.  A file's modules are those of Louvain's
    algorithm, the most typical of 100 runs.

    Parameters
    ----------
    preserve
        degree, degree+modules (each node's degree inside its module too), degree+levels (at every level).
    count
        Networks to make.
    out
        Folder to write; made where it does not exist.
    swaps_per_edge
        Swaps of two edges to try, for each edge.
    keep_connected
        Stay (strongly) connected.
    strengths
        Keep every node's sum of weights too, nearly.
    seed
        The first; one more for each network.
    """
    import numpy as np

    from commissure.core.files import replacing
    from commissure.reservoirs.by_name import network_by_name
    from commissure.reservoirs.nulls import rewire

    _within("count", count)
    _check_folder(out, count)
    connectome = network_by_name(
        network, orientation=orientation, variable=variable, seed=seed, with_levels=preserve != "degree"
    )
    rows = []
    with _progress("null", count) as advance:
        for k in range(count):
            made = rewire(connectome, preserve=preserve, swaps_per_edge=swaps_per_edge, keep_connected=keep_connected,
                          strengths=strengths, seed=seed + k)  # fmt: skip
            path = out / _NULL.format(k)
            with _writing(out):
                out.mkdir(exist_ok=True)
                with replacing(path) as partial, partial.open("wb") as file:
                    np.save(file, made.connectome.to_array(), allow_pickle=False)
            rows.append({"file": str(path), "seed": seed + k, **_plain(made.statistics)})
            advance()
    if as_json:
        _print(json.dumps({"network": network, "preserve": preserve, "rows": rows}))
        return
    _print(f"{connectome!r}, preserving {preserve}\n")
    _print(f"{'file':30} {'accepted':>20} {'moved':>8} {'strength error':>15}")
    for row in rows:
        accepted = f"{row['accepted']:,} of {row['proposed']:,}"
        _print(f"{Path(row['file']).name:30} {accepted:>20} {row['moved']:8.1%} {row['strength_error']:15.2e}")


@app.command
def show(
    network: Network,
    /,
    *,
    levels: Annotated[int | None, Parameter(converter=whole)] = None,
    gamma: float = 1.0,
    runs: Whole = 100,
    orientation: Rows = None,
    variable: Variable = None,
    seed: Whole = 0,
    out: Figure = None,
    as_json: Json = False,
) -> None:
    """Print what a network is made of; draw its connectivity, sorted by modules, to OUT (.svg).

    Parameters
    ----------
    levels
        Of a preset: 0 random, 1 flat modules, ... up to its depth; default the depth.
    gamma
        Resolution of the modules that are looked for in a network without any: more makes them smaller.
    runs
        Of Louvain's algorithm, of which the most typical is kept.  0: no modules are looked for, as where weights are
        negative.
    seed
        Draws the network of a preset, and Louvain's runs.
    """
    from commissure.reservoirs.by_name import network_by_name
    from commissure.reservoirs.show import draw_connectivity, facts

    _check_figure(out)
    _within("runs", runs, 0, _MOST_RUNS)
    with _named_as_options():
        connectome = network_by_name(network, orientation=orientation, variable=variable, level=levels, gamma=gamma,
                                     with_levels=runs > 0, n_runs=runs, seed=seed)  # fmt: skip
    found = facts(connectome).to_dict()
    if out is not None:
        with _figure(out, (6.5, 5.5)) as figure:
            draw_connectivity(figure, connectome, title=Path(network).name)
    if as_json:
        _print(json.dumps(_plain(found)))
        return
    for name, value in found.items():
        if isinstance(value, tuple):
            _print(f"{name:24} {' > '.join(f'{x:.3f}' if isinstance(x, float) else str(x) for x in value) or '-'}")
        else:
            _print(f"{name:24} {value:.6g}" if isinstance(value, float) else f"{name:24} {value}")


def _rows(found: Any) -> list[dict[str, Any]]:
    rows = [_plain(score) for score in found.scores()]
    return [{"network": row.pop("model"), **row} for row in rows]


def _tell(found: Any, names: list[str], about: dict[str, Any], *, as_json: bool) -> None:
    """Print a sweep; comparisons need every cell and two seeds."""
    compared = [] if found.missing or len({row.seed for row in found.rows}) < 2 else _comparisons(found, names)
    if as_json:
        told = {**about, "rows": _rows(found), "comparisons": _plain(compared), "missing": found.missing}
        _print(json.dumps(told))
        return
    if found.rows:
        _print_scores(_rows(found))
    _print_comparisons(compared)


def _condition(row: dict[str, Any]) -> str:
    parts = [f"noise {row['read_noise']:g}"] if row["read_noise"] else []
    parts += [f"{row['read_bits']} bits"] if row["read_bits"] is not None else []
    return ", ".join(parts) or "clean"


def _curves(rows: list[dict[str, Any]], value: str) -> dict[str, dict[str, Any]]:
    """By condition and network: the value of every seed (rows) at every radius (columns)."""
    import numpy as np

    found: dict[str, dict[str, dict[int, list[float]]]] = {}
    for row in rows:
        seeds = found.setdefault(_condition(row), {}).setdefault(row["network"], {})
        seeds.setdefault(row["seed"], []).append(row[value])
    return {c: {name: np.array(list(seeds.values())) for name, seeds in named.items()} for c, named in found.items()}


def _radii(rows: list[dict[str, Any]]) -> list[float]:
    return list(dict.fromkeys(row["spectral_radius"] for row in rows))


def _print_scores(rows: list[dict[str, Any]]) -> None:
    from commissure.core.stats import mean_interval

    radii, exponents = _radii(rows), None
    if rows[0]["lyapunov"] is not None:
        exponents = next(iter(_curves(rows, "lyapunov").values()))
    names = list(dict.fromkeys(row["network"] for row in rows))
    width = max(20, *map(len, names))
    header = f"{'radius':>8}  " + "  ".join(f"{name:^{width}}" for name in names)
    for condition, named in _curves(rows, "score").items():
        counts = sorted({len(values) for values in named.values()})  # several where Ctrl-C left some out
        _print(f"{condition}: mean R² [95 % over {' or '.join(map(str, counts))} seeds]")
        _print(header)
        for at, radius in enumerate(radii):
            cells = []
            for values in named.values():
                if len(values) > 1:
                    mean, low, high = mean_interval(values[:, at])
                    cells.append(f"{mean:.4f} [{low:.3f}, {high:.3f}]")
                else:
                    cells.append(f"{values[0, at]:.4f}")
            _print(f"{radius:8g}  " + "  ".join(f"{cell:^{width}}" for cell in cells))
        _print("")
    if exponents is not None:
        _print("largest Lyapunov exponent (nats a step), mean over seeds: ordered below 0, chaotic above")
        _print(header)
        for at, radius in enumerate(radii):
            told = "  ".join(f"{values[:, at].mean():^{width}.4f}" for values in exponents.values())
            _print(f"{radius:8g}  {told}")


def _comparisons(found: Any, names: list[str]) -> list[Any]:
    """One network against every other: the last that is no null."""
    mine = [name for name in names if not name.startswith("null: ")][-1]
    return [row for other in names if other != mine for row in found.compare(mine, other)]


def _print_comparisons(rows: Sequence[Any]) -> None:
    """Differences with their intervals, P(a > b), and p-values corrected over the rows of each pair."""
    pair = None
    for row in rows:
        if pair != (row.a, row.b):
            pair = row.a, row.b
            _print(f"{row.a} (a) against {row.b} (b), {row.n_pairs} seeds")
            _print(f"{'radius':>8}  {'paired difference [95 %]':28} P(a > b)  p (Holm)")
        told = _condition({"read_noise": row.read_noise, "read_bits": row.read_bits})
        estimate, low, high = row.difference
        interval = f"{estimate:+.4f} [{low:+.4f}, {high:+.4f}]"
        _print(f"{row.spectral_radius:8g}  {interval:28} {row.cles:8.2f} {row.p_holm:9.2g}  {told}")
    if rows:
        _print("")


def _draw_scores(out: Path, rows: list[dict[str, Any]]) -> None:
    import numpy as np

    from commissure.reservoirs.show import draw_sweep

    scores = _curves(rows, "score")
    exponents = next(iter(_curves(rows, "lyapunov").values())) if rows[0]["lyapunov"] is not None else None
    with _figure(out, (1.5 + 3.2 * len(scores), 3.5 if exponents is None else 5.5)) as figure:
        draw_sweep(figure, np.array(_radii(rows)), scores, exponents=exponents)


@contextmanager
def _figure(out: Path, size: tuple[float, float]) -> Iterator[Any]:
    """An empty figure that is written when it has been drawn."""
    from matplotlib.figure import Figure

    from commissure.core.files import replacing

    figure = Figure(figsize=size, layout="constrained")
    yield figure
    with _writing(out), replacing(out) as partial:
        figure.savefig(partial, format="svg")


@contextmanager
def _progress(name: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar of the networks done, on stderr where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    columns = name, BarColumn(), MofNCompleteColumn(), "networks", TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task(name, total=total)
        yield lambda: progress.advance(bar)


@contextmanager
def _named_as_options() -> Iterator[None]:
    """Errors name the option that was typed, not the argument it became."""
    try:
        yield
    except InputError as error:
        name, bracket, rest = error.argument.partition("[")
        allowed = error.allowed
        if name == "system":
            allowed = allowed.replace("one of ", "one of memory, nonlinear, multitask, ")
        raise InputError(_OPTIONS.get(name, name) + bracket + rest, error.value, allowed, error.fix) from error


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    """A place that the system refuses is bad input."""
    try:
        yield
    except OSError as error:
        raise InputError("out", str(out), "a place that can be written", error.strerror or str(error)) from error


def _check_figure(out: Path | None) -> None:
    if out is None:
        return
    with _writing(out):
        check_target(out, "out")
    if out.suffix != ".svg":
        raise InputError("out", str(out), "a name ending in .svg", f"pass {out.with_suffix('.svg')}")
    _check_writable(out, out.parent)


def _check_folder(out: Path, count: int) -> None:
    """Also that it holds no other nulls: a script that reads all of a folder would mix them."""
    with _writing(out):
        exists = out.exists()
        if not out.parent.is_dir() or (exists and not out.is_dir()):
            raise InputError("out", str(out), "a folder, or a new one in an existing folder")
        written = {_NULL.format(k) for k in range(count)}
        others = sorted(path.name for path in out.glob("null-*.npy") if path.name not in written)
    if others:
        raise InputError("out", str(out), f"a folder without other nulls, found {others[0]}", "take a new folder")
    _check_writable(out, out if exists else out.parent)


def _check_sizes(seeds: int, seed: int, length: int, workers: int | None) -> None:
    _within("seeds", seeds)
    _within("seed", seed, 0, 2**63 - 1 - seeds)  # the run store's integers
    _within("length", length, 1, _LONGEST)
    _within("workers", workers or 0, 0)


def _check_writable(out: Path, folder: Path) -> None:
    """Before the work, not after it."""
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError("out", str(out), "a place that can be written", f"{folder} cannot be")


def _within(name: str, value: int, least: int = 1, most: int = _MOST) -> int:
    if not least <= value <= most:
        raise InputError(name, value, f"an integer from {least} to {most}")
    return value


def _plain(value: Any) -> Any:
    """Data for JSON: rows as objects, numbers that JSON has no word for as null."""
    from dataclasses import asdict, is_dataclass

    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return _plain(value._asdict())
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _print(text: str) -> None:
    sys.stdout.write(text + "\n")
