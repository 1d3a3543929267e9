"""`commissure decode`: simulate, fit, eval, stream, bench.

A recording is an .npz file written by `SpikeRecording.save`, or the name of a real one ("chewie-2013-12-19",
"mc-maze-trial-748"), fetched on first use.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter

from commissure.core.errors import InputError
from commissure.core.files import check_target
from commissure.core.options import whole

__all__ = ["app"]

app = App(name="decode", help="Decode behavior from spikes.")

Json = Annotated[bool, Parameter(name="--json", negative="")]
Whole = Annotated[int, Parameter(converter=whole)]
BINNED = ("chewie-2013-10-03", "chewie-2013-12-19", "mihi-2014-03-03")
MAZE = "mc-maze-trial-748"


def open_recording(source: str, *, bin_s: float = 0.1) -> Any:
    """The recording of a file or of a real session's name."""
    from commissure.decode import SpikeRecording, recordings

    if source in BINNED:
        return recordings.mihi_chewie(source, bin_s)
    if source == MAZE:
        return recordings.mc_maze_trial()
    if not Path(source).is_file():
        known = ", ".join((*BINNED, MAZE))
        raise InputError("recording", source, f"an .npz file or one of {known}", "check the path")
    return SpikeRecording.load(source)


@app.command
def simulate(
    output: Path,
    /,
    *,
    task: Literal["RT", "CO"] = "RT",
    n_units: Whole = 60,
    duration_s: float = 240.0,
    timing: float = 0.0,
    seed: Whole = 0,
) -> None:
    """Write a simulated reaching session to OUTPUT (.npz).

    Parameters
    ----------
    output
        File to write.
    task
        RT: random targets; CO: center-out.
    n_units
        Recorded units.
    duration_s
        Length in seconds.
    timing
        How strongly spike phases carry velocity, 0 to 1.
    seed
        Session number.
    """
    from commissure.decode import simulate_reaching

    check_target(output, "output")
    (recording,) = simulate_reaching(task, n_units=n_units, duration_s=duration_s, timing=timing, seed=seed)
    recording.save(output)
    _print(
        f"{output}: {len(recording.times):,} spikes of {n_units} units in {duration_s:g} s, session {recording.session}"
    )


@app.command
def fit(
    recording: str,
    /,
    *,
    output: Path,
    preset: str = "possm-direct",
    backbone: str = "gru",
    chunk_s: float | None = None,
    steps: Annotated[int | None, Parameter(converter=whole)] = None,
    test_fraction: float = 0.2,
    seed: Whole = 0,
    as_json: Json = False,
) -> None:
    """Fit a POSSM on a recording, write it to OUTPUT (.safetensors), print R2 on trials it has not seen.

    Parameters
    ----------
    recording
        An .npz file or the name of a real session.
    output
        File to write.
    preset
        possm-direct or possm-ss.
    backbone
        gru, s4d or mamba.
    chunk_s
        Seconds per chunk; default the recording's bin, or 0.05.
    steps
        Training steps; default the preset's.
    test_fraction
        Share of the trials (of the time, in a continuous recording) kept for the test; 0 fits on all.
    seed
        Draws the split, the weights and the batches.
    as_json
        Print one JSON object.
    """
    from commissure.decode import POSSM, FitConfig
    from commissure.train.progress import progress_bar

    check_target(output, "output")
    data = open_recording(recording)
    train, test = hold_out(data, test_fraction, seed)
    auxiliary = 0 if data.auxiliary is None or preset == "possm-ss" else data.auxiliary.shape[1]
    model = POSSM.from_preset(
        preset,
        backbone=backbone,
        chunk_s=data.bin_s if chunk_s is None else chunk_s,
        out_dim=data.behavior.shape[1],
        auxiliary_dim=auxiliary,
        seed=seed,
    )
    config = model.fit_config if steps is None else FitConfig(**{**model.fit_config.model_dump(), "steps": steps})
    start = time.process_time()
    with progress_bar("fit") as report:
        model.fit(train, config=config, seed=seed, progress=report)
    seconds = time.process_time() - start
    model.save(output)
    result = {"model": str(output), "train_r2": model.score(train), "cpu_s": seconds}
    if test is not None:
        result["test_r2"] = model.score(test)
    _report(result, as_json)


@app.command(name="eval")
def evaluate(
    model: Path, recording: str, /, *, test_fraction: float | None = None, seed: Whole = 0, as_json: Json = False
) -> None:
    """Print the R2 of a fitted POSSM on a recording of a session it knows.

    Parameters
    ----------
    model
        A file written by `decode fit`.
    recording
        An .npz file or the name of a real session.
    test_fraction
        Score only the part `decode fit` kept for the test with this fraction and seed.
    seed
        See test_fraction.
    as_json
        Print one JSON object.
    """
    from commissure.decode import POSSM, r2_per_output

    decoder, data = POSSM.load(model), open_recording(recording)
    if test_fraction is not None:
        data = hold_out(data, test_fraction, seed)[1]
        if data is None:
            raise InputError("test_fraction", test_fraction, "a fraction > 0", "leave it out to score the whole")
    else:
        sys.stderr.write("this includes what the model was fitted on; --test-fraction scores the rest alone\n")
    prediction = decoder.predict(data)
    _report(
        {
            "r2": decoder.score(data),
            "r2_per_output": r2_per_output(data.behavior, prediction).tolist(),
            "n_samples": len(prediction),
        },
        as_json,
    )


@app.command
def stream(
    model: Path,
    /,
    *,
    replay: str,
    speed: float = 1.0,
    engine: Literal["auto", "c++", "torch"] = "auto",
    as_json: Json = False,
) -> None:
    """Replay a recording through the streaming decoder at its own pace; print rate, latency, late and dropped counts.

    Parameters
    ----------
    model
        A file written by `decode fit`.
    replay
        An .npz file or the name of a real session the model knows.
    speed
        How many times faster than real time; 0 is as fast as possible.
    engine
        Which engine computes.
    as_json
        Print the final counts as one JSON object.
    """
    from commissure.decode import POSSM
    from commissure.decode.replay import replay_stream

    if not speed >= 0:
        raise InputError("speed", speed, "a number >= 0 (0: as fast as possible)")
    summary = replay_stream(
        POSSM.load(model), open_recording(replay), speed=speed, engine=engine, live=sys.stderr.isatty()
    )
    _report(summary._asdict(), as_json)


@app.command
def bench(*, repeats: Whole = 200, as_json: Json = False) -> None:
    """Time the streaming engines and the training encoder; print ratios with their ranges.

    Parameters
    ----------
    repeats
        Chunks timed per engine and spike count.
    as_json
        Print the rows as JSON.
    """
    from commissure.decode.bench import bench_tables, print_tables

    tables = bench_tables(repeats=repeats)
    if as_json:
        _print(json.dumps({name: [row._asdict() for row in rows] for name, rows in tables.items()}))
    else:
        print_tables(tables)


def hold_out(recording: Any, fraction: float, seed: int) -> tuple[Any, Any | None]:
    """Split off a random share of the trials, or the last share of a continuous recording."""
    from commissure.core.rng import generator

    if not 0 <= fraction < 1:
        raise InputError("test_fraction", fraction, "a number in [0, 1)")
    if fraction == 0:
        return recording, None
    if recording.trials is None:
        start, stop = recording.segments[0]
        cut = start + (1 - fraction) * (stop - start)
        return recording.between(start, cut), recording.between(cut, stop)
    order = generator(seed, "split").permutation(len(recording.trials))
    n_train = int((1 - fraction) * len(order))
    if not 0 < n_train < len(order):
        raise InputError("test_fraction", fraction, f"a share that leaves trials on both sides of {len(order)}")
    return recording.select_trials(order[:n_train]), recording.select_trials(order[n_train:])


def _report(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        _print(json.dumps(result))
        return
    for name, value in result.items():
        shown = ", ".join(f"{v:.4f}" for v in value) if isinstance(value, list) else value
        _print(f"{name:16} {shown:.4f}" if isinstance(shown, float) else f"{name:16} {shown}")


def _print(text: str) -> None:
    sys.stdout.write(text + "\n")
